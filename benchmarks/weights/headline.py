"""Question: how small can the file of a LeNet be, zeros and grids trained by one chain, at the error of published work?

    python benchmarks/weights/headline.py --data-dir DIR --seeds 5                # every row from scratch
    python benchmarks/weights/headline.py --data-dir DIR --row LeNet-300-100-80x  # one row
    python benchmarks/weights/headline.py --data-dir DIR --tune                   # all that was tried, held out
    python benchmarks/weights/headline.py --table [--tune]                        # what is saved, without training

Goals, as bytes of the file that `clipjax.save` writes against those of the f32 arrays, mean over seeds: LeNet-300-100
at least 80x at 1.64 % test error (Deep Compression has 40x at 1.58 %, its reference 1.64 %) and 120x at 1.92 %
(Sparse Variational Dropout has 68x fewer weights there); LeNet-5 at least 200x at .80 %.

Recipes were chosen on the last 10,000 training images with one seed (headline_chains.py has all that was tried); test
images see the final nets alone. No augmentation. Every run asserts its zeros, its grids, and that the file gives back
the very bits. Runs are kept beside this file, in headline.jsonl, and are not repeated.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import headline_chains as chains
import jax
import jax.numpy as jnp
import lenet_figures as figures
import lenet_training as training
import measuring
import numpy as np
from headline_chains import Recipe
from lenet import TUNING_SEED, Store, collect, file_bytes, markdown, plan, saved, spread
from measuring import Promise
from rich.progress import track

import clipjax

PUBLISHED = """\
| published | error, % | reference, % | x |
| --- | ---: | ---: | ---: |
| LeNet-300-100, Deep Compression (Han et al., 2016, arXiv 1510.00149), file | 1.58 | 1.64 | 40 |
| LeNet-5, Deep Compression, file | 0.74 | 0.80 | 39 |
| LeNet-300-100, Sparse Variational Dropout (Molchanov et al., 2017, arXiv 1701.05369), weights | 1.92 | 1.64 | 68 |
| LeNet-5, Sparse Variational Dropout, weights | 0.75 | 0.80 | 280 |"""


class Goal(NamedTuple):
    """At most so much error, in percent, at least so many times smaller."""

    error: float
    times: float


class Row(NamedTuple):
    """A recipe with its goal."""

    name: str
    network: str
    goal: Goal | None
    recipe: Recipe

    def key(self, seed: int, validate: bool) -> str:
        """Names a run: one that is saved under the same name is not repeated."""
        setting = ", ".join(f"{k} {v}" for k, v in self.recipe._asdict().items())
        return f"{self.network}, {setting}, seed {seed}, {'validation' if validate else 'test'}"


ROWS = (
    Row("LeNet-300-100-80x", "LeNet-300-100", Goal(1.64, 80), chains.BEST["LeNet-300-100-80x"]),
    Row("LeNet-300-100-120x", "LeNet-300-100", Goal(1.92, 120), chains.BEST["LeNet-300-100-120x"]),
    Row("LeNet-5-200x", "LeNet-5", Goal(0.80, 200), chains.BEST["LeNet-5-200x"]),
)


def train(rows: Iterable[Row], seeds: Iterable[int], folder: Path, validate: bool, store: Store) -> None:
    """Trains what is missing."""
    missing = [(row, seed) for row in rows for seed in seeds if row.key(seed, validate) not in store.runs]
    if not missing:
        return
    data = training.load(folder, validate)

    @functools.cache
    def program(row: Row) -> Any:
        return training.trainer(
            row.network, data, functools.partial(chains.chain, row.network, row.recipe), row.recipe.lesson
        )

    @functools.cache
    def dense(network: str) -> Any:
        lesson, rate, decay = chains.TEACHER
        return training.trainer(network, data, lambda c: chains.optimizer(rate, decay, c.steps), lesson)

    @functools.cache
    def taught(network: str, seed: int) -> tuple[jax.Array, float]:
        params, _, seconds = dense(network)(0.0, seed)
        return jnp.asarray(training.answers(network, params, data.x)), seconds

    for row, seed in track(missing, description="trainings"):
        logits, before = taught(row.network, seed) if row.recipe.mix else (None, 0.0)
        params, opt_state, seconds = program(row)(0.0, seed, logits)
        store.add(row.key(seed, validate), {"seconds": before + seconds, **measure(row, params, opt_state, data)})


def measure(row: Row, params: Any, opt_state: Any, data: training.Data) -> dict[str, Any]:
    """What a run came to; asserts the zeros, that every leaf is on its grid, and the file."""
    check(row.recipe, params, opt_state)
    predicted = training.answers(row.network, params, data.x_test).argmax(-1)
    kernels = measuring.kernels(params)
    return {
        "error": 100 * float(np.mean(predicted != data.y_test)),
        "zeros": [round(100 * float((kernel == 0).mean()), 3) for kernel in kernels],
        "sparsity": 100 * measuring.sparsity(params),
        "bytes": file_bytes(params),
        "raw": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "jax": jax.__version__,
    }


def check(recipe: Recipe, params: Any, opt_state: Any) -> None:
    """Asserts what the chain promises."""
    kernels = {name: {"kernel": leaves["kernel"]} for name, leaves in params.items()}
    several = isinstance(recipe.level, tuple)
    measuring.check(kernels, opt_state, Promise(sparsity=None if several else recipe.level, bits=max(recipe.bits)))
    for kernel, level in zip(measuring.kernels(params), recipe.level if several else (), strict=several):
        assert (kernel == 0).sum() >= round(level * kernel.size), f"{(kernel == 0).mean():.4f} zeros, {level} promised"
    for name, leaves in clipjax.quantized(params, opt_state).items():
        grid = leaves["bias"]
        assert (clipjax.dequantize(grid.codes, grid.step) == params[name]["bias"]).all(), f"{name}: a bias is off"


def show(rows: Iterable[Row], seeds: Iterable[int], validate: bool, store: Store) -> None:
    """Prints the table, and a verdict for every goal."""
    table = [["row", "error, %", "zeros, %", "bits", "bytes", "x", "min", "seeds"]]
    verdicts = []
    for row in rows:
        runs = [store.runs[key] for seed in seeds if (key := row.key(seed, validate)) in store.runs]
        if not runs:
            verdicts.append(f"{row.name}: no run is saved")
            continue
        columns: dict[str, list[Any]] = {key: [run[key] for run in runs] for key in runs[0]}
        times = columns["raw"][0] / np.mean(columns["bytes"])
        table.append(
            [
                row.name,
                spread(columns["error"]),
                f"{np.mean(columns['sparsity']):.2f}",
                " ".join(map(str, (*row.recipe.bits, row.recipe.bias_bits))),
                spread(columns["bytes"], 0),
                f"{times:.1f}",
                f"{np.median(columns['seconds']) / 60:.1f}",
                str(len(runs)),
            ]
        )
        if row.goal is not None:
            verdicts.append(verdict(row, float(np.mean(columns["error"])), float(times), len(runs)))
    if table[1:]:
        print(markdown(table))
    print(*verdicts, sep="\n")


def verdict(row: Row, error: float, times: float, seeds: int) -> str:
    """How a goal came out."""
    holds = error <= row.goal.error and times >= row.goal.times
    least = f"at least {row.goal.times}x at most {row.goal.error:.2f} % wrong"
    return f"{row.name}: {times:.1f}x, {error:.3f} % over {seeds} seeds ({least}): {'holds' if holds else 'FAILS'}"


def draw(rows: Iterable[Row], seeds: Iterable[int], store: Store, path: Path) -> None:
    """The headline of LeNet-300-100 and Deep Compression among all that lenet.py tried."""
    cells = collect(plan("LeNet-300-100"), seeds, False, Store(saved(path.with_name("lenet.jsonl"))))
    marked = []
    for row in rows:
        runs = [store.runs[key] for seed in seeds if (key := row.key(seed, False)) in store.runs]
        if row.network == "LeNet-300-100" and runs:
            size, error = (float(np.mean([run[key] for run in runs])) for key in ("bytes", "error"))
            raw = runs[0]["raw"]
            marked.append((f"headline.py, {raw / size:.0f}x", size, error))
    if cells and marked:
        marked.append(("Deep Compression, as published", raw / 40, 1.58))
        figures.against_bytes(cells, path, marked)


def main() -> None:
    """Trains what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where MNIST's four IDX files are, .gz or not")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the file of the runs")
    parser.add_argument("--row", choices=[row.name for row in ROWS], help="this one alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="every recipe tried, on validation images, one seed")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is saved")
    options = parser.parse_args()
    if options.data_dir is None and not options.table:
        parser.exit(message="Skipped: --data-dir DIR is needed to train, the folder of MNIST's IDX files.\n")
    rows = [row for row in ROWS if options.row in (None, row.name)]
    seeds: Iterable[int] = range(options.seeds)
    if options.tune:
        networks = dict.fromkeys(row.network for row in rows)
        rows = [Row(f"{n}: {r.words}", n, None, r) for n in networks for r in chains.TRIED[n]]
        seeds = (TUNING_SEED,)
    store = Store(options.out)
    if not options.table:
        train(rows, seeds, options.data_dir, options.tune, store)
    show(rows, seeds, options.tune, store)
    if not options.tune:
        print(f"\n{PUBLISHED}")
        if options.row is None:
            draw(rows, seeds, store, options.out.with_name("pareto.png"))


if __name__ == "__main__":
    main()
