"""Gradient clipping before the optimizer: by element and by norm."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax import selections
from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax._gradients import threshold_state
from clipjax._maths import intervals, norms
from clipjax.typing import Rule, Selection, Tree


class ClipState(NamedTuple):
    """State of `clip`.

    Attributes:
      count: i32, updates so far.
      threshold: f32, the threshold of the last update; NaN for a rule, which has one for every entry.
      rule: the state of a rule, a value for every entry; () without one.
      carry: f32 like the gradients, what was cut and comes back; () without carry.
    """

    count: jax.Array  # type: ignore[assignment]
    threshold: jax.Array
    rule: Any
    carry: Any


class ClipNormState(NamedTuple):
    """State of `clip_norm`; per="leaf" holds one entry per leaf of the telemetry, in tree order.

    Attributes:
      count: i32, updates so far.
      clipped: i32, updates that were rescaled (any leaf of them).
      nonfinite: i32, updates whose norm was not finite (any leaf of them).
      norm_pre: f32, the norm before the clip.
      threshold: f32, the threshold of the last update; infinite where nothing was clipped by a rule that has none.
      coefficient: f32, what the last update was multiplied by.
      rule: the state of a rule; () without one.
      carry: f32 like the gradients, what was cut and comes back; () without carry.
    """

    count: jax.Array  # type: ignore[assignment]
    clipped: jax.Array
    nonfinite: jax.Array
    norm_pre: jax.Array
    threshold: jax.Array
    coefficient: jax.Array
    rule: Any
    carry: Any


def clip(
    threshold: Any, *, select: Selection | None = None, carry: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Clip every gradient entry: :math:`\tilde g = \mathrm{clip}(g, -C, C)` (D1, D3, D4).

    NaN stays NaN and ±inf becomes ±C. The dtype of the gradient is kept. With ``carry=True`` what was cut is added to
    the next gradient (U-Clip): :math:`\tilde g = \mathrm{clip}(g + \Delta, -C, C)`,
    :math:`\Delta \leftarrow g + \Delta - \tilde g`, so that clipping does not bias the sum of the gradients. It is for
    thresholds above the usual gradient: under one that is always exceeded the carry grows without bound.

    It keeps no norms and counts nothing: that would cost a pass over the gradients. `clip_norm(math.inf)` records.

    Args:
      threshold: C >= 0, a number (may be traced), a schedule count -> C, or a rule of `clipjax.thresholds` such as
        `spam()`, which then follows the magnitude of every entry with a state of its own.
      select: which entries may be clipped, redrawn at every update; all by default.
      carry: add what was cut to the next gradient, 4 bytes a parameter. Static.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN threshold.
      TypeError: for complex or integer gradients, at update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip(0.01)
      >>> grads = jnp.array([-3.0, 0.005, jnp.inf])
      >>> [round(x, 4) for x in tx.update(grads, tx.init(grads))[0].tolist()]
      [-0.01, 0.005, 0.01]

    References:
      D1, section 3.3; D3, section 3, step 5; D4, section 3.1.
      Elesedy and Hutter, "U-Clip: On-Average Unbiased Stochastic Gradient Clipping", 2023,
      https://arxiv.org/abs/2302.02971.
    """
    select = _checked(threshold, select, carry)
    rule = threshold if isinstance(threshold, Rule) else None
    if rule is not None:
        shapes = [jnp.shape(x) for x in jax.tree.leaves(rule.init())]
        remedy = "Every entry keeps a state of its own: use a rule of scalars such as `spam()`, or `clip_norm`."
        arguments.require(not any(shapes), "threshold", "remember single numbers", shapes, remedy)

    def init_fn(params: Tree) -> ClipState:
        def each(field: jax.Array) -> Tree:
            return jax.tree.map(lambda p: _zeros(p, field.dtype) + field, params)

        history = () if rule is None else jax.tree.map(each, rule.init())
        limit = jnp.asarray(np.inf if rule is None else np.nan, jnp.float32)
        return ClipState(jnp.zeros((), jnp.int32), limit, history, _nothing(params) if carry else ())

    def update_fn(updates: Tree, state: ClipState, params: Tree = None, **extra: Any) -> Any:
        norms.check_real(updates)
        total = _total(updates, state.carry)
        chosen = selections.choose(select, total, None, state.count)
        if rule is None:
            limit, history = threshold_state.follow(threshold, state.count, state.threshold, (), zeros=True)
            limit = threshold_state.recorded(state.threshold, limit)
            clipped = jax.tree.map(lambda x, m: _clip(x, limit, m), total, chosen)
        else:
            limits, history = _entry_limits(rule, state, total)
            limit, clipped = state.threshold, jax.tree.map(_clip, total, limits, chosen)
        emitted, left = _emit(clipped, updates, total, state.carry, itertools.repeat(True))
        return emitted, ClipState(optax.safe_increment(state.count), limit, history, left)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _entry_limits(rule: Rule, state: ClipState, total: Tree) -> tuple[Tree, Any]:
    """The limit of every entry, and the state of the rule: the tree of its own state, each number as a tree of arrays.

    The magnitudes of entries may be 0, unlike norms.
    """
    shape: Any = jax.tree.structure(rule.init())
    fields = [trees.flatten(field) for field in shape.flatten_up_to(state.rule)]
    leaves, treedef = trees.flatten(total)
    limits: list[Any] = []
    columns: list[list[Any]] = []
    for x, *column in zip(leaves, *(values for values, _ in fields), strict=True):
        limit = None
        if x is not None and not x.size:
            limit = jnp.asarray(jnp.inf, jnp.float32)
        elif x is not None:
            history = shape.unflatten(column)
            limit, history = threshold_state.follow(rule, state.count, jnp.abs(x), history, zeros=True)
            column = jax.tree.leaves(history)
        limits.append(limit)
        columns.append(column)
    values = [structure.unflatten([column[i] for column in columns]) for i, (_, structure) in enumerate(fields)]
    return treedef.unflatten(limits), shape.unflatten(values)


