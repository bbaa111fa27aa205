"""`roundings.rate`: codes that pay for their bytes, with a given λ or a budget, in the state and in the report."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import formats, roundings, steps, widths
from clipjax._maths import code_costs, step_groups
from clipjax._weights import leaf_grid

W = np.float32(np.random.default_rng(0).laplace(size=(64, 48)) * 0.1)
PARAMS = {"a": {"kernel": jnp.asarray(W), "bias": jnp.ones(48)}, "b": {"kernel": jnp.asarray(W.T * 3)}}


def held(*args, params=PARAMS, **kwargs):
    return clipjax.hold_once(clipjax.fake_quantize(*args, **kwargs), params)


def codes(params, state, path="a"):
    step = np.float64(state.projection.step[path]["kernel"])
    return np.rint(np.float64(params[path]["kernel"]) / step)


def entropy(k):
    p = np.unique(k, return_counts=True)[1] / k.size
    return -(p * np.log2(p)).sum()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("lam", [0.05, 1.0])
def test_codes_minimize_error_and_cost_under_the_histogram_of_the_nearest(bits, lam):
    """The first refresh counts the nearest codes; the formula is that of the docstring, in f64."""
    params, state = held(bits, rounding=roundings.rate(lam))
    near = codes(*held(bits)) if bits > 1 else np.where(W < 0, -1, 1)
    top = max(1, 2 ** (bits - 1) - 1)
    levels = np.array([-1, 1]) if bits == 1 else np.arange(-top, top + 1)
    counts = np.array([(near == k).sum() for k in levels])
    price = -np.log2((counts + 0.5) / (counts.sum() + levels.size / 2))
    price[levels == 0] = price.min()
    ratio = np.float64(W) / np.float64(state.projection.step["a"]["kernel"])
    cost = (ratio[..., None] - levels) ** 2 + lam * price
    got = np.take_along_axis(cost, np.searchsorted(levels, codes(params, state))[..., None], -1)[..., 0]
    np.testing.assert_array_less(got - cost.min(-1), 1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", [None, -1])
def test_without_a_cost_it_is_nearest_bit_for_bit(bits, axis):
    chex.assert_trees_all_equal(held(bits, axis=axis)[0], held(bits, axis=axis, rounding=roundings.rate(0.0))[0])


def test_a_dearer_bit_makes_fewer_bits_and_more_zeros():
    found = [held(4, rounding=roundings.rate(lam)) for lam in (0.0, 0.3, 1.0, 9.0)]
    bits = [entropy(codes(*x)) for x in found]
    zeros = [np.mean(codes(*x) == 0) for x in found]
    assert sorted(bits, reverse=True) == bits and sorted(zeros) == zeros and bits[-1] < bits[0] / 2


def test_refreshes_make_the_file_smaller_until_codes_settle():
    tx = optax.chain(optax.sgd(0.0), clipjax.fake_quantize(4, step=0.05, rounding=roundings.rate(1.0), every=1))
    params, state, sizes = PARAMS, tx.init(PARAMS), []
    for _ in range(12):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        sizes.append(float(clipjax.report(state)["fake_quantize/bytes"]))
    assert sizes[0] > sizes[1] > sizes[-1] and sizes[-1] == pytest.approx(sizes[-2], rel=2e-3)


def test_a_level_that_nobody_has_returns():
    """A weight that grows takes a code that no weight had: its cost is finite."""
    tx = optax.chain(optax.sgd(1.0), clipjax.fake_quantize(3, step=1.0, rounding=roundings.rate(0.5)))
    params = {"kernel": jnp.zeros((8, 8)).at[0, 0].set(1.0)}
    state = tx.init(params)
    grads = {"kernel": jnp.zeros((8, 8)).at[0, 0].set(-0.5)}
    for _ in range(8):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert params["kernel"][0, 0] == 3.0 and jnp.count_nonzero(params["kernel"]) == 1


@pytest.mark.parametrize("where", [None, lambda path, leaf: path == "a/kernel"])
def test_a_budget_is_met_by_the_least_rate_that_does(where):
    rest = 200 + sum(x.nbytes for x in jax.tree.leaves(PARAMS)) - PARAMS["a"]["kernel"].nbytes if where else 400
    free = clipjax.report(held(4, where=where, rounding=roundings.rate(0.0))[1])["fake_quantize/bytes"]
    for share in (2.0, 0.9, 0.6):
        budget = rest + (free - rest) * share
        found = clipjax.report(held(4, where=where, rounding=roundings.rate(budget=budget))[1])
        assert found["fake_quantize/bytes"] <= budget
        if share > 1:
            assert found["fake_quantize/lam"] == 0
        else:
            below = held(4, where=where, rounding=roundings.rate(0.97 * float(found["fake_quantize/lam"])))[1]
            assert clipjax.report(below)["fake_quantize/bytes"] > budget


def test_a_schedule_counts_from_start_and_is_read_at_refreshes():
    seen = []
    tx = clipjax.fake_quantize(4, rounding=roundings.rate(lambda count: 0.25 * count), start=2, every=2)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(7):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(clipjax.report(state)["fake_quantize/lam"]))
    assert seen == [0, 0, 0, 0, 0.5, 0.5, 1.0]


def test_report_has_rate_and_distortion_of_every_leaf():
    params, state = held(4, rounding=roundings.rate(0.5))
    found = clipjax.report(state, per_leaf=True)
    for path in ("a", "b"):
        rate = found[f"fake_quantize/rate/{path}/kernel"]
        assert rate == pytest.approx(entropy(codes(params, state, path)), rel=1e-5)
        error = np.mean((np.float64(params[path]["kernel"]) - np.float64(PARAMS[path]["kernel"])) ** 2)
        assert found[f"fake_quantize/distortion/{path}/kernel"] == pytest.approx(error, rel=1e-4)


def test_a_mask_and_a_bound_hold_beside_it():
    tx = optax.chain(
        clipjax.clamp_weights(0.2),
        clipjax.prune_mask(0.5),
        clipjax.fake_quantize(4, axis=-1, step=steps.absmax(), rounding=roundings.rate(0.3), every=3),
    )
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(7):
        grads = jax.tree.map(lambda x, i=i: 0.01 * jnp.cos(7 * x + i), PARAMS)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert i == 0 or clipjax.check(params, state, tx) == []
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(params)) <= 0.2


def test_one_vmap_is_one_sweep_over_lam():
    def size(lam):
        tx = clipjax.fake_quantize(4, rounding=roundings.rate(lam))
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
        return clipjax.report(state)["fake_quantize/bytes"]

    lams = jnp.array([0.0, 0.5, 2.0])
    np.testing.assert_allclose(jax.vmap(size)(lams), [size(lam) for lam in lams], rtol=1e-6)


def test_widths_that_a_rule_chooses_have_costs_of_their_own():
    params, state = held(widths.sqnr(12.0, (2, 4)), rounding=roundings.rate(0.5))
    assert entropy(codes(params, state)) < entropy(codes(*held(widths.sqnr(12.0, (2, 4)))))


def test_formats_beside_it_are_left_as_they_are():
    kinds = clipjax.per_leaf(lambda path, leaf: formats.nbits(4, 16) if path == "a/kernel" else 4)
    params, state = held(kinds, rounding=roundings.rate(1.0))
    chex.assert_trees_all_equal(params["a"], held(kinds)[0]["a"])
    assert entropy(codes(params, state, "b")) < entropy(codes(*held(kinds), "b"))
    assert clipjax.report(state)["fake_quantize/bytes"] > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: roundings.rate(), "`lam` must be given or `budget`"),
        (lambda: roundings.rate(0.1, budget=10), "`lam` must be given or `budget`"),
        (lambda: roundings.rate(-0.1), "`lam` must be a number >= 0"),
        (lambda: roundings.rate(budget=-1), "`budget` must be a number >= 0"),
        (lambda: clipjax.fake_quantize(4, rounding=roundings.rate(0.1), carry=False), "`carry` must be True"),
        (lambda: held(9, rounding=roundings.rate(0.1)), "`bits` must be at most 8"),
        (lambda: held(step=0.1, rounding=roundings.rate(0.1)), "`bits` must be at most 8"),
        (lambda: clipjax.fake_quantize(formats.q4_0(), rounding=roundings.rate(0.1)), "`rounding` must be"),
    ],
)
def test_wrong_calls_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("first", [True, False])
def test_a_state_of_another_rounding_is_refused(first):
    with_rate, without = clipjax.fake_quantize(4, rounding=roundings.rate(0.1)), clipjax.fake_quantize(4)
    tx, other = (with_rate, without) if first else (without, with_rate)
    with pytest.raises(ValueError, match="rate"):
        tx.update(PARAMS, other.init(PARAMS), PARAMS)


def test_a_latent_weight_near_zero_stays_behind_a_mask():
    """Beside many -1 and 1 a level that cost less than 0 would move it: the mask would lose."""
    kernel = jnp.concatenate([jnp.ones(30), -jnp.ones(30), jnp.array([0.7, 0.7, 0.0, 0.0])]).reshape(8, 8)
    mask = {"kernel": jnp.ones((8, 8), bool).at[7, 4].set(False)}
    tx = optax.chain(
        clipjax.prune_mask(mask=mask, start=1), clipjax.fake_quantize(3, step=1.0, rounding=roundings.rate(0.2))
    )
    params = {"kernel": kernel}
    state = tx.init(params)
    for kept in (True, False, False):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        assert params["kernel"][7, 4] == (1.0 if kept else 0.0) and params["kernel"][7, 5] == 1.0


def test_codes_are_limited_to_the_levels_of_their_own_step_group():
    plan = leaf_grid.Plan((3,), step_groups.StepGroups((0,)), steps.mse(), "nearest", None, rated=True)
    free = code_costs.nearest(leaf_grid.whole_codes(plan), jnp.ones(7, bool))
    ends = jnp.array([[3.0, 1.0]])
    grid = leaf_grid.LeafGrid(jnp.ones((1, 2)), -ends, ends, jnp.int32(3), jnp.bool_(True), free)
    got = leaf_grid.codes(plan, jnp.array([[2.6, 2.6], [-9.0, -9.0]]), grid)
    np.testing.assert_array_equal(got, [[3, 1], [-3, -1]])


@pytest.mark.parametrize("name", ["two", "lists", "wide", "sparse", "biases", "lines"])
def test_the_bytes_of_the_report_are_those_of_the_file(name):
    rng = np.random.default_rng(1)
    trees = {
        "two": PARAMS,
        "lists": {"layers": [{"kernel": jnp.asarray(rng.normal(size=(30, 50)), jnp.float32)} for _ in range(4)]},
        "wide": {
            "kernel": jnp.asarray(rng.laplace(size=(400, 500)), jnp.float32),
            "scale": jnp.asarray(rng.normal(size=500)),
        },
        "sparse": {"kernel": jnp.asarray(rng.normal(size=(300, 200)) ** 7, jnp.float32), "count": jnp.arange(40)},
        "lines": {"kernel": jnp.asarray(rng.normal(size=(300, 200)) * rng.beta(0.2, 1, (300, 1)), jnp.float32)},
        "biases": {"kernel": jnp.asarray(W), "bias": jnp.asarray(rng.normal(size=48), jnp.float32)},
    }
    where = (lambda path, leaf: True) if name == "biases" else None
    params, state = held(4, params=trees[name], rounding=roundings.rate(0.5), where=where, every=10)
    size, said = len(clipjax.pack(params)), float(clipjax.report(state)["fake_quantize/bytes"])
    assert abs(said - size) <= max(200, 0.02 * size)
