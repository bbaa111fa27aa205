"""Which step s makes the values of an array k * s, bit for bit: one for all, one a column, or one a group of rows.

The candidates follow from exact integers where products are exact, as those of `fake_quantize` are in f32, and from the
interval of steps that round to what is there in narrower dtypes. Only decoding decides: a code counts where
k * s, computed in f32 and rounded to the dtype, has the very bits of the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from clipjax._files import symbol_counts

DTYPES = {np.dtype(t): bits for t, bits in ((np.float16, 11), (jnp.bfloat16, 8), (np.float32, 24))}
"""The dtypes that grids are looked for in, and their significant bits."""

OFF = -(1 << 15)  # the code of what is on no grid
_TOP = (1 << 15) - 1  # the largest |code|
_MULTIPLES = 8  # the smallest |code| that occurs is at most this, where products are rounded
_LINES = 32  # columns that are tried before all are
_ROWS = 256  # rows of a column that are tried before all are
_GROUPS = (256, 128, 64, 32, 16)  # rows that may share a step, the most first: fewer steps are smaller


class StepGrid(NamedTuple):
    """A step for every block of rows and every column of a matrix, and which codes occur on it.

    Attributes:
      step: f32[blocks, columns]; either may be 1 for all.
      low: the code of the first symbol.
      levels: the number of codes, of which every one is a symbol.
    """

    step: np.ndarray
    low: int
    levels: int


def steps(x: np.ndarray, repeated: np.ndarray) -> list[np.ndarray]:
    """Candidates f32[blocks, columns] for a matrix, from the sizes f64[n] that it repeats and from its columns."""
    bits = DTYPES[x.dtype]
    one = _fit(repeated[:, None], bits)[None]
    found = [one.astype(np.float32)] if one.all() else []
    if found and repeated.max() <= repeated.size * one[0, 0]:  # most codes occur: no finer choice does better
        return found
    return [*found, *([] if min(x.shape) < 2 else _columns(x, bits) or _grouped(x, bits))]


def codes(x: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The code k i16[rows, columns] of every value, `OFF` where no k * s has its bits."""
    out = np.empty(x.shape, np.int16)
    for rows, s in _stepped(x.shape, step):
        near = x[rows].astype(np.float32) / s
        near = np.rint(np.where(np.abs(near) <= _TOP, near, 0)) + np.float32(0)  # no -0: no code has its bits
        kept = (near * s).astype(x.dtype).view(_bits(x.dtype)) == x[rows].view(_bits(x.dtype))
        out[rows] = np.where(kept, near, OFF)
    return out


