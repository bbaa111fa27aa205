"""What a program does with each leaf: kernels that a contraction multiplies, embeddings, statistics, and their axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from clipjax._programs import axes as axes_
from clipjax._programs import equations, groups, walking
from clipjax._programs.equations import Value
from clipjax._programs.walking import Step


class Role(NamedTuple):
    """What a leaf is.

    Attributes:
      name: "kernel", "embedding", "scale or offset", "statistic" or "unused".
      inputs: of a kernel the axes, counted from the end, that a contraction or a convolution sums over.
      outputs: of a kernel the other axes, but for those that a loop runs over.
    """

    name: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def param(path: str) -> str:
    """The path as an optimizer sees it, without Linen's collection of params."""
    return path.removeprefix("params/")


def of_leaves(paths: Sequence[str], leaves: Sequence[Value], steps: Sequence[Step]) -> list[Role]:
    """The role of each leaf.

    Args:
      paths: of the leaves.
      leaves: their axes.
      steps: those of the walk.
    """
    looked_up: set[int] = set()
    summed: dict[int, set[int]] = {}
    read: set[int] = set()
    for step in steps:
        name = "" if step.equation is None else step.equation.primitive.name
        for value in step.operands:
            read |= value.leaves or frozenset()
        if name == "gather" and step.operands[0].leaves:
            looked_up |= {leaf for axes in step.operands[0].origins for leaf, _ in axes}
        elif name in ("dot_general", "conv_general_dilated"):
            for operand, dims in equations.contracted(step.equation, step.operands):
                if operand.leaves:
                    _note(operand, dims, summed)
    found = []
    for leaf, (path, value) in enumerate(zip(paths, leaves, strict=True)):
        rank = len(value.axes)
        inputs = tuple(i - rank for i in sorted(summed.get(leaf, ())))
        turns = {i - rank for i, axis in enumerate(value.axes) if any(walking.is_turn(a) for a in axes_.atoms(axis))}
        if leaf not in read:
            found.append(Role("unused"))
        elif groups.is_statistic(path):
            found.append(Role("statistic"))
        elif leaf in looked_up:
            found.append(Role("embedding"))
        elif inputs:
            found.append(Role("kernel", inputs, tuple(i for i in range(-rank, 0) if i not in {*inputs, *turns})))
        else:
            found.append(Role("scale or offset"))
    return found


def _note(operand: Value, dims: Sequence[int], summed: dict[int, set[int]]) -> None:
    """Note the axes of leaves that are summed over, but of those that only scale what is summed."""
    over = {axis for i in dims for axis in operand.origins[i]}
    free = [operand.origins[i] for i in range(len(operand.axes)) if i not in dims and operand.axes[i].size > 1]
    for leaf in {leaf for leaf, _ in over}:
        if not free or any(other == leaf for axes in free for other, _ in axes):
            summed.setdefault(leaf, set()).update(axis for other, axis in over if other == leaf)
