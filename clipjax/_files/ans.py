"""Symbols with stored frequencies as an ANS code, and the bytes around it.

Frequencies are stored as small floats and handed to the coder as whole numbers in f64, so that every machine derives
the same model from them. `constriction` codes; it is an extra, and imported when a code is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

CHUNK = 1 << 18  # symbols that are widened to i32 at a time; a multiple of 8
FLUSH = 8  # bytes by which a code may exceed its information
_MANTISSA = {1: 4, 2: 11}  # bits of a stored frequency's mantissa by its bytes


class Plan(NamedTuple):
    """A way to write something: its size in bytes, rounded up, and a function that appends it."""

    size: float
    write: Callable[[bytearray], None]


class Cursor:
    """Reads bytes from the front, and refuses to read past the end."""

    def __init__(self, data: Any) -> None:
        """Start at the first byte."""
        self._data, self._at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if not 0 <= count <= self.left:
            raise ValueError(f"A payload ends {count - self.left} bytes too early.")
        self._at += count
        return self._data[self._at - count : self._at]

    def array(self, count: int, dtype: Any) -> np.ndarray:
        """The next `count` little-endian numbers."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), np.dtype(dtype).newbyteorder("<"))

    def whole(self, most: int) -> int:
        """The next LEB128 number, at most `most`."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if value > most or shift > 70:
                raise ValueError(f"A payload holds a number above {most}.")
            if byte < 128:
                return value

    @property
    def left(self) -> int:
        """How many bytes are still there."""
        return len(self._data) - self._at


def whole(value: int) -> bytes:
    """A whole number in LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def histogram(symbols: np.ndarray, size: int) -> np.ndarray:
    """How often each symbol occurs: i64[size]."""
    counts = np.zeros(size, np.int64)
    for part in chunks(symbols):
        counts += np.bincount(part, minlength=size)
    return counts


def information(counts: np.ndarray, weights: Any = None) -> float:
    """Bytes of the ideal code of symbols with these counts, under these frequencies (default: their own)."""
    weights = counts if weights is None else weights
    alive = counts > 0
    share = weights[alive] / max(float(np.sum(weights, dtype=np.float64)), 1.0)
    return float(-np.sum(counts[alive] * np.log2(share)) / 8) if alive.any() else 0.0


def chunks(symbols: np.ndarray) -> Iterator[np.ndarray]:
    """The entries in memory order, a chunk at a time: views of a contiguous array."""
    flat = symbols.reshape(-1)
    return (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))


def table(counts: np.ndarray) -> tuple[bytes, np.ndarray, float]:
    """The stored frequencies, as read back, and the bytes of table and code under the better of the two widths."""
    options = []
    for width, mantissa in _MANTISSA.items():
        stored = _to_small(counts, width, mantissa)
        read = _from_small(stored, mantissa)
        data = bytes([width]) + stored.astype(f"<u{width}").tobytes()
        options.append((data, read, len(data) + information(counts, read)))
    return min(options, key=lambda option: option[2])


def _to_small(counts: np.ndarray, width: int, mantissa: int) -> np.ndarray:
    top = min((1 << (8 * width - mantissa)) - 1, 23) + mantissa  # the exponent of the largest; sums stay exact
    scaled = counts * 2.0 ** (top - np.floor(np.log2(max(int(counts.max()), 1))))
    fraction, exponent = np.frexp(np.maximum(scaled, 2.0**mantissa))
    steps = np.rint(np.ldexp(fraction, mantissa + 1)).astype(np.int64)  # 2^mantissa .. 2^(mantissa + 1)
    stored = ((exponent - 1 - mantissa) << mantissa) + steps - (1 << mantissa)
    return np.where(counts > 0, np.clip(stored, 1, (1 << 8 * width) - 1), 0)


def _from_small(stored: np.ndarray, mantissa: int) -> np.ndarray:
    """Whole numbers as f64: exact, so that the model is the same everywhere."""
    stored = stored.astype(np.int64)
    value = ((1 << mantissa) + (stored & ((1 << mantissa) - 1))) << (stored >> mantissa)
    return np.where(stored == 0, 0, value).astype(np.float64)


def read_table(cursor: Cursor, size: int) -> np.ndarray:
    """Stored frequencies f64[size]."""
    width = cursor.take(1)[0]
    if width not in _MANTISSA:
        raise ValueError(f"A payload's frequencies must take 1 or 2 bytes, got {width}.")
    frequencies = _from_small(cursor.array(size, f"u{width}"), _MANTISSA[width])
    if not frequencies.any():
        raise ValueError("A payload's frequencies are all zero.")
    return frequencies


Part = tuple[Callable[[], np.ndarray], np.ndarray]  # symbols, made when they are coded, and their frequencies


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError("The small file needs `constriction`: pip install 'clipjax[files]'.") from error
    return constriction.stream


def _model(stream: Any, frequencies: np.ndarray) -> Any:
    return stream.model.Categorical(frequencies, perfect=False)


def push(parts: list[Part], out: bytearray) -> None:
    """Append the parts, in the order in which they will be read, as one code with its number of words in front."""
    stream = _constriction()
    coder = stream.stack.AnsCoder()
    for symbols, frequencies in reversed(parts):
        model = _model(stream, frequencies)
        for chunk in reversed(list(chunks(symbols()))):
            coder.encode_reverse(chunk.astype(np.int32), model)
    words = coder.get_compressed()
    out += whole(words.size)
    out += words.astype("<u4", copy=False).data


class Pops:
    """Reads parts back from a code."""

    def __init__(self, cursor: Cursor) -> None:
        """Read the words of the code."""
        self._stream = _constriction()
        words = cursor.array(cursor.whole(cursor.left // 4), np.uint32).astype(np.uint32)
        if words.size and not words[-1]:
            raise ValueError("A payload's code ends in an empty word.")
        self._coder = self._stream.stack.AnsCoder(words)

    def into(self, out: np.ndarray, frequencies: np.ndarray) -> None:
        """Fill an array in memory order."""
        model = _model(self._stream, frequencies)
        for part in chunks(out):
            part[:] = self._coder.decode(model, part.size)

    def end(self) -> None:
        """Nothing may be left."""
        if not self._coder.is_empty():
            raise ValueError("A payload's code is longer than its symbols.")
