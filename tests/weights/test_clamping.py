"""clamp_weights: |w| ≤ T exactly, after or before the update, in every dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections, selections, steps

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
W = {"a": jnp.asarray(RNG.normal(size=(30, 20)) * 3, jnp.float32), "b": jnp.asarray(RNG.normal(size=9), jnp.float32)}
U = jax.tree.map(lambda w: jnp.asarray(RNG.normal(size=w.shape), w.dtype), W)
ZERO = jax.tree.map(jnp.zeros_like, W)


def run(tx, updates, params=W, count=1):
    """The params after `count` jitted updates, and the state."""
    state = tx.init(params)
    for _ in range(count):
        moves, state = jax.jit(tx.update)(updates, state, params)
        params = optax.apply_updates(params, moves)
    return params, state


@pytest.mark.parametrize("bound", [1.0, 0.1, 0.0, (-0.5, 2.0), (0.25, 0.75), np.inf])
def test_after_clamps_the_updated_weight(bound):
    """W ← T·sign(w) if |w| > T: within T at once; one that moves by more than itself is on it one update later."""
    new, _ = run(clipjax.clamp_weights(bound), U)
    low, high = (np.float32(b) for b in (bound if isinstance(bound, tuple) else (-bound, bound)))
    for name, w in new.items():
        expected = np.clip(np.asarray(W[name]) + np.asarray(U[name]), low, high)
        np.testing.assert_allclose(w, expected, rtol=0, atol=2 * np.spacing(np.abs(W[name]).max()))
        assert np.abs(w).max() <= max(-low, high)
    settled, _ = run(clipjax.clamp_weights(bound), ZERO, new)
    for w in settled.values():
        assert low <= w.min() and w.max() <= high


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bound", [0.1, 1 / 3, 0.7])
def test_bound_holds_exactly_in_every_dtype(bound, dtype):
    """T read as f32, rounded inwards where the dtype cannot hold it."""
    params = jax.tree.map(lambda w: w.astype(dtype), W)
    with jax.numpy_dtype_promotion("standard"):
        for count in (1, 2):
            new, _ = run(clipjax.clamp_weights(bound), jax.tree.map(lambda u: u.astype(dtype), U), params, count)
            assert all(
                w.dtype == dtype and np.abs(np.asarray(w, np.float64)).max() <= np.float32(bound) for w in new.values()
            )
            assert np.abs(np.asarray(new["a"], np.float64)).max() > bound * 0.99


def test_before_adds_the_update_to_the_clamped_weight():
    """D3's order: it may leave the interval again, by the update."""
    new, _ = run(clipjax.clamp_weights(0.5, when="before"), U)
    for name, w in new.items():
        expected = np.clip(W[name], np.float32(-0.5), np.float32(0.5)) + np.asarray(U[name])
        np.testing.assert_allclose(w, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(new["a"]).max() > 0.5


def test_within_the_bound_updates_are_bit_identical():
    small = jax.tree.map(lambda u: u * 1e-9, U)
    for when in ("after", "before"):
        tx = clipjax.clamp_weights(1e6, when=when)
        updates, _ = jax.jit(tx.update)(small, tx.init(W), W)
        jax.tree.map(np.testing.assert_array_equal, updates, small)


def test_schedule_counts_from_zero_and_is_recorded():
    tx = clipjax.clamp_weights(optax.linear_schedule(1.0, 0.5, 2))
    for count, bound in enumerate([1.0, 0.75, 0.5, 0.5], start=1):
        new, state = run(tx, ZERO, W, count)
        assert float(np.abs(new["a"]).max()) == bound
        np.testing.assert_array_equal(state.projection.bound, [-bound, bound])


def test_schedule_of_intervals():
    new, _ = run(clipjax.clamp_weights(lambda count: (-0.25, jnp.where(count < 1, 2.0, 1.0))), ZERO, W, 3)
    assert (float(new["a"].min()), float(new["a"].max())) == (-0.25, 1.0)


def test_per_leaf_bounds():
    tx = clipjax.clamp_weights(clipjax.per_leaf(lambda path, leaf: 0.5 if path == "a" else (-0.1, 0.2)))
    new, state = run(tx, ZERO, W, 2)
    assert float(np.abs(new["a"]).max()) == 0.5
    np.testing.assert_allclose([new["b"].min(), new["b"].max()], [-0.1, 0.2], rtol=1e-5)
    assert all(np.isnan(x) for x in clipjax.report(state).values())


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("make", [selections.bernoulli, selections.leaves])
def test_select_clamps_chosen_entries_and_redraws(make, when):
    select = make(0.5, key=jax.random.key(4))
    tx, params = clipjax.clamp_weights(0.5, when=when, select=select), W
    state = tx.init(params)
    update, draw = jax.jit(tx.update), jax.jit(lambda i: select.choose(W, jax.random.fold_in(jax.random.key(4), i)))
    for count in range(3):
        moves, state = update(ZERO, state, params)
        new = optax.apply_updates(params, moves)
        chosen = draw(count)
        for name, w in params.items():
            expected = np.where(np.asarray(chosen[name]), np.clip(w, -0.5, 0.5).astype(np.float32), w)
            np.testing.assert_array_equal(new[name], expected)
        params = new


def test_where_and_non_finite_weights():
    """Untouched leaves pass; NaN stays, infinity too: it is no finite target."""
    params = {"a": jnp.array([jnp.nan, jnp.inf, 5.0]), "b": jnp.array([5.0])}
    tx = clipjax.clamp_weights(1.0, where=lambda path, leaf: path == "a")
    new, _ = run(tx, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_array_equal(new["a"], [np.nan, np.inf, 1.0])
    np.testing.assert_array_equal(new["b"], [5.0])


def test_traced_bound_is_a_sweep():
    bounds = jnp.array([0.1, 2.0])

    def once(bound):
        tx = clipjax.clamp_weights(bound)
        return optax.apply_updates(W, tx.update(ZERO, tx.init(W), W)[0])["a"]

    for w, bound in zip(jax.jit(jax.vmap(once))(bounds), np.asarray(bounds), strict=True):
        np.testing.assert_allclose(np.abs(w).max(), bound, rtol=1e-6)
        assert np.abs(w).max() <= bound


def test_far_weights_land_inside_at_once():
    """|w₀| up to 100·T."""
    params = {"a": W["a"] * 1000}
    new, _ = run(clipjax.clamp_weights(0.3), {"a": U["a"]}, params)
    assert np.abs(new["a"]).max() <= np.float32(0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("bound", [(0.1, 0.3), (-0.3, -0.1), (0.1, np.inf), (-1.0, 0.0)])
def test_an_interval_without_0_holds_to_the_bit_from_the_first_update_on(bound, dtype):
    """Rounding toward 0 would leave it; updates are applied inside the jit and outside of it."""
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):  # of `apply_updates`
        rng = np.random.default_rng(3)
        params = jnp.asarray(rng.normal(size=(50, 40)) * 10.0 ** rng.uniform(-3, 2, size=(50, 40)), dtype)
        read = np.float64 if dtype == "float64" else np.float32
        low, high = (np.float64(read(end)) for end in bound)
        forms = {
            "clamp": clipjax.clamp_weights(bound),
            "project": clipjax.project(projections.clamp(bound)),
            "carry": clipjax.project(projections.clamp(bound), carry=True),
        }
        for tx in forms.values():

            @jax.jit
            def step(params, state, tx=tx):
                updates, state = tx.update(-params / 3, state, params)
                return optax.apply_updates(params, updates), updates, state

            w, state = params, tx.init(params)
            for _ in range(2):
                inside, updates, state = step(w, state)
                outside = optax.apply_updates(w, updates)
                w = inside
                for values in (np.asarray(inside, np.float64), np.asarray(outside, np.float64)):
                    assert low <= values.min() and values.max() <= high


def test_a_traced_bound_below_0_counts_as_0():
    """Also where a schedule returns it, jitted or not; a bound that is known raises."""

    def last(bound, slope, params=W):
        tx, state = bound(lambda count: 1.0 - slope * count.astype(jnp.float32)), None
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(ZERO, state, params)
            params = optax.apply_updates(params, updates)
        return params, clipjax.report(state)

    for bound in (clipjax.clamp_weights, lambda c: clipjax.clamp_weights(clipjax.per_leaf(lambda path, leaf: c))):
        for run_last in (jax.jit(functools.partial(last, bound)), functools.partial(last, bound)):
            params, found = run_last(jnp.float32(0.5))
            assert not any(np.any(x) for x in params.values())
            assert not found["clamp_weights/high"] > 0 and not found["clamp_weights/low"] < 0
    zero = jax.jit(lambda c: projections.clamp(c).apply(W, (), None)[0])(jnp.float32(-2.0))
    assert not any(np.any(x) for x in zero.values())


def test_f64_bounds_are_f64():
    with jax.enable_x64(True):
        params = jnp.array([0.15, -0.15, 0.05])
        tx = clipjax.clamp_weights(0.1)
        updates, state = tx.update(jnp.zeros(3), tx.init(params), params)
        params = optax.apply_updates(params, updates)
        assert params.tolist() == [0.1, -0.1, 0.05] and float(clipjax.report(state)["clamp_weights/high"]) == 0.1


def test_a_schedule_that_gives_nan_bounds_nothing_at_that_update():
    tx = clipjax.clamp_weights(lambda count: jnp.where(count == 1, jnp.nan, 1.0))
    params, state = jnp.array([0.5, -2.0]), tx.init(jnp.zeros(2))
    for update in ([0.0, 0.0], [3.0, 0.0], [0.0, 0.0]):
        updates, state = tx.update(jnp.array(update), state, params)
        params = params + updates
        assert params.tolist() == {0: [0.5, -1], 1: [3.5, -1], 2: [1, -1]}[int(state.count) - 1]
    wrong = jax.jit(lambda low, high: clipjax.clamp(jnp.array([0.0, 9.0, -9.0]), (low, high)))(1.0, -1.0)
    assert wrong.tolist() == [1, 1, 1]  # traced ends in wrong order, which nothing can check: the lower one wins


@pytest.mark.parametrize("step", [0.1, steps.minmax()], ids=["number", "minmax"])
def test_levels_keep_a_bound_that_f32_does_not_hold(step):
    """f32(0.1) is above 0.1: as a level it would be beyond the bound of f64 params."""
    with jax.enable_x64(True):
        params = {"kernel": jnp.linspace(-1, 1, 16, dtype=jnp.float64).reshape(4, 4)}
        tx = optax.chain(optax.sgd(0.1), clipjax.clamp_weights(0.1), clipjax.fake_quantize(2, step=step))
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        params = optax.apply_updates(params, updates)
        assert np.abs(params["kernel"]).max() <= 0.1 and clipjax.check(params, state, tx) == []


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_derivative_by_a_traced_bound_is_that_of_the_end_that_is_taken(mode):
    """Also behind it a mask and a grid are constants, whose searches reverse mode cannot pass."""
    params = {"kernel": jnp.array([[0.5, -3.0, 1.0, 2.0]])}
    zeros = jax.tree.map(jnp.zeros_like, params)

    def total(bound, *behind):
        tx = optax.chain(optax.identity(), clipjax.clamp_weights((-2 * bound, bound)), *behind)
        updates, _ = tx.update(zeros, tx.init(params), params)
        return jnp.sum(optax.apply_updates(params, updates)["kernel"])

    slope = {"forward": jax.jacfwd, "reverse": jax.grad}[mode](total)
    assert float(slope(jnp.float32(1.0))) == -2 + 1  # -3 takes the lower end, 2 the upper one; 1 lies at it
    assert np.isfinite(slope(jnp.float32(1.0), clipjax.prune_mask(0.25), clipjax.fake_quantize(4)))
