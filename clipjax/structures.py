"""Structures: what is removed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax import _arguments as arguments
from clipjax import _blocks as blocks


class Structure(NamedTuple):
    """A way to cut an array into units that live and die together.

    Attributes:
      reduce: `reduce(scores) -> unit scores`.
      check: `check(path, leaf)` raises where a leaf cannot be cut so.
      expand: `expand(units, leaf)`, an array of units as one that broadcasts to the leaf.
      min_keep: how many units every array keeps whatever the scores say.
      whole: True where every weight is a unit of its own.
      keep: for a structure that fixes the sparsity, `keep(keys) -> mask` of unsigned keys, the lowest of which go;
        None where the sparsity is free.
    """

    reduce: Callable[[jax.Array], jax.Array]
    check: Callable[[str, Any], None]
    expand: Callable[[jax.Array, jax.Array], jax.Array] = lambda units, leaf: units
    min_keep: int = 0
    whole: bool = False
    keep: Callable[[jax.Array], jax.Array] | None = None


def element() -> Structure:
    """Each weight on its own.

    Returns:
      A `Structure`.
    """
    return Structure(lambda scores: scores, lambda path, leaf: None, whole=True)


def n_of_m(n: int, m: int, axis: int = -2) -> Structure:
    """The n best of every m neighbours along an axis, for hardware that skips the others (2:4).

    It fixes the sparsity, 1 - n/m; the last group is padded with what goes first, so it keeps up to n too. Among equal
    scores the earlier position is kept.

    Args:
      n: how many stay, 0 < n <= m. Static, as are the others.
      m: the size of a group.
      axis: the axis of the groups; -2 is the input of Flax's Dense and Conv kernels.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for n or m out of range, and at init for an axis that does not exist.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> scores = jnp.array([4.0, 1.0, 3.0, 2.0, 5.0])
      >>> clipjax.make_mask(scores, structure=n_of_m(2, 4, axis=0)).tolist()
      [True, False, True, False, True]

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378.
    """
    for name, value in (("n", n), ("m", m), ("axis", axis)):
        arguments.static(value, name)
    arguments.whole(n, "n", low=1, remedy="Give how many of a group stay, e.g. 2.")
    arguments.whole(m, "m", low=1, remedy="Give the size of a group, e.g. 4.")
    arguments.require(n <= m, "n", "be at most `m`", n, f"A group has {m} entries.")

    def keep(keys: jax.Array) -> jax.Array:
        at = axis % keys.ndim
        size = keys.shape[at]
        groups = blocks.split(keys, at, m)
        place = jax.lax.broadcasted_iota(jnp.int32, groups.shape, at + 1)
        rank = jnp.zeros(groups.shape, jnp.int32)
        for j in range(m):  # how many of the group come before: no sort
            other = jax.lax.slice_in_dim(groups, j, j + 1, axis=at + 1)
            rank += ((other > groups) | ((other == groups) & (j < place))).astype(jnp.int32)
        return blocks.join(rank < n, at, size)

    return Structure(lambda scores: scores, _has_axis(axis), whole=True, keep=keep)


def block(height: int, width: int) -> Structure:
    """Blocks of the last two axes; sparsity counts blocks, the last of which may be smaller.

    A block's score is the mean of its entries'.

    Args:
      height: rows of a block, along axis -2. Static, as is the other.
      width: columns of a block, along axis -1.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for a size below 1, and at init for an array of rank below 2.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> scores = jnp.array([[1.0, 1.0, 5.0], [1.0, 1.0, 0.0]])
      >>> clipjax.make_mask(scores, 0.5, structure=block(2, 2)).tolist()
      [[False, False, True], [False, False, True]]

    References:
      Narang et al., "Block-Sparse Recurrent Neural Networks", 2017, https://arxiv.org/abs/1711.02782.
    """
    for name, value in (("height", height), ("width", width)):
        arguments.static(value, name)
        arguments.whole(value, name, low=1, remedy="Give the size of a block, e.g. 16.")

    def totals(x: jax.Array) -> jax.Array:
        return blocks.split(blocks.split(x, x.ndim - 1, width), x.ndim - 2, height).sum((-3, -1))

    def reduce(scores: jax.Array) -> jax.Array:
        return totals(scores) / totals(jnp.ones_like(scores))

    def expand(units: jax.Array, leaf: jax.Array) -> jax.Array:
        for axis, size in ((units.ndim - 2, height), (units.ndim - 1, width)):
            repeated = jnp.broadcast_to(
                jnp.expand_dims(units, axis + 1), blocks.resized(units, axis, (units.shape[axis], size))
            )
            units = blocks.join(repeated, axis, leaf.shape[axis])
        return units

    return Structure(reduce, _has_axis(-2), expand)


def unit(axis: int = -1, reduce: str = "mean", min_keep: int = 1) -> Structure:
    """Whole units: all weights that share an index of `axis`, e.g. a neuron's or an output channel's incoming weights.

    Sparsity counts units. A unit's score is the mean of its entries'.

    Args:
      axis: the axis of the units; -1 is the output of Flax's Dense and Conv kernels, -2 the heads of the kernels that
        `nn.MultiHeadDotProductAttention` projects with.
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

    def reduce_unit(scores: jax.Array) -> jax.Array:
        others = tuple(i for i in range(scores.ndim) if i != axis % scores.ndim)
        return fn(scores, axis=others, keepdims=True)

    return Structure(reduce_unit, _has_axis(axis), min_keep=int(min_keep))


def _has_axis(axis: int) -> Callable[[str, Any], None]:
    def check(path: str, leaf: Any) -> None:
        remedy = f"Leaf {path!r} has rank {leaf.ndim}; choose an axis it has, or leave it out with `where`."
        arguments.require(-leaf.ndim <= axis < leaf.ndim, "axis", "exist in every picked leaf", axis, remedy)

    return check
