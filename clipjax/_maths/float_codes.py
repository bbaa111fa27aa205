"""Floats of few bits as whole numbers, and back: by shifts of the bits of f32, alike on every device.

A conversion of XLA flushes numbers below the smallest normal one on some devices, and rounds twice on others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import elementwise

Ties = Literal["even", "lower", "truncate"]


class Layout(NamedTuple):
    """A float of a sign, an exponent and a mantissa, in this order.

    Attributes:
      exponent: its bits.
      mantissa: its bits, without the leading one.
      bias: what is added to the exponent.
      largest: the code of the largest finite number.
    """

    exponent: int
    mantissa: int
    bias: int
    largest: int

    @property
    def span(self) -> int:
        """log2 of the largest number by the smallest distance of two, rounded up."""
        return (self.largest >> self.mantissa) + self.mantissa

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def sign(self) -> int:
        """The place of the sign bit."""
        return self.exponent + self.mantissa


F16 = Layout(5, 10, 15, 0x7BFF)
BF16 = Layout(8, 7, 127, 0x7F7F)
E4M3 = Layout(4, 3, 7, 0x7E)
E5M2 = Layout(5, 2, 15, 0x7B)
E2M1 = Layout(2, 1, 1, 0x7)


def bits(x: jax.Array) -> jax.Array:
    """The bits of f32 as u32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def float_of(raw: jax.Array) -> jax.Array:
    """The f32 of these bits."""
    return jax.lax.bitcast_convert_type(raw, jnp.float32)


def magnitude(x: jax.Array, layout: Layout, ties: Ties = "even") -> jax.Array:
    """The code of |x| as u32, without an end: codes past the largest go on as if there were more exponents.

    The code of a float is (exponent << mantissa bits) + mantissa, so that a mantissa that is rounded up past its end
    carries into the exponent by itself. Below the smallest normal number the exponent stays and the significand, with
    its leading one, is shifted further; 25 places shift all of it out.

    Args:
      x: f32.
      layout: the float to convert to.
      ties: halves to the even code, or to the lower one; or all to the lower one.
    """
    raw = bits(x) & jnp.uint32(0x7FFFFFFF)
    exponent = (raw >> 23).astype(jnp.int32) - (128 - layout.bias)  # 0 for the smallest normal number
    shift = jnp.minimum(23 - layout.mantissa - jnp.minimum(exponent, 0), 25).astype(jnp.uint32)
    significand = (raw & jnp.uint32(0x7FFFFF)) | (jnp.minimum(raw >> 23, 1) << 23)
    if ties != "truncate":
        under = (jnp.uint32(1) << (shift - 1)) - 1
        significand += under + ((significand >> shift) & 1) if ties == "even" else under
    return (jnp.maximum(exponent, 0).astype(jnp.uint32) << layout.mantissa) + (significand >> shift)


def signed(code: jax.Array, negative: jax.Array, layout: Layout) -> jax.Array:
    """The code of a magnitude with a sign bit."""
    return code | (negative.astype(jnp.uint32) << layout.sign)


def value(code: jax.Array, layout: Layout) -> jax.Array:
    """The f32 that a code stands for; what lies past the largest finite code is infinite."""
    code = code.astype(jnp.uint32)
    size, mantissa = code & jnp.uint32((1 << layout.sign) - 1), code & jnp.uint32((1 << layout.mantissa) - 1)
    normal = float_of((size << (23 - layout.mantissa)) + jnp.uint32((127 - layout.bias) << 23))
    below = mantissa.astype(jnp.int32).astype(jnp.float32) * layout.smallest
    found = elementwise.where(size < (1 << layout.mantissa), below, normal) if layout.bias < 127 else normal
    if layout.largest < (1 << layout.sign) - 1:
        found = elementwise.where(size > layout.largest, jnp.full_like(found, jnp.inf), found)
    return float_of(bits(found) | ((code >> layout.sign) << 31))


def half(code: jax.Array) -> jax.Array:
    """`value` of the bits of f16, by the conversion of the device; on a TPU by bits, as it has no subnormal numbers."""
    return jax.lax.platform_dependent(code, tpu=_half_by_bits, default=_half_by_conversion)


def _half_by_bits(code: jax.Array) -> jax.Array:
    return value(code, F16)


def _half_by_conversion(code: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


def rounded(x: jax.Array, digits: int) -> jax.Array:
    """A number of f32 with this many significant bits, the nearest one, halves to even."""
    raw, drop = bits(x), 24 - digits
    if drop <= 0:
        return x
    return float_of(((raw + jnp.uint32((1 << (drop - 1)) - 1) + ((raw >> drop) & 1)) >> drop) << drop)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^(e - 127) for 1 <= e <= 254, and 0 for e = 0, where f32 would be subnormal."""
    return float_of(exponent.astype(jnp.uint32) << 23)
