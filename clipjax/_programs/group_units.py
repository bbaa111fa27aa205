"""Units that several leaves share: one score and one mask for all their entries. For `structures.unit(groups=)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import sharding, trees
from clipjax._programs import group_leaves
from clipjax._programs import groups as grouping
from clipjax._programs.group_leaves import GroupLeaf
from clipjax.typing import Groups, Leaf, PerLeaf, Structure, Tree


def structure(groups: Groups, reduce: str, min_keep: int, round_to: int = 1) -> Structure:
    """The structure whose units are those of the groups; the array of a group's units lies at its first leaf.

    It has an entry for each unit, and where each layer of a stack has units of its own, for each unit of each layer.

    Args:
      groups: dicts path -> axis, or a tuple of axes.
      reduce: "mean", "sum" or "max".
      min_keep: how many units every group keeps.
      round_to: what the number of units that stay is rounded to a multiple of.
    """
    groups = grouping.of_params(groups)
    named = {path for group in groups for path in group}

    def resolved(tree: Tree) -> list[list[GroupLeaf]]:
        """The groups whose first leaf is in this tree."""
        return [leaves for leaves in group_leaves.resolve(groups, tree, partial=True) if leaves]

    def reduce_units(scores: Tree) -> Tree:
        return _place({leaves[0].position: _unit_scores(leaves, reduce) for leaves in resolved(scores)}, scores)

    def expand(units: Tree, tree: Tree) -> Tree:
        values = trees.flatten(units)[0]
        masks: dict[int, jax.Array] = {}
        for leaves in resolved(tree):
            for leaf in leaves:
                mask = _at_entries(values[leaves[0].position], leaf, leaves[0])
                # An entry of a leaf in two groups belongs to a unit of each, and stays only if both units do.
                masks[leaf.position] = mask if leaf.position not in masks else masks[leaf.position] & mask
        return _place(masks, tree)

    def owners(tree: Tree) -> Tree:
        return _place({leaves[0].position: leaves[0].leaf for leaves in resolved(tree)}, tree)

    def holds(path: str, leaf: Leaf) -> bool:
        return path.removeprefix("params/") in named

    def layers(path: str, leaf: Leaf) -> tuple[int, ...]:
        return stacked[path.removeprefix("params/")]

    stacked = {next(iter(group)): grouping.layers(group) for group in groups}
    check = functools.partial(group_leaves.check_params, groups)
    return Structure(reduce_units, check, expand, owners, holds, min_keep, layers=PerLeaf(layers), round_to=round_to)


def _place(arrays: Mapping[int, jax.Array], like: Tree) -> Tree:
    """A tree with these arrays at the positions that are their keys, None at all others."""
    leaves, treedef = trees.flatten(like)
    return treedef.unflatten([arrays.get(i) for i in range(len(leaves))])


class _Reduction(NamedTuple):
    """The way in which many scores become one.

    Attributes:
      along: the entries of an array, along one or more axes.
      pair: the results of two leaves.
      neutral: the score that changes no result.
    """

    along: Callable[..., jax.Array]
    pair: Callable[[jax.Array, jax.Array], jax.Array]
    neutral: float


_SUM, _MAX = _Reduction(jnp.sum, jnp.add, 0.0), _Reduction(jnp.max, jnp.maximum, -jnp.inf)


def _unit_scores(leaves: list[GroupLeaf], reduce: str) -> jax.Array:
    """The score of every unit of a group over its entries in all leaves, in the shape that broadcasts to the first."""
    first, reduction = leaves[0], _MAX if reduce == "max" else _SUM
    total = functools.reduce(reduction.pair, [_leaf_totals(leaf, first, reduction) for leaf in leaves])
    entries = sum(leaf.leaf.size * int((leaf.places >= 0).sum()) // leaf.places.size for leaf in leaves)
    entries //= first.units * first.depth
    return total / entries if reduce == "mean" else total


def _leaf_totals(leaf: GroupLeaf, first: GroupLeaf, reduction: _Reduction) -> jax.Array:
    """One value for each unit from the entries of one leaf, in the shape that broadcasts to the first leaf."""
    x, n = leaf.leaf, first.units
    along_axis = _layers_first(reduction.along(x, axis=tuple(i for i in range(-x.ndim, 0) if i not in leaf.own)), leaf)
    if jax.typeof(x).sharding.mesh.empty and _tiled(leaf):
        totals = reduction.along(jnp.reshape(along_axis, (*along_axis.shape[:-1], -1, n)), axis=-2)
    else:
        # The axis may be sharded, and its entries of one unit may lie on different devices: to reshape it, XLA would
        # gather it. Masked copies, one for each unit, keep its sharding; their reduction is one all-reduce of n values.
        own = _own(leaf, n)[(None,) * (along_axis.ndim - 1)]
        others = jnp.full_like(along_axis, reduction.neutral)[..., None, :]
        totals = reduction.along(jnp.where(own, along_axis[..., None, :], others), axis=-1)
    return sharding.reshaped(_layers_first(sharding.replicated(totals), first), first.along(n), like=first.leaf)


def _layers_first(x: jax.Array, leaf: GroupLeaf) -> jax.Array:
    """Layers and entries, in the order that they have in a leaf, as [layers, entries]; or these in that order."""
    return x if leaf.layers is None or leaf.layers < leaf.axis else jnp.swapaxes(x, 0, 1)


def _tiled(leaf: GroupLeaf) -> bool:
    """True where entry i belongs to unit i % n."""
    return bool((leaf.places == np.arange(leaf.places.size) % max(leaf.units, 1)).all())


def _own(leaf: GroupLeaf, n: int) -> jax.Array:
    """bool[units, entries]: which entries belong to which unit."""
    shape = (n, leaf.places.size)
    units = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    if _tiled(leaf):
        return jax.lax.broadcasted_iota(jnp.int32, shape, 1) % n == units
    return jnp.asarray(leaf.places, jnp.int32)[None] == units


def _at_entries(units: jax.Array, leaf: GroupLeaf, first: GroupLeaf) -> jax.Array:
    """At each entry along the axis of a leaf the value of its unit, in the shape that broadcasts to the leaf."""
    n, size, stacked = first.units, leaf.places.size, leaf.layers is not None
    own = tuple(units.shape[i] for i in sorted(first.own)) if stacked else (1, n)
    rows = _layers_first(sharding.reshaped(sharding.replicated(units), own, like=leaf.leaf), first)
    if _tiled(leaf):
        repeated = jnp.broadcast_to(jnp.expand_dims(rows, 1), (len(rows), size // max(n, 1), n))
    else:  # an entry of no unit stays
        repeated = ~jnp.any(_own(leaf, n)[None] & ~jnp.expand_dims(rows, 2), axis=1)
    if stacked:
        repeated = _layers_first(sharding.reshaped(repeated, (len(rows), size), like=leaf.leaf), leaf)
    # On explicit mesh axes the result takes the sharding of the leaf's axes, which `where` asks for.
    ndim = leaf.leaf.ndim
    spec = (*jax.typeof(leaf.leaf).sharding.spec, *[None] * ndim)
    kept = [spec[i] if i - ndim in leaf.own else None for i in range(ndim)]
    return sharding.reshaped(repeated, leaf.along(size), like=leaf.leaf, spec=jax.P(*kept))
