"""Stacks of arrays that are alike: the results of one leaf after the other, in one call for each kind of leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clipjax._arrays import stacks

pytestmark = pytest.mark.usefixtures("strict")

EXPLICIT = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
NAMES = ["l_0/kernel", "l_1/kernel", "l_10/kernel", "l_0/bias", "l_2/kernel", "head/kernel", "l_3/kernel"]
SHAPES = [(4, 3), (4, 3), (4, 3), (3,), (5, 3), (4, 3), (4, 3)]


def leaves(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    made = [jnp.asarray(rng.normal(size=shape), dtype) for shape in SHAPES]
    made[-1] = made[-1].astype(jnp.bfloat16)
    return made


def test_leaves_of_one_name_up_to_digits_one_shape_and_one_dtype_are_alike():
    assert stacks.alike(NAMES, leaves()) == [[0, 1, 2], [3], [4], [5], [6]]
    assert stacks.alike(NAMES, leaves(), [1, 1, 2, 1, 1, 1, 1]) == [[0, 1], [2], [3], [4], [5], [6]]
    assert stacks.alike([], []) == []


def test_large_arrays_stay_alone_as_their_copies_would_take_memory_all_the_time():
    like = lambda size: jax.ShapeDtypeStruct((size,), jnp.bool_)
    found = {}

    def names(*arrays):
        found[arrays[0].size] = stacks.alike(["l0", "l1"], arrays)

    for size in (stacks.LARGEST, stacks.LARGEST + 1):
        jax.eval_shape(names, like(size), like(size))
    assert list(found.values()) == [[[0, 1]], [[0], [1]]]


def test_stacks_come_apart_again():
    values = [(x, jnp.sum(x)) for x in leaves()]
    groups = stacks.alike(NAMES, values)
    for got, expected in zip(stacks.unstack([stacks.stack(values, g) for g in groups], groups), values, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_mapped_calls_once_a_kind_and_passes_what_is_no_array():
    seen = []

    def scaled(x, bits, pair):
        seen.append((x.shape, bits))
        return {"sum": jnp.sum(x) * bits, "as": x if pair[0] is None else x * pair[0]}

    def run(xs, factor):
        pairs = [(None, 1)] * 3 + [(factor, 1)] * 2 + [(None, 1)] * 2
        return stacks.mapped(scaled, NAMES, xs, [2, 2, 3, 2, 2, 2, 2], pairs)

    got = jax.jit(run)(leaves(), jnp.float32(3))
    assert [shape for shape, _ in seen] == [(4, 3), (4, 3), (3,), (5, 3), (4, 3), (4, 3)]
    for i, (x, result) in enumerate(zip(leaves(), got, strict=True)):
        np.testing.assert_allclose(result["sum"], jnp.sum(x) * (3 if i == 2 else 2), rtol=1e-2)
        np.testing.assert_array_equal(result["as"], x * 3 if i in (3, 4) else x)


def test_arrays_of_other_shardings_are_not_stacked():
    """Explicit axes show the sharding in the type, arrays outside of jit have it; rows keep it, one scalar moves."""
    specs = [P("data", None), P("data", None), P(None, "model"), P("data", None)]
    arrays = [jax.device_put(jnp.full((8, 4), i), jax.NamedSharding(EXPLICIT, s)) for i, s in enumerate(specs)]
    names = [f"l{i}" for i in range(4)]
    with jax.set_mesh(EXPLICIT):
        assert stacks.alike(names, arrays) == [[0, 1, 3], [2]]
        text = jax.jit(lambda xs: stacks.mapped(jnp.negative, names, xs)).lower(arrays).compile().as_text()
        got = jax.jit(lambda xs: stacks.mapped(jnp.negative, names, xs))(arrays)
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    for x, y in zip(arrays, got, strict=True):
        np.testing.assert_array_equal(y, -x)
        assert y.sharding.is_equivalent_to(x.sharding, 2)


def test_rows_of_equal_shardings_on_automatic_axes_move_one_scalar():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    arrays = [jax.device_put(jnp.full((8, 4), i), jax.NamedSharding(mesh, P("data", "model"))) for i in range(3)]
    names = ["l0", "l1", "l2"]
    text = jax.jit(lambda xs: stacks.mapped(jnp.negative, names, xs)).lower(arrays).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
