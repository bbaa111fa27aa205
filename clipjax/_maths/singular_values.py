"""Singular values of matrices by matrix products alone: a bound of the largest one, and all of them made 1.

The axes of an array are layers, of which each index is a matrix of its own, contracted axes, and outputs. Products run
over all axes of one side together, the one with fewer entries on it, and nothing is reshaped. Where the other side is
sharded, what crosses devices are products of the shorter one, and scalars; where the shorter one is, XLA gathers it.
"""

from __future__ import annotations

import math
import string

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import dtypes, leaf_axes, sharding
from clipjax._maths import square_sums
from clipjax.typing import Number


def largest(x: jax.Array, sides: leaf_axes.Sides, squarings: int) -> jax.Array:
    r"""A number that the largest singular value does not exceed, by one axis for each layer.

    With the Gram matrix G of the shorter side, of n entries, and :math:`K = 2^k`,

    .. math:: \sigma_1 \le \lVert G^K \rVert_F^{1 / 2K} = \Big(\sum_i \sigma_i^{4 K}\Big)^{1 / 4 K}
        \le n^{1 / 4 K} \sigma_1

    Args:
      x: finite, of Frobenius norm 1, so that no power of it overflows.
      sides: its axes.
      squarings: k >= 0, how often G is squared.
    """
    side = _shorter(x.shape, sides)
    over = tuple(range(len(sides.layers), len(sides.layers) + 2 * len(side)))
    power, log = _gram(x, sides, side), jnp.zeros([x.shape[a] for a in sides.layers], x.dtype)
    for i in range(squarings + 1):
        total = jnp.sum(jnp.square(power), axis=over)
        norm = jnp.sqrt(jnp.where(total > 0, total, jnp.ones_like(total)))
        log = log + jnp.log(norm) / 2.0**i
        if i < squarings:
            power = power / jnp.expand_dims(norm, over)
            power = _times(power, power, sides, side)
    return jnp.exp(log / 2)


def capped(x: jax.Array, dtype: DTypeLike, sides: leaf_axes.Sides, bound: Number, squarings: int) -> jax.Array:
    """Matrices scaled so that in a dtype `largest` finds them to be within the bound; as they are where it does."""
    shown = dtypes.narrowed(x, dtype)  # what the params would be
    scaled, power, norm = square_sums.norm(jnp.where(jnp.isfinite(shown), shown, x), sides.matrix)
    unit = norm * jnp.expand_dims(largest(scaled / norm, sides, squarings), sides.matrix)
    limit = jnp.asarray(bound, x.dtype)
    beyond = 2 * unit * power > limit
    # Short of the bound by what products, and entries of a narrower dtype, are rounded by: the next update must find
    # what this one made to be within it.
    narrow = float(jnp.finfo(dtype).eps) / 2 if jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits else 0.0
    short = 1 - max(32 * float(jnp.finfo(x.dtype).eps), narrow)
    held = scaled * (limit * short / jnp.where(beyond, unit, jnp.ones_like(unit)))
    return jnp.where(beyond & jnp.isfinite(x), held, x)


def polar(x: jax.Array, sides: leaf_axes.Sides, iterations: int) -> jax.Array:
    r"""All singular values moved to 1, by :math:`\sigma \leftarrow (15 \sigma - 10 \sigma^3 + 3 \sigma^5) / 8`.

    An array of zeros stays so. Near 1 the distance d becomes :math:`5 d^3 / 2`; far below, each iteration brings a
    singular value 15/8 times nearer.
    """
    side = _shorter(x.shape, sides)
    scaled, _, norm = square_sums.norm(x, sides.matrix)
    start = scaled / norm
    first = largest(start, sides, 0)  # so that at first the largest one is at most 1, and at least n^(-1/4)
    start = start / jnp.expand_dims(jnp.where(first > 0, first, jnp.ones_like(first)), sides.matrix)

    def nearer(i: int, x: jax.Array) -> jax.Array:
        gram = _gram(x, sides, side)
        return x * (15 / 8) - _applied(x, gram * (10 / 8) - _times(gram, gram, sides, side) * (3 / 8), sides, side)

    return jnp.where(jnp.isfinite(x), jax.lax.fori_loop(0, iterations, nearer, start), x)


def _shorter(shape: tuple[int, ...], sides: leaf_axes.Sides) -> tuple[int, ...]:
    """The side with fewer entries."""
    return min(sides.outputs, sides.inputs, key=lambda axes: math.prod(shape[a] for a in axes))


def _letters(ndim: int, side: tuple[int, ...], turn: int) -> str:
    """One letter an axis; those of a side are others in each of three turns."""
    names = string.ascii_letters
    return "".join(names[17 * turn * (i in side) + i] for i in range(ndim))


def _names(sides: leaf_axes.Sides, side: tuple[int, ...], first: int, second: int) -> str:
    """The axes of a product of the side with itself: layers, the side, and the side again."""
    ndim = len(sides.layers) + len(sides.matrix)
    one, two = _letters(ndim, side, first), _letters(ndim, side, second)
    return "".join([*(one[a] for a in sides.layers), *(one[a] for a in side), *(two[a] for a in side)])


def _product(equation: str, x: jax.Array, y: jax.Array, like: jax.Array, kept: tuple[int | None, ...]) -> jax.Array:
    """A product in full precision; on explicit mesh axes sharded as some axes of an array are."""
    spec = sharding.respecified(like, lambda spec: tuple(None if a is None else spec[a] for a in kept))
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, out_sharding=spec)


def _gram(x: jax.Array, sides: leaf_axes.Sides, side: tuple[int, ...]) -> jax.Array:
    one, two = (_letters(x.ndim, side, turn) for turn in (0, 1))
    kept = (*sides.layers, *[None] * (2 * len(side)))
    return _product(f"{one},{two}->{_names(sides, side, 0, 1)}", x, x, x, kept)


def _times(x: jax.Array, y: jax.Array, sides: leaf_axes.Sides, side: tuple[int, ...]) -> jax.Array:
    first, second, both = (_names(sides, side, *turns) for turns in ((0, 1), (1, 2), (0, 2)))
    return _product(f"{first},{second}->{both}", x, y, x, tuple(range(x.ndim)))


def _applied(x: jax.Array, by: jax.Array, sides: leaf_axes.Sides, side: tuple[int, ...]) -> jax.Array:
    """The array times a product of one of its sides."""
    one, two = (_letters(x.ndim, side, turn) for turn in (0, 1))
    return _product(f"{one},{_names(sides, side, 0, 1)}->{two}", x, _laid(by, x, sides, side), x, tuple(range(x.ndim)))


def _laid(by: jax.Array, x: jax.Array, sides: leaf_axes.Sides, side: tuple[int, ...]) -> jax.Array:
    """Where mesh axes are explicit: a product of one side whose rows are where the entries of that side are."""
    spec = tuple(jax.typeof(x).sharding.spec)
    names = [*(spec[a] for a in sides.layers), *(spec[a] for a in side), *[None] * len(side)] if any(spec) else []
    return jax.reshard(by, jax.NamedSharding(jax.typeof(x).sharding.mesh, jax.P(*names))) if any(names) else by
