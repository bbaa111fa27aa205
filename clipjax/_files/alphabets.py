"""Few distinct values as symbols: codes of a grid, then bit patterns that repeat, then one escape for all others.

Everything compares bit patterns, so NaN payloads and the sign of zero survive, and a grid counts only where decoding
returns the very bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from clipjax._files import step_search, symbol_counts

LIMIT = 1 << 16  # the largest alphabet, the escape included
_SAMPLE = 1 << 16  # entries of a large array that are looked at before all are
_REPEATED = 1 / 16  # the part of the sample that repeated values must cover


class Alphabet(NamedTuple):
    """The meaning of the symbols of an array.

    Attributes:
      grid: the first symbols are its codes; None where values are not on one.
      book: the next ones are these bit patterns.
      escapes: what the last symbol stands for, in memory order; no such symbol where it is empty.
    """

    grid: step_search.StepGrid | None
    book: np.ndarray
    escapes: np.ndarray

    @property
    def size(self) -> int:
        """The number of symbols."""
        return (self.grid.levels if self.grid else 0) + self.book.size + bool(self.escapes.size)

    @property
    def zero(self) -> int | None:
        """The symbol of +0."""
        if self.grid:
            return -self.grid.low if self.grid.low <= 0 < self.grid.low + self.grid.levels else None
        return 0 if self.book.size and self.book[0] == 0 else None


def patterns(x: np.ndarray) -> np.ndarray:
    """The bits of an array as whole numbers, flat; those of complex128 as pairs."""
    return np.ascontiguousarray(x).reshape(-1).view(np.dtype(f"u{min(x.dtype.itemsize, 8)}"))


def matrix(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Rows and columns of so many patterns: the last axis has the columns, if there are two axes or more."""
    columns = shape[-1] if len(shape) > 1 and shape[-1] else 1
    return size // columns, columns


@np.errstate(all="ignore")  # of any bits, some are signalling NaN
def find(x: np.ndarray) -> tuple[np.ndarray, Alphabet] | None:
    """The symbols u8 or u16 [rows, columns] of an array; None where too few values repeat to save anything."""
    bits = patterns(x)
    if not bits.size:
        return None
    shape = matrix(x.shape, bits.size)
    repeated = _repeated(bits)
    found = list(_on_grids(x, repeated, shape))
    enough = any(alphabet.size <= 2 * repeated.size and not alphabet.escapes.size for _, alphabet in found)
    if repeated.size and not enough:
        found.append(_in_book(bits, repeated, shape))
    return min(found, key=_estimate) if len(found) > 1 else found[0] if found else None


@np.errstate(all="ignore")
def read(symbols: np.ndarray, alphabet: Alphabet, dtype: np.dtype) -> np.ndarray:
    """The values [rows, columns] of the symbols, bit for bit; pairs of patterns for complex128."""
    grid, book, escapes = alphabet
    low = grid.levels if grid else 0
    if grid and grid.step.size > 1:
        out = step_search.values(symbols, grid.low, grid.step, dtype)
        flat = patterns(out)
    else:
        levels = np.arange(low)[:, None].astype(np.uint16)
        known = patterns(step_search.values(levels, grid.low, grid.step, dtype)) if grid else book[:0]
        known = np.concatenate([known, book, np.zeros(1, book.dtype)])
        flat = np.empty(symbols.size, book.dtype)
        for part, symbol in zip(symbol_counts.chunks(flat), symbol_counts.chunks(symbols), strict=True):
            known.take(symbol, out=part, mode="clip")
        out = flat.view(dtype).reshape(symbols.shape if dtype.itemsize <= 8 else -1)
    if low and book.size:
        at = np.flatnonzero((symbols.reshape(-1) >= low) & (symbols.reshape(-1) < low + book.size))
        flat[at] = book[symbols.reshape(-1)[at] - low]
    if escapes.size:
        flat[np.flatnonzero(symbols.reshape(-1) == low + book.size)] = escapes
    return out


def _estimate(found: tuple[np.ndarray, Alphabet]) -> float:
    """About how many bytes an order-0 code takes."""
    symbols, alphabet = found
    step = alphabet.grid.step.nbytes if alphabet.grid else 0
    table = step + alphabet.book.nbytes + alphabet.escapes.nbytes + alphabet.size
    return table + symbol_counts.information(symbol_counts.histogram(symbols, alphabet.size))


def _repeated(bits: np.ndarray) -> np.ndarray:
    """The patterns that occur more than once, sorted: all of them in narrow or small arrays, those of a sample else."""
    if bits.dtype.itemsize <= 2:
        counts = symbol_counts.histogram(bits, 1 << (8 * bits.dtype.itemsize))
        values = np.flatnonzero(counts > 1)[: LIMIT - 1].astype(bits.dtype)
        counts = counts[counts > 1]
    else:
        values, counts = np.unique(_sample(bits), return_counts=True)
        values, counts = values[counts > 1], counts[counts > 1]
    counted = bits.size if bits.dtype.itemsize <= 2 else min(bits.size, _SAMPLE)
    return values if bits.size <= _SAMPLE or counts.sum() > _REPEATED * counted else values[:0]


