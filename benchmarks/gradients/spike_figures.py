"""The figure of spikes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator
from spike_arms import ARMS


def draw(
    tables: dict[str, dict[str, Any]], plan: dict[str, Any], frequencies: float, margin: float, path: Path
) -> None:
    """Final loss against learning rate, and beside it the stable range of every arm in the color of its line."""
    figure, axes = plt.subplots(len(tables), 2, figsize=(12, 4.4 * len(tables)), layout="constrained", squeeze=False)
    for (name, table), (left, right) in zip(tables.items(), axes, strict=True):
        rates = plan[name].rates
        left.axhspan(0, table["no clip"].loss.min() + margin, color="#eeeeee", zorder=0)
        left.axhline(frequencies, color="#999999", linestyle=":", linewidth=1)
        left.text(rates[0], frequencies, "letter frequencies", color="#777777", va="bottom")
        for row, (arm, r) in enumerate(table.items()):
            i = list(ARMS).index(arm)  # an arm looks alike in all panels
            color = plt.colormaps["tab20"](i) if i else "black"
            look = {"color": color, "marker": "osDv^<>PXhpd*H8s"[i], "markersize": 5}
            left.plot(rates, r.loss, linestyle="-" if i else "--", linewidth=1.3 if i else 2.2, **look)
            right.plot(r.stable, [-row] * len(r.stable), linewidth=4, **look)
        left.set_ylim(min(r.loss.min() for r in table.values()) - 0.05, frequencies + 0.25)
        left.set_title(f"{name}: final validation loss, nats (grey: stable)", loc="left")
        right.set_title("Stable learning rates, largest over smallest", loc="left")
        right.set_yticks([-i for i in range(len(table))], [f"{arm}  {r.width:g}x" for arm, r in table.items()])
        for axis in (left, right):
            axis.set(xscale="log", xlabel="learning rate, log scale", xlim=(rates[0] / 1.2, rates[-1] * 1.2))
            axis.set_xticks(rates, [f"{lr:g}" for lr in rates], fontsize=8)
            axis.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=100)
