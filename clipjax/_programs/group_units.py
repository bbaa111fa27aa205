"""Units that several leaves share: one score and one mask for all their entries. For `structures.unit(groups=)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import sharding, trees
from clipjax._programs import groups as grouping
from clipjax._programs.groups import GroupLeaf
from clipjax.typing import Groups, Leaf, Structure, Tree


def structure(groups: Groups, reduce: str, min_keep: int) -> Structure:
    """The structure whose units are those of the groups; the array of a group's units lies at its first leaf.

    Args:
      groups: dicts path -> axis, or a tuple of axes.
      reduce: "mean", "sum" or "max".
      min_keep: how many units every group keeps.
    """
    groups = grouping.of_params(groups)
    named = {path for group in groups for path in group}

    def resolved(tree: Tree) -> list[list[GroupLeaf]]:
        """The groups whose first leaf is in this tree."""
        return [leaves for leaves in grouping.resolve(groups, tree, partial=True) if leaves]

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

    check = functools.partial(grouping.check_params, groups)
    return Structure(reduce_units, check, expand, owners, holds, min_keep)


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
    entries = sum(leaf.leaf.size for leaf in leaves) // grouping.units_of(first)
    return total / entries if reduce == "mean" else total


def _leaf_totals(leaf: GroupLeaf, first: GroupLeaf, reduction: _Reduction) -> jax.Array:
    """One value for each unit from the entries of one leaf, in the shape that broadcasts to the first leaf."""
    x, n = leaf.leaf, grouping.units_of(first)
    along_axis = reduction.along(x, axis=tuple(i for i in range(x.ndim) if i != x.ndim + leaf.axis))
    # Entry i of the axis belongs to unit i % n.
    if jax.typeof(x).sharding.mesh.empty:
        totals = reduction.along(jnp.reshape(along_axis, (leaf.repeats, n)), axis=0)
    else:
        # The axis may be sharded, and its entries of one unit may lie on different devices: to reshape it, XLA would
        # gather it. Masked copies, one for each unit, keep its sharding; their reduction is one all-reduce of n values.
        shape = (n, n * leaf.repeats)
        own = jax.lax.broadcasted_iota(jnp.int32, shape, 1) % n == jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        copies = jnp.where(own, along_axis[None], jnp.full_like(along_axis, reduction.neutral)[None])
        totals = reduction.along(copies, axis=1)
    return sharding.reshaped(sharding.replicated(totals), _shape_along(first, n), like=first.leaf)


def _at_entries(units: jax.Array, leaf: GroupLeaf, first: GroupLeaf) -> jax.Array:
    """At each entry along the axis of a leaf the value of its unit, in the shape that broadcasts to the leaf."""
    n = grouping.units_of(first)
    row = sharding.reshaped(sharding.replicated(units), (1, n), like=leaf.leaf)
    repeated = jnp.broadcast_to(row, (leaf.repeats, n))
    # On explicit mesh axes the result takes the sharding of the leaf's axis, which `where` asks for.
    ndim = leaf.leaf.ndim
    spec = (*jax.typeof(leaf.leaf).sharding.spec, *[None] * ndim)
    own = [spec[i] if i == ndim + leaf.axis else None for i in range(ndim)]
    return sharding.reshaped(repeated, _shape_along(leaf, n * leaf.repeats), like=leaf.leaf, spec=jax.P(*own))


def _shape_along(leaf: GroupLeaf, size: int) -> tuple[int, ...]:
    """The shape of `size` values along the axis of a leaf, 1 in its other axes."""
    ndim = leaf.leaf.ndim
    return tuple(size if i == ndim + leaf.axis else 1 for i in range(ndim))
