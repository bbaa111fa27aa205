"""Figures of what a training leaves: weights, layers, norms, bytes. Needs `pip install 'clipjax[plots]'`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from clipjax._arrays import arguments, trees
from clipjax._files import saving
from clipjax._reports import plotted, summarizing
from clipjax._reports.plotted import Report
from clipjax._weights.quantize_state import QuantizeState
from clipjax._weights.quantized_params import quantized
from clipjax.typing import State, Tree, Where

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Place: TypeAlias = Axes | Sequence[Axes] | None

__all__ = ["layers", "norms", "pareto", "sizes", "weights"]

BINS = 61


def __dir__() -> list[str]:
    return __all__


def weights(
    params: Tree,
    opt_state: State = None,
    *,
    before: Tree = None,
    where: Where | None = None,
    ax: Place = None,
) -> Figure:
    """How the weights of each leaf are distributed, on a log scale, and how many there are at each level of its grid.

    Where the state has a grid for a leaf, a stem stands at each level k · s that has weights, as high as their number,
    and a tick below the axis marks every level. A leaf with several steps s is drawn in units of them, w / s. Behind
    the stems is the histogram of the latent weights, or that of `before`. Without a grid, and on a format, whose levels
    differ from block to block, the weights are a histogram too. Entries that are not finite are left out and counted.

    Args:
      params: a tree of concrete arrays.
      opt_state: the optimizer state that belongs to them; without it there are no levels and no latent weights.
      before: other params of the same shapes, such as those of the float model, for the histogram behind.
      where: `(path, leaf) -> bool`, which leaves to draw; by default float arrays of rank >= 2 that are not named like
        a bias or a scale.
      ax: the matplotlib axes to draw into, one for each leaf; by default those of a new figure, four in a row.

    Returns:
      The figure. It is not one of pyplot's: a notebook shows it, `figure.savefig(path)` writes it, and it is freed as
      any other object.

    Raises:
      ValueError: where there is no leaf to draw, for another number of axes than leaves, for the state of other params,
        and for a `before` that lacks a leaf or has it in another shape.
      ImportError: without matplotlib: ``pip install 'clipjax[plots]'``.

    Example:
      >>> import clipjax, jax, jax.numpy as jnp
      >>> tx = clipjax.fake_quantize(bits=2, step=0.5)
      >>> params = {"kernel": jnp.array([[0.6, -0.4, 0.1, 0.5]])}
      >>> small, state = clipjax.hold_once(tx, params)
      >>> figure = weights(small, state, before=params)
      >>> stems = figure.axes[0].get_lines()[0]
      >>> stems.get_xdata().tolist(), stems.get_ydata().tolist()
      ([-0.5, 0.0, 0.5], [1, 1, 2])
    """
    figures, picked = _figures(), plotted.picked(params, where)
    latent = plotted.latent(params, opt_state)
    behind = latent if before is None else plotted.alike(before, picked)
    drawn = figures.axes(ax, list(picked), (3.6, 3.2))
    for axis, (path, leaf) in zip(drawn, picked.items(), strict=True):
        name = "latent weights" if before is None else "before"
        histograms = {name: plotted.numbers(behind[path])} if path in behind else {}
        _weights(axis, path, plotted.numbers(leaf), histograms, plotted.grid(opt_state, path, leaf))
    figures.legend(drawn, ax)
    figure: Figure = drawn[0].figure.figure
    return figure


def _weights(
    axis: Axes, path: str, w: np.ndarray, histograms: dict[str, np.ndarray], grid: plotted.DrawnGrid | None
) -> None:
    """One panel of `weights`."""
    figures = _figures()
    unit = 1.0 if grid is None or not grid.step.ndim else grid.step
    histograms = histograms if grid is not None else histograms | {"weights": w}
    finite = {name: x[np.isfinite(x)] for name, x in ((name, x / unit) for name, x in histograms.items())}
    edges = np.histogram_bin_edges(np.concatenate([np.zeros(0), *finite.values()]), BINS)
    tallest = 0
    for name, x in finite.items():
        counts, color = np.histogram(x, edges)[0], figures.BLUE if name == "weights" else figures.GREY
        filled = name != "weights" or len(finite) == 1
        axis.stairs(counts, edges, baseline=0.5, fill=filled, color=color, alpha=0.6 if filled else 1.0, label=name)
        tallest = max(tallest, counts.max())
    if grid is not None:
        scale = 1.0 if grid.step.ndim else float(grid.step)
        codes, counts = np.unique(plotted.codes(w, grid.step), return_counts=True)
        axis.plot(codes * scale, counts, "o", color=figures.ORANGE, markersize=3.5, label="weights at a level")
        axis.vlines(codes * scale, 0.5, counts, color=figures.ORANGE, linewidth=1.8)
        place, zeros = axis.get_xaxis_transform(), np.zeros(grid.levels.size)
        axis.plot(grid.levels * scale, zeros, "|", color=figures.ORANGE, transform=place, clip_on=False)
        tallest = max(tallest, counts.max(initial=0))
    if tallest:
        axis.set_yscale("log")
        axis.set_ylim(0.5, 2.5 * tallest)
    lost = int(np.sum(~np.isfinite(w)))
    facts = f"{w.size:,} weights, {np.mean(w == 0):.0%} zeros" + f", {lost:,} not finite" * bool(lost)
    what = "weight" if grid is None or not grid.step.ndim else "weight / its step"
    axis.set(xlabel=f"{what}\n{facts}", ylabel="number of weights, log scale")
    axis.set_title(_shortened(path or "weights"), loc="left", fontsize="medium")


def layers(params: Tree, opt_state: State = None, *, where: Where | None = None, ax: Place = None) -> Figure:
    """How sparse each leaf is, and how many bits a weight of it takes: two rows of bars, from `clipjax.summarize`.

    The bits are those of the grid, or of the format with its scales; a grey bar is the width of the dtype of a leaf
    that is on neither.

    Args:
      params: a tree of concrete arrays.
      opt_state: the optimizer state that belongs to them; without it all bits are those of the dtypes.
      where: which leaves to draw, see `weights`.
      ax: two matplotlib axes to draw into, for sparsity and bits; by default those of a new figure.

    Returns:
      The figure, see `weights`.

    Raises:
      ValueError: where there is no leaf to draw, for another number of axes, and for the state of other params.
      ImportError: without matplotlib.

    Example:
      >>> import jax.numpy as jnp
      >>> figure = layers({"kernel": jnp.array([[0.0, 0.0, 0.0, 2.0]])})
      >>> [float(axis.patches[0].get_width()) for axis in figure.axes]
      [0.75, 32.0]
    """
    picked = plotted.picked(params, where)
    # A leaf may be named as a total, which stands behind it.
    found = {row["path"]: row for row in reversed(summarizing.summarize(params, opt_state, widths=()).rows)}
    rows = [found[path] for path in picked]
    figures, places = _figures(), np.arange(len(rows))
    left, right = drawn = figures.axes(ax, ["sparsity", "bits"], (3.6, 1.0 + 0.3 * len(rows)), share_y=True)
    bars = left.barh(places, [row["sparsity"] for row in rows], color=figures.BLUE)
    left.bar_label(bars, [f"{row['sparsity']:.1%}" for row in rows], padding=3)
    left.set(xlim=(0, 1.25), xticks=(0, 0.5, 1), title="sparsity")
    bits = [row["bits"] or 8 * row["bytes"] / np.prod(row["shape"]) for row in rows]
    colors = [figures.ORANGE if row["bits"] else figures.GREY for row in rows]
    right.bar_label(right.barh(places, bits, color=colors), [f"{b:.3g}" for b in bits], padding=3)
    right.set(xlim=(0, 1.2 * max(bits)), title="bits of a weight")
    for axis in drawn:
        axis.set_yticks(places, [_shortened(path) for path in picked])
        axis.set_ylim(len(rows) - 0.5, -0.5)  # the first leaf is at the top
    figure: Figure = left.figure.figure
    return figure


def norms(history: Report | Sequence[Report], *, ax: Place = None) -> Figure:
    """The norm that `clip_norm` or `skip_spikes` saw at each update, its threshold, and where the norm exceeded it.

    Args:
      history: the reports of several updates: a dict as `clipjax.report` returns it with an array f[n] in the place of
        each number, as `jax.lax.scan` stacks them, or a sequence of n reports. Other keys are left out. Where it holds
        the norms of each leaf (``report(state, per_leaf=True)``) these are drawn, otherwise their mean.
      ax: the matplotlib axes to draw into, one for each transformation, or leaf; by default those of a new figure.

    Returns:
      The figure, see `weights`.

    Raises:
      ValueError: where there are no norms, where they are not one for each update, and for another number of axes.
      ImportError: without matplotlib.

    Example:
      >>> import jax.numpy as jnp
      >>> history = {"clip_norm/norm_pre": jnp.array([0.5, 3.0]), "clip_norm/threshold": jnp.ones(2)}
      >>> norm, threshold, above = norms(history).axes[0].get_lines()
      >>> norm.get_ydata().tolist(), above.get_xdata().tolist()
      ([0.5, 3.0], [1])
    """
    found = plotted.norms(history)
    figures = _figures()
    drawn = figures.axes(ax, list(found), (7.5, 3.4) if len(found) == 1 else (4.2, 3.2))
    for axis, (name, (norm, threshold)) in zip(drawn, found.items(), strict=True):
        finite = np.isfinite(norm)
        above, counts = finite & (norm > threshold), np.arange(len(norm))
        axis.plot(counts, norm, color=figures.GREY, linewidth=0.8, label="norm")
        axis.plot(counts, threshold, color=figures.BLUE, linewidth=1.6, label="threshold")
        axis.plot(counts[above], norm[above], ".", color=figures.ORANGE, markersize=5, label="norm above it")
        if not np.all(finite):
            lost = counts[~finite]
            place, top = axis.get_xaxis_transform(), np.ones(len(lost))
            axis.plot(lost, top, "x", color="black", label="norm not finite", transform=place, clip_on=False)
        figures.log_scale(axis, "y", np.concatenate([norm, threshold]))
        axis.set_title(f"{_shortened(name)}: {above.mean():.1%} above the threshold", loc="left", fontsize="medium")
        axis.set(xlabel="update", ylabel="norm, log scale" if axis.get_yscale() == "log" else "norm")
    figures.legend(drawn, ax)
    figure: Figure = drawn[0].figure.figure
    return figure


def sizes(params: Tree, opt_state: State = None, *, ax: Axes | None = None) -> Figure:
    """How many bytes the params take: raw, packed, in the file that `clipjax.save` writes, and by their entropy.

    - raw: the arrays as they are.
    - packed: their codes, all of equal width, with codebooks, steps, or the scales of a format.
    - file: all that `clipjax.save` writes of ``quantized(params, opt_state)``, its header included.
    - entropy: the order-0 entropy of the bit patterns, plus each distinct pattern once, see `clipjax.summarize`. A file
      may be smaller, where rows and columns differ in density.

    Args:
      params: a tree of concrete arrays.
      opt_state: the optimizer state that belongs to them. Leaves on a format need it: their values alone do not say
        which scale a block has, and take more bytes.
      ax: the matplotlib axes to draw into; by default that of a new figure.

    Returns:
      The figure, see `weights`. Without `constriction` (``pip install 'clipjax[files]'``) it has the bars of raw and
      entropy alone.

    Raises:
      ValueError: for params without arrays, for several axes, and for the state of other params.
      ImportError: without matplotlib.

    Example:
      >>> import jax.numpy as jnp
      >>> figure = sizes({"kernel": jnp.zeros((100, 100))})
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['raw', 'packed', 'file', 'entropy']
      >>> int(figure.axes[0].patches[0].get_width())
      40000
    """
    total = summarizing.summarize(params, opt_state, widths=()).rows[-1]
    arguments.require(total["bytes"], "params", "have an array with entries", total["bytes"], "Pass a model's params.")
    bars = {"raw": total["bytes"], "packed": total["packed_bytes"], "file": None, "entropy": total["entropy_bytes"]}
    if bars["packed"] is not None:
        on_grids = bool(trees.find(opt_state, QuantizeState))
        bars["file"] = len(saving.pack(quantized(params, opt_state) if on_grids else params))
    known = {name: size for name, size in bars.items() if size is not None}
    figures = _figures()
    (axis,) = figures.axes(ax, ["bytes"], (6.0, 2.4))
    colors = [{"raw": figures.GREY, "file": figures.ORANGE}.get(name, figures.BLUE) for name in known]
    drawn = axis.barh(list(known), list(known.values()), color=colors)
    axis.bar_label(drawn, [f"{size:,} bytes, {size / bars['raw']:.1%}" for size in known.values()], padding=4)
    axis.set(xlim=(0, 1.5 * max(known.values())), xlabel="size of the params, and what part of raw it is")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params("x", nbins=6)
    axis.invert_yaxis()
    figure: Figure = axis.figure.figure
    return figure


def pareto(points: Mapping[str, tuple[float, float]], *, ax: Axes | None = None) -> Figure:
    """Bytes against error: a named point for each model, and a line through those that no other beats in both.

    A point is beaten by one that is smaller or better and in neither larger nor worse. The line is a staircase: what
    lies above or right of it is beaten.

    Args:
      points: `(bytes, error)` by name, both finite, bytes > 0.
      ax: the matplotlib axes to draw into; by default that of a new figure.

    Returns:
      The figure, see `weights`.

    Raises:
      ValueError: where there are no points, for one that is not such a pair, and for several axes.
      ImportError: without matplotlib.

    Example:
      >>> figure = pareto({"dense": (150_000, 2.2), "pruned": (18_000, 2.2), "4 bits": (20_000, 1.9)})
      >>> figure.axes[0].get_lines()[0].get_xdata().tolist()
      [18000.0, 20000.0]
    """
    arguments.require(len(points), "points", "have a point", points, "Give `{name: (bytes, error)}`.")
    for name, point in points.items():
        fits = np.shape(point) == (2,) and arguments.finite(point) and point[0] > 0
        arguments.require(fits, "points", f"have bytes > 0 and an error at {name!r}", point, "Leave out what diverged.")
    size, error = at = np.array(list(points.values()), np.float64).T
    no_worse = (size[:, None] <= size) & (error[:, None] <= error)
    front = ~np.any(no_worse & ((size[:, None] < size) | (error[:, None] < error)), axis=0)
    figures = _figures()
    (axis,) = figures.axes(ax, ["bytes against error"], (7.5, 4.2))
    best = at[:, front]
    axis.plot(*best[:, np.argsort(best[0])], color=figures.GREY, drawstyle="steps-post", zorder=1)
    axis.scatter(*at[:, ~front], color=figures.GREY, zorder=2)
    axis.scatter(*best, color=figures.ORANGE, zorder=3)
    figures.log_scale(axis, "x", size, unit="B")
    axis.set(xlim=(size.min() / 1.6, size.max() * 1.6), xlabel="bytes, log scale", ylabel="error")
    axis.margins(y=0.15)
    figures.annotate(axis, list(points), at.T)
    figure: Figure = axis.figure.figure
    return figure


def _shortened(path: str) -> str:
    """The end of a path, as long as fits above a panel."""
    return path if len(path) <= 36 else f"…{path[-35:]}"


def _figures() -> ModuleType:
    """The module that needs matplotlib, imported when a plot is asked for."""
    try:
        from clipjax._reports import figures
    except ImportError as error:
        raise ImportError("Figures need `matplotlib`: pip install 'clipjax[plots]'.") from error
    return figures
