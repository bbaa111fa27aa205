"""fake_quant: the forward form, its gradients against torch's and LSQ's formulas, and both forms step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.optimized]

RNG = np.random.default_rng(0)


def reference(x, s, bits, zero=0):
    """s·(clip(round(x/s) + z, −n, n) − z), halves to even."""
    n = 2 ** (bits - 1) - 1
    code = np.round(np.float32(x) / np.float32(s)) + zero
    return (np.float32(s) * (np.clip(code, -n, n) - zero)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [0, -1])
def test_values_are_those_of_the_grid(bits, zero):
    x = RNG.normal(size=(30, 40)).astype(np.float32)
    got = clipjax.fake_quant(jnp.asarray(x), 0.25, bits, zero_point=zero)
    np.testing.assert_array_equal(got, reference(x, 0.25, bits, zero))


def test_values_are_those_of_the_pure_functions():
    """Whatever the rounding; bits=None is D4's formula, one bit is {−s, s}."""
    x, key = jnp.asarray(RNG.normal(size=50), jnp.float32), jax.random.key(1)
    for rounding in ("nearest", "half_away", "stochastic"):
        own = {"rounding": rounding, "key": key}
        np.testing.assert_array_equal(clipjax.fake_quant(x, 0.3, **own), clipjax.round_to_step(x, 0.3, **own))
        codes = clipjax.quantize(x, 0.3, 3, **own)
        np.testing.assert_array_equal(clipjax.fake_quant(x, 0.3, 3, **own), clipjax.dequantize(codes, 0.3))
    np.testing.assert_array_equal(clipjax.fake_quant(x, 0.3, 1), np.where(x < 0, -1, 1) * np.float32(0.3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_nan_and_infinity(dtype):
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.7], dtype)
    got, gradient = jax.value_and_grad(lambda x: clipjax.fake_quant(x, 0.5, 4)[3])(x)
    assert got.dtype == gradient.dtype == dtype and float(got) == 0.5
    np.testing.assert_array_equal(np.asarray(clipjax.fake_quant(x, 0.5, 4)[:3], np.float32), [np.nan, np.inf, -np.inf])


def slope(x, gradient, bits=4, s=0.5):
    return np.asarray(jax.grad(lambda x: clipjax.fake_quant(x, s, bits, gradient=gradient).sum())(jnp.asarray(x)))


