"""Numbers as bytes, one after the other: what every payload is written with, and read from without trust."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

CHECKSUM = 4  # bytes

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
    """Reads bytes from the front, and refuses to read past the end.

    Attributes:
      seen: the checksums of decoded arrays, where there is one for all of them; None where each has its own.
    """

    def __init__(self, data: Buffer, seen: list[int] | None = None) -> None:
        """Start at the first byte."""
        self._data, self._at, self.seen = memoryview(data), 0, seen

    def checksum(self) -> int | None:
        """The next checksum of an array; None where it has none of its own."""
        return int.from_bytes(self.take(CHECKSUM), "little") if self.seen is None else None

    def compare(self, checksum: int | None, array: np.ndarray) -> None:
        """Refuse a decoded array whose checksum is another one; note it where there is one for all arrays."""
        found = zlib.crc32(array.data)
        if checksum is None and self.seen is not None:
            self.seen.append(found)
        elif found != checksum:
            raise ValueError("The decoded array has another checksum than the one that was stored.")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if not 0 <= count <= self.left:
            raise ValueError(f"A payload ends {count - self.left} bytes too early.")
        self._at += count
        return self._data[self._at - count : self._at]

    def array(self, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """The next `count` little-endian numbers."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), np.dtype(dtype).newbyteorder("<"))

    def until(self, end: bytes, most: int) -> bytes:
        """The bytes up to a byte, which is read too; at most so many."""
        found, last, _ = self._data[self._at : self._at + most + 1].tobytes().partition(end)
        if not last:
            raise ValueError(f"A payload has a name of more than {most} bytes, or ends in the middle of it.")
        self._at += len(found) + 1
        return found

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


def checksum(array: np.ndarray, checked: bool) -> bytes:
    """The checksum of an array, if it shall have one of its own."""
    return zlib.crc32(array.data).to_bytes(CHECKSUM, "little") if checked else b""


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
