"""`clip_norm`: gradients rescaled by their norm, of all arrays together or of each, before the optimizer."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax._gradients import error_feedback, incoming, threshold_state
from clipjax._maths import drawing, norms
from clipjax.typing import Number, Selection, State, Threshold, Tree


class ClipNormState(NamedTuple):
    """State of `clip_norm`. With per="leaf" the three f32 fields have one entry for each leaf, in tree order.

    Attributes:
      count: i32, updates so far.
      clipped: i32, updates in which at least one norm exceeded its threshold.
      nonfinite: i32, updates in which at least one norm was not finite.
      norm_pre: f32, the norm before the clip.
      threshold: f32, the threshold of the last update; infinite where a rule clips nothing.
      coefficient: f32, the factor by which the last gradient was multiplied.
      rule: the state of a rule; () without a rule.
      carry: the error feedback: what clips have removed and not yet given back, f32 (f64 for f64 params) arrays like
        the params; () without `carry=True`.
    """

    count: jax.Array  # type: ignore[assignment]
    clipped: jax.Array
    nonfinite: jax.Array
    norm_pre: jax.Array
    threshold: jax.Array
    coefficient: jax.Array
    rule: State
    carry: State


def clip_norm(
    threshold: Threshold,
    *,
    per: Literal["global", "leaf"] = "global",
    ord: float = 2,
    eps: Number = 0.0,
    select: Selection | None = None,
    carry: bool = False,
    axis_name: incoming.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale gradients whose norm exceeds a threshold.

    .. math:: \tilde g = g \ \text{if}\ n \le C,\ \text{else}\ g \cdot C / (n + \epsilon),\quad n = \lVert g \rVert_p

    g is the whole gradient or one array of it (`per`), n its norm, and C the threshold. Where all entries are selected,
    g keeps its direction. A g of finite norm n <= C is returned bit for bit. The selected entries of a g of finite norm
    n > C are multiplied by one factor, in f32 (f64 for f64 gradients), and cast back to their dtype. The norm is
    accumulated in f32 (f64), of scaled entries where their squares would overflow or vanish: it is right wherever a
    float can hold it.

    A norm that is NaN or infinite makes all selected entries NaN, even with C = inf, and the state counts the update
    (`nonfinite` in `clipjax.report`). To leave such updates out instead, use `skip_spikes`. ``clip_norm(math.inf)``
    clips no gradient of finite norm, and `clipjax.report` then gives the norms.

    Args:
      threshold: C >= 0, in the unit of the norm: a number (may be traced), a schedule count -> C, or a rule of
        `clipjax.thresholds` such as `zscore()`, which computes C from the norms before the clip. Norms that are 0 or
        not finite are never added to a rule's history. A rule's C <= 0 clips nothing; a C of 0 from a number or a
        schedule makes the selected entries of every gradient of finite norm 0.
      per: "global": one norm and one factor for all arrays together. "leaf": one for each array, compared with the same
        C; a rule then keeps a state and computes a C for each array.
      ord: p > 0 in :math:`n = (\sum |g|^p)^{1/p}`; 2 is the Euclidean norm, `math.inf` the largest magnitude. Static.
      eps: ε >= 0, added to n where C is divided by it, so that the clipped norm falls short of C by about C ε / n. May
        be traced.
      select: a selection of `clipjax.selections`, such as `largest(0.1)` or `bernoulli(0.5, key=key)`, evaluated at
        every update: n is the norm of the selected entries, and only these are rescaled; the others pass unchanged. By
        default all are selected.
      carry: True for error feedback: the state keeps the part of g that the clip removed and adds it to the next
        gradient before the next norm is computed, see `clip`. Costs 4 bytes a parameter. Static.
      axis_name: only needed inside `jax.shard_map`, where a device holds only its shard: the name or names of the mesh
        axes that gradients are split over. The sums behind n are then taken across these axes, for each array across
        those of them over which `shard_map` knows the array to vary. ``shard_map(check_vma=False)`` does not know this
        of any array: there every array is summed across all names, and a replicated one would count several times.
        Then pass ``axis_name=clipjax.per_leaf(lambda path, leaf: names)`` with the names for each array, None or () for
        a replicated one.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN threshold or eps, an unknown `per`, or p <= 0.
      TypeError: for a threshold of another kind; at update, for complex or integer gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> [round(x, 4) for x in updates["w"].tolist()]
      [0.6, 0.8]

    References:
      Pascanu et al., "On the difficulty of training recurrent neural networks", 2013,
      https://arxiv.org/abs/1211.5063. D3, section 2, item 2.
    """
    thresholds = threshold_state.for_norms(threshold)
    feedback = error_feedback.resolve(carry)
    select = drawing.resolve(select)
    arguments.choice(per, "per", ("global", "leaf"))
    arguments.static(ord, "ord")
    arguments.require(arguments.is_number(ord) and ord > 0, "ord", "be a number > 0", ord, "2 is the usual norm.")
    arguments.non_negative(eps, "eps", "It is added to a norm.")
    each = per == "leaf"

    def init_fn(params: Tree) -> ClipNormState:
        shape = (len(trees.flatten(params)[0]) or 1,) if each else ()
        # arrays of their own: donation refuses shared ones
        count, clipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        norm, limit, factor = (jnp.full(shape, x, jnp.float32) for x in (0.0, jnp.inf, 1.0))
        history = thresholds.init(norm)
        return ClipNormState(count, clipped, nonfinite, norm, limit, factor, history, feedback.init(params))

    def update_fn(
        updates: Tree, state: ClipNormState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, ClipNormState]:
        trees.check_kind(state, ClipNormState)
        incoming.check_real(updates)
        total = feedback.add(updates, state.carry)
        chosen = drawing.choose(select, total, None, state.count)
        norm = _norm(total, chosen, each, ord, axis_name)
        limit, history = thresholds.update(state.count, norm, state.rule)
        factor = _coefficient(norm, limit.astype(norm.dtype), eps)
        leaves, _ = trees.flatten(total)
        factors = list(factor)[: len(leaves)] if each else [factor] * len(leaves)
        clipped = _rescaled(total, chosen, factors)
        emitted, left = feedback.emit(clipped, total, updates, state.carry, [jnp.isfinite(f) for f in factors])
        return emitted, _next_state(state, norm, limit, factor, history, left)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _norm(total: Tree, chosen: Tree, each: bool, ord: float, axis_name: incoming.AxisName) -> jax.Array:
    """The norm of the chosen entries: one, or one for each leaf, where a leaf without a gradient counts as 0."""
    leaves, _ = trees.flatten(total)
    masks, _ = trees.flatten(chosen)
    picked = [
        jnp.zeros((1,)) if x is None else elementwise.where(m, x, jnp.zeros_like(x))
        for x, m in zip(leaves, masks, strict=True)
    ]
    axes = None if axis_name is None else incoming.sharded_over(axis_name, trees.paths(total), picked)
    if each:
        return norms.norm(picked, ord, axes=axes, each=True) if picked else jnp.zeros((1,))
    return norms.norm(picked, ord, axes=axes)


