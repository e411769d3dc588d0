"""`tune`: leave in float what its plan would slow down on this device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxq.decisions.decision import Decision, blank_ranges
from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.arguments import Argnums
from jaxq.interpretation.transforms import DEFAULT
from jaxq.measure import alone
from jaxq.measure.cost import costs
from jaxq.measure.explain import loaded
from jaxq.measure.explanation import speed_up
from jaxq.programs.sites import Located

# Within this, slower is noise.
MARGIN = 1.05

Measure = Callable[[Located, Decision], float | None]


def measured(item: Located, decision: Decision) -> float | None:
    """Return how many times as fast as float a site runs by itself on this device."""
    return speed_up(*costs(alone.programs(item, decision), None))


def tune(
    f: Callable, plan: Plan | Policy = DEFAULT, *, argnums: Argnums = 0, measure: Measure = measured
) -> Callable[..., Plan]:
    """Return a function `(params, *args) -> Plan` that leaves in float the sites that are slower quantized.

    Each kind of site (operation, shapes, scheme) is timed by itself in float and as planned, on this device, and where
    float wins by more than 5 % its decision becomes float, with the reason in the plan. Lookups, ragged products and
    sites with a quantized output, which others share, stay as decided. measure: how many times as fast as float a site
    runs, instead of timing it. Raises `TypeError` for converted parameters.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]), {"up": jnp.ones((8, 4)), "down": jnp.ones((4, 4))}
    >>> pretend = lambda item, decision: 0.5 if item.site.name == "down" else 2.0
    >>> plan = jaxq.tune(f, jaxq.w8a8(), measure=pretend)(params, jnp.ones((2, 8)))
    >>> plan["up"].is_integer, plan["down"].reason
    (True, 'slower in int8 on cpu: 2.0x')
    """

    def tuned(*args, **kwargs) -> Plan:
        program = loaded(f, plan, argnums, args, kwargs)
        speeds: dict[Any, float | None] = {}
        kept = []
        for item, decision, ranges in zip(program.analysis.located, program.decisions, program.ranges, strict=True):
            kind = alone.kind_of(item, decision)
            if decision.scheme is not None and alone.is_product(item) and kind not in speeds:
                speeds[kind] = measure(item, decision)
            kept.append(_faster(decision, ranges, speeds.get(kind)))
        decided = tuple(decision for decision, _ in kept)
        return Plan(decided, tuple(ranges for _, ranges in kept), program.analysis.floats)

    return tuned


def _faster(decision: Decision, ranges: tuple, speed: float | None) -> tuple[Decision, tuple]:
    """Return a decision and its ranges, or float where that is faster."""
    if decision.scheme is None or decision.out is not None or speed is None or speed * MARGIN >= 1:
        return decision, ranges
    device = jax.devices()[0].device_kind
    formats = " x ".join(dict.fromkeys(str(q.format) for q in decision.quantizers if q is not None))
    reason = f"slower in {formats} on {device}: {1 / speed:.1f}x"
    left = dataclasses.replace(decision, scheme=None, reason=reason)
    return left, blank_ranges(left)
