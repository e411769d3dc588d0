"""`report`: the float program and the quantized one side by side over batches, and what was seen put together."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.ahead import ahead
from jaxq.interpretation.arguments import Argnums, Layout, Static, place, take_apart
from jaxq.interpretation.calibrate import bar
from jaxq.interpretation.comparing import Compare, Seen, Sight, Weigh, merged, side_by_side
from jaxq.interpretation.convert import convert
from jaxq.interpretation.program import Program, load
from jaxq.interpretation.transforms import DEFAULT, check_observed, make_plan, quantize
from jaxq.measure import timing
from jaxq.measure.alone import kind_of
from jaxq.measure.explain import by_kind
from jaxq.numbers import noise
from jaxq.numbers.noise import Noise
from jaxq.numbers.qarray import is_converted
from jaxq.report.cost import Both, cost_of
from jaxq.report.held import bytes_of_sites, nbytes
from jaxq.report.report import Measured, Report, SiteReport


def report(
    f: Callable,
    policy: Policy | Plan = DEFAULT,
    *,
    argnums: Argnums = 0,
    progress: bool = True,
    timed: bool = True,
) -> Callable[..., Report]:
    """Return a function `(params, batches, **kwargs) -> Report` that measures what a plan does to a program.

    Float and quantized program run side by side, compiled once for each shape of batch; memory does not depend on the
    number of batches. A tuple in `batches` holds the other positional arguments, anything else is the one argument; the
    weights are float, a tuple of them where `argnums` is a sequence. progress: show a bar. timed: measure latency, of
    the whole program and of every quantized product by itself, which compiles each kind of them once more. Raises
    `ValueError` for no batches, for unobserved static ranges, and for NaN or infinity at a site, naming it and the
    batch, `TypeError` for converted weights.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> report = jaxq.report(f, jaxq.w8a8(), progress=False)(params, [jnp.ones((2, 4))])
    >>> report.macs, report.bops.ratio, round(report.energy.quantized.compute, 4)
    (32, 16.0, 9.6)
    """
    compare = jax.jit(functools.partial(_compare, f), static_argnums=(0, 1))

    def reported(params: Any, batches: Iterable[Any], **kwargs) -> Report:
        plan: Any = policy
        whole: _Whole | None = None
        for number, batch in enumerate(bar(batches, progress, "report")):
            args = place(params, batch, argnums)
            if not isinstance(plan, Plan):
                plan = make_plan(f, plan, argnums=argnums)(*args, **kwargs)
            layout, leaves = floats_only(args, kwargs, argnums)
            output, sights = compare(Static(layout), frozenset(plan.unobserved()), plan, leaves)
            check_finite({name: sights[name] for name in plan.names if name in sights}, number)
            whole = _Whole(output, sights, 1) if whole is None else _added(whole, output, sights)
            if number == 0:
                first = _first(f, plan, (params, batch, kwargs), argnums, timed)
                runs = {name: sight.runs for name, sight in sights.items()}
        if whole is None:
            raise ValueError("a report needs something to run on: pass an iterable with at least one batch")
        return _put_together(plan, whole, first, runs)

    return reported


def floats_only(args: list, kwargs: dict, argnums: Argnums) -> tuple[Layout, list]:
    """Take a call apart; raise `TypeError` for converted weights, which have no float to be compared with."""
    layout, leaves = take_apart(tuple(args), kwargs, argnums)
    if any(is_converted(leaf) for leaf in leaves):
        raise TypeError(
            "a report compares with the float program, and these weights are converted: pass the float parameters, "
            "or see jaxq.saved_report for what converted ones show by themselves"
        )
    return layout, leaves


# --- running ---------------------------------------------------------------------------------------------------------


def _compare(f: Callable, layout: Static, blank: frozenset[str], plan: Plan, leaves: list):
    """Return the noise of the program's float outputs, and what every site shows, by name."""
    program = load(f, layout.value, leaves, plan, shown=False)
    check_observed(program, blank)

    def run(lane):
        lanes = {item.path: jnp.full(item.site.stack, lane) for item in program.analysis.located}
        return program.run(Compare(program.execute), leaves, {}, signals=lanes)

    (out, _), seen = side_by_side(run)
    names = {item.path: item.site.name for item in program.analysis.located}
    return output_noise(out), {names[path]: jax.tree.map(lambda x: x[0], sight) for path, sight in seen.items()}


