"""`sensitivity`: what each site does to the program's output by itself, its weight alone, its activations alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.arguments import Argnums, Static, place
from jaxq.interpretation.calibrate import bar
from jaxq.interpretation.comparing import Switch, merged
from jaxq.interpretation.program import load
from jaxq.interpretation.transforms import DEFAULT, check_observed, make_plan
from jaxq.numbers.noise import Noise
from jaxq.report.measure import floats_only, output_noise
from jaxq.report.report import decibels
from jaxq.report.table import aligned, db

Switches = dict[str, tuple[np.bool_, ...]]  # per site, per operand
Metric = Callable[[Any, Any], float]


class Effect(NamedTuple):
    """Of some quantizers on the program's output: its noise, and the mean of the metric, NaN where there is none.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> found = jaxq.sensitivity(f, jaxq.w8a8(), progress=False)(params, [jnp.ones((2, 4))])
    >>> found.off.db, found.off.metric
    (inf, nan)
    """

    noise: Noise
    metric: float

    @property
    def db(self) -> float:
        """The SQNR of the output."""
        return decibels(self.noise)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What each site does to the output, worst first. Printing it gives a table.

    sites: by name, the effect of all of a site's quantizers; weights, acts: of those of its weight or its activations
    only, where it has them; off and on: of none and of all sites.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> jaxq.sensitivity(f, jaxq.w8a8(), progress=False)(params, [jnp.ones((2, 4))]).worst(1)
    ['w']
    """

    sites: dict[str, Effect]
    weights: dict[str, Effect]
    acts: dict[str, Effect]
    off: Effect
    on: Effect

    def worst(self, n: int = 1) -> list[str]:
        """Return the names of the `n` sites that harm the output most, to `revise` the plan with."""
        return list(self.sites)[:n]

    def __str__(self) -> str:
        measured = not math.isnan(self.off.metric)
        heads = ["site", "output dB", "weight only", "acts only", *(["metric", "change"] if measured else [])]
        rows = [self._row(name, e, measured) for name, e in self.sites.items()]
        lines = aligned([heads, *rows, self._row("all sites", self.on, measured)], [True] + [False] * (len(heads) - 1))
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def _row(self, name: str, effect: Effect, measured: bool) -> list[str]:
        parts = [db(part[name].db) if name in part else "-" for part in (self.weights, self.acts)]
        metric = [f"{effect.metric:.4g}", f"{effect.metric - self.off.metric:+.2g}"] if measured else []
        return [name, db(effect.db), *parts, *metric]


def sensitivity(
    f: Callable,
    policy: Policy | Plan = DEFAULT,
    *,
    metric: Metric | None = None,
    argnums: Argnums = 0,
    progress: bool = True,
) -> Callable[..., Sensitivity]:
    """Return a function `(params, batches, **kwargs) -> Sensitivity` that quantizes one site after the other.

    Whether a quantizer is on is an argument of the program, which is compiled once; it is run three times for each site
    and batch: all of the site, its weight, its activations. Quantizers are imitated, `decode(encode(x))`, between float
    products. metric: `(outputs, batch) -> number`, averaged over the batches. Raises as `report` does.

    >>> import jax.numpy as jnp, jaxq
    >>> f = lambda p, x: x @ p["up"] @ p["head"]
    >>> params = {"up": jnp.arange(16.0).reshape(4, 4), "head": jnp.eye(4)}
    >>> policy = {"up": jaxq.weight_only(jaxq.int2()), "head": jaxq.w8a8()}
    >>> found = jaxq.sensitivity(f, policy, progress=False)(params, [jnp.ones((2, 4))])
    >>> found.worst(1), found.sites["up"].db < found.sites["head"].db
    (['up'], True)
    """
    run = jax.jit(functools.partial(_run, f), static_argnums=(0, 1))

    def found(params: Any, batches: Iterable[Any], **kwargs) -> Sensitivity:
        plan: Any = policy
        effects: dict[tuple[str, str], list[Effect]] = {}
        for batch in bar(batches, progress, "sensitivity"):
            args = place(params, batch, argnums)
            if not isinstance(plan, Plan):
                plan = make_plan(f, plan, argnums=argnums)(*args, **kwargs)
            layout, leaves = floats_only(args, kwargs, argnums)
            program = functools.partial(run, Static(layout), frozenset(plan.unobserved()), plan, leaves)
            exact = program(_switches(plan, ()))
            for key, on in _settings(plan).items():
                out = program(on)
                value = math.nan if metric is None else float(metric(out, batch))
                effects.setdefault(key, []).append(Effect(_noise(exact, out), value))
        if not effects:
            raise ValueError("sensitivity needs something to run on: pass an iterable with at least one batch")
        return _sorted({key: _mean(parts) for key, parts in effects.items()})

    return found


def _run(f: Callable, layout: Static, blank: frozenset[str], plan: Plan, leaves: list, switches: Switches) -> Any:
    program = load(f, layout.value, leaves, plan, shown=False)
    check_observed(program, blank)
    signals = {
        item.path: tuple(jax.numpy.full(item.site.stack, on) for on in switches[decision.site.name])
        for item, decision in zip(program.analysis.located, program.decisions, strict=True)
        if decision.scheme is not None
    }
    return program.run(Switch(program.execute), leaves, {}, signals=signals)[0][0]


@jax.jit
def _noise(exact: Any, out: Any) -> Noise:
    return output_noise(jax.tree.map(lambda x, y: jax.numpy.stack([x, y]), exact, out))


_added = jax.jit(merged)


def _mean(effects: list[Effect]) -> Effect:
    noise = functools.reduce(_added, [effect.noise for effect in effects])
    return Effect(jax.tree.map(np.asarray, noise), float(np.mean([effect.metric for effect in effects])))


# --- settings --------------------------------------------------------------------------------------------------------

ROLES = {"sites": ("weight", "act"), "weights": ("weight",), "acts": ("act",)}


def _settings(plan: Plan) -> dict[tuple[str, str], Switches]:
    """Return what to switch on, by kind and site: nothing, everything, and every site in each of three ways."""
    everything = [(d.site.name, role) for d in plan.decisions for role in _roles(d)]
    settings = {("off", ""): _switches(plan, ()), ("on", ""): _switches(plan, everything)}
    for decision in plan.decisions:
        for kind, roles in ROLES.items():
            chosen = [(decision.site.name, role) for role in roles if role in _roles(decision)]
            if chosen:
                settings[kind, decision.site.name] = _switches(plan, chosen)
    return settings


def _roles(decision) -> set[str]:
    pairs = zip(decision.site.operands, decision.quantizers, strict=True)
    return {operand.role for operand, quantizer in pairs if quantizer is not None}


def _switches(plan: Plan, on: Iterable[tuple[str, str]]) -> Switches:
    on = set(on)
    return {s.name: tuple(np.bool_((s.name, operand.role) in on) for operand in s.operands) for s in plan.sites}


def _sorted(effects: dict[tuple[str, str], Effect]) -> Sensitivity:
    kinds: dict[str, dict[str, Effect]] = {kind: {} for kind in ROLES}
    for (kind, name), effect in sorted(effects.items(), key=lambda item: item[1].db):
        if kind in kinds:
            kinds[kind][name] = effect
    return Sensitivity(**kinds, off=effects["off", ""], on=effects["on", ""])
