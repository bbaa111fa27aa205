"""Which axes of which leaves the dimensions of an array come from, for arrays that are made of variables alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

Origins: TypeAlias = tuple[frozenset[tuple[int, int]], ...]
"""For each dimension the axes (leaf, axis) that it comes from."""

NONE: frozenset[tuple[int, int]] = frozenset()


def of_leaf(leaf: int, rank: int) -> Origins:
    """Those of a variable."""
    return tuple(frozenset([(leaf, axis)]) for axis in range(rank))


def of_results(equation: Any, operands: Sequence[tuple[tuple[int, ...], Origins]]) -> list[Origins]:
    """Those of the results of an equation, from the shapes and origins of its operands."""
    shapes = [tuple(v.aval.shape) for v in equation.outvars]
    if not operands:
        return [(NONE,) * len(shape) for shape in shapes]
    name, params, (before, own) = equation.primitive.name, equation.params, operands[0]
    if name == "transpose":
        return [tuple(own[i] for i in params["permutation"])]
    if name in ("reshape", "squeeze", "expand_dims"):
        return [_regrouped(before, own, shapes[0])]
    if name == "broadcast_in_dim":
        made = [NONE] * len(shapes[0])
        for i, to in enumerate(params["broadcast_dimensions"]):
            made[to] = own[i]
        return [tuple(made)]
    if name == "stack":
        made = list(_united(before, operands))
        return [(*made[: params["axis"]], NONE, *made[params["axis"] :])]
    if name == "unstack":
        return [tuple(x for i, x in enumerate(own) if i != params["axis"])] * len(shapes)
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        return [tuple(x for i, x in enumerate(own) if i not in params["axes"])] * len(shapes)
    if name == "dot_general":
        (left, right), (left_batch, right_batch) = params["dimension_numbers"]
        other = operands[1][1]
        batch = [own[i] | other[j] for i, j in zip(left_batch, right_batch, strict=True)]
        kept = [x for i, x in enumerate(own) if i not in (*left, *left_batch)]
        return [(*batch, *kept, *(x for j, x in enumerate(other) if j not in (*right, *right_batch)))]
    return [_united(shape, operands) for shape in shapes]


def _united(shape: tuple[int, ...], operands: Sequence[tuple[tuple[int, ...], Origins]]) -> Origins:
    """Of an operation that keeps dimensions in their places: those of all operands of its rank."""
    made = [NONE] * len(shape)
    for before, own in operands:
        if len(before) == len(shape):
            made = [x | y if n > 1 else x for x, y, n in zip(made, own, before, strict=True)]
    return tuple(made)


def _regrouped(before: tuple[int, ...], own: Origins, after: tuple[int, ...]) -> Origins:
    """After a reshape: the fewest dimensions that hold as many entries before and after come from each other."""
    if 0 in before or 0 in after:
        return (NONE,) * len(after)
    made: list[frozenset[tuple[int, int]]] = []
    i, size, group = 0, 1, NONE
    left, new = 1, 0
    for n in after:
        if n == 1:
            made.append(NONE)
            continue
        if left == 1:  # a new group: as many dimensions as hold a multiple of what follows
            group, size, new = NONE, 1, 1
        new *= n
        while size < new or size % new:
            group, size, i = group | own[i], size * before[i], i + 1
        left = size // new
        made.append(group)
    return tuple(made)
