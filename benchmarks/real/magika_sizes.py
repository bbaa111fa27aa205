"""Question: how small does Magika get with clipjax, and does the package answer with it as it did?

    python benchmarks/real/file_corpus.py                                     # once
    python benchmarks/real/magika_sizes.py [--sizes 512x4 432x3 320x3] [--seeds 3] [--out out/magika.jsonl]
    python benchmarks/real/magika_sizes.py --final [...]                      # the same on the packages held out
    python benchmarks/real/magika_sizes.py --table                            # from the saved rows

The rows: the model of the package; the same in 8 bits by onnxruntime's own quantizers, the static one calibrated on 512
files, the dynamic one, which quantizes what it reads as it runs; and what `examples/magika_small.py` trains at three
sizes, each from some seeds. Measured on the files of packages that no training has seen: how often the package, which
says "txt" or "unknown" where its model is not sure, answers as with its own model; how often the largest answer of the
model is that of the original; and of the files whose extension belongs to one type alone, how often a model says this
type, over all and as the mean over types. Time is that of onnxruntime alone, on one thread, as the ratio to the
original in the same process.

Without `--final` the split for tuning is measured. Rows that OUT has are not made again.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import magika
import numpy as np
import onnxruntime
from onnxruntime import quantization

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import magika_net
import magika_small

KEPT = Path(__file__).with_suffix(".jsonl")
ORIGINAL, POSTERIOR, DYNAMIC = "magika 1.0.3", "int8 by onnxruntime, static", "int8 by onnxruntime, dynamic"


def types_by_extension() -> dict[str, int]:
    """The type of each extension that one type alone has, by what the package knows of types."""
    known = json.loads((magika_net.folder().parents[1] / "config" / "content_types_kb.min.json").read_text())
    owners = collections.defaultdict(set)
    for name, facts in known.items():
        for extension in facts["extensions"]:
            owners[extension].add(name)
    index = {name: i for i, name in enumerate(magika_net.labels())}
    return {key: index[min(names)] for key, names in owners.items() if len(names) == 1 and names <= index.keys()}


def session(path: Path) -> onnxruntime.InferenceSession:
    """A model on one thread, as `magika` runs it otherwise."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def said(model: onnxruntime.InferenceSession, tokens: np.ndarray) -> np.ndarray:
    """The type that a model gives each file."""
    parts = [tokens[i : i + 64].astype(np.int32) for i in range(0, len(tokens), 64)]
    found = [model.run(["target_label"], {"bytes": part})[0].argmax(-1) for part in parts]
    return np.concatenate(found)


def packaged(folder: Path, paths: list[Path]) -> np.ndarray:
    """What the unmodified package says of each file with the model of a folder."""
    return np.array([str(found.output.label) for found in magika.Magika(model_dir=folder).identify_paths(paths)])


def speed(model: onnxruntime.InferenceSession, other: onnxruntime.InferenceSession, batch: int) -> float:
    """How many times as fast as the other one, by the medians of runs that take turns."""
    tokens = np.random.default_rng(0).integers(0, 257, (batch, magika_net.BYTES), np.int32)
    times: list[list[float]] = [[], []]
    for _ in range(25):
        for kept, one in zip(times, (model, other), strict=True):
            start = time.perf_counter()
            one.run(None, {"bytes": tokens})
            kept.append(time.perf_counter() - start)
    return float(np.median(times[1]) / np.median(times[0]))


class Judge:
    """The files of a split, what the original says of them, and their types by extension."""

    def __init__(self, files: Path, split: str):
        """Reads the split."""
        rows = [json.loads(line) for line in (files / "index.jsonl").read_text().splitlines()]
        self.tokens, _ = magika_small.data(files, split)
        known = types_by_extension()
        self.types = np.array([known.get(row["extension"], -1) for row in rows if row["split"] == split])
        self.split, self.original = split, session(magika_net.folder() / "model.onnx")
        self.answers = said(self.original, self.tokens)
        self.paths = [files / row["path"] for row in rows if row["split"] == split]
        self.package = packaged(magika_net.folder(), self.paths)

    def row(self, path: Path) -> dict[str, Any]:
        """What is measured of a file."""
        model = session(path)
        answers, labelled = said(model, self.tokens), self.types >= 0
        right = (answers == self.types)[labelled]
        by_type = [right[self.types[labelled] == kind].mean() for kind in np.unique(self.types[labelled])]
        return {
            "split": self.split,
            "files": len(answers),
            "bytes": path.stat().st_size,
            "package_agreement": float(np.mean(packaged(path.parent, self.paths) == self.package)),
            "agreement": float(np.mean(answers == self.answers)),
            "labelled": int(labelled.sum()),
            "types": len(by_type),
            "accuracy": float(right.mean()),
            "accuracy_by_type": float(np.mean(by_type)),
            "speed_1": speed(model, self.original, 1),
            "speed_32": speed(model, self.original, 32),
        }


