"""Numbers as bytes, one after the other: what every payload is written with, and read from without trust."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes that are read in place."""


class Encoding(NamedTuple):
    """A way to write something that is not written yet, so that several can be compared by their size.

    Attributes:
      size: bytes, rounded up; an estimate that an entropy coder undercuts by a few.
      write: appends the bytes.
    """

    size: float
    write: Callable[[bytearray], None]


class Cursor:
    """Reads bytes from the front, and refuses to read past the end."""

    def __init__(self, data: Buffer) -> None:
        """Start at the first byte."""
        self._data, self._at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if not 0 <= count <= self.left:
            raise ValueError(f"A payload ends {count - self.left} bytes too early.")
        self._at += count
        return self._data[self._at - count : self._at]

    def array(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """The next `count` little-endian numbers."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), np.dtype(dtype).newbyteorder("<"))

    def whole(self, most: int) -> int:
        """The next LEB128 number, at most `most`."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            # The shift is bounded too: bytes of 128 add nothing to the value, and would be read on and on.
            if value > most or shift > 70:
                raise ValueError(f"A payload holds a number above {most}.")
            if byte < 128:
                return value

    def signed(self, most: int) -> int:
        """The next number that `signed` wrote, from -most to most."""
        zigzag = self.whole(2 * most)
        return zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2

    @property
    def left(self) -> int:
        """The number of bytes that are left."""
        return len(self._data) - self._at


def whole(value: int) -> bytes:
    """A whole number from 0 on in LEB128: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """A whole number of either sign, zigzag: 0, -1, 1, -2, 2 stand as 0, 1, 2, 3, 4."""
    return whole(2 * value if value >= 0 else -2 * value - 1)
