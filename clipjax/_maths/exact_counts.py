"""Exact counts from fractions: round(fraction * n), also for traced fractions."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._maths import wide
from clipjax._maths.wide import Countable, Wide
from clipjax.typing import Number


def of_fraction(fraction: Number | Sequence[Number], n: Countable) -> Wide:
    """round(fraction * n), ties to even, exact: Python's for static values, in integers for traced ones.

    Args:
      fraction: in [0, 1), one for all or one for each n; traced values are read as f32, NaN as 0.
      n: a count or many.
    """
    fractions = fraction if isinstance(fraction, Sequence) else None
    static = all(isinstance(f, int | float | np.number) for f in ([fraction] if fractions is None else fractions))
    if static and not isinstance(n, Wide):
        if isinstance(n, int):
            return wide.of(round(float(fraction) * n))  # type: ignore[arg-type]
        each = [fraction] * len(n) if fractions is None else fractions
        return wide.of([round(float(f) * m) for f, m in zip(each, n, strict=True)])  # type: ignore[arg-type]
    if fractions is not None:
        fraction = jnp.stack([jnp.asarray(f, jnp.float32) for f in fractions])
    return _product(jnp.asarray(fraction, jnp.float32), wide.of(n))


def _product(fraction: jax.Array, n: Wide) -> Wide:
    """round(fraction * n) of an f32 fraction."""
    # An f32 product would be off by one from n = 2^24 on. A fraction is mantissa / 2^shift with a mantissa of 24 bits.
    fraction = jnp.clip(jnp.where(jnp.isnan(fraction), 0.0, fraction), 0.0, 1 - 2.0**-24)
    bits = jax.lax.bitcast_convert_type(fraction, jnp.uint32)
    mantissa = (bits & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    # At least 24, as the fraction is below 1. What more than 2^90 divides is 0, and a product of two words of 32 bits
    # with 24 is smaller.
    shift = jnp.minimum(np.uint32(150) - (bits >> 23), np.uint32(90))
    n = jax.tree.map(lambda x: jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, fraction.shape)), n)
    mantissa, shift = (jnp.broadcast_to(x, n.low.shape) for x in (mantissa, shift))

    def step(i: jax.Array, state: tuple[Wide, jax.Array, jax.Array]) -> tuple[Wide, jax.Array, jax.Array]:
        # Long multiplication from the lowest bit, halved after each: the whole part, the bit below it, and whether a
        # bit below that is 1.
        whole, half, lower = state
        more = (i < 24) & ((mantissa >> jnp.minimum(i, 31)) & 1 == 1)
        whole = wide.where(more, wide.add(whole, n), whole)
        active = i < shift
        halved = wide.where(active, wide.halved(whole), whole)
        lower = lower | (active & half)
        return halved, jnp.where(active, whole.low & 1 == 1, half), lower

    zero, false = jax.tree.map(jnp.zeros_like, n), jnp.zeros(n.low.shape, bool)
    whole, half, lower = jax.lax.fori_loop(jnp.uint32(0), jnp.max(shift, initial=0), step, (zero, false, false))
    up = half & (lower | (whole.low & 1 == 1))
    return wide.add(whole, wide.word(up.astype(jnp.uint32)))
