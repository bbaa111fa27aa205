"""One array as the bytes that stand for it in the file, and back: raw, or an alphabet and coded symbols.

Everything follows from the values alone; `quantized_leaves` is for an array that comes with its codes and steps. A
payload is: CRC-32 of the raw bytes; a byte that says which of grid, book and escapes follow; their heads; the code; the
escapes. Numbers are little-endian, counts LEB128, arrays row-major.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from clipjax._files import alphabets, byte_stream, step_search, symbol_codes, symbol_counts

_GRID, _BOOK, _ESCAPES = 1, 2, 4
DTYPES = {
    np.dtype(t).name: np.dtype(t)
    for t in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, np.complex64, np.complex128, jnp.bfloat16),
        *(jnp.int2, jnp.int4, jnp.uint2, jnp.uint4, jnp.float4_e2m1fn, jnp.float8_e3m4, jnp.float8_e4m3),
        *(jnp.float8_e4m3b11fnuz, jnp.float8_e4m3fn, jnp.float8_e4m3fnuz, jnp.float8_e5m2, jnp.float8_e5m2fnuz),
        jnp.float8_e8m0fnu,
    )
}
"""Every dtype that a file can hold, by name."""


class Payload(NamedTuple):
    """The stored form of one array.

    Attributes:
      data: the bytes; None where the array goes into the file as it is.
      packed: the bytes of alphabet, packed codes and escapes, at most those of the array.
    """

    data: bytearray | None
    packed: int


class CodesAndSteps(NamedTuple):
    """Codes and steps that were found behind an array whose values are k * s: k i16[shape], s f32[blocks, columns]."""

    codes: np.ndarray
    step: np.ndarray


def pack(x: np.ndarray, checked: bool = True) -> Payload:
    """The smallest payload of an array, which has a checksum of its own where it is `checked`."""
    found = alphabets.find(x)
    if found is None:
        return Payload(None, x.nbytes)
    symbols, alphabet = found
    code, packed = symbol_codes.encoding(symbols, alphabet.size, alphabet.zero)
    head, escapes = _head(alphabet), alphabet.escapes.nbytes
    data = bytearray(byte_stream.checksum(alphabets.patterns(x), checked)) + head
    packed = min(len(data) + packed + escapes, x.nbytes)
    # The estimate decides before anything is coded. An entropy coder may take a few bytes more, so that the size of the
    # code decides once more below.
    if len(data) + code.size + escapes >= x.nbytes:
        return Payload(None, packed)
    code.write(data)
    data += alphabet.escapes.astype(alphabet.escapes.dtype.newbyteorder("<"), copy=False).data
    return Payload(data if len(data) < x.nbytes else None, packed)


def unpack(
    data: byte_stream.Buffer, dtype: np.dtype, shape: tuple[int, ...], seen: list[int] | None = None
) -> np.ndarray:
    """The array of a coded payload; `seen` takes its checksum where it has none of its own.

    Raises:
      ValueError: for a payload that `pack` does not write, or whose array has another checksum.
    """
    return _read(data, dtype, shape, seen)[0]


def unpack_codes(
    data: byte_stream.Buffer, dtype: np.dtype, shape: tuple[int, ...], seen: list[int] | None = None
) -> np.ndarray | CodesAndSteps:
    """The codes and steps of a coded payload where every value is k * s or -0, else its array.

    Raises:
      ValueError: as `unpack`.
    """
    out, symbols, (found, book, escapes) = _read(data, dtype, shape, seen)
    # -0 is no code, but the value of code 0; its pattern without the sign bit is 0. Any other pattern of the book is a
    # value off the grid.
    if found is None or escapes.size or (book << book.dtype.type(1)).any():
        return out
    codes = np.empty(shape, np.int16)
    for code, part in zip(symbol_counts.chunks(codes), symbol_counts.chunks(symbols), strict=True):
        code[:] = np.where(part < found.levels, part.astype(np.int32) + found.low, 0)
    return CodesAndSteps(codes, found.step)


def entropy(x: np.ndarray) -> int:
    """Bytes of an ideal order-0 code of the bit patterns, and of each distinct pattern itself; at most those of `x`.

    A pattern that occurs once is no symbol: an escape stands for it.
    """
    _, counts = np.unique(alphabets.patterns(x), return_counts=True)
    symbols = np.append(counts[counts > 1], np.sum(counts == 1))
    return min(x.nbytes, math.ceil(symbol_counts.information(symbols)) + counts.size * min(x.dtype.itemsize, 8))


def describe(data: byte_stream.Buffer, dtype: np.dtype, shape: tuple[int, ...], seen: list[int] | None = None) -> str:
    """The form of a payload, in words."""
    cursor = byte_stream.Cursor(data, seen)
    head = _read_head(cursor, dtype, shape)
    parts = [f"{head.grid.step.size} step{'s' * (head.grid.step.size > 1)}"] if head.grid else []
    parts += [f"{head.book.size} values"] * bool(head.book.size) + [f"{head.escaped} others"] * bool(head.escaped)
    return f"{' + '.join(parts)}, {symbol_codes.NAMES[cursor.take(1)[0]] if head.size > 1 else 'constant'}"


def _read(
    data: byte_stream.Buffer, dtype: np.dtype, shape: tuple[int, ...], seen: list[int] | None
) -> tuple[np.ndarray, np.ndarray, alphabets.Alphabet]:
    """The array of a payload, checked, with its symbols and their alphabet."""
    cursor = byte_stream.Cursor(data, seen)
    checksum, symbols, alphabet = _symbols(cursor, dtype, shape)
    out = alphabets.read(symbols, alphabet, dtype).reshape(shape)
    bits = alphabets.patterns(out)
    cursor.compare(checksum, bits)
    if dtype == np.bool_ and bits.max(initial=0) > 1:
        raise ValueError("A payload of booleans has other numbers than 0 and 1.")
    return out, symbols, alphabet


def _head(alphabet: alphabets.Alphabet) -> bytes:
    """The part between the checksum and the code."""
    found, book, escapes = alphabet
    flags = _GRID * (found is not None) | _BOOK * bool(book.size) | _ESCAPES * bool(escapes.size)
    parts = [bytes([flags])]
    if found:
        parts.append(byte_stream.signed(found.low))
        parts += [byte_stream.whole(n) for n in (found.levels, *found.step.shape)]
        parts.append(found.step.astype("<f4").tobytes())
    if book.size:
        parts += [byte_stream.whole(book.size), book.astype(book.dtype.newbyteorder("<")).tobytes()]
    if escapes.size:
        parts.append(byte_stream.whole(escapes.size))
    return b"".join(parts)


class _Head(NamedTuple):
    """The bytes before the code."""

    checksum: int | None
    grid: step_search.StepGrid | None
    book: np.ndarray
    escaped: int
    lines: tuple[int, int]

    @property
    def size(self) -> int:
        """The number of symbols."""
        return (self.grid.levels if self.grid else 0) + self.book.size + bool(self.escaped)


def _read_head(cursor: byte_stream.Cursor, dtype: np.dtype, shape: tuple[int, ...]) -> _Head:
    checksum = cursor.checksum()
    kind = np.dtype(f"u{min(dtype.itemsize, 8)}")
    lines = alphabets.matrix(shape, math.prod(shape) * dtype.itemsize // kind.itemsize)
    flags = cursor.take(1)[0]
    found = _read_grid(cursor, lines) if flags & _GRID and dtype in step_search.DTYPES else None
    book = cursor.array(cursor.whole(alphabets.LIMIT), kind).astype(kind) if flags & _BOOK else np.zeros(0, kind)
    escaped = cursor.whole(lines[0] * lines[1]) if flags & _ESCAPES else 0
    head = _Head(checksum, found, book, escaped, lines)
    if not 1 <= head.size <= alphabets.LIMIT:
        raise ValueError(f"A payload's alphabet must have 1 to {alphabets.LIMIT} symbols, got {head.size}.")
    return head


def _symbols(
    cursor: byte_stream.Cursor, dtype: np.dtype, shape: tuple[int, ...]
) -> tuple[int | None, np.ndarray, alphabets.Alphabet]:
    """Checksum, symbols and alphabet of a payload."""
    head = _read_head(cursor, dtype, shape)
    symbols = symbol_codes.decode(cursor, head.lines, head.size)
    escapes = cursor.array(head.escaped, head.book.dtype).astype(head.book.dtype)
    if cursor.left:
        raise ValueError(f"A payload is {cursor.left} bytes too long.")
    return head.checksum, symbols, alphabets.Alphabet(head.grid, head.book, escapes)


def _read_grid(cursor: byte_stream.Cursor, lines: tuple[int, int]) -> step_search.StepGrid:
    low = cursor.signed(1 << 15)
    size, blocks, columns = (cursor.whole(most) for most in (alphabets.LIMIT, *lines))
    if not blocks or lines[0] % blocks or columns not in (1, lines[1]):
        raise ValueError(f"A payload's {blocks} x {columns} steps do not fit {lines[0]} x {lines[1]} values.")
    step = cursor.array(blocks * columns, np.float32).astype(np.float32).reshape(blocks, columns)
    if low + size > 1 << 15 or not size:
        raise ValueError(f"A payload's codes must end below 2^15, got {size} from {low}.")
    return step_search.StepGrid(step, low, size)
