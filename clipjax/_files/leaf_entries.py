"""The entry of one leaf in a container, and the note that says what the entry does not: checksum, dtype, shape.

A note reads `1a2b3c4d` where the array stands as it is, `1a2b3c4d:float32[3,4]` where a payload stands for it, and
`1a2b3c4d=int4[5]` where its bytes do, under a dtype that safetensors has no name for.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from clipjax._arrays import arguments
from clipjax._files import alphabets, container, leaf_codec

VERSION = "1"
_SMALL = 1 << 26  # a file may always decode to this many bytes,
_GROWTH = 1000  # or to this many times its own size


def add(writer: container.Writer, name: str, x: np.ndarray) -> str:
    """Add a leaf, and return its note: the checksum of its bytes, and what they do not say of dtype and shape."""
    data = leaf_codec.pack(x).data
    raw = alphabets.patterns(x).view(np.uint8) if data is None else np.frombuffer(data, np.uint8)
    checksum = f"{zlib.crc32(raw.data):08x}"
    if data is None and x.dtype in container.NAMES:
        writer.add(name, container.NAMES[x.dtype], x.shape, raw)
        return checksum
    writer.add(name, "U8", raw.shape, raw)
    return f"{checksum}{'=' if data is None else ':'}{x.dtype.name}[{','.join(map(str, x.shape))}]"


class Leaf(NamedTuple):
    """One leaf of a file that is not read yet."""

    entry: container.Entry
    checksum: int
    coded: bool
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The bytes of the array."""
        return container.count(self.shape) * self.dtype.itemsize

    def data(self, reader: container.Reader) -> bytes:
        """The entry's bytes, checked before anything looks at them."""
        data = reader.read(self.entry)
        if zlib.crc32(data) != self.checksum:
            raise ValueError(f"Leaf {self.entry.name!r} has another checksum than the one that was stored.")
        return data

    def read(self, reader: container.Reader, dequantize: bool = True) -> np.ndarray | leaf_codec.Grid:
        """The array, or the codes and steps behind it."""
        data = self.data(reader)
        return leaf_codec.unpack(data, self.dtype, self.shape, dequantize) if self.coded else self._raw(data)

    def how(self, reader: container.Reader) -> str:
        """What stands for the array, in words."""
        return leaf_codec.describe(self.data(reader), self.dtype, self.shape) if self.coded else "raw"

    def _raw(self, data: bytes) -> np.ndarray:
        bits = np.frombuffer(data, np.uint8)
        if self.dtype == np.bool_ and bits.max(initial=0) > 1:
            raise ValueError(f"Leaf {self.entry.name!r} must hold booleans.")
        return bits.view(self.dtype).reshape(self.shape)


def made(reader: container.Reader) -> bool:
    """True for a container that `save` made, not any other safetensors file."""
    return "clipjax" in reader.metadata


def leaves(reader: container.Reader) -> list[Leaf]:
    """The leaves of a file, after every check that needs no more than the header."""
    version = reader.metadata.get("clipjax")
    remedy = "`python -m clipjax compress IN OUT` makes one of a plain safetensors file."
    arguments.require(version == VERSION, "path", f"be a clipjax file of version {VERSION}", version, remedy)
    if not reader.intact():
        raise ValueError("The header has another checksum than the one that was stored.")
    notes = reader.metadata.get("leaves", "").split()
    if len(notes) != len(reader.entries):
        raise ValueError(f"The header has notes on {len(notes)} of {len(reader.entries)} leaves.")
    return [_leaf(entry, note) for entry, note in zip(reader.entries, notes, strict=True)]


def check_size(found: list[Leaf], size: int, max_bytes: int | None) -> None:
    """Refuse leaves that take more than the limit; by default more than a file of such a size may."""
    most = max(_SMALL, _GROWTH * size) if max_bytes is None else max_bytes
    needed = sum(leaf.size for leaf in found)
    remedy = f"The leaves of this file take {needed} bytes; raise the limit if you trust it."
    arguments.require(needed <= most, "max_bytes", "allow for all leaves", most, remedy)


def _leaf(entry: container.Entry, note: str) -> Leaf:
    checksum, separator, described = note[:8], note[8:9], note[9:]
    try:
        number = int(checksum, 16)
        if not separator:
            return Leaf(entry, number, False, entry.kind, entry.shape)
        name, _, rest = described.partition("[")
        axes = [int(n) for n in rest.removesuffix("]").split(",") if n]
        leaf = Leaf(entry, number, separator == ":", leaf_codec.DTYPES[name], container.checked_shape(axes))
    except (KeyError, ValueError):
        raise ValueError(f"The header's note on {entry.name!r} is damaged: {note[:80]!r}.") from None
    if separator not in ":=" or entry.dtype != "U8" or (separator == "=" and leaf.size != entry.end - entry.begin):
        raise ValueError(f"The header's note on {entry.name!r} does not fit its entry: {note[:80]!r}.")
    return leaf
