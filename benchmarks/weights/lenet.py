"""Question: which score prunes LeNet best on MNIST, and is magnitude at 95 % of zeros at most 1.8 % wrong?

    python benchmarks/weights/lenet.py --data-dir DIR                    # LeNet-300-100: an hour and a half on one core
    python benchmarks/weights/lenet.py --data-dir DIR --network LeNet-5  # 64 trainings a seed, of seven to nine minutes
    python benchmarks/weights/lenet.py --data-dir DIR --quick            # three seeds, ten minutes on 2 idle cores
    python benchmarks/weights/lenet.py --data-dir DIR --tune             # every setting tried, on validation images
    python benchmarks/weights/lenet.py --data-dir DIR --together         # all seeds of a cell as one batch, for a GPU
    python benchmarks/weights/lenet.py --table --quick                   # from what is saved, without training

Every row is one chain around the same optimizer (lenet_chains.py), trained for the same epochs from the same first
params on the same batches, the whole training one compiled program (lenet_training.py). Seeds are the outermost loop:
what else the machine does slows all rows alike, and an interrupted run has complete tables of fewer seeds. After every
run the exact count of zeros is asserted. Runs are kept in out/lenet.jsonl as they end and are not repeated; where there
are none, --table prints those that are committed beside this file.
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
import lenet_figures as figures
import lenet_training as training
import measuring
import numpy as np
from measuring import Promise
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.metrics import precision_score

import clipjax

LEVELS = {"LeNet-300-100": (0.9, 0.95, 0.98), "LeNet-5": (0.95, 0.98, 0.99)}
BITS = (2, 3, 4, 5, "chosen")
LESSON = training.Lesson(epochs=16, dropout=0.1)  # of every row
TUNING_SEED = 100
NETWORK = "LeNet-300-100"
QUICK = ("dense", "random", "magnitude", "gradient, smoothed", "Taylor", "movement", "SNIP", "RigL", "straight-through")
PUBLISHED = """\
| published | 90 % | 92 % | 95 % | 96.4 % | 98 % |
| --- | ---: | ---: | ---: | ---: | ---: |
| dense 1.64, pruned (Han et al., 2015, arXiv 1506.02626, table 1) | | 1.59 | | | |
| dense 1.7, SNIP (Lee et al., 2019, arXiv 1810.02340, table 1) | | | 1.6 | | 2.4 |
| winning tickets (Frankle and Carbin, 2019, arXiv 1803.03635) | | | | as dense | |"""

KNOWN = {"SNIP, published": {0.95: 1.6, 0.98: 2.4}, "Han et al., published": {0.92: 1.59}}  # the same, for the figure

Facts = dict[str, Any]


class Cell(NamedTuple):
    """One cell of the tables: a chain at one sparsity."""

    method: str
    setting: dict[str, Any]
    level: float
    limits: bool = False
    bits: int | str | None = None
    network: str = "LeNet-300-100"

    @property
    def row(self) -> str:
        """The name of its row."""
        extras = [" + D3"] * self.limits + [f" + {self.bits} bits"] * (self.bits is not None)
        return self.method + "".join(extras)

    def key(self, seed: int, validate: bool) -> str:
        """Names a run: one that is saved under the same name is not repeated."""
        where = "validation" if validate else "test"
        length = f"{LESSON.epochs} x {LESSON.batch}, dropout {LESSON.dropout}"
        return f"{self.network}, {self.row} {self.setting} {self.level} seed {seed}, {length}, {where}"


def cells(names: Iterable[str], levels: tuple[float, ...], tried: bool = False, **rest: Any) -> list[Cell]:
    """The cells of some methods; of all the settings that were tried, or of the one in use."""
    return [
        Cell(name, setting, level, **rest)
        for name in names
        for setting in (chains.METHODS[name].tried if tried else (chains.METHODS[name].setting,))
        for level in (levels if name != "dense" else (0.0,))
    ]


def plan(network: str) -> list[Cell]:
    """The whole table: every method, each with D3's clippings, and the grids of D4."""
    names, levels = tuple(chains.METHODS), LEVELS[network]
    middle = levels[1:2]
    grid = cells(names, levels, network=network) + cells(names, middle, limits=True, network=network)
    for bits in BITS:
        grid += cells(("dense", "magnitude"), levels, bits=bits, network=network)
    for bits in (4, "chosen"):
        grid += cells(("magnitude",), middle, limits=True, bits=bits, network=network)
    return grid


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


def saved(path: Path) -> Path:
    """The runs of this machine, or those that are committed beside this file."""
    return path if path.exists() else Path(__file__).with_name(path.name)


