"""The argument `groups=` of `unit` and `shrink`: which leaves share units, and along which of their axes."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from clipjax._arrays import arguments, picking, trees
from clipjax.typing import Groups, Tree

STATISTICS = ("mean", "var")  # of a batch norm: no params, so no optimizer updates them

_ONE = "name one array by each path"


class GroupLeaf(NamedTuple):
    """One leaf of a group and the axis along which it has the group's units.

    Attributes:
      written: its path as the group writes it.
      path: its path in the tree.
      position: its place among the leaves of the tree.
      axis: the axis of its units, counted from the end.
      leaf: its array.
      repeats: how many entries of that axis belong to each of the n units: entry i belongs to unit i % n.
    """

    written: str
    path: str
    position: int
    axis: int
    leaf: jax.Array
    repeats: int


def check(groups: object) -> None:
    """Check a `groups=` argument: a list of dicts of paths."""
    if not isinstance(groups, Sequence) or not all(_is_group(group) for group in groups):
        raise TypeError(
            f"`groups` must be a list of dicts path -> axis, got {groups!r}."
            ' Write `[{"conv/kernel": -1, "conv/bias": 0, "out/kernel": 0}]`.'
        )


def _is_group(value: object) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(path, str) for path in value)


def of_params(groups: Groups) -> Groups:
    """The same groups for a tree of params: without the statistics, and without Linen's "params/" in front."""
    check(groups)
    kept = [{path: group[path] for path in group if path.rsplit("/", 1)[-1] not in STATISTICS} for group in groups]
    remedy = "Begin each with the kernel that makes the units."
    arguments.require(all(kept), "groups", "each name a param", groups, remedy)
    return [{path.removeprefix("params/"): axes for path, axes in group.items()} for group in kept]


def check_params(groups: Groups, params: Tree, scored: Tree) -> None:
    """Check that every path of the groups is in `params`, and that the first leaf of each group is scored.

    Nothing is required of a leaf that is None or below a `MaskedNode`, nor of a tree without leaves:
    `optax.tree.map_params` calls `init` with one.

    Args:
      groups: as `of_params` returns them.
      params: the params, None at leaves that no group names.
      scored: the same tree, None also at leaves that have no score.
    """
    plain = jax.tree.map(lambda x: None if _absent(x) else x, params, is_leaf=_absent)
    paths, leaves = trees.paths(plain), trees.flatten(plain)[0]
    absent = [path for path, x in zip(paths, leaves, strict=True) if x is None]
    # An absent node may stand for a whole subtree, whose paths begin with its own. A group may leave out the first part
    # of a path, the collection, so the absent path without it counts too.
    roots = [f"{root}/" for path in absent for root in (path, path.partition("/")[2]) if root]
    for written in dict.fromkeys(path for group in groups for path in group):
        ok = not paths or written.startswith(tuple(roots)) or bool(_positions(written, paths))
        arguments.require(ok, "groups", _ONE, written, _suggestion(written, paths))
    if len(absent) == len(paths):
        return
    has_score = [x is not None for x in trees.flatten(scored)[0]]
    firsts = set[int]()
    for group, found in zip(groups, resolve(groups, params, partial=True), strict=True):
        path = next(iter(group))
        picked = bool(found) and has_score[found[0].position]
        remedy = "Begin it with the kernel that makes the units, or leave the group out."
        arguments.require(picked, "groups", "begin with a leaf that `where` picks", path, remedy)
        remedy = "A group is known by its first leaf: begin one of them with another leaf."
        arguments.require(found[0].position not in firsts, "groups", "begin with different leaves", path, remedy)
        firsts.add(found[0].position)


