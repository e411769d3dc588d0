"""The report: what was decided at every site of a program, what it costs and what it does to the values."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.numbers import noise
from jaxq.numbers.histogram import Histogram
from jaxq.numbers.noise import Noise
from jaxq.report import energy
from jaxq.report.cost import Both, Cost


@dataclasses.dataclass(frozen=True)
class Measured:
    """An operand's values against the numbers that its codes stand for.

    noise and histogram: [*stack] in front; levels: the grid of the widest block, [*stack, n], n = 0 where there are
    more than 256.
    """

    quantizer: str
    role: str
    noise: Noise
    histogram: Histogram
    levels: np.ndarray


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One site. operands: None where float; alone: noise of the output where this site alone is quantized; together:
    where all are, so that what comes in is off already. Both are None where nothing was run. seconds: of the site by
    itself in one call, median; None where it was not timed, or takes more than its operands (indices, group sizes).

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> site = jaxq.report(f, jaxq.w8a8(), progress=False)(params, [jnp.ones((2, 4))]).sites[0]
    >>> site.name, site.cost.macs, site.cost.bops.ratio
    ('w', 32, 16.0)
    """

    decision: Decision
    operands: tuple[Measured | None, ...]
    alone: Noise | None
    together: Noise | None
    cost: Cost
    seconds: Both | None = None

    @property
    def name(self) -> str:
        """The site's name."""
        return self.decision.site.name

    def operand(self, role: str) -> Measured | None:
        """Return the first quantized operand of a role, `weight` or `act`."""
        return next((m for m in self.operands if m is not None and m.role == role), None)

    def noise(self, role: str) -> Noise | None:
        """Return the noise of all quantized operands of a role."""
        parts = [m.noise for m in self.operands if m is not None and m.role == role]
        return _stacked(parts) if parts else None


def _stacked(parts: list[Noise]) -> Noise:
    return noise.merge_axis(Noise(*(np.stack(leaves) for leaves in zip(*parts, strict=True))))


def decibels(n: Noise | None) -> float:
    """Return the SQNR of all layers together, in dB: NaN where nothing was seen, infinity where there is no noise."""
    if n is None:
        return math.nan
    flat = Noise(*(np.asarray(leaf, np.float64).reshape(-1) for leaf in n))
    return float(noise.decibels(noise.merge_axis(flat)))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a plan makes of a program. Printing it gives a table.

    sites: in program order; output: noise of the program's float outputs; bytes: of all parameters as held; seconds: of
    one call, median; note: how to read the numbers; what was not measured is None. All costs are of one call with the
    first batch.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> report = jaxq.report(f, jaxq.w8a8(), progress=False)(params, [jnp.ones((2, 4))])
    >>> report.bytes, report.worst(1)
    (Both(float=64, quantized=32), ['w'])
    """

    plan: Plan
    sites: tuple[SiteReport, ...]
    output: Noise | None
    bytes: Both
    seconds: Both | None
    batches: int
    device: str
    note: str = ""

    @property
    def macs(self) -> int:
        """Multiplications of one call."""
        return sum(site.cost.macs for site in self.sites)

    @property
    def bops(self) -> Both:
        """Bit operations of one call."""
        return Both(*(sum(site.cost.bops[n] for site in self.sites) for n in (0, 1)))

    @property
    def energy(self) -> Both:
        """Energy of one call at all sites, by `jaxq.report.energy`."""
        return Both(*(energy.total([site.cost.energy[n] for site in self.sites]) for n in (0, 1)))

    def __getitem__(self, name: str) -> SiteReport:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site '{name}' in this report; sites are: {', '.join(s.name for s in self.sites)}")

    def by_error(self) -> list[SiteReport]:
        """Return the quantized sites, worst first: by the SQNR of their output alone, of the weight if none was run."""
        quantized = [site for site in self.sites if site.decision.scheme is not None]
        return sorted(quantized, key=lambda site: _or_last(error(site)))

    def worst(self, n: int = 1) -> list[str]:
        """Return the names of the `n` sites that lose most, for `jaxq.revise(plan, dict.fromkeys(names))`."""
        return [site.name for site in self.by_error()[:n]]

    def __str__(self) -> str:
        from jaxq.report.table import render

        return render(self)

    def to_json(self) -> str:
        """Return everything as JSON text; per-layer values of scanned sites included."""
        from jaxq.report.document import dump

        return dump(self)

    def to_html(self, path: str | Path) -> Path:
        """Write one page that opens without network, and return its path."""
        from jaxq.report.page import render

        path = Path(path)
        path.write_text(render(self), encoding="utf-8")
        return path

    def to_png(self, folder: str | Path) -> list[Path]:
        """Write pictures into a folder and return their paths; without matplotlib, raise `ImportError`."""
        from jaxq.report.pictures import draw

        return draw(self, Path(folder))

    def __repr__(self) -> str:
        seen = f"{self.batches} batches, output {decibels(self.output):.1f} dB" if self.batches else "nothing run"
        return f"Report({len(self.sites)} sites, {seen})"


def error(site: SiteReport) -> float:
    """Return the SQNR by which sites are ranked, in dB."""
    return decibels(site.noise("weight") if site.alone is None else site.alone)


def _or_last(db: float) -> float:
    return math.inf if math.isnan(db) else db
