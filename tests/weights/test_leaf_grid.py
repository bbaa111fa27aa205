"""Grids that are not symmetric or whole: affine ones, groups along the input, widths that follow inside the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import clipjax
from clipjax import steps, widths

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
ABSMAX = steps.absmax()  # one rule, so that compiled functions are shared


def run(tx, params, gradients):
    """Params and state after each update, jitted."""
    update, state = jax.jit(tx.update), tx.init(params)
    for g in gradients:
        updates, state = update(jax.tree.map(lambda p, g=g: g(p), params), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def noise(seed, size=0.05):
    return lambda p: jnp.asarray(np.random.default_rng(seed).normal(size=p.shape) * size, p.dtype)


def still(p):
    return jnp.zeros_like(p)


def back(q, dtype=jnp.float32):
    return clipjax.dequantize(q.codes, q.step, dtype, zero_point=q.zero_point)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_affine_grid_spends_its_levels_where_weights_are(bits, axis, sign):
    """2^b − 1 levels from the lowest weight to the highest, 0 among them; the codes fit the width."""
    w = {"kernel": jnp.asarray(sign * RNG.uniform(-0.2, 1.0, size=(40, 6)), jnp.float32)}
    ((params, state),) = run(clipjax.fake_quantize(bits, step=steps.minmax(), axis=axis), w, [still])
    q, p, n = clipjax.quantized(params, state)["kernel"], np.asarray(params["kernel"]), 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(back(q), p)
    assert np.abs(q.codes).max() <= n and q.codes.dtype == jnp.int8
    shared = (0,) if axis == -1 else None
    low, high = (np.asarray(f(w["kernel"], axis=shared, keepdims=axis == -1)) for f in (np.min, np.max))
    assert (p.min(shared) >= low).all() and (p.max(shared) <= high).all()
    i = np.arange(2 * n + 1).reshape(-1, 1)  # how many of the steps lie below zero
    with np.errstate(divide="ignore"):
        best = np.minimum(np.ravel(-low) / i, np.ravel(high) / (2 * n - i)).max(0)
    np.testing.assert_allclose(np.ravel(q.step), best, rtol=2.0 ** -(21 - bits))
    assert bits == 2 or (np.sign(q.zero_point) == -sign).all()  # 0 lies near the shorter end
    error = np.abs(p - np.asarray(w["kernel"])) / np.asarray(q.step)
    assert np.mean(error <= 0.5001) > 0.94 - 2 / n and error.max() <= 1.001  # no level beyond the weights


def test_affine_grid_keeps_an_uneven_bound():
    """Clamped to [−.1, .5], no level lies outside, update after update."""
    tx = optax.chain(clipjax.clamp_weights((-0.1, 0.5)), clipjax.fake_quantize(4, step=steps.minmax(), every=1))
    w = {"kernel": jnp.asarray(RNG.normal(size=(30, 20)), jnp.float32)}
    for i, (params, state) in enumerate(run(tx, w, [noise(i, 0.005) for i in range(8)])):
        assert params["kernel"].min() >= np.float32(-0.1) and params["kernel"].max() <= 0.5
        if i:  # a weight from far outside is on the grid one update later
            np.testing.assert_array_equal(back(clipjax.quantized(params, state)["kernel"]), params["kernel"])
    assert len(np.unique(params["kernel"])) >= 14


def test_affine_grid_keeps_zeros():
    tx = optax.chain(clipjax.prune_mask(0.5), clipjax.fake_quantize(3, step=steps.minmax(), every=1))
    w = {"kernel": jnp.asarray(RNG.uniform(-0.2, 1.0, size=(10, 10)), jnp.float32)}
    for params, _ in run(tx, w, [noise(i) for i in range(5)]):
        assert int((params["kernel"] == 0).sum()) >= 50


@pytest.mark.parametrize("group", [None, 2])
def test_affine_grid_of_weights_that_shrink(group):
    """Its levels follow the weights, not the larger ones of before, and 0 stays one of them on either side."""
    mask = {"kernel": jnp.arange(16).reshape(8, 2) % 4 > 0}
    tx = optax.chain(clipjax.prune_mask(mask=mask), clipjax.fake_quantize(4, step=steps.minmax(), group=group, every=1))
    for sign in (1, -1):
        w = {"kernel": sign * jnp.asarray(np.random.default_rng(0).uniform(0.2, 1.0, size=(8, 2)), jnp.float32)}
        for i, (params, state) in enumerate(run(tx, w, [still, lambda p, s=sign: -0.13 * s + 0 * p, still])):
            z, p = np.where(mask["kernel"], state[1].carry["kernel"], 0), np.asarray(params["kernel"])
            assert (p[~np.asarray(mask["kernel"])] == 0).all()
            if i != 1:  # a weight that moves by more than half is on the grid one update later
                assert np.abs(p - z).max() <= 0.5001 * np.max(clipjax.quantized(params, state)["kernel"].step)


def test_affine_grid_of_weights_of_which_one_side_shrinks():
    """Its 15 levels lie where the weights are now, from about -0.2 to 0.3, and none is more than a step away."""
    w = {"kernel": jnp.asarray(np.linspace(-1.0, 0.3, 16).reshape(8, 2), jnp.float32)}
    shrink = lambda p: jnp.where(p < 0, -0.8 * p, 0)
    *_, (params, state) = run(clipjax.fake_quantize(4, step=steps.minmax(), every=1), w, [still, shrink, still])
    step = float(state.projection.step["kernel"])
    assert 14 * step < 0.6 and np.abs(params["kernel"] - state.carry["kernel"]).max() <= 1.001 * step


def test_interval_of_sixteen_bits_keeps_zero_on_its_end():
    """Short steps leave more multiples inside than there are codes: what is cut is cut at the other end."""
    w = {"kernel": jnp.array([[0.0, 1.0], [0.5, 0.0]])}
    ((params, _),) = run(clipjax.fake_quantize(16, step=steps.interval(0.0, 1.0)), w, [still])
    assert params["kernel"][0, 0] == params["kernel"][1, 1] == 0 and params["kernel"][0, 1] > 0.95


@pytest.mark.parametrize(("lo", "hi"), [(-0.25, 0.75), (0.0, 1.0)])
def test_interval_codes_fit_eight_bits(lo, hi):
    """An uneven interval needs its zero point: 254 levels above zero are no i8."""
    w = {"kernel": jnp.asarray(np.linspace(lo, hi, 1600).reshape(40, 40), jnp.float32)}  # the ends are weights too
    tx = clipjax.fake_quantize(8, step=steps.interval(lo, hi))
    ((params, state),) = run(tx, w, [still])
    q = clipjax.quantized(params, state)["kernel"]
    assert q.codes.dtype == jnp.int8 and np.abs(np.int32(q.codes)).max() <= 127
    np.testing.assert_array_equal(back(q), params["kernel"])
    assert np.abs(params["kernel"] - w["kernel"]).max() <= 0.51 / 254 * (hi - lo) + 1e-6


def test_groups_per_leaf_and_in_bf16():
    """`per_leaf` sizes, None for none; the codes are recovered from bf16 params."""
    size = clipjax.per_leaf(lambda path, leaf: 2 if path == "a/kernel" else None)
    w = {name: {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.bfloat16)} for name in "ab"}
    with jax.numpy_dtype_promotion("standard"):
        ((_, _), (params, state)) = run(clipjax.fake_quantize(4, group=size), w, [still, still])
    a, b = (clipjax.quantized(params, state)[name]["kernel"] for name in "ab")
    assert (a.group, a.step.shape, b.group, b.step.shape) == (2, (3, 4), None, ())
    for q, name in ((a, "a"), (b, "b")):
        np.testing.assert_array_equal(np.float32(back(q, jnp.bfloat16)), np.float32(params[name]["kernel"]))


def test_groups_with_carry_and_zeros():
    """A group that is pruned away has the step 1; the carry of the others is the plain sum."""
    mask = {"kernel": jnp.asarray([[False] * 3] * 2 + [[True] * 3] * 2)}
    tx = optax.chain(clipjax.prune_mask(mask=mask), clipjax.fake_quantize(4, group=2, every=1))
    w = {"kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}
    total = np.asarray(w["kernel"]) + sum(np.asarray(noise(i, 0.001)(w["kernel"])) for i in range(4))
    *_, (params, state) = run(tx, w, [noise(i, 0.001) for i in range(4)])
    q = clipjax.quantized(params, state)["kernel"]
    assert (q.step[0] == 1).all() and (params["kernel"][:2] == 0).all()
    np.testing.assert_allclose(state[1].carry["kernel"][2:], total[2:], rtol=1e-5)


def db(z, w):
    z, w = np.float64(z), np.float64(w)
    return 10 * np.log10(np.sum(z**2) / max(np.sum((z - w) ** 2), 1e-30))


LAYERS = {
    "flat": jnp.asarray(RNG.uniform(-1, 1, size=(40, 50)), jnp.float32),
    "gaussian": jnp.asarray(RNG.normal(size=(40, 50)) * 0.1, jnp.float32),
    "heavy": jnp.asarray(RNG.standard_t(3, size=(40, 50)), jnp.float32),
    "signs": jnp.asarray(RNG.choice([-0.3, 0.3], size=(40, 50)), jnp.float32),
}


@pytest.mark.parametrize("step", [None, steps.absmax()], ids=["mse", "absmax"])
def test_sqnr_inside_the_run_gives_every_leaf_the_smallest_width_that_reaches_the_target(step):
    """SQNR(b) ≥ target > SQNR(next smaller allowed), or the largest allowed; one compiled program, no retrace."""
    allowed, target = (1, 2, 4, 6, 8), 17.0
    tx = clipjax.fake_quantize(widths.sqnr(target, allowed), step=step)
    ((params, state),) = run(tx, LAYERS, [still])
    found = {name: int(state.projection.bits[name]) for name in LAYERS}
    assert found["signs"] == 1 and len(set(found.values())) >= 3
    for name, b in found.items():
        assert b == 8 or db(LAYERS[name], params[name]) >= target
        smaller = max([a for a in allowed if a < b], default=None)
        if smaller:
            s = clipjax.choose_step(LAYERS[name], smaller, step=step)
            assert db(LAYERS[name], clipjax.dequantize(clipjax.quantize(LAYERS[name], s, smaller), s)) < target
        q = clipjax.quantized(params, state)[name]
        assert q.bits == b and len(np.unique(params[name])) <= max(2, 2**b - 1)
        np.testing.assert_array_equal(back(q), params[name])
    before = clipjax.choose_bits(LAYERS, target_db=target, allowed=allowed, step=step)
    assert before == found


def test_pruned_weights_do_not_ask_for_a_wider_grid():
    """Two values and zeros: one bit, whose levels leave the zeros alone."""
    w = {"kernel": LAYERS["signs"] * jnp.asarray(RNG.random((40, 50)) < 0.5, jnp.float32)}
    assert clipjax.choose_bits(w, target_db=30.0, allowed=(1, 2, 8)) == {"kernel": 1}
    ((params, state),) = run(clipjax.fake_quantize(widths.sqnr(30.0, (1, 2, 8))), w, [still])
    assert int(state.projection.bits["kernel"]) == 1
    np.testing.assert_array_equal(params["kernel"] == 0, w["kernel"] == 0)


def test_widths_follow_the_distribution_until_stop():
    """A leaf that becomes ternary needs 2 bits at the refresh after that, and keeps them once frozen."""
    tx = clipjax.fake_quantize(widths.sqnr(20.0), every=1, stop=2, inner=optax.identity())
    w = {"kernel": LAYERS["gaussian"]}
    ternary = jnp.asarray(RNG.choice([-0.3, 0.0, 0.3], size=(40, 50)), jnp.float32)
    moves = [still, lambda p: ternary - w["kernel"], still, lambda p: w["kernel"] - ternary, still]
    states = [int(state.projection.bits["kernel"]) for _, state in run(tx, w, moves)]
    assert states == [5, 5, 2, 2, 2]


@settings(max_examples=10, deadline=None)
@given(budget=st.floats(2, 8), seed=st.integers(0, 99))
@example(budget=3.0, seed=0)  # which can be spent to the last bit
def test_budget_inside_the_run_is_kept_and_spent(budget, seed):
    """The mean over all weights; no leaf's next width could still be paid for; the same as before the run."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (7, 30), "k": (20, 3), "v": (5, 5)}
    w = {k: jnp.asarray(rng.normal(size=s) * rng.uniform(0.1, 2), jnp.float32) for k, s in shapes.items()}
    allowed = (2, 3, 4, 6, 8)
    tx = clipjax.fake_quantize(widths.budget(budget, allowed), step=ABSMAX)
    ((_, state),) = run(tx, w, [still])
    found = {name: int(b) for name, b in state.projection.bits.items()}
    spent, total = sum(found[k] * w[k].size for k in w), sum(x.size for x in w.values())
    assert spent <= budget * total
    for name, b in found.items():
        wider = min([a for a in allowed if a > b], default=None)
        assert wider is None or spent + (wider - b) * w[name].size > budget * total
    assert found == clipjax.choose_bits(w, budget=budget, allowed=allowed, step=ABSMAX)


