"""Breaks of clipjax/_gradients."""

from breaks.mutant import Mutant

SCALING, RESCALING = "_gradients/scaling_to_norm.py", "_gradients/rescaling.py"
SKIPPING, THRESHOLDS = "_gradients/skipping.py", "_gradients/threshold_state.py"
MUTANTS = (
    Mutant(SKIPPING, "streak >= patience", "streak > patience", "watching", "patience_is_lost"),
    Mutant(SKIPPING, "state.stalled | (streak", "state.stalled & (streak", "watching", "patience_is_lost"),
    Mutant(SKIPPING, "not wraps and any(map(whole, mark))", "any(map(whole, mark))", "watching", "goes_on_counting"),
    Mutant(SKIPPING, 'hasattr(old, "projection")', "False", "watching", "not_forgotten"),
    Mutant(SKIPPING, "return new if mark is True else old", "return old", "watching", "begin_anew"),
    Mutant(SKIPPING, 'if watch == "norm" else _value', "if watch else _value", "watching", "a_loss_above"),
    Mutant(THRESHOLDS, "usable & (limit < largest", "(limit < largest", "watching", "zero_clip_nothing"),
    Mutant(THRESHOLDS, "norms / unit, jnp", "norms, jnp", "watching", "in_units_of"),
    Mutant(THRESHOLDS, ", limit * unit, largest", ", limit, largest", "watching", "fraction_of_their"),
    Mutant(SCALING, "norm + jnp.asarray(gamma", "norm - jnp.asarray(gamma", "scaling", "together or gamma"),
    Mutant(SCALING, "jnp.where(norm > 0, factor,", "jnp.where(norm < 0, factor,", "scaling", "together"),
    Mutant(SCALING, "jnp.where(jnp.isfinite(norm), factor,", "jnp.where(True, factor,", "scaling", "zero_and"),
    Mutant(RESCALING, "norm_of(counted, 2, axis_name,", "norm_of(counted, 2, None,", "scaling", "shard_map"),
    Mutant(RESCALING, "ones_like, total), chosen,", "ones_like, total), total,", "scaling", "selection"),
    Mutant(
        "_gradients/with_gradient.py",
        '{"grad": updates, **extra}',
        '{**extra, "grad": updates}',
        "pruning",
        "callers_own_wins",
    ),
    Mutant(
        "_gradients/clipping.py",
        "intervals.limit(x, -bound, bound)",
        "intervals.limit(x, -bound, 2 * bound)",
        "documents",
        "d1_clips",
    ),
    Mutant("_gradients/threshold_state.py", "jnp.where(jnp.isnan(old), new, new)", "new", "passes", "copied"),
    Mutant(
        "_gradients/threshold_state.py",
        "schedule(threshold)(count)",
        "schedule(threshold)(count + 1)",
        "clipping",
        "schedule",
    ),
    Mutant("_gradients/threshold_state.py", "finite & (measured > 0)", "finite", "threshold_state", "zero"),
    Mutant(
        "_gradients/threshold_state.py",
        "jnp.where(at, new.astype(old.dtype), old)",
        "new.astype(old.dtype)",
        "threshold_state",
        "nan or zero",
    ),
    Mutant(
        "_gradients/threshold_state.py",
        "jnp.where(limit > 0, jnp.minimum(limit, largest), largest)",
        "limit",
        "threshold_state",
        "positive or spam",
    ),
    Mutant(
        "_gradients/threshold_state.py",
        "return _compiled(_Same(rule)",
        "return _followed(_Same(rule)",
        "contract_debugging",
        "clip or warmup",
    ),
    Mutant("_gradients/skipping.py", "jnp.where(good, new, old)", "new", "skipping", "inner or nan"),
    Mutant(
        "_gradients/skipping.py", "jnp.isfinite(norm) & (norm <= limit)", "(norm <= limit)", "watching", "a_loss_above"
    ),
    Mutant(
        "_gradients/error_feedback.py",
        "finite & jnp.isfinite(total), (",
        "total == total, (",
        "threshold_state",
        "carry",
    ),
    Mutant(
        "_gradients/error_feedback.py",
        "(total - emitted).astype(old.dtype), old",
        "old, old",
        "threshold_state",
        "carry",
    ),
    Mutant(
        "_gradients/norm_clipping.py",
        "norm + jnp.asarray(eps, norm.dtype)",
        "norm - jnp.asarray(eps, norm.dtype)",
        "clipping",
        "clip_norm_matches",
    ),
    Mutant("_gradients/norm_clipping.py", "jnp.where(np.array(given), norm, -1)", "norm", "norm_clipping", "shifts"),
    Mutant(
        "_gradients/threshold_state.py",
        "value < 0, jnp.zeros_like(value), value",
        "value != value, value, value",
        "norm_clipping",
        "below_0",
    ),
    Mutant(
        "_gradients/threshold_state.py",
        "_spread(x, norms, norms.dtype)",
        "_spread(x, norms, jnp.float32)",
        "norm_clipping",
        "f64",
    ),
    Mutant(
        "_gradients/norm_clipping.py",
        "jnp.isfinite(norm), factor, jnp.full_like",
        "norm == norm, factor, jnp.full_like",
        "clipping",
        "non_finite",
    ),
    Mutant(
        "_gradients/threshold_state.py", "p if math.prod(p.shape) else jnp.zeros(())", "p", "clipping", "empty_leaf"
    ),
    Mutant("_gradients/error_feedback.py", " if np.size(p) else jnp.zeros((), dtype)", "", "clipping", "empty_leaf"),
)
