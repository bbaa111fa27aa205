"""The entry of one leaf in a container, and the note that says what the entry does not: checksum, dtype, shape.

A note reads `1a2b3c4d` where the array stands as it is, `1a2b3c4d:float32[3,4]` where a payload stands for it,
`1a2b3c4d=int4[5]` where its bytes do, under a dtype that safetensors has no name for, and `1a2b3c4d*3,4` where a
payload stands for a `Quantized` with codes of that shape, `1a2b3c4d#3,4` for one that has scales of a format.
"""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import numpy as np

from clipjax._arrays import arguments
from clipjax._files import alphabets, byte_stream, container, format_leaves, leaf_codec, quantized_leaves
from clipjax._maths import integers
from clipjax._maths.integers import Quantized

VERSIONS = ("1", "2", "3")
"""Those that can be read. The second is written for trees with a `Quantized`, the third for those with one that has
scales of a format, so that older readers refuse them."""

_RAW, _CODED, _BYTES, _QUANTIZED, _FORMAT = "", ":", "=", "*", "#"
_PAYLOADS = {_QUANTIZED: quantized_leaves, _FORMAT: format_leaves}
_SMALL = 1 << 26  # a file may always decode to this many bytes,
_GROWTH = 1000  # or to this many times its own size


def add(writer: container.Writer, name: str, x: np.ndarray | Quantized) -> str:
    """Add a leaf, and return its note: the checksum of its bytes, and what they do not say of dtype and shape."""
    if isinstance(x, Quantized):
        form = _QUANTIZED if x.step is not None and not x.scales else _FORMAT
        return _add_bytes(writer, name, _PAYLOADS[form].pack(x, name)) + form + _axes(np.shape(x.codes))
    data = leaf_codec.pack(x).data
    described = f"{x.dtype.name}[{_axes(x.shape)}]"
    if data is not None:
        return _add_bytes(writer, name, data) + _CODED + described
    raw = alphabets.patterns(x).view(np.uint8).data
    if x.dtype not in container.NAMES:
        return _add_bytes(writer, name, raw) + _BYTES + described
    writer.add(name, container.NAMES[x.dtype], x.shape, raw)
    return _checksum(raw)


def _add_bytes(writer: container.Writer, name: str, data: byte_stream.Buffer) -> str:
    """Add bytes that stand for a leaf; their checksum."""
    writer.add(name, "U8", (len(data),), data)
    return _checksum(data)


def _checksum(data: byte_stream.Buffer) -> str:
    return f"{zlib.crc32(data):08x}"


class StoredLeaf(NamedTuple):
    """One leaf of a file that is not read yet.

    Attributes:
      entry: its bytes in the container.
      checksum: the CRC-32 of these bytes.
      form: how the bytes stand for the leaf: the sign in its note.
      dtype: that of the array; f32 for the values of a `Quantized`.
      shape: that of the array.
    """

    entry: container.Entry
    checksum: int
    form: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def quantized(self) -> bool:
        """True where the leaf was saved as a `Quantized`."""
        return self.form in _PAYLOADS

    def data(self, reader: container.Reader) -> bytes:
        """The entry's bytes, checked before anything looks at them."""
        data = reader.read(self.entry)
        if zlib.crc32(data) != self.checksum:
            raise ValueError(f"Leaf {self.entry.name!r} has another checksum than the one that was stored.")
        return data

    def read(self, reader: container.Reader, dtype: np.dtype | None = None) -> np.ndarray:
        """The array; `dtype` is the one for the values of a `Quantized`, f32 by default."""
        if self.quantized:
            q = _PAYLOADS[self.form].unpack(self.data(reader), self.shape)
            return np.asarray(integers.dequantize(q, dtype=dtype or self.dtype))
        data = self.data(reader)
        return leaf_codec.unpack(data, self.dtype, self.shape) if self.form == _CODED else self._raw(data)

    def read_codes(self, reader: container.Reader) -> np.ndarray | Quantized:
        """The `Quantized` that was saved, or one for the codes that were found behind the values, or the array."""
        if self.quantized:
            return _PAYLOADS[self.form].unpack(self.data(reader), self.shape)
        if self.form != _CODED:
            return self._raw(self.data(reader))
        found = leaf_codec.unpack_codes(self.data(reader), self.dtype, self.shape)
        return quantized_leaves.from_values(found) if isinstance(found, leaf_codec.CodesAndSteps) else found

    def how(self, reader: container.Reader) -> str:
        """The form in which the array is stored, in words."""
        if self.quantized:
            return _PAYLOADS[self.form].describe(self.data(reader), self.shape)
        return leaf_codec.describe(self.data(reader), self.dtype, self.shape) if self.form == _CODED else "raw"

    def _raw(self, data: bytes) -> np.ndarray:
        bits = np.frombuffer(data, np.uint8)
        if self.dtype == np.bool_ and bits.max(initial=0) > 1:
            raise ValueError(f"Leaf {self.entry.name!r} must hold booleans.")
        return bits.view(self.dtype).reshape(self.shape)


