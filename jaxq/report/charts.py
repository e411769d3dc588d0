"""The charts of a report, as SVG. Charts by depth share their horizontal axis: one column for each site."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxq.numbers.formats import bits_each
from jaxq.report.bins import binned, widest
from jaxq.report.report import Measured, Report, SiteReport, decibels
from jaxq.report.svg import Markup, join, tag
from jaxq.report.table import db, formats, scaled, size

LEFT, RIGHT, TOP, BOTTOM = 56, 6, 14, 24
HEIGHT = 230
COLUMN = 16  # least width of a site's column
WIDTH, NARROW = 860, 480  # least width of a chart, of one that shares its line with another
SIDE_BY_SIDE = 18  # at most so many sites fit on a narrow chart


class Axes:
    """Where sites and values are on a chart: a column for each site, `low` to `high` from bottom to top."""

    def __init__(self, sites: int, low: float, high: float, height: int = HEIGHT, least: int = WIDTH):
        self.sites, self.low, self.high, self.height = sites, low, high, height
        self.width = max(least, LEFT + RIGHT + COLUMN * sites)

    @property
    def step(self) -> float:
        """The width of a column."""
        return (self.width - LEFT - RIGHT) / max(1, self.sites)

    def x(self, number: int) -> float:
        """Return the middle of a site's column."""
        return LEFT + (number + 0.5) * self.step

    def y(self, value: float) -> float:
        """Return where a value is."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def grid(self, ticks: Sequence[tuple[float, str]]) -> Markup:
        """Return lines with labels at values, and site numbers below."""
        parts = [
            join(
                tag("line", x1=LEFT, x2=self.width - RIGHT, y1=self.y(v), y2=self.y(v), class_="grid"),
                tag("text", text, x=LEFT - 8, y=self.y(v) + 4, class_="tick", text_anchor="end"),
            )
            for v, text in ticks
        ]
        every = max(1, math.ceil(self.sites / 25))
        numbers = [
            tag("text", n + 1, x=self.x(n), y=self.height - 6, class_="tick", text_anchor="middle")
            for n in range(0, self.sites, every)
        ]
        return join(*parts, *numbers)

    def figure(self, *parts: Markup, label: str) -> Markup:
        """Return the chart, as wide as its columns need."""
        box = f"0 0 {self.width} {self.height}"
        style = f"min-width:{min(self.width, 560 if self.sites < 40 else self.width)}px"
        return tag("svg", *parts, viewBox=box, role="img", aria_label=label, style=style)


def _columns(report: Report, axes: Axes, text: Callable[[SiteReport], str]) -> Markup:
    """Return what a pointer meets: a column for each site with a tooltip, linked to the site's card."""
    columns = []
    for n, site in enumerate(report.sites):
        area = tag(
            "rect",
            tag("title", f"{n + 1}. {site.name}\n{text(site)}"),
            x=axes.x(n) - axes.step / 2,
            y=TOP,
            width=axes.step,
            height=axes.height - TOP - BOTTOM,
            class_="hit",
        )
        columns.append(tag("a", area, href=f"#site-{n + 1}"))
    return join(*columns)


def error_by_depth(report: Report) -> Markup | None:
    """Draw the SQNR of every site's output: it alone quantized, and all before it quantized too."""
    alone = [decibels(site.alone) for site in report.sites]
    together = [decibels(site.together) for site in report.sites]
    known = [v for v in (*alone, *together) if math.isfinite(v)]
    if not known:
        return None
    low, high = 5 * math.floor(min(known) / 5), 5 * math.ceil(max(known) / 5 + 1e-9)
    axes = Axes(len(report.sites), low, high)
    step = 5 if high - low <= 30 else 10 if high - low <= 70 else 20
    ticks = [(v, f"{v} dB") for v in range(step * math.ceil(low / step), high + 1, step)]
    marks = [_series(axes, together, "together"), _series(axes, alone, "alone")]

    def text(site: SiteReport) -> str:
        return f"alone {db(decibels(site.alone))} dB, together {db(decibels(site.together))} dB"

    return axes.figure(axes.grid(ticks), *marks, _columns(report, axes, text), label="Output SQNR by depth")


def _series(axes: Axes, values: Sequence[float], kind: str) -> Markup:
    points = [(axes.x(n), axes.y(v)) for n, v in enumerate(values) if math.isfinite(v)]
    line = tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=f"line {kind}")
    return join(line, *(tag("circle", cx=x, cy=y, r=3.2, class_=f"dot {kind}") for x, y in points))


