"""Claims: those that the documents D0 to D4 make, settled: true, false, or how much.

    python benchmarks/weights/claims.py --data-dir DIR [--text FILE]     # some twenty minutes on one core
    python benchmarks/weights/claims.py --table                          # from what is saved, without training

Measured here (claims_training.py): clipping, clamping, pruning and quantizing alone and merged; thresholds from loose
to strangling; a training whose masks are sorted beside `prune_mask`'s; gradients of a plain net of 20 layers; the time
of small models; a text transformer. Three seeds; a training is one compiled program. What compares the scores with one
another is read from the runs of lenet.py. Runs are kept in out/claims.jsonl as they end and are not repeated; --table
prints them, or those that are committed beside this file where there are none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import claims_figures as figures
import claims_training as measured
import lenet
import lenet_chains
import numpy as np
from claims_chains import ROWS, SWEEPS
from lenet import Store, markdown, saved, spread
from rich.progress import track

Claim = tuple[str, str, str, str]  # what is claimed, the verdict, the numbers, the command
HERE, TABLE = "`claims.py`", "`lenet.py`"


class Found:
    """What was measured, by the beginning of its name."""

    def __init__(self, store: Store):
        """Takes the runs of claims.py."""
        self.runs = store.runs

    def __call__(self, *name: Any, key: str = "error") -> list[float]:
        """The values of one fact over all seeds."""
        prefix = "|".join(f"{part:g}" if isinstance(part, float) else str(part) for part in name) + "|"
        return [run[key] for name, run in self.runs.items() if name.startswith(prefix)]

    def mean(self, *name: Any, key: str = "error") -> float:
        """Their mean."""
        return float(np.mean(self(*name, key=key)))

    def median(self, *name: Any, key: str) -> float:
        """Their median, for times."""
        return float(np.median(self(*name, key=key)))


def claims(found: Found, scores: dict[str, dict[float, list[float]]]) -> Iterator[Claim]:
    """Every claim, in the order of the documents' list; those of lenet.py only where its runs are there."""
    yield fewer_parameters(found)
    yield exploding(found)
    yield vanishing(found)
    yield too_tight(found)
    if scores:
        yield gradient_order(scores)
    yield faster_training(found)
    yield merged_compression(found)
    if scores:
        yield pruning_costs(scores)
    yield faster_model(found)


def fewer_parameters(found: Found) -> Claim:
    zeros, size, dense = (
        found.mean("row|clip", key="zeros"),
        *(found.mean(f"row|{r}", key="bytes") for r in ROWS[1::-1]),
    )
    numbers = f"{zeros:.2f} % of the weights are 0 after clipping; the file has {size:,.0f} bytes, {dense:,.0f} without"
    return "Gradient clipping reduces the number of parameters (D1, D4)", _word(zeros > 1), numbers, HERE


def exploding(found: Found) -> Claim:
    gain = measured.GAINS[0]
    before, after = (
        np.mean(found("deep|SGD" if k == "norms" else "deep|clip", gain, key=k)) for k in ("norms", "clipped")
    )
    ends = {arm: found(f"deep|{arm}", gain, key="loss") for arm in ("SGD", "clip", "clip_norm")}
    lost = {arm: sum(not np.isfinite(x) for x in losses) for arm, losses in ends.items()}
    errors = " and ".join(f"{spread(found(f'deep|{arm}', gain), 1)} % ({arm})" for arm in ("clip", "clip_norm"))
    numbers = (
        f"20 layers, {gain:g} x He's weights: gradient norms of {before:,.0f} a layer become {after:.2g}; SGD ends in "
        f"NaN in {lost['SGD']} of {len(ends['SGD'])} runs, clipped in {lost['clip'] + lost['clip_norm']}, "
        f"at an error of {errors}"
    )
    verdict = _word(lost["SGD"] > 0 and not lost["clip"] + lost["clip_norm"])
    return "It prevents exploding gradients (D3)", verdict, numbers, HERE


def vanishing(found: Found) -> Claim:
    gain = measured.GAINS[-1]
    before, after = (np.mean(found("deep|clip", gain, key=key)) for key in ("norms", "clipped"))
    errors = {arm: found(f"deep|{arm}", gain) for arm in ("SGD", "clip", "clip_norm", "Adam")}
    numbers = f"{gain:g} x He's: norms of {before:.1g} stay {after:.1g}; error " + ", ".join(
        f"{spread(values, 0)} % ({arm})" for arm, values in errors.items()
    )
    helped = min(np.mean(errors["clip"]), np.mean(errors["clip_norm"])) < np.mean(errors["SGD"]) - 5
    return "It prevents vanishing gradients (D3)", _word(helped), numbers, HERE


