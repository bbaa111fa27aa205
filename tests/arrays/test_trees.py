"""Walks over parameter trees: paths, picks, alignment, and what passes."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from clipjax._arrays import arguments, dtypes, elementwise, picked_leaves, trees

pytestmark = pytest.mark.usefixtures("strict")


class Point(NamedTuple):
    x: Any
    y: Any


TREE = {"enc": {"lin": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "none": None}, "head": [jnp.ones((3, 1))]}


def test_paths_join_keys_of_every_container():
    assert trees.paths(TREE) == ["enc/lin/bias", "enc/lin/kernel", "enc/none", "head/0"]
    assert trees.paths(Point(jnp.ones(1), (jnp.ones(1), {"a": jnp.ones(1)}))) == ["x", "y/0", "y/1/a"]
    assert trees.paths(jnp.ones(2)) == [""]


def test_paths_drop_the_boxes_of_linen_and_nnx():
    """State keyed by raw paths would double: `….kernel.value` at init, `….kernel` at update."""
    boxed = {"lin": {"kernel": nn.LogicallyPartitioned(jnp.ones((2, 3)), ("in", "out"))}}
    assert trees.paths(boxed) == ["lin/kernel"]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert sorted(trees.paths(state)) == sorted(trees.paths(nnx.to_pure_dict(state))) == ["bias", "kernel"]


def test_a_leaf_named_value_keeps_its_name():
    assert trees.paths({"attention": {"value": jnp.ones(2)}, "value": jnp.ones(2)}) == ["attention/value", "value"]


@pytest.mark.parametrize(
    ("path", "leaf", "picked"),
    [
        ("a/kernel", jnp.ones((2, 3)), True),
        ("a/bias", jnp.ones((2, 3)), False),
        ("b", jnp.ones((2, 3)), False),
        ("norm/scale", jnp.ones((4, 3)), False),
        ("norm/offset", jnp.ones((4, 3)), False),
        ("embedding", jnp.ones((2, 3)), True),
        ("a/kernel", jnp.ones(3), False),
        ("bias/kernel", jnp.ones((2, 3)), True),
    ],
)
def test_weights_are_matrices_not_named_like_biases(path, leaf, picked):
    assert picked_leaves.weights(path, leaf) is picked


def test_pick_leaves_out_integers_none_and_empty():
    tree = {"e": jnp.ones((0, 2)), "f": jnp.ones(2), "i": jnp.ones(2, jnp.int32), "n": None, "s": jnp.float32(1)}
    assert picked_leaves.pick(picked_leaves.everything, tree) == [False, True, False, False, True]


def test_restrict_and_merge_are_inverse():
    picks = picked_leaves.pick(picked_leaves.weights, TREE)
    only = picked_leaves.restrict(TREE, picks)
    assert only["enc"]["lin"]["bias"] is None and only["enc"]["lin"]["kernel"] is not None
    merged = picked_leaves.merge(TREE, jax.tree.map(lambda x: 2 * x, only), picks)
    assert float(merged["enc"]["lin"]["kernel"][0, 0]) == 2 and float(merged["enc"]["lin"]["bias"][0]) == 1
    assert merged["enc"]["none"] is None and jax.tree.structure(merged) == jax.tree.structure(TREE)


def test_match_finds_leaves_of_a_larger_tree():
    like = {"enc": {"lin": {"kernel": jnp.zeros((2, 3)), "bias": None}}, "head": [None], "new": jnp.zeros(1)}
    found = trees.match(TREE, like)
    assert found["enc"]["lin"]["kernel"] is TREE["enc"]["lin"]["kernel"]
    assert found["enc"]["lin"]["bias"] is None and found["head"] == [None] and found["new"] is None


def test_by_path_refuses_paths_that_collide():
    with pytest.raises(ValueError, match=r"paths must differ.*a/b.*Rename"):
        trees.by_path({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


@pytest.mark.parametrize("build", [lambda: clipjax.prune_mask(0.5), lambda: clipjax.fake_quantize(4)])
def test_leaves_of_one_path_are_refused_at_init(build):
    with pytest.raises(ValueError, match=r"paths must differ, got \['a/w'\] more than once\. Rename"):
        build().init({"a/w": jnp.ones((2, 2)), "a": {"w": jnp.ones((2, 2))}})


CONTAINERS = {
    "nested": TREE,
    "one_array": jnp.ones(2),
    "integers": {0: jnp.ones(1), 10: {2: jnp.ones(2)}},
    "behind_a_leaf": {"a": jnp.ones(1), "a/b": jnp.ones(2), "a/b/c": {"d": jnp.ones(3)}, "e": {"a": jnp.ones(4)}},
    "empty_keys": {"": jnp.ones(1), "/b": jnp.ones(2), "c": {"": jnp.ones(3)}},
}


@pytest.mark.parametrize("tree", CONTAINERS.values(), ids=CONTAINERS)
def test_by_path_keeps_every_path(tree):
    """The stored dicts have the same paths, and every leaf is found by its own and by no other."""
    stored, named = trees.by_path(tree), trees.governed(tree)
    assert dict(trees.governed(stored)) == dict(named)
    assert all(trees.look_up(stored, path) is leaf for path, leaf in named)
    assert trees.look_up(stored, "enc") is None and trees.look_up(stored, "a/b/c/d/e") is None
    assert jax.tree.leaves(trees.place(stored, tree)) == jax.tree.leaves(tree)


def test_by_path_has_no_key_with_a_slash():
    stored = trees.by_path({"enc/lin": TREE["enc"]["lin"], "head": TREE["head"]})
    assert {key: list(inner) for key, inner in stored.items()} == {"enc": ["lin"], "head": ["0"]}


def test_map_with_path_skips_none_and_aligns():
    got = trees.map_with_path(lambda path, x, y: (path, float(x + y)), {"a": 1.0, "n": None}, {"a": 2.0, "n": None})
    assert got == {"a": ("a", 3.0), "n": None}


def test_place_by_path_and_by_position():
    like = {"a": jnp.ones(2), "b": {"c": None, "d": jnp.ones(1)}}
    keyed = trees.place({"a": jnp.zeros(()), "b/d": jnp.ones(())}, like)
    assert float(keyed["a"]) == 0 and float(keyed["b"]["d"]) == 1 and keyed["b"]["c"] is None
    assert trees.place([5, 6], like) == {"a": 5, "b": {"c": None, "d": 6}}


def test_find_digs_through_any_optimizer_state():
    state = optax.chain(optax.adam(0.1), optax.masked(optax.trace(0.9), {"a": True})).init({"a": jnp.ones(2)})
    assert len(trees.find(state, optax.TraceState)) == 1
    assert trees.find(state, Point) == []


def test_per_leaf_resolves_and_other_values_stay():
    assert picked_leaves.for_leaf(arguments.per_leaf(lambda path, leaf: path + "!"), "a/b", None) == "a/b!"
    assert picked_leaves.for_leaf(3, "a", None) == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_widened_is_at_least_f32(dtype):
    assert dtypes.widened(jnp.ones(1, dtype)).dtype == jnp.float32


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32])
def test_narrowed_is_the_conversion_there_and_back(dtype):
    """Every value of 16 bits, the middle to the next one, and both neighbours of that in f32."""
    patterns = np.arange(2**16, dtype=np.uint16)
    values = patterns.view(jnp.float16 if dtype == jnp.float16 else jnp.bfloat16).astype(np.float32)
    with np.errstate(all="ignore"):
        middles = values / 2 + np.roll(values, -1) / 2
        around = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
        x = np.concatenate([values, middles, *around])
        x = x[~(np.abs(x) < np.finfo(np.float32).smallest_normal)]  # which a CPU may take for 0
        expected = x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(dtypes.narrowed, static_argnums=1)(x, dtype)), expected)


def test_the_maths_of_leaves_of_a_shape_is_traced_once_and_leaves_no_call():
    """Many leaves would else take long to trace, and a call to compile."""
    traced = []

    @elementwise.leafwise
    def half(x):
        traced.append(x.shape)
        return x / 2

    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "c": jnp.ones((2, 3)), "d": jnp.ones(3)}
    program = jax.jit(lambda t: jax.tree.map(half, t)).lower(tree).as_text()
    assert traced == [(2, 3), (3,)]
    assert program.count("stablehlo.divide") == 4 and "call @" not in program


@pytest.mark.parametrize(
    "shapes", [((), (2, 3), (2, 3)), ((2, 3), (), (2, 3)), ((2, 3), (2, 3), ()), ((2, 3), (1, 3), (2, 1))]
)
def test_where_is_numpys(shapes):
    mask, x, y = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes))
    found = jax.jit(elementwise.where)(mask > 0, x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.where(mask > 0, x, y))


def test_where_promotes_as_numpys():
    mask, x, y = jnp.array([True, False]), jnp.array([0.1, 0.2]), jnp.ones(2, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        for found in (elementwise.where(mask, x, y), elementwise.where(mask, x, y[0])):
            assert found.dtype == jnp.float32
            np.testing.assert_array_equal(found, np.float32([0.1, 1]))
