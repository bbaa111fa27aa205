"""Scales of blocks: what sets them, how a format stores them, and how a bound and few significant bits hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipjax._arrays import elementwise
from clipjax._maths import float_codes, grids

Limit = jax.typing.ArrayLike


def entries(x: jax.Array, limit: Limit) -> jax.Array:
    """What a format reads: f32 in [-limit, limit]. An entry that is not finite counts as 0: it sets no scale."""
    x = x.astype(jnp.float32)
    x = elementwise.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    limit = jnp.asarray(limit, jnp.float32)
    return within(x, -limit, limit)


def within(x: jax.Array, low: Limit, high: Limit) -> jax.Array:
    """The entries limited to [low, high]: `jnp.clip` without the call that it leaves in the program."""
    return jnp.minimum(jnp.maximum(x, low), high)


def exceeds(level: jax.Array, limit: Limit) -> jax.Array:
    """Where a level lies beyond the limit."""
    return jnp.abs(level) > jnp.asarray(limit, jnp.float32)


def absmax(x: jax.Array) -> jax.Array:
    """The largest magnitude of each block, f32[..., 1]."""
    return jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0)


def extremum(x: jax.Array) -> jax.Array:
    """The entry of largest magnitude of each block with its sign; of equal magnitudes the first one.

    The first one is the lowest of the numbers 2 * place + sign among those of this magnitude: no argmax, which would
    be followed by a gather. A block of zeros has a sign too: gguf-py stores its scale as -0 or 0.
    """
    size = absmax(x)
    negative = (float_codes.bits(x) >> 31).astype(jnp.int32)
    place = 2 * jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) + negative
    end = jnp.full_like(place, 2 * x.shape[-1])
    place = elementwise.where(jnp.abs(x) == size, place, end)
    first = jnp.min(place, axis=-1, keepdims=True, initial=2 * x.shape[-1])
    return elementwise.where(first & 1 == 1, -size, size)


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


def half(size: jax.Array, largest: float, limit: Limit) -> jax.Array:
    """A scale >= 0 as the bits of f16, u32: the nearest, or the next lower one where largest * d exceeds the limit."""
    near = float_codes.magnitude(size, float_codes.F16)
    near = jnp.minimum(near, jnp.uint32(float_codes.F16.largest + 1))  # infinity
    return near - exceeds(float_codes.value(near, float_codes.F16) * largest, limit).astype(jnp.uint32)


def single(size: jax.Array, largest: float, limit: Limit, precision: int | None) -> jax.Array:
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
