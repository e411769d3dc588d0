"""Plans as JSON: every field by name, every type from a closed list, nothing executed."""

import json
import typing
from typing import Any

import jax
import numpy as np

from jaxq.decisions.decision import Decision, Fed, Ranges
from jaxq.decisions.scheme import Backward, Scheme
from jaxq.numbers import spec
from jaxq.numbers.calibrators import Calibrator, Range
from jaxq.numbers.fits import Fit
from jaxq.numbers.histogram import BINS, Histogram
from jaxq.numbers.quantizers import Quantizer
from jaxq.numbers.scaling import Scaling
from jaxq.programs.sites import Operand, Site

VERSION = 1
RULES = (*typing.get_args(Calibrator), *typing.get_args(Fit), *typing.get_args(Scaling))
TYPES = spec.TYPES | {cls.__name__: cls for cls in (*RULES, Quantizer, Backward, Scheme, Operand, Site, Fed, Decision)}


def dump(decisions: tuple[Decision, ...], ranges: Ranges) -> str:
    """Return the JSON text of a plan. Raises `TypeError` while its ranges are being traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(ranges)):
        raise TypeError("a plan is written with the values of its ranges: call to_json() outside jit")
    for decision, site in zip(decisions, ranges, strict=True):
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(site)):
            raise ValueError(f"the range of site '{decision.site.name}' is not finite: calibrate on data without NaN")
    numbers = [[r and jax.tree.map(lambda a: np.asarray(a, np.float32).tolist(), r) for r in site] for site in ranges]
    return json.dumps({"jaxq_plan": VERSION, "decisions": spec.encode(decisions), "ranges": numbers})


def load(text: str) -> tuple[tuple[Decision, ...], Ranges]:
    """Return decisions and ranges from the JSON text of a plan; raise `ValueError` saying what is wrong with it."""
    try:
        data = json.loads(text, parse_constant=_refuse)
        if not isinstance(data, dict) or data.get("jaxq_plan") != VERSION:
            raise ValueError(f"expected jaxq_plan version {VERSION}")
        decisions = spec.decode(data["decisions"], TYPES)
        ranges = tuple(tuple(_range(r) for r in per_site) for per_site in data["ranges"])
        _check(decisions, ranges)
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError, AttributeError) as error:
        raise ValueError(f"this is not the JSON of a jaxq plan: {error}") from error
    return decisions, ranges


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a number of a plan")


def _range(value: Any) -> Range | None:
    if value is None:
        return None
    *ends, counts = value
    lo, hi, count = (np.asarray(item, np.float32) for item in ends)
    seen = None if counts is None else Histogram(*(np.asarray(item, np.float32) for item in counts))
    return Range(lo, hi, count, seen)


def _check(decisions: Any, ranges: tuple) -> None:
    """Raise unless the ranges have the structure and shapes that the decisions call for."""
    if not isinstance(decisions, tuple) or not all(isinstance(d, Decision) for d in decisions):
        raise ValueError("'decisions' is not a list of decisions")
    for decision in decisions:
        spec.check_types(decision)
    outputs = {d.site.name: d.out for d in decisions}
    if any(fed and fed.quantizer != outputs.get(fed.site) for d in decisions for fed in d.fed):
        raise ValueError("an operand is said to be the output of a site that puts out nothing of the kind")
    for decision, own in zip(decisions, ranges, strict=True):
        for quantizer, r in zip(decision.ranged, own, strict=True):
            _check_range(decision.site, quantizer, r)


def _check_range(site: Site, quantizer: Quantizer | None, r: Range | None) -> None:
    """Raise unless a range is what a static quantizer calls for, None without one; no array of that shape is made."""
    counts = quantizer is not None and quantizer.counts
    if (quantizer is None) != (r is None) or (r is not None and counts != (r.histogram is not None)):
        raise ValueError(f"the ranges of site '{site.name}' do not belong to its decision")
    if r is None:
        return
    shapes = [site.stack] * 3 + ([(*site.stack, BINS), site.stack] if counts else [])
    for want, have in zip(shapes, jax.tree.leaves(r), strict=True):
        if want != have.shape or not np.isfinite(have).all():
            raise ValueError(
                f"a range of site '{site.name}' has shape {have.shape} instead of {want}, or is not finite"
            )
