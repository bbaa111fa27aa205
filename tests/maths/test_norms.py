"""Norms against NumPy's f64 and torch's formula: every order, right wherever the true norm is a float."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax._maths import norms

pytestmark = pytest.mark.usefixtures("strict")

ORDERS = [0.5, 1, 1.5, 2, 3, 4, math.inf]
TINY, HUGE = np.finfo(np.float32).tiny, float(np.finfo(np.float32).max)
SCALES = [1e-36, 1e-30, 1e-25, 1e-19, 1e-10, 1.0, 1e10, 1e18, 2e19, 1e25, 1e30, 1e36, 3e38]
every_order = pytest.mark.parametrize("order", ORDERS)


def reference_norm(arrays, p):
    """The p-norm of all entries in f64, of entries divided by the largest."""
    flat = np.concatenate([np.zeros(1), *(np.abs(np.ravel(np.asarray(x, np.float64))) for x in arrays)])
    unit = flat.max()
    if unit == 0 or math.isinf(p):
        return unit
    return unit * np.sum((flat / unit) ** p) ** (1 / p)


@functools.cache
def compiled(order, each=False):
    return jax.jit(functools.partial(norms.norm, ord=order, each=each))


def check(arrays, order, rtol=3e-6):
    """Together and each alone, wherever f32 can represent the norm."""
    arrays = [np.asarray(x, np.float32) for x in arrays]
    given = [jnp.asarray(x) for x in arrays]
    groups = [arrays, *([x] for x in arrays)]
    got = [compiled(order)(given), *compiled(order, each=True)(given)]
    for group, value in zip(groups, got, strict=True):
        expected = reference_norm(group, order)
        if expected <= HUGE:
            np.testing.assert_allclose(value, expected, rtol=rtol, atol=0)
        else:
            assert np.isinf(value)


# The formula.


@pytest.mark.parametrize("scale", SCALES)
@every_order
def test_norm_is_numpys_at_every_scale(order, scale):
    """From 1e-36 to the largest float, a lone entry, an odd and an even number of them, and a matrix."""
    shares = [[1.0], [0.6, -0.8], [0.25, 0.5, -1.0, 0.0, 0.125], [[1.0, -0.5], [0.25, 1.0]]]
    check([np.float32(s) * np.float32(scale) for s in shares], order)


@pytest.mark.optimized
@every_order
def test_norm_of_random_arrays_is_numpys(order):
    rng, shapes = np.random.default_rng(11), [(100,), (17, 3), (2, 3, 4), (), (1,), (1, 1)]
    check([rng.normal(size=s) for s in shapes], order)
    check([rng.normal(size=s) * 10.0 ** rng.uniform(-30, 30) for s in shapes], order)


@pytest.mark.parametrize("scale", [float(2 * TINY), 1e-36, 1e-20, 1.0, 1e20, 1e38, 3e38, HUGE * (1 - 2e-6)])
@every_order
def test_norm_of_a_lone_entry_is_its_magnitude(order, scale):
    """Also at the ends, where neither a square nor a reciprocal is a float."""
    for sign in (1, -1):
        value = np.float32(sign * scale)
        for shape in ((), (1,), (1, 1)):
            got = compiled(order)([jnp.full(shape, value)])
            np.testing.assert_allclose(got, abs(value), rtol=1e-6)
        padded = jnp.zeros(5, jnp.float32).at[3].set(value)
        np.testing.assert_allclose(compiled(order)([padded, jnp.zeros((2, 2))]), abs(value), rtol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("order", ORDERS)
def test_norm_of_mixed_magnitudes(order):
    for values in ([1e-36, 3e38], [1e-25, 1e-20, 1e-19], [3e38, 1e38], [1e-22, 1e20], [1e-30, 1.0, 1e30]):
        check([[v] for v in values], order)
        check([values], order)


@pytest.mark.parametrize("platform", ["default", "cuda", "rocm"])
@pytest.mark.parametrize("scale", SCALES)
def test_norm_as_accelerators_take_it_is_numpys(scale, platform, monkeypatch):
    """Three sums in one pass, of which one is right, or a sum in f64; CPU takes sums one after another."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **branches: branches[platform](*args))
    monkeypatch.setattr(norms, "_compiled", norms._norm)  # which would keep one trace for all platforms
    for values in ([1.0], [0.6, -0.8], [1.0, 1e-30], [[1.0, -0.5], [0.25, 1.0]]):
        array = np.asarray(values, np.float32) * np.float32(scale)
        for each in (False, True):
            got = jax.jit(functools.partial(norms.norm, each=each))([jnp.asarray(array), jnp.zeros(3)])
            expected = reference_norm([array], 2)
            np.testing.assert_allclose(np.ravel(got)[0], expected if expected <= HUGE else np.inf, rtol=3e-6)


@pytest.mark.parametrize("order", [8, 20, 64, 65, 100])
def test_norm_of_a_high_order_is_right_up_to_the_largest_float(order):
    for scale in (1e-36, 1.0, 1e38, 3e38):
        check([np.full(2, scale, np.float32), np.full(1, scale / 2, np.float32)], order, rtol=1e-5)


@every_order
def test_norm_beyond_the_largest_float_is_infinite_and_within_it_is_not(order):
    check([np.full(4, 3e38)], order)
    check([np.full(4, 1e37)], order)
    check([np.full(1000, 1e-36)], order, rtol=1e-5)


