"""A model of where zeros are: rows and columns fall into classes of like density.

Pruning leaves dead inputs and dead units, and between them lines of unlike density. Every block, a class of rows by a
class of columns, has one share of nonzeros; the nonzeros are coded after them, with one table for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from clipjax._files import ans

_DEPTH = 4  # rows, and columns, fall into at most 2^4 classes
_FULL = (1 << 16) - 1  # a stored share of nonzeros: 0 and _FULL are exact, and their blocks take no bits
_WORTH = 16  # bits that a split must save


def plan(symbols: np.ndarray, counts: np.ndarray, zero: int) -> ans.Plan | None:
    """How to write this code; None where lines are too alike for classes."""
    alive = symbols != zero
    rows, columns = (np.count_nonzero(alive, axis=axis) for axis in (1, 0))
    classes = _classes(rows, symbols.shape[1]), _classes(columns, symbols.shape[0])
    if all(c.max() == 0 for c in classes):
        return None
    fine = np.stack([np.count_nonzero(alive[classes[0] == i], axis=0) for i in range(1 << _DEPTH)])
    fine = np.stack([fine[:, classes[1] == j].sum(1) for j in range(1 << _DEPTH)], axis=1)
    depths = [(a, b) for a in range(_DEPTH + 1) for b in range(_DEPTH + 1)]
    best = min((_Blocks.plan(classes, fine, depth) for depth in depths), key=lambda blocks: blocks.size)
    rest = np.where(np.arange(counts.size) == zero, 0, counts)
    table, frequencies, values = ans.table(rest)

    def write(out: bytearray) -> None:
        out += ans.whole(zero) + table + best.head()
        ans.push([*best.parts(alive), (lambda: symbols[alive], frequencies)], out)

    return ans.Plan(len(ans.whole(zero)) + values + best.size + ans.FLUSH, write)


def read(cursor: ans.Cursor, out: np.ndarray, size: int) -> None:
    """Fill `out` with the symbols that `plan` wrote."""
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
    blocks = _Blocks((classes[0], classes[1]), (int(depth[0]), int(depth[1])), tables, shares, 0.0)
    alive = np.zeros(out.shape, bool)
    for place, share in blocks.each():
        for rows in _strips(*place):
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
    """The rows of a block in strips of about a chunk."""
    height = max(1, ans.CHUNK // max(columns.size, 1))
    return [rows[i : i + height] for i in range(0, rows.size, height)] if columns.size else []


class _Blocks(NamedTuple):
    """Classes of rows and columns, the frequencies of each, and the stored share of nonzeros of every block."""

    classes: tuple[np.ndarray, np.ndarray]
    depth: tuple[int, int]
    tables: list[Any]
    shares: np.ndarray
    size: float

    @classmethod
    def plan(cls, classes: tuple[np.ndarray, np.ndarray], fine: np.ndarray, depth: tuple[int, int]) -> _Blocks:
        """Classes merged down to 2^depth, and the bytes of their code."""
        merged = [c >> (_DEPTH - d) for c, d in zip(classes, depth, strict=True)]
        alive = fine.reshape(1 << depth[0], -1, 1 << depth[1], 1 << (_DEPTH - depth[1])).sum((1, 3))
        numbers = [np.bincount(m, minlength=1 << d) for m, d in zip(merged, depth, strict=True)]
        cells = np.outer(*numbers)
        shares = np.clip(np.rint(alive * (_FULL / np.maximum(cells, 1))), 1, _FULL - 1)
        shares = np.where(alive == 0, 0, np.where(alive == cells, _FULL, shares)).astype(np.int64)
        tables = [ans.table(n) if d else (b"", np.ones(1), 0.0) for n, d in zip(numbers, depth, strict=True)]
        inner = (shares > 0) & (shares < _FULL)
        p, n, k = shares[inner] / _FULL, cells[inner], alive[inner]
        size = -np.sum(k * np.log2(p) + (n - k) * np.log2(1 - p)) / 8 + 2 + 2 * shares.size + sum(t[2] for t in tables)
        return cls((merged[0], merged[1]), depth, tables, shares, float(size))

    def head(self) -> bytes:
        """What stands before the code."""
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
        members = [
            [np.flatnonzero(c == i) for i in range(1 << d)] for c, d in zip(self.classes, self.depth, strict=True)
        ]
        for i, rows in enumerate(members[0]):
            for j, columns in enumerate(members[1]):
                yield (rows, columns), int(self.shares[i, j])


def _classes(alive: np.ndarray, width: int) -> np.ndarray:
    """Nested classes of lines by how many of their `width` entries are alive: u8, bit by bit the best split."""
    order = np.argsort(alive, kind="stable")
    total = np.concatenate([[0], np.cumsum(alive[order])])
    sorted_classes = np.zeros(alive.size, np.uint8)

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
