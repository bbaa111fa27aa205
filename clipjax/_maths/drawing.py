"""Random draws of a transformation: keys folded with its count, and the entries that a selection picks with them."""

from __future__ import annotations

import jax

from clipjax._arrays import arguments
from clipjax.typing import Selection, Tree


def key_at(key: jax.Array | None, count: jax.Array) -> jax.Array:
    """The key of one update: the given one, `jax.random.key(0)` for None, folded with the count, never global."""
    return jax.random.fold_in(jax.random.key(0) if key is None else key, count)


def choose(select: Selection, tree: Tree, key: jax.Array | None, count: jax.Array) -> Tree:
    """The masks of one update; a key of the selection's own comes first."""
    return select.choose(tree, key_at(key if select.key is None else select.key, count))


def check(select: Selection) -> None:
    """Check a `select=` argument."""
    arguments.instance(select, Selection, "select", "Call a factory: `selections.bernoulli(0.5)`.")
