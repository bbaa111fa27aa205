"""Which entries of an array share a step: the one reading of `axis` and `group`.

A group is a box: neighbours along one axis, and all of some axes behind it. A *view* is the array with that one axis
cut, so that the entries of each step lie along whole axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, leaf_axes, picked_leaves, sharding
from clipjax._maths import split_axes
from clipjax.typing import Axis, Leaf, PerLeaf


class StepGroups(NamedTuple):
    """The entries of one array that share a step.

    Attributes:
      axes: the axes of the view that share a step; all others have steps of their own.
      at: the axis that is cut into groups, None where there are none. In the view the groups lie along it, and their
        entries along the next one.
      size: how many neighbours along that axis share a step.
    """

    axes: tuple[int, ...]
    at: int | None = None
    size: int = 1


def check(axis: Axis | PerLeaf, group: int | PerLeaf | None) -> None:
    """Check what needs no leaf: both are static, and no functions."""
    leaf_axes.check(axis)
    arguments.static(group, "group")
    if callable(group):
        raise TypeError(f"`group` must be static, got {group!r}. Mark a function (path, leaf) by `per_leaf`.")


def resolve(axis: Axis | PerLeaf, group: int | PerLeaf | None, path: str, leaf: Leaf) -> StepGroups:
    """Read `axis` and `group` for one leaf.

    Raises:
      ValueError: for an axis that does not exist, and for groups that are no boxes.
    """
    kept = leaf_axes.resolve(axis, path, leaf)
    size: int | None = picked_leaves.for_leaf(group, path, leaf)
    if kept is None:
        kept = () if size is None else (leaf.ndim - 1,)
    others = tuple(i for i in range(leaf.ndim) if i not in kept)
    return StepGroups(others) if size is None else _boxes(size, others, path, leaf)


def _boxes(size: int, others: tuple[int, ...], path: str, leaf: Leaf) -> StepGroups:
    """Groups of a size along some axes flattened in order: all of the last axes, and a part of the one before."""
    arguments.whole(size, "group", low=1, remedy="Give the size of a group, e.g. 32.")
    remedy = f"Leaf {path!r} has shape {leaf.shape}: leave it out with `where`, or give `per_leaf` sizes or None."
    arguments.require(others, "group", "be None where `axis` leaves no axis of a leaf", size, remedy)
    at, part = others[-1], size
    for i in reversed(others):
        at = i
        if i == others[0] or part <= leaf.shape[i] or part % leaf.shape[i]:
            break
        part //= leaf.shape[i]
    # A size that divides the product of all axes, but ends inside of one and goes on in the next, makes no boxes.
    behind = f" times the {size // part} entries behind it" * (part < size)
    rule = f"divide axis {at - leaf.ndim} of every picked leaf{behind}"
    arguments.require(leaf.shape[at] % part == 0, "group", rule, size, remedy)
    return StepGroups(tuple(i + 1 for i in others if i >= at), at, part)


def shape(leaf: Leaf, groups: StepGroups) -> tuple[int, ...]:
    """The shape of the steps of an array in the state."""
    sizes = tuple(1 if i in _shared(groups) else n for i, n in enumerate(leaf.shape))
    if groups.at is not None:
        return (leaf.shape[groups.at] // groups.size, *sizes)
    return () if len(groups.axes) == leaf.ndim else sizes


def _shared(groups: StepGroups) -> tuple[int, ...]:
    """The axes of the array itself of which a step has more than one entry."""
    return groups.axes if groups.at is None else tuple(i - 1 for i in groups.axes)


def view(x: jax.Array, groups: StepGroups) -> jax.Array:
    """An array with one axis cut into groups, where there are any."""
    return x if groups.at is None else split_axes.split(x, groups.at, groups.size)


def joined(x: jax.Array, groups: StepGroups, like: jax.Array) -> jax.Array:
    """The array that a view is of, sharded as another one."""
    if groups.at is None:
        return x
    return sharding.laid_as(split_axes.join(x, groups.at, x.shape[groups.at] * groups.size), like)


# In the state the axis of the groups is the first one, before the axes of the array: an array of steps is then a stack
# of some that broadcast to it, and `shrink` cuts each axis of it as that of the array.


def stored(values: jax.Array, groups: StepGroups) -> jax.Array:
    """Values of step groups as the state has them, from those that broadcast to the view."""
    return values if groups.at is None else jnp.moveaxis(values, groups.at, 0)


def in_view(values: jax.Array, groups: StepGroups) -> jax.Array:
    """Values of step groups that broadcast to the view, from those of the state."""
    return values if groups.at is None else jnp.moveaxis(values, 0, groups.at)


def cut_axis(values: tuple[int, ...], leaf: tuple[int, ...]) -> int | None:
    """The axis of an array that is cut into groups, from the shape that its steps have in the state; None for none."""
    if len(values) <= len(leaf):
        return None
    # It is the first one along which entries share a step. If it has size 1 there is none such, and one group.
    pairs = enumerate(zip(values[1:], leaf, strict=True))
    return next((i for i, (have, want) in pairs if have == 1 < want), values[1:].index(1))


def per_block(values: jax.Array, leaf: tuple[int, ...]) -> jax.Array:
    """Values of the state in the rank of the array, of this shape, to broadcast block by block."""
    at = cut_axis(values.shape, leaf)
    return values if at is None else jnp.squeeze(jnp.moveaxis(values, 0, at), at + 1)
