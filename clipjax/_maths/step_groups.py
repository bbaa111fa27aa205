"""Which entries of an array share a step: the one reading of `axis` and `group`.

A *view* is the array with its input axis, -2, cut into groups, so that the entries of each step lie along whole axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, picking, sharding
from clipjax._maths import blocks
from clipjax.typing import Axis, Leaf, PerLeaf


class StepGroups(NamedTuple):
    """The entries of one array that share a step.

    Attributes:
      axes: the axes of the view that share a step; all others have steps of their own.
      size: how many neighbours along the input axis share one; None for all of them.
    """

    axes: tuple[int, ...]
    size: int | None


def check(axis: Axis | PerLeaf, group: int | PerLeaf | None) -> None:
    """Check what needs no leaf: both are static, and no functions."""
    for name, value in (("axis", axis), ("group", group)):
        arguments.static(value, name)
        if callable(value):
            raise TypeError(f"`{name}` must be static, got {value!r}. Mark a function (path, leaf) by `per_leaf`.")


def resolve(axis: Axis | PerLeaf, group: int | PerLeaf | None, path: str, leaf: Leaf) -> StepGroups:
    """Read `axis` and `group` for one leaf.

    Raises:
      ValueError: for an axis that does not exist, and for a group that does not divide axis -2.
    """
    kept: Axis = picking.for_leaf(axis, path, leaf)
    size: int | None = picking.for_leaf(group, path, leaf)
    if size is not None:
        arguments.whole(size, "group", low=1, remedy="Give the size of a group, e.g. 32.")
        remedy = f"Leaf {path!r} has shape {leaf.shape}: leave it out with `where`, or give `per_leaf` sizes or None."
        ok = leaf.ndim >= 2 and leaf.shape[-2] % size == 0
        arguments.require(ok, "group", "divide axis -2 of every picked leaf", size, remedy)
    return StepGroups(shared_axes(leaf.ndim, kept, size), size)


def shared_axes(ndim: int, axis: Axis, group: int | None = None) -> tuple[int, ...]:
    """The axes that share a step, all but `axis`, in the view of an array of this rank."""
    if axis is None:
        axis = () if group is None else -1
    kept = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in kept:
        remedy = f"An array of rank {ndim} has axes {-ndim} to {ndim - 1}."
        arguments.require(-ndim <= a < ndim, "axis", "exist in every picked leaf", axis, remedy)
    own = {a % ndim for a in kept}
    if group is not None:  # the view has the groups at ndim - 2 and their entries behind: axes after that move by one
        own = {a if a <= ndim - 2 else a + 1 for a in own | {ndim - 2}}
        ndim += 1
    return tuple(i for i in range(ndim) if i not in own)


def shape(leaf: Leaf, groups: StepGroups) -> tuple[int, ...]:
    """The shape of the steps of an array: of its view, 1 along axes that share a step; () where all of them do."""
    viewed = leaf.shape
    if groups.size is not None:
        *outer, inputs, outputs = leaf.shape
        viewed = (*outer, inputs // groups.size, groups.size, outputs)
    return () if len(groups.axes) == len(viewed) else tuple(1 if a in groups.axes else n for a, n in enumerate(viewed))


def view(x: jax.Array, groups: StepGroups) -> jax.Array:
    """An array with its input axis cut into groups, where there are any."""
    return x if groups.size is None else blocks.split(x, x.ndim - 2, groups.size)


def joined(x: jax.Array, groups: StepGroups, like: jax.Array) -> jax.Array:
    """The array that a view is of, sharded as another one."""
    if groups.size is None:
        return x
    return sharding.laid_as(blocks.join(x, x.ndim - 3, x.shape[-3] * groups.size), like)


def per_block(values: jax.Array, groups: StepGroups) -> jax.Array:
    """Values of step groups in the rank of the array itself, to broadcast block by block."""
    return values if groups.size is None else jnp.squeeze(values, -2)
