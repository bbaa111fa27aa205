"""The entry of one leaf in a container, and the note that says what the entry does not: checksum, dtype, shape.

A note reads `1a2b3c4d` where the array stands as it is, `1a2b3c4d:float32[3,4]` where a payload stands for it,
`1a2b3c4d=int4[5]` where its bytes do, under a dtype that safetensors has no name for, and `1a2b3c4d*3,4` where a
payload stands for a `Quantized` with codes of that shape, `1a2b3c4d#3,4` for one that has scales of a format.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from clipjax._arrays import arguments
from clipjax._files import alphabets, byte_stream, container, format_leaves, leaf_codec, quantized_leaves, small_trees
from clipjax._maths import integers
from clipjax._maths.integers import Quantized

VERSIONS = ("1", "2", "3")
"""Those that can be read. The second is written for trees with a `Quantized`, the third for those with one that has
scales of a format, so that older readers refuse them. `one_entry` is the fourth."""

_RAW, _CODED, _BYTES, _QUANTIZED, _FORMAT = "", ":", "=", "*", "#"
_FORMS = (_RAW, _CODED, _BYTES, _QUANTIZED, _FORMAT)  # by the numbers that stand for them in `one_entry`,
_DTYPES = tuple(leaf_codec.DTYPES)  # as in these: both may grow at their ends
_PAYLOADS = {_QUANTIZED: quantized_leaves, _FORMAT: format_leaves}
_SMALL = 1 << 26  # a file may always decode to this many bytes,
_GROWTH = 1000  # or to this many times its own size


def add(writer: container.Writer, name: str, x: np.ndarray | Quantized) -> str:
    """Add a leaf, and return its note: the checksum of its bytes, and what they do not say of dtype and shape."""
    form, data = _packed(name, x, checked=True)
    if isinstance(x, Quantized):
        described = _axes(np.shape(x.codes))
    elif form == _RAW:
        writer.add(name, container.NAMES[x.dtype], x.shape, data)
        return _checksum(data)
    else:
        described = f"{x.dtype.name}[{_axes(x.shape)}]"
    writer.add(name, "U8", (len(data),), data)
    return _checksum(data) + form + described


def together(names: list[str], leaves: list[np.ndarray | Quantized], layout: str | None) -> bytes | None:
    """A container of small leaves with one entry for all of them; None where there are too many."""
    rows, parts, checks = [], [], []
    for name, x in zip(names, leaves, strict=True):
        form, data = _packed(name, x, checked=False)
        kind, shape = (0, np.shape(x.codes)) if isinstance(x, Quantized) else (_DTYPES.index(x.dtype.name), x.shape)
        rows.append(small_trees.Row(name, _FORMS.index(form), kind, shape, len(data)))
        parts.append(data)
        seen: list[int] = []  # decoded once more: the checksum is that of what a reader will see
        if form == _CODED:
            leaf_codec.unpack(data, leaf_codec.DTYPES[_DTYPES[kind]], shape, seen)
        elif form in _PAYLOADS:
            _PAYLOADS[form].unpack(data, shape, seen)
        checks += seen
    entry = small_trees.pack(rows, layout, small_trees.total(checks), b"".join(parts))
    return None if entry is None else container.alone(small_trees.NAME, entry)


def _packed(name: str, x: np.ndarray | Quantized, checked: bool) -> tuple[str, byte_stream.Buffer]:
    """The form of a leaf and its bytes, in which arrays have checksums of their own where they are `checked`."""
    if isinstance(x, Quantized):
        form = _QUANTIZED if x.step is not None and not x.scales else _FORMAT
        return form, _PAYLOADS[form].pack(x, name, checked)
    data = leaf_codec.pack(x, checked).data
    if data is not None:
        return _CODED, data
    return _RAW if x.dtype in container.NAMES else _BYTES, alphabets.patterns(x).view(np.uint8).data


def _checksum(data: byte_stream.Buffer) -> str:
    return f"{zlib.crc32(data):08x}"


class StoredLeaf(NamedTuple):
    """One leaf of a file that is not read yet.

    Attributes:
      entry: its bytes in the container.
      checksum: the CRC-32 of these bytes; None where one for all leaves was compared already.
      form: how the bytes stand for the leaf: the sign in its note.
      dtype: that of the array; f32 for the values of a `Quantized`.
      shape: that of the array.
      together: what compares the arrays of all leaves, where they have no checksums of their own.
    """

    entry: container.Entry
    checksum: int | None
    form: str
    dtype: np.dtype
    shape: tuple[int, ...]
    together: small_trees.Together | None = None

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
        if self.checksum not in (None, zlib.crc32(data)):
            raise ValueError(f"Leaf {self.entry.name!r} has another checksum than the one that was stored.")
        return data

    def read(self, reader: container.Reader, dtype: np.dtype | None = None) -> np.ndarray:
        """The array; `dtype` is the one for the values of a `Quantized`, f32 by default."""
        if self.quantized:
            q = self._decoded(reader, _PAYLOADS[self.form].unpack, self.shape)
            return np.asarray(integers.dequantize(q, dtype=dtype or self.dtype))
        if self.form != _CODED:
            return self._raw(reader)
        x: np.ndarray = self._decoded(reader, leaf_codec.unpack, self.dtype, self.shape)
        return x

    def read_codes(self, reader: container.Reader) -> np.ndarray | Quantized:
        """The `Quantized` that was saved, or one for the codes that were found behind the values, or the array."""
        if self.quantized:
            q: Quantized = self._decoded(reader, _PAYLOADS[self.form].unpack, self.shape)
            return q
        if self.form != _CODED:
            return self._raw(reader)
        found = self._decoded(reader, leaf_codec.unpack_codes, self.dtype, self.shape)
        return quantized_leaves.from_values(found) if isinstance(found, leaf_codec.CodesAndSteps) else found

    def how(self, reader: container.Reader) -> str:
        """The form in which the array is stored, in words."""
        seen: list[int] | None = None if self.together is None else []
        if self.quantized:
            return _PAYLOADS[self.form].describe(self.data(reader), self.shape, seen)
        return leaf_codec.describe(self.data(reader), self.dtype, self.shape, seen) if self.form == _CODED else "raw"

    def _decoded(self, reader: container.Reader, decode: Callable[..., Any], *args: object) -> Any:
        """What is decoded from the bytes, compared with the checksums of its arrays or noted for that of all."""
        seen: list[int] | None = None if self.together is None else []
        found = decode(self.data(reader), *args, seen)
        self._note(seen)
        return found

    def _note(self, seen: list[int] | None) -> None:
        if self.together is not None:
            self.together.add(self.entry.name, seen or [])

    def _raw(self, reader: container.Reader) -> np.ndarray:
        bits = np.frombuffer(self.data(reader), np.uint8)
        self._note(None)
        if self.dtype == np.bool_ and bits.max(initial=0) > 1:
            raise ValueError(f"Leaf {self.entry.name!r} must hold booleans.")
        return bits.view(self.dtype).reshape(self.shape)


def version(notes: list[str]) -> str:
    """The first version that can read leaves with these notes."""
    forms = {note[8:9] for note in notes}
    return VERSIONS[2 if _FORMAT in forms else 1 if _QUANTIZED in forms else 0]


def made(reader: container.Reader) -> bool:
    """True for a container that `save` made, not any other safetensors file."""
    return "clipjax" in reader.metadata or _alone(reader)


def _alone(reader: container.Reader) -> bool:
    """True for a file with one entry for all leaves."""
    return not reader.metadata and [entry.name for entry in reader.entries] == [small_trees.NAME]


class Stored(NamedTuple):
    """What a file holds, not read yet: its leaves, and the layout of the tree where their names do not say it."""

    leaves: list[StoredLeaf]
    layout: str | None


def stored(reader: container.Reader) -> Stored:
    """The leaves of a file and their layout, after every check that needs no more than the header."""
    if not _alone(reader):
        return Stored(_leaves(reader), reader.metadata.get("layout"))
    rows, layout, check, begin = small_trees.unpack(reader.read(reader.entries[0]))
    compare, found = small_trees.Together([row.name for row in rows], check), []
    for row in rows:
        entry = container.Entry(row.name, "U8", (row.size,), begin, begin + row.size)
        begin += row.size
        if row.form >= len(_FORMS) or row.dtype >= len(_DTYPES):
            raise ValueError(f"The head of the file has a leaf {row.name!r} of a form or dtype that there is not.")
        form = _FORMS[row.form]
        dtype = leaf_codec.DTYPES["float32" if form in _PAYLOADS else _DTYPES[row.dtype]]
        leaf = StoredLeaf(entry, None, form, dtype, row.shape, compare)
        if form in (_RAW, _BYTES) and leaf.size != row.size:
            raise ValueError(f"The head of the file gives leaf {row.name!r} another size than its shape has.")
        found.append(leaf)
    return Stored(found, layout)


def _leaves(reader: container.Reader) -> list[StoredLeaf]:
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
