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
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import elementwise, trees
from clipjax.typing import Sides, Tree


class Fact(NamedTuple):
    """What a transformation does to one leaf: a tree of arrays and functions, equal ones for leaves that are alike.

    Attributes:
      settle: `settle(values, args) -> values` in computing dtype, as the transformation leaves them; one function for
        all leaves of the transformation.
      args: a tree of arrays; those that leaves share are one array.
      bound: the interval in which all of them then lie, two scalars in computing dtype; None where it bounds none.
      zeros: True where it holds weights at 0.
    """

    settle: Callable[[jax.Array, Tree], jax.Array]
    args: Tree
    bound: tuple[jax.Array, jax.Array] | None = None
    zeros: bool = False


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


def settled(x: jax.Array, known: Facts) -> jax.Array:
    """Values of a leaf as the transformations before leave them."""
    return functools.reduce(lambda value, fact: fact.settle(value, fact.args), known, x)


def bound(dtype: DTypeLike, known: Facts) -> tuple[jax.Array, jax.Array]:
    """The interval in which the transformations before leave a leaf of this computing dtype, the widest if none."""
    largest = jnp.asarray(jnp.finfo(dtype).max, dtype)
    given = [fact.bound for fact in known if fact.bound is not None]
    low = functools.reduce(jnp.maximum, [low for low, _ in given], -largest)
    return low, functools.reduce(jnp.minimum, [high for _, high in given], largest)


def shared(fn: Callable[[Facts, DTypeLike], Sides], known: Sequence[Facts], kinds: Sequence[DTypeLike]) -> list[Sides]:
    """`fn(facts, dtype)` of what bounds each leaf, computed once for leaves of one dtype with the same bounds."""
    found: dict[Hashable, Sides] = {}
    keys = [
        (jnp.dtype(kind), *(id(end) for fact in facts for end in fact.bound or ()))
        for facts, kind in zip(known, kinds, strict=True)
    ]
    for key, facts, kind in zip(keys, known, kinds, strict=True):
        if key not in found:
            found[key] = fn(facts, kind)
    return [found[key] for key in keys]


def governed(tree: Tree, known: Sequence[Facts]) -> list[Facts]:
    """The facts of the leaves that a tree has, of those of all leaves; none are known where a caller gave none."""
    leaves = trees.flatten(tree)[0]
    return [facts for x, facts in zip(leaves, known or [()] * len(leaves), strict=True) if x is not None]


def settled_tree(tree: Tree, known: Sequence[Facts]) -> Tree:
    """Values of all leaves as the transformations before leave them."""
    leaves, treedef = trees.arrays(tree)
    return treedef.unflatten([settled(x, facts) for x, facts in zip(leaves, governed(tree, known), strict=True)])


def from_start(active: jax.Array | None, fact: Fact) -> Fact:
    """The fact of a transformation that acts where `active`, which is None for always."""
    return fact if active is None else Fact(_where, (active, *fact[:2]), zeros=fact.zeros)


def _where(x: jax.Array, args: Tree) -> jax.Array:
    active, settle, inner = args
    return elementwise.keep(active, settle(x, inner), x)
