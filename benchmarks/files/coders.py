"""Question: does a general compressor do what the small file does, on the floats or on codes that are packed for it?

    python benchmarks/files/coders.py [--side 800]

Each net of files.py that is on a grid or pruned, as bytes: the file of `clipjax.save`; then what xz -9e, zstd -19
--long and brotli -11 make of the f32 values, and of codes with the steps as f32: packed in as many bits as the grid
has, or one in a byte, whichever is smaller. All of it is decompressed and compared. NNCodec (DeepCABAC, the ISO
standard for neural networks) has no wheel: where it is installed it gets a column, of its bitstream of the codes.
"""

from __future__ import annotations

import argparse
import importlib.util
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path

import brotli
import jax
import jax.numpy as jnp
import numpy as np
import zstandard
from files import NETS

import clipjax

CODERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "xz -9e": (lambda b: lzma.compress(b, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    "zstd -19 --long": (
        lambda b: zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
        ).compress(b),
        lambda b: zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(b),
    ),
    "brotli -11": (lambda b: brotli.compress(b, quality=11, lgwin=24), brotli.decompress),
}
GRIDS = ("4 bit", "8 bit", "4 bit, a step a column", "pruned 90 %, 4 bit", "pruned by rows and columns, 4 bit")


def codes_of(x: np.ndarray, columns: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes i8 and steps f32 of values on a grid, one step for all or one a column; compared bit for bit."""
    size = np.abs(x)
    step = np.min(np.where(size > 0, size, np.inf), axis=0 if columns else None).astype(np.float32)
    codes = np.rint(x / step).astype(np.int8)
    assert (codes * step == x).all(), "the smallest value is no step"
    return codes, step


def packed(codes: np.ndarray) -> bytes:
    """Codes in as many bits as their range takes."""
    symbols = (codes.astype(np.int32) - codes.min()).astype(np.uint8).ravel()
    bits = max(int(symbols.max()).bit_length(), 1)
    return np.packbits(np.unpackbits(symbols[:, None], axis=1)[:, 8 - bits :]).tobytes()


def smallest(coder: str, choices: list[bytes]) -> int:
    """Bytes of the best choice; each is decompressed and compared."""
    compress, decompress = CODERS[coder]
    sizes = []
    for data in choices:
        made = compress(data)
        assert decompress(made) == data, coder
        sizes.append(len(made))
    return min(sizes)


def nncodec(leaves: list[np.ndarray]) -> int:
    """Bytes of NNCodec's bitstream of integer tensors."""
    import nncodec.nn

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.nnc")
        nncodec.nn.encode(
            {f"layer{i}": x.astype(np.int32) for i, x in enumerate(leaves)}, {"bitstream_path": str(path)}
        )
        return path.stat().st_size


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=800, help="of the four leaves")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    there = importlib.util.find_spec("nncodec") is not None
    print(f"Four leaves of {options.side} x {options.side}, bytes over those of the file; lossless, all of them.\n")
    heads = ["net", "file, bytes", *(f"{c}, {on}" for on in ("values", "codes") for c in CODERS), *["NNCodec"] * there]
    print("| " + " | ".join(heads) + " |\n| --- |" + " ---: |" * (len(heads) - 1))
    for name in ("pruned 90 %", *GRIDS):
        leaves = [np.asarray(NETS[name](rng, options.side)) for _ in range(4)]
        file = len(clipjax.pack({f"layer{i}": {"kernel": jnp.asarray(x)} for i, x in enumerate(leaves)}))
        raw = b"".join(x.tobytes() for x in leaves)
        cells = [smallest(coder, [raw]) / file for coder in CODERS]
        if name in GRIDS:
            grids = [codes_of(x, "column" in name and "rows" not in name) for x in leaves]
            steps = b"".join(step.tobytes() for _, step in grids)
            forms = [
                b"".join(map(form, (codes for codes, _ in grids))) + steps for form in (packed, np.ndarray.tobytes)
            ]
            cells += [smallest(coder, forms) / file for coder in CODERS]
            cells += [nncodec([codes for codes, _ in grids]) / file] if there else []
        shown = [f"{cell:.2f}" for cell in cells] + [""] * (len(heads) - 2 - len(cells))
        print("| " + " | ".join([name, f"{file:,}", *shown]) + " |", flush=True)
    print(f"\njax {jax.__version__}, zstandard {zstandard.__version__}, brotli {brotli.__version__}")


if __name__ == "__main__":
    main()
