"""Selections: D3's strategies and the largest entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import selections
from clipjax._maths import random_draws
from clipjax.typing import Selection

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
TREE = {"a": RNG.normal(size=(60, 50)).astype(np.float32), "b": RNG.normal(size=1000).astype(np.float32)}


@jax.jit
def largest(fraction):
    return selections.largest(fraction).choose(TREE, None)


def chosen(select, count=0, key=None, tree=TREE):
    masks = random_draws.choose(select, tree, key, jnp.int32(count))
    return jax.tree.map(lambda m, x: np.broadcast_to(m, x.shape), masks, tree)


def same(first, second):
    return all((first[k] == second[k]).all() for k in first)


def test_everything():
    assert all(m.all() for m in chosen(selections.everything()).values())


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_bernoulli_picks_each_entry_with_probability_p(p):
    for m in chosen(selections.bernoulli(p)).values():
        assert abs(m.mean() - p) <= 4 * np.sqrt(p * (1 - p) / m.size)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_leaves_pick_whole_arrays_with_probability_p(p):
    tree = {str(i): np.zeros(2, np.float32) for i in range(400)}
    masks = list(chosen(selections.leaves(p), tree=tree).values())
    assert all(m[0] == m[1] for m in masks)
    assert abs(np.mean([m[0] for m in masks]) - p) <= 4 * np.sqrt(p * (1 - p) / 400)


@pytest.mark.parametrize("make", [selections.bernoulli, selections.leaves])
def test_random_selections_are_redrawn_by_count_and_reproducible(make):
    """The selection's own key wins over the transformation's; arrays draw independently."""
    tree = {str(i): np.zeros(3, np.float32) for i in range(30)}
    own = make(0.5, key=jax.random.key(1))
    assert same(chosen(own, 3, tree=tree), chosen(own, 3, jax.random.key(9), tree))
    assert not same(chosen(own, 3, tree=tree), chosen(own, 4, tree=tree))
    assert not same(chosen(make(0.5), 0, jax.random.key(1), tree), chosen(make(0.5), 0, jax.random.key(2), tree))
    draws = chosen(own, tree=tree)
    assert len({m.tobytes() for m in draws.values()}) > 1


@pytest.mark.parametrize("fraction", [2.0**-10, 0.25, 0.5, 1.0])
def test_largest_matches_a_sort_over_all_arrays(fraction):
    sizes = np.concatenate([np.abs(np.ravel(TREE[k])) for k in ("a", "b")])
    keep = np.zeros(sizes.size, bool)
    keep[np.argsort(-sizes, kind="stable")[: sizes.size - round((1 - fraction) * sizes.size)]] = True
    got = largest(jnp.float32(fraction))
    np.testing.assert_array_equal(np.concatenate([got["a"].ravel(), got["b"]]), keep)


def test_largest_ties_go_to_the_earlier_and_signs_do_not_matter():
    tree = {"a": np.float32([-2, 2, 2]), "b": np.float32([2, -2, 1])}
    got = chosen(selections.largest(0.5), tree=tree)
    np.testing.assert_array_equal(got["a"], [True] * 3)
    assert not got["b"].any()


def test_probability_and_fraction_may_be_traced():
    tree = {"a": jnp.arange(1.0, 1001.0)}
    swept = jax.vmap(lambda p: selections.bernoulli(p).choose(tree, jax.random.key(0))["a"])(jnp.array([0.0, 0.5, 1.0]))
    assert swept[0].sum() == 0 and 400 < swept[1].sum() < 600 and swept[2].all()
    top = jax.jit(lambda f: selections.largest(f).choose(tree, None)["a"])(jnp.float32(0.25))
    assert int(top.sum()) == 250 and bool(top[-250:].all())


def test_empty_tree():
    assert random_draws.choose(selections.largest(0.5), {}, None, jnp.int32(0)) == {}


@pytest.mark.parametrize("mask", [lambda x: True, lambda x: np.ones(x.shape, bool), lambda x: jnp.ones(x.shape)])
def test_masks_of_ones_own_are_read_as_where_reads_them(mask):
    own = Selection(lambda tree, key: jax.tree.map(mask, tree))
    grads = {"w": jnp.array([[3.0, -4.0]])}
    for build in (clipjax.clip, clipjax.clip_norm, clipjax.clamp_weights):
        found, expected = (tx.update(grads, tx.init(grads), grads)[0] for tx in (build(1.0, select=own), build(1.0)))
        np.testing.assert_array_equal(found["w"], expected["w"])