def test_sensitivity_moves_the_bits():
    """The squared error of a leaf whose weights matter 100 times as much is removed first."""
    w = {"q": LAYERS["gaussian"], "k": LAYERS["gaussian"]}
    for dear, cheap in (("q", "k"), ("k", "q")):
        weighs = {dear: jnp.full((40, 50), 100.0), cheap: jnp.float32(1.0)}
        bits = clipjax.choose_bits(w, budget=4.0, allowed=(2, 6), sensitivity=weighs)
        assert bits == {dear: 6, cheap: 2}
    with pytest.raises(ValueError, match="`sensitivity` must name every picked leaf"):
        clipjax.choose_bits(w, budget=4.0, sensitivity={"q": jnp.float32(1.0)})


@pytest.mark.parametrize("target", [{"target_db": 20.0}, {"budget": 5.0}])
def test_choose_bits_leaves_out_what_is_not_finite(target):
    """As `choose_step` does; a NaN would compare as a target never reached."""
    w = {"q": LAYERS["gaussian"], "k": LAYERS["flat"]}
    bad = {"q": w["q"].at[0, :2].set(jnp.array([jnp.nan, jnp.inf])), "k": w["k"]}
    zero = {"q": w["q"].at[0, :2].set(0), "k": w["k"]}
    assert clipjax.choose_bits(bad, **target) == clipjax.choose_bits(zero, **target)


