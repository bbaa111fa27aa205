"""`analyze`: roles, axes, groups, evidence and reasons, on programs small enough to know them. D0, section 2.2."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from reading import X, read, shapes

import clipjax


def table(analysis):
    return {row.path: row for row in analysis.rows}


def mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["ab"]) @ p["b"]


def test_units_of_a_hidden_layer_are_proved():
    (group,) = read(mlp, a=(4, 8), ab=(8,), b=(8, 3)).groups
    assert (group.units, dict(group), group.proved) == (8, {"a": -1, "ab": -1, "b": -2}, True)


def test_attention_has_two_groups_on_one_axis():
    def model(p, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
        repeats = q.shape[1] // k.shape[1]
        k, v = (jnp.repeat(x, repeats, 1) for x in (k, v))
        mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k)), v)
        return mixed.reshape(mixed.shape[0], -1) @ p["o"]

    analysis = read(model, q=(4, 6, 5), k=(4, 2, 5), v=(4, 2, 5), o=(30, 3))
    assert sorted(group.units for group in analysis.groups) == [2, 3, 5, 5]
    (heads,) = (group for group in analysis.groups if group.units == 2)
    places = {(m.path, m.axis): m.places.tolist() for m in heads.members}
    assert places["q", -2] == [0, 0, 0, 1, 1, 1]  # query head i belongs to key head i // 3
    assert places["o", -2] == [0] * 15 + [1] * 15
    rows = table(analysis)
    assert [rows[name].inputs for name in "qkvo"] == [(-3,), (-3,), (-3,), (-2,)]
    assert [rows[name].outputs for name in "qkvo"] == [(-2, -1), (-2, -1), (-2, -1), (-1,)]


def test_concatenated_readers_have_their_offsets():
    def model(p, x):
        return jnp.concatenate([jnp.tanh(x @ p["a"]), jax.nn.relu(x @ p["b"])], -1) @ p["c"]

    a, b = read(model, a=(4, 4), b=(4, 8), c=(12, 3)).groups
    places = [next(m.places.tolist() for m in group.members if m.path == "c") for group in (a, b)]
    assert places == [[0, 1, 2, 3, *[-1] * 8], [*[-1] * 4, *range(8)]]


def test_gate_and_up_share_a_unit_of_one_kernel():
    def model(p, x):
        gate, up = jnp.split(x @ p["gu"], 2, -1)
        return (jax.nn.silu(gate) * up) @ p["down"]

    (group,) = read(model, gu=(4, 10), down=(5, 3)).groups
    assert next(m.places.tolist() for m in group.members if m.path == "gu") == [*range(5)] * 2


def test_roles():
    def model(p, x):
        h = p["embed"][jnp.zeros(2, int)] + x @ p["in"] + p["positions"][: x.shape[0]]
        return jax.nn.relu(h * p["scale"]) @ p["out"]

    leaves = {"embed": (9, 8), "in": (4, 8), "positions": (2, 8), "scale": (8,), "out": (8, 3), "spare": (8,)}
    analysis = read(model, **leaves)
    assert {row.path: row.role for row in analysis.rows} == {
        "embed": "embedding",
        "in": "kernel",
        "positions": "scale or offset",
        "scale": "scale or offset",
        "out": "kernel",
        "spare": "unused",
    }
    assert [analysis.kernels(name, None) for name in ("embed", "in")] == [False, True]
    assert analysis.inputs.fn("params/in", None) == (-2,)
    assert [dict(group) for group in analysis.groups] == [
        {"in": -1, "embed": -1, "out": -2, "positions": -1, "scale": -1}
    ]
    with pytest.raises(ValueError, match="`path` must be one that was analyzed, got 'other'"):
        analysis.kernels("other", None)


PINS = {
    "an output of the model": lambda p, x: x @ p["e"],
    "counts along it": lambda p, x: (x @ p["e"] + jnp.arange(16)) @ p["o"],
    "a constant that differs along it": lambda p, x: (x @ p["e"] + np.arange(16.0)) @ p["o"],
    "adds up along it": lambda p, x: jnp.cumsum(x @ p["e"], -1) @ p["o"],
    "orders its entries": lambda p, x: jnp.sort(x @ p["e"], -1) @ p["o"],
    "is not known to clipjax": lambda p, x: (
        jax.pure_callback(lambda h: h, jax.ShapeDtypeStruct((2, 16), "float32"), x @ p["e"]) @ p["o"]
    ),
    "depends on the number of units": lambda p, x: x @ p["e"] / p["e"].shape[1] @ p["o"],
    "an entry would belong to two": lambda p, x: ((h := x @ p["e"])[:, None] * h[..., None]).reshape(2, -1) @ p["oo"],
    "gives a position in it": lambda p, x: p["table"][jnp.argmax(x @ p["e"], -1)],
}


@pytest.mark.parametrize("reason", PINS)
def test_what_is_not_certain_is_refused_with_its_reason(reason):
    """The other units of the same model are found all the same."""

    def model(p, x):
        return PINS[reason](p, jax.nn.relu(x @ p["first"]) @ p["second"])

    leaves = {
        "first": (4, 7),
        "second": (7, 4),
        "e": (4, 16),
        "o": (16, 3),
        "oo": (256, 3),
        "table": (16, 3),
        "half": (8, 3),
    }
    analysis = read(model, **leaves)
    assert 7 in [group.units for group in analysis.groups]
    made = {(member.path, member.axis) for group in analysis.groups + analysis.inexact for member in group.members}
    assert ("e", -1) not in made
    assert reason in str(analysis)


def test_a_slice_of_fixed_width_is_refused():
    """The units that are left out of it are found."""
    (rest,) = read(lambda p, x: (x @ p["e"])[:, :6].sum(-1, keepdims=True) * p["o"], e=(4, 16), o=(3,)).groups
    assert rest.members[0].places.tolist() == [-1] * 6 + [*range(10)]
    analysis = read(lambda p, x: jnp.tanh((h := x @ p["e"])[:, :8] * h[:, 8:]) @ p["o"], e=(4, 16), o=(8, 3))
    (group,) = analysis.groups
    assert not group.proved
    assert "read from one trace (TypeError: mul got incompatible shapes for broadcasting" in str(analysis)


def test_layers_of_a_scan_have_units_of_their_own():
    def model(p, x):
        def layer(h, w):
            return h + jax.nn.relu(h @ w["a"] + w["ab"]) @ w["b"], None

        return jax.lax.scan(layer, x @ p["in"], p["layers"])[0] @ p["out"]

    leaves = shapes(a=(3, 16, 24), ab=(3, 24), b=(3, 24, 16))
    analysis = clipjax.analyze(model, {**{"layers": leaves}, **shapes(**{"in": (4, 16), "out": (16, 3)})}, X)
    stream, inner = sorted(analysis.groups, key=lambda group: group.units)
    assert [member.layers for member in stream.members] == [None] * 4
    assert {(m.path, m.axis, m.layers) for m in inner.members} == {
        ("layers/a", -1, -3),
        ("layers/ab", -1, -2),
        ("layers/b", -2, -3),
    }


def test_a_carry_ties_the_units_of_all_turns():
    def model(p, x):
        def turn(h, w):
            return jnp.tanh(h @ w), None

        return jax.lax.scan(turn, x @ p["in"], p["w"])[0] @ p["out"]

    (group,) = read(model, **{"in": (4, 16), "w": (3, 16, 16), "out": (16, 3)}).groups
    assert {member.layers for member in group.members} == {None}

    def stacked(p, x):  # all leaves have an axis of layers
        turn = lambda h, w: (jnp.tanh(h @ w["w"] + x @ w["in"]), None)
        return jax.lax.scan(turn, jnp.zeros((2, p["w"].shape[-1])), p)[0].sum(-1)

    (group,) = read(stacked, **{"in": (3, 4, 16), "w": (3, 16, 16)}).groups
    assert {member.layers for member in group.members} == {None}


class Net(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.relu(x))


def test_linen_is_read_from_one_trace_and_proved_by_rebuild():
    """Arguments that are no arrays are not traced; running statistics are tied to their new values."""
    variables = jax.eval_shape(Net().init, jax.random.key(0), X)
    (walked,) = clipjax.analyze(Net().apply, variables, X, train=False).groups
    assert not walked.proved
    rebuild = lambda widths: Net(widths["Dense_0/kernel"]).apply
    analysis = clipjax.analyze(Net().apply, variables, X, train=True, mutable=["batch_stats"], rebuild=rebuild)
    (group,) = analysis.groups
    assert group.proved
    assert set(group) == {
        *("Dense_0/kernel", "Dense_0/bias", "BatchNorm_0/scale", "BatchNorm_0/bias", "Dense_1/kernel"),
        *("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"),
    }


def test_it_is_printed_and_shown():
    analysis = read(mlp, a=(4, 8), ab=(8,), b=(8, 3))
    assert str(analysis).splitlines()[0].split() == "leaf shape role inputs outputs groups pinned by".split()
    assert str(analysis).splitlines()[-1] == "group 0: 8 units of a, proved by another trace"
    assert "<td>kernel</td>" in analysis._repr_html_()
    assert (
        "<module>"
        not in clipjax.analyze(
            lambda p, x: (x @ p["<module>"]) @ p["b"], shapes(**{"<module>": (4, 8), "b": (8, 3)}), X
        )._repr_html_()
    )


@pytest.mark.parametrize(("name", "arguments"), [("apply_fn", {}), ("rebuild", {"rebuild": {"a": 3}})])
def test_something_that_is_no_function_is_refused(name, arguments):
    with pytest.raises(TypeError, match=f"`{name}` must be a function, got"):
        clipjax.analyze(*([3] if name == "apply_fn" else [mlp]), shapes(a=(4, 8)), X, **arguments)


@pytest.mark.parametrize(
    "make", [lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)), lambda: eqx.nn.Linear(3, 2, key=jax.random.key(0))]
)
def test_a_model_in_the_place_of_the_function_is_refused(make):
    with pytest.raises(TypeError, match=r"must be a function of the model, got a Linear itself.*lambda model, x"):
        clipjax.analyze(make(), jnp.ones((1, 3)))


def test_a_program_that_is_another_one_at_the_width_that_is_left_is_refused():
    """The second trace, at a width of its own, does not see what a model does below four units."""

    def model(p, x):
        return (jnp.tanh if p["a"].shape[1] > 4 else jnp.cos)(x @ p["a"]) @ p["b"]

    (group,) = read(model, a=(4, 60), b=(60, 3)).groups

    def cut(left):
        params = {"a": jnp.ones((4, 60)).at[:, left:].set(0), "b": jnp.ones((60, 3)).at[left:].set(0)}
        return clipjax.shrink(params, [group])

    assert group.proved and cut(5).variables["b"].shape == (5, 3)
    with pytest.raises(ValueError, match=r"`groups` must leave the same program, got '?the operation in tanh"):
        cut(3)


def test_a_single_unit_may_be_left():
    """JAX writes axes of one entry with other equations."""

    def model(p, x):
        h = jnp.repeat(jnp.einsum("td,dhk->thk", x, p["a"]), 2, axis=1)
        return h.reshape(2, -1) @ p["b"] + jnp.einsum("td,dh,h->t", x, p["c"], p["d"])[:, None]

    params = {"a": jnp.ones((4, 2, 3)).at[:, 1].set(0), "b": jnp.ones((12, 3)).at[6:].set(0)}
    params |= {"c": jnp.ones((4, 2)).at[:, 1].set(0), "d": jnp.ones(2).at[1].set(0)}
    small = clipjax.shrink(params, clipjax.analyze(model, params, X)).variables
    assert (small["a"].shape, small["b"].shape, small["c"].shape) == ((4, 1, 3), (6, 3), (4, 1))


@pytest.mark.parametrize("fn", [lambda w: w / jnp.linalg.norm(w, axis=0), lambda w: jnp.log(jnp.abs(w))])
def test_what_is_not_finite_at_zero_is_refused(fn):
    analysis = read(lambda p, x: x @ fn(p["a"]) @ p["b"], a=(4, 8), b=(8, 3))
    assert not analysis.groups + analysis.inexact
    assert "is not finite where its units are 0" in str(analysis)


def test_a_dynamic_slice_at_a_fixed_place_is_refused():
    """Where the array before it is cut, the place where it begins is that of another unit."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (3, 4), "c": (3, 4), "part": (4, 2), "out": (12, 2)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def model(p, x, fixed):
        h = jnp.concatenate([x @ p["a"], x @ p["b"], x @ p["c"]], -1)
        start = 4 if fixed else p["a"].shape[1]
        part = jax.lax.dynamic_slice(h, (0, start), (x.shape[0], p["b"].shape[1]))
        return part @ p["part"] + h @ p["out"]

    x = jnp.ones((5, 3))
    firsts = lambda analysis: {next(iter(group)) for group in analysis.groups}
    assert firsts(clipjax.analyze(model, params, x, True)) == {"b", "c"}
    assert firsts(clipjax.analyze(model, params, x, False)) == {"a", "b", "c"}


def test_what_no_output_needs_pins_nothing():
    def apply(params, x):
        hidden = jax.nn.relu(x @ params["in"])
        jnp.sort(hidden, axis=-1)
        return hidden @ params["out"] + jnp.zeros_like(hidden[..., 0])[..., None]  # asks for its shape alone

    params = {"in": np.ones((3, 8)), "out": np.ones((8, 2))}
    assert str(clipjax.analyze(apply, params, np.ones((4, 3))).groups) == "(Group(8 units; in: -1, out: -2),)"
