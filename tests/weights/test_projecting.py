"""project: landing exactly, carrying the rest, inner transformations, and projections of one's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections
from clipjax._maths.landing import land
from clipjax._weights.refreshing import Cycle, refreshed
from clipjax.typing import Context, Projection

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.optimized]

RNG = np.random.default_rng(0)
W = {"w": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)}


def reference_carry(project, start, updates):
    """Z ← z + u;  p = P(z), in f64."""
    z, seen = np.float64(start), []
    for u in updates:
        z = z + np.float64(u)
        seen.append(project(z))
    return z, seen


def run(tx, params, updates):
    """Yields (params, state) after each jitted update."""
    update, state = jax.jit(tx.update), tx.init(params)
    for u in updates:
        new, state = update(u, state, params)
        params = optax.apply_updates(params, new)
        yield params, state


def halves(params):
    """A plain function of the params: round to halves."""
    return jax.tree.map(lambda x: jnp.round(x * 2) / 2, params)


# landing


def pairs(n, seed, spread):
    generator = np.random.default_rng(seed)
    p, q = (generator.normal(size=n) * 2.0 ** generator.integers(-spread, spread + 1, n) for _ in range(2))
    return np.float32(p), np.float32(q)


@pytest.mark.parametrize("spread", [0, 1, 20])
def test_land_hits_zero_and_the_neighbourhood_exactly(spread):
    """P + u = q for q = 0 and q/2 ≤ p ≤ 2q; never farther from zero than q; within two ulp of it elsewhere."""
    p, q = pairs(20_000, spread, spread)
    q[:100] = 0
    u = np.asarray(jax.jit(land)(p, q))
    outside = p + u
    inside = np.asarray(jax.jit(lambda p, q: p + land(p, q))(p, q))
    np.testing.assert_array_equal(inside, outside)
    assert (np.abs(outside) <= np.abs(q)).all()
    near = (q == 0) | ((np.abs(q) / 2 <= np.abs(p)) & (np.abs(p) <= 2 * np.abs(q)) & (np.sign(p) == np.sign(q)))
    np.testing.assert_array_equal(outside[near], q[near])
    assert (np.abs(outside.astype(np.float64) - q) <= 2 * np.spacing(np.maximum(np.abs(p), np.abs(q)))).all()


def test_land_naive_difference_would_leave_the_set():
    """Why `land` exists: p + (q − p) ≠ q."""
    p, q = pairs(20_000, 3, 20)
    assert (np.abs(p + (q - p)) > np.abs(q)).mean() > 0.01


def test_land_zero_denormal_and_huge():
    p = jnp.array([0.0, -0.0, 1e-38, -1.0, 3e38, 1e-45, 1903.0222])
    q = jnp.array([0.0, 0.5, 0.0, 1.0, 2e38, 0.0, 0.0])
    np.testing.assert_array_equal(p + jax.jit(land)(p, q), q)


# project


def test_plain_function_is_a_projection():
    updates = [jax.tree.map(lambda w: 0.3 * w, W)]
    ((new, _),) = run(clipjax.project(halves), W, updates)
    target = np.asarray(W["w"]) + np.asarray(updates[0]["w"])
    np.testing.assert_array_equal(new["w"], np.round(target * 2) / 2)


def test_user_written_projection_in_ten_lines():
    """A set with a state: no entry may ever exceed the largest of the first update, which it remembers."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(()), params)

    def apply(target, state, context):
        first = context.count == 0
        limits = jax.tree.map(lambda x, s: jnp.where(first, jnp.max(jnp.abs(x)), s), target, state)
        return jax.tree.map(lambda x, s: jnp.clip(x, -s, s), target, limits), limits

    tx = optax.chain(optax.sgd(1.0), clipjax.project(Projection(init, apply)))
    grads = [jax.tree.map(lambda w: -0.5 * w, W)] * 3
    seen = [np.asarray(p["w"]) for p, _ in run(tx, W, grads)]
    limit = np.abs(seen[0]).max()
    np.testing.assert_allclose(limit, 1.5 * np.abs(W["w"]).max(), rtol=1e-6)
    assert all(np.abs(w).max() == limit for w in seen)
    np.testing.assert_allclose(seen[2], np.clip(2.5 * np.asarray(W["w"]), -limit, limit), rtol=1e-6)


