"""A small tree as one entry of the container, whose names and shapes would else take more bytes than its leaves.

The entry is: a CRC-32 of all that follows; one of the arrays, in two bytes, for their entropy decoder is not ours; the
head, deflated, behind its length; the bytes of the leaves one after the other. The head has, each for all leaves in
order: names, of which what is as in the name before is left out; forms and dtypes; shapes; lengths, but for the last
one, which is what is left; and the layout of the tree.
"""

from __future__ import annotations

import functools
import itertools
import operator
import zlib
from typing import NamedTuple

from clipjax._files import byte_stream, container

NAME = "clipjax"
_VERSION = 4  # where the checksum starts from
_MOST_LEAVES, _LONGEST_NAME, _LARGEST_HEAD = 1 << 12, 1 << 10, 1 << 20
_END = b"\xff"  # of a name: UTF-8 has no such byte
# What heads are likely to have, the likeliest last: names of Flax's layers, in the form in which they stand there.
_WORDS = (
    b"attention/key/query/value/out/embedding\xffLayerNorm_0/bias\xff\x0cscale\xffparams/layers/linear1/bias\xff\x08kernel"
    b"\xff\x062/bias\xff\x08kernel\xfffc1/bias\xff\x04kernel\xff\x022/bias\xff\x04kernel\xffconv1/bias\xff\x06kernel\xff"
    b"\x042/bias\xff\x06kernel\xffConv_0/bias\xff\x07kernel\xff\x051/bias\xff\x07kernel\xffDense_0/bias\xff\x08kernel\xff\x06"
    b"1/bias\xff\x08kernel\xff\x062/bias\xff\x08kernel\xff\x063/bias\xff\x08kernel\xff"
)


class Row(NamedTuple):
    """What the head says of one leaf.

    Attributes:
      name: its path.
      form: how its bytes stand for it, a small number.
      dtype: its dtype, another one.
      shape: its shape.
      size: how many bytes it has.
    """

    name: str
    form: int
    dtype: int
    shape: tuple[int, ...]
    size: int


class Together:
    """The arrays of all leaves, whose checksums one number stands for: it is compared when all were decoded."""

    def __init__(self, names: list[str], expected: int) -> None:
        """Waits for leaves of these names."""
        self._left, self._expected, self._sum = set(names), expected, 0

    def add(self, name: str, seen: list[int]) -> None:
        """Note the checksums of a leaf's arrays, when it is decoded for the first time."""
        if name in self._left:
            self._left.remove(name)
            self._sum ^= total(seen)
            if not self._left and self._sum != self._expected:
                raise ValueError("The decoded arrays have another checksum than the one that was stored.")


def total(seen: list[int]) -> int:
    """The checksums of arrays as one, in whatever order they come."""
    return functools.reduce(operator.xor, seen, 0) & 0xFFFF


def pack(rows: list[Row], layout: str | None, check: int, data: bytes) -> bytes | None:
    """The bytes of the entry; None for a tree with more leaves, longer names or a larger head than are read."""
    if len(rows) > _MOST_LEAVES:
        return None
    out, before = bytearray(byte_stream.whole(len(rows))), b""
    for row in rows:
        name = row.name.encode()
        if len(name) > _LONGEST_NAME:
            return None
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, before, strict=False))
        same = min(sum(1 for _ in pairs), 255)
        out += bytes([same]) + name[same:] + _END
        before = name
    out += bytes(row.form << 5 | row.dtype for row in rows)
    for row in rows:
        out += b"".join(map(byte_stream.whole, (len(row.shape), *row.shape)))
    out += b"".join(byte_stream.whole(row.size) for row in rows[:-1])
    out += (layout or "").encode()
    if len(out) > _LARGEST_HEAD:
        return None
    head = min((_deflated(bytes(out), strategy) for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED)), key=len)
    body = check.to_bytes(2, "little") + byte_stream.whole(len(head)) + head + data
    return zlib.crc32(body, _VERSION).to_bytes(4, "little") + body


def _deflated(head: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy, _WORDS)
    return coder.compress(head) + coder.flush()


def unpack(entry: bytes) -> tuple[list[Row], str | None, int, int]:
    """The leaves, the layout, the checksum of the arrays, and where in the entry the first leaf begins.

    Raises:
      ValueError: for what `pack` does not write.
    """
    cursor = byte_stream.Cursor(entry)
    checksum = int.from_bytes(cursor.take(4), "little")
    if zlib.crc32(entry[4:], _VERSION) != checksum:
        raise ValueError("The file has another checksum than the one that was stored.")
    check = int.from_bytes(cursor.take(2), "little")
    head = _inflated(cursor.take(cursor.whole(cursor.left)))
    rows, layout = _rows(byte_stream.Cursor(head), cursor.left)
    return rows, layout, check, len(entry) - cursor.left


def _inflated(head: memoryview) -> bytes:
    coder = zlib.decompressobj(-15, zdict=_WORDS)
    try:
        found = coder.decompress(head, _LARGEST_HEAD)
    except zlib.error as error:
        raise ValueError(f"The head of the file is damaged: {error}.") from None
    if not coder.eof or coder.unused_data:
        raise ValueError("The head of the file is damaged: it has another length than it says.")
    return found


def _rows(head: byte_stream.Cursor, size: int) -> tuple[list[Row], str | None]:
    """What a head says of leaves that take so many bytes together."""
    count = head.whole(_MOST_LEAVES)
    names, before = [], b""
    for _ in range(count):
        before = before[: head.take(1)[0]] + head.until(_END, _LONGEST_NAME)
        try:
            names.append(before.decode())
        except UnicodeDecodeError:
            raise ValueError(f"The head of the file has a name that is no text: {before[:40]!r}.") from None
    if len(set(names)) != len(names):
        raise ValueError("A name occurs twice.")
    kinds = bytes(head.take(count))
    shapes = [container.checked_shape([head.whole(1 << 48) for _ in range(head.whole(64))]) for _ in range(count)]
    sizes = [head.whole(size) for _ in range(count - 1)]
    left = size - sum(sizes)
    if left < 0 or (left and not count):
        raise ValueError("The head of the file gives leaves more or fewer bytes than there are.")
    sizes += [left] * bool(count)
    try:
        layout = bytes(head.take(head.left)).decode()
    except UnicodeDecodeError:
        raise ValueError("The layout of the tree is damaged: it is no text.") from None
    zipped = zip(names, kinds, shapes, sizes, strict=True)
    return [Row(name, kind >> 5, kind & 31, shape, n) for name, kind, shape, n in zipped], layout or None
