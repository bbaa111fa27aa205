"""Blocks of small floats: the MX formats and NVFP4, FP8 with a scale, NF4.

Each rule is that of its reference, operation by operation in f32, so that the codes are the same bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from clipjax._arrays import elementwise
from clipjax._maths import block_bytes, block_scales, float_codes, grids
from clipjax._maths.block_scales import LAST, Axes, Limit
from clipjax._maths.float_codes import Layout, Ties
from clipjax.typing import Format, Scales

E4M3, E5M2, E2M1 = float_codes.E4M3, float_codes.E5M2, float_codes.E2M1
Zeros = Literal["signed", "rounded", "plain"]
"""Which zeros are -0: what is negative or -0, as a cast has it; what is negative and rounded to 0; or none."""

TOP = {E4M3: 448.0, E5M2: 57344.0, E2M1: 6.0}
"""The largest number of each element; its exponent is where the block's largest entry goes."""

OUTER = {E4M3: 432 / 448, E5M2: 53248 / 57344, E2M1: 5 / 6}
"""Where it begins to be the nearest number, as a share of it."""


def _coded(
    ratio: jax.Array, scale: jax.Array, layout: Layout, limit: Limit, zeros: Zeros, ties: Ties = "even"
) -> jax.Array:
    """The nearest codes of x / scale, u8; the next one toward 0 where the value exceeds the limit."""
    negative = float_codes.bits(ratio) >> 31 == 1
    size = jnp.minimum(float_codes.magnitude(ratio, layout, ties), jnp.uint32(layout.largest))
    over = float_codes.value(size, layout) * scale > jnp.asarray(block_scales.side(ratio, limit), jnp.float32)
    size = size - over.astype(jnp.uint32)
    if zeros != "signed":
        negative &= ratio != 0 if zeros == "rounded" else size > 0
    return float_codes.signed(size, negative, layout).astype(jnp.uint8)


def _doubled(codes: jax.Array) -> jax.Array:
    """Twice the numbers of E2M1 codes, i8: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives."""
    exponent, last = (codes >> 1) & 3, codes & 1
    size = (last | (jnp.minimum(exponent, 1) << 1)) << (jnp.maximum(exponent, 1) - 1)
    return size.astype(jnp.int8) * (1 - 2 * ((codes >> 3) & 1).astype(jnp.int8))


def _read(codes: jax.Array, layout: Layout) -> jax.Array:
    """FP8 codes as the floats of JAX that have these bits."""
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn if layout is E4M3 else jnp.float8_e5m2)


def _floor(size: jax.Array, layout: Layout) -> jax.Array:
    """OCP: floor(log2 max|x|) minus the exponent of the largest element."""
    return (float_codes.bits(size) >> 23).astype(jnp.int32) - int(math.log2(TOP[layout]))


def _log2f(size: jax.Array, layout: Layout) -> jax.Array:
    """GGUF: the same with the logarithm rounded to f32, as log2f of C and NumPy's log2 are.

    Just below 2^k, at 2^k (1 - j 2^-24), it is k - j 2^-24 / ln 2, which rounds to k where that is at most half the
    distance of f32 there. Below k > 0 that is half an ulp of the floats under |k| and above k < 0 one of those over it.
    """
    raw = float_codes.bits(size)
    k = (raw >> 23).astype(jnp.int32) - 126
    short = (jnp.uint32(0x800000) - (raw & jnp.uint32(0x7FFFFF))).astype(jnp.float32) / math.log(2.0)
    nearest = jnp.maximum(jnp.abs(k), 1)
    # The distance of floats at |k| is 2^(floor(log2 |k|) - 23), and half of it under a power of two.
    low = elementwise.where(k > 0, nearest * 2 - 1, nearest * 2)
    ulp = float_codes.float_of((float_codes.bits(low.astype(jnp.float32)) >> 23) << 23) / 2
    up = (short <= ulp) & (k != 0)
    return _floor(size, layout) + up.astype(jnp.int32)


def _ceil(size: jax.Array, layout: Layout) -> jax.Array:
    """Qwix: ceil(log2(max|x| / largest element)); 1 for blocks of next to nothing."""
    raw = float_codes.bits(grids.ratio(size, TOP[layout]))
    up = ((raw & jnp.uint32(0x7FFFFF)) > 0).astype(jnp.uint32)
    return elementwise.where(raw < jnp.uint32(64 << 23), jnp.full_like(raw, 127), (raw >> 23) + up).astype(jnp.int32)


