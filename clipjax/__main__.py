"""`python -m clipjax inspect FILE`, `compress`, `expand` or `export IN OUT`: the small file from the command line.

Compressing takes a plain safetensors file or the folder of an Orbax checkpoint; expanding writes a plain safetensors
file where OUT ends in .safetensors, else an Orbax checkpoint. Every bit survives both ways. Exporting writes what other
tools read: a GGUF file where OUT ends in .gguf, else a folder of safetensors as compressed-tensors reads it.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import jax
import numpy as np

import clipjax
from clipjax._exports import gguf_writing, safetensors_writing
from clipjax._files import alphabets, atomic_file, container, layouts, leaf_entries, saving
from clipjax._maths.integers import Quantized
from clipjax._reports.summarizing import Summary
from clipjax.typing import Tree


def inspect(path: str) -> Summary:
    """A table with a row for every leaf of a file, the header's bytes and the total at its end."""
    with open(path, "rb") as file:
        reader = container.Reader(file)
        if leaf_entries.made(reader):
            rows = [_row(f.entry, f.dtype, f.shape, f.size, f.how(reader)) for f in leaf_entries.stored(reader).leaves]
        else:
            rows = [_row(e, e.kind, e.shape, e.end - e.begin, "raw") for e in reader.entries]
    raw, size = sum(row["raw"] for row in rows), reader.size
    header = size - sum(row["bytes"] for row in rows)
    rows.append({"path": "header", "array": "", "raw": 0, "bytes": header, "ratio": None, "how": "JSON"})
    rows.append({"path": "total", "array": "", "raw": raw, "bytes": size, "ratio": raw / size, "how": ""})
    return Summary(rows)


def _row(entry: container.Entry, dtype: np.dtype, shape: tuple[int, ...], raw: int, how: str) -> dict[str, Any]:
    size = entry.end - entry.begin
    array = f"{dtype.name}[{','.join(map(str, shape))}]"
    return {"path": entry.name, "array": array, "raw": raw, "bytes": size, "ratio": raw / max(size, 1), "how": how}


def compress(source: str, target: str) -> None:
    """Write a plain safetensors file, or an Orbax checkpoint, as a small file."""
    saving.save(target, _checkpointer().restore(os.path.abspath(source)) if os.path.isdir(source) else _plain(source))


def _plain(path: str) -> Tree:
    """The tree of a plain safetensors file, its names nested at "/"; leaves are read when they are looked at."""
    with open(path, "rb") as file:
        reader = container.Reader(file)
        if leaf_entries.made(reader):
            raise ValueError(f"`IN` must be a plain safetensors file, got a clipjax file: {path}. It is small already.")
        begin = [reader.begin + entry.begin for entry in reader.entries]
    arrays = [
        np.memmap(path, entry.kind, "r", at, entry.shape)
        if entry.end > entry.begin
        else np.zeros(entry.shape, entry.kind)
        for entry, at in zip(reader.entries, begin, strict=True)
    ]
    return layouts.unflatten([entry.name for entry in reader.entries], arrays, None)


def expand(source: str, target: str, max_bytes: int | None = None) -> None:
    """Write a small file as a plain safetensors file, or as an Orbax checkpoint; a `Quantized` as its floats."""
    if not target.endswith(".safetensors"):
        _checkpointer().save(os.path.abspath(target), saving.load(source, max_bytes=max_bytes))
        return
    folder = atomic_file.folder_of(target)
    with open(source, "rb") as file, container.Writer(folder) as writer:
        reader = container.Reader(file)
        found = leaf_entries.stored(reader).leaves
        leaf_entries.check_size(found, reader.size, max_bytes)
        for leaf in found:
            if leaf.dtype not in container.NAMES:
                raise ValueError(f"safetensors has no name for {leaf.dtype.name}, of leaf {leaf.entry.name!r}.")
            x = np.asarray(leaf.read(reader))
            writer.add(leaf.entry.name, container.NAMES[x.dtype], x.shape, alphabets.patterns(x).data)
        with atomic_file.replacing(target) as out:
            writer.write(out, {})


def export(source: str, target: str, architecture: str = "llama", max_bytes: int | None = None) -> None:
    """Write a small file as GGUF or safetensors, under its own names; a `Quantized` on a format as its bytes.

    A note on stderr says where there is none.
    """
    if target.endswith(".safetensors"):
        raise ValueError(
            f"`OUT` must be a folder or end in .gguf, got {target}. `expand` writes a plain file of floats."
        )
    params = saving.load(source, dequantize=False, max_bytes=max_bytes)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    if not any(isinstance(x, Quantized) and x.format is not None for x in leaves):
        params = saving.load(source, max_bytes=max_bytes)  # floats in their dtypes: nobody reads steps
        note = "has no leaf on a format, so that OUT has floats. Save `clipjax.quantized(params, opt_state)` for codes."
        print(f"clipjax: {source} {note}", file=sys.stderr)
    if target.endswith(".gguf"):
        gguf_writing.export_gguf(target, params, architecture=architecture)
    else:
        safetensors_writing.export_safetensors(target, params)


def _checkpointer() -> Any:  # Orbax is an extra, so that no type of it can be named here
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("Orbax checkpoints need `orbax-checkpoint`: pip install orbax-checkpoint.") from error
    return orbax.checkpoint.PyTreeCheckpointer()


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m clipjax", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"clipjax {clipjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("inspect", help="a table of the leaves of a file").add_argument("file")
    texts = {
        "compress": "plain safetensors or Orbax -> small",
        "expand": "small -> plain",
        "export": "small -> GGUF, or a folder of safetensors for compressed-tensors",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("source", metavar="IN")
        command.add_argument("target", metavar="OUT")
        if name != "compress":
            command.add_argument(
                "--max-bytes", type=int, help="how many bytes the leaves may take, if you trust the file"
            )
        if name == "export":
            command.add_argument(
                "--architecture", default="llama", help="of a GGUF file, by llama.cpp's name; llama by default"
            )
    args = parser.parse_args(arguments)
    try:
        if args.command == "inspect":
            print(inspect(args.file))
        elif args.command == "compress":
            compress(args.source, args.target)
        elif args.command == "export":
            export(args.source, args.target, args.architecture, args.max_bytes)
        else:
            expand(args.source, args.target, args.max_bytes)
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(f"clipjax: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