class Calibration(quantization.CalibrationDataReader):
    """Files for onnxruntime's own quantizer, one by one."""

    def __init__(self, tokens: np.ndarray):
        """Holds the files."""
        self.rows = iter(tokens.astype(np.int32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next file, as the inputs of the model."""
        row = next(self.rows, None)
        return None if row is None else {"bytes": row[None]}


def without_training(tokens: np.ndarray, path: Path) -> None:
    """Writes the model of the package in 8 bits."""
    quantization.quantize_static(magika_net.folder() / "model.onnx", path, Calibration(tokens[:512]), per_channel=True)


def measure(judge: Judge, options: argparse.Namespace, made: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The rows that are not made yet."""
    with tempfile.TemporaryDirectory() as folder:
        if (ORIGINAL, 0) not in made:
            yield {"model": ORIGINAL, "seed": 0} | judge.row(magika_net.folder() / "model.onnx")
        if (POSTERIOR, 0) not in made:
            tokens, _ = magika_small.data(options.files, "train")
            magika_small.copy_config(Path(folder))
            without_training(tokens, Path(folder, "model.onnx"))
            yield {"model": POSTERIOR, "seed": 0} | judge.row(Path(folder, "model.onnx"))
        if (DYNAMIC, 0) not in made:
            magika_small.copy_config(Path(folder))
            quantization.quantize_dynamic(magika_net.folder() / "model.onnx", Path(folder, "model.onnx"))
            yield {"model": DYNAMIC, "seed": 0} | judge.row(Path(folder, "model.onnx"))
        for seed in range(options.seeds):
            for size in options.sizes:
                channels, bits = map(int, size.split("x"))
                name, kept = (
                    f"clipjax, {channels} channels, {bits} bits",
                    options.models / f"{size}-{options.epochs:g}-{seed}",
                )
                if (name, seed) in made:
                    continue
                if not (kept / "model.onnx").exists():
                    model, state = magika_small.small(options.files, channels, bits, options.epochs, seed)
                    magika_small.save(model, state, kept)
                yield {"model": name, "seed": seed, "epochs": options.epochs} | judge.row(kept / "model.onnx")


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and between the smallest and the largest."""
    lines = [
        "| model | bytes | as the package | as the model | extension | mean of types | speed, batch 1 | batch 32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == name]
        cells = [f"{np.mean([row['bytes'] for row in found]):,.0f}"]
        for key in ("package_agreement", "agreement", "accuracy", "accuracy_by_type"):
            values = [100 * row[key] for row in found]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(found) > 1 else ""
            cells.append(f"{np.mean(values):.2f} %{spread}")
        cells += [f"{np.mean([row[key] for row in found]):.2f} ×" for key in ("speed_1", "speed_32")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = rows[0]
    of = f"{first['labelled']:,} of {first['types']} types by extension"
    return "\n".join([*lines, "", f"{first['files']:,} files, {of}, split {first['split']}."])


def main() -> None:
    """Make the rows that OUT lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, default=Path("out/files"))
    parser.add_argument("--models", type=Path, default=Path("out/magika"), help="where the models go")
    parser.add_argument("--sizes", nargs="+", default=["512x4", "432x3", "320x3"], help="channels x bits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/magika.jsonl"))
    parser.add_argument("--final", action="store_true", help="measure on the packages held out")
    parser.add_argument("--table", action="store_true", help="print the saved rows")
    options = parser.parse_args()
    split = "test" if options.final else "tuning"
    path = KEPT if options.table and not options.out.exists() else options.out
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if options.table:
        print(table(rows))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {(row["model"], row["seed"]) for row in rows if row["split"] == split}
    with path.open("a") as file:
        for row in measure(Judge(options.files, split), options, made):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(table([row for row in rows if row["split"] == split]))


if __name__ == "__main__":
    main()