@every_order
def test_zero_and_empty_arrays_have_the_norm_0(order):
    for arrays in ([], [jnp.zeros((0,))], [jnp.zeros((0, 3)), jnp.zeros(4), -jnp.zeros(2)]):
        assert float(compiled(order)(arrays)) == 0
        each = compiled(order, each=True)(arrays)
        assert each.shape == (len(arrays),) and not each.any()
    check([np.zeros((0, 2)), [3.0, -4.0], np.zeros(3)], order)


@pytest.mark.parametrize(("bad", "test"), [(np.nan, np.isnan), (np.inf, np.isinf), (-np.inf, np.isinf)])
@every_order
def test_nan_gives_nan_and_inf_gives_inf(order, bad, test):
    for size in (1, 3):
        arrays = [jnp.ones(size, jnp.float32).at[0].set(bad), jnp.ones(2), jnp.zeros((0,))]
        assert test(compiled(order)(arrays))
        each = compiled(order, each=True)(arrays)
        assert test(each[0]) and np.isfinite(each[1:]).all()


@every_order
def test_nan_beside_inf_is_not_finite(order):
    assert not np.isfinite(compiled(order)([jnp.array([jnp.nan, jnp.inf, 1.0])]))


@every_order
def test_vmap_is_a_loop(order):
    """A batch of which one lane needs the rescue, one overflows in its squares, and one holds a NaN."""
    rows = jnp.asarray([[3.0, 4.0], [3e-30, 4e-30], [3e25, -4e25], [jnp.nan, 1.0], [0.0, 0.0]], jnp.float32)
    got = jax.jit(jax.vmap(lambda x: norms.norm([x], order)))(rows)
    expected = [np.nan if np.isnan(row).any() else reference_norm([row], order) for row in rows]
    np.testing.assert_allclose(got, expected, rtol=3e-6)


# Narrow dtypes.


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_order
def test_bf16_and_f16_entries_and_600_leaves_accumulate_in_f32(order, dtype):
    """In their own dtype the squares of 0.1 would stall near 4 in bf16, the norm at 2."""
    lone = jnp.asarray(0.1, dtype)
    expected = reference_norm([np.full(600, float(lone))], order)
    many = [*map(compiled(order), ([jnp.full(600, 0.1, dtype)], [jnp.full((3, 100), 0.1, dtype)] * 2))]
    if dtype == jnp.bfloat16 and order in (1, 2, 3):
        with jax.disable_jit():  # as compiling 600 leaves takes seconds
            many.append(norms.norm([lone] * 600, order))
    for got in many:
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_f16_norm_beyond_f16_and_mixed_dtypes():
    arrays = [jnp.full(4, 6e4, jnp.float16), jnp.full(9, 1e5, jnp.float32), jnp.full(1, 1e5, jnp.bfloat16)]
    for order in ORDERS:
        expected = reference_norm([np.asarray(x, np.float64) for x in arrays], order)
        np.testing.assert_allclose(compiled(order)(arrays), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@every_order
def test_f64_leaves_are_measured_in_f64(order, scale):
    with jax.enable_x64(True):
        arrays = [jnp.asarray([3.0, 4.0], jnp.float64) * (scale * (1 + 1e-12)), jnp.zeros(2, jnp.float32)]
        got = compiled(order)(arrays)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, reference_norm(map(np.asarray, arrays), order), rtol=1e-12)


# As torch clips.

MAX_NORM = 1.5
TORCH_GRADS = {"a": [[0.5, -1.5], [2.0, 0.25]], "b": [3.0, -0.125, 1.0], "c": [0.75]}
# total = ‖(‖a‖, ‖b‖, ‖c‖)‖ and coef = min(1, 1.5 / (total + 1e-6)), evaluated in f64
TORCH = {
    0.5: (60.80404446, 0.0246694112),
    1.5: (5.251368071, 0.2856397979),
    2: (4.14012379, 0.3623079197),
    4: (3.18917213, 0.4703413514),
    math.inf: (3, 0.4999998333),
}


def clipped(order, max_norm, grads):
    tx = clipjax.clip_norm(max_norm, ord=order, eps=1e-6)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    return updates, float(state.norm_pre), float(state.coefficient)


@pytest.mark.parametrize("order", TORCH)
def test_clip_norm_is_torchs_formula(order):
    """`torch.nn.utils.clip_grad_norm_`: eps = 1e-6 is torch's constant."""
    grads = {k: jnp.asarray(x, jnp.float32) for k, x in TORCH_GRADS.items()}
    updates, total, coef = clipped(order, MAX_NORM, grads)
    np.testing.assert_allclose((total, coef), TORCH[order], rtol=1e-6)
    for k, g in TORCH_GRADS.items():
        np.testing.assert_allclose(updates[k], np.asarray(g) * TORCH[order][1], rtol=1e-6)
    updates, total, coef = clipped(order, 1e4, grads)
    assert coef == 1
    jax.tree.map(np.testing.assert_array_equal, updates, grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", TORCH)
def test_clip_norm_is_torch_where_it_is_installed(order):
    torch, rng = pytest.importorskip("torch"), np.random.default_rng(12)
    for scale in (1e-3, 1.0, 1e3):
        grads = [np.float32(rng.normal(size=s) * scale) for s in ((5, 7), (11,), (1,))]
        leaves = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = torch.tensor(g)
        expected = torch.nn.utils.clip_grad_norm_(leaves, MAX_NORM, norm_type=order)
        updates, total, _ = clipped(order, MAX_NORM, [jnp.asarray(g) for g in grads])
        np.testing.assert_allclose(total, float(expected), rtol=3e-6)
        for leaf, update in zip(leaves, updates, strict=True):
            np.testing.assert_allclose(update, leaf.grad.numpy(), rtol=1e-5)
