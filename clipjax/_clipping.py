"""Gradient clipping before the optimizer: by element and by norm."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax import _arguments as arguments
from clipjax import _grids as grids
from clipjax import _norms as norms
from clipjax import _trees as trees
from clipjax import selections
from clipjax._typing import Tree


class ClipState(NamedTuple):
    """State of `clip`.

    Attributes:
      count: i32, updates so far.
      threshold: f32, the threshold of the last update.
    """

    count: jax.Array  # type: ignore[assignment]
    threshold: jax.Array


class ClipNormState(NamedTuple):
    """State of `clip_norm`; per="leaf" holds one entry per leaf of the telemetry, in tree order.

    Attributes:
      count: i32, updates so far.
      clipped: i32, updates that were rescaled (any leaf of them).
      nonfinite: i32, updates whose norm was not finite (any leaf of them).
      norm_pre: f32, the norm before the clip.
      threshold: f32, the threshold of the last update.
      coefficient: f32, what the last update was multiplied by.
    """

    count: jax.Array  # type: ignore[assignment]
    clipped: jax.Array
    nonfinite: jax.Array
    norm_pre: jax.Array
    threshold: jax.Array
    coefficient: jax.Array


def clip(threshold: Any, *, select: selections.Selection | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Clip every gradient entry: :math:`\tilde g = \mathrm{clip}(g, -C, C)` (D1, D3, D4).

    NaN stays NaN and ±inf becomes ±C. The dtype of the gradient is kept.

    Args:
      threshold: C >= 0, a number (may be traced) or a schedule count -> C.
      select: which entries may be clipped, redrawn at every update; all by default.

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
    """
    select = _checked(threshold, select)

    def init_fn(params: Tree) -> ClipState:
        return ClipState(jnp.zeros((), jnp.int32), jnp.asarray(np.inf, jnp.float32))

    def update_fn(updates: Tree, state: ClipState, params: Tree = None, **extra: Any) -> Any:
        _real(updates)
        limit = jnp.asarray(arguments.schedule(threshold)(state.count), jnp.float32)
        chosen = selections.choose(select, updates, None, state.count)
        clipped = jax.tree.map(lambda g, m: _clip(g, limit, m), updates, chosen)
        return clipped, ClipState(optax.safe_increment(state.count), limit)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _clip(g: jax.Array, limit: jax.Array, chosen: jax.Array) -> jax.Array:
    largest = jnp.asarray(jnp.finfo(g.dtype).max, jnp.float32)  # a narrower dtype may not hold the threshold
    bound = jnp.where(jnp.isinf(limit), limit, jnp.minimum(limit, largest)).astype(g.dtype)
    return jnp.where(chosen, grids.limit(g, -bound, bound), g)


def clip_norm(
    threshold: Any,
    *,
    per: str = "global",
    ord: float = 2,
    eps: Any = 0.0,
    select: selections.Selection | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale gradients whose norm exceeds a threshold.

    .. math:: \tilde g = g \ \text{if}\ n \le C,\ \text{else}\ g \cdot C / (n + \epsilon),\quad n = \lVert g \rVert_p

    The norm is accumulated in f32 across leaves and is right wherever it is representable. Updates within the
    threshold are returned bit for bit, others are multiplied by one scalar in f32. A non-finite norm is counted and
    gives NaN in all that it governs. An infinite threshold only records.

    Args:
      threshold: C >= 0, a number (may be traced) or a schedule count -> C.
      per: "global", one norm for all leaves, or "leaf", one for each.
      ord: p > 0, infinity included.
      eps: added to the norm in the quotient; may be traced.
      select: which entries the norm is taken of and may be rescaled; all by default.

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
    select = _checked(threshold, select)
    arguments.choice(per, "per", ("global", "leaf"))
    arguments.static(ord, "ord")
    arguments.require(arguments.is_number(ord) and ord > 0, "ord", "be a number > 0", ord, "2 is the usual norm.")
    arguments.non_negative(eps, "eps", "It is added to a norm.")

    def init_fn(params: Tree) -> ClipNormState:
        shape = (len(trees.flatten(params)[0]) or 1,) if per == "leaf" else ()
        # arrays of their own: donation refuses shared ones
        count, clipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        norm, limit, factor = (jnp.full(shape, x, jnp.float32) for x in (0.0, jnp.inf, 1.0))
        return ClipNormState(count, clipped, nonfinite, norm, limit, factor)

    def update_fn(updates: Tree, state: ClipNormState, params: Tree = None, **extra: Any) -> Any:
        _real(updates)
        leaves, treedef = trees.flatten(updates)
        chosen, _ = trees.flatten(selections.choose(select, updates, None, state.count))
        picked = [_selected(g, m) for g, m in zip(leaves, chosen, strict=True)]
        if per == "leaf":
            norm = jnp.stack([norms.norm([x], ord) for x in picked] or [jnp.zeros(())])
        else:
            norm = norms.norm(picked, ord)
        limit = jnp.full_like(norm, arguments.schedule(threshold)(state.count))
        over = ~(norm <= limit)
        factor = _coefficient(norm, limit, eps)
        each = list(factor) if per == "leaf" else [factor] * len(leaves)
        scaled = [None if g is None else _scale(g, f, m) for g, f, m in zip(leaves, each, chosen, strict=False)]
        new_state = ClipNormState(
            optax.safe_increment(state.count),
            state.clipped + jnp.any(over).astype(jnp.int32),
            state.nonfinite + jnp.any(~jnp.isfinite(norm)).astype(jnp.int32),
            norm.astype(jnp.float32),
            limit.astype(jnp.float32),
            factor.astype(jnp.float32),
        )
        return treedef.unflatten(scaled), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _selected(g: Any, chosen: Any) -> jax.Array:
    """The entries that the norm is taken of; a leaf without a gradient counts as 0."""
    return jnp.zeros((1,)) if g is None else jnp.where(chosen, g, jnp.zeros_like(g))


def _coefficient(norm: jax.Array, limit: jax.Array, eps: Any) -> jax.Array:
    """1 within the threshold, C / (n + eps) above it, NaN for a norm that is not finite."""
    factor = jnp.where(norm <= limit, jnp.ones_like(norm), limit / (norm + eps))
    return jnp.where(jnp.isfinite(norm), factor, jnp.full_like(norm, math.nan))


def _scale(g: jax.Array, factor: jax.Array, chosen: jax.Array) -> jax.Array:
    wide = trees.wide(g.dtype)
    scaled = (g.astype(wide) * factor.astype(wide)).astype(g.dtype)
    return jnp.where(chosen & (factor != 1), scaled, g)  # a product with 1 would flush denormals


def _checked(threshold: Any, select: selections.Selection | None) -> selections.Selection:
    arguments.non_negative(threshold, "threshold", "Use math.inf to record without clipping.")
    if threshold is None or isinstance(threshold, str):
        raise TypeError(f"`threshold` must be a number or a schedule, got {threshold!r}. Give C >= 0.")
    select = selections.everything() if select is None else select
    selections.check(select)
    return select


def _real(updates: Tree) -> None:
    """Refuse what cannot be clipped."""
    for path, g in zip(trees.paths(updates), trees.flatten(updates)[0], strict=True):
        if g is not None and not jnp.issubdtype(g.dtype, jnp.floating):
            raise TypeError(
                f"`updates` must be real floats, got {g.dtype} at {path!r}. Split complex gradients with"
                " `optax.contrib.split_real_and_imaginary`, and mask integer leaves with `optax.masked`."
            )
