"""What makes a rule follow: a state for everything that is measured, and a history that nothing spoils."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, dtypes
from clipjax.typing import Rule


def check(threshold: Any) -> None:
    """Check a `threshold=` argument: a number >= 0, a schedule or a rule."""
    if isinstance(threshold, Rule):
        return
    if threshold is None or isinstance(threshold, str | bool):
        raise TypeError(
            f"`threshold` must be a number, a schedule or a rule, got {threshold!r}."
            " Give C >= 0, or call a factory: `thresholds.zscore()`."
        )
    arguments.non_negative(threshold, "threshold", "Use math.inf to record without clipping.")


def begin(threshold: Any, measure: jax.Array) -> Any:
    """The state of a threshold for every entry of a measure; () for a number or a schedule.

    Scalars of a rule's state get the shape, and eagerly the sharding, of the measure.
    """
    if not isinstance(threshold, Rule):
        return ()

    def spread(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim:
            return jnp.broadcast_to(x, measure.shape + x.shape) + jnp.zeros((), x.dtype)
        return jnp.zeros_like(measure, dtype=x.dtype) + x

    return jax.tree.map(spread, threshold.init())


def follow(threshold: Any, count: jax.Array, measure: jax.Array, state: Any, *, zeros: bool) -> tuple[Any, Any]:
    """The limit of every entry of a measure, f32, and the state that has seen it.

    What is not finite enters no history, nor does 0 unless `zeros`; a rule reads the former as the largest float. A
    rule's threshold that is not positive is infinite.
    """
    if not isinstance(threshold, Rule):
        return jnp.full_like(measure, arguments.schedule(threshold)(count), dtype=jnp.float32), ()
    finite = jnp.isfinite(measure)
    usable = finite if zeros else finite & (measure > 0)
    one = threshold.update
    for _ in range(measure.ndim):
        one = jax.vmap(one)
    largest = float(jnp.finfo(jnp.float32).max)
    seen = jnp.where(finite, jnp.minimum(dtypes.widened(measure), largest), largest).astype(jnp.float32)
    limit, new = one(seen, state)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        at = usable.reshape(usable.shape + (1,) * (old.ndim - usable.ndim))
        return jnp.where(at, new.astype(old.dtype), old)

    return jnp.where(limit > 0, limit, jnp.inf).astype(jnp.float32), jax.tree.map(keep, new, state)


def recorded(old: jax.Array, new: jax.Array) -> jax.Array:
    """`new` in the place of `old`, a number of the state that no update reads.

    JAX leaves an argument that nothing reads out of the program and hands out donated buffers in order, so that every
    scalar behind it would be copied to its neighbour's. XLA removes the select.
    """
    return jnp.where(jnp.isnan(old), new, new)
