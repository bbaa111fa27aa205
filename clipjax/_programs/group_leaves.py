"""The leaves of groups, found in a tree of arrays: which axis of each has units, and which entry belongs to which."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from clipjax._arrays import arguments, picked_leaves, trees
from clipjax._programs import groups as grouping
from clipjax._programs.groups import Group
from clipjax.typing import Groups, Tree, UnitAxes

_ONE = "name one array by each path"


class GroupLeaf(NamedTuple):
    """One leaf of a group and the axis along which it has the group's units.

    Attributes:
      written: its path as the group writes it.
      path: its path in the tree.
      position: its place among the leaves of the tree.
      axis: the axis of its units, counted from the end.
      leaf: its array.
      units: how many units the group has.
      places: for each entry of that axis the unit that it belongs to, -1 for none.
      owns: True where the unit is alive if one of these entries is not 0.
      layers: the axis of stacked layers, counted from the end, each of which has units of its own; None for none.
    """

    written: str
    path: str
    position: int
    axis: int
    leaf: jax.Array
    units: int = 0
    places: np.ndarray = np.arange(0)
    owns: bool = False
    layers: int | None = None

    @property
    def own(self) -> tuple[int, ...]:
        """The axes along which it differs from unit to unit: its axis, and that of layers."""
        return (self.axis,) if self.layers is None else (self.axis, self.layers)

    @property
    def depth(self) -> int:
        """How many layers have units of their own."""
        return 1 if self.layers is None else int(self.leaf.shape[self.layers])

    def along(self, size: int) -> tuple[int, ...]:
        """The shape of `size` values along its axis, in each of its layers; 1 in its other axes."""
        sizes = {self.axis: size} if self.layers is None else {self.axis: size, self.layers: self.depth}
        return tuple(sizes.get(i, 1) for i in range(-self.leaf.ndim, 0))


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
        cuts = [(written, i, group[written]) for written, i in named if i is not None]
        resolved.append(_group_leaves(cuts, paths, leaves, grouping.analyzed(group)))
    by_hand = (leaves for group, leaves in zip(groups, resolved, strict=True) if grouping.analyzed(group) is None)
    every = [(leaf.path, leaf.axis) for group_leaves in by_hand for leaf in group_leaves]
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


def _times(axes: UnitAxes) -> list[tuple[int, int]]:
    """The axes that a group names, and how many entries each unit has along them."""
    if not isinstance(axes, Mapping):
        return [(axis, 1) for axis in (axes if isinstance(axes, tuple | list) else (axes,))]
    for axis, times in axes.items():
        remedy = "Write {axis: times}: how many entries of the axis each unit has."
        arguments.whole(times, f"groups[{axis}]", low=1, remedy=remedy)
    return [(axis, int(times)) for axis, times in axes.items()]


def _group_leaves(
    cuts: list[tuple[str, int, UnitAxes]], paths: list[str], leaves: list[Any], known: Group | None
) -> list[GroupLeaf]:
    """The leaves of one group, their axes and sizes checked."""
    found: list[GroupLeaf] = []
    for written, i, axes in cuts:
        shape = leaves[i].shape
        for axis, times in _times(axes):
            ok = -len(shape) <= operator.index(axis) < len(shape)
            arguments.require(ok, "groups", "name an axis that exists", axis, f"Leaf {paths[i]!r} has shape {shape}.")
            leaf = GroupLeaf(written, paths[i], i, axis if axis < 0 else axis - len(shape), leaves[i])
            first = found[0] if found else None
            found.append(_by_hand(leaf, times, first) if known is None else _analyzed(leaf, known, first))
    return found


def _analyzed(leaf: GroupLeaf, group: Group, first: GroupLeaf | None) -> GroupLeaf:
    """A leaf of a group that `analyze` found: every entry but those of statistics says whether its unit is alive."""
    member = next(m for m in group.members if m.path == leaf.written and m.axis == leaf.axis)
    size, places = leaf.leaf.shape[leaf.axis], member.places
    remedy = (
        "The groups are those of another model, or of this one before `shrink`. Behind it `prune_mask` has done its"
        " work: leave it out of the chain, and its state out of the state. To prune further analyze the model again."
    )
    arguments.require(size == len(places), leaf.path, f"have {len(places)} entries", size, remedy)
    leaf = leaf._replace(layers=member.layers if group.layered else None)
    depth = leaf.depth if first is None else first.depth
    arguments.require(leaf.depth == depth, leaf.path, f"have {depth} layers", leaf.depth, remedy)
    return leaf._replace(units=group.units, places=places, owns=not grouping.is_statistic(leaf.path))


def _by_hand(leaf: GroupLeaf, times: int, first: GroupLeaf | None) -> GroupLeaf:
    """A leaf of a group that a user wrote: entry i belongs to unit i % n, the n units being those of the first leaf.

    The first leaf owns the units, and so do the other weights that are cut along the same axis counted from the end.
    """
    size = int(leaf.leaf.shape[leaf.axis])
    same = first is not None and leaf.axis == first.axis
    owns = first is None or (same and (leaf.path == first.path or picked_leaves.weights(leaf.path, leaf.leaf)))
    units, owner = (size, leaf) if first is None else (first.units, first)
    if owns:
        remedy = f"It is cut along the same axis as {owner.path!r} and must have its size, {units}, once."
        arguments.require(size == units and times == 1, leaf.path, "have the units of its group", size, remedy)
    # A flattened map has the units as its fastest index only where they are the last axis of the features.
    last = owner.axis == -1
    remedy = f"Its units are those of {owner.path!r}."
    if last and units and size % units == 0:
        remedy += (
            f" If entry i belongs to unit i % {units}, as in a flattened map, say how many entries each unit has:"
            f" `{leaf.written!r}: {{{leaf.axis}: {size // units}}}`."
        )
    wanted = units * times if last else units
    ok = size == wanted and (last or times == 1)
    arguments.require(ok, leaf.path, f"have {wanted} entries along the axis of its units", size, remedy)
    return leaf._replace(units=units, places=np.arange(size) % max(units, 1), owns=owns)
