"""Question: what is lost on the way into a file, after training in floats, on another grid, and on its own format?

    python benchmarks/formats.py [--text FILE] [--seeds 5] [--out out/formats.jsonl]
    python benchmarks/formats.py --table                                # from the saved runs, without training

A Llama of 1.3 M weights (`examples/text_llama.py`) reads text by the byte: FILE, or what Python's own `help()` says of
its keywords. Of the text the last tenth is held out, and before that a tenth is for choosing learning rates. Each seed
trains in floats, and the last third of its steps anew for each format and arm, from the same weights with the same
batches:

- post: the floats, held once on the format (`hold_once`), which is the reference's own quantizer;
- wrong grid: trained on `fake_quantize(bits, group=...)` of as many bits and as large groups, then held once on the
  format, as a converter does;
- format: trained on the format, behind the same clamp, with the scales of the reference's rule in every step;
- least squares: the same, with the scales of least squared error (`step=steps.mse()`), searched every 25 steps.

Embedding and head are in Q8_0 in all arms. What is measured went through a GGUF file and the dequantizer of gguf-py:
the held-out loss in nats a byte, and how far the file's weights are from what was trained, relative to their rms.
Seeds that OUT has are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import clipjax
from clipjax import formats, steps

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import text_llama

KEPT = Path(__file__).with_suffix(".jsonl")
ARMS = ("post", "wrong grid", "format", "least squares")
FORMATS = {"Q4_0": (formats.q4_0(), 4, 32), "MXFP4": (formats.mxfp4(), 4, 32), "TQ2_0": (formats.tq2_0(), 2, 256)}
"""By name the format, and the width and group of the grid that a trainer without it would take."""

STEPS, LAST, LENGTH, BATCH = 600, 200, 96, 8
BOUND = 0.5
NAMES = clipjax.llama_names(text_llama.CONFIG)


def is_table(path: str) -> bool:
    """True for the embedding and the head."""
    return "embed" in path or "lm_head" in path


def chain(form: Any, rate: float, **options: Any) -> optax.GradientTransformation:
    """Adam and the clamp, and behind them a width or a format for all but embedding and head, which are in Q8_0."""
    where = lambda path, leaf: leaf.ndim > 1  # noqa: E731
    first = [optax.adam(optax.cosine_decay_schedule(rate, LAST)), clipjax.clamp_weights(BOUND, where=where)]
    if form is None:
        return optax.chain(*first)
    chosen = clipjax.per_leaf(lambda path, leaf: formats.q8_0() if is_table(path) else form[0])
    if isinstance(form[0], formats.Format):
        return optax.chain(*first, clipjax.fake_quantize(chosen, **options or {"every": 1}))
    axis = clipjax.per_leaf(lambda path, leaf: 0 if "embed" in path else -1)
    return optax.chain(*first, clipjax.fake_quantize(chosen, every=1, group=form[1], axis=axis))


class Run:
    """One seed: its text, its model, its batches."""

    def __init__(self, seed: int, text: str):
        """Makes the model of a seed."""
        ids = text_llama.tokens(text)
        tenth = len(ids) // 10
        self.train, self.tuning, self.held_out = ids[: -2 * tenth], ids[-2 * tenth : -tenth], ids[-tenth:]
        self.seed = seed
        model = text_llama.Llama(text_llama.CONFIG, nnx.Rngs(seed))
        self.graph, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        self.loss = jax.jit(self._loss)

    def _loss(self, params: Any, rows: jax.Array) -> jax.Array:
        logits = nnx.merge(self.graph, params, self.rest)(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def rows(self, ids: np.ndarray, starts: np.ndarray) -> jax.Array:
        """Rows of text behind <s>."""
        return jnp.asarray(text_llama.behind_start(ids, starts, LENGTH))

    def trained(self, params: Any, tx: optax.GradientTransformation, begin: int, end: int) -> tuple[Any, Any]:
        """Params and state after the steps from `begin` to `end`, on the batches of the seed."""

        @jax.jit
        def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any]:
            updates, state = tx.update(jax.grad(self._loss)(params, rows), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for i in range(begin, end):
            starts = np.random.default_rng((self.seed, i)).integers(0, len(self.train) - LENGTH, BATCH)
            params, state = step(params, state, self.rows(self.train, starts))
        return params, state

    def error(self, params: Any, ids: np.ndarray) -> float:
        """The mean loss on a text, in nats a byte."""
        starts = np.arange(0, len(ids) - LENGTH, LENGTH - 1)
        parts = [starts[i : i + 64] for i in range(0, len(starts) - len(starts) % 64, 64)]
        return float(np.mean([self.loss(params, self.rows(ids, part)) for part in parts]))


def through_file(params: Any, state: Any) -> Any:
    """Params as gguf-py reads them from the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.gguf")
        clipjax.export_gguf(path, params, state, rename=NAMES)
        return clipjax.import_gguf(path, like=params, rename=NAMES)


