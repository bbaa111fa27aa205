"""Formats against the quantizers of their references, byte for byte, and the rules that hold for all of them."""

import functools

import jax
import numpy as np
import pytest

from clipjax import formats

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.optimized]

GGUF = {
    "Q4_0": formats.q4_0(),
    "Q4_1": formats.q4_1(),
    "Q5_0": formats.q5_0(),
    "Q5_1": formats.q5_1(),
    "Q8_0": formats.q8_0(),
    "TQ1_0": formats.tq1_0(),
    "TQ2_0": formats.tq2_0(),
    "MXFP4": formats.mxfp4("gguf"),
}
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


@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize("blocks", [FAST, SLOW])
def test_bytes_are_those_of_gguf(name, blocks):
    """Codes and scales, and values; and for all with an exact zero the values have these bytes again."""
    gguf = pytest.importorskip("gguf")
    form, kind = GGUF[name], gguf.GGMLQuantizationType[name]
    quantize, _, decode = jitted(form)
    for x in chunks(blocks, form.block):
        codes, scales = quantize(x, np.inf, None)
        expected = gguf.quantize(x, kind)
        np.testing.assert_array_equal(packed(form, codes, scales)[0], expected)
        values = decode(codes, scales)
        np.testing.assert_array_equal(values, gguf.dequantize(expected, kind))
        if form.zero:  # but for a block of -0: an update lands on 0
            landed, kept = np.asarray(values) + np.float32(0), ~np.signbit(x).all(1) | (x != 0).any(1)
            np.testing.assert_array_equal(gguf.quantize(landed, kind)[kept], expected[kept])
