"""Claims: on MNIST LeNet-300-100 loses at most .05 points at 8 and 4 bits, .1 ternary (TWN's step), .3 binary.

    python benchmarks/weights/lenet_grids.py --data-dir DIR [--seeds 5] [--table] [--together]
    python benchmarks/weights/lenet_grids.py --data-dir DIR --tune  # the settings that were tried, on held-out images

Weights are quantized from a quarter of the updates on, by a transformation behind the optimizer ("chain") and by one
around it ("inner"). Beside them: the same without latent weights, so that small updates are lost (D4's trap), and
widths that follow the distributions inside the run (`widths.sqnr`, `widths.budget`) against the same mean width
everywhere. Every seed trains all rows on the same batches from the same first params; a training is one compiled
program (lenet_training.py). Rows that a claim is about have twice as many seeds; "points lost" are means of differences
seed by seed, ± their standard error. Runs are kept in out/lenet_grids.jsonl and are not repeated; --table prints those,
or the ones that are committed here.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import lenet_training as training
import measuring
import numpy as np
import optax
from lenet import Store, markdown, saved, spread
from lenet import widths as widths_of
from measuring import Promise
from rich.progress import track

import clipjax
from clipjax import widths


class Setting(NamedTuple):
    """How every row is trained: by AdamW, its rate on a cosine to 0, with so many updates between two refreshes.

    No level exceeds the weights that the transformations before had produced at a refresh: early in a training the
    levels grow slowly, and it helps if weights are floats for the first part (`start`). `anneal` is the part of the
    updates, from `start` on, over which PARQ's levels become sharp; 0 rounds at once. From the part `last` on the steps
    are frozen.
    """

    epochs: int = 40
    dropout: float = 0.0
    rate: float = 3e-3
    decay: float = 0.05
    every: int = 20
    start: float = 0.25
    anneal: float = 0.0
    last: float = 0.9


CHOSEN = Setting()


class Row(NamedTuple):
    """A way to quantize: bits as `fake_quantize` takes them, the form, and what else it is given."""

    name: str
    bits: Any
    form: str
    rest: Any = {}  # noqa: RUF012 - never changed


Job = tuple[Setting, Row, int]  # with a seed
TWN = {"step": clipjax.steps.twn()}
ROWS = [
    Row("float", None, "-"),
    *(Row(f"{bits} bit", bits, form) for bits in (8, 4, 1) for form in ("chain", "inner")),
    *(Row("2 bit TWN", 2, form, TWN) for form in ("chain", "inner")),
    Row("2 bit", 2, "chain"),
    Row("4 bit", 4, "no carry", {"carry": False}),
    Row("2 bit TWN", 2, "no carry", {"carry": False, **TWN}),
    Row("4 bit a unit", 4, "chain", {"axis": -1}),
    Row("budget 4 bit", widths.budget(4.0), "chain"),
    Row("sqnr 20 dB", widths.sqnr(20.0), "chain"),
]
LIMITS = {"8 bit": 0.05, "4 bit": 0.05, "2 bit TWN": 0.1, "1 bit": 0.3}  # points of accuracy, of the form "chain"
CLAIMED = [row for row in ROWS if row.form in ("-", "chain") and row.name in ("float", *LIMITS)]

VARIED = [
    Row("2 bit", 2, "inner"),
    Row("2 bit a unit", 2, "chain", {"axis": -1}),
    Row("2 bit a unit, TWN", 2, "chain", {"axis": -1, **TWN}),
]
EVERY = ROWS + VARIED


def rows(*names: str, forms: tuple[str, ...] = ("-", "chain")) -> list[Row]:
    """The rows of some names, float first."""
    return [row for row in EVERY if row.name in ("float", *names) and row.form in forms]


FIRST = Setting(decay=1e-4)  # what the search began with
WIDTHS, TERNARY, TWNS = rows("4 bit", "2 bit", "1 bit"), rows("2 bit"), rows("2 bit TWN", "2 bit a unit, TWN")
FEW, SEVERAL, MANY = (50, 51), range(50, 55), range(60, 76)
TRIED = (
    (FIRST._replace(start=0.0), WIDTHS, FEW),
    (FIRST, WIDTHS, FEW),
    (FIRST._replace(start=0.5), WIDTHS, FEW),
    (Setting(40, 0.1, 6e-3, 0.05, 20, 0.0), WIDTHS, FEW),
    (Setting(16, 0.1, 6e-3, 0.05, 20, 0.0), WIDTHS, FEW),
    (Setting(16, 0.1, 6e-3, 0.05, 100, 0.0), WIDTHS, FEW),
    (FIRST, TERNARY, SEVERAL),
    (FIRST._replace(anneal=0.25), TERNARY, SEVERAL),
    (FIRST._replace(every=5), TERNARY, SEVERAL),
    (FIRST._replace(every=5, anneal=0.25), TERNARY, SEVERAL),
    (FIRST._replace(epochs=80), TERNARY, SEVERAL),
    (FIRST, rows("2 bit", forms=("-", "chain", "inner")), MANY),
    (FIRST, [*rows("2 bit a unit"), *TWNS[1:]], MANY),
    (FIRST._replace(start=0.1), rows("2 bit a unit"), MANY),
    (FIRST._replace(start=0.0), TWNS, MANY),
    (FIRST._replace(start=0.5), TWNS, MANY),
    (FIRST._replace(last=1.0), TWNS, MANY),
    (FIRST._replace(every=100), TWNS, MANY),
    (FIRST._replace(dropout=0.1), TWNS, MANY),
    (FIRST._replace(rate=1e-3), TWNS, MANY),
    (FIRST._replace(rate=6e-3), TWNS, MANY),
    (Setting(), TWNS, MANY),
    (Setting(dropout=0.1, rate=6e-3), TWNS, MANY),
    (FIRST._replace(dropout=0.2), TWNS, MANY),
    (FIRST._replace(dropout=0.1, epochs=80), TWNS, MANY),
)


def chain(row: Row, setting: Setting, course: training.Course) -> optax.GradientTransformation:
    """The optimizer of every row, and the grid behind or around it."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(setting.rate, course.steps), weight_decay=setting.decay)
    if row.bits is None:
        return optimizer
    start, stop = int(setting.start * course.steps), int(setting.last * course.steps)
    rest = dict(row.rest)
    if setting.anneal:
        rest["rounding"] = clipjax.roundings.parq(int(setting.anneal * course.steps))
    quantize = functools.partial(clipjax.fake_quantize, row.bits, start=start, every=setting.every, stop=stop, **rest)
    return quantize(inner=optimizer) if row.form == "inner" else optax.chain(optimizer, quantize())


