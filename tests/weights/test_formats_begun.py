"""The beginning of levels: arrays of zeros, whose scales fit nothing yet, and updates before the first refresh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import formats
from clipjax._maths import known_formats

FORMS = [
    formats.q4_0(),
    formats.q8_0(),
    formats.mxfp4(),
    formats.mxfp4("qwix"),
    formats.nvfp4(),
    formats.nvfp4("modelopt"),
    formats.int4(32),
    formats.fp8_e4m3(),
]


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


A, Y = normal(0, (64, 32)), normal(1, (64, 8))


def loss_of(params):
    return jnp.mean((A @ params["lora_b"] - Y) ** 2)


def trained(tx, times):
    """Params that begin as zeros, and the states after every update."""
    params, states = {"lora_b": jnp.zeros((32, 8))}, []
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(times):
        params, state = step(params, state)
        states.append(state)
    return params, states


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_an_array_of_zeros_learns_with_scales_that_are_fitted_once(form):
    """Behind a warmup too, whose first update is 0: the scales follow the weights after 1, 2, 4, 8, … updates."""
    adam = optax.adam(optax.linear_schedule(0.0, 1e-2, 10))
    tx = optax.chain(adam, clipjax.fake_quantize(form, every=None))
    params, states = trained(tx, 33)
    first, floats, found = (float(loss_of(p)) for p in ({"lora_b": jnp.zeros((32, 8))}, trained(adam, 33)[0], params))
    assert first - found > 0.7 * (first - floats) > 0.2
    scales = [np.asarray(state[1].projection.scales["lora_b"]["0"]) for state in states]
    fitted = [i for i in range(1, 33) if (scales[i] != scales[i - 1]).any()]
    assert set(fitted) <= {1, 2, 4, 8, 16, 32} and {4, 8, 16, 32} <= set(fitted)
    assert not clipjax.check(params, states[-1], tx)


def test_scales_of_other_arrays_stay_between_refreshes():
    """Only zeros are waited for; and past `stop` nothing is fitted any more."""
    for first, stop in ((normal(2, (32, 8)), None), (jnp.zeros((32, 8)), 5)):
        tx = clipjax.fake_quantize(formats.q8_0(), every=None, stop=stop)
        params, scales = {"kernel": first}, []
        state = tx.init(params)
        for i in range(10):
            grads = {"kernel": normal(3 + i, (32, 8))}
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
            scales.append(np.asarray(state.projection.scales["kernel"]["0"]))
        changed = [i for i in range(1, 10) if (scales[i] != scales[i - 1]).any()]
        assert changed == ([] if stop is None else [1, 2, 4, 5])


def test_the_bytes_of_zeros_are_those_of_the_reference():
    gguf = pytest.importorskip("gguf")
    params, state = clipjax.hold_once(clipjax.fake_quantize(formats.q8_0()), {"kernel": jnp.zeros((32, 2))})
    q = clipjax.quantized(params, state)["kernel"]
    form = known_formats.named(q.format)
    packed = form.pack(np.asarray(q.codes).T[:, None], (np.asarray(q.scales[0]).T[..., None],))[0]
    np.testing.assert_array_equal(packed.ravel(), gguf.quants.quantize(np.zeros((2, 32), np.float32), 8).ravel())


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("bits", [4, formats.q4_0()], ids=["grid", "format"])
def test_without_a_refresh_so_far_weights_stay_as_they_are(bits, start):
    """As before `start`, whatever an update may do; latent weights take every step."""
    w = normal(0, (32, 4)).astype(jnp.bfloat16)
    tx = optax.chain(optax.sgd(1.0), clipjax.fake_quantize(bits, start=start))
    params, state = {"kernel": w}, tx.init({"kernel": w})
    grads = {"kernel": 1e-4 * normal(1, (32, 4))}
    step = jax.jit(tx.update, static_argnames="refresh")
    for refresh in (False, False, None):  # nothing is due at the third
        state = state if refresh is False else optax.tree.set(state, count=jnp.int32(start + 7))
        updates, state = step(grads, state, params, refresh=refresh)
        params = optax.apply_updates(params, updates)
    latent = state[1].carry["kernel"]
    np.testing.assert_allclose(latent, w.astype(jnp.float32) - 3 * grads["kernel"], atol=1e-6)
    np.testing.assert_array_equal(params["kernel"], latent.astype(jnp.bfloat16))
    assert not clipjax.check(params, state, tx)
    updates, state = step(grads, state, params, refresh=True)
    params = optax.apply_updates(params, updates)
    assert not clipjax.check(params, state, tx) and clipjax.quantized(params, state)["kernel"].codes.any()


def test_a_mask_holds_before_levels_do():
    """Also where a latent weight has more digits than its param."""
    w = jnp.float32([[0.3, -0.2, 0.1, 0.4] * 8]).T.astype(jnp.bfloat16)
    mask = {"kernel": w > 0}
    tx = optax.chain(optax.sgd(1.0), clipjax.prune_mask(mask=mask, start=1), clipjax.fake_quantize(4))
    params, state = {"kernel": w}, tx.init({"kernel": w})
    for _ in range(2):
        updates, state = jax.jit(functools.partial(tx.update, refresh=False))({"kernel": 1e-4 + 0 * w}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"] == 0, w < 0)
