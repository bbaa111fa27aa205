"""Arrays of known meaning as bytes: codes, steps and zero points, whose values lie in a range, repeat or do neither.

An array of one entry or none stands as it is. Before a larger one a byte says which form follows: raw; a range of whole
numbers and packed symbols; the same with the CRC-32 of the array and symbols in an entropy code, whose decoder is not
ours; one entry for all; or a payload of `leaf_codec` behind its length.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from clipjax._files import alphabets, byte_stream, leaf_codec, symbol_codes, symbol_counts

_RAW, _RANGE, _CHECKED, _ALIKE, _PAYLOAD = range(5)
_SPARSE = 4  # a range with more levels than this for each that occurs may be larger than a codebook


def pack(x: np.ndarray, most: int, zero: int | None = None, checked: bool = True) -> bytearray:
    """The smallest form of an array of numbers of 32 bits at most; the bits of floats stand as whole numbers.

    Args:
      x: the array.
      most: how many entries an array may have that does not stand raw, as for `read`.
      zero: the number that many entries may be, in some rows and columns more than in others.
      checked: False for an entropy code without the checksum of its array.

    Returns:
      The bytes.
    """
    bits = alphabets.patterns(x)
    if x.size <= 1:
        return bytearray(bits.tobytes())
    best = min(_forms(x, bits, zero, checked), key=len, default=None) if x.size <= most else None
    return bytearray([_RAW]) + bits.tobytes() if best is None or len(best) > x.nbytes else best


def read(cursor: byte_stream.Cursor, dtype: np.dtype, shape: tuple[int, ...], most: int) -> np.ndarray:
    """The array behind what `pack` wrote.

    Args:
      cursor: stands at the array.
      dtype: that of the array.
      shape: that of the array, which may be hostile.
      most: how many entries an array may have that does not stand raw.

    Raises:
      ValueError: for bytes that `pack` does not write.
    """
    size, bits = math.prod(shape), np.dtype(f"u{dtype.itemsize}")
    form = cursor.take(1)[0] if size > 1 else _RAW
    if form == _RAW:
        return cursor.array(size, bits).astype(bits).view(dtype).reshape(shape)
    # Raw bytes are there or not, but the other forms make arrays of any size of a few bytes: theirs is limited.
    if size > most:
        raise ValueError(f"A payload's array of {shape} must have {most} entries at most.")
    if form in (_RANGE, _CHECKED):
        return _read_range(cursor, dtype, shape, checked=form == _CHECKED)
    if form == _ALIKE:
        return np.full(shape, cursor.array(1, bits)[0], bits).view(dtype)
    if form == _PAYLOAD:
        return leaf_codec.unpack(cursor.take(cursor.whole(cursor.left)), bits, shape, cursor.seen).view(dtype)
    raise ValueError(f"A payload's array must have a form from 0 to 4, got {form}.")


def describe(cursor: byte_stream.Cursor, dtype: np.dtype, shape: tuple[int, ...]) -> str:
    """The form in which the array is stored, in words."""
    form = cursor.take(1)[0] if math.prod(shape) > 1 else _RAW
    if form == _PAYLOAD:
        data, bits = cursor.take(cursor.whole(cursor.left)), np.dtype(f"u{dtype.itemsize}")
        return leaf_codec.describe(data, bits, shape, cursor.seen)
    if form not in (_RANGE, _CHECKED):
        return "constant" if form == _ALIKE else "raw"
    _, levels, _ = _read_range_head(cursor, form == _CHECKED)
    return symbol_codes.NAMES[cursor.take(1)[0]] if levels > 1 else "constant"


def _forms(x: np.ndarray, bits: np.ndarray, zero: int | None, checked: bool) -> list[bytearray]:
    """The forms besides raw that may be the smallest."""
    whole = np.ascontiguousarray(_whole(x))
    low, levels = int(whole.min()), int(whole.max()) - int(whole.min()) + 1
    forms, sparse = [], levels > alphabets.LIMIT
    if levels == 1:
        forms.append(bytearray([_ALIKE]) + bits[:1].tobytes())
    if not sparse:
        symbols = np.empty(alphabets.matrix(x.shape, x.size), symbol_codes.symbol_dtype(levels))
        for part, numbers in zip(symbol_counts.chunks(symbols), symbol_counts.chunks(whole), strict=True):
            part[:] = numbers.astype(np.int64) - low
        inside = zero is not None and low <= zero < low + levels
        code, packed = symbol_codes.encoding(symbols, levels, (zero or 0) - low if inside else None)
        coded = code.size < packed
        ranged = bytearray([_CHECKED if coded else _RANGE]) + byte_stream.signed(low) + byte_stream.whole(levels)
        ranged += byte_stream.checksum(bits, checked and coded)
        code.write(ranged)
        forms.append(ranged)
        # A level that does not occur costs a byte in an entropy code's table: where most do not, try a codebook too.
        sparse = levels > _SPARSE * int(np.count_nonzero(symbol_counts.histogram(symbols, levels)))
    book = leaf_codec.pack(bits.reshape(x.shape), checked).data if sparse else None
    return forms if book is None else [*forms, bytearray([_PAYLOAD]) + byte_stream.whole(len(book)) + book]


def _read_range_head(cursor: byte_stream.Cursor, checked: bool) -> tuple[int, int, int | None]:
    """The lowest number, how many there are from it on, and the checksum if there is one."""
    low, levels = cursor.signed(1 << 32), cursor.whole(alphabets.LIMIT)
    if not levels:
        raise ValueError("A payload's range must have a level.")
    return low, levels, cursor.checksum() if checked else None


def _read_range(cursor: byte_stream.Cursor, dtype: np.dtype, shape: tuple[int, ...], *, checked: bool) -> np.ndarray:
    low, levels, checksum = _read_range_head(cursor, checked)
    symbols = symbol_codes.decode(cursor, alphabets.matrix(shape, math.prod(shape)), levels)
    whole = np.empty(shape, _whole(np.zeros(0, dtype)).dtype)
    for part, symbol in zip(symbol_counts.chunks(whole), symbol_counts.chunks(symbols), strict=True):
        part[:] = (symbol.astype(np.int64) + low).astype(whole.dtype)  # of hostile numbers, those that do not fit wrap
    x = whole.astype(dtype, copy=False) if jnp.issubdtype(dtype, jnp.integer) else whole.view(dtype)
    if checked:
        cursor.compare(checksum, alphabets.patterns(x))
    return x


def _whole(x: np.ndarray) -> np.ndarray:
    """Whole numbers that NumPy computes with: those of an integer array, the bit patterns of another."""
    if x.dtype.kind in "iu":
        return x
    return x.astype(np.int8) if jnp.issubdtype(x.dtype, jnp.integer) else alphabets.patterns(x).reshape(x.shape)
