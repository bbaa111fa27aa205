"""Exact counts from fractions: round(fraction * n), also for traced fractions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.typing import Number


def of_fraction(fraction: Number, n: int | jax.Array) -> jax.Array:
    """round(fraction * n), ties to even, exact: Python's for static values, in integers for traced ones.

    Args:
      fraction: in [0, 1); traced values are read as f32, NaN as 0.
      n: a Python int or u32.
    """
    if isinstance(fraction, int | float | np.number) and isinstance(n, int):
        return jnp.uint32(round(float(fraction) * n))
    # An f32 product would be off by one from n = 2^24 on. A fraction is mantissa / 2^shift with a mantissa of 24 bits:
    # the product is taken in integers, in two words as JAX has no u64 by default, and shifted right with rounding.
    fraction = jnp.asarray(fraction, jnp.float32)
    fraction = jnp.clip(jnp.where(jnp.isnan(fraction), 0.0, fraction), 0.0, 1 - 2.0**-24)
    bits = jax.lax.bitcast_convert_type(fraction, jnp.uint32)
    mantissa = (bits & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    shift = np.uint32(150) - (bits >> 23)  # at least 24, as the fraction is below 1
    high, low = _product(mantissa, jnp.asarray(n, jnp.uint32))
    return jnp.where(shift > 60, np.uint32(0), _shift_right_even(high, low, shift))


def _product(mantissa: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split mantissa * n into high * 2^28 + low, for a 24-bit mantissa and a 32-bit n."""
    m1, m0, n1, n0 = mantissa >> 12, mantissa & 0xFFF, n >> 16, n & 0xFFFF
    a, b, c = m1 * n1, m1 * n0, m0 * n1  # weights 2^28, 2^12, 2^16
    low = m0 * n0 + ((b & 0xFFFF) << 12) + ((c & 0xFFF) << 16)
    return a + (b >> 16) + (c >> 12) + (low >> 28), low & 0xFFFFFFF


def _shift_right_even(high: jax.Array, low: jax.Array, shift: jax.Array) -> jax.Array:
    """(high * 2^28 + low) / 2^shift rounded half to even, for shift >= 24."""
    # Shifts of 24 to 27 end inside of the low word (near), those from 28 on inside of the high one (far). Both are
    # computed with their shift clipped into range, as a shift by 32 or more is undefined, and one is chosen at the end.
    one = jnp.uint32(1)
    small = jnp.clip(shift, 24, 27)
    near = (high << (28 - small)) + (low >> small)
    near_rest, near_half = low & ((one << small) - 1), one << (small - 1)
    far_shift = jnp.clip(shift, 28, 59) - 28
    far = high >> far_shift
    # Round up if the part that is shifted out is more than half of the divisor, or half of it and the result is odd:
    # twice that part is compared with the divisor, its bit below the high word included, the bits further down apart.
    far_rest, divisor = high & ((one << far_shift) - 1), one << far_shift
    twice = 2 * far_rest + (low >> 27)
    rest_low = low & 0x7FFFFFF
    far_up = (twice > divisor) | ((twice == divisor) & ((rest_low > 0) | (far & 1 == 1)))
    near_up = (near_rest > near_half) | ((near_rest == near_half) & (near & 1 == 1))
    return jnp.where(shift < 28, near + near_up.astype(jnp.uint32), far + far_up.astype(jnp.uint32))
