"""Reads MNIST's IDX files, gzipped or not."""

import gzip
from pathlib import Path

import numpy as np


def load(folder: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reads the four files of MNIST.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-…``, each with or
            without ``.gz``.

    Returns:
        Training images f32[60000, 28, 28, 1] in [0, 1] and labels i32[60000], then the same two of the test set.
    """
    arrays = []
    for part in ("train", "t10k"):
        images = _read(Path(folder) / f"{part}-images-idx3-ubyte")
        labels = _read(Path(folder) / f"{part}-labels-idx1-ubyte")
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(f"{part}: images {images.shape} and labels {labels.shape} do not belong together.")
        arrays += [images[..., None].astype(np.float32) / 255, labels.astype(np.int32)]
    return tuple(arrays)


def _read(path: Path) -> np.ndarray:
    """Reads one IDX file: two zero bytes, a type (8 is u8), a rank, the sizes as big-endian u32, then the data."""
    zipped = path.with_name(path.name + ".gz")
    if not path.exists() and not zipped.exists():
        raise FileNotFoundError(f"Neither {path} nor {zipped.name} is there. Point --data-dir at MNIST's IDX files.")
    with open(path, "rb") if path.exists() else gzip.open(zipped, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4].hex()!r}.")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) != start + shape.prod():
        raise ValueError(f"{path} is cut short: {shape.tolist()} bytes announced, {len(content) - start} there.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
