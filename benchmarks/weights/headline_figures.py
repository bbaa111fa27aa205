"""What others published of the two LeNets, and the figure of error against bytes in which they stand beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter


class Record(NamedTuple):
    """A published file.

    Attributes:
      network: "LeNet-300-100" or "LeNet-5".
      method: its name, and whose.
      bytes: of the file, as published; 1 kB is 1,000 bytes.
      error: on MNIST's test images, in percent.
      source: where the numbers stand; another paper's table where it says "quoted".
    """

    network: str
    method: str
    bytes: float
    error: float
    source: str


DEEP, MIRACLE, EPR = "arXiv 1510.00149", "arXiv 1810.00440", "arXiv 1906.06624"
RECORDS = (
    Record("LeNet-300-100", "Deep Compression (Han 2016)", 26_700, 1.58, DEEP),
    Record("LeNet-300-100", "EPR (Oktay 2020)", 8_560, 1.9, EPR),
    Record("LeNet-5", "Deep Compression (Han 2016)", 44_000, 0.74, DEEP),
    Record("LeNet-5", "Weightless (Reagen 2018)", 4_520, 2.0, f"quoted by {MIRACLE}"),
    Record("LeNet-5", "Bayesian Compression (Louizos 2017)", 2_300, 1.0, f"quoted by {MIRACLE}"),
    Record("LeNet-5", "MIRACLE (Havasi 2019), least error", 3_030, 0.69, MIRACLE),
    Record("LeNet-5", "MIRACLE, smallest", 1_520, 0.96, MIRACLE),
    Record("LeNet-5", "EPR (Oktay 2020)", 2_840, 0.9, EPR),
)


MARKERS = {"Deep": "s", "EPR": ">", "Weightless": "D", "Bayesian": "v", "MIRACLE": "^", "MIRACLE,": "^"}


class Point(NamedTuple):
    """One of our rows: means over seeds, and their standard deviation."""

    network: str
    name: str
    bytes: float
    error: float
    spread: float


def draw(points: Sequence[Point], path: Path) -> None:
    """Error against bytes, one panel a network: what is nearer to the lower left corner is better."""
    networks = list(dict.fromkeys(record.network for record in RECORDS))
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.0), layout="constrained")
    for axis, network in zip(axes, networks, strict=True):
        published = [r for r in RECORDS if r.network == network]
        for record in published:
            marker = MARKERS[record.method.split()[0]]
            shown = {"color": "#777777", "markersize": 8, "label": record.method}
            axis.plot(
                record.bytes, record.error, marker, fillstyle="none" if "smallest" in record.method else "full", **shown
            )
        mine = sorted((p for p in points if p.network == network), key=lambda p: p.bytes)
        if mine:
            rows = [p.bytes for p in mine], [p.error for p in mine], [p.spread for p in mine]
            axis.errorbar(*rows, color="#d55e00", marker="o", capsize=3, linestyle="", label="clipjax, five seeds")
        axis.set(xscale="log", title=network, xlabel="bytes of the file, log scale", ylabel="test error, %")
        axis.set_ylim(0, 1.1 * max(record.error for record in published))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter("B"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table() -> str:
    """The published files, with their sources."""
    lines = ["| published | error, % | file, bytes | source |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {r.network}, {r.method} | {r.error:.2f} | {r.bytes:,.0f} | {r.source} |" for r in RECORDS]
    return "\n".join(lines)