@pytest.mark.parametrize("carry", [False, True])
def test_what_a_projection_returns_may_broadcast(carry):
    mean = lambda tree: jax.tree.map(lambda x: jnp.mean(x, axis=0, keepdims=True), tree)
    full = lambda tree: jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape), tree, mean(tree))
    updates = [{"w": 0.1 * W["w"]}] * 3
    short, long = ([p for p, _ in run(clipjax.project(f, carry=carry), W, updates)] for f in (mean, full))
    jax.tree.map(np.testing.assert_array_equal, short, long)


@pytest.mark.parametrize("tx", [clipjax.clamp_weights(0.5), clipjax.prune_mask(0.5), clipjax.fake_quantize(4)])
def test_updates_may_broadcast_as_in_apply_updates(tx):
    row, full = {"w": jnp.full((5,), 0.1)}, {"w": jnp.full((4, 5), 0.1)}
    with jax.numpy_rank_promotion("allow"):
        (short, _), (long, _) = (next(iter(run(tx, W, [updates]))) for updates in (row, full))
    np.testing.assert_array_equal(short["w"], long["w"])


def test_an_eager_update_compiles_nothing_the_second_time():
    tx = optax.chain(clipjax.clamp_weights(0.5), clipjax.prune_mask(0.5), clipjax.fake_quantize(4))
    updates, compiled = {"w": 0.1 * W["w"]}, []
    _, state = tx.update(updates, tx.init(W), W, refresh=False)

    def listen(event, seconds, **_):
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3)(W["w"])
        assert compiled  # the listener hears compilations
        compiled.clear()
        tx.update(updates, state, W, refresh=False)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_nothing_changed_leaves_updates_bit_identical():
    updates = {"w": jnp.asarray(RNG.normal(size=(4, 5)) * 1e-9, jnp.float32)}
    got, _ = clipjax.project(projections.clamp(100.0)).update(updates, clipjax.project(halves).init(W), W)
    chex.assert_trees_all_equal(got, updates)


def test_start_projects_from_there_on():
    ones = jax.tree.map(jnp.zeros_like, W)
    for carry in (False, True):
        seen = [p["w"] for p, _ in run(clipjax.project(halves, start=2, carry=carry), W, [ones] * 3)]
        np.testing.assert_array_equal(seen[0], W["w"])
        np.testing.assert_array_equal(seen[1], W["w"])
        np.testing.assert_array_equal(seen[2], halves(W)["w"])


def test_where_integer_none_scalar_and_empty_leaves_pass():
    params = {"w": jnp.array([0.7]), "i": jnp.arange(2), "n": None, "e": jnp.zeros((0, 2)), "s": jnp.float32(0.7)}
    updates = jax.tree.map(jnp.zeros_like, params)
    for carry in (False, True):
        tx = clipjax.project(halves, carry=carry)
        got, _ = tx.update(updates, tx.init(params), params)
        new = optax.apply_updates(params, got)
        assert (float(new["w"][0]), float(new["s"]), new["n"], new["e"].shape) == (0.5, 0.5, None, (0, 2))
        chex.assert_trees_all_equal(new["i"], params["i"])
    held = clipjax.project(halves, where=lambda path, leaf: path == "s")
    got, _ = held.update(updates, held.init(params), params)
    assert float((params["w"] + got["w"])[0]) == float(params["w"][0])


# the carry


