"""Files that replace another one at once, when all of them is on the disk, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import IO


def folder_of(path: str | os.PathLike[str]) -> str:
    """The folder of a file, in which temporary files can be renamed to it."""
    return os.path.dirname(os.path.abspath(os.fspath(path)))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when all of it is on disk; until then, whatever happens, the old one stays.

    Written beside it, flushed to the disk, renamed, and the folder flushed too.
    """
    with replacing_by_name(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextlib.contextmanager
def replacing_by_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """The same for libraries that open their files themselves: the name of the file to write."""
    path = os.path.abspath(os.fspath(path))
    folder = folder_of(path)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # before the rename: else a power cut may leave the new name without its bytes
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _flush_folder(folder)


def _mode(path: str) -> int:
    """The mode of the old file, or what a new one would get."""
    try:
        return os.stat(path).st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)  # the mask can only be read by setting it
        os.umask(mask)
        return 0o666 & ~mask


def _flush_folder(folder: str) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
