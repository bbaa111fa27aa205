"""The figure of claims.py: error against both thresholds, and gradient norms by depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#0072b2", "#d55e00", "#009e73")


def draw(found: Callable[..., list[Any]], sweeps: Mapping[str, Any], gains: Sequence[float], path: Path) -> None:
    """Left and middle: error against C and T, no limit at the left end. Right: what clipping does to the norms."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for color, (name, (limits, _)) in zip(COLORS, sweeps.items(), strict=True):
        letter, optimizer = name.split(", ")
        errors = np.array([found(name, limit) for limit in limits])
        axis = left if letter == "C" else middle
        places = [1.0, *limits[1:]]
        look = {"color": color, "marker": "o", "capsize": 2, "label": optimizer}
        axis.errorbar(places, errors.mean(1), errors.std(1, ddof=1), **look)
        axis.annotate("no limit", (places[0], errors[0].mean()), xytext=(0, 6), textcoords="offset points", fontsize=8)
    for axis, title in ((left, "gradient threshold C"), (middle, "weight bound T")):
        axis.set(xscale="log", yscale="log", xlabel=f"{title}, tighter to the right", ylabel="test error, %, log scale")
        axis.set_yticks([2, 3, 5, 10, 20, 50, 90], minor=False)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.invert_xaxis()
        axis.legend(frameon=False)
    for color, gain in zip(COLORS, gains, strict=True):
        for key, line, what in (("norms", "-", "as they are"), ("clipped", "--", "clipped to ±.01")):
            values = np.mean(found("deep|clip", gain, key=key), axis=0)
            look = {"color": color, "linewidth": 4, "alpha": 0.35} if line == "-" else {"color": color}
            right.plot(range(1, len(values) + 1), values, line, label=f"{gain:g} x He, {what}", **look)
    right.set(yscale="log", xlabel="layer", ylabel="norm of its first gradient, log scale", ylim=(1e-7, 1e9))
    right.set_xticks([1, 5, 10, 15, 20])
    right.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