def version(notes: list[str]) -> str:
    """The first version that can read leaves with these notes."""
    forms = {note[8:9] for note in notes}
    return VERSIONS[2 if _FORMAT in forms else 1 if _QUANTIZED in forms else 0]


def made(reader: container.Reader) -> bool:
    """True for a container that `save` made, not any other safetensors file."""
    return "clipjax" in reader.metadata


def leaves(reader: container.Reader) -> list[StoredLeaf]:
    """The leaves of a file, after every check that needs no more than the header."""
    found = reader.metadata.get("clipjax", "")
    remedy = "`python -m clipjax compress IN OUT` makes one of a plain safetensors file."
    arguments.require(found in VERSIONS, "path", f"be a clipjax file of version {' or '.join(VERSIONS)}", found, remedy)
    # A note is only read once the header's own checksum is right: damage to a shape would else decode to other arrays.
    if not reader.intact():
        raise ValueError("The header has another checksum than the one that was stored.")
    notes = reader.metadata.get("leaves", "").split()
    if len(notes) != len(reader.entries):
        raise ValueError(f"The header has notes on {len(notes)} of {len(reader.entries)} leaves.")
    if version(notes) > found:
        raise ValueError(f"The header is damaged: version {found} has no such leaves.")
    return [_leaf(entry, note) for entry, note in zip(reader.entries, notes, strict=True)]


def check_size(found: list[StoredLeaf], size: int, max_bytes: int | None) -> None:
    """Refuse leaves that take more than the limit; by default more than a file of such a size may."""
    # Before anything is decoded: an ANS code of a constant array stands for any number of entries in a few bytes.
    most = max(_SMALL, _GROWTH * size) if max_bytes is None else max_bytes
    needed = sum(leaf.size for leaf in found)
    remedy = f"The leaves of this file take {needed} bytes; raise the limit if you trust it."
    arguments.require(needed <= most, "max_bytes", "allow for all leaves", most, remedy)


def _axes(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))


def _leaf(entry: container.Entry, note: str) -> StoredLeaf:
    """The leaf of an entry, whose note must fit it."""
    checksum, form, described = note[:8], note[8:9], note[9:]
    try:
        number = int(checksum, 16)
        if form == _RAW:
            return StoredLeaf(entry, number, _RAW, entry.kind, entry.shape)
        name, _, rest = ("float32", "", described) if form in _PAYLOADS else described.partition("[")
        shape = container.checked_shape([int(n) for n in rest.removesuffix("]").split(",") if n])
        leaf = StoredLeaf(entry, number, form, leaf_codec.DTYPES[name], shape)
    except (KeyError, ValueError):
        raise ValueError(f"The header's note on {entry.name!r} is damaged: {note[:80]!r}.") from None
    fits = leaf.size == entry.end - entry.begin if form == _BYTES else form in (_CODED, *_PAYLOADS)
    if entry.dtype != "U8" or not fits:
        raise ValueError(f"The header's note on {entry.name!r} does not fit its entry: {note[:80]!r}.")
    return leaf
