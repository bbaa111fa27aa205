"""Steps: least squares against a scan and the Gaussian table, and every rule's edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import steps

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
GAUSSIAN = {2: 1.224, 3: 0.6508, 4: 0.3534, 5: 0.1933, 6: 0.1055, 7: 0.0573, 8: 0.0309}
N = 40_000


def squared_error(w, s, bits):
    """‖Q(w) − w‖² over the nonzero weights."""
    w, top = w[w != 0].astype(np.float64), 2 ** (bits - 1) - 1
    return np.sum((np.clip(np.round(w / s), -top, top) * s - w) ** 2)


def best_step(w, bits):
    """The least error on a fine scan of steps."""
    top = np.abs(w).max() / (2 ** (bits - 1) - 1)
    scan = np.geomspace(top / 40, top * 1.05, 600)
    return min(squared_error(w, s, bits) for s in scan)


@functools.partial(jax.jit, static_argnames=("bits", "axis", "step"))
def choose(x, bits, step=steps.mse(), axis=None):  # noqa: B008 - one rule, so that compiled functions are shared
    return clipjax.choose_step(x, bits, step=step, axis=axis)


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_mse_matches_the_gaussian_table(bits):
    """Within 1 % of the optimal error, for any scale of the weights."""
    w = RNG.normal(size=N).astype(np.float32)
    table = squared_error(w, GAUSSIAN[bits], bits)
    for scale in (1.0, 2.0**-60, 2.0**60):
        s = float(choose(jnp.asarray(w * np.float32(scale)), bits)) / scale
        assert squared_error(w, s, bits) <= 1.01 * table
    np.testing.assert_allclose(s, GAUSSIAN[bits], rtol=0.06)


HARD = {
    "uniform": RNG.uniform(-1, 1, N),
    "laplace": RNG.laplace(size=N),
    "sparse": RNG.normal(size=N) * (RNG.random(N) < 0.1),
    "bimodal": np.sign(RNG.normal(size=N)) * (1 + 0.05 * RNG.normal(size=N)),
    "outlier": np.concatenate([RNG.normal(size=N - 1), [40.0]]),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_within_two_percent_of_the_best_scan(kind, bits):
    w = HARD[kind].astype(np.float32)
    s = float(choose(jnp.asarray(w), bits))
    assert squared_error(w, s, bits) <= 1.02 * best_step(w, bits)


def test_mse_one_bit_is_the_mean_magnitude():
    w = np.where(RNG.random(1000) < 0.5, 0, RNG.normal(size=1000)).astype(np.float32)
    np.testing.assert_allclose(choose(jnp.asarray(w), 1), np.abs(w[w != 0]).mean(), rtol=1e-5)


def test_mse_ignores_zeros():
    w = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    padded = jnp.asarray(np.concatenate([w, np.zeros(4000, np.float32)]))
    np.testing.assert_allclose(choose(padded, 4), choose(jnp.asarray(w), 4), rtol=1e-3)


def test_mse_few_values_are_found_exactly():
    """A ternary leaf loses nothing."""
    w = jnp.asarray(RNG.choice([-0.3, 0.0, 0.3], 300), jnp.float32)
    np.testing.assert_allclose(choose(w, 2), 0.3, rtol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_absmax_reaches_every_weight(bits):
    """With all codes; steps of 16 bits have 8 significant bits, and the last level is at most one step short."""
    w = RNG.normal(size=100).astype(np.float32)
    s, largest, top = float(choose(jnp.asarray(w), bits, steps.absmax())), np.abs(w).max(), max(1, 2 ** (bits - 1) - 1)
    np.testing.assert_allclose(s, largest / top, rtol=2.0 ** -(22 - bits))
    last = min(top, largest // s)
    assert last == top if bits <= 8 else last > 0.99 * top
    assert last * s <= largest <= (last + 1) * s


@pytest.mark.parametrize("rule", [steps.mse(), steps.absmax()], ids=["mse", "absmax"])
def test_sixteen_bits_of_a_gaussian_reach_89_db(rule):
    """With exact multiples; without them 89.2 are possible."""
    for seed in range(3):
        w = np.random.default_rng(seed).normal(size=10_000).astype(np.float32)
        s = choose(jnp.asarray(w), 16, rule)
        error = np.float64(clipjax.dequantize(clipjax.quantize(jnp.asarray(w), s, 16), s)) - w
        assert 10 * np.log10(np.sum(np.float64(w) ** 2) / np.sum(error**2)) >= 89


SMALL = {bits: np.random.default_rng(bits).normal(size=(64, 64)).astype(np.float32) for bits in GAUSSIAN}


@pytest.mark.parametrize("n", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", GAUSSIAN)
def test_mse_of_small_groups_is_within_a_twentieth_of_a_decibel_of_every_step(n, bits):
    """Their error changes by fits and starts with the step; the reference tries 4,000 of them."""
    w, top = SMALL[bits][:n], 2 ** (bits - 1) - 1
    scan = np.abs(w).max(0) / top * np.geomspace(1 / 3, 2.1, 4000)[:, None, None]
    least = np.min([np.sum((np.clip(np.round(w / s), -top, top) * s - w) ** 2, 0) for s in scan], 0)
    s = np.float64(choose(jnp.asarray(w), bits, axis=-1))
    error = np.sum((np.clip(np.round(w / s), -top, top) * s - w) ** 2, 0)
    assert (10 * np.log10(error / least)).max() < 0.05


def test_mse_finds_the_step_of_which_all_weights_are_multiples():
    assert float(choose(jnp.array([1.0, 2.0, 3.0, -3.0]), 4)) == 1.0


@pytest.mark.parametrize(("lo", "hi"), [(-0.7, 0.7), (-0.25, 0.75), (0.0, 1.0), (-2.0, 0.0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_interval_does_not_follow_the_distribution(lo, hi, bits):
    """S = (hi − lo)/(2^b − 2), up to the bits that exact multiples cost."""
    for scale in (1.0, 100.0):
        s = clipjax.choose_step(jnp.full(3, scale), bits, step=steps.interval(lo, hi))
        np.testing.assert_allclose(s, (hi - lo) / (2**bits - 2), rtol=2.0 ** -(21 - bits))


def test_fixed_and_float_mean_the_same():
    x = jnp.ones((2, 3))
    assert (
        float(clipjax.choose_step(x, 4, step=0.25)) == float(clipjax.choose_step(x, 4, step=steps.fixed(0.25))) == 0.25
    )


ALL = {
    "mse": steps.mse(),
    "absmax": steps.absmax(),
    "minmax": steps.minmax(),
    "percentile": steps.percentile(),
    "sigma": steps.sigma(),
    "twn": steps.twn(),
    "power_of_two": steps.power_of_two(steps.percentile()),
}


@pytest.mark.parametrize("name", ALL)
def test_a_unit_of_zeros_has_the_step_1(name):
    """Jitted or not, beside others; a whole array of zeros too."""
    w = jnp.asarray([[0.5, 0.0], [-1.0, 0.0], [0.25, 0.0]])
    for found in (choose(w, 2, ALL[name], axis=-1), clipjax.choose_step(w, 2, step=ALL[name], axis=-1)):
        assert found[0, 1] == 1 and 0 < found[0, 0] < 2
    assert float(choose(jnp.zeros(5), 2, ALL[name])) == 1


@pytest.mark.parametrize("rule", [steps.mse(), steps.absmax()], ids=["mse", "absmax"])
@pytest.mark.parametrize("bits", [1, 4])
def test_all_zero_and_non_finite(rule, bits):
    """All zero gives 1; NaN and infinite weights are left out."""
    assert float(choose(jnp.zeros(5), bits, rule)) == 1
    clean = choose(jnp.array([0.5, -1.0, 0.0, 0.0]), bits, rule)
    np.testing.assert_array_equal(choose(jnp.array([0.5, -1.0, jnp.nan, -jnp.inf]), bits, rule), clean)


@pytest.mark.parametrize("rule", [steps.mse(), steps.absmax()], ids=["mse", "absmax"])
def test_axis_gives_each_unit_its_own_step(rule):
    """Also a unit that is all zero, beside others."""
    w = RNG.normal(size=(64, 3)).astype(np.float32) * [1.0, 10.0, 0.0]
    got = choose(jnp.asarray(w, jnp.float32), 4, rule, axis=-1)
    assert got.shape == (1, 3)
    for column, s in zip(w.T, np.asarray(got)[0], strict=True):
        np.testing.assert_allclose(s, choose(jnp.asarray(column, jnp.float32), 4, rule), rtol=1e-3)
    assert float(got[0, 2]) == 1


def test_axis_tuple_for_stacked_layers():
    w = jnp.asarray(RNG.normal(size=(2, 5, 3)), jnp.float32)
    got = choose(w, 4, steps.absmax(), axis=(0, -1))
    assert got.shape == (2, 1, 3)
    np.testing.assert_allclose(got, np.abs(w).max(axis=1, keepdims=True) / 7, rtol=1e-5)


@pytest.mark.parametrize("value", [1e-30, 1e30, 3e38])
def test_tiny_and_huge_weights_give_finite_steps(value):
    for rule in (steps.mse(), steps.absmax()):
        s = float(choose(jnp.array([value, -value / 2], jnp.float32), 4, rule))
        assert 0 < s <= value and np.isfinite(s)


@pytest.mark.parametrize("q", [0.001, 50.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("axis", [None, -1])
def test_percentile_is_an_exact_order_statistic(q, axis):
    """The round(q n/100)-th smallest nonzero magnitude, at least the first; denormals and ties too."""
    w = RNG.normal(size=(501, 2)).astype(np.float32)
    w[RNG.random(w.shape) < 0.3] = 0
    w[:20] = 0.5
    w[20, :] = 1e-40
    got = choose(jnp.asarray(w), 2, steps.percentile(q), axis=axis)
    for column, s in zip(w.T if axis == -1 else [w.ravel()], np.ravel(got), strict=True):
        sizes = np.sort(np.abs(column[column != 0]))
        rank = max(round(float(np.float32(q / 100)) * len(sizes)), 1)
        expected = sizes[rank - 1]
        np.testing.assert_allclose(s, expected if expected > 1e-38 else s, rtol=2.0**-19)


def test_sigma_is_the_root_mean_square_of_what_survived():
    w = np.where(RNG.random(5000) < 0.5, 0, RNG.normal(size=5000)).astype(np.float32)
    expected = 2.5 * np.sqrt(np.mean(w[w != 0].astype(np.float64) ** 2)) / 7
    np.testing.assert_allclose(choose(jnp.asarray(w), 4, steps.sigma(2.5)), expected, rtol=1e-5)


def test_twn_worked_example():
    """Li et al., equations 5 and 6: mean|w| = .5, Δ = .35, and .6, .9, 1.2 are above it."""
    w = jnp.array([0.1, -0.6, 0.9, -1.2, 0.1, 0.1])
    np.testing.assert_allclose(choose(w, 2, steps.twn()), 0.9, rtol=1e-5)
    gaussian = RNG.normal(size=N).astype(np.float32)
    np.testing.assert_allclose(choose(jnp.asarray(gaussian), 2, steps.twn()), 1.184, rtol=0.01)


def test_minmax_spends_the_levels_by_the_lengths_of_the_sides():
    """From -1 to 2 a width of 3 bits has 7 levels: two below zero, four above; from -1 to 2.3 the upper end binds."""
    assert float(choose(jnp.array([-1.0, 2.0]), 3, steps.minmax())) == 0.5
    np.testing.assert_allclose(choose(jnp.array([-1.0, 2.3]), 3, steps.minmax()), 0.5, rtol=1e-5)
    np.testing.assert_allclose(choose(jnp.array([-1.0, 2.6]), 3, steps.minmax()), 2.6 / 5, rtol=1e-5)


def test_minmax_of_one_sided_weights_has_all_levels_on_that_side():
    w = jnp.asarray(RNG.uniform(0.5, 1.5, size=100), jnp.float32)
    np.testing.assert_allclose(choose(w, 4, steps.minmax()), w.max() / 14, rtol=1e-5)
    np.testing.assert_allclose(choose(-w, 4, steps.minmax()), w.max() / 14, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 0.07, 0.3, 1.0, 1.4, 1.5, 1e30])
def test_power_of_two_is_the_nearest_on_the_logarithmic_scale(scale):
    w = jnp.asarray([scale, -scale / 3], jnp.float32)
    s = float(choose(w, 2, steps.power_of_two(steps.absmax())))
    assert s == 2.0 ** np.round(np.log2(np.float32(scale)))


def test_power_of_two_stays_within_the_reach():
    """1.5 would go to 2: behind a bound of 1.5 no level may exceed it, so it is 1."""
    params = {"kernel": jnp.array([[1.5, -0.2]])}
    quantize = clipjax.fake_quantize(2, step=steps.power_of_two(steps.absmax()))
    for tx, expected in ((optax.chain(clipjax.clamp_weights(1.5), quantize), 1.0), (optax.chain(quantize), 2.0)):
        _, state = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
        assert float(state[-1].projection.step["kernel"]) == expected


def test_an_interval_takes_one_bit_among_others_where_it_has_both_signs():
    """One bit has the levels -s and s, both inside; without room for both `init` says so."""
    w = {"kernel": jnp.asarray(np.random.default_rng(0).choice([-0.5, 0.5], size=(8, 8)), jnp.float32)}
    tx = clipjax.fake_quantize(clipjax.widths.sqnr(15.0, (1, 2, 3)), step=steps.interval(-0.5, 0.5))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, w), tx.init(w), w)
    assert int(state.projection.bits["kernel"]) == 1
    np.testing.assert_array_equal(w["kernel"] + updates["kernel"], w["kernel"])
    for bits in (1, clipjax.widths.sqnr(15.0, (1, 2, 3))):
        with pytest.raises(ValueError, match="enclose 0 on both sides"):
            clipjax.fake_quantize(bits, step=steps.interval(0.0, 1.0)).init(w)
