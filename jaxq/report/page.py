"""A report as one HTML page: style, script and charts inside, nothing fetched, readable on a telephone."""

import importlib.resources
import math

from jaxq.report import charts
from jaxq.report.cost import Both
from jaxq.report.report import Report, SiteReport, decibels, error
from jaxq.report.svg import Markup, join, tag
from jaxq.report.table import db, formats, scaled, size, time

OPEN_CARDS = 12  # shown at once, worst first; the rest unfolds


def render(report: Report) -> str:
    """Return the page."""
    head = join(
        tag("title", "jaxq report"),
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("style", Markup(_asset("page.css"))),
    )
    parts = [_header(report), _tiles(report), *_charts(report), _table(report), _cards(report), _kept(report)]
    body = join(tag("main", *parts), tag("script", Markup(_asset("page.js"))))
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}{tag("body", body)}</html>\n'


def _asset(name: str) -> str:
    return (importlib.resources.files("jaxq.report") / name).read_text(encoding="utf-8")


def _header(report: Report) -> Markup:
    quantized = sum(site.decision.scheme is not None for site in report.sites)
    batches = f"{report.batches} batch{'' if report.batches == 1 else 'es'}, " if report.batches else ""
    line = f"{quantized} of {len(report.sites)} sites quantized · {batches}{report.device}{report.note}"
    return tag(
        "header",
        tag("div", tag("h1", "Quantization report"), tag("p", line, class_="soft")),
        tag("button", "Light / dark", id="theme", type="button"),
    )


# --- totals ----------------------------------------------------------------------------------------------------------


def _tiles(report: Report) -> Markup:
    energy = report.energy
    tiles = [_tile("parameters", report.bytes, "B")]
    if report.macs:
        tiles.append(_tile("energy of arithmetic", Both(*(1e-12 * e.compute for e in energy)), "J"))
        tiles.append(_tile("energy of memory", Both(*(1e-12 * e.memory for e in energy)), "J"))
    if report.seconds is not None:
        tiles.append(_tile("latency", report.seconds, "s"))
    if report.output is not None:
        detail = tag("p", "signal to noise of the outputs", class_="soft")
        tiles.append(
            tag("div", tag("span", "output", class_="soft"), tag("b", _db(report.output)), detail, class_="tile")
        )
    return tag("div", *tiles, class_="tiles")


def _db(n) -> str:
    text = db(decibels(n))
    return text if text in ("exact", "-") else f"{text} dB"


def _tile(name: str, both: Both, unit: str) -> Markup:
    ratio = both.ratio
    text = "–" if math.isnan(ratio) else f"{ratio:.2f}× less" if ratio >= 1 else f"{1 / ratio:.2f}× more"
    full = min(100.0, 100.0 / ratio) if ratio > 0 else 0.0
    kind = "more" if ratio < 1 else None
    return tag(
        "div",
        tag("span", name, class_="soft"),
        tag("b", text),
        tag("div", tag("i", style=f"width:{full:.1f}%", class_=kind), class_="bar"),
        tag("span", f"{scaled(both.float, unit)} → {scaled(both.quantized, unit)}", class_="soft"),
        class_="tile",
    )


# --- charts ----------------------------------------------------------------------------------------------------------


def _charts(report: Report) -> list[Markup]:
    return [
        _chart(
            "Error by depth",
            "Signal to noise of every site's output; higher is better",
            charts.error_by_depth(report),
            ("quantized with all before it", "quantized alone"),
        ),
        _chart("Bits", "Width of weights and activations at every site", charts.bits(report), ()),
        _pair(report, *_before_after(report)),
    ]


def _before_after(report: Report) -> list[Markup]:
    return [
        _chart(
            "Bytes of weights",
            "As held in memory, scales included",
            charts.before_after(report, charts.bytes_pair, "B"),
            ("quantized", "float"),
        ),
        _chart(
            "Energy",
            "Arithmetic and memory of one call, by Horowitz's table of a 45 nm process",
            charts.before_after(report, charts.energy_pair, "J"),
            ("quantized", "float"),
        ),
        _chart(
            "Latency",
            "Of every product by itself in one call, measured, quantizing its operands included",
            charts.before_after(report, charts.seconds_pair, "s"),
            ("quantized", "float"),
        ),
    ]


def _pair(report: Report, *sections: Markup) -> Markup:
    """Return sections, beside each other where there are few sites."""
    return tag("div", *sections, class_="pair" if len(report.sites) <= charts.SIDE_BY_SIDE else None)


