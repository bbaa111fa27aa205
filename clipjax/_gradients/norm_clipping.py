"""`clip_norm`: gradients rescaled by their norm, of all arrays together or of each, before the optimizer."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax._gradients import error_feedback, incoming, rescaling, threshold_state
from clipjax._maths import random_draws
from clipjax.typing import LeafThreshold, Number, Selection, State, Tree


class ClipNormState(NamedTuple):
    """State of `clip_norm`. With per="leaf" the three float fields have one entry for each leaf.

    Attributes:
      count: i32, updates so far.
      clipped: i32, updates in which at least one norm exceeded its threshold.
      nonfinite: i32, updates in which at least one norm was not finite.
      norm_pre: f32 (f64 where a param is f64), the norm before the clip; -1 for a leaf that had no gradient.
      threshold: likewise, the threshold of the last update; the largest float where nothing is clipped.
      coefficient: likewise, the factor by which the last gradient was multiplied.
      place: with per="leaf" a tree by path: i32, which entry of the fields is that of the leaf; else ().
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
    place: Tree
    rule: State
    carry: State


def clip_norm(
    threshold: LeafThreshold,
    *,
    per: Literal["global", "leaf"] = "global",
    ord: float | Literal["rms"] = 2,
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

    A norm that is NaN or infinite makes all selected entries that it is the norm of NaN, even with C = inf, and the
    state counts the update (`nonfinite` in `clipjax.report`). To leave such updates out instead, use `skip_spikes`.
    ``clip_norm(math.inf)`` clips no gradient of finite norm, and `clipjax.report` then gives the norms.

    Args:
      threshold: C >= 0, in the unit of the norm: a number (may be traced), a schedule count -> C, or a rule of
        `clipjax.thresholds` such as `zscore()`, which computes C from the norms before the clip. Traced numbers and
        schedules that are below 0 count as 0. Norms that are 0 or not finite are never added to a rule's history. A
        rule's C <= 0 clips nothing; a C of 0 from a number or a schedule makes the selected entries of every gradient
        of finite norm 0. With per="leaf" each array may have a C of its own, a number or a schedule: give
        ``clipjax.per_leaf(lambda path, leaf: C)``, a dict such as ``{"dense/kernel": C}``, or a tree like the params;
        leaves without a C are not clipped.
      per: "global": one norm and one factor for all arrays together. "leaf": one for each array, compared with the same
        C; a rule then keeps a state and computes a C for each array.
      ord: p > 0 in :math:`n = (\sum |g|^p)^{1/p}`; 2 is the Euclidean norm, `math.inf` the largest magnitude. Or "rms":
        :math:`n = \sqrt{\sum g^2 / m}` over m (selected) entries, so that C does not depend on the size of an array:
        ``clip_norm(1.0, per="leaf", ord="rms")``, chained after the optimizer, is Adafactor's clipping of updates, as
        `optax.clip_by_block_rms` does it for a constant C. Static.
      eps: ε >= 0, added to n where C is divided by it, so that the clipped norm falls short of C by about C ε / n. May
        be traced.
      select: a selection of `clipjax.selections`, such as `largest(0.1)` or `bernoulli(0.5, key=key)`, evaluated at
        every update: n is the norm of the selected entries, and only these are rescaled; the others pass unchanged. By
        default all are selected.
      carry: True for error feedback: the state keeps the part of g that the clip removed and adds it to the next
        gradient before the next norm is computed, see `clip`. An update whose norm is not finite leaves that part as it
        is. Costs 4 bytes a parameter. Static.
      axis_name: only needed inside `jax.shard_map`, where a device holds only its shard: the name or names of the mesh
        axes that gradients are split over. The sum (or the maximum) behind n then runs over the devices of these axes;
        an array that `shard_map` knows to be replicated along an axis counts once there. ``shard_map(check_vma=False)``
        does not know this of any array: every array is summed across all names, and a replicated one counts several
        times. There pass ``axis_name=clipjax.per_leaf(lambda path, leaf: names)`` with the names for each array, None
        or () for a replicated one.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN threshold or eps, several numbers, an unknown `per`, or p <= 0; at init for a
        tree of thresholds that names no leaf.
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
      https://arxiv.org/abs/1211.5063. D3, section 2, item 2. Shazeer and Stern, "Adafactor", 2018,
      https://arxiv.org/abs/1804.04235, section 6, for "rms".
    """
    arguments.choice(per, "per", ("global", "leaf"))
    each = per == "leaf"
    thresholds = threshold_state.for_norms(threshold, each=each)
    feedback = error_feedback.resolve(carry)
    select = random_draws.resolve(select)
    arguments.static(ord, "ord")
    rms = isinstance(ord, str) and ord == "rms"
    known = rms or (arguments.is_number(ord) and float(ord) > 0)
    arguments.require(known, "ord", 'be a number > 0 or "rms"', ord, "2 is the usual norm.")
    power = 2 if rms else float(ord)
    arguments.non_negative(eps, "eps", "It is added to a norm.")

    def init_fn(params: Tree) -> ClipNormState:
        thresholds.check(params)
        dtype = dtypes.widest(jax.tree.leaves(params))
        place = rescaling.places(params) if each else ()
        shape = (len(jax.tree.leaves(place)),) if each else ()
        # arrays of their own: donation refuses shared ones
        count, clipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        norm, limit, factor = (jnp.full(shape, x, dtype) for x in (0.0, dtypes.largest(dtype), 1.0))
        history = thresholds.init(norm)
        return ClipNormState(count, clipped, nonfinite, norm, limit, factor, place, history, feedback.init(params))

    def norms_of(tree: Tree, chosen: Tree, place: Tree) -> jax.Array:
        measured = rescaling.measured(tree, chosen, place if each else None)
        norm = rescaling.norm_of(measured, power, axis_name, each)
        return rescaling.mean(norm, tree, chosen, place if each else None, axis_name) if rms else norm

    def update_fn(
        updates: Tree, state: ClipNormState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, ClipNormState]:
        trees.check_kind(state, ClipNormState)
        incoming.check_real(updates)
        total = feedback.add(updates, state.carry)
        chosen = random_draws.choose(select, total, None, state.count)
        measured = rescaling.measured(total, chosen, state.place if each else None)
        norm = norms_of(total, chosen, state.place)
        weights = norms_of(rescaling.of_weights(total, params), chosen, state.place) if thresholds.relative else None
        limit, history = thresholds.update(state.count, norm, state.rule, measured, weights)
        factor = _coefficient(norm, limit, eps)
        factors = rescaling.factors(total, measured, factor)
        clipped = rescaling.rescaled(total, chosen, factors)
        emitted, left = feedback.emit(clipped, total, updates, state.carry, [jnp.isfinite(f) for f in factors])
        return emitted, _next_state(state, norm, limit, factor, [x is not None for _, x in measured], history, left)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@elementwise.leafwise
def _coefficient(norm: jax.Array, limit: jax.Array, eps: Number) -> jax.Array:
    """1 within the threshold, C / (n + eps) above it, NaN for a norm that is not finite."""
    within = norm <= limit
    # a quotient that is not used has a derivative all the same: within the threshold its divisor is 1
    divisor = jnp.where(within, jnp.ones_like(norm), norm + jnp.asarray(eps, norm.dtype))
    factor = jnp.where(within, jnp.ones_like(norm), elementwise.quotient(limit, divisor))
    return jnp.where(jnp.isfinite(norm), factor, jnp.full_like(norm, math.nan))


def _next_state(
    state: ClipNormState,
    norm: jax.Array,
    limit: jax.Array,
    factor: jax.Array,
    given: list[bool],
    history: State,
    left: State,
) -> ClipNormState:
    shown = norm if all(given) else jnp.where(np.array(given), norm, -1)
    return ClipNormState(
        optax.safe_increment(state.count),
        state.clipped + jnp.any(jnp.isfinite(norm) & (norm > limit)).astype(jnp.int32),
        state.nonfinite + jnp.any(~jnp.isfinite(norm)).astype(jnp.int32),
        threshold_state.recorded(state.norm_pre, shown),
        threshold_state.recorded(state.threshold, limit),
        threshold_state.recorded(state.coefficient, factor),
        state.place,
        history,
        left,
    )