def too_tight(found: Found) -> Claim:
    parts = []
    for sweep, (limits, _) in SWEEPS.items():
        means = {limit: found.mean(sweep, limit) for limit in limits}
        hurt = [f"{limit:g}" for limit, error in means.items() if error > means[limits[0]] + 0.5]
        begin = f"from {hurt[0]} on" if hurt else "nowhere"
        loose, tight = limits[0], limits[-1]
        parts.append(f"{sweep}: {means[loose]:.2f} %, half a point worse {begin}, {means[tight]:.0f} % at {tight:g}")
    return "Too tight a threshold hurts (D3)", "true, and how tight depends on the optimizer", "; ".join(parts), HERE


def gradient_order(scores: dict[str, dict[float, list[float]]]) -> Claim:
    levels = lenet.LEVELS[lenet.NETWORK]
    rows = ("magnitude", "gradient, one batch", "gradient, smoothed", "Taylor", "movement")
    numbers = (
        "error at "
        + ", ".join(f"{level:.0%}" for level in levels)
        + " zeros: "
        + "; ".join(f"{row} {', '.join(f'{np.mean(scores[row][level]):.2f}' for level in levels)}" for row in rows)
    )
    wins = {row: [f"{x:.0%}" for x in levels if _below(scores[row][x], scores["magnitude"][x])] for row in rows[1:]}
    won = [f"{row} at {', '.join(where)}" for row, where in wins.items() if where]
    verdict = "true for " + "; ".join(won) if won else "false"
    verdict += "; false for the gradient alone" * (not wins[rows[1]] and not wins[rows[2]])
    return "Gradient order beats magnitude order (D2)", verdict, numbers, TABLE


def faster_training(found: Found) -> Claim:
    ratios, own, slower = [], [], True
    for every in measured.EVERY:
        seconds = {
            kind: found.median(f"mask|{kind}|{every}", key="seconds") for kind in ("none", "prune_mask", "argsort")
        }
        ratios.append(f"{seconds['argsort'] / seconds['prune_mask']:.1f}")
        slower &= seconds["argsort"] > seconds["prune_mask"]
        own.append(f"{seconds['prune_mask'] / seconds['none']:.2f}")
    numbers = (
        f"a new mask every {', '.join(map(str, measured.EVERY))} updates: argsort masks take {', '.join(ratios)} x "
    )
    numbers += f"as long as prune_mask, which takes {', '.join(own)} x as long as no mask"
    return (
        "Training gets faster than with the sorting way (D2)",
        f"{_word(slower)}; not faster than without a mask",
        numbers,
        HERE,
    )


def merged_compression(found: Found) -> Claim:
    rows = ("clip", "quantize", "clip + quantize", "prune", "prune + quantize")
    size = {row: found.mean(f"row|{row}", key="bytes") for row in rows}
    gain = 1 - size["clip + quantize"] / size["quantize"]
    numbers = ", ".join(f"{row} {value:,.0f}" for row, value in size.items()) + " bytes"
    verdict = "true" if gain > 0.05 else f"hardly, {100 * gain:.1f} %" if gain > 0 else "false"
    if size["prune + quantize"] < min(size["prune"], size["quantize"]):
        verdict += "; true for prune + quantize"
    return "Clip + quantize compresses more than either (D4)", verdict, numbers, HERE


def pruning_costs(scores: dict[str, dict[float, list[float]]]) -> Claim:
    dense, level = float(np.mean(scores["dense"][0.0])), 0.95
    lost = {
        row: np.mean(scores[row][level]) - dense for row in ("random", "magnitude", "relative magnitude", "movement")
    }
    repaired = 1 - lost["magnitude"] / lost["random"]
    numbers = f"dense {dense:.2f} %; at {level:.0%} zeros " + ", ".join(f"{row} {x:+.2f}" for row, x in lost.items())
    claim = "Pruning costs accuracy, keep-largest rules repair it (D1)"
    return claim, f"true: keep-largest repairs {repaired:.0%} of what random pruning costs", numbers, TABLE


def faster_model(found: Found) -> Claim:
    parts = []
    for batch in (1, 256):
        times = {name: _least(found, name, batch) for name in ("dense", "95 % of weights", "shrunk")}
        ratios = ", ".join(f"{name} {times[name] / times['dense']:.2f}" for name in ("95 % of weights", "shrunk"))
        parts.append(f"{batch} image{'s' * (batch > 1)}: {ratios}")
    verdict = "false while the shapes stay; true once units are cut and shrunk"
    return "The model gets faster (D0)", verdict, "time x dense, " + "; ".join(parts), HERE


def _least(found: Found, name: str, batch: int) -> float:
    return min(run[name][f"us {batch}"] for key, run in found.runs.items() if key.startswith("time|"))


