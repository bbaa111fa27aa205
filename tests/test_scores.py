"""Scores against NumPy, with and without history."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import scores
from clipjax.typing import Context

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


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_movement_and_fisher_average(decay):
    """Sanh et al.: the average of −w·g. Theis et al.: w² · average of g², halved."""
    states = {kind: getattr(scores, kind)(decay).init(W) for kind in ("movement", "fisher")}
    moved, squared = (jax.tree.map(np.zeros_like, W) for _ in range(2))
    for i in range(4):
        grads = jax.tree.map(lambda w, i=i: np.float32(np.sin(w * (i + 1))), W)
        moved = jax.tree.map(lambda m, w, g: decay * m - (1 - decay) * w * g, moved, W, grads)
        squared = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g * g, squared, grads)
        for kind, expected in (("movement", moved), ("fisher", jax.tree.map(lambda w, f: w * w * f / 2, W, squared))):
            score = getattr(scores, kind)(decay)
            states[kind] = score.observe(W, states[kind], context(grads))
            got = score.score(W, states[kind], context(grads))
            assert (states[kind] == ()) == (decay == 0)
            for name in W:
                np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-7)


def test_external_hands_out_what_it_was_given_by_path():
    given = {"b": W["b"] * 2, "a": W["a"] * 3, "more": np.ones(2, np.float32)}
    got = value(scores.external(given))
    for name in W:
        np.testing.assert_array_equal(got[name], given[name])


def test_external_of_another_shape_names_the_leaf():
    with pytest.raises(ValueError, match=r"`scores` must have the shape of every picked leaf, got \(1, 4\).*'a'"):
        scores.external({"a": W["a"][:1], "b": W["b"]}).init(W)


def dense(params, x):
    return jnp.maximum(x @ params["a"], 0) @ params["b"]


def test_snip_is_weight_times_gradient():
    """Lee et al., 2019, equation 6, without the constant that normalizes it."""
    net = {"a": jnp.asarray(W["a"]), "b": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    got = scores.snip(lambda p: jnp.mean(jnp.square(dense(p, x))), net)
    h = np.maximum(np.asarray(x) @ W["a"], 0)
    out = h @ np.asarray(net["b"])
    d = 2 * out / out.size
    grads = {"b": h.T @ d, "a": np.asarray(x).T @ ((d @ np.asarray(net["b"]).T) * (h > 0))}
    for name in net:
        np.testing.assert_allclose(got[name], np.abs(np.asarray(net[name]) * grads[name]), rtol=1e-4, atol=1e-6)


def test_synflow_conserves_flow_from_layer_to_layer():
    """Tanaka et al., 2020, theorem 1: without biases the scores of each layer add up to the same flow R."""
    net = {"a": jnp.asarray(W["a"]), "b": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)}
    got = scores.synflow(dense, net, jnp.zeros((1, 3)))
    flow = np.abs(W["a"]).sum(0) @ np.abs(np.asarray(net["b"]))
    for name in net:
        np.testing.assert_allclose(float(jnp.sum(got[name])), flow.sum(), rtol=1e-5)
    np.testing.assert_allclose(got["a"], np.abs(W["a"]) * np.abs(np.asarray(net["b"])).sum(1), rtol=1e-5)
