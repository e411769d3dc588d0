"""A report as JSON. SQNR is null where nothing was seen and where there is no noise at all, which `noise: 0` tells."""

import json
import math
from typing import Any

import numpy as np

from jaxq.numbers import noise
from jaxq.numbers.noise import Noise
from jaxq.report.bins import binned, widest
from jaxq.report.cost import Both
from jaxq.report.report import Measured, Report, SiteReport, decibels

VERSION = 1


def dump(report: Report) -> str:
    """Return the report as JSON text: `sites` in program order, energies in pJ, times in seconds, ratios in dB."""
    kept = [site.decision for site in report.sites if site.decision.scheme is None]
    data = {
        "jaxq_report": VERSION,
        "device": report.device,
        "batches": report.batches,
        "note": report.note,
        "output": _noise(report.output),
        "bytes": _both(report.bytes),
        "macs": report.macs,
        "bops": _both(report.bops),
        "energy_pj": _energies(report.energy),
        "seconds": _both(report.seconds),
        "worst": report.worst(len(report.sites)),
        "left_in_float": [{"site": d.site.name, "reason": d.reason} for d in kept],
        "sites": [_site(site) for site in report.sites],
    }
    return json.dumps(data, allow_nan=False)


def _both(both: Both | None) -> Any:
    return None if both is None else {"float": both.float, "quantized": both.quantized}


def _energies(both: Both) -> dict[str, Any]:
    return {name: value._asdict() for name, value in both._asdict().items()}


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _noise(n: Noise | None) -> dict[str, Any] | None:
    if n is None:
        return None
    flat = noise.merge_axis(Noise(*(np.asarray(leaf, np.float64).reshape(-1) for leaf in n)))
    square = float(flat.peak) ** 2
    powers = {"signal": float(flat.signal) * square, "noise": float(flat.noise) * square}
    layers = [_finite(x) for x in np.ravel(noise.decibels(n))] if np.ndim(n.peak) else None
    return {"db": _finite(decibels(n)), **powers, "peak": float(flat.peak), "layers_db": layers}


def _site(site: SiteReport) -> dict[str, Any]:
    decided, scheme = site.decision.site, site.decision.scheme
    return {
        "name": site.name,
        "op": decided.op,
        "source": decided.source,
        "stack": list(decided.stack),
        "operands": [{"role": o.role, "shape": list(o.shape), "dtype": o.dtype} for o in decided.operands],
        "weight": repr(scheme.weight) if scheme and scheme.weight else None,
        "act": repr(scheme.act) if scheme and scheme.act else None,
        "reason": site.decision.reason,
        "alone": _noise(site.alone),
        "together": _noise(site.together),
        "measured": [_measured(m) for m in site.operands],
        "macs": site.cost.macs,
        "bops": _both(site.cost.bops),
        "bytes": _both(site.cost.bytes),
        "energy_pj": _energies(site.cost.energy),
        "seconds": _both(site.seconds),
    }


def _measured(m: Measured | None) -> dict[str, Any] | None:
    if m is None:
        return None
    bins = binned(m.histogram)
    values = {"low": bins.low, "high": bins.high, "counts": bins.counts.tolist()}
    return {
        "role": m.role,
        "quantizer": m.quantizer,
        "noise": _noise(m.noise),
        "histogram": values,
        "levels": widest(m.levels).tolist(),
    }
