"""Blocks of whole codes: the formats of GGUF with an f16 scale, compressed-tensors' integers, ONNX's MatMulNBits.

Each rule is that of its reference, operation by operation in f32, so that the codes are the same bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import elementwise
from clipjax._maths import block_bytes, block_scales, float_codes, grids
from clipjax._maths.block_scales import LAST, Axes, Limit
from clipjax.typing import Format, Scales

F16, BF16 = float_codes.F16, float_codes.BF16
HALVES = {"float16": F16, "bfloat16": BF16}
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
"""What compressed-tensors stores as the scale of a block of zeros."""


def _within(code: jax.Array, scale: jax.Array, zero: int, limit: Limit) -> jax.Array:
    """Codes (f32) one nearer to 0 where their value exceeds the limit: the nearest level of an entry within it may."""
    level = code - zero
    return elementwise.where(block_scales.exceeds(level * scale, limit), code - jnp.sign(level), code)


def _truncated(x: jax.Array, scale: jax.Array, n: int) -> jax.Array:
    """trunc(x / d + n + 0.5), limited to 0 … 2n - 1: ggml's rule of q4_0 and q5_0.

    The product is limited before the addition, which changes no code: else XLA makes one rounding of both (FMA).
    """
    product = block_scales.within(x * block_scales.reciprocal(scale), -n - 1.0, n + 1.0)
    return block_scales.within(jnp.floor(product + (n + 0.5)), 0, 2 * n - 1)


def _whole(codes: jax.Array, zero: int) -> jax.Array:
    """Codes (u8) minus the code of 0, i8; the difference of u8 has the bits of that of i8."""
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint8) - jnp.uint8(zero), jnp.int8)


def signed_extremum(name: str, n: int) -> Format:
    """q4_0 (n = 8) and q5_0 (n = 16): d = -extremum / n, value d (q - n)."""

    def quantize(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> tuple[jax.Array, Scales]:
        x = block_scales.entries(x, limit)
        d = block_scales.extremum(x, axes) * (-1 / n)
        size = block_scales.half(jnp.abs(d), n, block_scales.side(-d, limit), precision)
        scale = float_codes.signed(size, float_codes.bits(d) >> 31, F16)
        code = _truncated(x, d if precision is None else float_codes.value(scale, F16), n)
        return code.astype(jnp.uint8), (scale.astype(jnp.uint16),)

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        scale = float_codes.half(scales[0])
        code = _truncated(block_scales.entries(x, limit), scale, n)
        return _within(code, scale, n, limit).astype(jnp.uint8)

    def decode(codes: jax.Array, scales: Scales) -> jax.Array:
        return (codes.astype(jnp.float32) - n) * float_codes.half(scales[0])

    digits = int(math.log2(n))
    return Format(
        name=name,
        sides=True,
        fit=lambda *args: quantize(*args)[1],
        encode=encode,
        decode=decode,
        code_bits=digits + 1,
        scale_bits=16,
        block=32,
        quantize=quantize,
        exact=True,
        precision=block_scales.precision(digits, digits, 11),
        gap=lambda scales: jnp.abs(float_codes.half(scales[0])),
        pack=block_bytes.packing(block_bytes.gguf_4 if n == 8 else block_bytes.gguf_5),
        factors=lambda codes, scales: (_whole(codes, n), float_codes.half(scales[0]), None),
    )


def absmax(
    name: str,
    n: int,
    block: int,
    code_bits: float,
    pack: Callable[[np.ndarray, block_bytes.Scales], block_bytes.Arrays],
) -> Format:
    """q8_0 (n = 127), tq1_0 and tq2_0 (n = 1): d = max|x| / n, codes -n … n, halves away from zero."""

    def rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
        ratio = x * block_scales.reciprocal(scale)
        return block_scales.within(jax.lax.round(ratio, jax.lax.RoundingMethod.AWAY_FROM_ZERO), -n, n)

    def quantize(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> tuple[jax.Array, Scales]:
        x = block_scales.entries(x, limit)
        size = block_scales.absmax(x, axes)
        end = block_scales.both(size, limit, 1 - 0.5 / n)
        size = jnp.minimum(size, end)
        d = grids.ratio(size, n) if n > 1 else size
        scale = block_scales.half(d, n, end, precision)
        code = rounded(x, d if precision is None else float_codes.value(scale, F16))
        return code.astype(jnp.int8), (scale.astype(jnp.uint16),)

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        scale = float_codes.half(scales[0])
        return _within(rounded(block_scales.entries(x, limit), scale), scale, 0, limit).astype(jnp.int8)

    def decode(codes: jax.Array, scales: Scales) -> jax.Array:
        return codes.astype(jnp.float32) * float_codes.half(scales[0])

    digits = max(1, math.ceil(math.log2(n)))
    return Format(
        name=name,
        sides=True,
        fit=lambda *args: quantize(*args)[1],
        encode=encode,
        decode=decode,
        code_bits=code_bits,
        scale_bits=16,
        block=block,
        quantize=quantize,
        exact=True,
        precision=block_scales.precision(digits, digits, 11),
        gap=lambda scales: float_codes.half(scales[0]),
        pack=block_bytes.packing(pack),
        factors=lambda codes, scales: (codes, float_codes.half(scales[0]), None),
    )


def affine(name: str, n: int) -> Format:
    """q4_1 (n = 15) and q5_1 (n = 31): d = (max - min) / n, value d q + min."""

    def coded(x: jax.Array, scale: jax.Array, low: jax.Array) -> jax.Array:
        product = block_scales.within((x - low) * block_scales.reciprocal(scale), -1.0, n + 1.0)  # see `_truncated`
        return block_scales.within(jnp.floor(product + 0.5), 0, n)

    def level(code: jax.Array, scales: Scales) -> jax.Array:
        d, low = (float_codes.half(scale) for scale in scales)
        return code * d + low  # the product has 16 significant bits at most: with and without FMA it is the same

    def quantize(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> tuple[jax.Array, Scales]:
        x = block_scales.entries(x, limit)
        low, high = jnp.min(x, axis=axes, keepdims=True), jnp.max(x, axis=axes, keepdims=True)
        d = grids.ratio(high - low, n)
        lowest = block_scales.half(jnp.abs(low), 1, block_scales.side(low, limit))
        minimum = float_codes.signed(lowest, float_codes.bits(low) >> 31, F16)
        # Where the highest level exceeds the limit, the scale is what reaches from the stored minimum to the limit.
        scale = block_scales.half(d, 1, math.inf)
        reach = block_scales.ends(limit)[1] - float_codes.value(minimum, F16)
        room = grids.ratio(jnp.maximum(reach, 0), n)
        within = float_codes.magnitude(room, F16, "truncate")
        top = jnp.full_like(d, n)
        within -= (block_scales.exceeds(level(top, (within, minimum)), limit) & (within > 0)).astype(jnp.uint32)
        scale = elementwise.where(block_scales.exceeds(level(top, (scale, minimum)), limit), within, scale)
        return coded(x, d, low).astype(jnp.uint8), (scale.astype(jnp.uint16), minimum.astype(jnp.uint16))

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        x = block_scales.entries(x, limit)
        code = coded(x, *(float_codes.half(scale) for scale in scales))
        value = level(code, scales)
        inward = elementwise.where(block_scales.exceeds(value, limit), code - jnp.sign(value), code)
        return block_scales.within(inward, 0, n).astype(jnp.uint8)

    return Format(
        name=name,
        sides=True,
        fit=lambda *args: quantize(*args)[1],
        encode=encode,
        decode=lambda codes, scales: level(codes.astype(jnp.float32), scales),
        code_bits=math.log2(n + 1),
        scale_bits=32,
        block=32,
        zero=False,
        quantize=quantize,
        pack=block_bytes.packing(block_bytes.gguf_4 if n == 15 else block_bytes.gguf_5),
        factors=lambda codes, scales: (_whole(codes, 0), float_codes.half(scales[0]), float_codes.half(scales[1])),
    )


def symmetric(name: str, bits: int, dtype: str, block: int | None, across: int | None) -> Format:
    """compressed-tensors' integers: s = max|x| / (2^(bits-1) - 0.5), codes -2^(bits-1) … 2^(bits-1) - 1, half even."""
    n, layout = 1 << (bits - 1), HALVES.get(dtype)
    own = 24 if layout is None else layout.mantissa + 1

    def value(scale: jax.Array) -> jax.Array:
        return scale if layout is None else float_codes.value(scale, layout)

    def fit(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> Scales:
        size = grids.ratio(block_scales.absmax(block_scales.entries(x, limit), axes), n - 0.5)
        size = size if precision is None else float_codes.rounded(size, precision)
        size = elementwise.where(size == 0, jnp.full_like(size, EPSILON[dtype]), size)
        if layout is None:
            return (size,)
        return (block_scales.within(float_codes.magnitude(size, layout), 1, layout.largest).astype(jnp.uint16),)

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        scale = value(scales[0])
        ratio = jax.lax.round(
            grids.ratio(block_scales.entries(x, limit), scale), jax.lax.RoundingMethod.TO_NEAREST_EVEN
        )
        return _within(block_scales.within(ratio, -n, n - 1), scale, 0, limit).astype(jnp.int8)

    return Format(
        name=name,
        sides=True,
        fit=fit,
        encode=encode,
        decode=lambda codes, scales: codes.astype(jnp.float32) * value(scales[0]),
        code_bits=bits,
        scale_bits=32 if layout is None else 16,
        block=block,
        across=across,
        exact=True,
        precision=block_scales.precision(bits - 1, bits - 1, own),
        gap=lambda scales: value(scales[0]),
        pack=block_bytes.packing(functools.partial(block_bytes.words, bits=bits)),
        factors=lambda codes, scales: (codes, value(scales[0]), None),
    )


def zero_pointed(name: str, bits: int, block: int) -> Format:
    """ONNX's MatMulNBits without zero points: d = -extremum / 2^(bits-1), value d (q - 2^(bits-1)), f32 scales."""
    n = 1 << (bits - 1)

    def coded(x: jax.Array, scale: jax.Array) -> jax.Array:
        product = block_scales.within(x * block_scales.reciprocal(scale), -n - 1.0, n + 1.0)  # see `_truncated`
        return block_scales.within(jax.lax.round(product + n, jax.lax.RoundingMethod.AWAY_FROM_ZERO), 0, 2 * n - 1)

    def fit(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> Scales:
        x = block_scales.entries(x, limit)
        low, high = jnp.min(x, axis=axes, keepdims=True), jnp.max(x, axis=axes, keepdims=True)
        d = elementwise.where(high > -low, high, low) * (-1 / n)  # the negative one of equal magnitudes
        size = block_scales.single(jnp.abs(d), n, block_scales.side(-d, limit), precision)
        return (float_codes.float_of(float_codes.bits(size) | (float_codes.bits(d) & jnp.uint32(1 << 31))),)

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        return _within(coded(block_scales.entries(x, limit), scales[0]), scales[0], n, limit).astype(jnp.uint8)

    return Format(
        name=name,
        sides=True,
        fit=fit,
        encode=encode,
        decode=lambda codes, scales: (codes.astype(jnp.float32) - n) * scales[0],
        code_bits=bits,
        scale_bits=32,
        block=block,
        exact=True,
        precision=block_scales.precision(bits - 1, bits - 1, 24),
        gap=lambda scales: jnp.abs(scales[0]),
        pack=block_bytes.packing(functools.partial(block_bytes.blobs, bits=bits)),
        factors=lambda codes, scales: (_whole(codes, n), scales[0], None),
    )
