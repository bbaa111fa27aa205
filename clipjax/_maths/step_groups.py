"""The entries of an array that share a step: which axes, and groups along the input axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, sharding
from clipjax._maths import blocks


def shared_axes(ndim: int, axis: int | tuple[int, ...] | None, group: int | None = None) -> tuple[int, ...]:
    """The axes that share a step, all but `axis`, in the `view` of an array of this rank.

    Raises:
      ValueError: for an axis that does not exist.
    """
    if axis is None:
        axis = () if group is None else -1
    kept = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in kept:
        remedy = f"An array of rank {ndim} has axes {-ndim} to {ndim - 1}."
        arguments.require(-ndim <= a < ndim, "axis", "exist in every picked leaf", axis, remedy)
    own = {a % ndim for a in kept}
    if group is not None:
        own = {a if a <= ndim - 2 else a + 1 for a in own | {ndim - 2}}
        ndim += 1
    return tuple(i for i in range(ndim) if i not in own)


def view(x: jax.Array, group: int | None) -> jax.Array:
    """An array whose step groups lie along whole axes: axis -2 cut into groups, where there are any."""
    return x if group is None else blocks.split(x, x.ndim - 2, group)


def joined(x: jax.Array, group: int | None, like: jax.Array) -> jax.Array:
    """The array that a `view` is of, sharded as another one."""
    return x if group is None else sharding.laid_as(blocks.join(x, x.ndim - 3, x.shape[-3] * group), like)


def per_block(values: jax.Array, group: int | None) -> jax.Array:
    """Values of step groups in the rank of the array itself, to broadcast block by block."""
    return values if group is None else jnp.squeeze(values, -2)
