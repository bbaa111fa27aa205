"""The formulas of a grid as pure functions, against NumPy's f32 arithmetic."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipjax
from clipjax._maths import grids, step_groups

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.optimized]

RNG = np.random.default_rng(0)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def reference_codes(x, s, rounding="nearest"):
    """round(x/s): halves to even, or away from zero, of NumPy's f32 quotient."""
    ratio = (np.float32(x) / np.float32(s)).astype(np.float64)
    return np.round(ratio) if rounding == "nearest" else np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)


def near_ties(s, n):
    """Weights whose quotient by s lies within a few ulp of a half."""
    halves = (RNG.integers(-60, 60, n) + 0.5) * np.float64(np.float32(s))
    x = halves.astype(np.float32)
    for _ in range(2):
        x = np.where(RNG.random(n) < 0.4, np.nextafter(x, np.float32(RNG.choice([-np.inf, np.inf]))), x)
    return x


@pytest.mark.parametrize("rounding", ["nearest", "half_away"])
def test_near_ties_round_like_numpys_division_in_jit(rounding):
    """XLA rewrites x/s as x·(1/s), which rounds hundreds of these differently."""
    codes = jax.jit(lambda x, s: clipjax.quantize(x, s, 8, rounding=rounding))
    baked = jax.jit(lambda x: clipjax.round_to_step(x, 0.35, rounding=rounding))
    wrong = 0
    for s in (0.35, 0.1, 1 / 3, 0.007, 3.7):
        x = near_ties(s, 5000)
        np.testing.assert_array_equal(codes(x, jnp.float32(s)), reference_codes(x, s, rounding))
        wrong += (reference_codes(x, s) != np.round(x * (1 / np.float32(s)))).sum()
    assert wrong > 100  # the trap is real
    x = near_ties(0.35, 5000)
    expected = (reference_codes(x, 0.35, rounding) * np.float32(0.35)).astype(np.float32)
    np.testing.assert_array_equal(baked(x), expected)


def test_near_ties_with_a_step_per_column():
    s = np.float32([[0.35, 0.1, 1 / 3]])
    x = np.stack([near_ties(v, 3000) for v in s[0]], axis=1)
    np.testing.assert_array_equal(jax.jit(lambda x, s: clipjax.quantize(x, s, 8))(x, s), reference_codes(x, s))


def test_rounding_halves():
    x = jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    np.testing.assert_array_equal(clipjax.round_to_step(x, 1.0), [0, 2, 2, 0, -2, -2])
    np.testing.assert_array_equal(clipjax.round_to_step(x, 1.0, rounding="half_away"), [1, 2, 3, -1, -2, -3])


