"""Figures without pyplot, which a notebook shows and nothing keeps open; their axes, ticks and labels."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from clipjax._arrays import arguments

GREY, BLUE, ORANGE = "#9aa0a6", "#1f5fa8", "#d9601a"
COLUMNS = 4  # of the axes in a figure, at most


class Figure(matplotlib.figure.Figure):
    """A figure that shows itself in a notebook.

    pyplot's figures do so too, but stay in memory until they are closed, and one that is also the result of a cell is
    shown twice.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def axes(
    ax: Axes | Sequence[Axes] | None, panels: Sequence[str], size: tuple[float, float], *, share_y: bool = False
) -> list[Axes]:
    """One axes for each panel: those that are given, or those of a new figure.

    Args:
      ax: what the caller of a plot passed.
      panels: what each axes shows, in words.
      size: width and height of each new axes, in inches.
      share_y: True where the y axis of new axes is one.
    """
    if ax is None:
        rows = math.ceil(len(panels) / COLUMNS)
        columns = math.ceil(len(panels) / rows)
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        made: list[Axes] = figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel().tolist()
        for axis in made:
            axis.spines[["top", "right"]].set_visible(False)
        for spare in made[len(panels) :]:
            spare.remove()
        return made[: len(panels)]
    given = np.ravel(np.array(ax, dtype=object)).tolist()
    for axis in given:
        arguments.instance(axis, Axes, "ax", "Pass what `figure.subplots()` gives, or leave it out.")
    some = ", ".join(panels[:COLUMNS]) + ", …" * (len(panels) > COLUMNS)
    remedy = f"This plot draws {some}: pass `figure.subplots(1, {len(panels)})`, or leave `ax` out."
    arguments.require(len(given) == len(panels), "ax", f"have {len(panels)} axes", len(given), remedy)
    return given


def legend(drawn: Sequence[Axes], ax: Axes | Sequence[Axes] | None) -> None:
    """One legend for all axes: below them in a figure of ours, else inside the first one."""
    labelled: dict[str, Artist] = {}
    for axis in drawn:
        pairs = zip(*axis.get_legend_handles_labels(), strict=True)
        labelled |= {label: handle for handle, label in pairs if label not in labelled}
    handles, labels = list(labelled.values()), list(labelled)
    if ax is None:
        own = drawn[0].figure
        own.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    else:
        drawn[0].legend(handles, labels, fontsize="small")


def log_scale(axes: Axes, which: str, values: np.ndarray, unit: str | None = None) -> None:
    """A log scale with readable ticks; none where no value is positive, which has no logarithm.

    Args:
      axes: where.
      which: "x" or "y".
      values: what is drawn along it.
      unit: "B" writes 20000 as "20 kB".
    """
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(_LogTicks())
    axis.set_major_formatter(EngFormatter(unit) if unit else StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


class _LogTicks(LogLocator):
    """Ticks between the powers of ten too, as many as the limits that the axis has when it is drawn leave room for."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        span = max(vmin, vmax) / min(vmin, vmax)
        self.set_params(subs=(1, 1.5, 2, 3, 5, 7) if span < 10 else (1, 2, 5) if span < 1e5 else (1,))
        return super().tick_values(vmin, vmax)


def annotate(axis: Axes, names: Sequence[str], points: np.ndarray) -> None:
    """Writes a name beside each point, where it covers no other name and no point if there is such a place.

    The scales and limits of the axes must be final.
    """
    axis.figure.figure.draw_without_rendering()  # after the layout alone it is known where things lie
    spots = axis.transData.transform(points)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for name, point in zip(names, points, strict=True):
        text = axis.annotate(name, point, xytext=(6, 6), textcoords="offset points", fontsize=9)
        places = itertools.product((("left", 6), ("right", -6)), (6, -15, 17, -26))
        for (side, dx), dy in places:
            text.set(ha=side, position=(dx, dy))
            box = text.get_window_extent()
            inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and axis.bbox.y0 <= box.y0
            if inside and not any(_overlap((box.x0, box.y0, box.x1, box.y1), other) for other in taken):
                break
        taken.append((box.x0, box.y0, box.x1, box.y1))


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
