"""`skip_spikes`: leaves out a whole update, where a clip would only scale the gradient down."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes, trees
from clipjax._gradients import incoming, rescaling, threshold_state
from clipjax._maths import norms
from clipjax.typing import State, Threshold, Tree


class SkipState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      count: i32, updates so far.
      skipped: i32, updates that were left out.
      nonfinite: i32, the skipped updates whose norm was not finite.
      norm_pre: f32 (f64 where a param is f64), the norm of the last gradient; the last value with watch="value".
      threshold: likewise, the threshold of the last update; the largest float where every finite norm passes.
      rule: the state of a rule; () without a rule.
      inner: the state of the inner transformation.
      streak: i32, how many updates in a row were skipped up to the last one; () without `patience`.
      stalled: bool, whether `patience` updates in a row have been skipped since `init`; () without it.
    """

    count: jax.Array  # type: ignore[assignment]
    skipped: jax.Array
    nonfinite: jax.Array
    norm_pre: jax.Array
    threshold: jax.Array
    rule: State
    inner: State
    streak: State = ()
    stalled: State = ()


def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Threshold | None = None,
    *,
    watch: Literal["norm", "value"] = "norm",
    patience: int | None = None,
    reset_moments: bool = False,
    axis_name: incoming.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leave out updates whose gradient norm, or loss, exceeds a threshold or is not finite.

    .. math:: u = \mathrm{inner}(g) \ \text{if}\ n \le C,\ \text{else}\ 0, \quad n = \lVert g \rVert_2

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
      watch: "norm", or "value" for n = `value`, an extra argument of `update` as Optax's line searches take it, usually
        the loss: ``tx.update(grads, state, params, value=loss)``. It is then all that is looked at: for both, put one
        `skip_spikes` around another. Rules are made for positive numbers: losses that are not positive enter no
        history, and are never above a threshold. On several devices it must be the same on all. Static.
      patience: after so many skipped updates in a row, `clipjax.report` shows ``stalled`` and `clipjax.check` a
        violation, from then on: a threshold that no update meets any more stops a training in silence. None for never.
        Static.
      reset_moments: True to forget at a skipped update what the optimizer remembers of gradients, as SPAM does: arrays
        in `inner` that belong to params begin anew, and so do counts beside them, as Adam's; those of schedules, of
        wrappers such as `optax.inject_hyperparams`, and of transformations of clipjax go on, and masks, grids and
        latent weights stay. Static.
      axis_name: inside `jax.shard_map`, the mesh axes that gradients are split over, across which the norm is added up,
        as in `clip_norm`. Without it every device would decide by the norm of its own shard.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN threshold, or several numbers.
      TypeError: for an `inner` that is no transformation, a missing threshold or one of another kind; at update, for
        complex or integer gradients.
      ValueError: also for a `patience` below 1; at update, for a missing `value`, and params that `relative` needs.

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
      Levanter, `levanter.optim.skipstep`; Chowdhery et al., "PaLM", 2022, section 5.1. Huang et al., "SPAM", 2025,
      https://arxiv.org/abs/2501.06842, for `reset_moments`. D3, section 5.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):  # `optax.MultiSteps` has no other mark
        raise TypeError(
            f"`inner` must be a gradient transformation, got {inner!r}."
            " Give the optimizer first: `skip_spikes(optax.adam(1e-3), 10.0)`."
        )
    thresholds = threshold_state.for_norms(threshold)
    arguments.choice(watch, "watch", ("norm", "value"))
    remedy = "A loss has no unit in common with weights."
    arguments.require(watch == "norm" or not thresholds.relative, "threshold", "not be relative", threshold, remedy)
    arguments.static(patience, "patience")
    if patience is not None:
        arguments.whole(patience, "patience", low=1, remedy="It counts updates in a row.")
    arguments.choice(reset_moments, "reset_moments", (False, True))
    inside = optax.with_extra_args_support(inner)

    def init_fn(params: Tree) -> SkipState:
        count, skipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        dtype = dtypes.widest(jax.tree.leaves(params))
        norm, limit = jnp.zeros((), dtype), jnp.asarray(dtypes.largest(dtype), dtype)
        rows = () if patience is None else (jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        return SkipState(count, skipped, nonfinite, norm, limit, thresholds.init(norm), inside.init(params), *rows)

    def watched(tree: Tree) -> jax.Array:
        named = trees.governed(tree)
        paths, leaves = [path for path, _ in named], [g for _, g in named]
        axes = None if axis_name is None else incoming.sharded_over(axis_name, paths, leaves)
        return norms.norm(leaves, axes=axes)

    def update_fn(
        updates: Tree, state: SkipState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, SkipState]:
        trees.check_kind(state, SkipState)
        incoming.check_real(updates)
        norm = watched(updates) if watch == "norm" else _value(extra, state.norm_pre.dtype)
        weights = watched(rescaling.of_weights(updates, params)) if thresholds.relative else None
        limit, history = thresholds.update(state.count, norm, state.rule, (), weights)
        good = jnp.isfinite(norm) & (norm <= limit)
        # selects and not `lax.cond`: they fuse with the optimizer, and a donated state is updated in place
        emitted, new_inner = inside.update(updates, state.inner, params, **extra)
        emitted = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), emitted)
        if reset_moments:
            remedy = "Moments begin anew: `tx.update(grads, state, params)`."
            arguments.require(params is not None, "params", "be given", params, remedy)
        old_inner = _forgotten(state.inner, inside, params) if reset_moments else state.inner
        new_inner = jax.tree.map(lambda new, old: jnp.where(good, new, old), new_inner, old_inner)
        rows: tuple[jax.Array, ...] = ()
        if patience is not None:
            trees.check_state(isinstance(state.streak, jax.Array), "no streak although `patience` is given")
            streak = jnp.where(good, jnp.zeros_like(state.streak), optax.safe_increment(state.streak))
            rows = streak, state.stalled | (streak >= patience)
        return emitted, SkipState(
            optax.safe_increment(state.count),
            state.skipped + (~good).astype(jnp.int32),
            state.nonfinite + (~jnp.isfinite(norm)).astype(jnp.int32),
            threshold_state.recorded(state.norm_pre, norm),
            threshold_state.recorded(state.threshold, limit),
            history,
            new_inner,
            *rows,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _value(extra: dict[str, object], dtype: DTypeLike) -> jax.Array:
    """The value that was handed in."""
    value = extra.get("value")
    remedy = "Hand in the loss: `tx.update(grads, state, params, value=loss)`."
    arguments.require(value is not None, "value", "be given", value, remedy)
    number = jnp.asarray(value)
    real = number.ndim == 0 and jnp.issubdtype(number.dtype, jnp.floating)
    arguments.require(real, "value", "be one float", f"{number.dtype} of shape {number.shape}", remedy)
    return number.astype(dtype)


def _forgotten(state: State, inner: optax.GradientTransformation, params: Tree) -> State:
    """The state with moments at their start, and the counts that stand directly beside them; all else stays.

    Moments are what belongs to params. Beside the state of another transformation nothing else begins anew: what wraps
    it, as `optax.inject_hyperparams`, `optax.MultiSteps` and ourselves, has counts for other ends than moments.
    """
    moments = optax.tree.map_params(inner, lambda x: True, state, transform_non_params=lambda x: False)
    like_params = trees.paths(params)

    def named(node: State) -> bool:
        return isinstance(node, tuple) and hasattr(node, "_fields") and not isinstance(node, optax.MaskedNode)

    def whole(mark: State) -> bool:
        """True for the moments of one transformation: a tree of them, which holds no state of another one."""
        leaves = jax.tree.leaves(mark)
        states = [x for x in jax.tree.leaves(mark, is_leaf=named) if named(x)]
        return bool(leaves) and all(leaves) and (not states or trees.paths(mark) == like_params)

    def reset(old: State, new: State, mark: State) -> State:
        if hasattr(old, "projection"):  # masks, grids and latent weights are no memory of gradients
            kept: State = old
            return kept._replace(inner=reset(kept.inner, new.inner, mark.inner))
        if isinstance(old, dict):
            return type(old)((key, reset(old[key], new[key], mark[key])) for key in old)
        if not isinstance(old, tuple | list):
            return new if mark is True else old
        wraps = any(named(x) for field in mark for x in jax.tree.leaves(field, is_leaf=named) if not whole(field))
        if named(old) and not wraps and any(map(whole, mark)):
            return new
        parts = map(reset, old, new, mark)
        return type(old)(*parts) if hasattr(old, "_fields") else type(old)(parts)

    return reset(state, inner.init(params), moments)