def before_after(report: Report, value: Callable[[SiteReport], tuple[float, float]], unit: str) -> Markup | None:
    """Draw a number of the float and of the quantized program for every site, on a logarithmic axis."""
    pairs = [value(site) for site in report.sites]
    known = [v for pair in pairs for v in pair if v > 0]
    if not known:
        return None
    low, high = math.log10(min(known)) - 0.2, math.log10(max(known)) + 0.2
    axes = Axes(len(pairs), low, high, least=NARROW if len(pairs) <= SIDE_BY_SIDE else WIDTH)
    every = max(1, math.ceil((high - low) / 6))
    ticks = [(p, scaled(10.0**p, unit)) for p in range(math.ceil(low), math.floor(high) + 1, every)]
    marks = []
    for n, (plain, coded) in enumerate(pairs):
        if plain <= 0 or coded <= 0:
            continue
        x, y1, y2 = axes.x(n), axes.y(math.log10(plain)), axes.y(math.log10(coded))
        marks += [
            tag("line", x1=x, x2=x, y1=y1, y2=y2, class_="link"),
            tag("circle", cx=x, cy=y1, r=3.6, class_="dot before"),
            tag("circle", cx=x, cy=y2, r=3.6, class_="dot after"),
        ]

    def text(site: SiteReport) -> str:
        plain, coded = value(site)
        return f"float {scaled(plain, unit)}, quantized {scaled(coded, unit)}"

    return axes.figure(axes.grid(ticks), *marks, _columns(report, axes, text), label=f"Before and after, in {unit}")


def bits(report: Report) -> Markup:
    """Draw the width of every site's weights and activations as coloured cells."""
    axes = Axes(len(report.sites), 0, 1, 96)
    cells = []
    for row, role in enumerate(("weight", "act")):
        y = TOP + row * 30
        label = ("weights", "acts")[row]
        cells.append(tag("text", label, x=LEFT - 8, y=y + 18, class_="tick", text_anchor="end"))
        for n, site in enumerate(report.sites):
            width = _width(site, role)
            if width is None:
                continue
            kind = "float" if site.decision.scheme is None or site.decision.scheme.of(role) is None else "coded"
            x = axes.x(n) - axes.step / 2 + 1
            shade = f"--share:{min(1.0, width / 8):.2f}"
            cells.append(
                tag("rect", x=x, y=y, width=axes.step - 2, height=26, rx=4, class_=f"cell {kind}", style=shade)
            )
            cells.append(tag("text", width, x=axes.x(n), y=y + 18, class_=f"bits {kind}", text_anchor="middle"))

    def text(site: SiteReport) -> str:
        return " x ".join(formats(site))

    return axes.figure(axes.grid([]), *cells, _columns(report, axes, text), label="Bits by site")


def _width(site: SiteReport, role: str) -> float | None:
    operands = [o for o in site.decision.site.operands if o.role == role]
    if not operands:
        return None
    quantizer = site.decision.scheme.of(role) if site.decision.scheme else None
    return bits_each(quantizer.format) if quantizer else 8 * np.dtype(_numpy_name(operands[0].dtype)).itemsize


def _numpy_name(dtype: str) -> str:
    return "float16" if dtype == "bfloat16" else dtype


# --- histograms ------------------------------------------------------------------------------------------------------

PLOT = (320, 128)
FEW = 40  # levels that are drawn as lines; more of them as a ruler


def histogram(m: Measured) -> Markup:
    """Draw the distribution of an operand (counts on a logarithmic axis) against the numbers its codes stand for."""
    width, height = PLOT
    bins, levels = binned(m.histogram, 80), widest(m.levels)
    if not len(bins.counts):
        return Markup("")
    low, high = min(bins.low, *levels[:1], 0.0), max(bins.high, *levels[-1:], 0.0)
    span = (high - low) or 1.0
    floor = height - 22

    def x(value: float) -> float:
        return 6 + (value - low) / span * (width - 12)

    top = math.log1p(bins.counts.max())
    heights = [floor - (floor - 8) * math.log1p(c) / top for c in bins.counts]
    edges = [x(edge) for edge in bins.edges]
    outline = "".join(f"H{a:.1f}V{h:.1f}" for a, h in zip(edges[:-1], heights, strict=True))
    area = tag("path", d=f"M{edges[0]:.1f} {floor}{outline}H{edges[-1]:.1f}V{floor}Z", class_="area")
    reach = (8 if len(levels) <= FEW else floor) if len(levels) else floor
    lines = "".join(f"M{x(v):.1f} {reach}V{floor + 5}" for v in levels)
    marks = [tag("text", f"{v:.3g}", x=x(v), y=height - 4, class_="tick", text_anchor=a) for v, a in _ends(low, high)]
    grid = tag("path", d=lines, class_="levels few" if len(levels) <= FEW else "levels") if len(levels) else ""
    return tag("svg", area, grid, *marks, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{m.role} histogram")


def _ends(low: float, high: float) -> list[tuple[float, str]]:
    middle = [(0.0, "middle")] if low < -0.15 * (high - low) and high > 0.15 * (high - low) else []
    return [(low, "start"), *middle, (high, "end")]


def bytes_pair(site: SiteReport) -> tuple[float, float]:
    """Return the bytes of a site's weight, float and as held."""
    return site.cost.bytes.float, site.cost.bytes.quantized


def energy_pair(site: SiteReport) -> tuple[float, float]:
    """Return the energy of a site, float and quantized, in J."""
    return 1e-12 * site.cost.energy.float.total, 1e-12 * site.cost.energy.quantized.total


def seconds_pair(site: SiteReport) -> tuple[float, float]:
    """Return the time of a site by itself, float and quantized, in s; zeros where it was not timed."""
    return site.seconds or (0.0, 0.0)


def size_text(both: tuple[float, float]) -> str:
    """Return a pair of sizes as text."""
    return f"{size(both[0])} → {size(both[1])}"
