"""The container: a safetensors file, written leaf by leaf and read without trust.

Eight bytes of header length, a JSON header with dtype, shape and place of every entry, then the entries without gaps.
The header's `__metadata__` holds a checksum of the header itself.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
import zlib
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from clipjax._files.byte_stream import Buffer

_LARGEST_HEADER = 100_000_000  # what safetensors allows
_SPOOL = 1 << 20  # entries beyond this many bytes wait on disk until the header is known
_NO_CHECKSUM = "00000000"  # stands in the header while its checksum is computed
NAMES = {
    **{np.dtype(f"{kind}{size}"): f"{kind.upper()}{8 * size}" for kind in "iu" for size in (1, 2, 4, 8)},
    **{np.dtype(f"f{size}"): f"F{8 * size}" for size in (2, 4, 8)},
    np.dtype(bool): "BOOL",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(np.complex64): "C64",
}
"""The dtypes that safetensors has a name for."""

_DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Entry(NamedTuple):
    """One entry of a container; `begin` counts from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def kind(self) -> np.dtype:
        """The dtype as NumPy knows it."""
        return _DTYPES[self.dtype]


class Writer:
    """Collects entries, and writes the container once all are there: a context that closes what it waits in."""

    def __init__(self, folder: str | None = None) -> None:
        """Entries wait in memory, or in a file of `folder` where they are large."""
        self._spool = tempfile.SpooledTemporaryFile(_SPOOL, dir=folder)
        self._entries: dict[str, Any] = {}

    def __enter__(self) -> Writer:
        """The writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what waits."""
        self._spool.close()

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        """Append an entry."""
        begin = self._spool.tell()
        self._spool.write(data)
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, self._spool.tell()]}

    @property
    def size(self) -> int:
        """The bytes of all entries."""
        return self._spool.tell()

    def write(self, file: IO[bytes], metadata: dict[str, str]) -> None:
        """Write header and entries."""
        header = self._header(metadata)
        checksum = f"{zlib.crc32(header):08x}"
        file.write(struct.pack("<Q", len(header)))
        file.write(header.replace(_checksum_field(_NO_CHECKSUM), _checksum_field(checksum), 1))
        self._spool.seek(0)
        shutil.copyfileobj(self._spool, file, 1 << 20)

    def whole(self, metadata: dict[str, str]) -> int:
        """The bytes of header and entries."""
        return 8 + len(self._header(metadata)) + self.size

    def _header(self, metadata: dict[str, str]) -> bytes:
        return _header({"__metadata__": {**metadata, "crc": _NO_CHECKSUM}, **self._entries})


def alone(name: str, data: bytes) -> bytes:
    """A container with one entry of bytes, in as few bytes as it can be."""
    spec = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({name: spec}, separators=(",", ":")).encode()
    return struct.pack("<Q", len(header)) + header + data


def _header(entries: dict[str, Any]) -> bytes:
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def _checksum_field(checksum: str) -> bytes:
    return f'"crc":"{checksum}"'.encode()


class Reader:
    """The entries of a container, checked: names, sizes that agree with shapes, no gaps, nothing left over.

    Attributes:
      entries: in file order.
      metadata: the strings under `__metadata__`.
      begin: where the entries begin.
      size: bytes of the whole.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Read and check the header."""
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(self.size - 8, _LARGEST_HEADER):
            raise ValueError(f"This is no safetensors file: its header would take {length} of {self.size} bytes.")
        self.begin = 8 + length
        self._header = file.read(length)
        parsed = _parse(self._header)
        self.metadata = _metadata(parsed.pop("__metadata__", {}))
        self.entries = sorted((_entry(name, spec) for name, spec in parsed.items()), key=lambda e: (e.begin, e.end))
        # Entries follow each other without gaps or overlaps: each byte of the file is covered by one checksum.
        at = 0
        for entry in self.entries:
            if entry.begin != at:
                raise ValueError(f"Entry {entry.name!r} begins at byte {entry.begin}, where {at} is next.")
            at = entry.end
        if at + self.begin != self.size:
            raise ValueError(f"The header promises {at + self.begin} bytes, the file has {self.size}: cut or extended.")

    def intact(self) -> bool:
        """True where the header's checksum is that of the header."""
        checksum = self.metadata.get("crc", "")
        header = self._header.replace(_checksum_field(checksum), _checksum_field(_NO_CHECKSUM), 1)
        return f"{zlib.crc32(header):08x}" == checksum

    def read(self, entry: Entry) -> bytes:
        """The bytes of an entry."""
        self._file.seek(self.begin + entry.begin)
        data = self._file.read(entry.end - entry.begin)
        if len(data) != entry.end - entry.begin:
            raise ValueError(f"Entry {entry.name!r} is cut: {len(data)} of {entry.end - entry.begin} bytes are there.")
        return data


def _parse(header: bytes) -> dict[str, Any]:
    def no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("A name occurs twice.")
        return found

    try:
        parsed = json.loads(header.decode(), object_pairs_hook=no_twice)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The header is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"The header must be a JSON object, got {type(parsed).__name__}.")
    return parsed


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("The header's `__metadata__` must hold strings.")
    return found


def _entry(name: str, spec: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = (spec[key] for key in ("dtype", "shape", "data_offsets"))
        entry = Entry(name, dtype, checked_shape(shape), *checked_shape((begin, end)))
        size = math.prod(entry.shape) * entry.kind.itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The header's entry {name!r} must have dtype, shape and data_offsets: {error!r}") from None
    if entry.begin + size != entry.end:
        raise ValueError(f"Entry {name!r} has {entry.end - entry.begin} bytes, its shape needs {size}.")
    return entry


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape of at most 64 axes, of whole numbers."""
    if not isinstance(shape, list | tuple) or len(shape) > 64:
        raise ValueError(f"A shape must be a list of at most 64 numbers, got {str(shape)[:80]}.")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"A shape must hold whole numbers below 2^48, got {str(shape)[:80]}.")
    return tuple(shape)