def _chart(title: str, line: str, drawing: Markup | None, keys: tuple[str, ...]) -> Markup:
    if drawing is None:
        return Markup("")
    legend = [tag("span", key, class_=f"key{' grey' if n else ''}") for n, key in enumerate(keys)]
    text = tag("p", line, class_="soft")
    return tag("section", tag("h2", title), text, tag("div", *legend), tag("div", drawing, class_="chart"))


# --- sites -----------------------------------------------------------------------------------------------------------

HEADS = (
    *("#", "site", "weights", "acts", "W dB", "A dB", "out dB", "all dB"),
    *("float", "held", "MACs", "energy", "float t", "time"),
)


def _table(report: Report) -> Markup:
    heads = [tag("th", head, class_="left" if head in ("site", "weights", "acts") else None) for head in HEADS]
    worst = set(report.worst(3)) if len(report.sites) > 3 else set()
    rows = [
        tag("tr", *_cells(n + 1, site), class_="worst" if site.name in worst else None)
        for n, site in enumerate(report.sites)
    ]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    text = "Signal to noise of weights, activations, the output (this site alone quantized) and all (what is before it "
    text = tag("p", text + "too). A click on a heading sorts; the worst three sites are in colour.", class_="soft")
    return tag("section", tag("h2", "Sites"), text, tag("div", table, class_="scroll"))


def _cells(number: int, site: SiteReport) -> list[Markup]:
    weights, acts = formats(site)
    noises = (site.noise("weight"), site.noise("act"), site.alone, site.together)
    cells = [tag("td", number), tag("td", tag("a", site.name, href=f"#site-{number}"), class_="left")]
    cells += [tag("td", text, class_="left") for text in (weights, acts)]
    cells += [tag("td", db(decibels(n)), data_value=_number(decibels(n))) for n in noises]
    cost = site.cost
    cells += [tag("td", size(count), data_value=count) for count in cost.bytes]
    joules = 1e-12 * cost.energy.quantized.total
    macs = scaled(cost.macs, "").strip() if cost.macs else "-"
    cells += [tag("td", macs, data_value=cost.macs), tag("td", scaled(joules, "J"), data_value=repr(joules))]
    times = site.seconds or (0.0, 0.0)
    return cells + [tag("td", time(site, n), data_value=repr(times[n])) for n in (0, 1)]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else "1e9" if math.isinf(value) else f"{value:.3f}"


def _cards(report: Report) -> Markup:
    numbers = {site.name: n + 1 for n, site in enumerate(report.sites)}
    worst = set(report.worst(3)) if len(report.sites) > 3 else set()
    cards = [_card(site, numbers[site.name], site.name in worst) for site in report.by_error()]
    if not cards:
        return Markup("")
    first, rest = cards[:OPEN_CARDS], cards[OPEN_CARDS:]
    more = tag("details", tag("summary", f"{len(rest)} more"), tag("div", *rest, class_="cards")) if rest else ""
    text = "Worst first. Counts are on a logarithmic axis; the lines are the numbers that the codes stand for (of the "
    text = tag("p", text + "channel, token or group with the widest range).", class_="soft")
    return tag("section", tag("h2", "Values against their grid"), text, tag("div", *first, class_="cards"), more)


def _card(site: SiteReport, number: int, is_worst: bool) -> Markup:
    mark = tag("em", " worst") if is_worst else ""
    drawings = []
    for m in site.operands:
        if m is not None:
            title = f"{'weight' if m.role == 'weight' else 'activation'} · {m.quantizer} · {_db(m.noise)}"
            drawings += [tag("h4", title), charts.histogram(m)]
    value = error(site)
    line = f"{number} · {'output' if site.alone is not None else 'weight'} {db(value)} dB alone"
    line += f" · {charts.size_text(site.cost.bytes)}" if site.cost.bytes.float else ""
    return tag(
        "div", tag("h3", site.name, mark), tag("p", line, class_="soft"), *drawings, class_="card", id=f"site-{number}"
    )


def _kept(report: Report) -> Markup:
    kept = [site.decision for site in report.sites if site.decision.scheme is None]
    if not kept:
        return Markup("")
    rows = [tag("li", tag("code", d.site.name), f" ({d.site.op}): {d.reason}") for d in kept]
    return tag("section", tag("h2", f"Left in float: {len(kept)}"), tag("ul", *rows, class_="kept"))
