"""Arrays that are alike as one stack: what all layers share is traced and compiled once, whatever the depth.

Stacking copies arrays, so it belongs into refreshes and reports, never into the update that runs at every step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments

Members = list[int]
"""The positions, in a list of leaves, of those that form one stack."""


def alike(names: Sequence[str], *columns: Sequence[Any]) -> list[Members]:
    """The leaves that may be stacked, in order of the first of each stack.

    Leaves are alike if their names are equal up to digits and their values in every column have equal types: shape,
    dtype and, on explicit mesh axes, sharding. Equal names stand for equal shardings where a type does not show them,
    as on automatic axes; should the layers of one name differ there, XLA moves them to the sharding of one.

    Args:
      names: a path for each leaf.
      columns: trees of arrays for each leaf. Whatever in them is no array must be hashable, and equal to be alike.
    """
    found: dict[Hashable, Members] = {}
    for i, (name, *values) in enumerate(zip(names, *columns, strict=True)):
        leaves, treedef = jax.tree.flatten(values)
        kind = (re.sub(r"\d+", "0", name), treedef, tuple(_kind(x) for x in leaves))
        found.setdefault(kind, []).append(i)
    return list(found.values())


def _kind(x: Any) -> Hashable:
    if not isinstance(x, jax.Array):
        return type(x), x
    return jax.typeof(x), None if arguments.traced(x) else x.sharding


def stack(values: Sequence[Any], members: Members) -> Any:
    """The trees of these leaves as one, with a new first axis in every array; of values that are no arrays the first's.

    An only member becomes a stack of one by a reshape, which costs nothing.
    """
    chosen = [values[i] for i in members]
    return jax.tree.map(lambda x, *xs: jnp.stack((x, *xs)) if isinstance(x, jax.Array) else x, *chosen)


def unstack(stacked: Sequence[Any], groups: Sequence[Members]) -> list[Any]:
    """A tree for each leaf, in their order, from the stacks of `alike`."""
    rows: dict[int, Any] = {}
    for tree, members in zip(stacked, groups, strict=True):
        for row, i in enumerate(members):
            rows[i] = jax.tree.map(lambda x, row=row: jax.lax.index_in_dim(x, row, keepdims=False), tree)
    return [rows[i] for i in range(len(rows))]


def mapped(fn: Callable[..., Any], names: Sequence[str], *columns: Sequence[Any]) -> list[Any]:
    """`[fn(*values) for values in zip(*columns)]`, with one call of `fn` for each kind of leaf instead of each leaf.

    Args:
      fn: a function of the trees of one leaf that returns a tree of arrays. It is batched by `jax.vmap`, and called as
        it is for a leaf that is like no other.
      names: a path for each leaf.
      columns: trees of arrays for each leaf, see `alike`. What is no array, `None` and numbers for instance, reaches
        `fn` as it is.

    Returns:
      The results, in the order of the leaves.
    """
    results: dict[int, Any] = {}
    for members in alike(names, *columns):
        if len(members) == 1:
            results[members[0]] = fn(*(column[members[0]] for column in columns))
            continue
        arrays, rebuild = _split([stack(column, members) for column in columns])
        stacked = jax.vmap(lambda xs, rebuild=rebuild: fn(*rebuild(xs)))(arrays)
        results |= dict(zip(members, unstack([stacked], [list(range(len(members)))]), strict=True))
    return [results[i] for i in range(len(results))]


def _split(values: list[Any]) -> tuple[list[jax.Array], Callable[[list[jax.Array]], list[Any]]]:
    """The arrays of some trees, and what puts arrays in their places again."""
    leaves, structure = jax.tree.flatten(values)
    treedef: Any = structure

    def rebuild(arrays: list[jax.Array]) -> list[Any]:
        rest = iter(arrays)
        return list(treedef.unflatten([next(rest) if isinstance(x, jax.Array) else x for x in leaves]))

    return [x for x in leaves if isinstance(x, jax.Array)], rebuild
