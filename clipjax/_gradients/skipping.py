"""`skip_spikes`: leaves out a whole update, where a clip would only scale the gradient down."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import dtypes, trees
from clipjax._gradients import incoming, threshold_state
from clipjax._maths import norms
from clipjax.typing import State, Threshold, Tree


class SkipState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      count: i32, updates so far.
      skipped: i32, updates that were left out.
      nonfinite: i32, the skipped updates whose norm was not finite.
      norm_pre: f32 (f64 where a param is f64), the norm of the last gradient.
      threshold: likewise, the threshold of the last update; the largest float where every finite norm passes.
      rule: the state of a rule; () without a rule.
      inner: the state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]
    skipped: jax.Array
    nonfinite: jax.Array
    norm_pre: jax.Array
    threshold: jax.Array
    rule: State
    inner: State


def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Threshold | None = None,
    *,
    axis_name: incoming.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leave out updates whose gradient norm exceeds a threshold or is not finite.

    .. math:: u = \mathrm{inner}(g) \ \text{if}\ \lVert g \rVert_2 \le C,\ \text{else}\ 0

    A skipped update is zero, is counted, and leaves the inner state as it was, moments and counts included. Put
    transformations that constrain weights (`clamp_weights`, `prune_mask`, `fake_quantize`) outside and behind it: their
    constraints then hold after skipped updates too.

    Args:
      inner: the transformation to skip, usually the optimizer.
      threshold: required. C >= 0, in the unit of the global 2-norm: a number (may be traced; below 0 it then counts as
        0), a schedule count -> C, or a rule of `clipjax.thresholds`; infinity skips only norms that are not finite. A
        rule is updated with the norms of skipped updates too. `mean_sigma`, `percentile` and `quantile_track` therefore
        follow a lasting rise of the norm. `ema_ratio` and `zscore` average min(n, C): after such a rise the first may
        skip hundreds of updates, the second all.
      axis_name: inside `jax.shard_map`, the mesh axes that gradients are split over, across which the norm is added up,
        as in `clip_norm`. Without it every device would decide by the norm of its own shard.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN threshold, or several numbers.
      TypeError: for an `inner` that is no transformation, a missing threshold or one of another kind; at update, for
        complex or integer gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = skip_spikes(optax.sgd(1.0), 10.0)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([30.0, 40.0]), jnp.array([jnp.nan, 0.0])):
      ...     updates, state = tx.update(grads, state, params)
      ...     print(updates.tolist(), int(state.skipped))
      [-3.0, -4.0] 0
      [0.0, 0.0] 1
      [0.0, 0.0] 2

    References:
      Levanter, `levanter.optim.skipstep`; Chowdhery et al., "PaLM", 2022, section 5.1. D3, section 5.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):  # `optax.MultiSteps` has no other mark
        raise TypeError(
            f"`inner` must be a gradient transformation, got {inner!r}."
            " Give the optimizer first: `skip_spikes(optax.adam(1e-3), 10.0)`."
        )
    thresholds = threshold_state.for_norms(threshold)
    inside = optax.with_extra_args_support(inner)

    def init_fn(params: Tree) -> SkipState:
        count, skipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        dtype = dtypes.widest(jax.tree.leaves(params))
        norm, limit = jnp.zeros((), dtype), jnp.asarray(dtypes.largest(dtype), dtype)
        return SkipState(count, skipped, nonfinite, norm, limit, thresholds.init(norm), inside.init(params))

    def update_fn(
        updates: Tree, state: SkipState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, SkipState]:
        trees.check_kind(state, SkipState)
        incoming.check_real(updates)
        named = trees.governed(updates)
        paths, leaves = [path for path, _ in named], [g for _, g in named]
        axes = None if axis_name is None else incoming.sharded_over(axis_name, paths, leaves)
        norm = norms.norm(leaves, axes=axes)
        limit, history = thresholds.update(state.count, norm, state.rule, ())
        good = jnp.isfinite(norm) & (norm <= limit)
        # selects and not `lax.cond`: they fuse with the optimizer, and a donated state is updated in place
        emitted, new_inner = inside.update(updates, state.inner, params, **extra)
        emitted = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), emitted)
        new_inner = jax.tree.map(lambda new, old: jnp.where(good, new, old), new_inner, state.inner)
        return emitted, SkipState(
            optax.safe_increment(state.count),
            state.skipped + (~good).astype(jnp.int32),
            state.nonfinite + (~jnp.isfinite(norm)).astype(jnp.int32),
            threshold_state.recorded(state.norm_pre, norm),
            threshold_state.recorded(state.threshold, limit),
            history,
            new_inner,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