def key(row: Row, setting: Setting, seed: int, validate: bool = False) -> str:
    """Names a run."""
    dropout = f", dropout {setting.dropout}" * bool(setting.dropout)
    how = f"{setting.epochs} x {training.BATCH}, rate {setting.rate}, decay {setting.decay}, every {setting.every}"
    start = f", start {setting.start}" * bool(setting.start and row.bits)  # the float row has none
    anneal = f", anneal {setting.anneal}" * bool(setting.anneal and row.bits)
    anneal += f", last {setting.last}" * bool(setting.last != CHOSEN.last and row.bits)
    return f"{row.name}, {row.form}, {how}{dropout}{start}{anneal}, seed {seed}" + ", validation" * validate


def train(jobs: list[Job], folder: Path, validate: bool, store: Store, together: bool) -> None:
    """Trains what is missing, and asserts that all weights are on their grids."""
    data = training.load(folder, validate)

    @functools.cache
    def program(row: int, setting: Setting, side_by_side: int) -> Any:
        lesson = training.Lesson(setting.epochs, dropout=setting.dropout)
        build = functools.partial(chain, EVERY[row], setting)
        return training.trainer("LeNet-300-100", data, build, lesson, side_by_side)

    named = {key(row, s, seed, validate): ((EVERY.index(row), s), seed) for s, row, seed in jobs}
    missing = [job for name, job in named.items() if name not in store.runs]
    for (index, setting), seeds in track(training.grouped(missing, together), description="trainings"):
        row, compiled = EVERY[index], functools.partial(program, index, setting)
        for seed, params, opt_state, seconds in training.trainings(compiled, 0.0, seeds, together):
            facts: dict[str, Any] = {"seconds": seconds, "bits": []}
            if row.bits is not None:
                facts["bits"] = widths_of(params, opt_state)
                measuring.check(params, opt_state, Promise(bits=max(max(facts["bits"]), 2)))
            predicted = training.answers("LeNet-300-100", params, data.x_test).argmax(-1)
            facts["error"] = 100 * float(np.mean(predicted != data.y_test))
            about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
            store.add(key(row, setting, seed, validate), facts | about)