def test_carry_brings_small_updates_back():
    """Without it a hundred steps of 0.02 move nothing; with it they move as far as the sum says."""
    params, updates = {"w": jnp.zeros(3)}, [{"w": jnp.array([0.02, -0.02, 0.005])}] * 100
    *_, (stuck, _) = run(clipjax.project(halves), params, updates)
    *_, (moved, state) = run(clipjax.project(halves, carry=True), params, updates)
    np.testing.assert_array_equal(stuck["w"], np.zeros(3))
    np.testing.assert_array_equal(moved["w"], [2, -2, 0.5])
    z, _ = reference_carry(lambda z: z, np.zeros(3), [u["w"] for u in updates])
    np.testing.assert_allclose(state.carry["w"], z, rtol=1e-5)


def test_carry_loses_to_an_edited_or_reloaded_weight():
    """It is used only where P(z) still explains the weight, or the weight is 0."""
    tx = clipjax.project(halves, carry=True)
    params = {"w": jnp.array([0.6, 0.6, 0.2])}
    ((params, state),) = run(tx, params, [{"w": jnp.array([0.1, 0.1, 0.0])}])
    np.testing.assert_array_equal(params["w"], [0.5, 0.5, 0.0])
    edited = {"w": params["w"].at[1].set(3.0)}
    _, state = jax.jit(tx.update)({"w": jnp.array([0.1, 0.1, 0.1])}, state, edited)
    np.testing.assert_allclose(state.carry["w"], [0.8, 3.1, 0.3], rtol=1e-6)


def test_carry_keeps_a_weight_at_zero_that_transformations_before_put_there():
    mask = {"w": jnp.array([False, True])}
    plus = clipjax.project(lambda p: jax.tree.map(lambda x: jnp.round(x) + 1, p), carry=True)
    tx = optax.chain(clipjax.prune_mask(mask=mask, where=lambda path, leaf: True), plus)
    for params, _ in run(tx, {"w": jnp.array([0.0, 2.0])}, [{"w": jnp.zeros(2)}]):
        assert float(params["w"][1]) == 3


def test_inner_sees_float_weights_and_f32_gradients():
    seen = []

    def spy(updates, state, params):
        seen.append((updates["w"].dtype, params["w"]))
        return updates, state

    inner = optax.GradientTransformation(lambda params: params["w"].dtype, spy)
    params = {"w": jnp.array([0.6], jnp.bfloat16)}
    tx = clipjax.project(halves, carry=True, inner=inner)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        assert state.inner == jnp.float32
        for _ in range(2):
            updates, state = tx.update({"w": jnp.array([0.125], jnp.bfloat16)}, state, params)
            params = optax.apply_updates(params, updates)
    assert [dtype for dtype, _ in seen] == [jnp.float32] * 2
    first = float(jnp.bfloat16(0.6))
    np.testing.assert_allclose([float(p[0]) for _, p in seen], [first, first + 0.125], rtol=1e-6)
    assert params["w"].dtype == jnp.bfloat16 and float(params["w"][0]) == 1.0


