"""Roundings that harden: PARQ's map and schedule and BinaryRelax's mean against NumPy, and fake_quantize with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import roundings

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)


def parq(p, levels, t, steepness=10.0):
    """Torchao's ProxPARQ: the segment between two neighbours in Q, clamped; t is the share of the annealing."""
    if t >= 1:
        return levels[np.argmin(np.abs(p[:, None] - levels), 1)]
    sigmoid = lambda f: 1 / (1 + np.exp(steepness * (f - 0.5)))
    inverse_slope = (sigmoid(t) - sigmoid(1)) / (sigmoid(0) - sigmoid(1))
    index = np.searchsorted(levels, p)
    lower, upper = levels[np.maximum(index - 1, 0)], levels[np.minimum(index, len(levels) - 1)]
    center = (lower + upper) / 2
    return np.clip(center + (p - center) / inverse_slope, lower, upper)


def relaxed(p, levels, t, steepness=None):
    """Torchao's ProxBinaryRelax."""
    return (1 - min(t, 1)) * p + min(t, 1) * levels[np.argmin(np.abs(p[:, None] - levels), 1)]


def held(rule, bits, count, w, step=0.25):
    """What `fake_quantize` shows at a count, nothing having moved."""
    tx = clipjax.fake_quantize(bits, step=step, rounding=rule)
    params, state = {"kernel": w}, tx.init({"kernel": w})
    state = state._replace(count=jnp.int32(count), projection=tx.update(params, state, params)[1].projection)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, refresh=False)
    return np.asarray(optax.apply_updates(params, updates)["kernel"])[0]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 25, 50, 60, 99, 100, 400])
def test_parq_matches_torchao(bits, count):
    w = RNG.normal(size=(1, 200)).astype(np.float32) * 0.7
    top = max(1, 2 ** (bits - 1) - 1)
    levels = 0.25 * (np.array([-1, 1]) if bits == 1 else np.arange(-top, top + 1))
    got = held(roundings.parq(100), bits, count, jnp.asarray(w))
    np.testing.assert_allclose(got, parq(np.float64(w[0]), levels, count / 100), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("count", [0, 25, 100])
def test_binary_relax_matches_torchao(bits, count):
    """Also beyond the outermost levels, where three quarters of these weights are."""
    w = RNG.uniform(-1, 1, size=(1, 100)).astype(np.float32)
    levels = np.array([-0.25, 0.25] if bits == 1 else [-0.25, 0, 0.25])
    got = held(roundings.binary_relax(100), bits, count, jnp.asarray(w))
    np.testing.assert_allclose(got, relaxed(np.float64(w[0]), levels, count / 100), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [roundings.parq(20), roundings.binary_relax(20)], ids=["parq", "binary_relax"])
@pytest.mark.parametrize("inner", [False, True])
def test_the_float_weights_survive_the_annealing_and_the_end_is_on_the_grid(rule, inner):
    """The carry is the plain sum of all updates while nothing is cut by the range; after 20 updates all is exact."""
    w = {"kernel": jnp.asarray(RNG.uniform(-1, 1, size=(8, 5)), jnp.float32)}
    kwargs = {"inner": optax.identity()} if inner else {}
    tx = clipjax.fake_quantize(4, step=0.25, rounding=rule, every=1, **kwargs)
    update, params, state = jax.jit(tx.update), w, tx.init(w)
    total = np.asarray(w["kernel"], np.float64)
    distinct = []
    for i in range(25):
        u = {"kernel": jnp.asarray(np.random.default_rng(i).normal(size=(8, 5)) * 0.02, jnp.float32)}
        total += np.asarray(u["kernel"])
        updates, state = update(u, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(state.carry["kernel"], total, atol=2e-5)
        distinct.append(len(np.unique(params["kernel"])))
    assert distinct[0] > 15 >= distinct[-1]
    q = clipjax.quantized(params, state)["kernel"]
    np.testing.assert_array_equal(clipjax.dequantize(q.codes, q.step), params["kernel"])


@pytest.mark.parametrize("rule", [roundings.parq(100), roundings.binary_relax(100)], ids=["parq", "binary_relax"])
def test_a_bound_holds_while_annealing(rule):
    """Latent weights beyond it are shown on it, though BinaryRelax would show them as they are."""
    tx = optax.chain(clipjax.clamp_weights(0.5), clipjax.fake_quantize(2, step=0.25, rounding=rule))
    params, state = {"kernel": jnp.asarray([[0.4, -0.5, 0.1]])}, None
    for _ in range(4):
        updates, state = tx.update({"kernel": jnp.full((1, 3), 0.3)}, state or tx.init(params), params)
        params = optax.apply_updates(params, updates)
        assert np.abs(params["kernel"]).max() <= 0.5
    assert np.abs(state[1].carry["kernel"]).max() > 0.5


def test_an_edited_weight_still_wins_while_annealing():
    tx = clipjax.fake_quantize(4, step=0.25, rounding=roundings.parq(50))
    params = {"kernel": jnp.full((2, 2), 0.6)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params)
    edited = {"kernel": jnp.full((2, 2), -0.3)}
    _, state = tx.update(zeros, state, edited)
    np.testing.assert_array_equal(state.carry["kernel"], edited["kernel"])


def test_bad_arguments_name_the_remedy():
    for fn, text in (
        (lambda: roundings.parq(0), "`updates` must be a whole number >= 1"),
        (lambda: roundings.parq(10, steepness=-1.0), "`steepness` must be positive"),
        (lambda: roundings.binary_relax(2.5), "`updates` must be a whole number >= 1"),
        (lambda: clipjax.fake_quantize(4, rounding="up"), "`rounding` must be one of"),
    ):
        with pytest.raises(ValueError, match=text):
            fn()
    with pytest.raises(TypeError, match=r"`rounding` must be a Rounding.*roundings.parq"):
        clipjax.fake_quantize(4, rounding=roundings.parq)
