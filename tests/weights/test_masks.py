"""Allocation: how the sparsity of a tree becomes that of its leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from erdos_renyi_reference import erdos_renyi

import clipjax
from clipjax import selections, steps, structures

pytestmark = pytest.mark.usefixtures("strict")

# LeNet-300-100, LeNet-5, and a tree with a leaf so small that it has to be dense.
NETS = {
    "lenet_300_100": {"a": (784, 300), "b": (300, 100), "c": (100, 10)},
    "lenet_5": {"a": (5, 5, 1, 20), "b": (5, 5, 20, 50), "c": (800, 500), "d": (500, 10)},
    "small": {"a": (2, 2), "b": (3, 2), "c": (64, 64)},
    "one": {"a": (7, 5)},
}


def removed(masks):
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def scores_of(net):
    keys = jax.random.split(jax.random.key(0), len(NETS[net]))
    return {name: jax.random.uniform(k, shape) for k, (name, shape) in zip(keys, NETS[net].items(), strict=True)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("net", NETS)
def test_erk_gives_rigls_layer_sparsities(net, sparsity):
    """Evci et al., 2020, `get_sparsities_erdos_renyi` with erk_power_scale 1; all leaves together keep 1 − s."""
    shapes = NETS[net]
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    expected = erdos_renyi(sparsity, shapes, sizes)
    got = removed(clipjax.make_mask(scores_of(net), sparsity, scope="erk"))
    assert got == {name: round(expected[name] * sizes[name]) for name in shapes}
    assert abs(sum(got.values()) - sparsity * sum(sizes.values())) <= len(shapes)


def test_erk_of_lenet_300_100_in_numbers():
    """At 95 %: 0.0345, 0.0934 and 0.77 of the three layers stay, from 1/300 + 1/784, 1/100 + 1/300, 1/10 + 1/100."""
    scores = scores_of("lenet_300_100")
    masks = clipjax.make_mask(scores, 0.95, scope="erk")
    raw = {"a": 1084 / 235200, "b": 400 / 30000, "c": 110 / 1000}
    scale = 0.05 * 266200 / (1084 + 400 + 110)
    for name, mask in masks.items():
        np.testing.assert_allclose(float(mask.mean(dtype=jnp.float32)), scale * raw[name], atol=5e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_erk_traced_is_within_one_of_static(sparsity):
    """A schedule's value is f32: a leaf may round the other way."""
    scores = scores_of("lenet_300_100")
    static = removed(clipjax.make_mask(scores, sparsity, scope="erk"))
    traced = removed(jax.jit(lambda s: clipjax.make_mask(scores, s, scope="erk"))(jnp.float32(sparsity)))
    assert all(abs(static[name] - traced[name]) <= 1 for name in scores)


def test_tree_of_targets_is_matched_by_path():
    scores = {"enc": {"a": jnp.arange(10.0)}, "b": jnp.arange(20.0)}
    masks = clipjax.make_mask(scores, {"b": 0.25, "enc": {"a": 0.5}, "more": 0.1})
    assert int((~masks["enc"]["a"]).sum()) == 5 and int((~masks["b"]).sum()) == 5


def test_tree_of_targets_without_a_leaf_names_it():
    with pytest.raises(ValueError, match=r"`sparsity` must name every picked leaf, got \['b'\]"):
        clipjax.make_mask({"a": jnp.ones(3), "b": jnp.ones(3)}, {"a": 0.5})


def test_structure_that_fixes_the_sparsity_wants_none():
    scores = {"a": jnp.arange(8.0).reshape(4, 2)}
    mask = clipjax.make_mask(scores, structure=structures.n_of_m(1, 2))["a"]
    np.testing.assert_array_equal(mask, np.array([[0, 0], [1, 1], [0, 0], [1, 1]], bool))
    with pytest.raises(ValueError, match=r"`sparsity` must be None for n_of_m, got 0\.5"):
        clipjax.make_mask(scores, 0.5, structure=structures.n_of_m(1, 2))


HALF = (1 << 16, 1 << 15)  # 2**31
COUNTED = {  # shapes, arguments, what the error says; shapes alone: nothing is allocated
    "2**33": ([HALF] * 4, {}, None),
    "leaf": ([HALF] * 4, {"scope": "leaf"}, None),
    "erk": ([HALF] * 4, {"scope": "erk"}, None),
    "one array": ([(1 << 17, 1 << 16)], {"scope": "leaf"}, None),
    "one axis": ([(1 << 33,)], {"where": lambda path, leaf: True}, r"`structure` must .*\('w0', \(8589"),
    "units": ([(1 << 17, 1 << 15)] * 2, {"structure": structures.unit()}, None),
    "n of m": ([(1 << 17, 1 << 15)], {"structure": structures.n_of_m(2, 4), "sparsity": None}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_only_axes_without_a_count_are_refused(case):
    shapes, arguments, message = COUNTED[case]
    arguments = {"sparsity": 0.9} | arguments
    params = {f"w{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}
    tx = clipjax.prune_mask(**arguments)

    def masks(x):
        return clipjax.make_mask(x, **{name: value for name, value in arguments.items() if name != "where"})

    if message is None:
        jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
        assert all(
            m.shape == p.shape for m, p in zip(jax.eval_shape(masks, params).values(), params.values(), strict=True)
        )
        return
    for call in (tx.init, masks):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, params)


def test_a_refresh_over_seven_billion_parameters_compiles():
    """Ahead of time, for arrays that do not exist: one of more than 2**32 entries, two that are too large to copy."""
    shapes = {"big": (80, 8192, 8192), "l0": (16, 8192, 8192), "l1": (16, 8192, 8192)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    tx = clipjax.prune_mask(optax.linear_schedule(0.0, 0.9, 100), every=10, stop=100)
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert "[2,16,8192,8192]" not in text and " sort(" not in text and " gather(" not in text


@pytest.mark.parametrize("shape", [(2**16, 2**17), (2**33,)])
def test_others_that_count_refuse_it_too(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    calls = {
        "`select` must": lambda x: selections.largest(0.1).choose([x], None),
        "`step` must": lambda x: clipjax.choose_step(x, 4, step=steps.percentile(99)),
    }
    for message, call in calls.items():
        if len(shape) == 1:
            with pytest.raises(ValueError, match=f"{message}.*{shape[0]}"):
                jax.eval_shape(call, x)
        else:
            jax.eval_shape(call, x)
