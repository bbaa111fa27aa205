"""A code that models where the zeros of a matrix are: rows and columns fall into classes of like density.

Pruning leaves dead inputs and dead units, and between them lines of unlike density. Every block, a class of rows by a
class of columns, has one share of nonzeros ("alive" entries); the nonzeros themselves are coded after all blocks, with
one table for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipjax._files import ans, byte_stream, symbol_counts

_DEPTH = 4  # rows, and columns, fall into at most 2^4 classes
_FULL = (1 << 16) - 1  # a stored share of nonzeros: 0 and _FULL are exact, and their blocks take no bits
_WORTH = 16  # bits that a split must save


def encoding(symbols: np.ndarray, counts: np.ndarray, zero: int) -> byte_stream.Encoding | None:
    """How to write a matrix of symbols in this code; None where lines are too alike for classes."""
    alive = symbols != zero
    rows, columns = (np.count_nonzero(alive, axis=axis) for axis in (1, 0))
    classes = _classes(rows, symbols.shape[1]), _classes(columns, symbols.shape[0])
    if all(c.max() == 0 for c in classes):
        return None
    # The nonzeros of every pair of finest classes, counted once: each of the coarser pairs below is a sum of them.
    fine = np.stack([np.count_nonzero(alive[classes[0] == i], axis=0) for i in range(1 << _DEPTH)])
    fine = np.stack([fine[:, classes[1] == j].sum(1) for j in range(1 << _DEPTH)], axis=1)
    depths = [(a, b) for a in range(_DEPTH + 1) for b in range(_DEPTH + 1)]
    best = min((_Blocks.merged(classes, fine, depth) for depth in depths), key=lambda blocks: blocks.size)
    rest = np.where(np.arange(counts.size) == zero, 0, counts)
    table, frequencies, values = ans.table(rest)

    def write(out: bytearray) -> None:
        out += byte_stream.whole(zero) + table + best.head()
        ans.push([*best.parts(alive), (lambda: symbols[alive], frequencies)], out)

    return byte_stream.Encoding(len(byte_stream.whole(zero)) + values + best.size + ans.FLUSH, write)


def read(cursor: byte_stream.Cursor, out: np.ndarray, size: int) -> None:
    """Fill `out` with the symbols that an `encoding` wrote."""
    zero = cursor.whole(size - 1)
    frequencies = ans.read_table(cursor, size)
    depth = cursor.array(2, np.uint8)
    if depth.max() > _DEPTH:
        raise ValueError(f"A payload's classes must be at most 2^{_DEPTH}, got 2^{int(depth.max())}.")
    tables = [ans.read_table(cursor, 1 << int(d)) if d else np.ones(1) for d in depth]
    shares = cursor.array(1 << int(depth.sum()), np.uint16).reshape([1 << int(d) for d in depth])
    pops = ans.Pops(cursor)
    classes = [np.zeros(n, np.uint8) for n in out.shape]
    for c, table, d in zip(classes, tables, depth, strict=True):
        if d:
            pops.into(c, table)
    blocks = _Blocks((classes[0], classes[1]), (int(depth[0]), int(depth[1])), shares)
    alive = np.zeros(out.shape, bool)
    for place, share in blocks.each():
        for rows in _strips(*place):  # the code is the same for any height: a block is coded row by row
            block = np.full((rows.size, place[1].size), share == _FULL, np.uint8)
            if 0 < share < _FULL:
                pops.into(block, _bernoulli(share))
            alive[np.ix_(rows, place[1])] = block
    values = np.empty(np.count_nonzero(alive), out.dtype)
    pops.into(values, frequencies)
    pops.end()
    out[...] = zero
    out[alive] = values


def _bernoulli(share: int) -> np.ndarray:
    return np.array([_FULL - share, share], np.float64)


def _strips(rows: np.ndarray, columns: np.ndarray) -> list[np.ndarray]:
    """The rows of a block in strips of about a chunk; none where the block is empty."""
    return [rows[strip] for strip in symbol_counts.strips(rows.size, columns.size)] if columns.size else []


class _Blocks(NamedTuple):
    """Classes of rows and columns, and what is stored of them.

    Attributes:
      classes: the class of every row, and of every column.
      depth: there are 2^depth classes of rows, and of columns.
      shares: the stored share of nonzeros of every block, 0 to `_FULL`.
      tables: the frequencies of the classes of rows, and of columns: as bytes, and as read back; only for writing.
      size: the bytes of all this and of where the nonzeros are; only for writing.
    """

    classes: tuple[np.ndarray, np.ndarray]
    depth: tuple[int, int]
    shares: np.ndarray
    tables: tuple[tuple[bytes, np.ndarray, float], ...] = ()
    size: float = 0.0

    @classmethod
    def merged(cls, classes: tuple[np.ndarray, np.ndarray], fine: np.ndarray, depth: tuple[int, int]) -> _Blocks:
        """The finest classes merged down to 2^depth, and the bytes of their code."""
        coarse = [c >> (_DEPTH - d) for c, d in zip(classes, depth, strict=True)]
        alive = fine.reshape(1 << depth[0], -1, 1 << depth[1], 1 << (_DEPTH - depth[1])).sum((1, 3))
        numbers = [np.bincount(m, minlength=1 << d) for m, d in zip(coarse, depth, strict=True)]
        cells = np.outer(*numbers)
        # 0 and _FULL promise that nothing, or everything, is alive: other shares are rounded away from both.
        shares = np.clip(np.rint(alive * (_FULL / np.maximum(cells, 1))), 1, _FULL - 1)
        shares = np.where(alive == 0, 0, np.where(alive == cells, _FULL, shares)).astype(np.int64)
        tables = tuple(ans.table(n) if d else (b"", np.ones(1), 0.0) for n, d in zip(numbers, depth, strict=True))
        inner = (shares > 0) & (shares < _FULL)
        p, n, k = shares[inner] / _FULL, cells[inner], alive[inner]
        size = -np.sum(k * np.log2(p) + (n - k) * np.log2(1 - p)) / 8 + 2 + 2 * shares.size + sum(t[2] for t in tables)
        return cls((coarse[0], coarse[1]), depth, shares, tables, float(size))

    def head(self) -> bytes:
        """The bytes before the code."""
        tables = b"".join(table[0] for table in self.tables)
        return bytes(self.depth) + tables + self.shares.astype("<u2").tobytes()

    def parts(self, alive: np.ndarray) -> list[ans.Part]:
        """The classes and then, block by block, which entries are alive."""
        named = zip(self.classes, self.tables, self.depth, strict=True)
        parts: list[ans.Part] = [(functools.partial(np.asarray, c), table[1]) for c, table, d in named if d]
        for place, share in self.each():
            if 0 < share < _FULL:
                at = [np.ix_(rows, place[1]) for rows in _strips(*place)]
                parts += [(functools.partial(alive.__getitem__, i), _bernoulli(share)) for i in at]
        return parts

    def each(self) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], int]]:
        """Rows, columns and share of every block."""
        lines = [[np.flatnonzero(c == i) for i in range(1 << d)] for c, d in zip(self.classes, self.depth, strict=True)]
        for i, rows in enumerate(lines[0]):
            for j, columns in enumerate(lines[1]):
                yield (rows, columns), int(self.shares[i, j])


def _classes(alive: np.ndarray, width: int) -> np.ndarray:
    """Nested classes of lines by how many of their `width` entries are alive: u8, bit by bit the best split."""
    order = np.argsort(alive, kind="stable")
    total = np.concatenate([[0], np.cumsum(alive[order])])
    sorted_classes = np.zeros(alive.size, np.uint8)

    # Invariant: sorted lines [begin, end) have the class `label << depth` when they are split at depth `depth`. Halves
    # keep it as a prefix, so that classes shifted right by k bits are those of a tree that is k levels shallower.
    def split(begin: int, end: int, depth: int, label: int) -> None:
        sorted_classes[begin:end] = label << depth
        if depth == 0 or end - begin < 2:
            return
        cut = np.arange(begin, end + 1)
        cost = _bernoulli_bits(total[cut] - total[begin], (cut - begin) * width)
        cost = cost + _bernoulli_bits(total[end] - total[cut], (end - cut) * width)
        at = begin + int(np.argmin(cost))
        if cost[0] - cost[at - begin] > _WORTH:
            split(begin, at, depth - 1, 2 * label)
            split(at, end, depth - 1, 2 * label + 1)

    split(0, alive.size, _DEPTH, 0)
    classes = np.empty_like(sorted_classes)
    classes[order] = sorted_classes
    return classes


def _bernoulli_bits(alive: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The information of that many ones among so many cells, in bits."""
    p = alive / np.maximum(cells, 1)
    inner = np.clip(p, 1e-12, 1 - 1e-12)
    bits = -cells * (p * np.log2(inner) + (1 - p) * np.log2(1 - inner))
    return np.where((alive == 0) | (alive == cells), 0.0, bits)