def test_gradients_after_the_values():
    """Seven levels of .5 on a side: 3.7 rounds to the last, 3.8 is clipped; LSQ stops at the last level itself."""
    x = np.float32([-9.0, 0.1, 3.5, 3.7, 3.8])
    np.testing.assert_array_equal(slope(x, "straight_through"), np.ones(5))
    np.testing.assert_array_equal(slope(x, "clipped"), [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(slope(x, "lsq"), [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(slope(np.float32([0.4, -0.6]), "clipped", bits=1), [1, 0])


def test_clipped_gradient_is_torchs():
    """torch.fake_quantize_per_tensor_affine, hand-worked: scale .1, codes −7 … 7, gradient 1 where 7.4 rounds to 7."""
    x = np.float32([0.74, 0.76, -0.74, -0.76, 0.05])
    np.testing.assert_array_equal(slope(x, "clipped", s=0.1), [1, 0, 1, 0, 1])
    np.testing.assert_allclose(clipjax.fake_quant(jnp.asarray(x), 0.1, 4), [0.7, 0.7, -0.7, -0.7, 0.0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1, 5), (3, 5)])
def test_lsq_gradient_of_the_step(shape):
    """Σ g·d/√(N n), d = round(x/s) − x/s inside and ±n outside (Esser et al., equations 2 and 3), per step group."""
    x = jnp.asarray(RNG.normal(size=(6, 5)) * 2, jnp.float32)
    g = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
    step = jnp.full(shape, 0.3)
    got = jax.grad(lambda s: (g * clipjax.fake_quant(x, s, 3, gradient="lsq")).sum())(step)
    ratio = np.asarray(x, np.float64) / 0.3
    d = np.where(np.abs(ratio) >= 3, 3 * np.sign(ratio), np.round(ratio) - ratio)
    size = 30 // max(step.size, 1)
    terms = np.asarray(g) * d / np.sqrt(size * 3)
    expected = {(): terms.sum(), (1, 5): terms.sum(0, keepdims=True), (3, 5): terms.reshape(3, 2, 5).sum(1)}[shape]
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)


def test_a_learned_step_approaches_the_best_one():
    """Minimizing ‖Q(x) − x‖² over s alone ends near the least-squares step."""
    x = jnp.asarray(RNG.normal(size=4000), jnp.float32)
    step, tx = jnp.float32(1.0), optax.adam(0.01)
    loss = lambda s: jnp.square(clipjax.fake_quant(x, s, 4, gradient="lsq") - x).sum()

    @jax.jit
    def train(step):
        def one(loop, _):
            updates, state = tx.update(jax.grad(loss)(loop[0]), loop[1])
            return (optax.apply_updates(loop[0], updates), state), None

        return jax.lax.scan(one, (step, tx.init(step)), length=400)[0][0]

    with jax.numpy_dtype_promotion("standard"):  # adam's
        learned = train(step)
    assert loss(learned) <= 1.02 * loss(clipjax.choose_step(x, 4))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("axis", [None, -1])
def test_both_forms_give_the_same_weights(bits, axis):
    """`fake_quantize(inner=adam)` on the visible weights, and adam on float weights of loss(fake_quant(w)): 200 steps.

    The gradient passes straight through in both, so each is the other seen from its own side.
    """
    x, y = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((32, 6), (32, 4)))
    floats = {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)}
    step = clipjax.choose_step(floats["kernel"], bits, axis=axis) / 2  # short: no level beyond the weights
    loss = lambda p: jnp.mean(jnp.square(x @ p["kernel"] - y))
    forward = lambda p: loss({"kernel": clipjax.fake_quant(p["kernel"], step, bits)})
    rule = clipjax.steps.fixed(step)
    tx, plain = clipjax.fake_quantize(bits, step=rule, axis=axis, inner=optax.adam(0.02)), optax.adam(0.02)

    @jax.jit
    def run(floats):
        def one(loop, _):
            (visible, state), (z, plain_state) = loop
            updates, state = tx.update(jax.grad(loss)(visible), state, visible)
            visible = optax.apply_updates(visible, updates)
            updates, plain_state = plain.update(jax.grad(forward)(z), plain_state)
            z = optax.apply_updates(z, updates)
            same = jnp.mean(visible["kernel"] == clipjax.fake_quant(z["kernel"], step, bits))
            return ((visible, state), (z, plain_state)), same

        # both begin on the grid: the first gradient of the one form is taken there
        start, held = clipjax.hold_once(clipjax.fake_quantize(bits, step=rule, axis=axis), floats)
        state = tx.init(start)._replace(carry=floats, projection=held.projection)
        return jax.lax.scan(one, ((start, state), (floats, plain.init(floats))), length=200)

    with jax.numpy_dtype_promotion("standard"):  # adam's
        ((visible, _), _), same = run(floats)
    assert (np.asarray(same) == 1).all() and len(np.unique(visible["kernel"] / step)) > 1
    assert (np.asarray(visible["kernel"]) != np.asarray(clipjax.fake_quant(floats["kernel"], step, bits))).any()


def test_bad_arguments_name_the_remedy():
    for kwargs, text in (
        ({"bits": 17}, "`bits` must be between 1 and 16"),
        ({"gradient": "none"}, "`gradient` must be one of"),
        ({"gradient": "lsq"}, "`bits` must be given for a learned step"),
        ({"step": 0.0}, "`step` must be positive"),
    ):
        with pytest.raises(ValueError, match=text):
            clipjax.fake_quant(jnp.ones(2), **({"step": 0.5} | kwargs))
