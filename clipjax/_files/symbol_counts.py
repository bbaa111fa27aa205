"""Symbols of large arrays: a walk over them a chunk at a time, how often each occurs, and what that is in bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK = 1 << 18  # symbols that are widened to i32 at a time; a multiple of 8, so that packed bits fill whole bytes


def chunks(symbols: np.ndarray) -> Iterator[np.ndarray]:
    """The entries in memory order, a chunk at a time: views of a contiguous array."""
    flat = symbols.reshape(-1)
    return (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))


def strips(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix in strips of about a chunk, at least one row each."""
    height = max(1, CHUNK // max(columns, 1))
    return (slice(begin, min(begin + height, rows)) for begin in range(0, rows, height))


def histogram(symbols: np.ndarray, size: int) -> np.ndarray:
    """The number of times that each symbol occurs: i64[size]."""
    counts = np.zeros(size, np.int64)
    for part in chunks(symbols):
        counts += np.bincount(part, minlength=size)
    return counts


def information(counts: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Bytes of the ideal code of symbols with these counts, under these frequencies (default: their own)."""
    weights = counts if weights is None else weights
    occur = counts > 0
    probability = weights[occur] / max(float(np.sum(weights, dtype=np.float64)), 1.0)
    return float(-np.sum(counts[occur] * np.log2(probability)) / 8) if occur.any() else 0.0
