"""Symbols to bytes and back, in the smallest of three codes: packed, order-0, or with densities of rows and columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipjax._files import ans, densities

LIMIT = 1 << 16  # the largest alphabet
NAMES = ("packed", "order 0", "rows and columns")


"""The codes in words, in the order of the byte that tells them apart."""


def plan(symbols: np.ndarray, size: int, zero: int | None = None) -> tuple[ans.Plan, int]:
    """The smallest of three ways to write symbols.

    Packed codes of ceil(log2 size) bits; an order-0 ANS code; or, for a matrix with a symbol for zero, one with a
    density of zeros for every class of rows and of columns.

    Args:
      symbols: u8 or u16 [rows, columns], each below `size`.
      size: the number of symbols, 1 to 2^16.
      zero: the symbol that pruning leaves, if there is one.

    Returns:
      The plan, and how many bytes packed codes take.
    """
    if size == 1 or not symbols.size:
        return ans.Plan(0, lambda out: None), 0
    counts = ans.histogram(symbols, size)
    options: list[ans.Plan | None] = [_packed(symbols, size), _order0(symbols, counts)]
    if zero is not None and min(symbols.shape) > 1 and 0 < counts[zero] < symbols.size:
        options.append(densities.plan(symbols, counts, zero))
    numbered = [(i, option) for i, option in enumerate(options) if option]
    kind, chosen = min(numbered, key=lambda pair: pair[1].size)

    def write(out: bytearray) -> None:
        out.append(kind)
        chosen.write(out)

    return ans.Plan(1 + chosen.size, write), 1 + int(numbered[0][1].size)


def decode(cursor: ans.Cursor, shape: tuple[int, int], size: int) -> np.ndarray:
    """Read what a plan wrote: u8 or u16 symbols [rows, columns], each below `size`."""
    out = np.zeros(shape, symbol_dtype(size))
    if size == 1 or not out.size:
        return out
    kind, readers = cursor.take(1)[0], (_read_packed, _read_order0, densities.read)
    if kind >= len(readers):
        raise ValueError(f"A payload's code must be 0, 1 or 2, got {kind}.")
    readers[kind](cursor, out, size)
    return out


def symbol_dtype(size: int) -> Any:
    """The narrowest dtype for symbols below `size`."""
    return np.uint8 if size <= 256 else np.uint16


def _width(size: int) -> int:
    return max(size - 1, 1).bit_length()


def _packed(symbols: np.ndarray, size: int) -> ans.Plan:
    bits = _width(size)

    def write(out: bytearray) -> None:
        for part in ans.chunks(symbols):
            out += np.packbits(((part[:, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)).data

    return ans.Plan(-(-symbols.size * bits // 8), write)


def _read_packed(cursor: ans.Cursor, out: np.ndarray, size: int) -> None:
    bits = _width(size)
    for part in ans.chunks(out):  # a whole number of bytes each: CHUNK is a multiple of 8
        code = np.unpackbits(cursor.array(-(-part.size * bits // 8), np.uint8), count=part.size * bits)
        place = (1 << np.arange(bits - 1, -1, -1)).astype(out.dtype)
        part[:] = (code.reshape(-1, bits) * place).sum(1, dtype=out.dtype)
    if int(out.max()) >= size:
        raise ValueError(f"A payload has a symbol beyond its alphabet of {size}.")


def _order0(symbols: np.ndarray, counts: np.ndarray) -> ans.Plan:
    table, frequencies, size = ans.table(counts)

    def write(out: bytearray) -> None:
        out += table
        ans.push([(lambda: symbols, frequencies)], out)

    return ans.Plan(size + ans.FLUSH, write)


def _read_order0(cursor: ans.Cursor, out: np.ndarray, size: int) -> None:
    frequencies = ans.read_table(cursor, size)
    pops = ans.Pops(cursor)
    pops.into(out, frequencies)
    pops.end()
