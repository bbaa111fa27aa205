"""Which axes of a leaf an argument names: the one reading of `axis`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clipjax._arrays import arguments, picked_leaves
from clipjax.typing import Axis, Leaf, PerLeaf


def check(axis: Axis | PerLeaf, name: str = "axis") -> None:
    """Check what needs no leaf: it is static, and no function."""
    arguments.static(axis, name)
    if callable(axis):
        raise TypeError(f"`{name}` must be static, got {axis!r}. Mark a function (path, leaf) by `per_leaf`.")


def plain(axis: Axis | PerLeaf) -> tuple[int, ...]:
    """The axes that all leaves have in common, as they are written, checked; () for `per_leaf`."""
    check(axis)
    return () if isinstance(axis, PerLeaf) else arguments.axes(axis)


def resolve(axis: Axis | PerLeaf, path: str, leaf: Leaf, name: str = "axis") -> tuple[int, ...] | None:
    """The axes of one leaf, counted from 0; None where the argument is.

    Raises:
      ValueError: for what is no axis of the leaf.
    """
    value = picked_leaves.for_leaf(axis, path, leaf)
    if value is None:
        return None
    found = tuple(value) if isinstance(value, tuple | list) else (value,)
    whole = all(isinstance(a, int | np.integer) for a in found)
    remedy = f"Leaf {path!r} has rank {leaf.ndim}; choose an axis it has, or leave it out with `where`."
    arguments.require(whole, name, "be a whole number or a tuple of some", value, remedy)
    exist = all(-leaf.ndim <= a < leaf.ndim for a in found)
    arguments.require(exist, name, "exist in every picked leaf", value, remedy)
    return tuple(int(a) % leaf.ndim for a in found)


def named(axis: Axis | PerLeaf, path: str, leaf: Leaf) -> tuple[int, ...]:
    """The same where there must be one at least, and none twice."""
    found = resolve(axis, path, leaf)
    remedy = f"Leaf {path!r} has none: leave it out, with an analysis by `where=analysis.kernels`."
    arguments.require(found, "axis", "name an axis of every picked leaf", found, remedy)
    assert found is not None
    remedy = f"Leaf {path!r} has rank {leaf.ndim}; choose an axis it has, or leave it out with `where`."
    arguments.require(len({*found}) == len(found), "axis", "name different axes of every picked leaf", axis, remedy)
    return found


class Sides(NamedTuple):
    """How an array is read as matrices: its axes, rising.

    Attributes:
      layers: those of which each index is a matrix of its own.
      inputs: the contracted ones.
      outputs: the others.
    """

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, ...]:
        """All axes of one matrix."""
        return tuple(sorted((*self.inputs, *self.outputs)))


def sides(axis: Axis | PerLeaf, layers: Axis | PerLeaf) -> Callable[[str, Leaf], Sides]:
    """How leaves are read as matrices: `axis` names the outputs, by default the last axis.

    Raises:
      ValueError: from the function that is returned, for a leaf that is left no axis to contract.
    """
    check(axis)
    check(layers, "layers")

    def of(path: str, leaf: Leaf) -> Sides:
        stacked = resolve(layers, path, leaf, "layers") or ()
        given = resolve(axis, path, leaf)
        outputs = (leaf.ndim - 1,) * (leaf.ndim > 0) if given is None else given
        inputs = {*range(leaf.ndim)} - {*stacked} - {*outputs}
        two = inputs and outputs and not {*stacked} & {*outputs}
        remedy = f"Leaf {path!r} of rank {leaf.ndim} has not: pick matrices by `where`, or name other axes."
        arguments.require(two, "axis", "leave every picked leaf an axis to contract, and one of outputs", axis, remedy)
        return Sides(*(tuple(sorted({*axes})) for axes in (stacked, inputs, outputs)))

    return of