def values(code: np.ndarray, low: int, step: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
    """(code + low) * s of every code [rows, columns], computed in f32 and rounded once."""
    out = np.empty(code.shape, dtype)
    for rows, s in _stepped(code.shape, step):
        out[rows] = ((code[rows].astype(np.int32) + low).astype(np.float32) * s).astype(dtype)
    return out


def _bits(dtype: npt.DTypeLike) -> np.dtype:
    """The unsigned integers of a dtype's width, to compare bit patterns by."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def _stepped(shape: tuple[int, ...], step: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Strips of rows, about a chunk each, and their steps, which broadcast to them."""
    height = shape[0] // step.shape[0] if step.shape[0] > 1 else shape[0]
    for rows in symbol_counts.strips(*shape):
        yield rows, step[np.arange(rows.start, rows.stop) // height] if step.shape[0] > 1 else step


def _columns(x: np.ndarray, bits: int) -> list[np.ndarray]:
    """One step a column."""
    return [_usable(_fit_lines(x, bits))[None]] if _promising(x, bits) else []


def _grouped(x: np.ndarray, bits: int) -> list[np.ndarray]:
    """One step a group of rows and a column."""
    for height in _GROUPS:
        if len(x) % height == 0 and len(x) > height:
            lines = x.reshape(-1, height, x.shape[1]).swapaxes(0, 1).reshape(height, -1)
            if _promising(lines, bits):
                return [_usable(_fit_lines(lines, bits)).reshape(-1, x.shape[1])]
    return []


def _fit_lines(x: np.ndarray, bits: int) -> np.ndarray:
    """The step f64[columns] of every column: from some of its rows, and from all where that failed."""
    few = min(_ROWS, max(8, len(x) // 4))
    step = _fit(_sizes(x[_spread(len(x), few)]), bits)
    off = np.flatnonzero(_strays(x, codes(x, _usable(step)[None])))
    step[off] = _fit(_sizes(x[:, off]), bits)
    return step


def _spread(size: int, most: int) -> np.ndarray:
    """At most so many places, evenly."""
    return np.linspace(0, size - 1, min(most, size)).astype(int)


def _promising(x: np.ndarray, bits: int) -> bool:
    """Of a few columns, three quarters of those that hold two sizes or more are on a grid that is worth a step."""
    x = np.ascontiguousarray(x[:, _spread(x.shape[1], _LINES)])
    code = codes(x, _usable(_fit(_sizes(x), bits))[None])
    informative = np.array([np.unique(np.abs(c[c != 0])).size > 1 for c in x.T])
    good = ~_strays(x, code) & (np.abs(code).max(0, initial=0) < 4 * len(x))
    return bool(informative.any()) and bool(good[informative].mean() >= 0.75)


def _strays(x: np.ndarray, code: np.ndarray) -> np.ndarray:
    """The columns with a nonzero finite value that no code has: -0 and NaN are never codes."""
    return ((code == OFF) & (x != 0) & np.isfinite(x)).any(0)


def _usable(step: np.ndarray) -> np.ndarray:
    """Steps as f32, 1 where none was found."""
    return np.where(step > 0, step, 1).astype(np.float32)


def _sizes(x: np.ndarray) -> np.ndarray:
    """|x| in f64, 0 for what is not finite."""
    size = np.abs(x.astype(np.float32)).astype(np.float64)
    return np.where(np.isfinite(size), size, 0)


def _fit(sizes: np.ndarray, bits: int) -> np.ndarray:
    """The largest step f64[columns] of which all sizes [rows, columns] are multiples, 0 where there is none."""
    top = sizes.max(0, initial=0)
    exact = _common_divisor(sizes)
    exact = np.where((exact > 0) & (top <= _TOP * exact), exact, 0)
    rest = (top > 0) & ((exact == 0) | (bits < 24))
    if rest.any():
        exact[rest] = np.maximum(exact[rest], _rounded_divisor(sizes[:, rest], bits))
    return exact


def _common_divisor(sizes: np.ndarray) -> np.ndarray:
    """The greatest common divisor of f32 values: that of their odd parts, at their lowest power of two."""
    # No i64 has both 2^-100 and 2^100 in units of one power of two. The divisor of odd parts needs no such unit:
    # gcd(a 2^i, b 2^j) = gcd(a, b) 2^min(i, j) for odd a and b.
    fraction, exponent = np.frexp(sizes)
    whole = np.ldexp(fraction, 24).astype(np.int64)
    power = whole & -whole
    odd = np.gcd.reduce(whole // np.maximum(power, 1), axis=0)
    lowest = np.where(whole > 0, exponent - 24 + np.frexp(power.astype(np.float64))[1] - 1, 1 << 12).min(
        0, initial=1 << 12
    )
    return np.where(odd > 0, np.ldexp(odd.astype(np.float64), np.minimum(lowest, 1 << 10)), 0)


def _rounded_divisor(sizes: np.ndarray, bits: int) -> np.ndarray:
    """A step inside every interval [(v - ulp/2) / k, (v + ulp/2) / k]; k from the smaller sizes upwards, doubling."""
    alive = sizes > 0
    half = np.ldexp(0.5, np.frexp(sizes)[1] - bits)
    smallest = np.where(alive, sizes, np.inf).min(0)
    top = sizes.max(0)
    best = np.zeros(sizes.shape[1])
    for multiple in range(_MULTIPLES, 0, -1):
        step, ok = smallest / multiple, smallest * _TOP >= top * multiple
        # Invariant: `step` fits every size up to `ratio` times the smallest. Its error shrinks as these grow, so that
        # the next ones, up to twice as large, still round to the right k and narrow it further.
        for ratio in 2.0 ** np.arange(1, 17):
            near = alive & (sizes <= ratio * smallest)
            k = np.where(near, np.maximum(np.rint(sizes / step), 1), np.nan)
            low = np.nanmax((sizes - half) / k, 0, initial=0)
            high = np.nanmin((sizes + half) / k, 0, initial=np.inf)
            ok &= low <= high
            step = (low + high) / 2
            if not ok.any() or (ratio * smallest >= top).all():
                break
        best = np.where(ok, step, best)  # the largest step wins: multiples come down to 1
    return best
