"""Symbols to bytes and back, in the smallest of three codes: packed, order-0, or with densities of rows and columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipjax._files import ans, byte_stream, symbol_counts, zero_densities

NAMES = ("packed", "order 0", "rows and columns")
"""The codes in words, in the order of the byte that tells them apart."""


def encoding(symbols: np.ndarray, size: int, zero: int | None = None) -> tuple[byte_stream.Encoding, int]:
    """The smallest of three ways to write symbols.

    Packed codes of ceil(log2 size) bits; an order-0 ANS code; or, for a matrix with a symbol for zero, one with a
    density of zeros for every class of rows and of columns.

    Args:
      symbols: u8 or u16 [rows, columns], each below `size`.
      size: the number of symbols, 1 to 2^16.
      zero: the symbol that pruning leaves, if there is one.

    Returns:
      The way, and how many bytes packed codes take.
    """
    if size == 1 or not symbols.size:
        return byte_stream.Encoding(0, lambda out: None), 0
    counts = symbol_counts.histogram(symbols, size)
    options: list[byte_stream.Encoding | None] = [_packed(symbols, size), _order0(symbols, counts)]
    if zero is not None and min(symbols.shape) > 1 and 0 < counts[zero] < symbols.size:
        options.append(zero_densities.encoding(symbols, counts, zero))
    numbered = [(i, option) for i, option in enumerate(options) if option]
    # Of ways of equal size the first, simplest one. `zero_densities` is the only one that may not apply.
    kind, chosen = min(numbered, key=lambda pair: pair[1].size)

    def write(out: bytearray) -> None:
        out.append(kind)
        chosen.write(out)

    return byte_stream.Encoding(1 + chosen.size, write), 1 + int(numbered[0][1].size)


def decode(cursor: byte_stream.Cursor, shape: tuple[int, int], size: int) -> np.ndarray:
    """Read what an `encoding` wrote: u8 or u16 symbols [rows, columns], each below `size`."""
    out = np.zeros(shape, symbol_dtype(size))
    if size == 1 or not out.size:
        return out
    kind, readers = cursor.take(1)[0], (_read_packed, _read_order0, zero_densities.read)
    if kind >= len(readers):
        raise ValueError(f"A payload's code must be 0, 1 or 2, got {kind}.")
    readers[kind](cursor, out, size)
    return out


def symbol_dtype(size: int) -> npt.DTypeLike:
    """The narrowest dtype for symbols below `size`."""
    return np.uint8 if size <= 256 else np.uint16


def _width(size: int) -> int:
    return max(size - 1, 1).bit_length()


def _packed(symbols: np.ndarray, size: int) -> byte_stream.Encoding:
    """Codes of as many bits as the largest symbol needs, the highest bit first."""
    bits = _width(size)

    def write(out: bytearray) -> None:
        for part in symbol_counts.chunks(symbols):
            out += np.packbits(((part[:, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)).data

    return byte_stream.Encoding(-(-symbols.size * bits // 8), write)


def _read_packed(cursor: byte_stream.Cursor, out: np.ndarray, size: int) -> None:
    bits = _width(size)
    for part in symbol_counts.chunks(out):  # a whole number of bytes each: CHUNK is a multiple of 8
        code = np.unpackbits(cursor.array(-(-part.size * bits // 8), np.uint8), count=part.size * bits)
        place = (1 << np.arange(bits - 1, -1, -1)).astype(out.dtype)
        part[:] = (code.reshape(-1, bits) * place).sum(1, dtype=out.dtype)
    if int(out.max()) >= size:
        raise ValueError(f"A payload has a symbol beyond its alphabet of {size}.")


def _order0(symbols: np.ndarray, counts: np.ndarray) -> byte_stream.Encoding:
    """An ANS code under the symbols' own frequencies."""
    table, frequencies, size = ans.table(counts)

    def write(out: bytearray) -> None:
        out += table
        ans.push([(lambda: symbols, frequencies)], out)

    return byte_stream.Encoding(size + ans.FLUSH, write)


def _read_order0(cursor: byte_stream.Cursor, out: np.ndarray, size: int) -> None:
    frequencies = ans.read_table(cursor, size)
    pops = ans.Pops(cursor)
    pops.into(out, frequencies)
    pops.end()
