"""Scales of blocks: what sets them, how a format stores them, and how a bound and few significant bits hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipjax._arrays import elementwise, sharding
from clipjax._maths import float_codes, grids

Limit = jax.typing.ArrayLike | tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]
"""How far levels may extend from zero: a number, or one below and one above."""

Axes = tuple[int, ...]
LAST: Axes = (-1,)
"""The axes of a block, where a caller names none."""


def entries(x: jax.Array, limit: Limit) -> jax.Array:
    """What a format reads: f32 in [-limit, limit]."""
    below, above = ends(limit)
    return within(x.astype(jnp.float32), -below, above)


def ends(limit: Limit) -> tuple[jax.Array, jax.Array]:
    """How far levels may extend below zero, and above, f32."""
    below, above = limit if isinstance(limit, tuple) else (limit, limit)
    return jnp.asarray(below, jnp.float32), jnp.asarray(above, jnp.float32)


def side(x: jax.Array, limit: Limit) -> jax.typing.ArrayLike:
    """The limit on the side of zero where each entry lies."""
    if not isinstance(limit, tuple):
        return limit
    below, above = (sharding.filled(end, x) for end in ends(limit))
    return elementwise.where(x < 0, below, above)


def both(size: jax.Array, limit: Limit, share: float) -> jax.typing.ArrayLike:
    """The limit of blocks whose levels reach as far below zero as above, where the largest magnitude is `size`.

    It is the narrower side's, where entries of that side would else lose the outermost code: where that code is the
    nearest of one at the limit. There it takes at most half a step from the largest entry of the other side.

    Args:
      size: of each block.
      limit: a number, or one below zero and one above.
      share: where the outermost code begins, as a share of its level.
    """
    if not isinstance(limit, tuple):
        return limit
    narrow, wide = (pick(*ends(limit)) for pick in (jnp.minimum, jnp.maximum))
    return elementwise.where(size * share <= narrow, sharding.filled(narrow, size), sharding.filled(wide, size))


def within(x: jax.Array, low: jax.typing.ArrayLike, high: jax.typing.ArrayLike) -> jax.Array:
    """The entries limited to [low, high]: `jnp.clip` without the call that it leaves in the program."""
    return jnp.minimum(jnp.maximum(x, low), high)


def exceeds(level: jax.Array, limit: Limit) -> jax.Array:
    """Where a level lies beyond the limit."""
    below, above = ends(limit)
    return (level > above) | (level < -below)


def absmax(x: jax.Array, axes: Axes = LAST) -> jax.Array:
    """The largest magnitude of each block, with size 1 along its axes."""
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)


def extremum(x: jax.Array, axes: Axes = LAST) -> jax.Array:
    """The entry of largest magnitude of each block with its sign; of equal magnitudes the first one.

    One reduction of two numbers, the magnitude as bits and 2 * place + sign: an argmax would be followed by a gather, a
    search for the largest and then for its place would read the array twice. A block of zeros has a sign too: gguf-py
    stores its scale as -0 or 0.
    """
    axes = tuple(sorted(axis % x.ndim for axis in axes))
    sign = (float_codes.bits(x) >> 31).astype(jnp.int32)
    place, entries = jnp.zeros_like(sign), 1
    for axis in reversed(axes):  # the last one runs fastest
        place += entries * jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        entries *= x.shape[axis]
    size = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    found, first = jax.lax.reduce((size, 2 * place + sign), (jnp.int32(0), jnp.int32(2 * entries)), _larger, axes)
    found, first = (jnp.expand_dims(part, axes) for part in (float_codes.float_of(found), first))
    return elementwise.where(first & 1 == 1, -found, found)


def _larger(x: tuple[jax.Array, jax.Array], y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The larger of two magnitudes with its place, of equal ones the first."""
    takes = (x[0] > y[0]) | ((x[0] == y[0]) & (x[1] < y[1]))
    return jax.lax.select(takes, x[0], y[0]), jax.lax.select(takes, x[1], y[1])


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / d, and 0 where d is."""
    none = scale == 0
    one = jnp.ones_like(scale)
    return elementwise.where(none, jnp.zeros_like(scale), one / elementwise.where(none, one, scale))


def short(size: jax.Array, largest: float, precision: int | None) -> jax.Array:
    """A scale of at most `precision` significant bits: the nearest, or where that takes its block's extremum from it.

    A scale that is rounded up by 6 % leaves 15.05 steps of 16, so that the extremum would have another code and the
    block another scale when it is fitted again; it is then rounded down.

    Args:
      size: |d|, f32.
      largest: the code of the extremum.
      precision: bits, or None for all.
    """
    if precision is None:
        return size
    near = float_codes.rounded(size, precision)
    return elementwise.where(size * largest <= near * (largest - 0.5), grids.short(size, 24 - precision), near)


def half(size: jax.Array, largest: float, limit: Limit, precision: int | None = None) -> jax.Array:
    """A scale >= 0 as the bits of f16, u32: the nearest of few bits, lower where largest * d exceeds the limit.

    The lower one is what `size` is truncated to, at the precision too, as one unit of f16 less would have all its bits.
    """
    near = float_codes.magnitude(short(size, largest, precision), float_codes.F16)
    near = jnp.minimum(near, jnp.uint32(float_codes.F16.largest + 1))  # infinity
    cut = size if precision is None else grids.short(size, 24 - precision)
    low = jnp.minimum(float_codes.magnitude(cut, float_codes.F16, "truncate"), jnp.uint32(float_codes.F16.largest))
    over = exceeds(float_codes.value(low, float_codes.F16) * largest, limit) & (low > 0)
    low -= over.astype(jnp.uint32)  # a quotient by a `largest` that is no power of two may be rounded up
    return elementwise.where(exceeds(float_codes.value(near, float_codes.F16) * largest, limit), low, near)


def single(size: jax.Array, largest: float, limit: Limit, precision: int | None, axes: Axes = LAST) -> jax.Array:
    """A scale > 0 as f32, of few bits where asked, and the next lower one where largest * d exceeds the limit."""
    near = short(size, largest, precision)
    unit = jnp.uint32(1 << (0 if precision is None else 24 - precision))
    return elementwise.where(exceeds(near * largest, limit), float_codes.float_of(float_codes.bits(near) - unit), near)


def precision(digits: int, span: int, own: int) -> Callable[[Any], int | None]:
    """How many significant bits a scale keeps for params of a dtype, None for all that it has.

    A param of b significant bits holds code * scale where the scale keeps b - digits. An update lands on it from any
    other code where the scale keeps 24 - span. Wide codes, of more than 5 bits with their sign, are left as they are
    in 16 bits: few bits of scale would be worth less than the codes.

    Args:
      digits: significant bits of a code.
      span: log2 of the largest code by the smallest distance of two, rounded up.
      own: the significant bits that a stored scale has.
    """

    def of(dtype: Any) -> int | None:
        keep = 24 - span
        if jnp.finfo(dtype).bits < 32 and digits <= 4:
            keep = min(keep, int(jnp.finfo(dtype).nmant) + 1 - digits)
        return None if keep >= own else max(keep, 1)

    return of
