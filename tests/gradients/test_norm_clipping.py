"""clip_norm by leaf: thresholds, histories and reports by path, whatever leaves have no gradient; and wrong calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import selections, thresholds

pytestmark = pytest.mark.usefixtures("strict")

# the norms are 5, 10 and 2
GRADS = {"enc": {"kernel": jnp.array([3.0, 4.0])}, "b": [jnp.array([[6.0], [8.0]]), jnp.array(-2.0)]}
PATHS = ("enc/kernel", "b/0", "b/1")
by_leaf = functools.partial(clipjax.clip_norm, per="leaf")


def update(tx, grads, state=None):
    return jax.jit(tx.update)(grads, tx.init(GRADS) if state is None else state)


def shown(state, name):
    found = clipjax.report(state, per_leaf=True)
    return [float(found[f"clip_norm/{name}/{path}"]) for path in PATHS]


THRESHOLDS = {
    "per_leaf": clipjax.per_leaf(lambda path, leaf: {"enc/kernel": 1.0, "b/0": 20.0}.get(path)),
    "dict_by_path": {"enc/kernel": 1.0, "b/0": 20.0},
    "tree": {"enc": {"kernel": 1.0}, "b": [20.0, None]},
    "schedules": {"enc/kernel": lambda count: 1 - count, "b/0": jnp.float32(20.0)},
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_differ_by_leaf_and_a_leaf_without_one_is_not_clipped(name):
    updates, state = update(by_leaf(THRESHOLDS[name]), GRADS)
    np.testing.assert_allclose(updates["enc"]["kernel"], [0.6, 0.8], rtol=1e-6)
    for got, g in zip(updates["b"], GRADS["b"], strict=True):
        np.testing.assert_array_equal(got, g)
    assert shown(state, "threshold") == [1.0, 20.0, np.inf] and int(state.clipped) == 1


def test_a_leaf_without_gradient_keeps_its_history_and_shifts_nothing():
    """Neither None at update, nor None or a hole at init; the mean is over the leaves that had a gradient."""
    tx = by_leaf(thresholds.ema_ratio(2.0, decay=0.5, warmup=1, warmup_max=100.0))
    _, first = update(tx, GRADS)
    _, state = update(tx, GRADS | {"b": [None, GRADS["b"][1]]}, first)
    assert shown(state, "norm_pre")[::2] == [5.0, 2.0] and np.isnan(shown(state, "norm_pre")[1])
    assert float(clipjax.report(state)["clip_norm/norm_pre"]) == 3.5 and int(state.nonfinite) == 0
    # γ is the first norm of each leaf, also of the one that had none at the second update
    _, state = update(tx, GRADS, state)
    assert shown(state, "threshold") == [10.0, 20.0, 4.0]
    partial = {"b": [None, jnp.array(3.0)], "enc": {"kernel": optax.MaskedNode()}}
    _, state = tx.update(partial, tx.init(partial))
    found = clipjax.report(state, per_leaf=True)
    assert float(found["clip_norm/norm_pre"]) == float(found["clip_norm/norm_pre/b/1"]) == 3.0
    assert not [key for key in found if key.endswith(("/b/0", "kernel"))]


def test_a_gradient_where_there_was_no_param_is_refused():
    tx = by_leaf(1.0)
    with pytest.raises(ValueError, match="`state` must belong to these params, got gradients at \\['new'\\]"):
        tx.update(GRADS | {"new": jnp.ones(2)}, tx.init(GRADS))


# Wrong calls: one sentence that names argument, value and remedy.

WRONG = {
    "uncalled_rule": (TypeError, r"`threshold`.*Call it: `thresholds\.zscore\(\)`", lambda: by_leaf(thresholds.zscore)),
    "uncalled_clip": (TypeError, r"Call it: `thresholds\.spam\(\)`", lambda: clipjax.clip(thresholds.spam)),
    "uncalled_skip": (TypeError, r"Call it", lambda: clipjax.skip_spikes(optax.sgd(1.0), thresholds.zscore)),
    "uncalled_in_tree": (TypeError, r"Call it", lambda: by_leaf({"b/1": thresholds.zscore}).init(GRADS)),
    "no_inner": (TypeError, r"`inner` must be .*got 1\.0.*skip_spikes\(optax", lambda: clipjax.skip_spikes(1.0)),
    "no_threshold": (TypeError, r"`threshold` must be .*got None", lambda: clipjax.skip_spikes(optax.sgd(1.0))),
    "vector": (ValueError, r"`threshold` must be one number.*per=\"leaf\"", lambda: clipjax.clip_norm(jnp.ones(2))),
    "vector_clip": (ValueError, r"`threshold` must be one number", lambda: clipjax.clip(np.ones(3))),
    "vector_leaf": (ValueError, r"must be one number", lambda: by_leaf({"b/1": np.ones(2)}).init(GRADS)),
    "list": (TypeError, r"must be one number.*per=\"leaf\"", lambda: clipjax.clip_norm([1.0, 2.0])),
    "per_leaf_global": (TypeError, r"per=\"leaf\"", lambda: clipjax.clip_norm(clipjax.per_leaf(lambda p, x: 1.0))),
    "per_leaf_clip": (TypeError, r"per=\"leaf\"", lambda: clipjax.clip(clipjax.per_leaf(lambda p, x: 1.0))),
    "dict_skip": (TypeError, r"per=\"leaf\"", lambda: clipjax.skip_spikes(optax.sgd(1.0), {"a": 1.0})),
    "rules_in_tree": (
        TypeError,
        r"got a rule.*one rule for all",
        lambda: by_leaf({"b/1": thresholds.zscore()}).init(GRADS),
    ),
    "no_leaf": (ValueError, r"have a value for a leaf", lambda: by_leaf({"b/9": 1.0}).init(GRADS)),
    "negative_leaf": (ValueError, r"a number >= 0, got -1", lambda: by_leaf({"b/1": -1.0}).init(GRADS)),
    "vector_schedule": (
        ValueError,
        r"give one number, got 'shape \(2,\)'.*schedule",
        lambda: update(clipjax.clip_norm(lambda count: jnp.ones(2)), GRADS),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_says_what_to_do(case):
    kind, match, call = WRONG[case]
    with pytest.raises(kind, match=match):
        call()


@pytest.mark.parametrize("per", ["global", "leaf"])
def test_the_remedies_for_complex_gradients_give_the_norm_of_the_complex_leaf(per):
    """|3 + 4i| = 5; split in two leaves, each would have a norm of its own."""
    g, tx = jnp.array([3.0 + 4.0j]), clipjax.clip_norm(1.0, per=per)
    with pytest.raises(TypeError, match=r"split_real_and_imaginary.*norm of each leaf.*jnp\.stack"):
        tx.update(g, tx.init(jnp.ones(1)))
    parts = jnp.stack([g.real, g.imag])
    np.testing.assert_allclose(tx.update(parts, tx.init(parts))[0], [[0.6], [0.8]], rtol=1e-6)
    with pytest.raises(TypeError, match=r"Mask integer leaves with `optax\.masked`"):
        clipjax.clip(1.0).update(jnp.ones(2, jnp.int32), clipjax.clip(1.0).init(jnp.ones(2)))


# A threshold below 0, which only a traced number or a schedule can be, counts as 0.


@pytest.mark.parametrize(
    "factory",
    [
        clipjax.clip,
        clipjax.clip_norm,
        by_leaf,
        lambda c: by_leaf({"enc/kernel": c, "b/0": c, "b/1": c}),
        lambda c: clipjax.skip_spikes(optax.identity(), c),
    ],
)
def test_a_threshold_below_0_counts_as_0(factory):
    def last(grads, slope):
        tx = factory(lambda count: 1.0 - slope * count.astype(jnp.float32))
        state = tx.init(grads)
        for _ in range(4):
            updates, state = tx.update(grads, state)
        return updates, state

    updates, state = jax.jit(last)(GRADS, jnp.float32(0.5))
    eager, _ = last(GRADS, 0.5)
    assert not any(np.any(x) for x in jax.tree.leaves((updates, eager)))
    assert not np.any(state.threshold)
    traced = jax.jit(lambda c: factory(c).update(GRADS, factory(c).init(GRADS))[0])(jnp.float32(-2.0))
    assert not any(np.any(x) for x in jax.tree.leaves(traced))


# f64 is f64.


def test_f64_thresholds_norms_and_histories_are_f64():
    with jax.enable_x64(True):
        g = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
        scaled = lambda c: jax.tree.map(lambda x: x * c, g)
        assert {x.dtype for x in g.values()} == {jnp.dtype("float64")}
        assert clipjax.clip(0.1).update(g, clipjax.clip(0.1).init(g))[0]["w"].tolist() == [0.1, 0.1]
        assert float(clipjax.report(clipjax.clip(0.1).init(g))["clip/threshold"]) == np.inf
        for per in ("global", "leaf"):
            for c in (1e-50, 1e-200, 1e200):
                tx = clipjax.clip_norm(c, per=per)
                np.testing.assert_allclose(tx.update(scaled(2 * c), tx.init(g))[0]["w"], [0.6 * c, 0.8 * c], rtol=1e-14)
        skip = clipjax.skip_spikes(optax.identity(), np.inf)
        updates, state = skip.update(scaled(1e100), skip.init(g))
        assert int(state.skipped) == 0
        np.testing.assert_allclose([*updates["w"], state.norm_pre], [3e100, 4e100, 5e100], rtol=1e-14)
        assert clipjax.report(state)["skip_spikes/threshold"] == np.inf


RULES = {
    "zscore": (lambda u: thresholds.zscore(1.0, warmup=2, eps=0.0, decay=0.5), 2.0 + 1.0 / 7.0),
    "ema_ratio": (lambda u: thresholds.ema_ratio(1.5, decay=0.5, warmup=2, warmup_max=np.inf), 1.5),
    "percentile": (lambda u: thresholds.percentile(50, window=8), 3.0),
    "mean_sigma": (lambda u: thresholds.mean_sigma(2.0, window=2), 4.0),
    "quantile_track": (lambda u: thresholds.quantile_track(0.5, init=2 * u, lr=0.2), 2.0),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("unit", [1e-60, 1e60, 1e150])
def test_rules_follow_norms_that_only_f64_holds(name, unit):
    """Norms of 1, 3 and 9 units: the third threshold in units, to f64's precision; and the state keeps its dtypes."""
    rule, expected = RULES[name]
    with jax.enable_x64(True):
        tx = clipjax.clip_norm(rule(unit))
        state = tx.init(jnp.ones(2))
        step = jax.jit(tx.update)
        for norm in (1.0, 3.0, 9.0):
            _, after = step(jnp.array([norm, 0.0]) * unit, state)
            assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
            state = after
        np.testing.assert_allclose(state.threshold / unit, expected, rtol=1e-12)


