"""Whether a site's decision has an integer form: codes of one fixed grid in, sums of int32 out."""

from jaxq.decisions.decision import Decision
from jaxq.numbers.formats import Fixed, Int
from jaxq.numbers.quantizers import Quantizer
from jaxq.numbers.rounding import NearestAway, NearestEven, Saturate, Stochastic

OPERATIONS = ("dot_general", "conv_general_dilated", "embedding")


def problem(decision: Decision) -> str:
    """Return why a site has no integer form, and what would make one; empty if it has."""
    site = decision.site
    if decision.scheme is None:
        return f"stays float in the plan ({decision.reason}): give it a scheme such as jaxq.w8a8(static=True)"
    if site.op not in OPERATIONS:
        return f"has no integer form yet: {site.op}"
    if site.op == "embedding" and decision.out is not None:
        return "rounds the rows it looks up: drop out= from its Scheme, for the sites that take the rows round them"
    roles = [operand.role for operand in site.operands]
    faults = (_fault(n, role, q) for n, (role, q) in enumerate(zip(roles, decision.quantizers, strict=True)))
    fault = next(filter(None, faults), "")
    if not fault and decision.out is not None and not _is_fixed_grid(decision.out):
        return f"puts out {decision.out!r}: use int8(per_tensor=True, calibrator=jaxq.minmax()) in Scheme(out=)"
    return fault


def _fault(number: int, role: str, quantizer: Quantizer | None) -> str:
    if quantizer is None or not quantizer.integer:
        return f"takes operand {number} in {quantizer or 'float'}: only integers of up to 8 bits multiply"
    if role == "weight":
        return "" if quantizer.symmetric else "has a weight with zero points: use a symmetric quantizer"
    if _is_fixed_grid(quantizer):
        return ""
    return (
        f"takes operand {number} on a grid that is not fixed ({quantizer!r}): use one with a static scale, rounded "
        "to nearest and saturated, such as of jaxq.w8a8(static=True), and calibrate it"
    )


def _is_fixed_grid(quantizer: Quantizer) -> bool:
    """Tell whether a quantizer has one grid of int8 codes for all data, rounds to nearest and saturates."""
    form = quantizer.format
    if isinstance(form, Fixed):
        return (
            form.integer
            and isinstance(form.rounding, NearestEven | NearestAway | Stochastic)
            and isinstance(form.overflow, Saturate)
        )
    return quantizer.static and quantizer.per_tensor and isinstance(form, Int) and form.integer