def output_noise(lanes: Any) -> Noise:
    """Return the noise of all float outputs together; leaves have the float and the quantized one in front."""
    floats = [x for x in jax.tree.leaves(lanes) if jnp.issubdtype(x.dtype, jnp.floating)]
    parts = [noise.of(x[0], x[1]) for x in floats] or [Noise(*(jnp.float32(0),) * 3)]
    return noise.merge_axis(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


class _Whole(NamedTuple):
    """What all batches so far amount to."""

    output: Noise
    sights: dict[str, Sight]
    batches: int


_merged = jax.jit(merged)


def _added(whole: _Whole, output: Noise, sights: dict[str, Sight]) -> _Whole:
    together = {name: _merged(whole.sights[name], sight) for name, sight in sights.items()}
    return _Whole(_merged(whole.output, output), together, whole.batches + 1)


def check_finite(sights: dict[str, Sight], number: int) -> None:
    """Raise `ValueError` naming the first site at which NaN or infinity shows."""
    for name, sight in sights.items():
        noises = [sight.alone, sight.together, *(seen and seen.noise for seen in sight.operands)]
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(noises)):
            raise ValueError(
                f"batch {number} brings NaN or infinity to site '{name}': remove it from the data, or from the weights "
                "upstream; if only the quantized program has it, leave the site in float to see more"
            )


# --- what is measured once -------------------------------------------------------------------------------------------


class _First(NamedTuple):
    """What the first call shows. decisions: with this call's shapes; weights, held, alone (seconds): by site name."""

    decisions: tuple[Decision, ...]
    weights: dict[str, Seen]
    held: dict[str, Both]
    bytes: Both
    alone: dict[str, Both]
    seconds: Both | None


def _first(f: Callable, plan: Plan, call: tuple[Any, Any, dict], argnums: Argnums, timed: bool) -> _First:
    params, batch, kwargs = call
    args = place(params, batch, argnums)
    layout, leaves = take_apart(tuple(args), kwargs, argnums)
    program = load(f, layout, leaves, plan)
    names = {item.path: item.site.name for item in program.analysis.located}
    # Not one program: weights of one shape share a compiled function.
    weigh, arrays = ahead(program, Weigh(program.execute), leaves)
    weights = {names[path]: seen for path, seen in weigh(*arrays).items()}
    small = convert(f, plan, argnums=argnums)(*args, **kwargs)
    converted = place(small, batch, argnums)
    held = bytes_of_sites(program, leaves, take_apart(tuple(converted), kwargs, argnums)[1])
    plain, quantized = quantize(f, None, argnums=argnums), quantize(f, plan, argnums=argnums)
    calls = (lambda: plain(*args, **kwargs)), (lambda: quantized(*converted, **kwargs))
    sizes = Both(nbytes(params), nbytes(small))
    alone, seconds = (_alone(program), Both(*timing.seconds(calls, rounds=3))) if timed else ({}, None)
    return _First(program.decisions, weights, held, sizes, alone, seconds)


def _alone(program: Program) -> dict[str, Both]:
    """Return the seconds that sites take by themselves, in float and as decided."""
    pairs = list(zip(program.analysis.located, program.decisions, strict=True))
    known = by_kind(pairs)
    found = {decision.site.name: known.get(kind_of(item, decision)) for item, decision in pairs}
    return {name: Both(*(cost.seconds for cost in costs)) for name, costs in found.items() if costs}


# --- putting together ------------------------------------------------------------------------------------------------


def _put_together(plan: Plan, whole: _Whole, first: _First, runs: dict[str, Any]) -> Report:
    whole = jax.tree.map(np.asarray, whole)
    sites = tuple(
        _site(decision, whole.sights.get(decision.site.name), first, runs.get(decision.site.name))
        for decision in first.decisions
    )
    device = jax.devices()[0]
    kind = f"{device.platform} ({device.device_kind})" if device.device_kind != device.platform else device.platform
    return Report(plan, sites, whole.output, first.bytes, first.seconds, int(whole.batches), kind)


def _site(decision: Decision, sight: Sight | None, first: _First, runs: Any) -> SiteReport:
    name, site = decision.site.name, decision.site
    once = float(np.prod(site.stack)) if site.stack else 1.0
    times = once if runs is None else float(np.sum(runs))
    cost = cost_of(decision, times, first.held[name])
    seconds = Both(*(times * s for s in first.alone[name])) if name in first.alone else None
    operands = []
    for n, quantizer in enumerate(decision.quantizers):
        role = site.operands[n].role
        seen = first.weights.get(name) if role == "weight" else sight and sight.operands[n]
        operands.append(seen and Measured(repr(quantizer), role, *jax.tree.map(np.asarray, seen)))
    return SiteReport(decision, tuple(operands), sight and sight.alone, sight and sight.together, cost, seconds)
