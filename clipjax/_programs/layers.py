"""Layers that are stacked in one array and run one by one in a loop: which of them may have units of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipjax._programs import axes as axes_
from clipjax._programs import equations, exactness, walking
from clipjax._programs.axes import Axis
from clipjax._programs.equations import Value
from clipjax._programs.walking import Step

# Operations on whole stacks that make every layer of a result from the same layer of their operands.
_BY_LAYER = equations.ELEMENTWISE | set("transpose reshape squeeze expand_dims broadcast_in_dim".split())


def axes_of_layers(
    atom: Axis, leaves: Sequence[Value], bodies: Sequence[tuple[Axis, set[int]]], order: Sequence[Step]
) -> list[int] | None:
    """The axis of layers of each leaf, counted from the end; None where all layers have the same units.

    A layer may have units of its own where nothing but the inside of one turn, and stacks of what is in the turns, have
    the units, and no operation on these stacks brings two layers together.

    Args:
      atom: the units.
      leaves: those that have them.
      bodies: for each loop the axis of its turns and the identities of the values inside of one turn.
      order: all equations of the walk.
    """
    for turn, inside in bodies:
        turn = axes_.found(turn)
        stacked = all(_times(value, turn) for value in leaves)
        nested = any(axes_.found(other) is turn and made < inside for other, made in bodies)
        if stacked and not nested and all(_stays(step, atom, turn, inside) for step in order):
            return [_dims(value, turn)[0] - len(value.axes) for value in leaves]
    return None


def _dims(value: Value, turn: Axis) -> list[int]:
    return [i for i, axis in enumerate(value.axes) if axes_.found(axis) is turn]


def _times(value: Value, turn: Axis) -> int:
    return len(_dims(value, turn))


def _stays(step: Step, atom: Axis, turn: Axis, inside: set[int]) -> bool:
    """True where an equation leaves the units of every layer with this layer."""
    values = [value for value in (*step.operands, *step.results) if atom in exactness.atoms_of(value)]
    stacks = [value for value in values if _times(value, turn)]
    if any(id(value) not in inside for value in values if not _times(value, turn)):
        return False
    if not stacks or step.equation.primitive.name in walking.ENTERED:
        return all(_times(value, turn) == 1 for value in stacks)
    alike = len(stacks) == len(values) and all(_times(value, turn) == 1 for value in stacks)
    return alike and _by_layer(step.equation, step.operands, turn)


def _by_layer(equation: Any, operands: Sequence[Value], turn: Axis) -> bool:
    """True where each layer of the results is made from the same layer of the operands."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (left, right), (left_batch, right_batch) = params["dimension_numbers"]
        a, b = (set(_dims(value, turn)) for value in operands[:2])
        apart = not a or not b or (a <= {*left_batch} and b <= {*right_batch})
        return apart and a.isdisjoint(left) and b.isdisjoint(right)
    if name in equations.REDUCTIONS:
        return set(_dims(operands[0], turn)).isdisjoint(params["axes"])
    return name in _BY_LAYER
