"""Question: how small can the file of a LeNet be, zeros and grids trained by one chain, at the error of published work?

    python benchmarks/weights/headline.py --data-dir DIR --seeds 5                # every row from scratch
    python benchmarks/weights/headline.py --data-dir DIR --row LeNet-300-100-80x  # one row
    python benchmarks/weights/headline.py --data-dir DIR --tune                   # all that was tried, held out
    python benchmarks/weights/headline.py --table [--tune]                        # what is saved, without training

Goals are bytes of the file that `clipjax.save` writes and test errors, means over seeds: those of GOALS below. What
others published stands beside them (headline_figures.py), also what is smaller or better.

Recipes were chosen on the last 10,000 training images with one seed (headline_chains.py has all that was tried); test
images see the final nets alone. Rows with a distortion train on distorted images. Every run asserts its zeros, its
grids, and that the file gives back the very bits. Runs are kept beside this file, in headline.jsonl, and are not
repeated.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import headline_chains as chains
import headline_figures as records
import jax
import jax.numpy as jnp
import lenet_figures as figures
import lenet_training as training
import measuring
import numpy as np
from headline_chains import Recipe
from lenet import TUNING_SEED, Store, collect, file_bytes, markdown, plan, saved, spread
from rich.progress import track

import clipjax


class Goal(NamedTuple):
    """At most so much error, in percent, in at most so many bytes."""

    error: float
    bytes: float


class Row(NamedTuple):
    """A recipe with its goal."""

    name: str
    network: str
    goal: Goal | None
    recipe: Recipe

    def key(self, seed: int, validate: bool) -> str:
        """Names a run: one that is saved under the same name is not repeated."""
        later = {"units": (), "lam": 0.0, "distortion": 0.0}  # without these, runs are saved under their old names
        setting = ", ".join(f"{k} {v}" for k, v in self.recipe._asdict().items() if later.get(k) != v)
        return f"{self.network}, {setting}, seed {seed}, {'validation' if validate else 'test'}"


RAW = {"LeNet-300-100": 1_066_440, "LeNet-5": 1_724_320}  # bytes of the whole network's f32 arrays
GOALS = {
    "LeNet-300-100-80x": Goal(1.64, RAW["LeNet-300-100"] / 80),
    "LeNet-300-100-120x": Goal(1.92, RAW["LeNet-300-100"] / 120),
    "LeNet-300-100-6kB": Goal(1.6, 6_000),
    "LeNet-300-100-4.5kB": Goal(1.9, 4_500),
    "LeNet-5-4.5kB": Goal(0.76, 4_500),
    "LeNet-5-200x": Goal(0.80, RAW["LeNet-5"] / 200),
}
ROWS = tuple(Row(name, name.rpartition("-")[0], goal, chains.BEST[name]) for name, goal in GOALS.items())


def train(rows: Iterable[Row], seeds: Iterable[int], folder: Path, validate: bool, store: Store) -> None:
    """Trains what is missing."""
    missing = [(row, seed) for row in rows for seed in seeds if row.key(seed, validate) not in store.runs]
    if not missing:
        return
    data = training.load(folder, validate)

    @functools.cache
    def seen(distortion: float) -> training.Data:
        return data._replace(x=training.distorted(data.x, distortion)) if distortion else data

    @functools.cache
    def program(row: Row, shapes: str) -> Any:
        assert not (row.recipe.mix and row.recipe.distortion), "A teacher answers for the images as they are."
        build = functools.partial(chains.chain, row.network, row.recipe)
        return training.trainer(
            row.network, seen(row.recipe.distortion), build, row.recipe.lesson, begin=begins[shapes]
        )

    @functools.cache
    def first(network: str, units: tuple[float, ...], distortion: float) -> Callable[[int], tuple[Any, float]]:
        analysis = chains.analysis(network)
        build = functools.partial(chains.thin, network, analysis.groups, units)
        run = training.trainer(network, seen(distortion), build, chains.FIRST[0])

        def cut(seed: int) -> tuple[Any, float]:
            params, _, seconds = run(0.0, seed)
            return clipjax.shrink(params, analysis).variables, seconds

        return cut

    @functools.cache
    def dense(network: str) -> Any:
        lesson, rate, decay = chains.TEACHER
        return training.trainer(network, data, lambda c: chains.optimizer(rate, decay, c.steps), lesson)

    @functools.cache
    def taught(network: str, seed: int) -> tuple[jax.Array, float]:
        params, _, seconds = dense(network)(0.0, seed)
        return jnp.asarray(training.answers(network, params, data.x)), seconds

    begins: dict[str, Any] = {}
    for row, seed in track(missing, description="trainings"):
        recipe = row.recipe
        begin, spent = first(row.network, recipe.units, recipe.distortion)(seed) if recipe.units else (None, 0.0)
        logits, before = taught(row.network, seed) if recipe.mix else (None, 0.0)
        begins[shapes := str(jax.tree.map(jnp.shape, begin))] = begin
        params, opt_state, seconds = program(row, shapes)(0.0, seed, logits, begin)
        seconds += spent + before
        store.add(row.key(seed, validate), {"seconds": seconds, **measure(row, params, opt_state, data)})


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
        "raw": RAW[row.network],
        "jax": jax.__version__,
    }


def check(recipe: Recipe, params: Any, opt_state: Any) -> None:
    """Asserts what the chain promises."""
    kernels = measuring.kernels(params)
    several = isinstance(recipe.level, tuple)
    pools = (
        list(zip(kernels, recipe.level, strict=True))
        if several
        else [(np.concatenate([k.ravel() for k in kernels]), recipe.level)]
    )
    for weights, level in pools:
        assert (weights == 0).sum() >= round(level * weights.size), (
            f"{(weights == 0).mean():.4f} zeros, {level} promised"
        )
    for (name, leaves), bits in zip(clipjax.quantized(params, opt_state).items(), recipe.bits, strict=True):
        for kind, grid in leaves.items():
            assert (clipjax.dequantize(grid) == params[name][kind]).all(), f"{name}/{kind} is off its grid"
            width = recipe.bias_bits if kind == "bias" else bits
            assert np.abs(grid.codes).max() < 2 ** (width - 1), f"{name}/{kind} needs more than {width} bits"


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
            verdicts.append(verdict(row, float(np.mean(columns["error"])), float(np.mean(columns["bytes"])), len(runs)))
    if table[1:]:
        print(markdown(table))
    print(*verdicts, sep="\n")


def verdict(row: Row, error: float, size: float, seeds: int) -> str:
    """How a goal came out."""
    holds = error <= row.goal.error and size <= row.goal.bytes
    most = f"at most {row.goal.bytes:,.0f} bytes and {row.goal.error:.2f} % wrong"
    return f"{row.name}: {size:,.0f} bytes, {error:.3f} % over {seeds} seeds ({most}): {'holds' if holds else 'FAILS'}"


def draw(rows: Iterable[Row], seeds: Iterable[int], store: Store, path: Path) -> None:
    """Our rows beside the published files; and those of LeNet-300-100 among all that lenet.py tried."""
    points = []
    for row in rows:
        runs = [store.runs[key] for seed in seeds if (key := row.key(seed, False)) in store.runs]
        if runs:
            size, error = (float(np.mean([run[key] for run in runs])) for key in ("bytes", "error"))
            deviation = float(np.std([run["error"] for run in runs], ddof=len(runs) > 1))
            points.append(records.Point(row.network, row.name, size, error, deviation))
    records.draw(points, path)
    cells = collect(plan("LeNet-300-100"), seeds, False, Store(saved(path.with_name("lenet.jsonl"))))
    marked = [(f"headline.py, {p.bytes:,.0f} bytes", p.bytes, p.error) for p in points if p.network == "LeNet-300-100"]
    if cells and marked:
        figures.against_bytes(cells, path.with_name("pareto.png"), marked)


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
        print(f"\n{records.table()}")
        if options.row is None:
            draw(rows, seeds, store, options.out.with_name("headline.png"))


if __name__ == "__main__":
    main()
