"""Means over units, whose number stands in the program; a scale behind a root mean square can make up for it."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp

from clipjax._programs import axes as axes_
from clipjax._programs import walking
from clipjax._programs.axes import Axis
from clipjax._programs.equations import Value
from clipjax._programs.walking import Step

_KEEP_ENTRIES = set(
    "broadcast_in_dim reshape squeeze expand_dims transpose convert_element_type copy copy_p reduce_precision"
    " sharding_constraint stop_gradient name optimization_barrier pvary pcast".split()
)
_HALF = Fraction(1, 2)


class Mean:
    """A sum over axes that is divided by the number of its terms.

    Where d of them become d', and a number epsilon that is added to it becomes epsilon * d / d', everything that is
    proportional to its power p becomes (d / d')^p times what it was.

    Attributes:
      step: the division.
      axes: what is summed over.
      epsilon: the number that is added, in the step `adds`; None for none.
      follows: True where a second trace has shown that the program itself adds epsilon * d / d'.
      scales: the leaves that multiply its power -1/2, with the number that is added to each of them.
      used: where it is used in another way; "" for nowhere.
    """

    def __init__(self, step: Step, axes: Sequence[Axis]) -> None:
        """Nothing is known of its uses."""
        self.step, self.axes = step, tuple(axes)
        self.epsilon: float | None = None
        self.adds: Step | None = None
        self.follows = False
        self.scales: list[tuple[int, float]] = []
        self.used = ""

    @property
    def terms(self) -> int:
        """How many terms it has."""
        return math.prod(axis.size for axis in self.axes)

    def atoms(self) -> set[Axis]:
        """The atoms of its axes."""
        return {atom for axis in self.axes for atom in axes_.atoms(axis)}


class _Power(NamedTuple):
    mean: Mean
    power: Fraction


class Means:
    """The means of a program.

    Attributes:
      found: all of them.
      sums: the identities of the steps that sum over units, and whose sums are used otherwise than in a mean.
    """

    def __init__(self, steps: Sequence[Step], leaves: Sequence[Value], results: Sequence[Value]) -> None:
        """Follow every sum and every mean through the steps of a walk."""
        self.found: list[Mean] = []
        self.sums: set[int] = set()
        self._terms: dict[int, tuple[int, tuple[Axis, ...]]] = {}  # the sums that a value is, and what is summed over
        self._powers: dict[int, _Power] = {}
        self._scales: dict[int, tuple[int, float]] = {id(value): (i, 0.0) for i, value in enumerate(leaves)}
        self._leaves = leaves
        other_uses: set[int] = set()
        for step in steps:
            self._follow(step, other_uses)
        for step in steps:  # what a turn of a loop gives is known only now
            if step.equation is None and len(step.operands) > 1:
                for value in step.operands:
                    self._end(value, step.where, other_uses)
        for value in results:
            self._end(value, "an output of the model", other_uses)
        for mean in self.found:
            if any(leaf in other_uses for leaf, _ in mean.scales):
                mean.used = "the scale behind it is used elsewhere"

    def _follow(self, step: Step, other_uses: set[int]) -> None:
        name = "" if step.equation is None else step.equation.primitive.name
        same = name in _KEEP_ENTRIES and not _rounds_to_integers(step)
        if (same or not name) and len(step.operands) == 1:
            for known in (self._terms, self._powers, self._scales):
                if id(step.operands[0]) in known:
                    known[id(step.results[0])] = known[id(step.operands[0])]  # type: ignore[assignment]
            return
        if not name or self._mean(step, name) or self._power(step, name) or self._offset(step, name):
            return
        for value in step.operands:
            self._end(value, step.where, other_uses)
        if name == "reduce_sum":
            axes = tuple(step.operands[0].axes[i] for i in step.equation.params["axes"])
            if any(not atom.pins for axis in axes for atom in axes_.atoms(axis)):
                self._terms[id(step.results[0])] = (id(step), axes)

    def _end(self, value: Value, where: str, other_uses: set[int]) -> None:
        """A value is used in a way that nothing is known of."""
        if id(value) in self._powers:
            self._powers[id(value)].mean.used = where
        if id(value) in self._terms:
            self.sums.add(self._terms[id(value)][0])
        if id(value) in self._scales:
            other_uses.add(self._scales[id(value)][0])

    def _mean(self, step: Step, name: str) -> bool:
        """A sum that is divided by the number of its terms, or multiplied by the inverse."""
        if name not in ("div", "mul") or len(step.operands) != 2:
            return False
        for value, by in (step.operands, step.operands[::-1]) if name == "mul" else (step.operands,):
            if id(value) not in self._terms or by.constant is None:
                continue
            axes = self._terms[id(value)][1]
            mean = Mean(step, axes)
            number = float(by.constant) if name == "div" else (1 / float(by.constant) if by.constant else 0.0)
            if number and abs(number - mean.terms) < 1e-6 * mean.terms:
                self.found.append(mean)
                self._powers[id(step.results[0])] = _Power(mean, Fraction(1))
                return True
        return False

    def _power(self, step: Step, name: str) -> bool:
        """Operations of which the result is proportional to a power of a mean."""
        powers = [self._powers.get(id(value)) for value in step.operands]
        known = [power for power in powers if power is not None]
        if not known:
            return False
        mean, power = known[0]
        if len(powers) == 1:
            factor = {"rsqrt": -_HALF, "sqrt": _HALF, "neg": Fraction(1), "abs": Fraction(1), "square": Fraction(2)}
            factor["integer_pow"] = Fraction(step.equation.params.get("y", 0)) if name == "integer_pow" else Fraction(0)
            if not factor.get(name):
                return False
            new = power * factor[name]
        elif name == "add" and power == 1 and len(known) == 1:
            return self._add_epsilon(step, mean)
        elif name in ("mul", "div") and len({p.mean for p in known}) == 1:
            signs = (1, 1 if name == "mul" else -1)
            new = sum((p.power * sign for p, sign in zip(powers, signs, strict=True) if p), Fraction(0))
            if name == "mul" and len(known) == 1 and self._repair(step, powers, mean, new):
                return True
        else:
            return False
        for value, own in zip(step.operands, powers, strict=True):
            if own is None and (id(value) in self._scales or id(value) in self._terms):
                return False  # a leaf of another shape, or a sum: their uses are noted
        self._powers[id(step.results[0])] = _Power(mean, new)
        return True

    def _add_epsilon(self, step: Step, mean: Mean) -> bool:
        constant = next((v.constant for v in step.operands if v.constant is not None), None)
        if constant is None or mean.epsilon is not None:
            return False
        mean.epsilon, mean.adds = float(constant), step
        self._powers[id(step.results[0])] = _Power(mean, Fraction(1))
        return True

    def _repair(self, step: Step, powers: Sequence[Any], mean: Mean, power: Fraction) -> bool:
        """A product with a leaf that has one entry for each term: the leaf can make up for the power -1/2."""
        other = step.operands[0 if powers[1] is not None else 1]
        found = self._scales.get(id(other))
        if found is None or power != -_HALF:
            return False
        leaf = self._leaves[found[0]]
        own = [axis for axis in leaf.axes if not any(walking.is_turn(atom) for atom in axes_.atoms(axis))]
        if math.prod(axis.size for axis in own) != mean.terms or _counted(own) != _counted(mean.axes):
            return False
        mean.scales.append(found)
        return True

    def _offset(self, step: Step, name: str) -> bool:
        """A number is added to a leaf."""
        if name != "add":
            return False
        for value, other in (step.operands, step.operands[::-1]):
            if id(value) in self._scales and other.constant is not None:
                leaf, offset = self._scales[id(value)]
                self._scales[id(step.results[0])] = (leaf, offset + float(other.constant))
                return True
        return False


def _rounds_to_integers(step: Step) -> bool:
    return not jnp.issubdtype(step.equation.outvars[0].aval.dtype, jnp.inexact)


def _counted(axes: Sequence[Axis]) -> collections.Counter[Axis]:
    return collections.Counter(atom for axis in axes for atom in axes_.atoms(axis))
