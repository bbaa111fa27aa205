"""Twelve ways to train one small CNN: what does each cost in accuracy and time, and what does it save in bytes?

Every row is the same model, data and train step (training.py); only the ``optax.chain`` differs (`ROWS` below). After
each row the script asserts on the final params whatever the chain promises, to the bit (measuring.py).

    python examples/digits.py                                     # scikit-learn's digits, nothing to download
    python examples/digits.py --data mnist --data-dir DIR --rows ah

It prints a table and writes it with seven figures to ``out/``, and saves row (h) there. A process of its own loads that
file, and must find the same accuracy.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import figures
import jax
import measuring
import numpy as np
import optax
import training
from measuring import Promise
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.metrics import precision_score

import clipjax

MAX_NORM = 1.0  # gradients: the global norm
LIMIT = 0.1  # gradients: each entry (D1, D3, D4)
BOUND = 0.35  # weights: |w| <= BOUND (D3)
SPARSITY = 0.9  # weights: the fraction of exact zeros (D2)
BITS = 4  # weights: the width of a code (D4)
INTERVAL = (-0.25, 0.25)  # weights: where row (k) quantizes into (D0)
SHORT = 3  # epochs that row (l) takes to compress a trained model


def adam(steps: int, rate: float = 2e-3) -> optax.GradientTransformation:
    """The optimizer of every row: Adam with a cosine schedule over all the steps."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def prune(start: int, stop: int, **kwargs: Any) -> optax.GradientTransformation:
    """Zeros from none to `SPARSITY`, on the cubic schedule of Zhu and Gupta, in about 20 refreshes."""
    schedule = optax.polynomial_schedule(0.0, SPARSITY, power=3, transition_steps=stop - start)
    return clipjax.prune_mask(schedule, start=start, stop=stop, every=max(1, (stop - start) // 20), **kwargs)


def gradient_pruned(steps: int) -> optax.GradientTransformation:
    """D2: what to remove follows from the gradients, smoothed over batches."""
    return clipjax.with_gradient(
        optax.chain(
            clipjax.clip(LIMIT),
            adam(steps),
            clipjax.clamp_weights(BOUND),
            prune(steps // 8, steps // 2, score=clipjax.scores.taylor()),
        )
    )


def everything(steps: int) -> optax.GradientTransformation:
    """The whole of clipjax: limited gradients, then weights that are bounded, sparse and on a grid, all at once."""
    return optax.chain(
        clipjax.clip_norm(MAX_NORM),
        adam(steps),
        clipjax.clamp_weights(BOUND),
        prune(steps // 8, steps // 2),
        clipjax.fake_quantize(BITS, start=5 * steps // 8),
    )


def quantize_then_prune(steps: int) -> optax.GradientTransformation:
    """D0: prune on top of a quantized network. A weight that falls from its grid to 0 is still on it."""
    return optax.chain(
        clipjax.clip(LIMIT),
        clipjax.fake_quantize(BITS, start=steps // 8, inner=adam(steps)),
        prune(3 * steps // 8, 3 * steps // 4),
    )


def prune_then_quantize(steps: int) -> optax.GradientTransformation:
    """D0: quantize on top of a pruned network."""
    return optax.chain(
        clipjax.clip(LIMIT),
        adam(steps),
        prune(steps // 8, steps // 2),
        clipjax.fake_quantize(BITS, start=5 * steps // 8),
    )


def sampled_units(steps: int) -> optax.GradientTransformation:
    """D0: sample half of every hidden layer's units, cut the weakest half of these, quantize into an interval."""
    return optax.chain(
        adam(steps),
        clipjax.prune_mask(
            0.5,
            structure=clipjax.structures.unit(),
            scope="leaf",
            select=clipjax.selections.bernoulli(0.5),
            where=lambda path, leaf: path.endswith("kernel") and "logits" not in path,  # its units are the ten answers
            start=steps // 4,
            key=jax.random.key(0),
        ),
        clipjax.fake_quantize(BITS, step=clipjax.steps.interval(*INTERVAL), start=steps // 2),
    )


def compressed(steps: int) -> optax.GradientTransformation:
    """From trained weights: prune in the first half of the steps, quantize in the second."""
    return optax.chain(
        clipjax.clip_norm(MAX_NORM),
        adam(steps, rate=1e-3),
        clipjax.clamp_weights(BOUND),
        prune(0, steps // 2),
        clipjax.fake_quantize(BITS, start=steps // 2, every=10),
    )


class Row(NamedTuple):
    """One row of the table: a chain made for a number of steps, and what it promises of the final params."""

    what: str
    chain: Callable[[int], optax.GradientTransformation]
    promise: Promise = Promise()


clip, clamp = clipjax.clip(LIMIT), clipjax.clamp_weights(BOUND)
quantize = clipjax.fake_quantize(BITS)
ALL = Promise(bound=BOUND, sparsity=SPARSITY, bits=BITS)
SPARSE_GRID = Promise(sparsity=SPARSITY, bits=BITS)
ROWS = {
    "a": Row("plain Adam", adam),
    "b": Row("clip", lambda n: optax.chain(clip, adam(n))),
    "c": Row("clamp", lambda n: optax.chain(adam(n), clamp), Promise(bound=BOUND)),
    "d": Row("clip + clamp (D3)", lambda n: optax.chain(clip, adam(n), clamp), Promise(bound=BOUND)),
    "e": Row("(d), prune by gradient (D2)", gradient_pruned, Promise(bound=BOUND, sparsity=SPARSITY)),
    "f": Row("quantize", lambda n: optax.chain(adam(n), quantize), Promise(bits=BITS)),
    "g": Row("clip + quantize (D4)", lambda n: optax.chain(clip, adam(n), quantize), Promise(bits=BITS)),
    "h": Row("everything", everything, ALL),
    "i": Row("quantize → prune (D0)", quantize_then_prune, SPARSE_GRID),
    "j": Row("prune → quantize (D0)", prune_then_quantize, SPARSE_GRID),
    "k": Row("units → interval (D0)", sampled_units, Promise(units=1, bits=BITS, interval=INTERVAL)),
    "l": Row(f"trained (a), {SHORT} epochs", compressed, ALL),
}
COLUMNS = ("", "chain", "accuracy", "precision", "sparsity", "units cut", "bits", "file bytes", "entropy", "time")


def train_rows(args: argparse.Namespace, data: training.Data, console: Console) -> dict[str, training.Run]:
    """Trains the wanted rows side by side, row (l) after them, under one progress bar, and asserts their promises."""
    together = sorted((set(args.rows) | set("a" if "l" in args.rows else "")) - {"l"})
    short = min(args.epochs, SHORT) if "l" in args.rows else 0
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=args.epochs * len(together) + short)

        def train(letters, epochs, params):
            steps = epochs * (len(data.x) // data.batch)
            chains = {letter: ROWS[letter].chain(steps) for letter in letters}
            return training.train(data, chains, params, epochs=epochs, seed=args.seed, on_turn=on_turn)

        def on_turn(letter, epochs):
            doing = "" if epochs else "compile "
            progress.update(bar, advance=epochs, description=f"{doing}({letter}) {ROWS[letter].what}")

        runs = train(together, args.epochs, training.init(data, args.seed))
        if short:
            runs |= train("l", short, runs["a"].params)
    for letter, run in runs.items():
        held = measuring.check(run.params, run.opt_state, ROWS[letter].promise)
        console.print(f"({letter}) {held or 'promises nothing'}", style="dim", highlight=False)
    return runs


def cells(letter: str, run: training.Run, runs: dict[str, training.Run], data: training.Data) -> list[str]:
    """Returns one row of the table as text."""
    precision = precision_score(data.y_test, run.predicted, average="macro", zero_division=0.0)
    removed, total = measuring.units(run.params)
    size = measuring.file_size(run.params)
    entropy = clipjax.summarize(run.params, widths=()).to_dict()["total"]["entropy_bytes"]
    base = runs.get("a")
    return [
        letter,
        ROWS[letter].what,
        f"{run.accuracy[-1]:.2%}",
        f"{precision:.2%}",
        f"{measuring.sparsity(run.params):.1%}",
        f"{removed} / {total}",
        str(ROWS[letter].promise.bits or 32),
        f"{size:,}" + (f" ({measuring.file_size(base.params) / size:.1f}x)" if base else ""),
        f"{entropy:,}",
        f"{seconds(run) / seconds(base):.2f}" if base else "-",
    ]


def seconds(run: training.Run) -> float:
    """Returns the time of a training, from its median epoch: what else the machine did then must not count."""
    return len(run.seconds) * float(np.median(run.seconds))


def reload(runs: dict[str, training.Run], args: argparse.Namespace) -> str:
    """Saves row (h), or the smallest one, loads it in a fresh process, and returns in words that nothing changed."""
    letter = "h" if "h" in runs else min(runs, key=lambda letter: measuring.file_size(runs[letter].params))
    path = args.out / f"{letter}.safetensors"
    clipjax.save(path, runs[letter].params)
    command = [sys.executable, __file__, "--evaluate", str(path), "--data", args.data]
    command += ["--data-dir", args.data_dir] * (args.data_dir is not None)
    accuracy = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert accuracy == runs[letter].accuracy[-1], f"{accuracy} after loading, {runs[letter].accuracy[-1]} before"
    raw = sum(leaf.nbytes for leaf in jax.tree.leaves(runs[letter].params))
    return f"wrote {path}: {path.stat().st_size:,} bytes for {raw:,}; a fresh process loads it and finds {accuracy:.2%}"


def show(rows: list[list[str]], caption: str, console: Console, folder: Path) -> None:
    """Prints the table and writes it as Markdown."""
    table = Table(*COLUMNS, caption=caption, caption_justify="left")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(*row)
    console.print(table)
    rule = ["---", "---"] + ["---:"] * (len(COLUMNS) - 2)
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, rule, *rows)]
    (folder / "digits.md").write_text("\n".join([*lines, "", caption, ""]), encoding="utf-8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", help="where MNIST's four IDX files are, .gz or not")
    parser.add_argument("--rows", default="".join(ROWS), help="letters of the table's rows, such as ah")
    parser.add_argument("--epochs", type=int, help="default: 40 for the digits, 5 for MNIST")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, only to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="only print the accuracy of saved params")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the table and the figures go")
    args = parser.parse_args(arguments)
    if args.data == "mnist" and args.data_dir is None:
        parser.error("--data mnist needs --data-dir DIR, the folder of its IDX files.")
    if not args.rows or set(args.rows) - set(ROWS):
        parser.error(f"--rows takes letters of {''.join(ROWS)}, got {args.rows!r}.")
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}.")
    return args


def main() -> None:
    """Trains the rows, prints and writes the table, draws the figures."""
    args = parse()
    data = training.load(args.data, args.data_dir)
    if args.evaluate:
        print(float(np.mean(training.predict(clipjax.load(args.evaluate), data.x_test) == data.y_test)))
        return
    args.epochs = args.epochs or max(2, data.epochs // 10 if args.quick else data.epochs)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    runs = train_rows(args, data, console)
    caption = (
        f"{args.data}, {args.epochs} epochs of {len(data.x) // data.batch} steps, seed {args.seed}; "
        f"{os.cpu_count()}-core {os.uname().machine} {jax.default_backend().upper()}, jax {jax.__version__}. "
        "file bytes: what clipjax.save writes; entropy: an order-0 code of all params. "
        "time: train steps alone, relative to (a)."
    )
    show([cells(letter, run, runs, data) for letter, run in runs.items()], caption, console, args.out)
    console.print(reload(runs, args), highlight=False)
    for path in figures.draw(runs, {letter: ROWS[letter].what for letter in runs}, args.out):
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
