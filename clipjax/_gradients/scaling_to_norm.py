"""`scale_to_norm`: gradients of one norm, whatever it was."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax._gradients import incoming, rescaling, threshold_state
from clipjax._maths import random_draws
from clipjax.typing import Number, Schedule, Tree


class ScaleState(NamedTuple):
    """State of `scale_to_norm`. With per="leaf" the two float fields have one entry for each leaf.

    Attributes:
      count: i32, updates so far.
      nonfinite: i32, updates in which at least one norm was not finite.
      norm_pre: f32 (f64 where a param is f64), the norm before.
      coefficient: likewise, the factor by which the last gradient was multiplied.
      place: with per="leaf" a tree by path: i32, which entry of the fields is that of the leaf; else ().
    """

    count: jax.Array  # type: ignore[assignment]
    nonfinite: jax.Array
    norm_pre: jax.Array
    coefficient: jax.Array
    place: Tree


def scale_to_norm(
    target: Number | Schedule,
    gamma: Number = 0.0,
    *,
    per: Literal["global", "leaf"] = "global",
    axis_name: incoming.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Give gradients a norm: :math:`\tilde g = g\, T / (\lVert g \rVert_2 + \gamma)`.

    Unlike `clip_norm` it makes small gradients larger too, so that their size has no part in the training, only their
    direction. With γ > 0 gradients that are small beside γ stay small. A gradient of 0 stays 0; one whose norm is not
    finite becomes NaN and is counted, as in `clip_norm`. The factor is applied in f32 (f64), and the dtype stays. For a
    constant T and all arrays together `optax.normalize_by_update_norm` does the same, while a float can hold
    the square of the norm.

    Args:
      target: T >= 0: a number, which may be traced, or a schedule count -> T.
      gamma: γ >= 0, in the unit of the norm; may be traced.
      per: "global": the norm of all arrays together. "leaf": that of each, so that all arrays count alike.
      axis_name: inside `jax.shard_map`, the mesh axes that gradients are split over, as in `clip_norm`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a negative or NaN target or gamma, and an unknown `per`.
      TypeError: for a target of another kind; at update, for complex or integer gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_to_norm(1.0)
      >>> grads = {"w": jnp.array([0.03, 0.04])}
      >>> [round(x, 4) for x in tx.update(grads, tx.init(grads))[0]["w"].tolist()]
      [0.6, 0.8]

    References:
      Bu et al., "Automatic Clipping" (AUTO-S), 2023, https://arxiv.org/abs/2206.07136. Huang et al., "Stable-SPAM",
      2025, https://arxiv.org/abs/2502.17055. D3, section 2: which gradients to limit.
    """
    arguments.choice(per, "per", ("global", "leaf"))
    arguments.check_schedule(target, "target", "a number or a schedule")
    if not callable(target):
        arguments.scalar(target, "target", "All gradients have the same norm.")
        arguments.non_negative(target, "target", "It is a norm.")
    arguments.non_negative(gamma, "gamma", "It is added to a norm.")
    each = per == "leaf"

    def init_fn(params: Tree) -> ScaleState:
        dtype = dtypes.widest(jax.tree.leaves(params))
        place = rescaling.places(params) if each else ()
        shape = (len(jax.tree.leaves(place)),) if each else ()
        count, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(2))
        norm, factor = (jnp.full(shape, x, dtype) for x in (0.0, 1.0))
        return ScaleState(count, nonfinite, norm, factor, place)

    def update_fn(
        updates: Tree, state: ScaleState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, ScaleState]:
        trees.check_kind(state, ScaleState)
        incoming.check_real(updates)
        chosen = random_draws.choose(random_draws.resolve(None), updates, None, state.count)
        measured = rescaling.measured(updates, chosen, state.place if each else None)
        norm = rescaling.norm_of(measured, 2, axis_name, each)
        wanted = jnp.asarray(arguments.schedule(target)(state.count)).astype(norm.dtype)
        factor = _coefficient(norm, jnp.maximum(wanted, 0), gamma)
        factors = rescaling.factors(updates, measured, factor)
        return rescaling.rescaled(updates, chosen, factors), ScaleState(
            optax.safe_increment(state.count),
            state.nonfinite + jnp.any(~jnp.isfinite(norm)).astype(jnp.int32),
            threshold_state.recorded(state.norm_pre, norm),
            threshold_state.recorded(state.coefficient, factor),
            state.place,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@elementwise.leafwise
def _coefficient(norm: jax.Array, target: jax.Array, gamma: Number) -> jax.Array:
    """T / (n + gamma), 1 for a gradient of 0, NaN for a norm that is not finite."""
    divisor = jnp.where(norm > 0, norm + jnp.asarray(gamma, norm.dtype), jnp.ones_like(norm))
    factor = jnp.minimum(elementwise.quotient(target, divisor), dtypes.largest(norm.dtype))
    factor = jnp.where(norm > 0, factor, jnp.ones_like(norm))
    return jnp.where(jnp.isfinite(norm), factor, jnp.full_like(norm, jnp.nan))
