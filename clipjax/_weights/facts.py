"""Facts about emitted updates: which values of a weight a transformation allows, for those that are chained behind.

A refresh reads the weights as they lie in memory before the update, see `refreshing`. A transformation before it in
the chain may bound some of them, or set them to 0, at this very update. It knows how from its state, so it leaves a
function here that does the same to any values of the weight. The note belongs to the emitted array itself: whoever
receives that array as an update can look it up, and it goes when the array does. An update that anything else has
changed on the way is another array, of which nothing is known.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax

from clipjax._arrays import trees
from clipjax.typing import Tree

Settle: TypeAlias = Callable[[jax.Array], jax.Array]
"""`settle(values) -> values` of one leaf, in computing dtype, as the transformation leaves them."""

_notes: dict[int, tuple[weakref.ref[jax.Array], tuple[Settle, ...]]] = {}  # arrays have no hash, so by id


def note(update: jax.Array, settles: tuple[Settle, ...]) -> None:
    """Leave a note about an emitted update."""
    key = id(update)
    _notes[key] = (weakref.ref(update, lambda _: _notes.pop(key, None)), settles)


def of(update: jax.Array | None) -> tuple[Settle, ...]:
    """What is known about an update, in the order of the transformations; nothing where there is no note."""
    array, settles = _notes.get(id(update), (None, ()))
    return settles if array is not None and update is not None and array() is update else ()


def settled(known: Iterable[tuple[Settle, ...]], tree: Tree) -> Tree:
    """Values as the transformations before leave them; `known` holds what is known about each leaf of the tree."""
    leaves, treedef = trees.flatten(tree)

    def settle(x: jax.Array, settles: tuple[Settle, ...]) -> jax.Array:
        return functools.reduce(lambda value, fn: fn(value), settles, x)

    return treedef.unflatten([None if x is None else settle(x, fns) for x, fns in zip(leaves, known, strict=True)])
