"""The figures of lenet.py: test error against bytes, and test error against sparsity for every score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

Found = Sequence[tuple[Any, list[dict[str, Any]]]]  # a cell and its runs, as lenet.py collects them

COLORS = ("#444444", "#8c6d1f", "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#cc79a7", "#009e73", "#7f7f7f", "#6a3d9a")


def _mean(runs: list[dict[str, Any]], key: str) -> tuple[float, float]:
    values = [run[key] for run in runs]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if values[1:] else 0.0


def against_sparsity(found: Found, published: dict[str, dict[float, float]], path: Path) -> None:
    """One line a method, without D3 and without a grid; published numbers as crosses."""
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    plain = [(cell, runs) for cell, runs in found if not cell.limits and cell.bits is None]
    levels = sorted({cell.level for cell, _ in plain} - {0.0})
    places = {level: i for i, level in enumerate(levels)}
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for cell, runs in plain:
        if cell.level in places:
            rows.setdefault(cell.method, []).append((places[cell.level], *_mean(runs, "error")))
        else:
            axis.axhline(_mean(runs, "error")[0], color="black", linestyle="--", linewidth=1, label="dense")
    for i, (method, points) in enumerate(sorted(rows.items(), key=lambda row: row[1][-1][1])):
        x, mean, deviation = np.transpose(points)
        axis.errorbar(
            x + 0.012 * (i - 4), mean, deviation, color=COLORS[i], marker="osDv^<>Ph*"[i], label=method, capsize=2
        )
    for (name, points), marker in zip(published.items(), "x+", strict=False):
        known = [(np.interp(level, levels, range(len(levels))), error) for level, error in points.items()]
        axis.plot(*np.transpose(known), marker, color="black", markersize=9, markeredgewidth=2, label=name, zorder=5)
    axis.set_xticks(range(len(levels)), [f"{level:.0%}" for level in levels])
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="zeros among all weights", ylabel="test error, %, log scale")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def against_bytes(found: Found, path: Path, marked: Sequence[tuple[str, float, float]] = ()) -> None:
    """Every cell as a point; the line joins those that no other beats in both, which are listed by number.

    Marked ones, of a name, bytes and an error, are no cells.
    """
    figure, axis = plt.subplots(figsize=(9.5, 4.6), layout="constrained")
    points = [(cell, *_mean(runs, "bytes"), *_mean(runs, "error")) for cell, runs in found]
    kinds = {"zeros alone": (False, "#0072b2"), "zeros and a grid": (True, "#d55e00")}
    best = sorted(p for p in ((size, error) for _, size, _, error, _ in points))
    front = [p for i, p in enumerate(best) if not any(q[1] <= p[1] for q in best[:i])]
    axis.step(*np.transpose(front), where="post", color="#bbbbbb", zorder=0, label="no other beats these in both")
    for name, (grid, color) in kinds.items():
        mine = [p for p in points if (p[0].bits is not None) == grid]
        if mine:
            _, size, _, error, deviation = zip(*mine, strict=True)
            axis.errorbar(size, error, deviation, color=color, marker="o", markersize=5, linestyle="", label=name)
    names = []
    for cell, size, _, error, _ in sorted(points, key=lambda point: point[1]):
        if (size, error) in front:
            names.append(f"{cell.row}, {cell.level:.0%}" if cell.level else cell.row)
            beside = (-3, -13) if len(names) % 2 else (5, 4)  # neighbours would overlap
            axis.annotate(len(names), (size, error), xytext=beside, textcoords="offset points", fontsize=9)
    listed = "\n".join(f"{i}  {name}" for i, name in enumerate(names, 1))
    axis.annotate(listed, (1.02, 1), xycoords="axes fraction", va="top", fontsize=9, linespacing=1.6)
    for (name, size, error), marker in zip(marked, "*PXD", strict=False):
        axis.plot(size, error, marker, color="#009e73", markersize=11, linestyle="", label=name)
    lowest = min(error for *_, error, _ in points)
    axis.set(
        xscale="log",
        yscale="log",
        ylim=(0.9 * lowest, 3 * lowest),
        xlabel="bytes, log scale",
        ylabel="test error, %, log scale",
    )
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter("B"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
