"""Structures: what is removed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax import _arguments as arguments


class Structure(NamedTuple):
    """A way to cut an array into units that live and die together.

    Attributes:
      reduce: `reduce(scores) -> unit scores`, an array that broadcasts to the scores.
      check: `check(path, leaf)` raises where a leaf cannot be cut so.
      min_keep: how many units every array keeps whatever the scores say.
      whole: True where every weight is a unit of its own.
    """

    reduce: Callable[[jax.Array], jax.Array]
    check: Callable[[str, Any], None]
    min_keep: int = 0
    whole: bool = False


def element() -> Structure:
    """Each weight on its own.

    Returns:
      A `Structure`.
    """
    return Structure(lambda scores: scores, lambda path, leaf: None, whole=True)


def unit(axis: int = -1, reduce: str = "mean", min_keep: int = 1) -> Structure:
    """Whole units: all weights that share an index of `axis`, e.g. a neuron's or an output channel's incoming weights.

    Sparsity counts units. A unit's score is the mean of its entries'.

    Args:
      axis: the axis of the units; -1 is the output of Flax's Dense and Conv kernels.
      reduce: how the scores of a unit become one: "mean", "sum" or "max".
      min_keep: how many units every array keeps, so that no layer dies.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for an unknown reduction, a negative `min_keep`, and at init for an axis that does not exist.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> clipjax.make_mask(jnp.array([[1.0, 9.0], [1.0, 0.0]]), 0.5, structure=unit()).tolist()
      [[False, True], [False, True]]

    References:
      D0, section 2.2, steps 1 and 2: a "node" is a unit's incoming weights.
    """
    arguments.choice(reduce, "reduce", ("mean", "sum", "max"))
    arguments.whole(min_keep, "min_keep", low=0, remedy="Give the number of units to keep.")
    arguments.static(axis, "axis")
    arguments.static(min_keep, "min_keep")
    fn: Any = {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[reduce]

    def check(path: str, leaf: Any) -> None:
        remedy = f"Leaf {path!r} has rank {leaf.ndim}; choose an axis it has, or leave it out with `where`."
        arguments.require(-leaf.ndim <= axis < leaf.ndim, "axis", "exist in every picked leaf", axis, remedy)

    def reduce_unit(scores: jax.Array) -> jax.Array:
        others = tuple(i for i in range(scores.ndim) if i != axis % scores.ndim)
        return fn(scores, axis=others, keepdims=True)

    return Structure(reduce_unit, check, int(min_keep))
