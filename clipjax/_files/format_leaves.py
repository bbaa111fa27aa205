"""A `Quantized` that is on a format as the bytes that stand for it in the file, and back: its codes and its scales.

A payload is: a number, the bits (0 for None) below flags that say which of the next are there; the name of the format;
axis; group; the dtypes of codes and scales; the shapes of the scales; then scales and codes as `integer_arrays` writes
them. What is usual takes no bytes: the last axis as output, scales of one shape that follows from axis and group. A
reader need not know the format.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._files import byte_stream, integer_arrays, leaf_codec, quantized_fields
from clipjax._maths import format_blocks, known_formats
from clipjax._maths.integers import Quantized
from clipjax.typing import Format

_BITS = 5  # how many bits of the first number are the width
_AXIS, _GROUP, _SHAPES = (1 << i for i in range(_BITS, _BITS + 3))
_SCALES = 8  # a block has this many at most
_FEW = 64  # scales that even an empty leaf may have
_DTYPES = ("uint8", "int8", "uint16", "float32", "int16", "uint32", "int32", "float16", "bfloat16")
"""Of codes and scales; a file has their numbers, so that their order stays."""


class _Fields(NamedTuple):
    """All of a `Quantized` but its arrays; of these the dtypes, of codes and scales, and the shapes of the scales."""

    format: str
    bits: int | None
    axis: tuple[int, ...]
    group: int | None
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def pack(q: Quantized, name: str, checked: bool = True) -> bytearray:
    """The payload of a `Quantized` that is on a format, see `quantized_leaves.pack`.

    Raises:
      TypeError: for fields that a file cannot hold.
      ValueError: for scales that are not those of blocks of the codes, or of the format, where that is known.
    """
    codes, scales = np.asarray(q.codes), tuple(np.asarray(s) for s in q.scales)
    try:
        fields = _fields(q, codes, scales)
        _check(fields, codes.shape)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} The `Quantized` stands at {name!r}.") from None
    most = _most(codes.shape)
    out = _write(fields, codes.shape)
    for scale in scales:
        out += integer_arrays.pack(scale, most, None, checked)
    return out + integer_arrays.pack(codes, codes.size, _commonest(codes), checked)


def unpack(data: byte_stream.Buffer, shape: tuple[int, ...], seen: list[int] | None = None) -> Quantized:
    """The `Quantized` of a payload, its fields NumPy arrays.

    Raises:
      ValueError: for a payload that `pack` does not write.
    """
    cursor = byte_stream.Cursor(data, seen)
    fields = _read(cursor, shape)
    codes, *scales = _arrays(cursor, fields, shape)
    if cursor.left:
        raise ValueError(f"A payload is {cursor.left} bytes too long.")
    arrays: tuple[Any, ...] = codes, tuple(scales)  # NumPy's, which are on no device yet
    return Quantized(arrays[0], None, None, fields.bits, fields.axis, fields.group, fields.format, arrays[1])


def describe(data: byte_stream.Buffer, shape: tuple[int, ...], seen: list[int] | None = None) -> str:
    """The form of a payload, in words."""
    cursor = byte_stream.Cursor(data, seen)
    fields = _read(cursor, shape)
    for dtype, scale in zip(fields.dtypes[1:], fields.shapes, strict=True):
        integer_arrays.read(cursor, leaf_codec.DTYPES[dtype], scale, _most(shape))
    count = sum(math.prod(scale) for scale in fields.shapes)
    form = integer_arrays.describe(cursor, leaf_codec.DTYPES[fields.dtypes[0]], shape)
    return f"codes + {count} scale{'s' * (count != 1)} of {fields.format}, {form}"


def _fields(q: Quantized, codes: np.ndarray, scales: tuple[np.ndarray, ...]) -> _Fields:
    if q.step is not None or q.zero_point is not None:
        raise TypeError("`step` and `zero_point` must be None where a format has `scales`, got both.")
    if not isinstance(q.format, str):
        raise TypeError(f"`format` must be the name of a format where there is no step, got {q.format!r}.")
    if not isinstance(q.axis, tuple):
        raise TypeError(f"`axis` must be the tuple of the output axes of a format, got {q.axis!r}.")
    dtypes = tuple(x.dtype.name for x in (codes, *scales))
    return _Fields(q.format, q.bits, q.axis, q.group, dtypes, tuple(s.shape for s in scales))


def _check(fields: _Fields, shape: tuple[int, ...]) -> None:
    """Raise where a file cannot hold the fields, or they are not those of codes of this shape."""
    _check_static(fields, shape)
    whole = fields.dtypes[0].startswith(("int", "uint"))
    if not whole or not set(fields.dtypes) <= set(_DTYPES):
        raise TypeError(f"Codes must be whole and scales numbers, of 32 bits at most, got {', '.join(fields.dtypes)}.")
    if not 1 <= len(fields.shapes) <= _SCALES:
        raise ValueError(f"`scales` must be 1 to {_SCALES} arrays, got {len(fields.shapes)}.")
    for scale in fields.shapes:
        fits = not scale or (len(scale) == len(shape) and quantized_fields.fits(scale, shape))
        if not fits:
            raise ValueError(f"`scales` must have an entry for each block of {shape}, or be a scalar, got {scale}.")
    form = known_formats.look_up(fields.format)
    if form is not None and fields.dtypes != _stored(form):
        raise ValueError(f"Codes and scales of {form.name} must be {_stored(form)}, got {fields.dtypes}.")


def _check_static(fields: _Fields, shape: tuple[int, ...]) -> None:
    quantized_fields.check_static(fields.bits, fields.axis, fields.group, fields.format)
    if not set(fields.axis) <= set(range(-len(shape), len(shape))):
        raise ValueError(f"`axis` must name axes of codes of shape {shape}, got {fields.axis}.")


@functools.cache
def _stored(form: Format) -> tuple[str, ...]:
    """The dtypes of codes and scales of a format."""
    assert form.quantize is not None
    x = jax.ShapeDtypeStruct(((form.block or 1) * (form.across or 1),), jnp.float32)
    codes, scales = jax.eval_shape(lambda x: form.quantize(x, jnp.inf, None, (0,)), x)  # type: ignore[misc]
    return tuple(a.dtype.name for a in (codes, *scales))


def _write(fields: _Fields, shape: tuple[int, ...]) -> bytearray:
    flags, out = 0, bytearray(quantized_fields.write_text(fields.format))
    if fields.axis != _usual_axis(shape):
        flags |= _AXIS
        out += quantized_fields.write_axes(fields.axis)
    if fields.group is not None:
        flags |= _GROUP
        out += byte_stream.whole(fields.group)
    out += byte_stream.whole(len(fields.shapes)) + bytes(_DTYPES.index(dtype) for dtype in fields.dtypes)
    if fields.shapes != _usual_shapes(fields, shape):
        flags |= _SHAPES
        out += b"".join(quantized_fields.write_shape(scale) for scale in fields.shapes)
    return bytearray(byte_stream.whole((fields.bits or 0) | flags)) + out


def _read(cursor: byte_stream.Cursor, shape: tuple[int, ...]) -> _Fields:
    flags = cursor.whole(2 * _SHAPES - 1)
    name = quantized_fields.read_text(cursor)
    axes = quantized_fields.read_axes(cursor) if flags & _AXIS else _usual_axis(shape)
    if not isinstance(axes, tuple):
        raise ValueError(f"A payload's output axes must be a tuple, got {axes}.")
    group = cursor.whole(quantized_fields.LARGEST) if flags & _GROUP else None
    numbers = cursor.array(cursor.whole(_SCALES) + 1, np.uint8)
    if numbers.max() >= len(_DTYPES):
        raise ValueError(f"A payload's dtypes must be below {len(_DTYPES)}, got {numbers.tolist()}.")
    dtypes = tuple(_DTYPES[number] for number in numbers)
    fields = _Fields(name, flags % (1 << _BITS) or None, axes, group, dtypes, ((),) * (len(dtypes) - 1))
    _check_static(fields, shape)
    given = tuple(quantized_fields.read_shape(cursor) for _ in fields.shapes) if flags & _SHAPES else None
    fields = fields._replace(shapes=given or _usual_shapes(fields, shape))
    try:
        _check(fields, shape)
    except TypeError as error:
        raise ValueError(f"A payload's fields are damaged: {error}") from None
    return fields


def _arrays(cursor: byte_stream.Cursor, fields: _Fields, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The codes, then the scales."""
    dtypes = [leaf_codec.DTYPES[dtype] for dtype in fields.dtypes]
    most = _most(shape)
    scales = [integer_arrays.read(cursor, *of, most) for of in zip(dtypes[1:], fields.shapes, strict=True)]
    return [integer_arrays.read(cursor, dtypes[0], shape, math.prod(shape)), *scales]


def _usual_axis(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The output axes that take no bytes: the last one."""
    return tuple(range(max(len(shape) - 1, 0), len(shape)))


def _usual_shapes(fields: _Fields, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of scales that take no bytes: one for each block of `group` inputs of an output."""
    usual = format_blocks.counts_of(fields.group, fields.axis, shape)
    return (usual or (),) * len(fields.shapes)


def _most(shape: tuple[int, ...]) -> int:
    """The largest number of scales that are looked at for repetition: one for every code, and a few."""
    return max(_FEW, math.prod(shape))


def _commonest(codes: np.ndarray) -> int | None:
    """The code that most entries have, where some are pruned that of 0; no format need be known for it."""
    values, counts = np.unique(codes, return_counts=True)
    return int(values[counts.argmax()]) if codes.size else None
