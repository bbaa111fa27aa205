"""`clip`: gradient clipping entry by entry, before the optimizer."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import dtypes, elementwise, trees
from clipjax._gradients import error_feedback, incoming, threshold_state
from clipjax._maths import intervals, random_draws
from clipjax.typing import Selection, State, Threshold, Tree


class ClipState(NamedTuple):
    """State of `clip`.

    Attributes:
      count: i32, updates so far.
      threshold: f32 (f64 where a param is f64), the threshold of the last update; the largest float where nothing is
        clipped, -1 for a rule, which has a threshold for every entry.
      rule: the state of a rule, one number or more for every entry; () without a rule.
      carry: the error feedback: what clips have removed and not yet given back, f32 (f64 for f64 params) arrays like
        the params; () without `carry=True`.
    """

    count: jax.Array  # type: ignore[assignment]
    threshold: jax.Array
    rule: State
    carry: State


def clip(
    threshold: Threshold, *, select: Selection | None = None, carry: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Clip every gradient entry: :math:`\tilde g = \mathrm{clip}(g, -C, C)` (D1, D3, D4).

    C is the threshold. NaN stays NaN, ±inf becomes ±C, and the dtype of the gradient is kept.

    With ``carry=True`` (error feedback, U-Clip) the state keeps the part Δ that the clip removed and adds it to the
    next gradient: :math:`\tilde g = \mathrm{clip}(g + \Delta, -C, C)`,
    :math:`\Delta \leftarrow g + \Delta - \tilde g`. Clipping then does not bias the sum of the gradients. It needs a C
    above the usual gradient: where gradients always exceed C, Δ grows without bound.

    `clip` records its threshold and counts nothing, because counting would cost a second pass over the gradients.
    ``clip_norm(math.inf)`` in front of it records norms.

    Args:
      threshold: C >= 0, in the unit of a gradient entry: a number (may be traced; below 0 it then counts as 0), a
        schedule count -> C, or a rule of `clipjax.thresholds` such as `spam()`, which keeps a state for every entry and
        computes a C for each from its past magnitudes.
      select: a selection of `clipjax.selections`: the entries that may be clipped, drawn anew at every update. By
        default all.
      carry: True for error feedback; costs 4 bytes a parameter. Static.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN threshold, several numbers, or a rule whose state holds more than single
        numbers.
      TypeError: for a threshold of another kind; at update, for complex or integer gradients.

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
    thresholds = threshold_state.for_entries(threshold)
    feedback = error_feedback.resolve(carry)
    select = random_draws.resolve(select)

    def init_fn(params: Tree) -> ClipState:
        shared, history = thresholds.init(params)
        return ClipState(jnp.zeros((), jnp.int32), shared, history, feedback.init(params))

    def update_fn(
        updates: Tree, state: ClipState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, ClipState]:
        trees.check_kind(state, ClipState)
        incoming.check_real(updates)
        total = feedback.add(updates, state.carry)
        chosen = random_draws.choose(select, total, None, state.count)
        limits, shared, history = thresholds.update(state.count, total, state.threshold, state.rule)
        clipped = jax.tree.map(_clip, total, limits, chosen)
        emitted, left = feedback.emit(clipped, total, updates, state.carry, itertools.repeat(True))
        return emitted, ClipState(optax.safe_increment(state.count), shared, history, left)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _clip(x: jax.Array, limit: jax.Array, chosen: jax.Array) -> jax.Array:
    """The chosen entries limited to [-C, C], the others as they are."""
    return elementwise.where(chosen, _limited(x, limit), x)


@elementwise.leafwise
def _limited(x: jax.Array, limit: jax.Array) -> jax.Array:
    # a finite C beyond the range of a narrow dtype is its largest float: inf would not clip an infinite entry
    largest = jnp.asarray(dtypes.largest(x.dtype), limit.dtype)
    free = threshold_state.unlimited(limit) | jnp.isnan(limit)
    bound = elementwise.where(free, jnp.full_like(limit, jnp.inf), jnp.minimum(limit, largest)).astype(x.dtype)
    return intervals.limit(x, -bound, bound)
