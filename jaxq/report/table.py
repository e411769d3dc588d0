"""A report as text: one row per site, the worst marked, in the width of the terminal."""

import math
import shutil
from collections.abc import Callable
from typing import NamedTuple

from jaxq.report.cost import Both
from jaxq.report.report import Report, SiteReport, decibels

NOTHING = "-"
LEAST_NAME = 12
MARKED = 3  # sites


class Column(NamedTuple):
    """A column: its title, a cell's text, and its weight: the lightest ones give way in a narrow terminal."""

    title: str
    cell: Callable[[SiteReport], str]
    weight: int
    left: bool = False


def db(value: float) -> str:
    """Return decibels as text: `exact` for no noise."""
    return NOTHING if math.isnan(value) else "exact" if math.isinf(value) else f"{value:.1f}"


def size(count: float) -> str:
    """Return bytes in three digits or so.

    >>> size(512), size(90_000_000)
    ('512 B', '90.0 MB')
    """
    return NOTHING if not count else scaled(count, "B")


def scaled(value: float, unit: str) -> str:
    """Return a number with a decimal prefix.

    >>> scaled(1234.0, "J"), scaled(3.2e-7, "J"), scaled(0, "J")
    ('1.23 kJ', '320 nJ', '0 J')
    """
    if not value:
        return f"0 {unit}"
    power = max(-4, min(4, math.floor(math.log10(abs(value)) / 3 + 1e-9)))
    number = value / 1000.0**power
    digits = 0 if power == 0 and float(value).is_integer() else max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:.{digits}f} {['p', 'n', 'µ', 'm', '', 'k', 'M', 'G', 'T'][power + 4]}{unit}"


def formats(site: SiteReport) -> tuple[str, str]:
    """Return the formats of weights and activations, short."""
    scheme, names = site.decision.scheme, []
    for role in ("weight", "act"):
        quantizer = scheme.of(role) if scheme else None
        has = any(operand.role == role for operand in site.decision.site.operands)
        names.append(str(quantizer.format) if quantizer and has else "float" if has else NOTHING)
    return names[0], names[1]


def time(site: SiteReport, number: int) -> str:
    """Return the time of a site by itself, float (0) or quantized (1)."""
    return NOTHING if site.seconds is None else scaled(site.seconds[number], "s")


COLUMNS = (
    Column("weights", lambda s: formats(s)[0], 11, left=True),
    Column("acts", lambda s: formats(s)[1], 10, left=True),
    Column("W dB", lambda s: db(decibels(s.noise("weight"))), 9),
    Column("A dB", lambda s: db(decibels(s.noise("act"))), 8),
    Column("out dB", lambda s: db(decibels(s.alone)), 12),
    Column("all dB", lambda s: db(decibels(s.together)), 7),
    Column("float", lambda s: size(s.cost.bytes.float), 5),
    Column("held", lambda s: size(s.cost.bytes.quantized), 6),
    Column("MACs", lambda s: scaled(s.cost.macs, "").strip() if s.cost.macs else NOTHING, 4),
    Column("energy", lambda s: scaled(1e-12 * s.cost.energy.quantized.total, "J"), 3),
    Column("float t", lambda s: time(s, 0), 1),
    Column("time", lambda s: time(s, 1), 2),
)


def render(report: Report, width: int | None = None) -> str:
    """Return the table in `width` characters (default: the terminal's), then the totals and what stayed float."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    columns = _fitting(report, width)
    names = _names(report, width - sum(_width(c, report) + 2 for c in columns))
    rows = [[name, *(c.cell(site) for c in columns)] for name, site in zip(names, report.sites, strict=True)]
    lines = aligned([["site", *(c.title for c in columns)], *rows], [True, *(c.left for c in columns)])
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *_summary(report)])


def _width(column: Column, report: Report) -> int:
    return max([len(column.title), *(len(column.cell(site)) for site in report.sites)])


def _fitting(report: Report, width: int) -> list[Column]:
    columns = list(COLUMNS)
    while len(columns) > 1 and LEAST_NAME + sum(_width(c, report) + 2 for c in columns) > width:
        columns.remove(min(columns, key=lambda c: c.weight))
    return columns


def _names(report: Report, width: int) -> list[str]:
    worst = set(report.worst(MARKED)) if len(report.sites) > MARKED else set()
    marks = [f"{site.name}{' !' if site.name in worst else ''}" for site in report.sites]
    width = max(width, LEAST_NAME)
    return [name if len(name) <= width else f"…{name[len(name) - width + 1 :]}" for name in marks]


def aligned(rows: list[list[str]], left: list[bool]) -> list[str]:
    """Return rows of cells as lines, columns aligned to the left or to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


def _summary(report: Report) -> list[str]:
    return [*_totals(report), *_kept(report)]


def _totals(report: Report) -> list[str]:
    def ratio(both: Both) -> str:
        if not both.quantized or not both.float:
            return ""
        return f"{both.ratio:.2f}x less" if both.ratio >= 1 else f"{1 / both.ratio:.2f}x more"

    energies = report.energy
    rows = [["", "float", "quantized", ""]]
    rows.append(["parameters", size(report.bytes.float), size(report.bytes.quantized), ratio(report.bytes)])
    rows.append(["bit operations", *(scaled(n, "").strip() for n in report.bops), ratio(report.bops)])
    for kind in ("compute", "memory"):
        parts = Both(*(1e-12 * getattr(e, kind) for e in energies))
        rows.append([f"energy, {kind}", *(scaled(n, "J") for n in parts), ratio(parts)])
    if report.seconds is not None:
        rows.append(["latency", *(scaled(t, "s") for t in report.seconds), ratio(report.seconds)])
    lines = aligned(rows, [True, False, False, True])
    if report.output is None:
        return [*lines, report.note]
    batches = f"{report.batches} batch{'es' if report.batches != 1 else ''}"
    return [*lines, f"output {db(decibels(report.output))} dB over {batches}, {report.device}"]


def _kept(report: Report) -> list[str]:
    kept = [site.decision for site in report.sites if site.decision.scheme is None]
    return [f"{d.site.name} stays float: {d.reason}" for d in kept]