def test_stochastic_rounding_is_unbiased_and_moves_to_a_neighbour():
    n = 20_000
    x = jnp.repeat(jnp.array([[0.1, -0.35, 1.75, 2.0]]), n, axis=0)
    got = np.asarray(clipjax.round_to_step(x, 0.5, rounding="stochastic", key=jax.random.key(0)))
    down = np.floor(np.float64(x[0]) / 0.5) * 0.5
    for column, value, low in zip(got.T, np.float64(x[0]), down, strict=True):
        assert set(np.unique(column)) <= {low, low + 0.5}
        share = (value - low) / 0.5
        assert abs(column.mean() - value) <= 4 * 0.5 * np.sqrt(share * (1 - share) / n) + 1e-9


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8, 9, 15, 16])
def test_codes_of_every_width(bits):
    """−(2^(b−1) − 1) … 2^(b−1) − 1; {−1, 1} for one bit, with sign(0) = +."""
    x = np.concatenate([RNG.normal(size=500).astype(np.float32) * 9, [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    s, top = np.float32(20 / 2**bits), 2 ** (bits - 1) - 1
    got = np.asarray(clipjax.quantize(jnp.asarray(x), s, bits))
    expected = np.where(x < 0, -1, 1) if bits == 1 else np.clip(reference_codes(x, s), -top, top)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == (np.int8 if bits <= 8 else np.int16)


def test_unbounded_codes_are_int32_and_nan_is_zero():
    got = clipjax.quantize(jnp.array([1e5, -0.3, jnp.nan, 3e38, -jnp.inf]), 0.5)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [200_000, -1, 0, 2**31 - 128, -(2**31 - 128)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_round_trip(bits, dtype):
    """dequantize(quantize(w)) is the nearest level, and a fixed point."""
    x = jnp.asarray(RNG.normal(size=(40, 3)), dtype)
    s = np.float32(0.11)
    once = clipjax.dequantize(clipjax.quantize(x, s, bits), s, dtype)
    assert once.dtype == dtype
    top = 2 ** (bits - 1) - 1
    levels = np.clip(reference_codes(x.astype(jnp.float32), s), -top, top).astype(np.float32) * s
    np.testing.assert_array_equal(once, jnp.asarray(levels).astype(dtype))
    again = clipjax.dequantize(clipjax.quantize(once, s, bits), s, dtype)
    np.testing.assert_array_equal(np.asarray(again, np.float32), np.asarray(once, np.float32))


def test_round_to_step_keeps_dtype_and_non_finite():
    x = jnp.array([0.3, jnp.nan, jnp.inf, -jnp.inf], jnp.bfloat16)
    got = clipjax.round_to_step(x, 0.25)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), [0.25, np.nan, np.inf, -np.inf])


# clamp


@pytest.mark.parametrize("bound", [1.0, 0.0, (-0.5, 2.0), (0.1, 0.3), np.inf, (0.25, 0.25)])
def test_clamp_matches_numpy(bound):
    x = np.concatenate([RNG.normal(size=200) * 2, [0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    np.testing.assert_array_equal(clipjax.clamp(jnp.asarray(x), bound), np.clip(x, np.float32(low), np.float32(high)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.1, 0.3, 1 / 3, (-0.7, 0.123), 1e-3])
def test_clamp_rounds_the_bound_inwards_in_narrow_dtypes(bound, dtype):
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    got = np.asarray(clipjax.clamp(jnp.array([-9.0, 9.0], dtype), bound), np.float64)
    assert np.float32(low) <= got[0] and got[1] <= np.float32(high)
    spacing = np.asarray(jnp.nextafter(jnp.asarray(got, dtype), jnp.asarray(jnp.inf, dtype)), np.float64)
    assert spacing[1] > np.float32(high)  # and not farther than needed
    traced = jax.jit(clipjax.clamp)(jnp.array([-9.0, 9.0], dtype), jax.tree.map(jnp.float32, bound))
    np.testing.assert_array_equal(np.asarray(traced, np.float64), got)


def test_clamp_bound_may_be_an_array():
    x = jnp.array([[-3.0, 3.0], [3.0, 0.25]])
    np.testing.assert_array_equal(clipjax.clamp(x, jnp.array([[1.0, 2.0]])), [[-1, 2], [1, 0.25]])


# helpers


@settings(max_examples=200, deadline=None, derandomize=True)
@given(step=st.floats(2.0**-60, 2.0**60, width=32), bits=st.integers(1, 16), code=st.integers(0, 2**15 - 1))
def test_short_steps_have_exact_multiples_and_differences(step, bits, code):
    """S keeps 24 − bits significant bits, toward zero, so that codes·s and their differences are exact in f32."""
    s = np.asarray(grids.short(jnp.float32(step), bits))
    assert 0 < s <= np.float32(step) and s >= np.float32(step) * (1 - 2.0 ** -(23 - bits))
    top = max(1, 2 ** (bits - 1) - 1)
    a, b = code % (top + 1), (code // 3) % (top + 1)
    assert np.float32(a) * s == np.float64(a) * np.float64(s)
    assert np.float32(a) * s + np.float32(b) * s == np.float64(a + b) * np.float64(s)


def test_the_best_short_step_fits_into_the_whole_and_is_the_largest_that_does():
    """7 s <= w < 7 (s + one unit in its last kept place), also where w/7 rounds up to a short number."""
    whole = jnp.asarray(np.r_[np.float32(0.11141526), np.random.default_rng(0).uniform(0.01, 10, 20_000)], jnp.float32)
    covered = lambda s: jnp.minimum(grids.multiples(whole, s), 7) * s
    s = np.asarray(jax.jit(lambda w: grids.best_short(w / 7, 4, covered))(whole), np.float64)
    unit = 2.0 ** (np.floor(np.log2(s)) - 19)
    assert (7 * s <= np.asarray(whole)).all() and (7 * (s + 2 * unit) > np.asarray(whole)).all()
    assert (np.float64(jax.jit(lambda w, s: grids.multiples(w, s))(whole, jnp.asarray(s, jnp.float32))) == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reach_is_the_last_f32_that_is_rounded_to_the_end(dtype):
    largest = jnp.finfo(dtype).max
    ends = jnp.abs(jnp.asarray(RNG.normal(size=500), dtype)).at[:3].set(jnp.array([0, 1, largest], dtype))
    reach = grids.reach(ends.astype(jnp.float32), dtype)
    np.testing.assert_array_equal(reach.astype(dtype), ends)
    beyond = jnp.nextafter(reach, jnp.float32(jnp.inf)).astype(dtype)
    assert (beyond[3:] > ends[3:]).all() and (float(reach[0]), float(reach[2])) == (0, float(largest))


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_multiples_where_the_quotient_is_off(off, monkeypatch):
    """As on hardware whose division is not correctly rounded; a CPU's is, where XLA leaves it."""
    floor = jnp.floor
    monkeypatch.setattr(jnp, "floor", lambda x: floor(x) + off)
    s, k = jnp.float32(0.375), jnp.arange(1.0, 60.0)
    chex.assert_trees_all_equal(grids.multiples((k + 0.5) * s, s), k)
    chex.assert_trees_all_equal(grids.multiples(k * s, s), k)


def test_multiples_within_a_limit():
    got = grids.multiples(jnp.array([0.0, 0.99, 1.0, 7.0]), jnp.float32(0.5))
    np.testing.assert_array_equal(got, [0, 1, 2, 14])


@pytest.mark.parametrize(
    ("below", "above", "ends"),
    [(0.0, 10.0, (0, 6)), (10.0, 0.0, (6, 0)), (5.0, 5.0, (3, 3)), (10.0, 1.0, (6, 0)), (2.0, 4.0, (2, 4))],
)
def test_levels_that_a_width_lacks_are_cut_on_both_sides_but_never_beyond_zero(below, above, ends):
    """Three bits have seven levels."""
    assert grids.ends(jnp.float32(1), 3, jnp.float32(below), jnp.float32(above)) == ends


@pytest.mark.parametrize(("axis", "expected"), [(None, (0, 1, 2)), (-1, (0, 1)), (0, (1, 2)), ((0, -1), (1,))])
def test_shared_axes(axis, expected):
    assert step_groups.resolve(axis, None, "w", jnp.ones((2, 3, 4))).axes == expected


def test_vmap_over_steps_is_a_sweep():
    x = jnp.asarray(RNG.normal(size=20), jnp.float32)
    steps = jnp.array([0.1, 0.35])
    got = jax.vmap(lambda s: clipjax.round_to_step(x, s))(steps)
    for g, s in zip(got, np.asarray(steps), strict=True):
        np.testing.assert_array_equal(g, (reference_codes(x, s) * s).astype(np.float32))
