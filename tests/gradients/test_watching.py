"""`skip_spikes` that watches a loss, loses patience and forgets; thresholds that are relative to the weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import thresholds

PARAMS = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.array([1.0, 2.0])}
GRADS = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), PARAMS)


def run(tx, values, grads=GRADS, params=PARAMS):
    """The state after each update."""
    update, state, states = jax.jit(tx.update), tx.init(params), []
    for value in values:
        updates, state = update(grads, state, params, value=jnp.float32(value))
        params = optax.apply_updates(params, updates)
        states.append(state)
    return params, states


def test_a_loss_above_the_threshold_skips_its_update():
    tx = clipjax.skip_spikes(optax.adam(0.1), 2.0, watch="value")
    _, states = run(tx, [1.0, 3.0, float("nan"), 2.0, float("inf"), float("-inf")])
    assert [int(s.skipped) for s in states] == [0, 1, 2, 2, 3, 4]
    assert [int(s.inner[0].count) for s in states] == [1, 1, 1, 2, 2, 2]
    report = clipjax.report(states[3])
    assert report["skip_spikes/norm_pre"] == 2.0 and report["skip_spikes/nonfinite"] == 1


def test_a_rule_follows_the_losses():
    """Levanter's window of losses: mean and deviation of the last four, three of them off by up to .1."""
    losses = [1.0, 1.1, 0.9, 1.0, 1.05, 5.0, 1.0]
    tx = clipjax.skip_spikes(optax.sgd(0.1), thresholds.mean_sigma(3.0, window=4), watch="value")
    _, states = run(tx, losses)
    window = np.array(losses[1:5])
    assert [int(s.skipped) for s in states] == [0, 0, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(states[5].threshold, window.mean() + 3 * window.std(), rtol=1e-5)


def test_the_inner_transformation_is_given_the_value_too():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    clipjax.skip_spikes(inner, 1.0, watch="value").update(
        GRADS, clipjax.skip_spikes(inner, 1.0, watch="value").init(PARAMS), PARAMS, value=jnp.float32(0.5)
    )
    assert seen == [0.5]


def test_one_around_another_watches_both():
    tx = clipjax.skip_spikes(clipjax.skip_spikes(optax.sgd(0.1), 1.0), 2.0, watch="value")
    _, (state,) = run(tx, [1.0], jax.tree.map(lambda g: 100 * g, GRADS))
    assert int(state.skipped) == 0 and int(state.inner.skipped) == 1


def test_patience_is_lost_after_so_many_in_a_row_and_stays_lost():
    tx = optax.chain(clipjax.skip_spikes(optax.sgd(0.1), 2.0, watch="value", patience=3))
    params, states = run(tx, [9, 9, 1, 9, 9, 9, 1])
    flags = [bool(clipjax.report(s)["skip_spikes/stalled"]) for s in states]
    assert flags == [False] * 5 + [True] * 2
    assert [int(clipjax.report(s)["skip_spikes/streak"]) for s in states] == [1, 2, 0, 1, 2, 3, 0]
    assert not clipjax.check(params, states[4], tx)
    (violation,) = clipjax.check(params, states[5], tx)
    assert (violation.rule, violation.kind, violation.entries) == ("skip_spikes", "stalled", 3)
    with pytest.raises(ValueError, match="stalled"):
        clipjax.check(params, states[6], tx, raise_=True)


def test_without_patience_nothing_stalls():
    tx = clipjax.skip_spikes(optax.sgd(0.1), 2.0, watch="value")
    params, states = run(tx, [9] * 5)
    assert states[-1].streak == () == states[-1].stalled and not clipjax.check(params, states[-1], tx)
    assert not any("stalled" in key for key in clipjax.report(states[-1]))


def test_the_inner_one_of_two_is_named_first():
    inner = clipjax.skip_spikes(optax.sgd(0.1), 1e-3, patience=1)
    tx = clipjax.skip_spikes(inner, 2.0, watch="value", patience=9)
    params, states = run(tx, [1.0])
    assert [(v.rule, v.kind) for v in clipjax.check(params, states[0])] == [("skip_spikes", "stalled")]


OPTIMIZERS = {
    "adam": optax.adam(optax.linear_schedule(0.1, 0.0, 10)),
    "sgd": optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9),
    "by label": optax.partition(
        {"a": optax.adam(optax.linear_schedule(0.1, 0.0, 10)), "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}
    ),
    "adafactor": optax.adafactor(optax.linear_schedule(0.1, 0.0, 10), min_dim_size_to_factor=2),
    "injected": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 10)),
    "inside": optax.chain(clipjax.clip_norm(thresholds.zscore()), optax.adam(0.1)),
    "bare": optax.chain(
        optax.GradientTransformation(
            lambda p: jax.tree.map(jnp.zeros_like, p), lambda u, s, p=None: (u, jax.tree.map(jnp.add, u, s))
        ),
        optax.scale(-0.1),
    ),
    "named": optax.named_chain(("clip", clipjax.clip(1.0)), ("adam", optax.adam(0.1))),
}


