"""Axes of arrays as products and sums of atoms, united where a program makes one of two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np


class Axis:
    """An axis of an array, or a part of one.

    It is free, an atom; or a product of factors, of which the outermost changes slowest; or a sum of parts, one behind
    the other. What is united is one axis from then on, and an atom that is split is its parts.

    Attributes:
      size: how many entries it has.
      pins: for an atom why its entries cannot be cut, one sentence for each reason.
    """

    __slots__ = ("_kids", "_link", "_sum", "pins", "size")

    def __init__(self, size: int, pins: Iterable[str] = ()) -> None:
        """A free axis."""
        self.size = int(size)  # NumPy's numbers come in with shapes
        self.pins = dict.fromkeys(pins)
        self._link: Axis | None = None
        self._kids: tuple[Axis, ...] = ()
        self._sum = False


def found(axis: Axis) -> Axis:
    """The axis that stands for all that are united with this one."""
    while axis._link is not None:
        if axis._link._link is not None:
            axis._link = axis._link._link
        axis = axis._link
    return axis


def kids(axis: Axis) -> tuple[Axis, ...]:
    """The factors or parts of an axis, none of an atom."""
    return found(axis)._kids


def is_sum(axis: Axis) -> bool:
    """True for an axis of parts."""
    return found(axis)._sum


def product(factors: Sequence[Axis]) -> Axis:
    """The axis that has these factors, the outermost first; factors of size 1 are dropped."""
    kept = [factor for factor in factors if factor.size != 1]
    if len(kept) == 1:
        return kept[0]
    made = Axis(math.prod(factor.size for factor in kept))
    made._kids = tuple(kept)
    return made


def total(parts: Sequence[Axis]) -> Axis:
    """The axis that has these parts, one behind the other; empty parts are dropped."""
    kept = [part for part in parts if part.size]
    if len(kept) == 1:
        return kept[0]
    made = Axis(sum(part.size for part in kept))
    made._kids, made._sum = tuple(kept), True
    return made


def _factors(axis: Axis) -> list[Axis]:
    axis = found(axis)
    if not axis._kids or axis._sum:
        return [axis]
    return [factor for kid in axis._kids for factor in _factors(kid)]


def _parts(axis: Axis) -> list[Axis]:
    axis = found(axis)
    if not axis._sum:
        return [axis]
    return [part for kid in axis._kids for part in _parts(kid)]


def atoms(axis: Axis) -> list[Axis]:
    """The atoms of an axis, in order, each as often as it occurs."""
    axis = found(axis)
    return [axis] if not axis._kids else [atom for kid in axis._kids for atom in atoms(kid)]


def pin(axis: Axis, reason: str) -> None:
    """Forbid to cut anything of an axis."""
    for atom in atoms(axis):
        atom.pins[reason] = None


def unite(a: Axis, b: Axis, reason: str) -> None:
    """Make one axis of two; where they cannot be one, both are pinned with the reason."""
    a, b = found(a), found(b)
    if a is b:
        return
    if a.size != b.size:
        _refuse((a, b), f"{reason}: {a.size} entries meet {b.size}")
    elif not a._kids or not b._kids:
        _link(a, b, reason) if not a._kids else _link(b, a, reason)
    elif a._sum and b._sum and _shifted(a, b):
        _refuse((a, b), f"{reason}: an axis meets itself at another place")
    elif a._sum and b._sum:
        _align(_parts(a), _parts(b), cut, lambda big, small: big - small, reason)
    elif not a._sum and not b._sum:
        divided = lambda big, small: big // small if big % small == 0 else 0  # noqa: E731
        _align(_factors(a), _factors(b), split, divided, reason)
    else:
        whole, parts = (b, _parts(a)) if a._sum else (a, _parts(b))
        for piece, part in zip(cut(whole, [part.size for part in parts], reason), parts, strict=True):
            unite(piece, part, reason)


def _refuse(axes: Iterable[Axis], reason: str) -> None:
    for axis in axes:
        pin(axis, reason)


def _shifted(a: Axis, b: Axis) -> bool:
    """True where a part of one axis meets itself in the other, but for its place: each entry would be its neighbour."""
    starts: dict[tuple[Axis, ...], list[int]] = {}
    for part, start in _places_of_parts(a):
        starts.setdefault(tuple(_factors(part)), []).append(start)
    return any(
        0 < abs(start - other) < part.size
        for part, start in _places_of_parts(b)
        for other in starts.get(tuple(_factors(part)), ())
    )


def _places_of_parts(axis: Axis) -> Iterable[tuple[Axis, int]]:
    parts = _parts(axis)
    return zip(parts, itertools.accumulate((part.size for part in parts), initial=0), strict=False)


def _link(atom: Axis, other: Axis, reason: str) -> None:
    """Unite an atom with another axis."""
    if other._kids and atom in atoms(other):
        _refuse((atom, other), f"{reason}: an axis would be a part of itself")
        return
    for why in atom.pins:
        pin(other, why)
    atom._link = other


def _align(a: list[Axis], b: list[Axis], divide, rest, reason: str) -> None:  # type: ignore[no-untyped-def]
    """Unite the factors, or the parts, of two axes from the outside; larger ones are divided where they must be."""
    a, b = a[::-1], b[::-1]
    while a and b:
        one, other = a.pop(), b.pop()
        if one.size != other.size:
            turned = one.size < other.size
            big, small, stack = (other, one, b) if turned else (one, other, a)
            left = rest(big.size, small.size)
            if not left:
                _refuse((one, other, *a, *b), f"{reason}: {one.size} entries do not divide into {other.size}")
                return
            one, more = divide(big, [small.size, left], reason)
            stack.append(more)
            other = small
        unite(one, other, reason)


def split(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    """The factors of these sizes, the outermost first; new ones that are pinned where the axis has no such factors."""
    axis = found(axis)
    if len(sizes) == 1:
        return [axis]
    if any(size == 1 for size in sizes):  # an axis of size 1 is no factor of anything
        rest = iter(split(axis, [size for size in sizes if size != 1] or [1], reason))
        return [Axis(1) if size == 1 else next(rest) for size in sizes]
    if not axis._kids:
        axis._kids = tuple(Axis(size, axis.pins) for size in sizes)
        return list(axis._kids)
    if axis._sum:
        return _split_sum(axis, sizes, reason)
    taken: list[Axis] = []
    factors = _factors(axis)[::-1]
    for size in sizes:
        group: list[Axis] = []
        while (done := math.prod(factor.size for factor in group)) < size:
            factor = factors.pop()
            if size % done == 0 and (size // done) % factor.size == 0:
                group.append(factor)
            elif size % done == 0 and factor.size % (size // done) == 0:
                outer, inner = split(factor, [size // done, factor.size * done // size], reason)
                group.append(outer)
                factors.append(inner)
            else:
                return _broken(axis, sizes, f"{reason}: {axis.size} entries are divided across a factor")
        taken.append(product(group))
    return taken


def _split_sum(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    inner = math.prod(sizes[1:])
    parts = _parts(axis)
    if any(part.size % inner for part in parts):
        return _broken(axis, sizes, f"{reason}: parts of {[part.size for part in parts]} are divided by {inner}")
    rows = [split(part, [part.size // inner, *sizes[1:]], reason) for part in parts]
    for row in rows[1:]:
        for one, other in zip(rows[0][1:], row[1:], strict=True):
            unite(one, other, reason)
    return [total([row[0] for row in rows]), *rows[0][1:]]


def cut(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    """The parts of these sizes, one behind the other; new ones that are pinned where it cannot be cut so."""
    axis = found(axis)
    if len(sizes) == 1:
        return [axis]
    if not all(sizes):
        rest = iter(cut(axis, [size for size in sizes if size], reason))
        return [next(rest) if size else Axis(0) for size in sizes]
    if not axis._kids:
        axis._kids, axis._sum = tuple(Axis(size, axis.pins) for size in sizes), True
        return list(axis._kids)
    if axis._sum:
        return _cut_sum(axis, sizes, reason)
    factors = _factors(axis)
    for i in range(1, len(factors)):
        inner = math.prod(factor.size for factor in factors[i:])
        if all(size % inner == 0 for size in sizes):
            outer = cut(product(factors[:i]), [size // inner for size in sizes], reason)
            return [product([piece, *factors[i:]]) for piece in outer]
    return _broken(axis, sizes, f"{reason}: {axis.size} entries are cut inside of a factor")


def _cut_sum(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    parts, taken = _parts(axis)[::-1], []
    for size in sizes:
        group: list[Axis] = []
        while (left := size - sum(part.size for part in group)) > 0:
            part = parts.pop()
            if part.size > left:
                part, rest = cut(part, [left, part.size - left], reason)
                parts.append(rest)
            group.append(part)
        taken.append(total(group))
    return taken


def _broken(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    pin(axis, reason)
    return [Axis(size, [reason]) for size in sizes]


def regroup(axes: Sequence[Axis], shape: Sequence[int], reason: str) -> list[Axis]:
    """The axes of an array after a reshape."""
    made: list[Axis] = []
    i = 0
    before, after = [axis for axis in axes if axis.size != 1], [size for size in shape if size != 1]
    if 0 in shape:
        return [Axis(size) for size in shape]
    while before:
        size, new, first = 1, 1, i
        group: list[Axis] = []
        while not group or size != new:  # the fewest axes on both sides that hold as many entries
            if size <= new:
                group.append(before.pop(0))
                size *= group[-1].size
            else:
                new *= after[i]
                i += 1
        made += split(product(group), after[first:i], reason)
    rest = iter(made)
    return [Axis(1) if size == 1 else next(rest) for size in shape]


def places(axis: Axis, atom: Axis) -> np.ndarray | None:
    """For each entry of an axis which entry of the atom it belongs to, -1 for none; None where it would be two."""
    axis = found(axis)
    if axis is atom:
        return np.arange(axis.size)
    if not axis._kids:
        return np.full(axis.size, -1)
    inside = [places(kid, atom) for kid in axis._kids]
    if any(place is None for place in inside):
        return None
    known = [place for place in inside if place is not None]
    if axis._sum:
        return np.concatenate(known)
    own = [i for i, place in enumerate(known) if (place >= 0).any()]
    if len(own) > 1:
        return None
    if not own:
        return np.full(axis.size, -1)
    sizes = [kid.size for kid in axis._kids]
    outer, inner = math.prod(sizes[: own[0]]), math.prod(sizes[own[0] + 1 :])
    return np.tile(np.repeat(known[own[0]], inner), outer)


def times(axis: Axis, atom: Axis) -> int:
    """How many units of an atom an entry of an axis belongs to, at most."""
    axis = found(axis)
    if axis is atom or not axis._kids:
        return int(axis is atom)
    inside = [times(kid, atom) for kid in axis._kids]
    return max(inside) if axis._sum else sum(inside)


def pairs(axes: Iterable[Axis]) -> Iterable[tuple[Axis, Axis]]:
    """Neighbours, for uniting several."""
    return itertools.pairwise(axes)
