"""Scores against NumPy, with and without history."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import scores
from clipjax.projections import Context

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
W = {k: RNG.normal(size=s).astype(np.float32) for k, s in (("a", (3, 4)), ("b", (5, 2)))}
W["b"] *= np.float32(10)


def context(grad=None, seed=0):
    return Context(jnp.int32(0), W, W, grad, jax.random.key(seed))


def value(score, target=W, **kwargs):
    return score.score(target, score.init(target), context(**kwargs))


def test_magnitude():
    got = value(scores.magnitude())
    for name, w in W.items():
        np.testing.assert_array_equal(got[name], np.abs(w))


@pytest.mark.parametrize("normalize", ["rms", "l2"])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_magnitude_normalized(normalize, scale):
    """|w| over the root mean square or the norm of its array; right at any scale."""
    got = value(scores.magnitude(normalize), jax.tree.map(lambda w: w * np.float32(scale), W))
    for name, w in W.items():
        mean = np.mean if normalize == "rms" else np.sum
        np.testing.assert_allclose(got[name], np.abs(w) / np.sqrt(mean(np.square(w.astype(np.float64)))), rtol=1e-5)


def test_relative_magnitude_compares_within_its_array():
    got = value(scores.relative_magnitude())
    for name, w in W.items():
        np.testing.assert_allclose(got[name], np.abs(w) / np.abs(w).max(), rtol=1e-6)


@pytest.mark.parametrize("score", [scores.magnitude("rms"), scores.magnitude("l2"), scores.relative_magnitude()])
def test_all_zero_scores_zero_and_non_finite_weights_do_not_poison(score):
    zero = score.score(jnp.zeros(3), (), context())
    np.testing.assert_array_equal(zero, np.zeros(3))
    got = score.score(jnp.array([1.0, jnp.nan, jnp.inf]), (), context())
    assert np.isfinite(got[0]) and got[0] > 0


def test_random_follows_the_key_and_is_uniform():
    big = {"a": jnp.zeros((100, 100))}
    first, same, other = (value(scores.random(), big, seed=s)["a"] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any() and 0 <= float(first.min()) and float(first.max()) < 1
    assert abs(float(first.mean()) - 0.5) < 4 / np.sqrt(12 * 10_000)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["gradient", "taylor"])
def test_averages_over_updates(kind, decay):
    """M ← β·m + (1 − β)·|g|, or of |w·g|; nothing stored for β = 0."""
    score = getattr(scores, kind)(decay)
    state = score.init(W)
    assert (state == ()) == (decay == 0)
    expected = jax.tree.map(np.zeros_like, W)
    for i in range(4):
        grads = jax.tree.map(lambda w, i=i: np.float32(np.sin(w * (i + 1))), W)
        state = score.observe(W, state, context(grads))
        now = jax.tree.map(lambda w, g: np.abs(w * g if kind == "taylor" else g), W, grads)
        expected = jax.tree.map(lambda m, x: decay * m + (1 - decay) * x, expected, now)
        got = score.score(W, state, context(grads))
        for name in W:
            np.testing.assert_allclose(got[name], expected[name], rtol=2e-6)


def test_averages_skip_non_finite_gradients():
    score = scores.gradient(0.5)
    state = score.observe(W, score.init(W), context(jax.tree.map(np.ones_like, W)))
    poisoned = jax.tree.map(lambda w: np.where(w > 0, np.float32(np.nan), np.float32(1)), W)
    state = score.observe(W, state, context(poisoned))
    for name, w in W.items():
        np.testing.assert_array_equal(state[name], np.where(w > 0, 0.5, 0.75))


def test_averages_are_kept_in_f32_for_bf16_gradients():
    narrow = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), W)
    score = scores.gradient()
    state = score.observe(W, score.init(narrow), context(narrow))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("grad", [None, {"a": W["a"], "b": None}])
def test_missing_gradient_raises(grad):
    score = scores.gradient(0.0)
    with pytest.raises(ValueError, match="with_gradient"):
        score.score(W, (), context(grad))