def test_identity_with_carry_is_master_weights_for_bf16():
    """Trains to within 1 % of the f32 loss, where plain bf16 stalls."""
    x = RNG.normal(size=(64, 8)).astype(np.float32)
    y = x @ RNG.normal(size=8).astype(np.float32) * 3 + RNG.normal(size=64).astype(np.float32) * 0.5

    def loss(tx, dtype):
        def loss_fn(p):
            return jnp.mean(jnp.square(x @ p.astype(jnp.float32) + 100 - 100 - y))

        def step(loop, _):
            p, state = loop
            updates, state = tx.update(jax.grad(loss_fn)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        start = jnp.full(8, 8.0, dtype)
        (p, _), _ = jax.jit(lambda loop: jax.lax.scan(step, loop, length=1500))((start, tx.init(start)))
        assert p.dtype == dtype
        return float(loss_fn(p))

    with jax.numpy_dtype_promotion("standard"):
        adam = optax.adam(0.01)
        full, plain = loss(adam, jnp.float32), loss(adam, jnp.bfloat16)
        master = loss(clipjax.project(projections.identity(), carry=True, inner=adam), jnp.bfloat16)
    assert abs(master / full - 1) < 0.01
    assert plain > 1.5 * full


def test_master_weights_do_not_lose_a_thousand_small_steps():
    params = jnp.ones((), jnp.bfloat16)
    tx = clipjax.project(projections.identity(), carry=True, inner=optax.sgd(1e-4))

    def step(loop, _):
        p, state = loop
        updates, state = tx.update(jnp.ones_like(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        (p, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=1000)
    np.testing.assert_allclose(float(p), 0.9, rtol=2.0**-8)


# the life cycle


@pytest.mark.parametrize(
    ("start", "every", "stop", "expected"),
    [
        (0, None, None, [0]),
        (2, None, None, [2]),
        (0, 3, None, [0, 3, 6, 9]),
        (1, 3, 7, [1, 4, 7]),
        (1, 3, 6, [1, 4, 6]),
        (2, 100, 5, [2, 5]),
        (4, 1, 4, [4]),
    ],
)
def test_refreshes_are_due_at(start, every, stop, expected):
    def due(count):
        context = Context(count, None, None, None, jax.random.key(0), memory=lambda: None)
        no, yes = (jnp.full((), value, bool) for value in (False, True))
        return refreshed(Cycle(start, every, stop), context, lambda *_: yes, (), no, None)

    got = jax.vmap(due)(jnp.arange(10))
    assert list(np.flatnonzero(got)) == expected


def test_updates_without_a_leaf_per_param_are_refused():
    tx = clipjax.project(halves)
    with pytest.raises(ValueError, match="`updates` must have one leaf per leaf of `params`, got 2 for 1"):
        tx.update({"w": W["w"], "v": W["w"]}, tx.init(W), W)


@pytest.mark.parametrize("carry", [False, True])
def test_gradients_pass_where_the_projection_moves_nothing(carry):
    """Also at an update of zero, as whoever differentiates through a train step expects."""
    params = jnp.array([1.0, 2.0])
    tx = clipjax.project(projections.clamp(10.0), carry=carry)
    state = tx.init(params)
    slope = jax.grad(lambda u: optax.apply_updates(params, tx.update(u, state, params)[0]).sum())(jnp.array([0.0, 0.1]))
    np.testing.assert_array_equal(slope, [1, 1])


def test_states_that_do_not_fit_say_so():
    """A state of other params, of another option or of another layout raises, and names the remedy."""
    params, other = {"kernel": jnp.ones((2, 3))}, {"dense": {"kernel": jnp.ones((2, 3))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    quantize, prune = clipjax.fake_quantize(4), clipjax.prune_mask(0.5)
    master = clipjax.project(clipjax.projections.identity(), carry=True)
    state = quantize.init(params)
    flat = state.projection._replace(asked={"kernel": jnp.zeros((), bool)})  # by path, as in an earlier layout
    for tx, wrong in (
        (quantize, quantize.init(other)),
        (quantize, state._replace(projection=flat)),
        (prune, prune.init(params)._replace(projection=prune.init(params).projection._replace(mask=()))),
        (master, clipjax.project(clipjax.projections.identity()).init(params)),
        (clipjax.project(clipjax.projections.identity()), master.init(params)),
    ):
        with pytest.raises(ValueError, match="`state` must belong to these params"):
            tx.update(zeros, wrong, params)
    for carry in (True, False):
        with pytest.raises(ValueError, match="`state` must belong to these params"):
            clipjax.clip(1.0, carry=carry).update(params, clipjax.clip(1.0, carry=not carry).init(params))
    for tx, wrong, kind in (
        (prune, {"count": 0}, "ProjectState"),
        (prune, state, "PruneState"),
        (quantize, prune.init(params), "QuantizeState"),
        (clipjax.clip(1.0), (), "ClipState"),
        (clipjax.clip_norm(1.0), clipjax.clip(1.0).init(params), "ClipNormState"),
        (clipjax.skip_spikes(optax.sgd(1.0), 1.0), {}, "SkipState"),
    ):
        with pytest.raises(TypeError, match=f"`state` must be the {kind} that `init` returned"):
            tx.update(zeros, wrong, params)
