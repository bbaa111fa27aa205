"""Codes by error and cost: thresholds against the brute-force choice, and costs against their formula."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipjax._maths import code_costs


def cost(ratio, levels, bits, lam):
    """(r - l)² + λ c(l) of every weight and level, in f64."""
    return (np.float64(ratio)[:, None] - levels) ** 2 + lam * np.float64(bits)


def chosen(ratio, counts, usable, lam, top):
    levels = jnp.arange(-top, top + 1, dtype=jnp.float32)
    bits = code_costs.bits(jnp.asarray(counts, jnp.float32), jnp.asarray(usable))
    thresholds = code_costs.thresholds(levels, bits, jnp.asarray(usable), jnp.float32(lam))
    assert (np.diff(thresholds) >= 0).all() and np.isfinite(thresholds).all()
    return np.asarray(code_costs.chosen(jnp.asarray(ratio), thresholds, -top)), np.asarray(bits)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 5),
    lam=st.floats(0, 8, width=32),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.1, 20),
    cut=st.booleans(),
)
def test_codes_are_the_brute_force_argmin(bits, lam, seed, spread, cut):
    rng, top = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    levels = np.arange(-top, top + 1)
    counts = np.floor(10 ** rng.uniform(0, 5, levels.size)) * (rng.random(levels.size) < 0.8)
    usable = np.abs(levels) <= max(1, top - 1) if cut else np.ones(levels.size, bool)
    ratio = np.float32(rng.normal(size=200) * spread)
    ratio = ratio[ratio != 0]
    codes, prices = chosen(ratio, counts, usable, lam, top)
    costs = np.where(usable, cost(ratio, levels, prices, lam), np.inf)
    got = np.take_along_axis(costs, (codes + top).astype(int)[:, None], 1)[:, 0]
    np.testing.assert_array_less(got - costs.min(1), 1e-5 * (1 + np.abs(costs.min(1))))


@pytest.mark.parametrize("top", [1, 3, 7, 127])
def test_free_codes_are_the_nearest_with_halves_to_even(top):
    ratio = np.concatenate([np.arange(-2 * top - 2, 2 * top + 3) / 2, np.linspace(-top - 1, top + 1, 999)])
    ratio = np.float32(ratio)
    codes, _ = chosen(ratio, np.ones(2 * top + 1), np.ones(2 * top + 1, bool), 0.0, top)
    np.testing.assert_array_equal(codes, np.clip(np.rint(ratio), -top, top))


def test_zero_costs_no_more_than_any_other_level():
    codes, bits = chosen(np.float32([0.0, -0.0, 0.4, -0.4]), [1000, 0, 0], np.ones(3, bool), 100.0, 1)
    assert bits[0] == bits[1] < bits[2] and (codes == 0).all()


def test_costs_are_finite_for_levels_that_nobody_has():
    got = code_costs.bits(jnp.float32([6, 2, 0]), jnp.asarray([True, True, True]))
    np.testing.assert_allclose(got, -np.log2(np.array([6.5, 6.5, 0.5]) / 9.5), rtol=1e-6)


def test_information_is_the_entropy_times_the_number_of_weights():
    np.testing.assert_allclose(code_costs.information(jnp.float32([4, 4, 8, 0])), 24.0)
    assert code_costs.information(jnp.zeros(3)) == 0


@pytest.mark.parametrize("top", [1, 7])
def test_a_histogram_counts_every_code(top):
    codes = np.random.default_rng(0).integers(-top, top + 1, (30, 7))
    got = code_costs.histogram(jnp.asarray(codes, jnp.float32), -top, 2 * top + 1)
    np.testing.assert_array_equal(got, np.bincount(codes.ravel() + top, minlength=2 * top + 1))
