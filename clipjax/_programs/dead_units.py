"""Dead units: which ones a group has, how many units are left without them, and those that stay under a statistic."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._programs import group_leaves
from clipjax._programs.analysis import Analysis
from clipjax._programs.group_leaves import GroupLeaf
from clipjax.typing import Tree


def left(members: list[GroupLeaf], multiple: int) -> np.ndarray:
    """bool[layers, units]: which units are left, as many in each layer; without layers one row.

    A layer that has fewer alive than another keeps dead units, the first ones, and so do all for a multiple.
    """
    first, alive = members[0], _alive(members)
    remedy = "Prune with `structures.unit(min_keep=1)`, or take the layer out of the model."
    arguments.require(alive.any(), first.path, "have a unit alive", f"{alive.size} dead units", remedy)
    size = min(-(-alive.sum(1).max() // multiple) * multiple, first.units)
    return alive | (~alive & (np.cumsum(~alive, 1) <= size - alive.sum(1, keepdims=True)))


def _alive(members: list[GroupLeaf]) -> np.ndarray:
    """bool[layers, units]: which units an owner has a weight of that is not 0."""
    first = members[0]
    alive = np.zeros((first.depth, first.units), bool)
    for leaf in members:
        if leaf.owns:
            layers, entries = np.nonzero(nonzero(leaf) & (leaf.places >= 0))
            alive[layers, leaf.places[entries]] = True
    return alive


def nonzero(leaf: GroupLeaf) -> np.ndarray:
    """bool[layers, entries]: where, along its axis, a leaf has an entry that is not 0; NaN is none."""
    others = tuple(a for a in range(-leaf.leaf.ndim, 0) if a not in leaf.own)
    found = np.asarray(jnp.any(jnp.asarray(leaf.leaf) != 0, axis=others))
    return found[None] if leaf.layers is None else found if leaf.layers < leaf.axis else found.T


def staying(analysis: Analysis, tree: Tree) -> dict[str, int]:
    """How many units of each group of `analysis.inexact` are dead, if any, by the path of its first leaf."""
    found = {
        members[0].path: int((~_alive(members)).all(0).sum())
        for members in (group_leaves.resolve(analysis.inexact, tree) if analysis.inexact else ())
    }
    return {path: count for path, count in found.items() if count}
