"""Random draws of a transformation: keys folded with its count, and the entries that a selection picks with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, elementwise
from clipjax.typing import Selection, Tree


def key_at(key: jax.Array | None, count: jax.Array) -> jax.Array:
    """The key of one update: the given one, `jax.random.key(0)` for None, folded with the count, never global."""
    return _folded(key, count)


@elementwise.leafwise
def _folded(key: jax.Array | None, count: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(0) if key is None else key, count)


def choose(select: Selection, tree: Tree, key: jax.Array | None, count: jax.Array) -> Tree:
    """The masks of one update, True where all entries are meant; a key of the selection's own comes first."""
    if select is ALL:
        return jax.tree.map(lambda x: True, tree)
    return select.choose(tree, key_at(key if select.key is None else select.key, count))


def everything() -> Selection:
    """The selection of every entry; it draws nothing."""
    return Selection(lambda tree, key: jax.tree.map(lambda x: jnp.ones((), bool), tree))


ALL = everything()
"""What `select=None` means: for it no key is folded and no mask is made."""


def resolve(select: Selection | None) -> Selection:
    """Read a `select=` argument; None selects every entry."""
    if select is None:
        return ALL
    arguments.instance(select, Selection, "select", "Call a factory: `selections.bernoulli(0.5)`.")
    return select