def _coefficient(norm: jax.Array, limit: jax.Array, eps: Number) -> jax.Array:
    """1 within the threshold, C / (n + eps) above it, NaN for a norm that is not finite."""
    factor = jnp.where(norm <= limit, jnp.ones_like(norm), limit / (norm + eps))
    return jnp.where(jnp.isfinite(norm), factor, jnp.full_like(norm, math.nan))


def _rescaled(total: Tree, chosen: Tree, factors: list[jax.Array]) -> Tree:
    """The chosen entries times the factor of their leaf, the others as they are."""
    leaves, treedef = trees.flatten(total)
    rows = zip(leaves, factors, trees.flatten(chosen)[0], strict=True)
    return treedef.unflatten([None if x is None else elementwise.where(m, _scaled(x, f), x) for x, f, m in rows])


@elementwise.leafwise
def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    wide = dtypes.wide(x.dtype)
    scaled = (x.astype(wide) * factor.astype(wide)).astype(x.dtype)
    return elementwise.where(factor != 1, scaled, x)  # a product with 1 would flush denormals


def _next_state(
    state: ClipNormState, norm: jax.Array, limit: jax.Array, factor: jax.Array, history: State, left: State
) -> ClipNormState:
    return ClipNormState(
        optax.safe_increment(state.count),
        state.clipped + jnp.any(jnp.isfinite(norm) & (norm > limit.astype(norm.dtype))).astype(jnp.int32),
        state.nonfinite + jnp.any(~jnp.isfinite(norm)).astype(jnp.int32),
        threshold_state.recorded(state.norm_pre, norm.astype(jnp.float32)),
        threshold_state.recorded(state.threshold, limit),
        threshold_state.recorded(state.coefficient, factor.astype(jnp.float32)),
        history,
        left,
    )