def test_entries_of_f64_have_f64_histories_beside_those_of_f32():
    with jax.enable_x64(True):
        grads = {"d": jnp.full(2, 1e-100), "f": jnp.ones(2, jnp.float32)}
        tx = clipjax.clip(thresholds.spam(4.0, decay=0.75))
        state = tx.init(grads)
        for scaled in (grads, jax.tree.map(lambda g: 9 * g, grads)):
            updates, state = tx.update(scaled, state)
        np.testing.assert_allclose(updates["d"], 1e-100, rtol=1e-14)  # C² = 4 · 0.25 · g²
        np.testing.assert_allclose(updates["f"], 1.0, rtol=1e-6)
        assert {k: x.dtype.name for k, x in state.rule.items()} == {"d": "float64", "f": "float32"}


def test_f64_gradients_of_f32_params_leave_the_state_as_it_is():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(2, jnp.float32)}
        for tx in (
            clipjax.clip_norm(thresholds.zscore()),
            clipjax.clip_norm(np.inf, per="leaf", carry=True),
            clipjax.clip(0.1),
            clipjax.clip(thresholds.spam(), carry=True),
            clipjax.skip_spikes(optax.identity(), np.inf),
            clipjax.clip_norm(1.0, select=selections.largest(0.5)),
        ):
            state = tx.init(params)
            updates, after = tx.update({"w": jnp.ones(2, jnp.float64)}, state)
            assert updates["w"].dtype == "float64"
            assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
