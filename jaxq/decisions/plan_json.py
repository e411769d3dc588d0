"""Plans as JSON: every field by name, every type from a closed list, nothing executed."""

import json
import math
import typing
from typing import Any

import jax
import numpy as np

from jaxq.decisions.decision import Decision, Fed, Ranges, blank_ranges
from jaxq.decisions.scheme import After, Backward, Scheme
from jaxq.numbers import spec
from jaxq.numbers.calibrators import Calibrator
from jaxq.numbers.estimators import Estimator
from jaxq.numbers.fits import Fit
from jaxq.numbers.quantizers import Quantizer
from jaxq.numbers.scaling import Scaling
from jaxq.programs import soundness
from jaxq.programs.floating import Floating
from jaxq.programs.sites import Operand, Site

VERSION = 2
RULES = tuple(rule for kind in (Calibrator, Estimator, Fit, Scaling) for rule in typing.get_args(kind))
PARTS = (Quantizer, After, Backward, Scheme, Operand, Site, Fed, Decision)
TYPES = spec.TYPES | {cls.__name__: cls for cls in (*RULES, *PARTS)}


def dump(decisions: tuple[Decision, ...], ranges: Ranges, floats: tuple[Floating, ...] | None) -> str:
    """Return the JSON text of a plan. Raises `TypeError` while its ranges are being traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(ranges)):
        raise TypeError("a plan is written with the values of its ranges: call to_json() outside jit")
    for decision, site in zip(decisions, ranges, strict=True):
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(site)):
            raise ValueError(f"the range of site '{decision.site.name}' is not finite: calibrate on data without NaN")
    numbers = [[r and jax.tree.map(lambda a: np.asarray(a, np.float32).tolist(), r) for r in site] for site in ranges]
    parts = {"decisions": spec.encode(decisions), "ranges": numbers, "floats": spec.encode(floats)}
    return json.dumps({"jaxq_plan": VERSION, **parts})


def load(text: str) -> tuple[tuple[Decision, ...], Ranges, tuple[Floating, ...] | None]:
    """Return the parts of a plan from its JSON text; raise `ValueError` saying what is wrong with it."""
    try:
        data = json.loads(text, parse_constant=_refuse)
        if not isinstance(data, dict) or data.get("jaxq_plan") != VERSION:
            raise ValueError(f"expected jaxq_plan version {VERSION}")
        decisions = spec.decode(data["decisions"], TYPES)
        _check(decisions, most=len(text))
        floats = _read_floats(data.get("floats"))
        blank = tuple(blank_ranges(decision) for decision in decisions)
        ranges = _filled(blank, data["ranges"])
        _check_shapes(decisions, blank, ranges)
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError, AttributeError, MemoryError) as error:
        raise ValueError(f"this is not the JSON of a jaxq plan: {error}") from error
    return decisions, ranges, floats


def _read_floats(value: Any) -> tuple[Floating, ...] | None:
    if value is None:  # as in plans of before
        return None
    floats = spec.decode(value, {"Floating": Floating})
    if not isinstance(floats, tuple) or not all(isinstance(f, Floating) for f in floats):
        raise ValueError("'floats' is not a list of operations")
    for floating in floats:
        spec.check_types(floating)
    return floats


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a number of a plan")


def _check(decisions: Any, most: int) -> None:
    """Raise unless these are decisions that a program could have; most: numbers that the text can hold."""
    if not isinstance(decisions, tuple) or not all(isinstance(d, Decision) for d in decisions):
        raise ValueError("'decisions' is not a list of decisions")
    for decision in decisions:
        spec.check_types(decision)
        soundness.check(decision.site)
        _check_decision(decision, most)
    outputs = {d.site.name: d.out for d in decisions}
    if len(outputs) != len(decisions):
        raise ValueError("two decisions are for sites of one name")
    if any(fed and fed.quantizer != outputs.get(fed.site) for d in decisions for fed in d.fed):
        raise ValueError("an operand is said to be the output of a site that puts out nothing of the kind")


def _check_decision(decision: Decision, most: int) -> None:
    site = decision.site
    if len(decision.fed) not in (0, len(site.operands)):
        raise ValueError(f"site '{site.name}' has {len(site.operands)} operands, and {len(decision.fed)} are fed")
    if len(decision.own) not in (0, len(site.operands)):
        raise ValueError(f"site '{site.name}' has {len(decision.own)} quantizers of functions for its operands")
    if any(decision.ranged) and math.prod(site.stack) > most:
        raise ValueError(f"site '{site.name}' has more layers than there are ranges")
    for quantizer, operand in zip(decision.quantizers, site.operands, strict=True):
        if quantizer is not None:
            quantizer.grid(operand.shape, operand.contracted)  # raises for groups that do not divide


def _filled(blank: Any, value: Any) -> Any:
    """Return nested lists of numbers in the structure of `blank`, where named tuples were written as lists."""
    if blank is None or value is None:
        if blank is not value:
            raise ValueError("the ranges do not belong to the decisions")
        return None
    if not isinstance(blank, tuple):
        return np.asarray(value, np.float32)
    if not isinstance(value, list) or len(value) != len(blank):
        raise ValueError("the ranges do not belong to the decisions")
    parts = [_filled(part, item) for part, item in zip(blank, value, strict=True)]
    return tuple(parts) if type(blank) is tuple else type(blank)(*parts)


def _check_shapes(decisions: tuple[Decision, ...], blank: Ranges, ranges: Ranges) -> None:
    """Raise unless the ranges have the shapes that the decisions call for."""
    for decision, *pair in zip(decisions, blank, ranges, strict=True):
        for want, have in zip(*map(jax.tree.leaves, pair), strict=True):
            if want.shape != have.shape or not np.isfinite(have).all():
                raise ValueError(
                    f"a range of site '{decision.site.name}' has shape {have.shape} instead of {want.shape}, or is not "
                    "finite"
                )
