"""Groups: leaves, and their axes, that hold the entries of the same units, named by path. For `unit` and `shrink`."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from clipjax._arrays import arguments, picking, trees
from clipjax.typing import Groups, Tree

STATISTICS = ("mean", "var")  # of a batch norm: no params, so that no optimizer sees them


_ONE = "name one array by each path"


class Member(NamedTuple):
    """One leaf of a group, cut along one axis.

    Attributes:
      written: how the group writes it.
      path: its path.
      index: its place among the leaves of the tree.
      axis: the axis of its units, counted from the end.
      leaf: its array.
      repeats: how many entries of that axis belong to each unit: entry i is of unit i % n.
    """

    written: str
    path: str
    index: int  # type: ignore[assignment]
    axis: int
    leaf: Any
    repeats: int


def check(groups: Any) -> None:
    """Check a `groups=` argument: a list of dicts of paths."""
    ok = isinstance(groups, Sequence) and all(isinstance(group, Mapping) and group for group in groups)
    if not ok or any(not isinstance(path, str) for group in groups for path in group):
        raise TypeError(
            f"`groups` must be a list of dicts path -> axis, got {groups!r}."
            ' Write `[{"conv/kernel": -1, "conv/bias": 0, "out/kernel": 0}]`.'
        )


def of_params(groups: Any) -> Groups:
    """The part of groups that an optimizer sees: paths of params, without the collection and without statistics."""
    check(groups)
    kept = [{path: group[path] for path in group if path.rsplit("/", 1)[-1] not in STATISTICS} for group in groups]
    remedy = "Begin each with the kernel that makes the units."
    arguments.require(all(kept), "groups", "each name a param", groups, remedy)
    return [{path.removeprefix("params/"): axes for path, axes in group.items()} for group in kept]


def check_params(groups: Groups, params: Tree, voters: Tree) -> None:
    """Check the groups against params that are None where no group names them, and against those that vote.

    A leaf that is None, or below a `MaskedNode`, is passed over, and so is everything where the tree has no leaves:
    `optax.tree.map_params` inits with such a tree.
    """
    plain = jax.tree.map(lambda x: None if _hole(x) else x, params, is_leaf=_hole)
    paths, leaves = trees.paths(plain), trees.flatten(plain)[0]
    holes = [path for path, x in zip(paths, leaves, strict=True) if x is None]
    for written in dict.fromkeys(path for group in groups for path in group):
        above = any(written.startswith(f"{end}/") for hole in holes for end in (hole, hole.partition("/")[2]) if end)
        remedy = _near(written, paths)
        arguments.require(not paths or above or _at(written, paths), "groups", _ONE, written, remedy)
    if len(holes) == len(paths):
        return
    votes, firsts = trees.flatten(voters)[0], set[int]()
    for group, members in zip(groups, resolve(groups, params, partial=True), strict=True):
        path, ok = next(iter(group)), bool(members) and votes[members[0].index] is not None
        remedy = "Begin it with the kernel that makes the units, or leave the group out."
        arguments.require(ok, "groups", "begin with a leaf that `where` picks", path, remedy)
        remedy = "The first leaf tells them apart: begin one of them with another leaf."
        arguments.require(members[0].index not in firsts, "groups", "begin with different leaves", path, remedy)
        firsts.add(members[0].index)


def _hole(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def resolve(groups: Groups, tree: Tree, *, partial: bool = False) -> list[list[Member]]:
    """The members of every group in a tree of arrays.

    Args:
      groups: as `check` wants them.
      tree: with None at leaves that take no part.
      partial: pass over what is no array of the tree; a group without its first leaf has no members.

    Raises:
      ValueError: for an unknown or ambiguous path, an axis that does not exist or that is cut twice, and sizes that do
        not match.
    """
    leaves, paths = trees.flatten(tree)[0], trees.paths(tree)
    found = []
    for group in groups:
        named = [(written, find(written, paths, leaves, partial)) for written in group]
        if named[0][1] is None:
            named = []
        sited = [(w, i, axis) for w, i in named if i is not None for axis in _each(group[w])]
        found.append(_members(sited, paths, leaves))
    cuts = [(m.path, m.axis) for members in found for m in members]
    for i, (path, axis) in enumerate(cuts):
        remedy = "Put all leaves that share these units into one group."
        arguments.require((path, axis) not in cuts[:i], path, "be cut once along each axis", axis, remedy)
    return found


def find(written: str, paths: list[str], leaves: list[Any], partial: bool = False) -> int | None:
    """The array that a group means: by its whole path, else by its path inside of a Linen collection."""
    hits = [i for i in _at(written, paths) if hasattr(leaves[i], "shape")]
    if partial and not hits:
        return None
    remedy = f"Write the whole path, one of {[paths[i] for i in hits]}." if hits else _near(written, paths)
    arguments.require(len(hits) == 1, "groups", _ONE, written, remedy)
    return hits[0]


def _at(written: str, paths: list[str]) -> list[int]:
    exact = [i for i, path in enumerate(paths) if path == written]
    if exact or not any(path.startswith("params/") for path in paths):
        return exact
    return [i for i, path in enumerate(paths) if path.partition("/")[2] == written]


def _near(written: str, paths: list[str]) -> str:
    return f"Did you mean one of {difflib.get_close_matches(written, paths, n=5, cutoff=0.0)}?"


def _each(axes: Any) -> tuple[Any, ...]:
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def _members(sited: list[tuple[str, int, Any]], paths: list[str], leaves: list[Any]) -> list[Member]:
    """The members of one group, their axes and sizes checked against those of the first."""
    members: list[Member] = []
    for written, i, axis in sited:
        path, leaf = paths[i], leaves[i]
        ok = -leaf.ndim <= operator.index(axis) < leaf.ndim
        arguments.require(ok, "groups", "name an axis that exists", axis, f"Leaf {path!r} has shape {leaf.shape}.")
        member = Member(written, path, i, axis if axis < 0 else axis - leaf.ndim, leaf, 1)
        members.append(member._replace(repeats=_repeats(member, members[0] if members else member)))
    return members


def _repeats(member: Member, first: Member) -> int:
    """How often the units of the first leaf stand along the axis of another one."""
    units, size = units_of(first), int(member.leaf.shape[member.axis])
    if owns(member, first):
        remedy = f"It is cut along the same axis as {first.path!r} and must have its size, {units}."
        arguments.require(size == units, member.path, "have the units of its group", size, remedy)
    # A flattened map has the units as its fastest index only where they are the last axis of the features.
    ok = size == units or (units > 0 and size % units == 0 and first.axis == -1)
    rule = f"have {units} entries along the axis of its units" + ", or a multiple" * (first.axis == -1)
    arguments.require(ok, member.path, rule, size, f"Its units are those of {first.path!r}.")
    return size // units if units else 1


def units_of(member: Member) -> int:
    """How many units its group has."""
    return int(member.leaf.shape[member.axis]) // member.repeats


def owns(member: Member, first: Member) -> bool:
    """True for the first leaf, and for the other weights that are cut along the same axis counted from the end."""
    same = (member.path, member.axis) == (first.path, first.axis)
    return same or (member.axis == first.axis and picking.weights(member.path, member.leaf))