COUNTS = {  # what wraps moments, and where its own counts stand
    "injected": (
        lambda schedule: optax.inject_hyperparams(optax.sgd)(schedule, momentum=0.9),
        lambda s: (s.count, s.hyperparams_states["learning_rate"].count),
    ),
    "accumulated": (
        lambda schedule: optax.MultiSteps(optax.adam(schedule), 1),
        lambda s: (s.gradient_step, s.inner_opt_state[1].count),
    ),
    "skipping": (
        lambda schedule: clipjax.skip_spikes(optax.sgd(0.1, momentum=0.9), thresholds.mean_sigma(window=2)),
        lambda s: (s.count, s.rule.added),
    ),
    "clipping": (
        lambda schedule: optax.chain(clipjax.clip_norm(thresholds.zscore(), carry=True), optax.adam(0.1)),
        lambda s: (s[0].count, s[0].rule.added),
    ),
    "latent": (
        lambda schedule: clipjax.project(lambda tree: tree, carry=True, inner=optax.sgd(0.1, momentum=0.9)),
        lambda s: (s.count,),
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_wraps_moments_goes_on_counting(name):
    make, counts = COUNTS[name]
    tx = clipjax.skip_spikes(make(optax.linear_schedule(0.1, 0.0, 10)), 2.0, watch="value", reset_moments=True)
    _, states = run(tx, [1.0, 1.0, 9.0])
    before, after = (list(map(int, counts(s.inner))) for s in states[1:])
    assert before == after and min(after) >= 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_begin_anew_at_a_spike_and_schedules_go_on(name):
    inner = OPTIMIZERS[name]
    tx = clipjax.skip_spikes(inner, 2.0, watch="value", reset_moments=True)
    _, states = run(tx, [1.0, 1.0, 9.0])
    before, after = states[1].inner, states[2].inner
    marks = optax.tree.map_params(inner, lambda x: True, before, transform_non_params=lambda x: False)
    fresh = inner.init(PARAMS)
    found = zip(*map(jax.tree.leaves, (marks, before, after, fresh)), strict=True)
    moments = [(old, new, first) for moment, old, new, first in found if moment]
    assert moments and any(np.any(old != first) for old, _, first in moments)
    for _, new, first in moments:
        np.testing.assert_array_equal(new, first)
    schedules = [s for s in jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))]
    schedules = [s for s in schedules if isinstance(s, optax.ScaleByScheduleState)]
    assert all(int(s.count) == 2 for s in schedules)
    adams = jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    assert all(int(s.count) == 0 for s in adams if isinstance(s, optax.ScaleByAdamState))


def test_masks_and_latent_weights_are_not_forgotten():
    adam = optax.adam(0.1)
    inner = optax.chain(clipjax.fake_quantize(4, inner=adam), clipjax.prune_mask(0.5, every=None))
    _, states = run(clipjax.skip_spikes(inner, 2.0, watch="value", reset_moments=True), [1.0, 1.0, 9.0])
    (grid, mask), (new_grid, new_mask) = states[1].inner, states[2].inner
    chex.assert_trees_all_equal((new_grid._replace(inner=()), new_mask), (grid._replace(inner=()), mask))
    assert int(mask.projection.mask["kernel"].sum()) == 2
    chex.assert_trees_all_equal(new_grid.inner[0], adam.init(PARAMS)[0])


def test_without_the_option_moments_stay():
    _, states = run(clipjax.skip_spikes(optax.adam(0.1), 2.0, watch="value"), [1.0, 9.0])
    np.testing.assert_array_equal(states[1].inner[0].mu["bias"], states[0].inner[0].mu["bias"])
    assert np.any(states[1].inner[0].mu["bias"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: clipjax.skip_spikes(optax.sgd(0.1), 2.0, watch="loss"), "`watch` must be"),
        (lambda: clipjax.skip_spikes(optax.sgd(0.1), 2.0, patience=0), "`patience` must be"),
        (lambda: clipjax.skip_spikes(optax.sgd(0.1), 2.0, reset_moments=1.5), "`reset_moments` must be"),
        (lambda: clipjax.skip_spikes(optax.sgd(0.1), thresholds.relative(1.0), watch="value"), "`threshold` must not"),
        (lambda: update_without(value=None), "`value` must be given"),
        (lambda: update_without(value=jnp.ones(2)), "`value` must be one float"),
        (lambda: update_without(value=3), "`value` must be one float"),
        (lambda: thresholds.relative(0.0), "`ratio` must be a number > 0"),
        (lambda: thresholds.relative(thresholds.relative(0.1)), "`ratio` must be no relative rule"),
        (lambda: clipjax.clip(thresholds.relative(0.1)).init(PARAMS), "`threshold` must not be relative"),
        (lambda: clipjax.clip_norm(thresholds.relative(0.1)).update(GRADS, start(0.1), None), "`params` must be given"),
    ],
)
def test_wrong_calls_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def start(ratio):
    return clipjax.clip_norm(thresholds.relative(ratio)).init(PARAMS)


def update_without(value):
    tx = clipjax.skip_spikes(optax.sgd(0.1), 2.0, watch="value")
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value=value)