def _below(errors: list[float], others: list[float]) -> bool:
    """Lower by more than either deviates over the seeds."""
    noise = max(np.std(x, ddof=1) if x[1:] else 0.0 for x in (errors, others))
    return bool(np.mean(errors) + noise < np.mean(others))


def _word(holds: bool) -> str:
    return "true" if holds else "false"


def tables(found: Found) -> Iterator[str]:
    """What stands behind the verdicts."""
    rows = [["LeNet-300-100", "error, %", "zeros, %", "bytes", "x smaller"]]
    for row in ROWS:
        size = found.mean(f"row|{row}", key="bytes")
        rate = f"{found.mean('row|dense', key='bytes') / size:.1f}"
        rows.append(
            [row, spread(found(f"row|{row}")), f"{found.mean(f'row|{row}', key='zeros'):.1f}", f"{size:,.0f}", rate]
        )
    yield markdown(rows)
    for sweep, (limits, _) in SWEEPS.items():
        errors = [spread(found(sweep, limit)) for limit in limits]
        yield markdown([[f"error, %, by {sweep}", *(f"{limit:g}" for limit in limits)], ["", *errors]])
    rows = [["100 steps, s", *(f"a mask every {every}" for every in measured.EVERY)]]
    for kind in ("none", "prune_mask", "argsort"):
        rows.append([kind, *(f"{found.median(f'mask|{kind}|{every}', key='seconds'):.2f}" for every in measured.EVERY)])
    yield markdown(rows)
    rows = [
        ["20 layers, first weights", "optimizer", "norm of a layer's gradient", "clipped", "train loss", "error, %"]
    ]
    for gain in measured.GAINS:
        for arm in measured.DEEP:
            norm, after = (f"{found.mean(f'deep|{arm}', gain, key=key):.2g}" for key in ("norms", "clipped"))
            loss = spread(found(f"deep|{arm}", gain, key="loss"))
            rows.append([f"{gain:g} x He", arm, norm, after, loss, spread(found(f"deep|{arm}", gain), 1)])
    yield markdown(rows)
    rows = [["three epochs, then", "error, %", "bytes", "1 image, us", "256 images, us"]]
    for name in ("dense", "95 % of weights", "80 % of units", "shrunk"):
        runs = [run[name] for key, run in found.runs.items() if key.startswith("small|")]
        shape = "dense" if name == "80 % of units" else name
        times = [f"{_least(found, shape, batch):.0f}" for batch in (1, 256)]
        rows.append([name, spread([r["error"] for r in runs]), f"{np.mean([r['bytes'] for r in runs]):,.0f}", *times])
    yield markdown(rows)
    rows = [["text transformer", "validation loss, nats", "bytes", "x smaller than raw"]]
    for arm in measured.TEXT:
        size, raw = (found.mean(f"text|{arm}", key=key) for key in ("bytes", "raw"))
        rows.append([arm, spread(found(f"text|{arm}", key="loss"), 3), f"{size:,.0f}", f"{raw / size:.1f}"])
    yield markdown(rows)


def main() -> None:
    """Measures what is missing, and prints the tables and the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where MNIST's four IDX files are, .gz or not")
    parser.add_argument("--text", type=Path, help="plain text for the transformer; the source of optax by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "out", help="folder of the results")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is saved")
    options = parser.parse_args()
    if options.data_dir is None and not options.table:
        parser.exit(message="Skipped: --data-dir DIR is needed to train, the folder of MNIST's IDX files.\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "claims.jsonl"
    store = Store(saved(path) if options.table else path)
    if not options.table:
        lab = measured.lab(options.data_dir, options.text)
        for name, job in track(
            [job for job in measured.jobs() if job[0] not in store.runs], description="measurements"
        ):
            store.add(name, job(lab))
    missing = [name for name, _ in measured.jobs() if name not in store.runs]
    if missing:
        raise SystemExit(f"{store.path} lacks {len(missing)} measurements, {missing[0]!r} first. Run without --table.")
    found = Found(store)
    table = [["claim", "verdict", "numbers", "command"], *map(list, claims(found, of_scores(options.out)))]
    print("\n\n".join([*tables(found), markdown(table)]))
    figures.draw(found, SWEEPS, measured.GAINS, options.out / "claims.png")


def of_scores(folder: Path) -> dict[str, dict[float, list[float]]]:
    """Errors of lenet.py's plain rows by row and sparsity; none where it has no run of them."""
    grid = lenet.cells(lenet_chains.METHODS, lenet.LEVELS[lenet.NETWORK])
    errors: dict[str, dict[float, list[float]]] = {}
    for cell, runs in lenet.collect(grid, range(5), False, Store(saved(folder / "lenet.jsonl"))):
        errors.setdefault(cell.row, {})[cell.level] = [run["error"] for run in runs]
    return errors


if __name__ == "__main__":
    main()
