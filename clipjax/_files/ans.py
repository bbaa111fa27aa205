"""Symbols with stored frequencies as one ANS code (asymmetric numeral systems, an entropy coder).

Frequencies are stored as small floats and handed to the coder as whole numbers in f64, so that every machine derives
the same model from them. `constriction` codes; it is an extra, and imported when a code is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from clipjax._files import byte_stream, symbol_counts

FLUSH = 8  # bytes by which a code may exceed its information
_MANTISSA = {1: 4, 2: 11}  # bits of a stored frequency's mantissa by its bytes

Part: TypeAlias = tuple[Callable[[], np.ndarray], np.ndarray]
"""Symbols, made when they are coded, and their frequencies."""


def push(parts: list[Part], out: bytearray) -> None:
    """Append the parts, in the order in which they will be read, as one code with its number of words in front."""
    stream = _constriction()
    coder = stream.stack.AnsCoder()
    # An ANS coder is a stack: the last symbol pushed is the first one popped. Parts, chunks and the symbols of a chunk
    # all go in backwards, so that they come out forwards.
    for symbols, frequencies in reversed(parts):
        model = _model(stream, frequencies)
        for chunk in reversed(list(symbol_counts.chunks(symbols()))):
            coder.encode_reverse(chunk.astype(np.int32), model)
    words = coder.get_compressed()
    out += byte_stream.whole(words.size)
    out += words.astype("<u4", copy=False).data


class Pops:
    """Reads parts back from a code."""

    def __init__(self, cursor: byte_stream.Cursor) -> None:
        """Read the words of the code."""
        self._stream = _constriction()
        words = cursor.array(cursor.whole(cursor.left // 4), np.uint32).astype(np.uint32)
        if words.size and not words[-1]:
            raise ValueError("A payload's code ends in an empty word.")
        self._coder = self._stream.stack.AnsCoder(words)

    def into(self, out: np.ndarray, frequencies: np.ndarray) -> None:
        """Fill an array in memory order."""
        model = _model(self._stream, frequencies)
        for part in symbol_counts.chunks(out):
            part[:] = self._coder.decode(model, part.size)

    def end(self) -> None:
        """Nothing may be left."""
        if not self._coder.is_empty():
            raise ValueError("A payload's code is longer than its symbols.")


def table(counts: np.ndarray) -> tuple[bytes, np.ndarray, float]:
    """The stored frequencies, as read back, and the bytes of table and code under the better of the two widths."""
    options = []
    for width, mantissa in _MANTISSA.items():
        stored = _to_small(counts, width, mantissa)
        read = _from_small(stored, mantissa)
        data = bytes([width]) + stored.astype(f"<u{width}").tobytes()
        options.append((data, read, len(data) + symbol_counts.information(counts, read)))
    return min(options, key=lambda option: option[2])


def read_table(cursor: byte_stream.Cursor, size: int) -> np.ndarray:
    """Stored frequencies f64[size]."""
    width = cursor.take(1)[0]
    if width not in _MANTISSA:
        raise ValueError(f"A payload's frequencies must take 1 or 2 bytes, got {width}.")
    frequencies = _from_small(cursor.array(size, f"u{width}"), _MANTISSA[width])
    if not frequencies.any():
        raise ValueError("A payload's frequencies are all zero.")
    return frequencies


def _to_small(counts: np.ndarray, width: int, mantissa: int) -> np.ndarray:
    """Counts as floats of so many bytes: exponent above mantissa, scaled so that the largest has the top exponent."""
    # The exponent of the largest is bounded, so that sums of 2^16 frequencies stay exact in f64.
    top = min((1 << (8 * width - mantissa)) - 1, 23) + mantissa
    scaled = counts * 2.0 ** (top - np.floor(np.log2(max(int(counts.max()), 1))))
    fraction, exponent = np.frexp(np.maximum(scaled, 2.0**mantissa))
    steps = np.rint(np.ldexp(fraction, mantissa + 1)).astype(np.int64)  # 2^mantissa .. 2^(mantissa + 1)
    stored = ((exponent - 1 - mantissa) << mantissa) + steps - (1 << mantissa)
    # A symbol that occurs must not be stored as 0, which would leave it without a code.
    return np.where(counts > 0, np.clip(stored, 1, (1 << 8 * width) - 1), 0)


def _from_small(stored: np.ndarray, mantissa: int) -> np.ndarray:
    """Whole numbers as f64: exact, so that the model is the same everywhere."""
    stored = stored.astype(np.int64)
    value = ((1 << mantissa) + (stored & ((1 << mantissa) - 1))) << (stored >> mantissa)
    return np.where(stored == 0, 0, value).astype(np.float64)


def _constriction() -> ModuleType:
    try:
        import constriction
    except ImportError as error:
        raise ImportError("The small file needs `constriction`: pip install 'clipjax[files]'.") from error
    stream: ModuleType = constriction.stream
    return stream


def _model(stream: ModuleType, frequencies: np.ndarray) -> Any:
    return stream.model.Categorical(frequencies, perfect=False)