def _absent(x: object) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def resolve(groups: Groups, tree: Tree, *, partial: bool = False) -> list[list[GroupLeaf]]:
    """The leaves of every group, found in a tree of arrays.

    Args:
      groups: checked ones.
      tree: with None at leaves that take no part.
      partial: leave out a path that is no array of the tree, and all leaves of a group whose first one is not there.

    Raises:
      ValueError: for an unknown or ambiguous path, an axis that does not exist or that is cut twice, and sizes that do
        not match.
    """
    leaves, paths = trees.flatten(tree)[0], trees.paths(tree)
    resolved = []
    for group in groups:
        named = [(written, _position(written, paths, leaves, partial)) for written in group]
        if named[0][1] is None:
            named = []
        cuts = [(written, i, axis) for written, i in named if i is not None for axis in _axes(group[written])]
        resolved.append(_group_leaves(cuts, paths, leaves))
    every = [(leaf.path, leaf.axis) for group_leaves in resolved for leaf in group_leaves]
    for i, (path, axis) in enumerate(every):
        remedy = "Put all leaves that share these units into one group."
        arguments.require((path, axis) not in every[:i], path, "be cut once along each axis", axis, remedy)
    return resolved


def _position(written: str, paths: list[str], leaves: list[Any], partial: bool) -> int | None:
    """Which array a group means: the one of this path, else the one of this path inside of a Linen collection."""
    found = [i for i in _positions(written, paths) if hasattr(leaves[i], "shape")]
    if partial and not found:
        return None
    whole = f"Write the whole path, one of {[paths[i] for i in found]}."
    arguments.require(len(found) == 1, "groups", _ONE, written, whole if found else _suggestion(written, paths))
    return found[0]


def _positions(written: str, paths: list[str]) -> list[int]:
    exact = [i for i, path in enumerate(paths) if path == written]
    if exact or not any(path.startswith("params/") for path in paths):
        return exact
    return [i for i, path in enumerate(paths) if path.partition("/")[2] == written]


def _suggestion(written: str, paths: list[str]) -> str:
    return f"Did you mean one of {difflib.get_close_matches(written, paths, n=5, cutoff=0.0)}?"


def _axes(axes: int | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def _group_leaves(cuts: list[tuple[str, int, int]], paths: list[str], leaves: list[Any]) -> list[GroupLeaf]:
    """The leaves of one group, their axes and sizes checked against those of the first."""
    found: list[GroupLeaf] = []
    for written, i, axis in cuts:
        path, leaf = paths[i], leaves[i]
        ok = -leaf.ndim <= operator.index(axis) < leaf.ndim
        arguments.require(ok, "groups", "name an axis that exists", axis, f"Leaf {path!r} has shape {leaf.shape}.")
        alone = GroupLeaf(written, path, i, axis if axis < 0 else axis - leaf.ndim, leaf, 1)
        found.append(alone._replace(repeats=_repeats(alone, found[0] if found else alone)))
    return found


def _repeats(leaf: GroupLeaf, first: GroupLeaf) -> int:
    """How many entries along the axis of a leaf belong to each unit of the first one."""
    units, size = units_of(first), int(leaf.leaf.shape[leaf.axis])
    if owns(leaf, first):
        remedy = f"It is cut along the same axis as {first.path!r} and must have its size, {units}."
        arguments.require(size == units, leaf.path, "have the units of its group", size, remedy)
    # A flattened map has the units as its fastest index only where they are the last axis of the features.
    ok = size == units or (units > 0 and size % units == 0 and first.axis == -1)
    rule = f"have {units} entries along the axis of its units" + ", or a multiple" * (first.axis == -1)
    arguments.require(ok, leaf.path, rule, size, f"Its units are those of {first.path!r}.")
    return size // units if units else 1


def units_of(leaf: GroupLeaf) -> int:
    """The number of units of its group."""
    return int(leaf.leaf.shape[leaf.axis]) // leaf.repeats


def owns(leaf: GroupLeaf, first: GroupLeaf) -> bool:
    """True for the first leaf, and for the other weights that are cut along the same axis counted from the end."""
    same = (leaf.path, leaf.axis) == (first.path, first.axis)
    return same or (leaf.axis == first.axis and picking.weights(leaf.path, leaf.leaf))
