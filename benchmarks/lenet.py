"""Question: which score prunes LeNet best on MNIST, and is magnitude at 95 % of zeros at most 1.8 % wrong?

    python benchmarks/lenet.py --data-dir DIR --quick     # LeNet-300-100, three seeds, ten minutes on 2 idle cores
    python benchmarks/lenet.py --data-dir DIR --tune      # every setting that was tried, on validation images
    python benchmarks/lenet.py --table --quick            # from what is saved, without training

Every row is one chain around the same optimizer (lenet_chains.py), trained for the same epochs from the same first
params on the same batches, the whole training one compiled program (lenet_training.py). Seeds are the outermost loop:
what else the machine does slows all rows alike, and an interrupted run has complete tables of fewer seeds. After every
run the exact count of zeros is asserted. Runs are kept in out/lenet.jsonl as they end and are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import lenet_chains as chains
import lenet_training as training
import measuring
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.metrics import precision_score

LEVELS, EPOCHS, TUNING_SEED = (0.9, 0.95, 0.98), 16, 100
QUICK = ("random", "magnitude", "gradient, smoothed", "Taylor", "movement", "SNIP", "RigL", "straight-through")
PUBLISHED = """\
| published | 90 % | 92 % | 95 % | 98 % |
| --- | ---: | ---: | ---: | ---: |
| dense 1.64, pruned (Han et al., 2015, arXiv 1506.02626, table 1) | | 1.59 | | |
| dense 1.7, SNIP (Lee et al., 2019, arXiv 1810.02340, table 1) | | | 1.6 | 2.4 |"""

Facts = dict[str, Any]


class Cell(NamedTuple):
    """One cell of the tables: a method with one setting at one sparsity."""

    method: str
    setting: dict[str, Any]
    level: float

    def key(self, seed: int, validate: bool) -> str:
        """Names a run: one that is saved under the same name is not repeated."""
        where = "validation" if validate else "test"
        return f"{self.method} {self.setting} {self.level} seed {seed}, {EPOCHS} x {training.BATCH}, {where}"


def cells(names: Iterable[str], levels: tuple[float, ...], tried: bool = False) -> list[Cell]:
    """The cells of some methods; of all the settings that were tried, or of the one in use."""
    return [
        Cell(name, setting, level)
        for name in names
        for setting in (chains.METHODS[name].tried if tried else (chains.METHODS[name].setting,))
        for level in (levels if name != "dense" else (0.0,))
    ]


class Store:
    """The runs that are saved, a JSON line each."""

    def __init__(self, path: Path):
        """Reads what is there; a line that a kill cut short counts as missing."""
        self.path, self.runs = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                facts = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.runs[facts["key"]] = facts

    def add(self, key: str, facts: Facts) -> None:
        """Saves a run."""
        self.runs[key] = {"key": key, **facts}
        with self.path.open("a") as file:
            file.write(json.dumps(self.runs[key]) + "\n")


def train(grid: list[Cell], seeds: Iterable[int], folder: Path, validate: bool, store: Store) -> None:
    """Trains what is missing."""
    missing = [(cell, seed) for seed in seeds for cell in grid if cell.key(seed, validate) not in store.runs]
    if not missing:
        return
    data, model = training.load(folder, validate), training.LeNet300()

    @functools.cache
    def program(method: str, setting: str) -> Callable[..., Any]:
        def chain(course: training.Course) -> Any:
            return chains.METHODS[method].chain(course, chains.adam(course), **json.loads(setting))

        return training.trainer(model, data, chain, EPOCHS)

    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(missing))
        for cell, seed in missing:
            progress.update(bar, description=f"{cell.method}, {cell.level:.0%}, seed {seed}")
            params, _, seconds = program(cell.method, json.dumps(cell.setting))(cell.level, seed)
            predicted = training.predict(model, params, data.x_test)
            store.add(cell.key(seed, validate), {"seconds": seconds, **measure(cell, params, predicted, data.y_test)})
            progress.advance(bar)


def measure(cell: Cell, params: Any, predicted: np.ndarray, labels: np.ndarray) -> Facts:
    """What a run came to; asserts that exactly the zeros are there that its chain promises."""
    kernels = measuring.kernels(params)
    zeros, wanted = sum(int((k == 0).sum()) for k in kernels), round(cell.level * sum(k.size for k in kernels))
    assert zeros == wanted, f"{cell}: {zeros} zeros, {wanted} promised"
    return {
        "error": 100 * float(np.mean(predicted != labels)),
        "precision": 100 * float(precision_score(labels, predicted, average="macro", zero_division=0.0)),
        "zeros": zeros,
        "jax": jax.__version__,
    }


def collect(grid: list[Cell], seeds: Iterable[int], validate: bool, store: Store) -> dict[int, list[Facts]]:
    """The saved runs of every cell, by its place in the grid."""
    keys = {i: [cell.key(seed, validate) for seed in seeds] for i, cell in enumerate(grid)}
    return {i: [store.runs[key] for key in row if key in store.runs] for i, row in keys.items()}


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if values[1:] else "")


def table(grid: list[Cell], runs: dict[int, list[Facts]], levels: tuple[float, ...], tried: bool = False) -> str:
    """Test error of every row at every sparsity, and its train time against dense."""
    head = ["error, %", *(["setting"] if tried else []), *(f"{level:.0%} zeros" for level in levels), "time, x dense"]
    lines = [head, ["---"] * (1 + tried) + ["---:"] * (len(levels) + 1)]
    base = [f["seconds"] for i, cell in enumerate(grid) for f in runs[i] if cell.method == "dense"]
    rows: dict[tuple[str, str], dict[float, list[Facts]]] = {}
    for i, cell in enumerate(grid):
        if runs[i]:
            rows.setdefault((cell.method, json.dumps(cell.setting)), {})[cell.level] = runs[i]
    for (method, setting), row in rows.items():
        spent = [f["seconds"] for found in row.values() for f in found]
        errors = {level: spread([f["error"] for f in found]) for level, found in row.items()}
        name = f"{method} ({errors[0.0]})" if 0.0 in errors else method
        time = f"{np.median(spent) / np.median(base):.2f}" if base else ""
        lines.append([name, *([setting] if tried else []), *(errors.get(level, "") for level in levels), time])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(path: Path, grid: list[Cell], runs: dict[int, list[Facts]]) -> None:
    """One line a cell: means and standard deviations over its seeds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        facts = ("error", "precision", "seconds", "zeros")
        writer.writerow(["method", "setting", "level", "seeds", *(f"{f} {m}" for f in facts for m in ("mean", "sd"))])
        for i, cell in enumerate(grid):
            if runs[i]:
                columns = [[run[fact] for run in runs[i]] for fact in facts]
                sd = [np.std(c, ddof=1) if c[1:] else 0.0 for c in columns]
                numbers = [f"{x:.4f}" for mean, s in zip(map(np.mean, columns), sd, strict=True) for x in (mean, s)]
                writer.writerow([cell.method, json.dumps(cell.setting), cell.level, len(runs[i]), *numbers])