def _clip(x: jax.Array, limit: jax.Array, chosen: jax.Array) -> jax.Array:
    return elementwise.where(chosen, _limited(x, limit), x)


@elementwise.leafwise
def _limited(x: jax.Array, limit: jax.Array) -> jax.Array:
    # a narrower dtype may not hold the threshold
    largest = jnp.float32(min(float(jnp.finfo(dtype).max) for dtype in (x.dtype, jnp.float32)))
    bound = elementwise.where(limit == jnp.inf, limit, jnp.minimum(limit, largest)).astype(x.dtype)
    return intervals.limit(x, -bound, bound)


def clip_norm(
    threshold: Any,
    *,
    per: str = "global",
    ord: float = 2,
    eps: Any = 0.0,
    select: Selection | None = None,
    carry: bool = False,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale gradients whose norm exceeds a threshold.

    .. math:: \tilde g = g \ \text{if}\ n \le C,\ \text{else}\ g \cdot C / (n + \epsilon),\quad n = \lVert g \rVert_p

    The norm is accumulated in f32 across leaves and is right wherever it is representable. Updates within the
    threshold are returned bit for bit, others are multiplied by one scalar in f32. A non-finite norm is counted and
    gives NaN in all that it governs. An infinite threshold only records, norms that are finite. A rule keeps norms that
    are not finite, and norms of exactly 0, out of its history.

    Args:
      threshold: C >= 0, a number (may be traced), a schedule count -> C, or a rule of `clipjax.thresholds` that
        follows the norms before the clip.
      per: "global", one norm for all leaves, or "leaf", one for each, a rule then having a state for each.
      ord: p > 0, infinity included. Static.
      eps: added to the norm in the quotient; may be traced.
      select: which entries the norm is taken of and may be rescaled; all by default.
      carry: add what was cut to the next gradient, 4 bytes a parameter, see `clip`. Static.
      axis_name: inside `shard_map`, the name or names of the mesh axes to add up across. An array counts as sharded
        over those that it varies over; where `shard_map(check_vma=False)` does not tell, over all of them. `per_leaf`
        names the axes of each leaf (None or () for replicated ones). Under plain `jit` nothing is needed.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN threshold or eps, an unknown `per`, or p <= 0.
      TypeError: for complex or integer gradients, at update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> [round(x, 4) for x in updates["w"].tolist()]
      [0.6, 0.8]

    References:
      Pascanu et al., 2013, https://arxiv.org/abs/1211.5063. D3, section 2, item 2.
    """
    select = _checked(threshold, select, carry)
    arguments.choice(per, "per", ("global", "leaf"))
    arguments.static(ord, "ord")
    arguments.require(arguments.is_number(ord) and ord > 0, "ord", "be a number > 0", ord, "2 is the usual norm.")
    arguments.non_negative(eps, "eps", "It is added to a norm.")

    def init_fn(params: Tree) -> ClipNormState:
        shape = (len(trees.flatten(params)[0]) or 1,) if per == "leaf" else ()
        # arrays of their own: donation refuses shared ones
        count, clipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        norm, limit, factor = (jnp.full(shape, x, jnp.float32) for x in (0.0, jnp.inf, 1.0))
        history = threshold_state.begin(threshold, norm)
        left = _nothing(params) if carry else ()
        return ClipNormState(count, clipped, nonfinite, norm, limit, factor, history, left)

    def update_fn(updates: Tree, state: ClipNormState, params: Tree = None, **extra: Any) -> Any:
        norms.check_real(updates)
        total = _total(updates, state.carry)
        chosen = selections.choose(select, total, None, state.count)
        norm = _norm(total, chosen, per, ord, axis_name)
        limit, history = threshold_state.follow(threshold, state.count, norm, state.rule, zeros=False)
        most = limit.astype(norm.dtype)
        factor = _coefficient(norm, most, eps)
        leaves, treedef = trees.flatten(total)
        factors = list(factor)[: len(leaves)] if per == "leaf" else [factor] * len(leaves)
        rows = zip(leaves, factors, trees.flatten(chosen)[0], strict=True)
        scaled = treedef.unflatten([None if x is None else elementwise.where(m, _scaled(x, f), x) for x, f, m in rows])
        emitted, left = _emit(scaled, updates, total, state.carry, [jnp.isfinite(f) for f in factors])
        new_state = ClipNormState(
            optax.safe_increment(state.count),
            state.clipped + jnp.any(jnp.isfinite(norm) & (norm > most)).astype(jnp.int32),
            state.nonfinite + jnp.any(~jnp.isfinite(norm)).astype(jnp.int32),
            threshold_state.recorded(state.norm_pre, norm.astype(jnp.float32)),
            threshold_state.recorded(state.threshold, limit),
            threshold_state.recorded(state.coefficient, factor.astype(jnp.float32)),
            history,
            left,
        )
        return emitted, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _norm(total: Tree, chosen: Tree, per: str, ord: float, axis_name: Any) -> jax.Array:
    """The norm of the chosen entries: one, or one per leaf, where a leaf without a gradient counts as 0."""
    leaves, _ = trees.flatten(total)
    masks, _ = trees.flatten(chosen)
    picked = [
        jnp.zeros((1,)) if x is None else elementwise.where(m, x, jnp.zeros_like(x))
        for x, m in zip(leaves, masks, strict=True)
    ]
    axes = None if axis_name is None else norms.sharded_over(axis_name, trees.paths(total), picked)
    if per == "leaf":
        return norms.norm(picked, ord, axes=axes, each=True) if picked else jnp.zeros((1,))
    return norms.norm(picked, ord, axes=axes)


def _coefficient(norm: jax.Array, limit: jax.Array, eps: Any) -> jax.Array:
    """1 within the threshold, C / (n + eps) above it, NaN for a norm that is not finite."""
    factor = jnp.where(norm <= limit, jnp.ones_like(norm), limit / (norm + eps))
    return jnp.where(jnp.isfinite(norm), factor, jnp.full_like(norm, math.nan))


@elementwise.leafwise
def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    wide = dtypes.wide(x.dtype)
    scaled = (x.astype(wide) * factor.astype(wide)).astype(x.dtype)
    return elementwise.where(factor != 1, scaled, x)  # a product with 1 would flush denormals


def _nothing(params: Tree) -> Tree:
    """The carry before anything was cut."""
    return jax.tree.map(lambda p: _zeros(p, dtypes.wide(p.dtype)), params)


def _zeros(p: jax.Array, dtype: Any) -> jax.Array:
    """An array like the param; a number for an empty one, as Orbax saves no empty arrays."""
    return jnp.zeros_like(p, dtype=dtype) if np.size(p) else jnp.zeros((), dtype)


def _total(updates: Tree, carry: Tree) -> Tree:
    """The gradients with what was cut before, in computing dtype; as they are without a carry."""
    if isinstance(carry, tuple) and not carry:
        return updates
    leaves, treedef = trees.flatten(updates)
    pairs = zip(leaves, trees.flatten(carry)[0], strict=True)
    return treedef.unflatten([None if g is None else dtypes.widened(g) + c for g, c in pairs])


def _emit(limited: Tree, updates: Tree, total: Tree, carry: Tree, finite: Any) -> tuple[Tree, Tree]:
    """The limited gradients in their own dtype, and what was cut; where something is not finite the carry stays."""
    if isinstance(carry, tuple) and not carry:
        return limited, ()
    emitted = jax.tree.map(lambda x, g: _fitted(x, g.dtype), limited, updates)
    held, treedef = trees.flatten(carry)
    columns = zip(held, trees.flatten(total)[0], trees.flatten(emitted)[0], finite, strict=False)
    left = treedef.unflatten([_left(*column) for column in columns])
    return jax.tree.map(lambda x, g: x.astype(g.dtype), emitted, updates), left


def _fitted(x: jax.Array, dtype: Any) -> jax.Array:
    """What the dtype of the gradient holds of it; a finite one stays finite, what does not fit is left to the carry."""
    largest = jnp.asarray(jnp.finfo(dtype).max).astype(x.dtype)
    return dtypes.narrowed(elementwise.where(jnp.isfinite(x), intervals.limit(x, -largest, largest), x), dtype)


def _left(old: Any, total: Any, emitted: Any, finite: Any) -> Any:
    if total is None or not total.size:
        return old
    return elementwise.where(finite & jnp.isfinite(total), total - emitted, old)


def _checked(threshold: Any, select: Selection | None, carry: Any) -> Selection:
    threshold_state.check(threshold)
    arguments.static(carry, "carry")
    select = selections.everything() if select is None else select
    selections.check(select)
    return select
