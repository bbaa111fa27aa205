"""Breaks of clipjax/_gradients."""

from breaks.mutant import Mutant

MUTANTS = (
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
        "jnp.where(limit > 0, limit, jnp.inf)",
        "limit",
        "threshold_state",
        "positive or spam",
    ),
    Mutant("_gradients/skipping.py", "jnp.where(good, new, old)", "new", "skipping", "inner or nan"),
    Mutant("_gradients/skipping.py", "jnp.isfinite(norm) & (norm <= limit)", "(norm <= limit)", "skipping", "inf"),
    Mutant(
        "_gradients/error_feedback.py",
        "finite & jnp.isfinite(total), total",
        "total == total, total",
        "threshold_state",
        "carry",
    ),
    Mutant("_gradients/error_feedback.py", "total - emitted, old", "old, old", "threshold_state", "carry"),
    Mutant(
        "_gradients/norm_clipping.py", "limit / (norm + eps)", "limit / (norm - eps)", "clipping", "clip_norm_matches"
    ),
    Mutant(
        "_gradients/norm_clipping.py",
        "jnp.isfinite(norm), factor, jnp.full_like",
        "norm == norm, factor, jnp.full_like",
        "clipping",
        "non_finite",
    ),
    Mutant("_gradients/threshold_state.py", "p if np.size(p) else jnp.zeros(())", "p", "clipping", "empty_leaf"),
    Mutant("_gradients/error_feedback.py", " if np.size(p) else jnp.zeros((), dtype)", "", "clipping", "empty_leaf"),
)
