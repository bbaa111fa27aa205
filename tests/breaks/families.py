"""Breaks of the public families."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant(
        "structures.py", "(other == groups) & (j < place)", "(other == groups) & (j > place)", "structures", "n_of_m"
    ),
    Mutant("structures.py", "rank < n,", "rank <= n,", "structures", "n_of_m"),
    Mutant("structures.py", "math.prod(sizes[i:]) % m == 0", "True", "structures", "several_axes"),
    Mutant(
        "structures.py",
        "totals(scores) / totals(jnp.ones_like(scores))",
        "totals(scores) / (height * width)",
        "structures",
        "block",
    ),
    Mutant("scores.py", "-weight * grad", "weight * grad", "scores", "movement"),
    Mutant("scores.py", "jnp.square(w) * f.astype", "w * f.astype", "scores", "fisher"),
    Mutant("scores.py", "sizes = jax.tree.map(jnp.abs, params)", "sizes = params", "scores", "synflow"),
    Mutant("scores.py", "decay * average + (1 - decay)", "0 * average + (1 - decay)", "scores", "averages_over"),
    Mutant("scores.py", "jnp.abs(weight * grad)", "jnp.abs(weight + grad)", "scores documents pruning", "taylor"),
    Mutant(
        "structures.py",
        "range(scores.ndim) if i not in own",
        "range(scores.ndim) if i in own",
        "pruning",
        "unit",
    ),
    Mutant("steps.py", "0.7 * fitting.mean_size", "0.0 * fitting.mean_size", "steps", "twn"),
    Mutant(
        "steps.py",
        "fitting.over(jnp.max, jnp.abs(x), axes) / grids.top(bits)",
        "fitting.over(jnp.max, x, axes) / grids.top(bits)",
        "steps",
        "absmax",
    ),
    Mutant("widths.py", "energy[:, None] >= ratio * noise", "energy[:, None] <= ratio * noise", "leaf_grid", "sqnr"),
    Mutant("widths.py", "(cost <= left)", "(cost < left)", "leaf_grid", "budget"),
    Mutant("roundings.py", "(sigmoid(t) - sigmoid(1.0))", "sigmoid(t)", "roundings", "parq_matches"),
    Mutant("roundings.py", "(1 - t) * ratio + t * code", "ratio", "roundings", "relax"),
    Mutant("thresholds.py", "clipped - new_mean, 1 - decay", "clipped - mean, 1 - decay", "thresholds", "zscore"),
    Mutant("thresholds.py", "jnp.minimum(average, clipped)", "clipped", "thresholds", "ema_ratio"),
    Mutant("thresholds.py", "rest - lr *", "rest + lr *", "thresholds", "quantile_track"),
    Mutant("thresholds.py", "mean + k * sigma", "mean + sigma", "thresholds", "mean_sigma"),
    Mutant("widths.py", "cost, 0), dtype=jnp.int32)", "cost, 0))", "choosing", "x64"),
    Mutant(
        "projections.py",
        "jnp.where(beyond & jnp.isfinite(x), within, x)",
        "jnp.where(beyond, within, x)",
        "projections",
        "finite",
    ),
    Mutant("projections.py", "reached * (1 - short * unit) / norm", "reached / norm", "projections", "max_norm_holds"),
    Mutant("projections.py", "jnp.where(beyond, limit, jnp.ones_like(norm))", "limit", "contract_derivatives", "huge"),
    Mutant("projections.py", "shown = dtypes.narrowed(x, p.dtype)", "shown = x", "projections", "max_norm_holds"),
    Mutant(
        "projections.py",
        "None if intervals.encloses_zero(bound) else outward",
        "Projection(check, apply)",
        "clamping",
        "without_0",
    ),
    Mutant(
        "scores.py",
        "sharding.laid_as(jax.random.uniform(k, x.shape), x)",
        "jax.random.uniform(k, x.shape)",
        "explicit_axes",
    ),
    Mutant("steps.py", "high <= grids.top(bits) * common, common", "high < 0, common", "levels", "bit_for_bit"),
    Mutant("steps.py", "sides=lambda x: (-x, x)", "sides=lambda x: (x, x)", "leaf_grid", "affine"),
)