def moved(params: Any, read: Any) -> float:
    """How far the kernels of the file are from those that were trained, relative to their rms."""
    pairs = [
        (np.asarray(a), np.asarray(b))
        for (path, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(read), strict=True)
        if a.ndim > 1 and not is_table(jax.tree_util.keystr(path))
    ]
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs)))


def arms(run: Run, begun: Any, floats: Any, name: str, rate: float) -> Iterator[tuple[str, Any, Any]]:
    """By arm the params that were trained, and those of the file."""
    form, bits, group = FORMATS[name]
    on_format = chain((form,), rate)
    wrong, _ = run.trained(begun, chain((bits, group), rate), STEPS - LAST, STEPS)
    for arm, params in zip(ARMS, (floats, wrong), strict=False):
        yield arm, params, through_file(*clipjax.hold_once(on_format, params))
    searched = chain((form,), rate, step=steps.mse(), every=25)
    for arm, tx in zip(ARMS[2:], (on_format, searched), strict=True):
        params, state = run.trained(begun, tx, STEPS - LAST, STEPS)
        yield arm, params, through_file(params, state)


def measure(seed: int, text: str, rates: list[float]) -> Iterator[dict[str, Any]]:
    """The rows of a seed. Several rates are compared on the text for that, and what is held out is not read."""
    run = Run(seed, text)
    tuning = len(rates) > 1
    ids = run.tuning if tuning else run.held_out
    begun, _ = run.trained(run.params, optax.adam(2e-3), 0, STEPS - LAST)
    for rate in rates:
        floats, _ = run.trained(begun, chain(None, rate), STEPS - LAST, STEPS)
        row = {"seed": seed, "rate": rate, "on": "tuning" if tuning else "held out"}
        yield row | {"format": "F32", "arm": "float", "loss": run.error(floats, ids), "moved": 0.0}
        for name in FORMATS:
            for arm, params, read in arms(run, begun, floats, name, rate):
                yield row | {"format": name, "arm": arm, "loss": run.error(read, ids), "moved": moved(params, read)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds."""
    lines = [
        "| format | arm | held-out loss, nats a byte | over float | weights moved by the file |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    floats = {row["seed"]: row["loss"] for row in rows if row["arm"] == "float"}
    for key in dict.fromkeys((row["format"], row["arm"]) for row in rows):
        found = [row for row in rows if (row["format"], row["arm"]) == key]
        losses, over = [row["loss"] for row in found], [row["loss"] - floats[row["seed"]] for row in found]
        spread = lambda xs: statistics.stdev(xs) if len(xs) > 1 else 0.0  # noqa: E731
        cells = [f"{np.mean(losses):.4f} ± {spread(losses):.4f}", f"{np.mean(over):+.4f} ± {spread(over):.4f}"]
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} | {np.mean([row['moved'] for row in found]):.3f} |")
    return "\n".join([*lines, "", f"Seeds: {sorted(floats)}."])


def main() -> None:
    """Train what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="several are compared, on seed 100")
    parser.add_argument("--out", type=Path, default=Path("out/formats.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the saved runs")
    options = parser.parse_args()
    if options.table:
        kept = options.out if options.out.exists() else KEPT
        print(table([json.loads(line) for line in kept.read_text().splitlines()]))
        return
    text = options.text.read_text() if options.text else text_llama.text()
    if len(options.rates) > 1:
        for row in measure(100, text, options.rates):
            print(json.dumps(row), flush=True)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for seed in set(range(options.seeds)) - {row["seed"] for row in rows}:
        for row in measure(seed, text, options.rates):
            print(json.dumps(row), flush=True)
            rows.append(row)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