def train(
    grid: list[Cell], seeds: Iterable[int], folder: Path, validate: bool, store: Store, together: bool = False
) -> None:
    """Trains what is missing: seed by seed, or all seeds of a cell together."""
    jobs = [(i, seed) for seed in seeds for i, c in enumerate(grid) if c.key(seed, validate) not in store.runs]
    missing = training.grouped(jobs, together)
    if not missing:
        return
    data = training.load(folder, validate)

    @functools.cache
    def program(row: str, side_by_side: int) -> Callable[..., Any]:
        cell = Cell(**json.loads(row))

        def chain(course: training.Course) -> Any:
            return chains.build(course, cell.method, cell.setting, cell.limits, cell.bits)

        return training.trainer(cell.network, data, chain, LESSON, side_by_side)

    columns = TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(missing))
        for index, group in missing:
            cell = grid[index]
            progress.update(bar, description=f"{cell.row}, {cell.level:.0%}, seed {', '.join(map(str, group))}")
            compiled = functools.partial(program, json.dumps(cell._replace(level=0.0)._asdict()))  # the level is traced
            for seed, params, opt_state, seconds in training.trainings(compiled, cell.level, group, together):
                facts = measure(cell, params, opt_state, data)
                store.add(cell.key(seed, validate), {"seconds": seconds, **facts})
            progress.advance(bar)


def measure(cell: Cell, params: Any, opt_state: Any, data: training.Data) -> Facts:
    """What a run came to; asserts what its chain promises: the exact count of zeros, the bound, the grid."""
    kernels = measuring.kernels(params)
    zeros, wanted = sum(int((k == 0).sum()) for k in kernels), promised(cell, kernels)
    # A weight rounds to 0, or comes back from 0 where no gradient ever moves it.
    comes_back = cell.method == "RigL" or cell.setting.get("carry")
    more = zeros > wanted and (cell.bits is not None or comes_back)
    assert zeros == wanted or more, f"{cell}: {zeros} zeros, {wanted} promised"
    removed = clipjax.report(opt_state).get("prune_mask/removed", 0)
    assert removed == wanted, f"{cell}: a mask without {removed} weights, {wanted} promised"
    widest = 8 if cell.bits == "chosen" else cell.bits
    measuring.check(params, opt_state, Promise(bound=chains.BOUND if cell.limits else None, bits=widest))
    predicted = training.answers(cell.network, params, data.x_test).argmax(-1)
    precision = precision_score(data.y_test, predicted, average="macro", zero_division=0.0)
    return {
        "error": 100 * float(np.mean(predicted != data.y_test)),
        "precision": 100 * float(precision),
        "zeros": 100 * zeros / sum(k.size for k in kernels),
        "bits": widths(params, opt_state) if cell.bits else [32] * len(kernels),
        "bytes": file_bytes(params),
        "raw": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def promised(cell: Cell, kernels: list[Any]) -> int:
    """How many weights a mask removes: with scope "erk" the count of each kernel is rounded, else that of all."""
    if cell.setting.get("scope") != "erk" or not cell.level:
        return round(cell.level * sum(k.size for k in kernels))
    sizes, lines = np.array([k.size for k in kernels], float), np.array([sum(k.shape) for k in kernels], float)
    kept, dense = (1 - cell.level) * sizes.sum(), np.zeros(len(kernels), bool)
    for _ in kernels:  # as dense as rows + columns say, at most wholly
        density = np.where(dense, 1, lines / sizes * (kept - sizes[dense].sum()) / lines[~dense].sum())
        dense = density >= 1
    return sum(round(x) for x in (1 - density) * sizes)


def file_bytes(params: Any) -> int:
    """The length of the file that `clipjax.save` writes; what it holds must come back bit for bit."""
    data = clipjax.pack(params)
    back = clipjax.unpack(data, like=params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, back))), "the file lost a weight"
    return len(data)


def widths(params: Any, opt_state: Any) -> list[int]:
    """The bits of every kernel on a grid."""
    grids = jax.tree.leaves(clipjax.quantized(params, opt_state), is_leaf=lambda x: isinstance(x, clipjax.Quantized))
    return [int(grid.bits) for grid in grids if isinstance(grid, clipjax.Quantized)]


def collect(grid: list[Cell], seeds: Iterable[int], validate: bool, store: Store) -> list[tuple[Cell, list[Facts]]]:
    """The cells of which runs are saved, with these."""
    keys = [(cell, [cell.key(seed, validate) for seed in seeds]) for cell in grid]
    found = [(cell, [store.runs[key] for key in names if key in store.runs]) for cell, names in keys]
    return [(cell, runs) for cell, runs in found if runs]


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if values[1:] else mean


