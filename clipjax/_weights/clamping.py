"""Clamping after the optimizer: weights that stay within a bound."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes, elementwise, picked_leaves, trees
from clipjax._maths import intervals, random_draws
from clipjax._weights import projecting
from clipjax._weights.allowed_values import Fact
from clipjax._weights.constraints import Constraint
from clipjax.typing import Bound, Context, Number, Projection, Selection, Tree, Where


class ClampState(NamedTuple):
    """State of `clamp_weights` inside its `ProjectState`.

    Attributes:
      bound: f32[2] (f64 where a param is f64), the interval of the last update, ends at most the largest float; lo > hi
        before the first one and where it differs by leaf.
    """

    bound: jax.Array


def clamp_weights(
    bound: Bound,
    *,
    when: Literal["after", "before"] = "after",
    select: Selection | None = None,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold weights within a bound: :math:`w \leftarrow T\,\mathrm{sign}(w)` if :math:`|w| > T` (D3).

    Chain it behind the optimizer: |w| <= T then holds exactly after `optax.apply_updates`.

    Args:
      bound: T >= 0 for the interval [-T, T], a pair (lo, hi), a schedule count -> either, or `per_leaf`. Numbers may be
        traced; a T below 0 then counts as 0. The ends are read as f32 (f64 for f64 leaves), and rounded into the
        interval if the dtype of a leaf cannot hold them.
      when: "after" clamps params + updates. "before", D3's order, clamps the params and then adds the updates, so that
        a weight may leave the interval again by one update.
      select: which entries may be clamped, drawn anew at every update; all by default.
      where: `where(path, leaf) -> bool` picks the leaves; every float leaf by default.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where parameters are narrower.

    Raises:
      ValueError: for a negative or NaN bound, lo > hi, an unknown `when`, at init for an interval that holds no value
        of a leaf's dtype, and at update where `params` are missing.
      TypeError: at init for a complex leaf that `where` picks.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), clamp_weights(1.0))
      >>> params = jnp.array([0.9, -5.0])
      >>> updates, _ = tx.update(jnp.array([-0.3, 0.0]), tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [1.0, -1.0]

    References:
      D3, section 3, step 4.
    """
    arguments.choice(when, "when", ("after", "before"))
    some, select = select is not None, random_draws.resolve(select)
    where = picked_leaves.resolve(where, picked_leaves.everything)
    bounds = intervals.resolve(bound)

    def init_fn(params: Tree) -> ClampState:
        if not bounds.scheduled:
            bounds.of_leaves(params, jnp.zeros((), jnp.int32))
        return ClampState(jnp.asarray(intervals.NOWHERE, dtypes.widest(jax.tree.leaves(params))))

    def apply_fn(target: Tree, state: ClampState, context: Context) -> tuple[Tree, ClampState]:
        ends = bounds.of_leaves(context.params, context.count)

        def clamped(path: str, w: jax.Array, chosen: jax.Array, p: jax.Array) -> jax.Array:
            low, high = ends[path]
            if when == "after":
                new = intervals.limit(w, low, high)
            else:  # the update is added to the clamped weight
                old = p.astype(w.dtype)
                cut = intervals.limit(old, low, high)
                new = elementwise.where(cut != old, cut + (w - old), w)
            return elementwise.where(chosen, new, w)

        chosen = random_draws.choose(select, target, None, context.count)
        new = trees.map_with_path(clamped, target, chosen, context.params)
        return new, ClampState(jnp.stack([_shown(end, state.bound.dtype) for end in bounds.shared(context.count)]))

    def outward(new: Tree, context: Context) -> Tree | None:
        if all(bounds.around_zero(path, p, context.count) for path, p in trees.governed(context.params)):
            return None

        ends = bounds.of_leaves(context.params, context.count)
        return trees.map_with_path(lambda path, w: intervals.outward(w, *ends[path]), new)

    def facts(target: Tree, before: ClampState, after: ClampState, context: Context) -> list[Fact]:
        chosen = jax.tree.leaves(random_draws.choose(select, target, None, context.count))
        limits = bounds.of_leaves(context.params, context.count).values()
        return [Fact(_limited, (c, *at), None if some else at) for c, at in zip(chosen, limits, strict=True)]

    after = when == "after"
    projection = Projection(init_fn, apply_fn, outward=outward if after else None)
    constraint = Constraint(projection, ClampState, "clamp_weights", after, facts=facts if after else None)
    return projecting.constrain(constraint, carry=False, inner=None, start=0, where=where, key=None)


def _limited(x: jax.Array, args: Tree) -> jax.Array:
    chosen, low, high = args
    return elementwise.where(chosen, intervals.limit(x, low, high), x)


def _shown(end: Number, dtype: DTypeLike) -> jax.Array:
    """An end of the interval as the state records it: at most the largest float."""
    largest = dtypes.largest(dtype)
    if arguments.known(end):
        end = min(max(float(end), -largest), largest)
    return jnp.clip(jnp.asarray(end).astype(dtype), -largest, largest)
