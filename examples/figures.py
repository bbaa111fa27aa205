"""The figures of digits.py: those of `clipjax.plots`, the width that each kernel needs, and accuracy over steps."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import measuring
import numpy as np
from matplotlib.figure import Figure
from training import Run

import clipjax

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GREY, BLUE, ORANGE = "#9aa0a6", "#1f5fa8", "#d9601a"
COLORS = {"a": "#444444", "e": "#2a8c5b", "h": ORANGE, "i": "#8a4fbf", "j": BLUE}


def draw(runs: Mapping[str, Run], names: Mapping[str, str], folder: Path) -> Iterator[Path]:
    """Writes every figure for which the rows are there, and yields its path."""
    figures = {"training": _training(runs, names), "pareto": _pareto(runs, names)}
    if "h" in runs:
        run = runs["h"]
        figures["layers"] = clipjax.plots.layers(run.params, run.opt_state)
        figures["gradients"] = clipjax.plots.norms(run.facts)
        figures["sizes"] = clipjax.plots.sizes(run.params)
    if {"a", "h"} <= set(runs):
        figures["weights"] = clipjax.plots.weights(runs["h"].params, runs["h"].opt_state, before=runs["a"].params)
        figures["distribution"] = _distribution(runs, names)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
        yield folder / f"{name}.png"


def _distribution(runs: Mapping[str, Run], names: Mapping[str, str]) -> Figure:
    """A column a kernel: the latent weights of (h) and the levels of its grid; the SQNR that each width would reach."""
    run, rows = runs["h"], {letter: _rows(runs[letter]) for letter in "ah"}
    layers = [path for path, row in rows["h"].items() if row["picked"]]
    figure = Figure(figsize=(3.4 * len(layers), 6.2), layout="constrained")
    axes = figure.subplots(2, len(layers), squeeze=False)
    clipjax.plots.weights(run.params, run.opt_state, ax=axes[0])
    for bottom, layer in zip(axes[1], layers, strict=True):
        row = rows["h"][layer]
        for letter, color in (("a", COLORS["a"]), ("h", ORANGE)):
            reached = [rows[letter][layer][f"sqnr_db_{bits}"] for bits in WIDTHS]
            bottom.plot(WIDTHS, reached, "o-", color=color, markersize=3.5, label=f"({letter}) {names[letter]}")
        bottom.plot(row["bits"], row["sqnr_db"], "o", color=ORANGE, markersize=10, fillstyle="none")
        facts = f"σ {row['sigma']:.3f}    max/σ {row['max_sigma']:.1f}    kurtosis {row['kurtosis']:.1f}"
        bottom.set(xlabel=f"bits\n{facts}", xticks=WIDTHS, ylim=(0, 60))
        bottom.grid(axis="y", color=GREY, linewidth=0.4, alpha=0.5)
    axes[1, 0].set_ylabel("signal to quantization noise, dB")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("What is left of each kernel, and the width it needs (ring: what (h) reached)", x=0.01, ha="left")
    return figure


def _rows(run: Run) -> dict[str, dict]:
    table = clipjax.summarize(run.params, run.opt_state, widths=WIDTHS)
    return {path: row for path, row in table.to_dict().items() if path not in ("governed", "total")}


def _training(runs: Mapping[str, Run], names: Mapping[str, str]) -> Figure:
    """Test accuracy over sparsity, both over steps; rows without a color of their own are grey."""
    figure = Figure(figsize=(8.5, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    longest = max(len(run.accuracy) for run in runs.values())
    shown = {letter: run for letter, run in runs.items() if len(run.accuracy) == longest}
    curves: dict[bytes, list[str]] = {}
    for letter, run in sorted(shown.items(), key=lambda item: item[0] in COLORS):
        steps = np.arange(1, len(run.facts["loss"]) + 1)
        ends, accuracy = steps[len(steps) // longest - 1 :: len(steps) // longest], 100 * run.accuracy
        if letter not in COLORS:
            top.plot(ends, accuracy, color=GREY, linewidth=0.8, alpha=0.5)
            continue
        style = {"color": COLORS[letter], "linewidth": 1.6}
        top.plot(ends, accuracy, label=f"({letter}) {names[letter]}", **style)
        if "fake_quantize/step" in run.facts:
            grid = steps[run.facts["fake_quantize/step"] != run.facts["fake_quantize/step"][0]][0]
            top.plot(grid, np.interp(grid, ends, accuracy), "o", color=COLORS[letter], markersize=6)
        if "prune_mask/sparsity" in run.facts:
            zeros = 100 * run.facts["prune_mask/sparsity"]
            bottom.plot(steps, zeros, **style)
            curves.setdefault(zeros.tobytes(), []).append(letter)
    for zeros, letters in curves.items():
        half = int((np.frombuffer(zeros, np.float32) < 50).sum())
        bottom.annotate(", ".join(letters), (half, 50), xytext=(8, -4), textcoords="offset points", fontweight="bold")
    lowest = min(run.accuracy[longest // 4 :].min() for run in shown.values())
    top.set_ylim(max(0, 100 * lowest - 2), 100.2)
    top.set(ylabel="test accuracy, %", title="Accuracy while the weights disappear (dot: on a 4-bit grid from here on)")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    bottom.set(xlabel="step", ylabel="zeros among prunable weights, %", ylim=(-2, 100))
    return figure


def _pareto(runs: Mapping[str, Run], names: Mapping[str, str]) -> Figure:
    """Every row as a point: the bytes of its file against its test error."""
    points = {
        f"{letter} {names[letter]}": (measuring.file_size(run.params), 100 * (1 - run.accuracy[-1]))
        for letter, run in runs.items()
    }
    figure = clipjax.plots.pareto(points)
    figure.axes[0].set(ylabel="test error, %", title="What each row costs and saves")
    return figure
