"""Quantization against what others print: the optimal quantizers' tables, TensorFlow's grid, a file for NumPy alone."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import steps

pytestmark = pytest.mark.usefixtures("strict")

MILLION = 1_000_000
SAMPLES = {
    "gaussian": np.random.default_rng(0).normal(size=MILLION).astype(np.float32),
    "laplace": np.random.default_rng(1).laplace(size=MILLION).astype(np.float32),
}


def error(w, s, bits):
    """Mean of (Q(w) − w)², in f32 with the sum in f64."""
    top = np.float32(2 ** (bits - 1) - 1)
    levels = np.clip(np.round(w / np.float32(s)), -top, top) * np.float32(s)
    return np.mean(np.square(levels - w), dtype=np.float64)


def least_error(w, bits):
    """The smallest error of any step, by golden-section search around the best of a coarse scan."""
    scan = np.geomspace(0.5, 12, 14) / (2 ** (bits - 1) - 1)
    best = int(np.argmin([error(w, s, bits) for s in scan]))
    low, high = scan[max(best - 1, 0)], scan[min(best + 1, len(scan) - 1)]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(14):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(w, a, bits) < error(w, b, bits) else (a, high)
    return error(w, (low + high) / 2, bits)


@functools.partial(jax.jit, static_argnames="bits")
def chosen(w, bits):
    return clipjax.choose_step(w, bits)


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_steps_are_within_one_percent_of_the_optimum_on_a_million_samples(kind, bits):
    """The SQNR of a distribution at a width is a number; ours is at most 0.043 dB below it."""
    w = SAMPLES[kind]
    assert error(w, float(chosen(jnp.asarray(w), bits)), bits) <= 1.01 * least_error(w, bits)


def test_gaussian_sqnr_is_that_of_the_table():
    """Max (1960), uniform quantizers with 2^b − 1 levels, from the steps in the reference table: 10 log₁₀(1 / MSE)."""
    table = {2: 1.224, 3: 0.6508, 4: 0.3534, 5: 0.1933, 6: 0.1055, 7: 0.0573, 8: 0.0309}
    for bits, step in table.items():
        best = error(SAMPLES["gaussian"], step, bits)
        assert abs(10 * np.log10(best / error(SAMPLES["gaussian"], chosen(SAMPLES["gaussian"], bits), bits))) < 0.05


def test_tensorflow_grid():
    """tf.quantization.fake_quant_with_min_max_args(min=−1, max=2, num_bits=3, narrow_range=True), worked by hand.

    Seven levels of (max − min)/6 = .5 from −1 to 2, 0 on one of them; beyond the ends the ends.
    """
    w = {"kernel": jnp.array([[-2.0, -0.3, 0.24, 0.26, 3.0]])}
    tx = clipjax.fake_quantize(3, step=steps.interval(-1.0, 2.0), inner=optax.identity())
    params, state = w, tx.init(w)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], [[-1.0, -0.5, 0.0, 0.5, 2.0]])
    q = clipjax.quantized(params, state)["kernel"]
    np.testing.assert_array_equal(q.codes, [[-3, -2, -1, 0, 3]])
    assert int(q.zero_point) == -1


@pytest.mark.parametrize("value", [-0.9, 0.1, 0.5, 2.7])
def test_stochastic_rounding_is_unbiased(value):
    """The mean of 10⁵ draws is the value, to 4 standard deviations of the mean."""
    x = jnp.full(100_000, value)
    drawn = np.asarray(clipjax.round_to_step(x, 1.0, rounding="stochastic", key=jax.random.key(0)), np.float64)
    share = np.float32(value) - np.floor(np.float32(value))
    assert set(np.unique(drawn)) == {np.floor(value), np.floor(value) + 1}
    assert abs(drawn.mean() - np.float32(value)) < 4 * np.sqrt(share * (1 - share) / drawn.size)


def nibbles(codes):
    """Two 4-bit codes a byte, row-major, the low nibble first."""
    two = (codes.reshape(-1, 2) & 15).astype(np.uint8)
    return two[:, 0] | (two[:, 1] << 4)


def test_a_four_bit_net_runs_in_numpy_alone():
    """Per-channel codes and steps through a .npz: the logits of the float net, without jax."""
    rng = np.random.default_rng(0)
    params = {
        f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=s) * 0.3, jnp.float32), "bias": jnp.zeros(s[1])}
        for i, s in enumerate([(20, 16), (16, 10)])
    }
    tx = optax.chain(optax.sgd(0.1), clipjax.fake_quantize(4, axis=-1))
    state = tx.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jnp.asarray(np.random.default_rng(i).normal(size=p.shape) * 0.1), params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    arrays = {}
    for name, layer in clipjax.quantized(params, state).items():
        q = layer["kernel"]
        arrays |= {f"{name}/codes": nibbles(np.asarray(q.codes)), f"{name}/step": q.step, f"{name}/bias": layer["bias"]}
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    x = rng.normal(size=(5, 20)).astype(np.float32)
    first, second = (jax.tree.map(np.asarray, params[name]) for name in ("layer0", "layer1"))
    expected = np.maximum(x @ first["kernel"] + first["bias"], 0) @ second["kernel"] + second["bias"]

    loaded, h = np.load(file), x
    for i, (name, size) in enumerate((("layer0", (20, 16)), ("layer1", (16, 10)))):
        byte = loaded[f"{name}/codes"]
        codes = np.stack([byte & 15, byte >> 4], -1).reshape(size).astype(np.int8)
        codes = np.where(codes > 7, codes - 16, codes)
        h = (h @ codes.astype(np.float32)) * loaded[f"{name}/step"][0] + loaded[f"{name}/bias"]
        h = np.maximum(h, 0) if i == 0 else h
    assert loaded["layer0/codes"].nbytes == 20 * 16 // 2
    np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-5)


def test_inner_form_holds_all_three_while_the_mask_changes_and_the_bound_shrinks():
    """Every update refreshes mask and steps; the bound falls from .5 to .1, the sparsity rises from 0 to .8.

    `inner` sees the float weights, so that the grid follows a bound that shrinks.
    """
    bound = optax.linear_schedule(0.5, 0.1, 10)
    inner = optax.chain(
        optax.sgd(0.2),
        clipjax.clamp_weights(bound),
        clipjax.prune_mask(optax.linear_schedule(0.0, 0.8, 10), every=1, stop=10),
    )
    tx = clipjax.fake_quantize(3, inner=inner, every=1)
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(20, 30)), jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(14):
        grads = {"kernel": jnp.asarray(np.random.default_rng(i).normal(size=(20, 30)), jnp.float32)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        w = np.asarray(params["kernel"])
        assert np.abs(w).max() <= np.float32(bound(i))
        assert (w == 0).sum() >= round(0.8 * min(i, 10) / 10 * w.size)
        if i:
            q = clipjax.quantized(params, state)["kernel"]
            np.testing.assert_array_equal(clipjax.dequantize(q.codes, q.step), w)
            assert len(np.unique(w)) <= 7
