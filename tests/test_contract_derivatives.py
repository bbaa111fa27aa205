"""Derivatives through every transformation: reverse mode gives what forward mode gives, and both are finite.

Meta-learning differentiates through optimizers. Masks, steps and the choice of a level are constants there.
"""

import contract_table as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections, thresholds


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def random(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def dot(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return sum(jnp.vdot(x, y) for x, y in pairs), sum(jnp.vdot(jnp.abs(x), jnp.abs(y)) for x, y in pairs)


def both_modes(run, *inputs):
    """<w, J v> in forward and in reverse mode, and the size of its terms, for random v and w.

    Reverse mode is the transpose of what forward mode applies to v: `jax.vjp` is these two lines.
    """

    @jax.jit
    def compiled(*inputs):
        v = random(inputs, 3)
        out, push = jax.linearize(run, *inputs)
        pull = jax.linear_transpose(push, *inputs)
        w = random(out, 4)
        forward, size = dot(w, push(*v))
        return forward, dot(pull(w), v)[0], size

    return map(float, compiled(*inputs))


@pytest.mark.parametrize("row", table.paths(table.ALL))
def test_reverse_mode_is_forward_mode(row):
    """Of the params and all floats of the state after two updates, after the params and both gradients."""

    def run(params, grads):
        tx = row.tx()
        update = lambda carry, g: (table.step(tx, *carry, g), None)
        return floats(jax.lax.scan(update, (params, tx.init(params)), grads, length=2)[0])

    single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    both = jax.tree.map(lambda g: g[:2], table.gradients())
    forward, reverse, size = both_modes(run, single(table.params()), single(both))
    assert np.isfinite([forward, reverse, size]).all() and size > 0
    np.testing.assert_allclose(reverse, forward, rtol=0, atol=1e-5 * size)


GRADS = {"a": jnp.array([0.3, -0.4]), "b": jnp.array([1.2])}  # of norm 1.3
RECORDING = {
    "inf": lambda: clipjax.clip_norm(np.inf),
    "inf_leaf": lambda: clipjax.clip_norm(np.inf, per="leaf"),
    "inf_skip": lambda: clipjax.skip_spikes(optax.identity(), np.inf),
    "zscore": lambda: clipjax.clip_norm(thresholds.zscore(eps=0.0)),
    "mean_sigma": lambda: clipjax.clip_norm(thresholds.mean_sigma()),
    "ema_ratio": lambda: clipjax.clip_norm(thresholds.ema_ratio(warmup_max=np.inf)),
    "percentile": lambda: clipjax.clip_norm(thresholds.percentile(50)),
    "spam": lambda: clipjax.clip(thresholds.spam()),
    "zero_leaf": lambda: clipjax.clip_norm(thresholds.zscore(), per="leaf"),
}


@pytest.mark.parametrize("name", RECORDING)
def test_a_first_update_that_clips_nothing_has_the_identity_as_its_derivative(name):
    """The branches that are not taken divide by 0, by an infinite threshold, or take the root of 0."""
    tx = RECORDING[name]()
    grads = GRADS | ({"zero": jnp.zeros(3)} if name == "zero_leaf" else {})
    state, w = tx.init(grads), random(grads, 5)
    pull = jax.jit(lambda g, state, w: jax.vjp(lambda g: tx.update(g, state)[0], g)[1](w)[0])
    jax.tree.map(np.testing.assert_array_equal, pull(grads, state, w), w)


@pytest.mark.parametrize("rule", [thresholds.zscore(0.5, warmup=2), thresholds.mean_sigma(window=2)])
def test_equal_norms_whose_deviation_is_0_have_a_derivative(rule):
    def run(scales):
        tx = clipjax.clip_norm(rule)
        update = lambda state, s: tx.update(jax.tree.map(lambda g: g * s, GRADS), state)[::-1]
        return floats(jax.lax.scan(update, tx.init(GRADS), scales))

    forward, reverse, size = both_modes(run, jnp.array([1.0, 1.0, 1.0, 3.0]))
    assert np.isfinite([forward, reverse]).all()
    np.testing.assert_allclose(reverse, forward, rtol=0, atol=1e-5 * size)


def test_a_clipped_gradient_has_the_derivative_of_its_formula():
    """The derivative of g C / n is dg C / n − g C <g, dg> / n³; and after C, g / n."""
    w = random(GRADS, 6)
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)])
    clip = lambda g, c: clipjax.clip_norm(c).update(g, clipjax.clip_norm(c).init(g))[0]
    _, pull = jax.vjp(clip, GRADS, jnp.float32(0.5))
    by_gradient, by_threshold = pull(w)
    g, dw = flat(GRADS), flat(w)
    np.testing.assert_allclose(flat(by_gradient), 0.5 / 1.3 * (dw - g * (g @ dw) / 1.3**2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_threshold, g @ dw / 1.3, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_derivative_of_a_clip_does_not_depend_on_the_unit_of_its_gradients(scale):
    """Of g C / n, whose n² is beyond the range of floats: C / n (I - g g^T / n²)."""
    tx, grads = clipjax.clip_norm(2.5 * scale), jnp.array([3.0, 4.0]) * scale
    found = jax.jacfwd(lambda g: tx.update(g, tx.init(g))[0])(grads)
    np.testing.assert_allclose(found, [[0.32, -0.24], [-0.24, 0.18]], rtol=1e-6)


def test_a_norm_within_a_huge_bound_has_the_identity_as_its_derivative():
    found = jax.jacrev(lambda w: projections.max_norm(3e38).apply(w, (), None)[0])(jnp.ones(2))
    np.testing.assert_array_equal(found, jnp.eye(2))


def test_landing_has_the_derivative_of_the_difference():
    """Of u = q − p, also where the last bit of u is corrected, which is no function that could be differentiated."""
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=1000) * 10.0, jnp.float32)
    tx = clipjax.clamp_weights(0.1)
    state = tx.init(p)
    u, pull = jax.vjp(lambda u, p: tx.update(u, state, p)[0], jnp.zeros_like(p), p)
    clamped = np.abs(p) > 0.1
    assert np.sum(np.asarray(u) != np.float32(0.1) * np.sign(p) - np.asarray(p)) > 50  # corrected
    by_update, by_param = pull(jnp.ones_like(p))
    np.testing.assert_array_equal(by_update, np.where(clamped, 0.0, 1.0))
    np.testing.assert_array_equal(by_param, np.where(clamped, -1.0, 0.0))