def show_tuning(store: Store) -> None:
    """Prints what every setting cost on held-out images."""
    table = [["setting", "weights", "form", "seeds", "error, %", "points lost"]]
    for setting, tried, seeds in TRIED:
        changed = {name: value for name, value in setting._asdict().items() if value != getattr(FIRST, name)}
        words = ", ".join(f"{name} {value}" for name, value in changed.items()) or "the first"
        reached = [np.array([store.runs[key(row, setting, s, True)]["error"] for s in seeds]) for row in tried]
        for row, errors in zip(tried, reached, strict=True):
            table.append([words, row.name, row.form, str(len(seeds)), spread([*errors]), mean(errors - reached[0])])
    print(markdown(table))


def show(seeds: range, store: Store) -> None:
    """Prints the table, and a verdict for every claim."""
    table = [["weights", "form", "test error, %", "points lost", "bits of the kernels", "seeds"]]
    lost, floats = {}, None
    for row in ROWS:
        found = [store.runs.get(key(row, CHOSEN, s)) for s in seeds]
        runs = [run for run in found if run]
        if not runs:
            raise SystemExit(f"{store.path} holds no run of {row.name}, {row.form}. Run without --table first.")
        errors = np.array([run["error"] if run else np.nan for run in found])
        floats = errors if floats is None else floats  # the first row
        lost[row.name, row.form] = errors - floats
        bits = " ".join(f"{b:g}" for b in np.mean([run["bits"] for run in runs], axis=0)) or "32 32 32"
        reached = spread([run["error"] for run in runs])
        table.append([row.name, row.form, reached, mean(errors - floats), bits, str(len(runs))])
    print(markdown(table))
    for name, most in LIMITS.items():
        loss = lost[name, "chain"]
        print(f"{name}, chain: {mean(loss)} points lost (at most {most}): {verdict(np.nanmean(loss) <= most)}")
    for bits in ("4 bit", "2 bit TWN"):
        worse = mean(lost[bits, "no carry"] - lost[bits, "chain"])
        print(f"{bits} without carry: {worse} points worse than with it")
    gain = mean(lost["4 bit", "chain"] - lost["budget 4 bit", "chain"])
    print(f"a budget of 4 bits on average: {gain} points better than 4 bits everywhere")


def mean(points: np.ndarray) -> str:
    """Mean ± its standard error, of differences seed by seed; NaN where a seed lacks one of the two."""
    points = points[np.isfinite(points)]
    error = f" ± {np.std(points, ddof=1) / len(points) ** 0.5:.3f}" * (len(points) > 1)
    return f"{np.mean(points):+.3f}{error}"


def verdict(ok: bool) -> str:
    """How a claim came out."""
    return "holds" if ok else "FAILS"


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where MNIST's four IDX files are, .gz or not")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "out", help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--together", action="store_true", help="all seeds of a row at once, for a GPU")
    parser.add_argument("--tune", action="store_true", help="the settings that were tried, on held-out images")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is saved")
    options = parser.parse_args()
    if options.data_dir is None and not options.table:
        parser.exit(message="Skipped: --data-dir DIR is needed to train, the folder of MNIST's IDX files.\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "lenet_grids.jsonl"
    store = Store(saved(path) if options.table else path)
    claimed = range(options.seeds, 2 * options.seeds)
    plan = TRIED if options.tune else [(CHOSEN, ROWS, range(options.seeds)), (CHOSEN, CLAIMED, claimed)]
    if not options.table:
        jobs = [(setting, row, seed) for setting, some, seeds in plan for seed in seeds for row in some]
        train(jobs, options.data_dir, options.tune, store, options.together)
    if options.tune:
        show_tuning(store)
    else:
        show(range(2 * options.seeds), store)


if __name__ == "__main__":
    main()
