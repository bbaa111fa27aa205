"""The argument `groups=` of `unit` and `shrink`: which leaves share units, and along which of their axes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from clipjax._arrays import arguments
from clipjax.typing import Groups


def is_statistic(path: str) -> bool:
    """True for running statistics and caches: values that no optimizer updates. Haiku's are averages in its state."""
    haiku = r"(state/.*|(.*/)?(mean|var)_ema)/(average|hidden|counter)$"
    return re.match(rf"(batch_stats|cache)/|{haiku}|(.*/)?(mean|var)$", path) is not None


def inside_collection(path: str) -> str:
    """The path of a statistic in its collection, which a function may return alone; "" for all else."""
    inside = path.partition("/")[2]
    return inside if is_statistic(path) and re.match("(batch_stats|cache|state)/", path) and "/" in inside else ""


class Member(NamedTuple):
    """A leaf of a group that `analyze` found, and the axis along which its entries belong to the group's units.

    Attributes:
      path: of the leaf, as an optimizer sees the params.
      axis: counted from the end.
      places: for each entry of the axis the unit that it belongs to, -1 for none.
      layers: the axis of stacked layers, counted from the end, each of which has units of its own; None for none.
    """

    path: str
    axis: int
    places: np.ndarray
    layers: int | None = None


class Repair(NamedTuple):
    """A scale behind a root mean square over units, which is divided by their number.

    With d' of d units left, the scale c becomes (offset + c) * sqrt(d / d') - offset, and the number that the model
    adds to the mean square becomes epsilon * d / d'; the outputs are then what they were.

    Attributes:
      path: of the scale.
      offset: 1 where the model multiplies by 1 + c.
      epsilon: the number that the model adds to the mean square; 0 for none, and where the model itself adds another.
    """

    path: str
    offset: float
    epsilon: float


class Traceable(Protocol):
    """A program that can be traced again."""

    def differs(self, new: Mapping[Any, int]) -> str:
        """Where the program with other numbers of units is another program; "" for nowhere."""


class Group(Mapping[str, "int | tuple[int, ...]"]):
    """Units that several leaves share: a mapping path -> axis, or axes, and which entries belong to which unit.

    Attributes:
      units: how many there are.
      members: the leaves and axes.
      proved: True where the program was traced again with another number of units, and depends on it in its shapes
        alone.
      repairs: the scales that make up for the units that are cut.
      statistics: why the outputs change when units are cut: statistics that run over them; empty for an exact cut.
      refusal: what the model raised when it was traced with another number of units.
      evidence: the program that was read, and the atom of it that has these units; None for none.
    """

    def __init__(
        self,
        units: int,
        members: Sequence[Member],
        proved: bool,
        repairs: Sequence[Repair] = (),
        statistics: Sequence[str] = (),
        refusal: str = "",
        evidence: tuple[Traceable, Any] | None = None,
    ) -> None:
        """A group of these members."""
        self.units, self.members, self.proved = units, tuple(members), proved
        self.repairs, self.statistics, self.refusal = tuple(repairs), tuple(statistics), refusal
        self.evidence = evidence

    def __getitem__(self, path: str) -> int | tuple[int, ...]:
        """The axis, or the axes, of a leaf."""
        found = tuple(member.axis for member in self.members if member.path == path)
        if not found:
            raise KeyError(path)
        return found[0] if len(found) == 1 else found

    def __iter__(self) -> Iterator[str]:
        """The paths."""
        return iter(dict.fromkeys(member.path for member in self.members))

    def __len__(self) -> int:
        """How many leaves it has."""
        return len({member.path for member in self.members})

    def __repr__(self) -> str:
        """The number of units, and the leaves."""
        leaves = ", ".join(f"{path}: {self[path]}" for path in self)
        return f"Group({self.units} units; {leaves})"

    @property
    def layered(self) -> bool:
        """True where each layer of a stack has units of its own, in all leaves of the group."""
        return all(member.layers is not None for member in self.members)

    def of_params(self) -> Group:
        """Without the statistics, which no optimizer updates."""
        kept = [m for m in self.members if not is_statistic(m.path)]
        return Group(self.units, kept, self.proved, self.repairs, self.statistics, self.refusal, self.evidence)


def check(groups: object) -> None:
    """Check a `groups=` argument: a list of dicts of paths."""
    if not isinstance(groups, Sequence) or not all(_is_group(group) for group in groups):
        raise TypeError(
            f"`groups` must be a list of dicts path -> axis, got {groups!r}."
            ' Give `analysis.groups`, or write `[{"conv/kernel": -1, "conv/bias": 0, "out/kernel": 0}]`.'
        )


def analyzed(value: Mapping[str, Any]) -> Group | None:
    """A group that `analyze` found; None for one by hand."""
    return value if isinstance(value, Group) else None


def layers(group: Mapping[str, Any]) -> tuple[int, ...]:
    """The axis of layers that have units of their own, of the first leaf of a group; () for none."""
    known = analyzed(group)
    first = None if known is None or not known.layered else known.members[0].layers
    return () if first is None else (first,)


def _is_group(value: object) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(path, str) for path in value)


def of_params(groups: Groups) -> Groups:
    """The same groups for a tree of params: without the statistics, and without Linen's "params/" in front."""
    check(groups)
    kept = [_of_params(group) for group in groups]
    remedy = "Begin each with the kernel that makes the units."
    arguments.require(all(kept), "groups", "each name a param", groups, remedy)
    return kept


def _of_params(group: Mapping[str, Any]) -> Mapping[str, Any]:
    known = analyzed(group)
    if known is not None:
        return known.of_params()
    kept = {path: group[path] for path in group if not is_statistic(path)}
    return {path.removeprefix("params/"): axes for path, axes in kept.items()}