def norms(tree, ord=2):
    arrays = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return [np.sum(np.abs(x) ** ord) ** (1 / ord) for x in arrays]


@pytest.mark.parametrize("ord", [2, 1, "rms"])
@pytest.mark.parametrize("per", ["leaf", "global"])
def test_gradients_are_clipped_to_a_fraction_of_their_weights(per, ord):
    tx = clipjax.clip_norm(thresholds.relative(0.01), per=per, ord=ord)
    got, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    power = 2 if ord == "rms" else ord
    sizes = np.array([x.size for x in jax.tree.leaves(PARAMS)]) if ord == "rms" else 1
    w, g = (np.array(norms(tree, power)) / np.sqrt(sizes) for tree in (PARAMS, GRADS))
    if per == "global":
        w, g = np.array(norms(PARAMS, power)), np.array(norms(GRADS, power))  # one count of entries cancels out
        w, g = (np.full(2, np.sum(x**power) ** (1 / power)) for x in (w, g))
    for x, before, factor in zip(*map(jax.tree.leaves, (got, GRADS)), np.minimum(1, 0.01 * w / g), strict=True):
        np.testing.assert_allclose(x, before * factor, rtol=1e-6)


def test_agc_of_optax_where_a_unit_is_a_leaf():
    """A vector is one unit there, and the least norm of weights does not bind."""
    params, grads = {"w": PARAMS["bias"]}, {"w": 5 * GRADS["bias"]}
    peer = optax.adaptive_grad_clip(0.02, eps=1e-9)
    expected, _ = peer.update(grads, peer.init(params), params)
    tx = clipjax.clip_norm(thresholds.relative(0.02), per="leaf")
    np.testing.assert_allclose(tx.update(grads, tx.init(params), params)[0]["w"], expected["w"], rtol=1e-6)


def test_weights_that_are_zero_clip_nothing_and_enter_no_history():
    params = {"kernel": jnp.zeros((2, 2)), "bias": PARAMS["bias"]}
    agc = clipjax.clip_norm(thresholds.relative(0.01), per="leaf")
    np.testing.assert_array_equal(agc.update(GRADS, agc.init(params), params)[0]["kernel"], GRADS["kernel"])
    rule = thresholds.relative(thresholds.ema_ratio(1.0, warmup=1))
    tx = clipjax.clip_norm(rule, per="leaf")
    state = tx.init(params)
    for _ in range(3):
        got, state = tx.update(GRADS, state, params)
        np.testing.assert_array_equal(got["kernel"], GRADS["kernel"])
    added = dict(zip(("bias", "kernel"), state.rule.added.tolist(), strict=True))
    assert added == {"bias": 3, "kernel": 0}


def test_a_rule_follows_norms_in_units_of_the_weights():
    """As the same rule follows n / |w|, with weights that grow."""
    rule, plain = thresholds.relative(thresholds.ema_ratio(1.1, warmup=2)), thresholds.ema_ratio(1.1, warmup=2)
    tx, state, history = clipjax.clip_norm(rule), None, plain.init()
    for step, size in enumerate((1.0, 3.0, 2.0, 9.0, 1.0)):
        params = jax.tree.map(lambda p, s=step: (1 + s) * p, PARAMS)
        grads = jax.tree.map(lambda g, s=size: s * g, GRADS)
        state = tx.init(params) if state is None else state
        _, state = tx.update(grads, state, params)
        w, n = (np.sqrt(np.sum(np.square(norms(tree)))) for tree in (params, grads))
        limit, history = plain.update(jnp.float32(n / w), history)
        np.testing.assert_allclose(state.threshold, limit * w, rtol=1e-5)


def test_skips_relative_to_the_weights():
    tx = clipjax.skip_spikes(optax.sgd(0.1), thresholds.relative(0.1))
    w = np.sqrt(np.sum(np.square(norms(PARAMS))))
    for size, skipped in ((0.09, 0), (0.11, 1)):
        grads = {"kernel": jnp.zeros((2, 2)).at[0, 0].set(size * w), "bias": jnp.zeros(2)}
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        assert int(state.skipped) == skipped


def test_a_reference_is_written_for_one_norm():
    rule = thresholds.relative(0.01)._replace(reference=lambda n: jnp.max(jnp.stack([n, jnp.float32(1e3)])))
    tx = clipjax.clip_norm(rule, per="leaf")
    got, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(got, GRADS)


def test_params_of_another_tree_are_named():
    tx = clipjax.clip_norm(thresholds.relative(0.01))
    with pytest.raises(ValueError, match="`params` must have a leaf for each gradient"):
        tx.update(GRADS, tx.init(PARAMS), {"kernel": PARAMS["kernel"]})


def test_losses_that_are_not_positive_enter_no_history():
    tx = clipjax.skip_spikes(optax.sgd(0.1), thresholds.mean_sigma(3.0, window=2), watch="value")
    _, states = run(tx, [-5.0, -5.1, 0.0, 3.0])
    assert int(states[-1].rule.added) == 1 and int(states[-1].skipped) == 0
