"""Blocks that formats are tested on, and the rules of their references in NumPy."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from clipjax import formats
from clipjax._maths import float_blocks

GGUF = [formats.q4_0(), formats.q4_1(), formats.q5_0(), formats.q5_1(), formats.q8_0(), formats.tq1_0()]
GGUF += [formats.tq2_0(), formats.mxfp4("gguf")]
CHUNK = 25_000
FAST, SLOW = 100_000, pytest.param(1_000_000, marks=pytest.mark.slow)


def bf16_valued(x):
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def chunks(blocks, block, seed=0):
    """Random blocks of scales 2^-16 to 2^12 as f32: plain ones, bf16-valued, pruned, and full of ties.

    The first of them are zeros, zeros that are negative, with one entry, all equal, equal but for the sign, just below
    and at a power of two, below the smallest normal f16 as scales, and huge.
    """
    rng = np.random.default_rng(seed)
    for _ in range(max(1, blocks // CHUNK)):
        x = rng.standard_normal((min(blocks, CHUNK), block), np.float32)
        x *= np.exp2(rng.uniform(-16, 12, (len(x), 1))).astype(np.float32)
        part = len(x) // 4
        x[:part] = bf16_valued(x[:part])
        x[part : 2 * part][rng.random((part, block)) < 0.5] = 0
        tied = np.round(rng.uniform(-8.5, 8.5, (part, block)) * 4) / 4  # with 8 these are multiples of .25
        x[2 * part : 3 * part] = tied * np.exp2(rng.integers(-8, 8, (part, 1)))
        x[:12] = 0
        x[1] = -0.0
        x[2, block // 3], x[3], x[4] = -3, 0.7, 1.5
        x[4, ::2] = x[5, 1::2] = -1.5
        x[5, ::2] = 1.5
        x[6], x[7], x[8] = np.nextafter(np.float32(0.125), np.float32(0)), -0.125, np.linspace(-6, 6, block)
        x[9:11] = rng.standard_normal((2, block)) * np.float32(3e-6)
        x[11] = np.linspace(-4e4, 6e4, block)
        yield x


@functools.cache
def jitted(form):
    return jax.jit(form.quantize, static_argnums=2), jax.jit(form.encode), jax.jit(form.decode)


def packed(form, codes, scales):
    """The arrays of a file, with a block a row."""
    arrays = [np.asarray(a) for a in (codes, *scales)]
    rows = [a[:, None] if a.ndim else a for a in arrays]
    return form.pack(rows[0], tuple(rows[1:]))


def divided(x, by):
    """The quotient of f32 as NumPy has it, 0 / 0 and overflow unseen."""
    with np.errstate(all="ignore"):
        return np.float32(x) / np.float32(by)


def largest(x):
    return np.abs(x).max(-1, keepdims=True)


def stored(scale, dtype):
    """A scale rounded to a dtype, as its bits and as f32."""
    narrow = scale.astype(dtype)
    return narrow.view(np.uint16 if narrow.itemsize == 2 else narrow.dtype), narrow.astype(np.float32)


def integer_rule(x, bits, dtype):
    n = 2 ** (bits - 1)
    scale = divided(largest(x), n - 0.5)
    raw, scale = stored(np.where(scale == 0, np.float32(ml_dtypes.finfo(dtype).eps), scale), dtype)
    return np.clip(np.rint(divided(x, scale)), -n, n - 1).astype(np.int8), (raw,)


def nbits_rule(x, bits):
    n = 2 ** (bits - 1)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = divided(-np.where(high > -low, high, low), n)
    shifted = x * np.where(scale == 0, 0, divided(1, scale)) + np.float32(n)
    return np.clip(np.floor(np.maximum(shifted, 0) + np.float32(0.5)), 0, 2 * n - 1).astype(np.uint8), (scale,)


def cast(x, kind):
    top = np.float32(ml_dtypes.finfo(kind).max)
    return np.clip(x, -top, top).astype(kind).view(np.uint8)


def mx_rule(x, kind, rule):
    """The exponent is that of frexp, one more than that of log2, of values in f64."""
    top, size = float(ml_dtypes.finfo(kind).max), largest(x).astype(np.float64)
    if rule == "qwix":
        ratio = divided(size, top)
        significand, exponent = np.frexp(ratio)
        e = np.where(ratio < 2.0**-63, 127, exponent - (significand == 0.5) + 127)
    else:
        up = 1.75 if rule == "compressed-tensors" else 2.0
        significand, exponent = np.frexp(size)
        e = np.where(size == 0, 0, exponent - 1 + (2 * significand >= up) - int(np.log2(top)) + 127)
    ratio = (x * np.exp2(127.0 - e)).astype(np.float32)
    if rule == "compressed-tensors" and top == 6:
        ratio = np.where(ratio == 0, 0, ratio)  # sign(x), which is 0 there, is a factor
    return cast(ratio, kind), (e.astype(np.uint8),)


def nvfp4_rule(x, rule):
    size, all_of_it = largest(x), np.float32(np.abs(x).max())
    if rule == "modelopt":
        total = divided(all_of_it, 2688)
        scale = divided(size, np.float32(6) * total)
        scale = np.where(scale == 0, np.float32(1), scale)
    else:
        total = divided(1, all_of_it) * np.float32(2688)
        scale = total * divided(size, 6)
    code = cast(scale, ml_dtypes.float8_e4m3fn)
    code = np.where((code == 0) & (rule != "modelopt"), 0x20, code).astype(np.uint8)
    scale = code.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ratio = divided(x, scale * total if rule == "modelopt" else divided(scale, total))
    return cast(np.where((ratio == 0) | (scale == 0), 0, ratio), ml_dtypes.float4_e2m1fn), (code, total)


def fp8_rule(x, kind):
    scale = divided(largest(x), ml_dtypes.finfo(kind).max)
    scale = np.where(scale == 0, np.float32(2.0**-23), scale)
    return cast(divided(x, scale), kind), (scale,)


def nf4_rule(x):
    levels, scale = np.array(float_blocks.NF4, np.float32), np.maximum(largest(x), np.float32(0))
    scale = np.where(scale < 2.0**-63, np.float32(1), scale)
    return np.abs(divided(x, scale)[..., None] - levels).argmin(-1).astype(np.uint8), (scale,)


E2M1, E4M3, E5M2 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
RULES = {
    formats.mxfp4("ocp"): lambda x: mx_rule(x, E2M1, "ocp"),
    formats.mxfp4("qwix"): lambda x: mx_rule(x, E2M1, "qwix"),
    formats.mxfp4("compressed-tensors"): lambda x: mx_rule(x, E2M1, "compressed-tensors"),
    formats.mxfp8("e4m3", "ocp"): lambda x: mx_rule(x, E4M3, "ocp"),
    formats.mxfp8("e4m3", "qwix"): lambda x: mx_rule(x, E4M3, "qwix"),
    formats.mxfp8("e4m3", "compressed-tensors"): lambda x: mx_rule(x, E4M3, "compressed-tensors"),
    formats.mxfp8("e5m2", "ocp"): lambda x: mx_rule(x, E5M2, "ocp"),
    formats.nvfp4("compressed-tensors"): lambda x: nvfp4_rule(x, "compressed-tensors"),
    formats.nvfp4("modelopt"): lambda x: nvfp4_rule(x, "modelopt"),
    formats.int4(32, "bfloat16"): lambda x: integer_rule(x, 4, ml_dtypes.bfloat16),
    formats.int4(64, "float32"): lambda x: integer_rule(x, 4, np.float32),
    formats.int8(None, "float16"): lambda x: integer_rule(x, 8, np.float16),
    formats.nbits(2, 16): lambda x: nbits_rule(x, 2),
    formats.nbits(4, 32): lambda x: nbits_rule(x, 4),
    formats.nbits(8, 32): lambda x: nbits_rule(x, 8),
    formats.fp8_e4m3(): lambda x: fp8_rule(x, E4M3),
    formats.fp8_e5m2(): lambda x: fp8_rule(x, E5M2),
    formats.nf4(): nf4_rule,
}
ALL = [*GGUF, *RULES]
named = functools.partial(pytest.mark.parametrize, "form", ids=lambda form: form.name)
