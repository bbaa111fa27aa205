"""The bytes of blocks in files, in NumPy: GGUF's structs, compressed-tensors' packed words, ONNX's blobs.

Codes are [..., blocks, block], scales [..., blocks, 1], as `Format.pack` takes them. What comes out has the axes before
the blocks: a row of blocks is a row of bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from clipjax.typing import Pack

Scales = tuple[np.ndarray, ...]
Arrays = tuple[np.ndarray, ...]


def packing(fn: Callable[[np.ndarray, Scales], Arrays]) -> Pack:
    """A function of NumPy arrays as `Format.pack`, which takes arrays of any kind."""

    def pack(codes: jax.typing.ArrayLike, scales: tuple[jax.typing.ArrayLike, ...]) -> Arrays:
        return fn(np.asarray(codes), tuple(np.asarray(scale) for scale in scales))

    return pack


def _row(*parts: np.ndarray) -> Arrays:
    """The bytes of one block after each other, and those of a row of blocks."""
    joined = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=-1)
    return (joined.reshape(*joined.shape[:-2], joined.shape[-2] * joined.shape[-1]),)


def _little(scale: np.ndarray) -> np.ndarray:
    return scale.astype(scale.dtype.newbyteorder("<"))


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """The order of ggml: byte i has the codes i, below, and i + half a block, above."""
    low, high = np.split(codes.astype(np.uint8), 2, axis=-1)
    return (low & 15) | (high << 4)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes.astype(np.uint8) >> 4, axis=-1, bitorder="little")


def gguf_4(codes: np.ndarray, scales: Scales) -> Arrays:
    """q4_0 and mxfp4: the scale, 32 nibbles. q4_1: scale and minimum first."""
    return _row(*map(_little, scales), _nibbles(codes))


def gguf_5(codes: np.ndarray, scales: Scales) -> Arrays:
    """q5_0 and q5_1: the scale (and the minimum), the fifth bits, 32 nibbles."""
    return _row(*map(_little, scales), _fifth_bits(codes), _nibbles(codes))


def gguf_8(codes: np.ndarray, scales: Scales) -> Arrays:
    """q8_0: the scale, 32 signed bytes."""
    return _row(*map(_little, scales), codes.astype(np.int8))


def gguf_ternary_2(codes: np.ndarray, scales: Scales) -> Arrays:
    """tq2_0: 64 bytes of four codes, each 32 entries apart, then the scale."""
    parts = (codes + 1).astype(np.uint8).reshape(*codes.shape[:-1], 2, 4, 32)
    packed = np.bitwise_or.reduce(parts << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=-2)
    return _row(packed.reshape(*codes.shape[:-1], 64), *map(_little, scales))


def gguf_ternary_1(codes: np.ndarray, scales: Scales) -> Arrays:
    """tq1_0: bytes of five codes in base 3, in units of 243/256, rounded up; the last bytes have four."""
    digits, packed = (codes + 1).astype(np.uint16), []
    for begin, end, number in ((0, 160, 5), (160, 240, 5), (240, 256, 4)):
        part = digits[..., begin:end].reshape(*codes.shape[:-1], number, (end - begin) // number)
        packed.append((part * np.array([81, 27, 9, 3, 1][:number], np.uint16)[:, None]).sum(-2, dtype=np.uint16))
    fractions = (np.concatenate(packed, axis=-1) * np.uint16(256) + np.uint16(242)) // np.uint16(243)
    return _row(fractions.astype(np.uint8), *map(_little, scales))


def _joined(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes after each other, the first in the lowest bits, in bytes."""
    each = 8 // bits
    apart = codes.astype(np.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    return np.bitwise_or.reduce(apart << (np.arange(each, dtype=np.uint8) * np.uint8(bits)), axis=-1)


def _whole(codes: np.ndarray) -> np.ndarray:
    """Blocks of a row after each other."""
    return codes.reshape(*codes.shape[:-2], codes.shape[-2] * codes.shape[-1])


def pairs(codes: np.ndarray, scales: Scales) -> Arrays:
    """FP4 of compressed-tensors: two codes a byte, the first below; scales [..., blocks]."""
    return (_joined(_whole(codes), 4), *(scale[..., 0] if scale.ndim else scale for scale in scales))


def plain(codes: np.ndarray, scales: Scales) -> Arrays:
    """FP8: a code a byte."""
    return (_whole(codes).astype(np.uint8), *(scale[..., 0] for scale in scales))


def words(codes: np.ndarray, scales: Scales, bits: int) -> Arrays:
    """compressed-tensors' pack-quantized: a row as 32-bit words, codes from 0 on, the last word filled with zeros."""
    row, each = _whole(codes).astype(np.int16) + (1 << (bits - 1)), 32 // bits
    row = np.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, -row.shape[-1] % each)])
    return (_joined(row, bits).view(np.dtype("<i4")), *(scale[..., 0] for scale in scales))


def blobs(codes: np.ndarray, scales: Scales, bits: int) -> Arrays:
    """ONNX's MatMulNBits: u8[..., blocks, bytes of one], the first code in the lowest bits; scales [..., blocks]."""
    return (_joined(codes, bits), *(scale[..., 0] for scale in scales))
