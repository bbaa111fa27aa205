"""Levels: every rule that covers its weights leaves those on its grid where they are, at every width and dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import steps
from clipjax._arrays import dtypes
from clipjax._maths import grids, intervals, levels, step_fitting

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
WIDE = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
RULES = {
    "mse": (steps.mse(), WIDE),
    "absmax": (steps.absmax(), WIDE),
    "minmax": (steps.minmax(), WIDE),
    "interval": (steps.interval(-0.7, 1.3), WIDE),
    "power_of_two(mse)": (steps.power_of_two(), WIDE),
    "power_of_two(absmax)": (steps.power_of_two(steps.absmax()), WIDE),
    "twn": (steps.twn(), (2,)),
    "power_of_two(twn)": (steps.power_of_two(steps.twn()), (2,)),
}


def samples(shape, seed=0):
    """Arrays of many kinds: Gaussian of any scale, heavy tails, uneven sides, half of it pruned, one-sided."""
    rng = np.random.default_rng(seed)
    draw = [
        rng.normal(size=shape),
        rng.normal(size=shape) * 1e-3,
        rng.laplace(size=shape) * 7,
        rng.uniform(-0.2, 1, shape),
        rng.normal(size=shape) * (rng.random(shape) < 0.5),
        -np.abs(rng.standard_t(3, shape)),
        rng.choice([-0.3, 0.3], shape),
        np.zeros(shape),
    ]
    return np.asarray(draw, np.float32)


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def projected(x, bits, rule, dtype):
    """The levels of every row, rounded to a dtype; those of every other row are held to what its weights reach."""
    x = x.astype(dtype).astype(jnp.float32)
    limits = [jnp.max(jnp.maximum(side, 0), axis=1, keepdims=True) for side in (-x, x)]
    if rule.sides is None:
        limits = [jnp.maximum(*limits)] * 2
    free = (jnp.arange(len(x)) % 2 == 0)[:, None]
    limits = [jnp.where(free, dtypes.largest(dtype), end) for end in limits]
    found = levels.of(rule, x, bits, (1,), tuple(limits), dtype)
    code = intervals.limit(grids.codes(x, found.step), found.low, found.high)
    return dtypes.narrowed(code * found.step, dtype), found.step, found.high - found.low


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("n", "dtype"), [(8, jnp.float32), (600, jnp.float32), (40, jnp.bfloat16), (40, jnp.float16)])
def test_weights_on_the_grid_of_a_rule_stay_bit_for_bit(name, n, dtype):
    """P(P(w)) = P(w); no more levels than the width has; a row of zeros has the step 1."""
    rule, widths = RULES[name]
    x = jnp.asarray(samples((4, n)).reshape(-1, n))
    for bits in (b for b in widths if dtype == jnp.float32 or b <= 8):
        once, step, count = projected(x, jnp.int32(bits), rule, dtype)
        np.testing.assert_array_equal(projected(once, jnp.int32(bits), rule, dtype)[0], once)
        assert (count <= 2**bits - 2).all() and np.isfinite(step).all() and (step[-4:] > 0).all()
        assert name == "interval" or (step[-4:] == 1).all()


@pytest.mark.parametrize("rule", [steps.percentile(), steps.sigma()], ids=["percentile", "sigma"])
def test_zeros_have_the_step_1_whatever_bounds_the_levels(rule):
    np.testing.assert_array_equal(projected(jnp.zeros((2, 4)), jnp.int32(4), rule, jnp.float32)[1], [[1], [1]])


@pytest.mark.parametrize("off", [0.995, 1.005])
def test_the_grid_of_bf16_weights_is_found_with_a_step_that_is_off(off):
    """Such a step reads the codes of large entries wrongly, those of entries below half of the largest rightly."""
    code = np.random.default_rng(0).integers(-127, 128, (9, 300))
    w = dtypes.narrowed(jnp.asarray(code * 0.0123, jnp.float32), jnp.bfloat16)
    step, found = step_fitting.on_grid(w, jnp.full((9, 1), 0.0123 * off), 8, (1,), jnp.bfloat16)
    assert found.all()
    np.testing.assert_array_equal(jnp.round(w / step), code)


@pytest.mark.parametrize("n", [6, 300])
def test_mse_leaves_any_array_of_codes_times_a_step_as_it_is(n):
    """Any f32 step, of which code * s is rounded; also where few of the codes occur, or with a common factor."""
    codes = [RNG.integers(-top, top + 1, (9, n)) for top in (1, 3, 7, 127)]
    codes += [4 * RNG.integers(-1, 2, (9, n)), np.tile([1, 2, 3], (9, n // 3)) * RNG.choice([-1, 1], (9, n))]
    s = RNG.uniform(0.01, 3, (9, 1)).astype(np.float32)
    for code in codes:
        w = code.astype(np.float32) * s
        for bits in range(max(2, int(np.abs(code).max()).bit_length() + 1), 11):
            np.testing.assert_array_equal(projected(w, jnp.int32(bits), steps.mse(), jnp.float32)[0], w)


@pytest.mark.parametrize("bits", [4, 16])
def test_affine_levels_are_split_for_the_largest_step_that_stays_inside(bits):
    """The largest min(lo/i, hi/(n − i)) over i, and all of the n + 1 levels are used; from 12 bits on within 1 %."""
    w, n = RNG.uniform(-0.3, 1.1, (50, 20)).astype(np.float32), 2**bits - 2
    lo, hi, i = np.maximum(-w.min(1, keepdims=True), 0), w.max(1, keepdims=True), np.arange(1, n)
    best = np.maximum(np.minimum(lo / i, hi / (n - i)).max(1), hi[:, 0] / n)  # i = 0: levels above zero alone
    new, step, count = projected(w, jnp.int32(bits), RULES["minmax"][0], jnp.float32)
    np.testing.assert_allclose(step[:, 0], best, rtol=1e-5 if bits < 12 else 0.01)
    assert (count == n).all() if bits < 12 else (count > 0.99 * n).all()
    assert (new.min(1) >= np.minimum(w.min(1), 0)).all() and (new.max(1) <= w.max(1)).all()
    assert (np.abs(new - w) <= (1 if bits < 12 else 3) * step).all()
