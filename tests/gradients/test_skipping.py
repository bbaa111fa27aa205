"""skip_spikes: a bad step is as if it had never been, for every optimizer, threshold and constraint.

Optax's Adam relies on implicit promotion, so strict promotion is asked for where the inner optimizer is sgd alone.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import thresholds

RNG = np.random.default_rng(7)


def tree(scale, dtype=jnp.float32):
    shapes = {"kernel": (4, 6), "bias": (6,), "deep": (6, 4)}
    return {name: jnp.asarray(RNG.normal(size=s) * scale, dtype) for name, s in shapes.items()}


def norm(grads):
    """The 2-norm in f64."""
    return float(np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads))))


def reference_skips(norms, limits):
    """Which steps are skipped: those whose norm exceeds the threshold of the step or is not finite."""
    return [not (np.isfinite(n) and n <= c) for n, c in zip(norms, limits, strict=True)]


PARAMS = tree(0.5)
GOOD = [tree(s) for s in (0.1, 0.13, 0.08, 0.11, 0.1)]
LARGER, SPIKE, NAN, INF = tree(0.3), tree(100.0), tree(0.1), tree(0.1)
NAN["bias"] = NAN["bias"].at[2].set(jnp.nan)
INF["deep"] = INF["deep"].at[1, 1].set(-jnp.inf)
BAD = {"spike": SPIKE, "nan": NAN, "inf": INF}
LIMIT = 2.0  # norms of GOOD are near 0.7

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.01, 0.0, 10), weight_decay=0.1),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(0.01),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.55, jax.random.key(3)), optax.sgd(0.1)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 5)),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.01), 2),
    "constrained": lambda: optax.chain(
        optax.adam(0.01), clipjax.clamp_weights(0.3), clipjax.prune_mask(0.5, every=2, stop=6)
    ),
}


def plain(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def same(a, b):
    """Bit for bit."""
    chex.assert_trees_all_equal_structs(a, b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)), a, b)


@functools.cache
def skipping(name, limit=LIMIT):
    """A compiled step `(grads, params, state) -> (params, state, updates)` around one optimizer."""
    tx = clipjax.skip_spikes(OPTIMIZERS[name](), limit)

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return tx, jax.jit(step)


def train(tx_step, grads, params=PARAMS, state=None):
    """The params after every step, the last state and the last updates."""
    tx, step = tx_step
    state, path, updates = tx.init(params) if state is None else state, [], None
    for g in grads:
        params, state, updates = step(g, params, state)
        path.append(params)
    return path, state, updates


# A bad step.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_bad_steps_goes_on_as_if_they_had_not_been(name):
    """Zero updates and the very same inner state, moments, counts, keys and masks; then the same trajectory."""
    clean, end, _ = train(skipping(name), GOOD)
    path, state, _ = train(skipping(name), GOOD[:2])
    for skipped, bad in enumerate(BAD.values(), 1):
        after, spoiled, updates = train(skipping(name), [bad], path[-1], state)
        assert not any(u.any() for u in jax.tree.leaves(updates))
        same((after[-1], spoiled.inner), (path[-1], state.inner))
        assert (int(spoiled.count), int(spoiled.skipped)) == (2 + skipped, skipped)
        state = spoiled
    assert int(state.nonfinite) == 2
    rest, state, _ = train(skipping(name), GOOD[2:], path[-1], state)
    same(rest, clean[2:])
    same(state.inner, end.inner)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_bad_steps_it_is_the_inner_optimizer(name):
    tx = OPTIMIZERS[name]()
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for g in GOOD:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    path, skip, _ = train(skipping(name), GOOD)
    chex.assert_trees_all_close(path[-1], params, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal_structs(skip.inner, state)
    assert int(skip.skipped) == 0


@pytest.mark.parametrize("bad", BAD)
def test_first_step_may_be_bad(bad):
    clean, end, _ = train(skipping("adam"), GOOD)
    path, state, _ = train(skipping("adam"), [BAD[bad], *GOOD])
    same(path[0], PARAMS)
    same(path[1:], clean)
    same(state.inner, end.inner)


def test_zero_empty_none_and_masked_gradients_are_not_skipped():
    tx = clipjax.skip_spikes(optax.adam(0.1), 0.0)
    grads = {"z": jnp.zeros(3), "e": jnp.zeros((0, 2)), "n": None, "m": optax.MaskedNode(), "s": jnp.float32(0)}
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    assert (int(state.skipped), int(optax.tree.get(state.inner, "count")), float(state.norm_pre)) == (0, 1, 0.0)


def test_complex_gradient_is_measured_or_refused():
    """A complex gradient of 1e9 or NaN must not reach the optimizer."""
    tx = clipjax.skip_spikes(optax.sgd(1.0), LIMIT)
    for bad in (1e9, jnp.nan):
        grads = {"c": jnp.full(2, bad, jnp.complex64), "r": jnp.ones(1)}
        try:
            _, state = tx.update(grads, tx.init(grads))
        except TypeError:
            continue
        assert int(state.skipped) == 1


# Thresholds.


def test_norm_of_the_threshold_itself_is_kept_and_zero_skips_all():
    grads = jnp.array([3.0, 4.0])
    for limit, kept in ((5.0, True), (np.nextafter(np.float32(5), np.float32(0)), False), (0.0, False)):
        tx = clipjax.skip_spikes(optax.sgd(1.0), limit)
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        np.testing.assert_array_equal(updates, -grads if kept else [0, 0])
        assert int(state.skipped) == (not kept) and float(state.norm_pre) == 5


def test_infinite_threshold_skips_only_what_is_not_finite():
    _, state, _ = train(skipping("adam", np.inf), [GOOD[0], *BAD.values()])
    assert (int(state.skipped), int(state.nonfinite), int(state.count)) == (2, 2, 4)
    assert clipjax.report(state)["skip_spikes/threshold"] == np.inf


def test_huge_norm_is_measured_where_its_square_is_no_float():
    tx = clipjax.skip_spikes(optax.sgd(1.0), 1e30)
    for scale, kept in ((1e20, True), (1e30, False)):
        grads = jnp.array([3.0, 4.0]) * scale
        _, state = jax.jit(tx.update)(grads, tx.init(grads))
        np.testing.assert_allclose(state.norm_pre, 5 * scale, rtol=1e-6)
        assert int(state.skipped) == (not kept)


def test_schedule_counts_skipped_steps_too():
    limits = [10.0, 10.0, 0.1, 0.1, 10.0]
    tx = clipjax.skip_spikes(optax.sgd(1.0), lambda count: jnp.asarray(limits)[count])
    state, left_out = tx.init(PARAMS), []
    for g in GOOD:
        updates, after = jax.jit(tx.update)(g, state)
        left_out.append(int(after.skipped) > int(state.skipped))
        state = after
    assert left_out == reference_skips(map(norm, GOOD), limits) == [False, False, True, True, False]


RULES = {
    "zscore": lambda: thresholds.zscore(2.0, warmup=3),
    "zscore_mean": lambda: thresholds.zscore(2.0, warmup=3, mode="mean"),
    "zscore_percentile": lambda: thresholds.zscore(2.0, warmup=3, mode="percentile"),
    "ema_ratio": lambda: thresholds.ema_ratio(1.5, 0.5, 3, np.inf),
    "percentile": lambda: thresholds.percentile(75.0, window=5),
    "mean_sigma": lambda: thresholds.mean_sigma(3.0, window=3),
    "quantile_track": lambda: thresholds.quantile_track(0.5, init=0.5),
    "spam": lambda: thresholds.spam(3.0, decay=0.5),
}


@pytest.mark.parametrize("name", RULES)
@jax.numpy_dtype_promotion("strict")
def test_rule_sees_every_finite_norm_and_decides(name):
    """The rule alone, fed with the norms that are finite, those of skipped steps among them, says what is skipped."""
    rule = RULES[name]()
    tx = clipjax.skip_spikes(optax.sgd(1.0), rule)
    grads = [*GOOD[:4], SPIKE, NAN, GOOD[0], LARGER, GOOD[1]]
    update, advance, state, history = jax.jit(tx.update), jax.jit(rule.update), tx.init(PARAMS), rule.init()
    kept = []
    for g in grads:
        updates, after = update(g, state)
        if np.isfinite(norm(g)):
            limit, history = advance(jnp.float32(norm(g)), history)
            limit = limit if limit > 0 else jnp.inf
            np.testing.assert_allclose(clipjax.report(after)["skip_spikes/threshold"], limit, rtol=1e-5)
            kept.append(not reference_skips([norm(g)], [limit])[0])
        else:
            same(after.rule, state.rule)
            kept.append(False)
        assert int(after.skipped) - int(state.skipped) == (not kept[-1])
        assert any(u.any() for u in jax.tree.leaves(updates)) == kept[-1]
        state = after
    assert kept[0] or name == "quantile_track"
    assert not kept[4] and not kept[5] and any(kept)
    chex.assert_trees_all_close(state.rule, history, rtol=1e-5)


@pytest.mark.parametrize("limit", [-1.0, np.nan])
def test_bad_threshold_raises(limit):
    with pytest.raises(ValueError, match=r"`threshold` must be a number >= 0, got .*math\.inf"):
        clipjax.skip_spikes(optax.sgd(1.0), limit)


@pytest.mark.parametrize("limit", [None, "2", True])
def test_threshold_that_is_no_number_raises(limit):
    with pytest.raises(TypeError, match=r"`threshold` must be a number, a schedule or a rule, got .*zscore"):
        clipjax.skip_spikes(optax.sgd(1.0), limit)


# Ways to run.


@pytest.mark.parametrize("name", ["adam", "noisy", "constrained"])
def test_scan_is_the_loop_and_the_state_keeps_its_shape(name):
    tx, step = skipping(name)
    grads = [*GOOD[:2], SPIKE, NAN, *GOOD[2:]]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, PARAMS), state)
    run = jax.jit(lambda carry: jax.lax.scan(lambda c, g: (step.__wrapped__(g, *c)[:2], None), carry, stacked)[0])
    params, last = run((PARAMS, state))
    path, looped, _ = train(skipping(name), grads)
    chex.assert_trees_all_close((params, last._replace(inner=())), (path[-1], looped._replace(inner=())), rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(last, state)
    assert (int(last.skipped), int(last.nonfinite)) == (2, 1)


def test_donated_state_is_reused_and_traced_once():
    """Warnings are errors here: a buffer that cannot be reused warns."""
    tx, _ = skipping("adam")

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    chex.clear_trace_counter()
    donating = jax.jit(chex.assert_max_traces(step, 1), donate_argnums=(1, 2))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for g in [GOOD[0], SPIKE, NAN, *GOOD[1:]]:
        given = params, state.inner
        params, state = donating(g, params, state)
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    chex.assert_trees_all_close(params, train(skipping("adam"), GOOD)[0][-1], rtol=1e-5)


def test_vmap_over_thresholds_is_a_sweep():
    def swept(limit):
        tx = clipjax.skip_spikes(optax.sgd(1.0), limit)
        return tx.update(GOOD[0], tx.init(PARAMS))

    updates, state = jax.jit(jax.vmap(swept))(jnp.array([0.1, 10.0]))
    np.testing.assert_array_equal(state.skipped, [1, 0])
    np.testing.assert_array_equal(updates["bias"], jnp.stack([jnp.zeros(6), -GOOD[0]["bias"]]))


def test_extra_arguments_reach_the_inner_transformation():
    scaled = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda g, state, params=None, *, factor, **extra: (jax.tree.map(lambda x: factor * x, g), state),
    )
    tx = clipjax.skip_spikes(optax.chain(scaled, optax.sgd(1.0)), LIMIT)
    updates, _ = tx.update(GOOD[0], tx.init(PARAMS), PARAMS, factor=2.0, unused=None)
    np.testing.assert_array_equal(updates["bias"], -2 * GOOD[0]["bias"])


# Beside weight transformations.


@pytest.mark.parametrize("name", ["sgd", "adam", "constrained"])
def test_bf16_params_get_updates_of_the_dtypes_of_the_inner(name):
    """A zero update has the dtype of every other one: f32 after constraints of weights, bf16 after an optimizer."""
    params, good = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), t) for t in (PARAMS, GOOD[0]))
    inner = OPTIMIZERS[name]()
    expected, _ = jax.eval_shape(lambda g, p: inner.update(g, inner.init(p), p), good, params)
    tx, step = skipping(name)
    for grads in (good, jax.tree.map(lambda x: x * jnp.bfloat16(jnp.nan), good)):
        after, state, updates = step(grads, params, tx.init(params))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, expected)
    same(after, params)
    assert (name == "constrained") == (updates["bias"].dtype == jnp.float32) and int(state.skipped) == 1


def test_constraints_outside_hold_after_skipped_steps_too():
    """A bad first step: adam does nothing, and yet the params are bounded, sparse and on a grid from then on."""
    tx = optax.chain(
        clipjax.skip_spikes(optax.adam(0.1), LIMIT),
        clipjax.clamp_weights(0.25),
        clipjax.prune_mask(0.5),
        clipjax.fake_quantize(4),
    )
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for i, g in enumerate([SPIKE, NAN, GOOD[0], INF, GOOD[1]]):
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
        assert max(np.abs(x).max() for x in leaves) <= 0.25
        assert sum((x == 0).sum() for x in leaves if x.ndim == 2) >= 24
        assert i < 1 or all(len(np.unique(x)) <= 15 for x in leaves if x.ndim == 2)
    assert int(optax.tree.get(state, "skipped")) == 3


def test_report_names_what_was_skipped_and_the_transformations_inside():
    _, state, _ = train(skipping("constrained"), [GOOD[0], SPIKE, NAN])
    entries = jax.jit(clipjax.report)(state)
    own = [f"skip_spikes/{k}" for k in ("norm_pre", "threshold", "skipped", "fraction_skipped", "nonfinite")]
    assert {k for k in entries if k.startswith("skip_spikes/")} == set(own)
    assert entries["skip_spikes/skipped"] == 2 and entries["skip_spikes/nonfinite"] == 1
    assert np.isnan(entries["skip_spikes/norm_pre"]) and entries["skip_spikes/threshold"] == LIMIT
    np.testing.assert_allclose(entries["skip_spikes/fraction_skipped"], 2 / 3, rtol=1e-6)
    assert abs(entries["clamp_weights/high"] - 0.3) < 1e-6 and entries["prune_mask/sparsity"] == 0.5
    assert [k.split("/")[0] for k in entries][-1] == "skip_spikes"  # those inside come before