def test_quantized_of_a_transformation_that_governs_nothing_is_the_params():
    tx, w = clipjax.fake_quantize(4), {"kernel": jnp.ones((2, 2), jnp.int32), "bias": jnp.ones(2)}
    with pytest.warns(UserWarning, match="picks no float array"):
        state = tx.init(w)
    np.testing.assert_array_equal(clipjax.quantized(w, state)["bias"], w["bias"])
    with pytest.raises(ValueError, match="`opt_state` must hold a quantizer"):
        clipjax.quantized(w, optax.sgd(0.1).init(w))


def test_report_shows_the_chosen_widths():
    tx = clipjax.fake_quantize(widths.sqnr(20.0))
    ((_, state),) = run(tx, LAYERS, [still])
    entries = clipjax.report(state, per_leaf=True)
    for name in LAYERS:
        assert int(entries[f"fake_quantize/bits/{name}"]) == int(state.projection.bits[name])


def test_bad_arguments_name_the_remedy():
    w = {"kernel": jnp.ones((6, 4))}
    for build, text in (
        (lambda: clipjax.fake_quantize(4, group=5).init(w), "`group` must divide axis -2"),
        (lambda: clipjax.fake_quantize(4, group=12).init(w), "`group` must divide axis -2"),
        (lambda: clipjax.fake_quantize(4, group=2, axis=(0, 1)).init(w), "`group` must be None where `axis` leaves no"),
        (lambda: clipjax.fake_quantize(4, group=4).init({"out": jnp.ones((4, 6, 2))}), "divide axis -2 of every"),
        (lambda: clipjax.fake_quantize(4, group=18).init({"out": jnp.ones((4, 6, 2))}), "-3 .* 6 entries behind"),
        (lambda: clipjax.fake_quantize(4, group=0).init(w), "`group` must be a whole number >= 1"),
        (lambda: clipjax.fake_quantize(1, step=steps.minmax()).init(w), "`bits` must be at least 2 for an affine grid"),
        (lambda: widths.sqnr(20.0, ()), "`allowed` must hold widths"),
        (lambda: widths.sqnr("a lot"), "`target_db` must be a number"),
        (lambda: widths.budget(float("inf")), "`budget` must be a finite number"),
        (lambda: widths.sqnr(20.0, 4), "`allowed` must hold widths"),
        (lambda: widths.budget(1.5), "`budget` must be at least the smallest width"),
        (lambda: steps.percentile(0), r"`q` must lie in \(0, 100\]"),
        (lambda: steps.sigma(-1.0), "`k` must be positive"),
        (lambda: steps.power_of_two(steps.interval(-1, 1)), "`step` must leave the ends"),
    ):
        with pytest.raises(ValueError, match=text):
            build()
    with pytest.raises(TypeError, match="`group` must be a static"):
        clipjax.fake_quantize(4, group=jnp.int32(4))
    for build, name in (
        (lambda value: widths.sqnr(value), "target_db"),
        (lambda value: widths.budget(value), "budget"),
        (lambda value: steps.percentile(value), "q"),
        (lambda value: steps.interval(-1.0, value), "hi"),
    ):
        with pytest.raises(TypeError, match=f"`{name}` must be a static"):
            jax.jit(build)(4.0)
