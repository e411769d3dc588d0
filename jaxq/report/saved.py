"""The report of a model as it is stored: what converted parameters and their plan tell without running anything."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.io.tree import leaf_names
from jaxq.numbers import blocks, histogram, noise
from jaxq.numbers.formats import Fixed, Int
from jaxq.numbers.levels import levels
from jaxq.numbers.noise import Noise
from jaxq.numbers.qarray import QArray, Stored
from jaxq.report.cost import Both, cost_of
from jaxq.report.held import nbytes
from jaxq.report.report import Measured, Report, SiteReport

ESTIMATED = "SQNR of weights estimated from their steps: signal over step^2 / 12"
COMPARED = "SQNR of weights against the float parameters"


def saved_report(qparams: Any, plan: Plan, *, reference: Any = None) -> Report:
    """Return the report of converted parameters: formats, bytes, histograms and the SQNR of weights, costs.

    reference: the float parameters, to compare with. Without them the noise of integers is taken to be uniform within a
    step, `step^2 / 12`, and other formats have no SQNR. Nothing is known of activations and outputs. Costs are of one
    call in the shapes that the plan was made for.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, jnp.ones((2, 4)))
    >>> report = jaxq.saved_report(jaxq.convert(f, plan)(params, jnp.ones((2, 4))), plan)
    >>> report.bytes, report.sites[0].operand("weight").levels.shape
    (Both(float=64, quantized=32), (255,))
    """
    return report_of(leaf_names(qparams, plan), plan, None if reference is None else leaf_names(reference, plan))


def report_of(leaves: Mapping[str, Any], plan: Plan, exact: Mapping[str, Any] | None = None) -> Report:
    """Return the report of leaves by the names that a plan calls them by; exact: the float ones, to compare with."""
    sites = tuple(_site(decision, leaves, exact or {}) for decision in plan.decisions)
    held = [leaf for leaf in leaves.values() if leaf is not None]
    total = sum(_float_bytes(leaf) for leaf in held)
    return Report(plan, sites, None, Both(total, nbytes(held)), None, 0, "", ESTIMATED if exact is None else COMPARED)


def _float_bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf.nbytes
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _site(decision: Decision, stored: Mapping[str, Any], exact: Mapping[str, Any]) -> SiteReport:
    site = decision.site
    origins = site.weight.origins if site.weight else ()
    missing = [name for name in origins if stored.get(name) is None]
    if missing:
        raise ValueError(f"site '{site.name}' is made of {', '.join(missing)}, which these parameters do not hold")
    leaves = [stored[name] for name in origins]
    own = [_codes(leaf, site.name) for leaf in leaves]
    small = [leaf if q is None else q for leaf, q in zip(leaves, own, strict=True)]
    held = Both(sum(map(_float_bytes, leaves)), nbytes(small))
    float_weight = exact.get(origins[0]) if len(origins) == 1 else None
    operands = [
        _measured(decision, n, own[0], float_weight) if operand.role == "weight" and own else None
        for n, operand in enumerate(site.operands)
    ]
    return SiteReport(decision, tuple(operands), None, None, cost_of(decision, math.prod(site.stack), held))


def _codes(leaf: Any, name: str) -> QArray | None:
    if isinstance(leaf, Stored):
        return leaf.codes.get(name)
    return leaf if isinstance(leaf, QArray) else None


def _measured(decision: Decision, number: int, q: QArray | None, exact: Any) -> Measured | None:
    quantizer = decision.quantizer(number)
    if q is None or quantizer is None:
        return None
    values = q.decode(jnp.float32)
    same = exact is not None and exact.shape == values.shape
    heard = noise.of(exact, values) if same else _expected(q, values)
    seen = (heard, histogram.of(values), levels(quantizer, q))
    return Measured(repr(quantizer), "weight", *jax.tree.map(np.asarray, seen))


def _expected(q: QArray, values: jax.Array) -> Noise:
    """Return the noise of rounding to a uniform grid, `step^2 / 12` for each value; nothing seen for other grids."""
    if not isinstance(q.format, (Int, Fixed)):
        return Noise(*(jnp.float32(0),) * 3)
    step = blocks.broadcast(q.real_scale(), q.shape)
    return noise.of(values, values + lax.mul(step, np.float32(12**-0.5)))
