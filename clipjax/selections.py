"""Selections: which entries a clip, a clamp or a prune may touch (D3's strategies)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, stacks, trees
from clipjax._maths import exact_counts, random_draws, ranking
from clipjax.typing import Number, Selection, Tree

__all__ = ["Selection", "bernoulli", "everything", "largest", "leaves"]


def __dir__() -> list[str]:
    return __all__


def everything() -> Selection:
    """Every entry: D3's "all".

    Returns:
      A `Selection`.
    """
    return random_draws.everything()


def bernoulli(p: Number, *, key: jax.Array | None = None) -> Selection:
    """Each entry on its own with probability `p`, drawn anew at every use: D3's "random".

    Args:
      p: probability in [0, 1]; may be traced.
      key: PRNG key; that of the transformation by default, and `jax.random.key(0)` where it has none.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for a probability outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mask = bernoulli(0.25).choose(jnp.zeros(10_000), jax.random.key(0))
      >>> abs(float(mask.mean()) - 0.25) < 0.02
      True

    References:
      D3, section 2, item 3.
    """
    _probability(p)
    return Selection(_random(lambda key, x: jax.random.bernoulli(key, p, x.shape)), key)


def leaves(p: Number, *, key: jax.Array | None = None) -> Selection:
    """Each array as a whole with probability `p`, drawn anew at every use: D3's "random selection".

    Args:
      p: probability in [0, 1]; may be traced.
      key: PRNG key; that of the transformation by default, and `jax.random.key(0)` where it has none.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for a probability outside [0, 1].

    References:
      D3, section 2, item 3.
    """
    _probability(p)
    return Selection(_random(lambda key, x: jax.random.bernoulli(key, p)), key)


def largest(fraction: Number) -> Selection:
    """The given fraction of entries with the largest magnitudes, all arrays compared together.

    Args:
      fraction: in (0, 1]; may be traced.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for a fraction outside (0, 1]; at update for an array with an axis of 2**32 entries or more.

    Example:
      >>> import jax.numpy as jnp
      >>> largest(0.5).choose(jnp.array([1.0, -4.0, 3.0, 0.0]), None).tolist()
      [False, True, True, False]

    References:
      D1, section 6: keep the parameters of largest absolute value.
    """
    if not arguments.traced(fraction):
        number = arguments.numeric(fraction, "fraction", "Give the share of entries to select, e.g. 0.1.")
        ok = np.all((number > 0) & (number <= 1))
        arguments.require(ok, "fraction", "lie in (0, 1]", fraction, "1 selects every entry.")

    def choose(tree: Tree, key: jax.Array) -> Tree:
        arrays, treedef = trees.arrays(tree)
        if not arrays:
            return tree
        for path, x in trees.governed(tree):
            remedy = "Select with `bernoulli`, or split the array."
            rule = "compare arrays whose axes divide into two parts of less than 2**32 (the first 2**30)"
            arguments.require(ranking.countable(x.shape), "select", rule, (path, x.shape), remedy)
        positions = stacks.alike([path for path, _ in trees.governed(tree)], arrays)
        keys = [ranking.order(jnp.abs(stacks.stack(arrays, group).astype(jnp.float32))) for group in positions]
        cut = exact_counts.of_fraction(1 - fraction, sum(x.size for x in arrays))
        chosen = ranking.keep(keys, cut, pooled=True, places=tuple(map(tuple, positions)))
        return treedef.unflatten(stacks.unstack(chosen, positions))

    return Selection(choose)


def _probability(p: Number) -> None:
    if not arguments.traced(p):
        number = arguments.numeric(p, "p", "Give a probability, e.g. 0.5.")
        arguments.require(np.all((number >= 0) & (number <= 1)), "p", "lie in [0, 1]", p, "It is a probability.")


def _random(draw: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[Tree, jax.Array], Tree]:
    """One draw per array, each with its own key."""

    def choose(tree: Tree, key: jax.Array) -> Tree:
        arrays, treedef = trees.arrays(tree)
        return treedef.unflatten([draw(jax.random.fold_in(key, i), x) for i, x in enumerate(arrays)])

    return choose
