"""All of a `Quantized` but its arrays, as bytes: static fields, dtypes, and the shapes of step and zero point.

First a number: the bits (0 for None) below flags that say which of the next are there; then dtypes; axis; group;
format; the shapes of step and zero point. Texts stand behind their length, counts are LEB128. What follows from another
field is left out.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._files import byte_stream, leaf_codec
from clipjax._maths import grids

_BITS = 5  # how many bits of the first number are the width
_DTYPES, _AXIS, _GROUP, _FORMAT, _STEP, _ZERO, _ZERO_SHAPE, _RELATIVE = (1 << i for i in range(_BITS, _BITS + 8))
_TEXT = 1 << 10  # bytes of a text at most
LARGEST = (1 << 48) - 1  # of the whole numbers among the static fields


class Fields(NamedTuple):
    """All but the arrays.

    Attributes:
      bits: the width, a static field of the `Quantized` as axis, group and format are.
      dtypes: those of codes, step and zero point.
      step: the shape of the step.
      zero: the shape of the zero point; None for the i32 scalar 0, which takes no bytes.
      relative: True where the codes stand minus their zero points, and these minus what codes of all levels would have.
    """

    bits: int | None
    axis: int | tuple[int, ...] | None
    group: int | None
    format: str | None
    dtypes: tuple[np.dtype, ...]
    step: tuple[int, ...]
    zero: tuple[int, ...] | None
    relative: bool = False

    def stored(self, array: int) -> np.dtype:
        """The dtype in which codes (0), step (1) or zero point (2) stand in the file."""
        return np.dtype(np.int32) if self.relative and array != 1 else self.dtypes[array]


def write(fields: Fields, shape: tuple[int, ...]) -> bytearray:
    """The bytes of the fields, for codes of this shape."""
    # The flags of what is rare stand highest: one step for all takes one byte here, an axis two.
    flags, out = fields.relative * _RELATIVE, bytearray()
    if fields.dtypes != _usual(fields.bits):
        flags |= _DTYPES
        out += write_text(" ".join(t.name for t in fields.dtypes))
    if fields.axis is not None:
        flags |= _AXIS
        out += write_axes(fields.axis)
    if fields.group is not None:
        flags |= _GROUP
        out += byte_stream.whole(operator.index(fields.group))
    if fields.format is not None:
        flags |= _FORMAT
        out += write_text(fields.format)
    if fields.step != _usual_step(fields, shape):
        flags |= _STEP
        out += write_shape(fields.step)
    if fields.zero is not None:
        flags |= _ZERO
    if fields.zero not in (None, fields.step):
        flags |= _ZERO_SHAPE
        out += write_shape(fields.zero or ())
    return bytearray(byte_stream.whole((fields.bits or 0) | flags)) + out


def read(cursor: byte_stream.Cursor, shape: tuple[int, ...]) -> Fields:
    """The fields behind what `write` wrote, checked.

    Raises:
      ValueError: for bytes that `write` does not write.
    """
    flags = cursor.whole(2 * _RELATIVE - 1)
    bits = flags % (1 << _BITS) or None
    if bits is not None and bits > 16:
        raise ValueError(f"A payload's codes must have 16 bits at most, got {bits}.")
    dtypes = _read_dtypes(cursor) if flags & _DTYPES else _usual(bits)
    axis = read_axes(cursor) if flags & _AXIS else None
    group = cursor.whole(LARGEST) if flags & _GROUP else None
    form = read_text(cursor) if flags & _FORMAT else None
    fields = Fields(bits, axis, group, form, dtypes, (), None, bool(flags & _RELATIVE))
    step = read_shape(cursor) if flags & _STEP else _usual_step(fields, shape)
    zero = read_shape(cursor) if flags & _ZERO_SHAPE else step
    fields = fields._replace(step=step, zero=zero if flags & _ZERO else None)
    try:
        check(fields, shape)
    except TypeError as error:
        raise ValueError(f"A payload's fields are damaged: {error}") from None
    return fields


def check_static(bits: int | None, axes: object, group: int | None, form: object) -> None:
    """Raise where a file cannot hold these fields of a `Quantized`.

    Raises:
      TypeError: for a format that is no name.
      ValueError: for other values that do not fit.
    """
    if bits is not None:
        arguments.bits(bits)
    for one in () if axes is None else axes if isinstance(axes, tuple) else (axes,):
        arguments.axis(one)
    if group is not None:
        arguments.whole(group, "group", low=1, remedy="It is the number of rows that share a step.")
    if not (form is None or isinstance(form, str)):
        raise TypeError(f"`format` must be the name of a format or None, got {form!r}.")


def check(fields: Fields, shape: tuple[int, ...]) -> None:
    """Raise where a file cannot hold the fields, or they are not those of codes of this shape.

    Raises:
      TypeError: for dtypes that are no numbers, or are too wide.
      ValueError: for values or shapes that do not fit.
    """
    check_static(fields.bits, fields.axis, fields.group, fields.format)
    codes, _, zero = fields.dtypes
    numbers = all(t.name in leaf_codec.DTYPES and t.itemsize <= 4 and t.kind not in "bc" for t in fields.dtypes)
    whole = jnp.issubdtype(codes, jnp.integer) and (fields.format is not None or jnp.issubdtype(zero, jnp.integer))
    if not (numbers and whole):
        given = ", ".join(t.name for t in fields.dtypes)
        raise TypeError(f"Codes must be whole, step and zero point numbers, of 32 bits at most, got {given}.")
    # A format may decode by steps of any shape. Without one the formula of `dequantize` holds.
    fit = fits(fields.step, shape), fits(fields.zero or (), shape)
    if (fields.format is None and not all(fit)) or (fields.relative and not may_be_relative(fields, shape)):
        raise ValueError(
            f"`step` and `zero_point` must broadcast to {shape}, got {fields.step} and {fields.zero or ()}."
        )


def may_be_relative(fields: Fields, shape: tuple[int, ...]) -> bool:
    """True where codes can stand minus their zero points: there are several, whole ones."""
    several = fields.zero is not None and math.prod(fields.zero) > 1
    return several and fits(fields.zero or (), shape) and jnp.issubdtype(fields.dtypes[2], jnp.integer)


def write_text(text: str) -> bytes:
    """A text behind its length."""
    data = text.encode()
    if len(data) > _TEXT:
        raise ValueError(f"A name must take {_TEXT} bytes at most, got {text[:80]!r}...")
    return byte_stream.whole(len(data)) + data


def read_text(cursor: byte_stream.Cursor) -> str:
    """The text that `write_text` wrote."""
    return bytes(cursor.take(cursor.whole(_TEXT))).decode()


def _read_dtypes(cursor: byte_stream.Cursor) -> tuple[np.dtype, ...]:
    names = read_text(cursor).split()
    if len(names) != 3 or not all(name in leaf_codec.DTYPES for name in names):
        raise ValueError(f"A payload's dtypes must be three of JAX's, got {names}.")
    return tuple(leaf_codec.DTYPES[name] for name in names)


def write_axes(axes: int | tuple[int, ...]) -> bytes:
    """An axis behind 0, or several behind their number and 1: one axis is no tuple of one."""
    found = axes if isinstance(axes, tuple) else (axes,)
    several = len(found) + 1 if isinstance(axes, tuple) else 0
    return byte_stream.whole(several) + b"".join(byte_stream.signed(operator.index(one)) for one in found)


def read_axes(cursor: byte_stream.Cursor) -> int | tuple[int, ...]:
    """The axes that `write_axes` wrote."""
    several = cursor.whole(65)
    axes = tuple(cursor.signed(LARGEST) for _ in range(several - 1 if several else 1))
    return axes if several else axes[0]


def write_shape(shape: tuple[int, ...]) -> bytes:
    """The sizes of a shape behind their number."""
    return b"".join(byte_stream.whole(n) for n in (len(shape), *shape))


def read_shape(cursor: byte_stream.Cursor) -> tuple[int, ...]:
    """The shape that `write_shape` wrote."""
    return tuple(cursor.whole(LARGEST) for _ in range(cursor.whole(64)))


def _usual(bits: int | None) -> tuple[np.dtype, ...]:
    """The dtypes that take no bytes."""
    return np.dtype(grids.code_dtype(bits)), np.dtype(np.float32), np.dtype(np.int32)


def _usual_step(fields: Fields, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the steps that takes no bytes: as axis and group say."""
    if fields.axis is None and fields.group is None:
        return ()
    axes = () if fields.axis is None else fields.axis if isinstance(fields.axis, tuple) else (fields.axis,)
    kept = [axis % len(shape) for axis in axes if shape]
    sizes = [n if i in kept else 1 for i, n in enumerate(shape)]
    if fields.group and len(shape) > 1:
        sizes[-2] = shape[-2] // fields.group
    return tuple(sizes)


def fits(blocked: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """True where an array of the first shape broadcasts to the second, block by block."""
    pairs = zip(blocked[::-1], shape[::-1], strict=False)
    return len(blocked) <= len(shape) and all(have == want or (have and want % have == 0) for have, want in pairs)
