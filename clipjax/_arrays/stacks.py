"""Arrays that are alike as one stack: what all layers share is traced and compiled once, whatever the depth.

Stacking copies arrays, so it belongs into refreshes and reports, never into the update that runs at every step, and
large arrays stay alone: a program that may copy them needs that memory all the time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments

LARGEST = 2**22
"""The size of the largest arrays that are stacked; 12 layers of 768 units have smaller ones."""

Positions = list[int]
"""The positions, in a list of leaves, of those that form one stack."""


def alike(names: Sequence[str], *columns: Sequence[Any]) -> list[Positions]:
    """The leaves that may be stacked, in order of the first of each stack.

    Leaves are alike if their names are equal up to digits and their values in every column have equal types: shape,
    dtype and, on explicit mesh axes, sharding. Equal names stand for equal shardings where a type does not show them,
    as on automatic axes; should the layers of one name differ there, XLA moves them to the sharding of one.

    Args:
      names: a path for each leaf.
      columns: trees of arrays for each leaf. Whatever in them is no array must be hashable, and equal to be alike.
    """
    found: dict[Hashable, Positions] = {}
    for i, (name, *values) in enumerate(zip(names, *columns, strict=True)):
        leaves, treedef = jax.tree.flatten(values)
        alone = i if any(_is_array(x) and x.size > LARGEST for x in leaves) else None
        kind = (re.sub(r"\d+", "0", name), treedef, tuple(_kind(x) for x in leaves), alone)
        found.setdefault(kind, []).append(i)
    return list(found.values())


def _kind(x: Any) -> Hashable:
    if not _is_array(x):
        return type(x), x
    return jax.typeof(x), x.sharding if isinstance(x, jax.Array) and not arguments.traced(x) else None


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def stack(values: Sequence[Any], positions: Positions) -> Any:
    """The trees of these leaves as one, with a new first axis in every array; of values that are no arrays the first's.

    A leaf that is like no other becomes a stack of one by a reshape, which costs nothing.
    """
    chosen = [values[i] for i in positions]
    return jax.tree.map(lambda x, *xs: jnp.stack((x, *xs)) if _is_array(x) else x, *chosen)


def unstack(stacked: Sequence[Any], groups: Sequence[Positions]) -> list[Any]:
    """A tree for each leaf, in their order, from the stacks of `alike`; arrays of numbers and bools."""
    rows: dict[int, Any] = {}
    for tree, positions in zip(stacked, groups, strict=True):
        at = _places(tree, len(positions))
        for i, place in zip(positions, at, strict=True):
            take = functools.partial(jax.lax.dynamic_index_in_dim, index=place, keepdims=False)
            rows[i] = jax.tree.map(take, tree)
    return [rows[i] for i in range(len(rows))]


def _places(tree: Any, n: int) -> Sequence[Any]:
    """0, 1, ..., n - 1; in a traced program as numbers that XLA does not know.

    With places that it knows, XLA builds and compiles one kernel for each row: more time than for all that was computed
    on the stack. Kernels that differ in an operand alone it compiles once.
    """
    known = tuple(np.uint32(i) for i in range(n))
    arrays = [x for x in jax.tree.leaves(tree) if arguments.traced(x)]
    if n == 1 or not arrays:
        return known
    # The loop would turn the places round, but never runs: a word of one bit has less than 33. XLA cannot tell.
    smallest = min(arrays, key=lambda x: x.size)
    bits = jax.lax.population_count(jnp.any(jax.lax.index_in_dim(smallest, 0).astype(bool)).astype(jnp.uint32))

    def turn(carry: tuple[jax.Array, tuple[Any, ...]]) -> tuple[jax.Array, tuple[Any, ...]]:
        left, places = carry
        return left - 1, (*places[1:], places[0])

    places: Sequence[Any] = jax.lax.while_loop(lambda carry: carry[0] > 32, turn, (bits, known))[1]
    return places


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
    for positions in alike(names, *columns):
        if len(positions) == 1:
            results[positions[0]] = fn(*(column[positions[0]] for column in columns))
            continue
        arrays, axes, rebuild = _split([[column[i] for i in positions] for column in columns])
        stacked = jax.vmap(lambda xs, rebuild=rebuild: fn(*rebuild(xs)), (axes,))(arrays)
        results |= dict(zip(positions, unstack([stacked], [list(range(len(positions)))]), strict=True))
    return [results[i] for i in range(len(results))]


def _split(
    columns: list[list[Any]],
) -> tuple[list[jax.Array], list[int | None], Callable[[list[jax.Array]], list[Any]]]:
    """The arrays of the leaves, their batch axes, and what puts arrays in their places in the trees of one leaf.

    What all leaves share, one array, is no stack and has no batch axis.
    """
    rows = [jax.tree.flatten(list(row)) for row in zip(*columns, strict=True)]
    first, structure = rows[0]
    treedef: Any = structure
    places = [i for i, x in enumerate(first) if _is_array(x)]
    same = {i: [leaves[i] for leaves, _ in rows] for i in places}
    shared = {i for i, xs in same.items() if all(x is xs[0] for x in xs)}

    def rebuild(arrays: list[jax.Array]) -> list[Any]:
        found = dict(zip(places, arrays, strict=True))
        return list(treedef.unflatten([found.get(i, x) for i, x in enumerate(first)]))

    arrays = [xs[0] if i in shared else jnp.stack(xs) for i, xs in same.items()]
    return arrays, [None if i in shared else 0 for i in places], rebuild
