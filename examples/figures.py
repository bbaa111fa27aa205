"""The figures of digits.py: weights before and after, their distribution, accuracy over steps, norms, sizes."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import measuring
import numpy as np
import optax
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from training import Run

import clipjax

matplotlib.use("Agg")


WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GREY, BLUE, ORANGE = "#9aa0a6", "#1f5fa8", "#d9601a"
COLORS = {"a": "#444444", "e": "#2a8c5b", "h": ORANGE, "i": "#8a4fbf", "j": BLUE}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
    "font.size": 9.5,
    "legend.frameon": False,
    "savefig.bbox": "tight",
}


def draw(runs: Mapping[str, Run], names: Mapping[str, str], folder: Path) -> Iterator[Path]:
    """Writes every figure for which the rows are there, and yields its path."""
    needs = {"weights": "ah", "distribution": "ah", "training": "", "gradients": "h", "sizes": "a"}
    for name, rows in needs.items():
        if set(rows) <= set(runs):
            with plt.rc_context(STYLE):
                figure = globals()[f"_{name}"](runs, names)
                figure.savefig(folder / f"{name}.png")
                plt.close(figure)
            yield folder / f"{name}.png"


def _weights(runs: Mapping[str, Run], names: Mapping[str, str]) -> plt.Figure:
    """One panel a kernel: the float weights of (a) behind the levels that (h) leaves."""
    before, after = runs["a"].params, runs["h"].params
    layers = [layer for layer in ("conv1", "conv2", "hidden", "logits") if layer in before]
    figure, axes = plt.subplots(1, len(layers), figsize=(3.1 * len(layers), 3.2), layout="constrained")
    for axis, layer in zip(axes, layers, strict=True):
        old, new = (np.asarray(params[layer]["kernel"]).ravel() for params in (before, after))
        axis.hist(old, bins=61, color=GREY, alpha=0.6, label="(a) plain Adam")
        levels, counts = np.unique(new, return_counts=True)
        axis.vlines(levels, 0.5, counts, color=ORANGE, linewidth=2.4, label="(h) everything")
        axis.plot(levels, counts, "o", color=ORANGE, markersize=3.5)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.5)
        axis.set_title(f"{layer}: {old.size:,} weights")
        axis.set_xlabel(f"weight    ({len(levels)} values, {np.mean(new == 0):.0%} zeros)")
    axes[0].set_ylabel("weights in a bin, at a level")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", ncols=2)
    figure.suptitle("Weights before and after: floats become few levels, most of them zero", x=0.01, ha="left")
    return figure


def _distribution(runs: Mapping[str, Run], names: Mapping[str, str]) -> plt.Figure:
    """A column a kernel: the float weights of (h) and the levels of its grid; the SQNR that each width would reach."""
    run, rows = runs["h"], {letter: _rows(runs[letter]) for letter in "ah"}
    layers = [layer for layer in ("conv1", "conv2", "hidden", "logits") if layer in run.params]
    floats = next(carry for _, carry in optax.tree_utils.tree_get_all_with_path(run.opt_state, "carry") if carry)
    figure, axes = plt.subplots(2, len(layers), figsize=(3.1 * len(layers), 5.8), layout="constrained")
    for (top, bottom), layer in zip(axes.T, layers, strict=True):
        row, z = rows["h"][f"{layer}/kernel"], np.asarray(floats[layer]["kernel"]).ravel()
        for level in np.unique(run.params[layer]["kernel"]):
            top.axvline(level, color=ORANGE, linewidth=0.9, alpha=0.8, zorder=0)
        top.hist(z[z != 0], zorder=2, bins=71, color=GREY)
        top.set_title(f"{layer}: {np.sum(z != 0):,} weights left")
        facts = f"σ {row['sigma']:.3f}    max/σ {row['max_sigma']:.1f}    kurtosis {row['kurtosis']:.1f}"
        top.set_xlabel(f"float weight\n{facts}")
        for letter, color in (("a", COLORS["a"]), ("h", ORANGE)):
            reached = [rows[letter][f"{layer}/kernel"][f"sqnr_db_{bits}"] for bits in WIDTHS]
            bottom.plot(WIDTHS, reached, "o-", color=color, markersize=3.5, label=f"({letter}) {names[letter]}")
        bottom.plot(row["bits"], row["sqnr_db"], "o", color=ORANGE, markersize=10, fillstyle="none")
        bottom.set(xlabel="bits", xticks=WIDTHS, ylim=(0, 60))
        bottom.grid(axis="y", color=GREY, linewidth=0.4, alpha=0.5)
    axes[0, 0].set_ylabel("surviving weights in a bin")
    axes[1, 0].set_ylabel("signal to quantization noise, dB")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    title = "What is left of each kernel, and the width it needs (lines: the levels of (h); ring: what (h) reached)"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _rows(run: Run) -> dict[str, dict]:
    return clipjax.summarize(run.params, run.opt_state, widths=WIDTHS).to_dict()


def _training(runs: Mapping[str, Run], names: Mapping[str, str]) -> plt.Figure:
    """Test accuracy over sparsity, both over steps; rows without a color of their own are grey."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8.5, 6), sharex=True, layout="constrained")
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
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    bottom.set(xlabel="step", ylabel="zeros among prunable weights, %", ylim=(-2, 100))
    return figure


def _gradients(runs: Mapping[str, Run], names: Mapping[str, str]) -> plt.Figure:
    """The global gradient norm of every step of (h), and the threshold that cuts it."""
    facts = runs["h"].facts
    norm, threshold = facts["clip_norm/norm_pre"], facts["clip_norm/threshold"]
    steps, cut = np.arange(1, len(norm) + 1), norm > threshold
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    axis.plot(steps, norm, color=GREY, linewidth=0.7)
    axis.plot(steps[cut], norm[cut], ".", color=ORANGE, markersize=5, label=f"clipped: {cut.mean():.1%} of the steps")
    axis.plot(steps, threshold, color=BLUE, linewidth=1.4, label="threshold")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="step", ylabel="global norm, log scale", title="(h) Gradient norms before clipping")
    axis.legend(loc="lower left")
    return figure


def _sizes(runs: Mapping[str, Run], names: Mapping[str, str]) -> plt.Figure:
    """Every row as a point: bytes against test accuracy."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    sizes = {letter: measuring.size(run.params) for letter, run in runs.items()}
    points: dict[tuple[float, float], list[str]] = {}
    for letter, run in runs.items():
        axis.plot(sizes[letter], 100 * run.accuracy[-1], "o", color=COLORS.get(letter, GREY), markersize=7)
        points.setdefault((round(np.log10(sizes[letter]), 1), run.accuracy[-1]), []).append(letter)
    for (_, accuracy), letters in points.items():
        place = {"xy": (sizes[letters[-1]], 100 * accuracy), "xytext": (5, 5), "textcoords": "offset points"}
        axis.annotate(" ".join(letters), fontweight="bold", **place)
    raw = sum(leaf.nbytes for leaf in jax.tree.leaves(runs["a"].params))
    axis.axvline(raw, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlim(min(sizes.values()) / 1.6, raw * 1.6)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter("B"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(y=0.12)
    axis.set(xlabel="all params under an order-0 entropy code, log scale (dotted: as f32)", ylabel="test accuracy, %")
    axis.set_title("What each row costs and saves")
    entries = [f"{letter}  {names[letter]}" for letter in runs]
    axis.text(1.02, 1.0, "\n".join(entries), transform=axis.transAxes, va="top", fontsize=8.5)
    return figure