def lines(found: list[tuple[Cell, list[Facts]]]) -> list[dict[str, str]]:
    """Every cell with all that was measured."""
    base: dict[Any, float] = {}  # the least of each device, as noise only adds
    for run in (run for cell, runs in found if cell.row == "dense" for run in runs):
        base[run.get("device")] = min(run["seconds"], base.get(run.get("device"), np.inf))
    table = []
    for cell, runs in found:
        columns: dict[str, list[Any]] = {key: [run.get(key) for run in runs] for key in runs[0]}
        size = np.mean(columns["bytes"])
        times = [run["seconds"] / base[run.get("device")] for run in runs if run.get("device") in base]
        table.append(
            {
                "network": cell.network,
                "row": cell.row,
                "setting": ", ".join(f"{k} {v}" for k, v in cell.setting.items()),
                "error, %": spread(columns["error"]),
                "macro precision, %": spread(columns["precision"]),
                "train time, x dense": f"{min(times):.2f}" if times else "",
                "zeros, %": f"{np.mean(columns['zeros']):.2f}",
                "bits": " ".join(f"{x:.3g}" for x in np.mean(columns["bits"], axis=0)),
                "bytes": f"{size:,.0f}",
                "compression, x": f"{columns['raw'][0] / size:.1f}",
                "seeds": str(len(runs)),
            }
        )
    return table


def markdown(table: list[list[str]]) -> str:
    """The first line is the head; columns of numbers are aligned to the right."""
    columns = ("".join(cell[:1] for cell in column[1:]) for column in zip(*table, strict=True))
    rule = ["---:" if firsts and not firsts.strip("+-0123456789") else "---" for firsts in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in [table[0], rule, *table[1:]])


def errors(found: list[tuple[Cell, list[Facts]]]) -> str:
    """Test error of every row at every sparsity."""
    levels = sorted({cell.level for cell, _ in found} - {0.0})
    rows: dict[tuple[str, str], dict[float, str]] = {}
    for cell, runs in found:
        rows.setdefault((cell.row, str(cell.setting)), {})[cell.level] = spread([run["error"] for run in runs])
    table = [["error, %", "setting", "dense", *(f"{level:.0%} zeros" for level in levels)]]
    table += [[*row, *(cells.get(level, "") for level in (0.0, *levels))] for row, cells in rows.items()]
    return markdown(table)


def verdict(found: list[tuple[Cell, list[Facts]]]) -> str:
    """Whether magnitude at 95 % is as good as it must be."""
    runs = [runs for cell, runs in found if (cell.row, cell.level, cell.network) == ("magnitude", 0.95, NETWORK)]
    if not runs:
        return "magnitude at 95 %: no run is saved"
    reached = [run["error"] for run in runs[0]]
    holds = "holds" if np.mean(reached) <= 1.8 else "FAILS"
    return f"magnitude at 95 %: {spread(reached)} % over {len(reached)} seeds (at most 1.8 %): {holds}"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where MNIST's four IDX files are, .gz or not")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "out", help="folder of the results")
    parser.add_argument("--network", choices=LEVELS, default=NETWORK)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--together", action="store_true", help="all seeds of a cell at once, for a GPU")
    parser.add_argument("--quick", action="store_true", help="three seeds, and scores alone")
    parser.add_argument("--tune", action="store_true", help="every setting tried, at 95 %% on validation images")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is saved")
    options = parser.parse_args()
    if options.data_dir is None and not options.table:
        parser.exit(message="Skipped: --data-dir DIR is needed to train, the folder of MNIST's IDX files.\n")
    return options


def main() -> None:
    """Trains what is missing, and prints the tables and the verdict."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "lenet.jsonl"
    store = Store(saved(path) if options.table else path)
    seeds: Iterable[int] = range(options.seeds)
    if options.tune:
        name, seeds, grid = "lenet-tune", (TUNING_SEED,), cells(chains.METHODS, (0.95,), tried=True)
    elif options.quick:
        name, seeds, grid = "lenet-quick", range(3), cells(QUICK, LEVELS[NETWORK])
    else:
        name, grid = options.network.lower(), plan(options.network)
    if not options.table:
        train(grid, seeds, options.data_dir, options.tune, store, options.together)
    found = collect(grid, seeds, options.tune, store)
    if not found:
        raise SystemExit(f"{store.path} holds no run of this table. Run without --table first.")
    table = lines(found)
    with (options.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    full = markdown([list(table[0]), *(list(line.values()) for line in table)])
    matrix = errors(found)
    (options.out / f"{name}.md").write_text(f"{matrix}\n\n{full}\n")
    print(matrix if options.tune or options.quick else f"{matrix}\n\n{full}")
    if not options.tune:
        figures.against_sparsity(
            found, KNOWN if options.network == NETWORK else {}, options.out / f"{name}-sparsity.png"
        )
        figures.against_bytes(found, options.out / f"{name}-bytes.png")
        if options.network == NETWORK:
            print(f"\n{PUBLISHED}\n\n{verdict(found)}")


if __name__ == "__main__":
    main()
