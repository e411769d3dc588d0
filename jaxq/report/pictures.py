"""A report as PNG files, by matplotlib: for papers and issue threads. The page of `to_html` needs none."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.report.bins import binned, widest
from jaxq.report.charts import bytes_pair
from jaxq.report.report import Measured, Report, decibels

GREY, ACCENT, WARM = "#98a2b3", "#4f46e5", "#e4572e"
SHOWN = 6  # sites whose values are drawn, worst first


def draw(report: Report, folder: Path) -> list[Path]:
    """Write `error.png`, `bytes.png` and `values.png`; raise `ImportError` naming the extra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jaxq[report]', or use to_html()") from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, paint in (("error", _error), ("bytes", _bytes), ("values", _values)):
        figure = Figure(figsize=(9, 4.5 if name != "values" else 6), layout="constrained")
        paint(report, figure)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _error(report: Report, figure: Any) -> None:
    axes = figure.subplots()
    numbers = np.arange(1, len(report.sites) + 1)
    together = [decibels(site.together) for site in report.sites]
    alone = [decibels(site.alone) for site in report.sites]
    axes.plot(numbers, together, "o-", color=ACCENT, label="quantized with all before it")
    axes.plot(numbers, alone, "o:", color=GREY, label="quantized alone")
    _dress(axes, "Output SQNR by depth", "site", "dB")


def _bytes(report: Report, figure: Any) -> None:
    axes = figure.subplots()
    for n, site in enumerate(report.sites, 1):
        plain, coded = bytes_pair(site)
        if plain and coded:
            axes.plot([n, n], [plain, coded], color=ACCENT, alpha=0.3, linewidth=3)
            axes.plot(n, plain, "o", color=GREY)
            axes.plot(n, coded, "o", color=ACCENT)
    axes.set_yscale("log")
    _dress(axes, "Bytes of weights, float (grey) and as held", "site", "bytes")


def _values(report: Report, figure: Any) -> None:
    measured = [(s.name, m) for s in report.by_error()[:SHOWN] for m in s.operands if m is not None][: 2 * SHOWN]
    columns = min(3, max(1, len(measured)))
    grid = figure.subplots(max(1, math.ceil(len(measured) / columns)), columns, squeeze=False)
    for axes in grid.flat[len(measured) :]:
        axes.axis("off")
    for axes, (name, m) in zip(grid.flat, measured, strict=False):
        _histogram(axes, name, m)


def _histogram(axes: Any, name: str, m: Measured) -> None:
    bins, levels = binned(m.histogram), widest(m.levels)
    if len(bins.counts):
        axes.stairs(np.log1p(bins.counts), bins.edges, fill=True, color=ACCENT, alpha=0.6)
    axes.vlines(levels, 0, 0.04 if len(levels) > 40 else 1, WARM, linewidth=0.5, transform=axes.get_xaxis_transform())
    axes.set_title(f"{name} {m.role}", fontsize=8)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
