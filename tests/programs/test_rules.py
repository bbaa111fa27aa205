"""Rules of single primitives: which axes of their results are those of their operands, and what they pin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import shrink

RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(size=shape).astype(np.float32)
    for name, shape in {"a": (3, 4), "b": (3, 4), "o": (8, 2), "token": (4,), "read": (4, 2)}.items()
}
X = RNG.normal(size=(2, 5, 3)).astype(np.float32)


def cut(model, *dead):
    """The units of the one group, after these are dead in all leaves and the small model's outputs are compared."""
    analysis = clipjax.analyze(model, PARAMS, X)
    (group,) = analysis.groups
    large = {path: x.copy() for path, x in PARAMS.items()}
    for path, axis, places, _ in group.members:
        np.moveaxis(large[path], axis, 0)[np.isin(places, dead)] = 0
    small = shrink(jax.tree.map(jnp.asarray, large), analysis, verify=(model, X)).variables
    assert small["a"].shape == (3, group.units - len(dead))
    return {member.path: member.places.tolist() for member in group.members}


def test_stacked_arrays_alternate():
    def model(p, x):
        h = jnp.stack([x @ p["a"], jnp.cos(x @ p["b"])], -1)
        return h.reshape(*h.shape[:-2], -1) @ p["o"]

    assert cut(model, 1, 2)["o"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tiled_features_are_one_row_behind_the_other():
    assert cut(lambda p, x: jnp.tile(jnp.cos(x @ p["a"]), 2) @ p["o"], 0, 1)["o"] == [0, 1, 2, 3] * 2


def test_rows_that_are_written_into_a_sequence_have_its_units():
    """What is written counts as 0 where the sequence and the rows are 0, so a sum over the units is exact."""

    def model(p, x):
        h = (x @ p["a"]).at[:, 0].set(p["token"])
        h = jnp.zeros((2, 3, h.shape[-1])).at[:, jnp.arange(5) % 3].add(h)
        return h * h.sum(-1, keepdims=True) @ p["read"]

    assert cut(model, 0, 3)["token"] == [0, 1, 2, 3]

    def shifted(p, x):
        h = (x @ p["a"]).at[:, 0].set(jnp.cos(p["token"]))
        return h * h.sum(-1, keepdims=True) @ p["read"]

    analysis = clipjax.analyze(shifted, PARAMS, X)
    assert not analysis.groups
    assert "reduce_sum (test_rules.py:" in analysis.inexact[0].statistics[0]


def test_units_that_are_written_at_an_index_are_pinned():
    def model(p, x):
        h = jnp.moveaxis(x @ p["a"], -1, 0)
        return jnp.zeros((4, 2, 5)).at[jnp.argsort(p["token"])].add(h).sum(0)

    analysis = clipjax.analyze(model, PARAMS, X)
    assert not analysis.groups
    assert "scatter-add (test_rules.py:" in str(analysis) and "where the data decide" in str(analysis)

    def part(p, x):
        h = x @ p["a"]
        return jnp.zeros((2, 5, 6)).at[..., :4].set(h) @ p["o"][:6]

    assert not jax.tree.leaves([dict(g) for g in clipjax.analyze(part, PARAMS, X).groups if "a" in g])


ROWS = X[0]  # f32[5, 3]


def hidden(p):
    return jnp.tanh(ROWS @ p["a"])


def heads(p):
    """Query, key and value in one array, taken apart."""
    q, k, v = jnp.unstack(jnp.einsum("bd,edf->ebf", ROWS, p["a"]))
    return (jnp.tanh(q) * k + v) @ p["o"]


def kernels(p):
    """Kernels that are stacked before they are multiplied: they are kernels still."""
    return jnp.einsum("bd,edf->bf", ROWS, jnp.stack([p["a"], p["b"]])) @ p["o"]


def tokens(p):
    """A Fourier transform along the rows; the units stay apart."""
    return jnp.fft.fft(hidden(p), axis=0).real @ p["o"]


EXACT = {  # the program and its leaves; all have one group
    "taken apart": (heads, {"a": (3, 3, 4), "o": (4, 2)}),
    "stacked kernels": (kernels, {"a": (3, 4), "b": (3, 4), "o": (4, 2)}),
    "transformed": (tokens, {"a": (3, 4), "o": (4, 2)}),
}
PINNED = {
    "unstack": lambda p: sum(jnp.unstack(jnp.cos(ROWS @ p["a"]), axis=1))[:, None] * (ROWS @ p["b"]),
    "fft": lambda p: jnp.fft.fft(hidden(p)).real @ p["o"],
}


def filled(shapes):
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", EXACT)
def test_units_keep_their_places_in_what_is(name):
    model, shapes = EXACT[name]
    p = filled(shapes)
    analysis = clipjax.analyze(model, p)
    (group,) = (group for group in analysis.groups if group.proved)
    assert [row.role for row in analysis.rows] == ["kernel"] * len(p)
    for path, axis, places, _ in group.members:
        np.moveaxis(p[path], axis, 0)[np.isin(places, [0, 2])] = 0
    small = shrink(p, [group]).variables
    assert {path: x.shape for path, x in small.items()} == {
        path: tuple(n if n in (2, 3) else n // 2 for n in shape) for path, shape in shapes.items()
    }
    np.testing.assert_allclose(model(small), model(p), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PINNED)
def test_units_are_pinned_by(name):
    analysis = clipjax.analyze(PINNED[name], filled({"a": (3, 4), "b": (3, 2), "o": (4, 2)}))
    assert not analysis.groups
    assert f"{name} (test_rules.py:" in str(analysis)


def test_ones_beside_units_are_not_zero():
    def model(p):
        h = jnp.stack([hidden(p), jnp.ones((5, p["a"].shape[1]))], 1)
        return jnp.square(h).sum((1, 2))[:, None] * (ROWS @ p["b"])

    assert not clipjax.analyze(model, filled({"a": (3, 4), "b": (3, 2)})).groups


def test_units_of_which_the_bytes_are_read_as_others_are_pinned():
    def model(p, x):
        packed = jax.lax.bitcast_convert_type(x @ p["a"], jnp.uint8)
        return jax.lax.bitcast_convert_type(packed, jnp.float32) @ p["read"]

    analysis = clipjax.analyze(model, PARAMS, X)
    assert not analysis.groups
    assert "reads its bytes as others" in str(analysis)