def _sample(bits: np.ndarray) -> np.ndarray:
    """One entry, at random, of each of so many stretches."""
    if bits.size <= _SAMPLE:
        return bits
    edges = np.linspace(0, bits.size, _SAMPLE + 1).astype(np.int64)
    return bits[edges[:-1] + (np.random.default_rng(0).random(_SAMPLE) * np.diff(edges)).astype(np.int64)]


def _in_book(bits: np.ndarray, book: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, Alphabet]:
    """The patterns as symbols of a book, to which what else repeats is added."""
    # Invariant: the book holds every pattern that repeated in some sample so far. Each turn samples what the book left
    # over, which gets smaller, and ends when nothing in it repeats or the alphabet is full.
    while True:
        symbols, missed = _look_up(bits, book)
        left = bits[missed]
        more = _repeated(left) if bits.size > _SAMPLE and bits.dtype.itemsize > 2 and left.size else left[:0]
        if not more.size or book.size + more.size >= LIMIT:
            return symbols.reshape(shape), Alphabet(None, book, left)
        book = np.union1d(book, more)


def _look_up(bits: np.ndarray, book: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of every pattern in a sorted book, the book's size where it is not there; and where that is so."""
    place = _placer(book)
    symbols = np.empty(bits.size, np.uint8 if book.size < 256 else np.uint16)
    missed = []
    for begin in range(0, bits.size, symbol_counts.CHUNK):
        part = bits[begin : begin + symbol_counts.CHUNK]
        at = place(part)
        wrong = np.flatnonzero(book.take(at) != part)
        searched = np.minimum(np.searchsorted(book, part[wrong]), book.size - 1)
        there = book[searched] == part[wrong]
        at[wrong] = np.where(there, searched, book.size)
        symbols[begin : begin + symbol_counts.CHUNK] = at
        missed.append(wrong[~there] + begin)
    return symbols, np.concatenate(missed)


def _placer(book: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that guesses the places of patterns in the book, by a hash in which patterns seldom collide."""
    # Multiplying by an odd constant spreads the bits upwards; the highest ones are the slot. Patterns of 16 bits have
    # slots of their own. A wrong guess costs a search, never a wrong symbol: the caller compares.
    width = 8 * book.dtype.itemsize
    slots = width if width <= 16 else 16 if book.size <= 1 << 8 else 20
    factor, shift = (1, 0) if width <= 16 else (0x9E3779B97F4A7C15 >> (64 - width) | 1, width - slots)
    factor, shift = book.dtype.type(factor), book.dtype.type(shift)
    table = np.zeros(1 << slots, np.uint16)
    table[(book * factor) >> shift] = np.arange(book.size)
    return lambda part: table.take((part * factor) >> shift)


def _on_grids(x: np.ndarray, repeated: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[np.ndarray, Alphabet]]:
    """The array as codes of each candidate's grid; what is off the grid stands in a book, or escapes."""
    if x.dtype not in step_search.DTYPES:
        return
    lines = np.ascontiguousarray(x).reshape(shape)
    sizes = np.abs(repeated.view(x.dtype).astype(np.float64))
    for step in step_search.steps(lines, sizes[np.isfinite(sizes) & (sizes > 0)]):
        codes = step_search.codes(lines, step)
        counts = np.roll(symbol_counts.histogram(codes.view(np.uint16), 1 << 16), 1 << 15)  # the first is OFF's
        on = np.flatnonzero(counts[1:]) + 1 + step_search.OFF
        if on.size and counts[0] <= codes.size / 2:
            yield _coded(lines, codes, step_search.StepGrid(step, int(on[0]), int(on[-1] - on[0]) + 1))


def _coded(lines: np.ndarray, codes: np.ndarray, grid: step_search.StepGrid) -> tuple[np.ndarray, Alphabet]:
    """Codes as symbols; what is off the grid as symbols of a book, or as escapes."""
    off = np.flatnonzero(codes.reshape(-1) == step_search.OFF)
    left = patterns(lines)[off]
    values, counts = np.unique(left, return_counts=True)
    book = values[counts > 1][: LIMIT - 1 - grid.levels]
    symbols = np.empty(codes.shape, np.uint8 if grid.levels + book.size < 256 else np.uint16)
    for part, code in zip(symbol_counts.chunks(symbols), symbol_counts.chunks(codes), strict=True):
        part[:] = code.astype(np.int32) - grid.low
    if not off.size:
        return symbols, Alphabet(grid, book, left)
    others, missed = _look_up(left, book) if book.size else (np.zeros(off.size, np.uint16), np.arange(off.size))
    symbols.reshape(-1)[off] = others.astype(np.int64) + grid.levels
    return symbols, Alphabet(grid, book, left[missed])
