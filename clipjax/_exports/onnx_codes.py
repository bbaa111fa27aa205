"""The codes and scales of a leaf in the layout of an initializer, as the operators of ONNX take them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import onnx_layouts
from clipjax._exports.onnx_layouts import Order
from clipjax._maths import known_formats
from clipjax._maths.integers import Quantized
from clipjax.typing import Format

FLOATS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}
"""Formats whose codes are floats of this dtype."""

SIGNED = ("int4", "int8", "q8_0", "tq1_0", "tq2_0")
ZERO_POINTED = ("nbits", "q4_0", "q5_0")
"""Formats whose codes are whole numbers, from 0 on with 2^(bits - 1) for the value 0."""


class Coded(NamedTuple):
    """One leaf as an initializer's codes with scales: value = (codes - zero) * scale.

    Attributes:
      codes: whole numbers as i32, or floats of 4 or 8 bits; the shape of the initializer.
      bits: of a whole number, 2, 4, 8, 16 or 32; None for floats.
      scale: f32, an entry for each block.
      zero: i32 like `scale`, or None where it is 0.
      box: how many entries of a block lie along each axis.
      grouped: True where the format has blocks of some inputs, not one scale for all of them.
      stored: of FP4 and MXFP8 the scales of blocks as the format stores them, like `scale`; else None.
      total: the operator, "Div" or "Mul", and the f32 that make the scales of these; None for nothing.
    """

    codes: np.ndarray
    bits: int | None
    scale: np.ndarray
    zero: np.ndarray | None
    box: tuple[int, ...]
    grouped: bool
    stored: np.ndarray | None = None
    total: tuple[str, np.float32] | None = None


def coded(path: str, q: Quantized, order: Order, shape: tuple[int, ...]) -> Coded:
    """The codes and scales of a leaf for an initializer of this shape.

    Raises:
      ValueError: for a format that the operators cannot say, and for scales whose blocks do not divide the codes.
    """
    found = _of_grid(q) if q.format is None else _of_format(path, q, known_formats.named(q.format))
    cells, box = _blocks(path, found, order, shape)
    each = [None if x is None else x.reshape(-1)[cells] for x in (found.scale, found.zero, found.stored)]
    scale, zero, stored = each
    assert scale is not None
    codes = onnx_layouts.laid(found.codes, order, shape)
    return found._replace(codes=codes, scale=scale, zero=zero, box=box, stored=stored)


def _of_format(path: str, q: Quantized, form: Format) -> Coded:
    kind, codes = form.name.split("(")[0], np.asarray(q.codes)
    if kind in SIGNED or kind in ZERO_POINTED:
        zero = 1 << (math.ceil(form.code_bits) - 1) if kind in ZERO_POINTED else 0
        bits = next(width for width in (2, 4, 8) if width >= form.code_bits)
        scale = _scale(path, q, form, np.array(zero + 1, codes.dtype))
        return Coded(codes.astype(np.int32) - zero, bits, scale, None, (), form.block is not None)
    mx8 = ml_dtypes.float8_e5m2 if "e5m2" in form.name else ml_dtypes.float8_e4m3fn
    element = mx8 if kind == "mxfp8" else FLOATS.get(kind)
    remedy = (
        f"Leaf {path!r} has values that are no code times a scale: train it on another format, or write the values,"
        " `clipjax.dequantize(leaf)`."
    )
    arguments.require(element is not None, "params", "be on formats that ONNX has", form.name, remedy)
    assert element is not None
    scale = _scale(path, q, form, np.array(1).astype(element).view(np.uint8))
    made = Coded(codes.astype(np.uint8).view(element), None, scale, None, (), form.block is not None)
    if kind in ("mxfp4", "mxfp8"):
        return made._replace(stored=np.asarray(q.scales[0]).view(ml_dtypes.float8_e8m0fnu))
    if kind == "nvfp4":
        by = "Div" if "compressed-tensors" in form.name else "Mul"
        stored = np.asarray(q.scales[0]).view(ml_dtypes.float8_e4m3fn)
        return made._replace(stored=stored, total=(by, np.float32(q.scales[1])))
    return made


def _scale(path: str, q: Quantized, form: Format, one: np.ndarray) -> np.ndarray:
    """The scales as f32: what the code of the value 1 stands for in each block."""
    ndim = q.codes.ndim
    shapes = [s.shape if s.ndim else (1,) * ndim for s in q.scales]
    whole = all(len(s) == ndim and all(n and c % n == 0 for n, c in zip(s, q.codes.shape, strict=True)) for s in shapes)
    remedy = f"Leaf {path!r} has codes of shape {q.codes.shape}."
    rule = "hold scales whose blocks divide the codes"
    arguments.require(whole, "params", rule, [tuple(s.shape) for s in q.scales], remedy)
    shape = np.broadcast_shapes(*shapes)
    return np.asarray(form.decode(jnp.full(shape, one), q.scales), np.float32)


def _of_grid(q: Quantized) -> Coded:
    """Codes of a grid, with their step, and with the zero point where it is not 0."""
    codes, zero = np.asarray(q.codes, np.int32), np.asarray(q.zero_point, np.int32)
    low, high = (int(f(x)) for f, x in ((min, (codes.min(), zero.min())), (max, (codes.max(), zero.max()))))
    bits = next(width for width in (2, 4, 8, 16, 32) if -(1 << (width - 1)) <= low and high < 1 << (width - 1))
    step = np.asarray(q.step, np.float32)
    step = step.reshape((1,) * (codes.ndim - step.ndim) + step.shape)
    spread = np.broadcast_to(zero, step.shape) if zero.any() else None
    return Coded(codes, bits, step, spread, (), q.group is not None)


def _blocks(path: str, found: Coded, order: Order, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Which block each box of the initializer belongs to, and the sizes of the boxes.

    The number of its block is written at each entry and laid out as the entries are. Along an axis the blocks end
    where these numbers change, so that a box is as long as the greatest common divisor of the places where they do.
    """
    ids = np.arange(found.scale.size, dtype=np.int32).reshape(found.scale.shape)
    for i, n in enumerate(found.codes.shape):
        ids = np.repeat(ids, n // ids.shape[i], axis=i)
    ids = onnx_layouts.laid(ids, order, shape)
    box = []
    for i, n in enumerate(shape):
        along = np.moveaxis(ids, i, 0).reshape(n, -1)
        ends = np.flatnonzero((along[1:] != along[:-1]).any(axis=1)) + 1
        box.append(math.gcd(n, *(int(end) for end in ends)))
    return ids[tuple(slice(None, None, b) for b in box)], tuple(box)


def spread(x: np.ndarray, found: Coded, kept: int | None) -> np.ndarray:
    """An array with an entry for each block, with one for each index of all axes but one, which keeps its blocks."""
    for i, size in enumerate(found.box):
        x = x if i == kept else np.repeat(x, size, axis=i)
    return x