def verdict(grid: list[Cell], runs: dict[int, list[Facts]]) -> str:
    """Whether magnitude at 95 % is as good as it must be."""
    errors = [f["error"] for i, cell in enumerate(grid) for f in runs[i] if cell[::2] == ("magnitude", 0.95)]
    holds = "holds" if errors and np.mean(errors) <= 1.8 else "FAILS"
    return f"magnitude at 95 %: {spread(errors) if errors else 'no run'} % (at most 1.8 %): {holds}"


def main() -> None:
    """Trains what is missing, and prints the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where MNIST's four IDX files are, .gz or not")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "out", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="three seeds, and the scores that issue no history")
    parser.add_argument("--tune", action="store_true", help="every setting tried, at 95 %% on validation images")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is saved")
    options = parser.parse_args()
    if options.data_dir is None and not options.table:
        parser.error("--data-dir DIR is needed to train: the folder of MNIST's IDX files.")
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(options.out / "lenet.jsonl")
    names, levels = ["dense", *(QUICK if options.quick else tuple(chains.METHODS)[1:])], LEVELS
    seeds: Iterable[int] = range(3) if options.quick else range(5)
    if options.tune:
        levels, seeds = (0.95,), (TUNING_SEED,)
    grid = cells(names, levels, options.tune)
    if not options.table:
        train(grid, seeds, options.data_dir, options.tune, store)
    runs = collect(grid, seeds, options.tune, store)
    name = "lenet-tune" if options.tune else "lenet-quick" if options.quick else "lenet"
    body = table(grid, runs, levels, options.tune)
    write_csv(options.out / f"{name}.csv", grid, runs)
    (options.out / f"{name}.md").write_text(body + "\n")
    print(body)
    if not options.tune:
        print(f"\n{PUBLISHED}\n\n{verdict(grid, runs)}")


if __name__ == "__main__":
    main()