def _even(size: jax.Array, layout: Layout) -> jax.Array:
    """compressed-tensors: as `_floor`, of a largest entry that is rounded up from 1.75 * 2^k on."""
    raw = float_codes.bits(size) + jnp.uint32(1 << 21)
    return (raw >> 23).astype(jnp.int32) - int(math.log2(TOP[layout]))


EXPONENTS: dict[str, Callable[[jax.Array, Layout], jax.Array]] = {
    "gguf": _log2f,
    "ocp": _floor,
    "qwix": _ceil,
    "compressed-tensors": _even,
}
"""The exponent of a block of 32, from 127 for 2^0, before it is limited to what E8M0 holds."""


def mx(name: str, layout: Layout, rule: str) -> Format:
    """MXFP4 and MXFP8: codes times 2^(e - 127)."""
    ties: Ties = "lower" if rule == "gguf" else "even"
    zeros: Zeros = "signed" if layout is not E2M1 or rule in ("ocp", "qwix") else "rounded"
    zeros = "plain" if rule == "gguf" else zeros  # the first of the codes that are as near: 0 stands before -0
    packed = block_bytes.plain if layout is not E2M1 else block_bytes.gguf_4 if rule == "gguf" else block_bytes.pairs

    def fit(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> Scales:
        size = block_scales.absmax(block_scales.entries(x, limit), axes)
        found = EXPONENTS[rule](size, layout)
        if rule == "gguf":  # a logarithm that is rounded up puts the extremum at 4, which may be past the limit
            end = block_scales.both(size, limit, 1.0)
            past = block_scales.exceeds(float_codes.power_of_two(jnp.maximum(found + 2, 0)), end)
            found = elementwise.where(past, _floor(size, layout), found)
        found = block_scales.within(found, 0, 254)
        if rule != "qwix":
            found = elementwise.where(size == 0, jnp.zeros_like(found), found)
        return (found.astype(jnp.uint8),)

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        exponent = scales[0].astype(jnp.int32)
        ratio = block_scales.entries(x, limit) * float_codes.power_of_two(254 - exponent)
        return _coded(ratio, float_codes.power_of_two(exponent), layout, limit, zeros, ties)

    def decode(codes: jax.Array, scales: Scales) -> jax.Array:
        return float_codes.value(codes, layout) * float_codes.power_of_two(scales[0])

    def factors(codes: jax.Array, scales: Scales) -> tuple[jax.Array, jax.Array, None]:
        if layout is E2M1:  # half of the smallest scale would be subnormal: it is 0
            return _doubled(codes), float_codes.power_of_two(jnp.maximum(scales[0], 1) - 1), None
        return _read(codes, layout), float_codes.power_of_two(scales[0]), None

    return Format(
        name=name,
        sides=True,
        fit=fit,
        encode=encode,
        decode=decode,
        code_bits=layout.sign + 1,
        scale_bits=8,
        block=32,
        exact=True,
        precision=block_scales.precision(layout.mantissa + 1, layout.span, 1),
        gap=lambda scales: float_codes.power_of_two(scales[0]) * layout.smallest,
        pack=block_bytes.packing(packed),
        factors=factors,
    )


def scaled(name: str, layout: Layout, block: int | None, across: int | None) -> Format:
    """FP8 with an f32 scale: s = max|x| / largest, codes the nearest of x / s."""

    def fit(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> Scales:
        size = block_scales.absmax(block_scales.entries(x, limit), axes)
        end = block_scales.both(size, limit, OUTER[layout])
        size = grids.ratio(jnp.minimum(size, end), TOP[layout])
        size = elementwise.where(size == 0, jnp.full_like(size, 2.0**-23), size)
        return (block_scales.single(size, TOP[layout], end, precision),)

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        return _coded(grids.ratio(block_scales.entries(x, limit), scales[0]), scales[0], layout, limit, "signed")

    return Format(
        name=name,
        sides=True,
        fit=fit,
        encode=encode,
        decode=lambda codes, scales: float_codes.value(codes, layout) * scales[0],
        code_bits=8,
        scale_bits=32,
        block=block,
        across=across,
        exact=True,
        precision=block_scales.precision(layout.mantissa + 1, layout.span, 24),
        gap=lambda scales: scales[0] * layout.smallest,
        pack=block_bytes.packing(block_bytes.plain),
        factors=lambda codes, scales: (_read(codes, layout), scales[0], None),
    )


def nvfp4(name: str, divisor: bool) -> Format:
    """NVFP4: codes times an E4M3 scale of 16, by a divisor of the array (compressed-tensors), or times a factor."""

    def value(scales: Scales) -> jax.Array:
        block = float_codes.value(scales[0], E4M3)
        return grids.ratio(block, scales[1]) if divisor else block * scales[1]

    def fit(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> Scales:
        size = block_scales.absmax(block_scales.entries(x, limit), axes)
        end = block_scales.both(size, limit, OUTER[E2M1])
        size = jnp.minimum(size, end)
        largest = jnp.maximum(jnp.max(size, initial=0.0), jnp.finfo(jnp.float32).tiny)
        total = _times(largest, divisor, precision)
        ratio = grids.ratio(size, 6.0)
        ratio = ratio * total if divisor else grids.ratio(size, 6.0 * total)
        code = float_codes.magnitude(block_scales.within(ratio, 0, 448.0), E4M3)
        # Where a scale that was rounded up takes the code 6 from the extremum, the next lower one leaves it more than
        # the code 4 would, unless it is the half of this one or less.
        past = (value((code, total)) * 6.0 > jnp.asarray(end, jnp.float32)) & (code > 2)
        code -= past.astype(jnp.uint32)
        none = code == 0 if divisor else size == 0
        code = elementwise.where(none, jnp.full_like(code, 0x20 if divisor else 0x38), code)  # .125, 1
        return code.astype(jnp.uint8), total

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        scale = value(scales)
        ratio = grids.ratio(block_scales.entries(x, limit), scale)
        # ModelOpt's scale of a block that is small beside the array is 0; its codes would be infinite, and NaN.
        ratio = elementwise.where(scale == jnp.zeros_like(ratio), jnp.zeros_like(ratio), ratio)
        return _coded(ratio, scale, E2M1, limit, "rounded")

    return Format(
        name=name,
        sides=True,
        fit=fit,
        encode=encode,
        decode=lambda codes, scales: float_codes.value(codes, E2M1) * value(scales),
        code_bits=4,
        scale_bits=8,
        block=16,
        exact=True,
        precision=block_scales.precision(2, E2M1.span, 24),
        gap=lambda scales: value(scales) * E2M1.smallest,
        pack=block_bytes.packing(block_bytes.pairs),
        factors=lambda codes, scales: (_doubled(codes), value(scales) * 0.5, None),
    )


def _times(largest: jax.Array, divisor: bool, precision: int | None) -> jax.Array:
    """The f32 of an NVFP4 array: 448 * 6 / max|x|, or its inverse; a power of two where few bits are asked for.

    The quotient of an E4M3 scale and any other divisor has 24 significant bits.
    """
    if not divisor:
        factor = grids.ratio(largest, 2688.0)
        up = float_codes.float_of(((float_codes.bits(factor) + 0x7FFFFF) >> 23) << 23)
        return factor if precision is None else up
    total = (1 / largest) * 2688.0  # a float by a tensor, as torch divides
    total = elementwise.where(jnp.isfinite(total), total, jnp.ones_like(total))
    return total if precision is None else grids.short(total, 23)


NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 levels of appendix E of https://arxiv.org/abs/2305.14314."""


def normal(name: str, block: int) -> Format:
    """NF4: s = max|x|, the nearest of 16 levels of x / s, the lower one of two that are as near."""

    def fit(x: jax.Array, limit: Limit, precision: int | None, axes: Axes = LAST) -> Scales:
        size = block_scales.absmax(block_scales.entries(x, limit), axes)
        size = jnp.minimum(size, block_scales.both(size, limit, (NF4[15] + NF4[14]) / 2))
        return (elementwise.where(size < 2.0**-63, jnp.ones_like(size), size),)

    def encode(x: jax.Array, scales: Scales, limit: Limit) -> jax.Array:
        ratio = grids.ratio(block_scales.entries(x, limit), scales[0])
        code = jnp.zeros(x.shape, jnp.int32)
        for low, high in itertools.pairwise(NF4):
            code += (jnp.abs(ratio - low) > jnp.abs(ratio - high)).astype(jnp.int32)
        over = block_scales.exceeds(decode(code, scales), limit)
        return elementwise.where(over, code - jnp.sign(code - 7), code).astype(jnp.uint8)

    def decode(codes: jax.Array, scales: Scales) -> jax.Array:
        level = jnp.full(codes.shape, NF4[0], jnp.float32)
        for code, at in enumerate(NF4[1:], start=1):
            level = elementwise.where(codes >= code, jnp.full_like(level, at), level)
        return level * scales[0]

    return Format(
        name=name,
        sides=True,
        fit=fit,
        encode=encode,
        decode=decode,
        code_bits=4,
        scale_bits=32,
        block=block,
        gap=lambda scales: scales[0] * NF4[8],
        factors=lambda codes, scales: (decode(codes, (jnp.ones((), jnp.float32),)), scales[0], None),
    )
