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
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from clipjax._arrays import elementwise, trees
from clipjax.typing import Tree


class Fact(NamedTuple):
    """What a transformation does to one leaf.

    Attributes:
      settle: `settle(values) -> values` in computing dtype, as the transformation leaves them.
      bound: the interval in which all of them then lie, two scalars in computing dtype; None where it bounds none.
    """

    settle: Callable[[jax.Array], jax.Array]
    bound: tuple[jax.Array, jax.Array] | None = None


Facts: TypeAlias = tuple[Fact, ...]
"""What is known of one leaf, in the order of the transformations."""

_notes: dict[int, tuple[weakref.ref[jax.Array], Facts]] = {}  # arrays have no hash, so by id


def note(update: jax.Array, known: Facts) -> None:
    """Leave a note about an emitted update."""
    key = id(update)
    _notes[key] = (weakref.ref(update, lambda _: _notes.pop(key, None)), known)


def of(update: jax.Array | None) -> Facts:
    """What is known about an update; nothing where there is no note."""
    array, known = _notes.get(id(update), (None, ()))
    return known if array is not None and update is not None and array() is update else ()


def settled(known: Iterable[Facts], tree: Tree) -> Tree:
    """Values as the transformations before leave them; `known` holds the facts of each leaf of the tree."""
    leaves, treedef = trees.flatten(tree)

    def settle(x: jax.Array, facts: Facts) -> jax.Array:
        return functools.reduce(lambda value, fact: fact.settle(value), facts, x)

    return treedef.unflatten([None if x is None else settle(x, facts) for x, facts in zip(leaves, known, strict=True)])


def bounds(known: Iterable[Facts], tree: Tree) -> list[tuple[jax.Array, jax.Array]]:
    """For each leaf that a tree has the interval in which the transformations before leave it, the widest if none."""

    def narrowest(x: jax.Array, facts: Facts) -> tuple[jax.Array, jax.Array]:
        largest = jnp.asarray(jnp.finfo(x.dtype).max, x.dtype)
        given = [fact.bound for fact in facts if fact.bound is not None]
        low = functools.reduce(jnp.maximum, [low for low, _ in given], -largest)
        return low, functools.reduce(jnp.minimum, [high for _, high in given], largest)

    pairs = zip(trees.flatten(tree)[0], known, strict=True)
    return [narrowest(x, facts) for x, facts in pairs if x is not None]


def from_start(active: jax.Array | None, fact: Fact) -> Fact:
    """The fact of a transformation that acts where `active`, which is None for always."""
    if active is None:
        return fact
    return Fact(lambda x: elementwise.keep(active, fact.settle(x), x))
