"""A `Quantized` as the bytes that stand for it in the file, and back: its own codes and steps, no search.

A payload is: the static fields and shapes, as `quantized_fields` writes them; then step, codes and zero point, unless
that is 0, as `integer_arrays` writes them. What follows from other fields is left out, so that all of it takes no more
bytes than the payload of the values, which tells less.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from clipjax._files import byte_stream, integer_arrays, leaf_codec, quantized_fields
from clipjax._maths import grids, split_axes
from clipjax._maths.integers import Quantized

_FEW = 64  # steps that even an empty leaf may have


def pack(q: Quantized, name: str, checked: bool = True) -> bytearray:
    """The payload of a `Quantized`, with checksums of its own where it is `checked`; errors name its leaf.

    Raises:
      TypeError: for fields that a file cannot hold.
      ValueError: for a step or a zero point that does not broadcast to the codes, where no format says otherwise.
    """
    codes, step, zero = (_host(x) for x in (q.codes, q.step, q.zero_point))
    centred = zero.shape == () and zero.dtype == np.int32 and not zero
    dtypes = (codes.dtype, step.dtype, zero.dtype)
    shapes = step.shape, None if centred else zero.shape
    fields = quantized_fields.Fields(q.bits, q.axis, q.group, q.format, dtypes, *shapes)
    try:
        quantized_fields.check(fields, codes.shape)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} The `Quantized` stands at {name!r}.") from None
    most = _most(codes.shape)
    one = zero.ndim == 0 and jnp.issubdtype(zero.dtype, jnp.integer)
    body = integer_arrays.pack(codes, codes.size, int(zero) if one else None, checked)
    body += b"" if centred else integer_arrays.pack(zero, most, None, checked)
    if quantized_fields.may_be_relative(fields, codes.shape):
        # Where zero points differ, a pruned weight may have any code, and the codes hide where the zeros are. Relative
        # to its zero point each is 0, at the price of more levels: the smaller form wins.
        whole = codes.astype(np.int32) - _spread(zero, codes.shape)
        relative = integer_arrays.pack(whole, codes.size, 0, checked)
        relative += integer_arrays.pack(
            zero.astype(np.int32) - _expected(whole, zero.shape, q.bits), most, None, checked
        )
        if len(relative) < len(body):
            fields, body = fields._replace(relative=True), relative
    return quantized_fields.write(fields, codes.shape) + integer_arrays.pack(step, most, None, checked) + body


def unpack(data: byte_stream.Buffer, shape: tuple[int, ...], seen: list[int] | None = None) -> Quantized:
    """The `Quantized` of a payload, its fields NumPy arrays.

    Raises:
      ValueError: for a payload that `pack` does not write.
    """
    cursor = byte_stream.Cursor(data, seen)
    fields = quantized_fields.read(cursor, shape)
    step = integer_arrays.read(cursor, fields.stored(1), fields.step, _most(shape))
    codes = integer_arrays.read(cursor, fields.stored(0), shape, math.prod(shape))
    zero = np.zeros((), np.int32)
    if fields.zero is not None:
        zero = integer_arrays.read(cursor, fields.stored(2), fields.zero, _most(shape))
    if cursor.left:
        raise ValueError(f"A payload is {cursor.left} bytes too long.")
    if fields.relative:
        zero = zero + _expected(codes, zero.shape, fields.bits)
        codes = (codes + _spread(zero, shape)).astype(fields.dtypes[0])
        zero = zero.astype(fields.dtypes[2])
    return _quantized(codes, step, zero, fields.bits, fields.axis, fields.group, fields.format)


def describe(data: byte_stream.Buffer, shape: tuple[int, ...], seen: list[int] | None = None) -> str:
    """The form of a payload, in words."""
    cursor = byte_stream.Cursor(data, seen)
    fields = quantized_fields.read(cursor, shape)
    step = integer_arrays.read(cursor, fields.stored(1), fields.step, _most(shape))
    zeros = math.prod(fields.zero or ())
    parts = [
        "codes" if fields.bits is None else f"{fields.bits}-bit codes",
        f"{step.size} step{'s' * (step.size != 1)}",
    ]
    parts += [f"{zeros} zero points"] * (zeros > 1) + [f"format {fields.format}"] * (fields.format is not None)
    return f"{' + '.join(parts)}, {integer_arrays.describe(cursor, fields.stored(0), shape)}"


def from_values(found: leaf_codec.CodesAndSteps) -> Quantized:
    """Codes that were found behind plain values, in the narrowest integers; steps in the form of the weight."""
    codes, (rows, columns) = found.codes, found.step.shape
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    bits = max(max(-low, high).bit_length() + 1, 2)
    # Codes too far from 0 for i8, but not from each other, fit it when shifted: the zero point says by how much.
    shift = -128 - low if bits > 8 and high - low < 256 else 0
    kept = (codes + np.int16(shift)).astype(np.int8) if bits <= 8 or shift else codes
    lead = codes.shape[:-2] if rows > 1 else ()
    shape = () if rows == columns == 1 else (*lead, -1, columns) if rows > 1 else (1,) * (codes.ndim - 1) + (-1,)
    group = codes.size // codes.shape[-1] // rows if rows > 1 else None
    step, zero = found.step.reshape(shape), np.asarray(shift, np.int32)
    return _quantized(kept, step, zero, min(bits, 8) if shift else bits, -1 if columns > 1 else None, group, None)


def _quantized(codes: np.ndarray, step: np.ndarray, zero: np.ndarray, *static: object) -> Quantized:
    """A `Quantized` of NumPy arrays, which are on no device yet."""
    return Quantized(codes, step, zero, *static)  # type: ignore[arg-type]


def _host(x: object) -> np.ndarray:
    """A field as a NumPy array; numbers of Python as those of JAX."""
    return np.asarray(x if hasattr(x, "dtype") else jnp.asarray(x))


def _expected(whole: np.ndarray, shape: tuple[int, ...], bits: int | None) -> np.ndarray:
    """Zero points of grids whose lowest code occurs or is that of 0, from codes minus zero points: i32[shape].

    So `steps.minmax` fits them: -top = min(k, 0) + z.
    """
    lowest = np.minimum(whole, 0)
    for axis, size in enumerate((1,) * (whole.ndim - len(shape)) + shape):
        blocked = (*lowest.shape[:axis], size, lowest.shape[axis] // max(size, 1), *lowest.shape[axis + 1 :])
        lowest = lowest.reshape(blocked).min(axis + 1, initial=0)
    top = 0 if bits is None else grids.top(bits)
    return -top - lowest.reshape(shape)


def _most(shape: tuple[int, ...]) -> int:
    """The largest number of steps, or zero points, that are looked at for repetition: one for every code, and a few."""
    return max(_FEW, math.prod(shape))


def _spread(zero: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Zero points that broadcast to the codes."""
    return np.asarray(split_axes.spread(jnp.asarray(zero.astype(np.int32)), shape))
