"""A call made ready to interpret: traced, analysed, and every site given its decision.

`load` does it once per kind of call; `Program.run` interprets. The plan is resolved here: a policy becomes a plan, a
plan is fitted to the program's sites.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decisions import resolve
from jaxq.decisions.decision import Decision, Ranges
from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation import modules
from jaxq.interpretation.arguments import Layout, shape_of
from jaxq.interpretation.interpret import Channel, Interpreter
from jaxq.interpretation.rules import Execute, Given, Rule
from jaxq.numbers.blocks import hide
from jaxq.numbers.calibrators import Leaf
from jaxq.numbers.parameters import Parameters
from jaxq.numbers.qarray import QArray
from jaxq.programs import jaxpr
from jaxq.programs.analysis import Analysis, analyze
from jaxq.programs.sites import Located, Path


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function with a decision for every site. The output tree is `(out, module changes)`.

    supplied: for each decision the ranges of operands that are other sites' outputs (`resolve.supplied`); weights: for
    each leaf of the call its index among the parameter leaves, or None.
    """

    body: jaxpr.Body
    out_structure: Any
    analysis: Analysis
    decisions: tuple[Decision, ...]
    ranges: Ranges
    supplied: Ranges
    weights: tuple[int | None, ...]

    @property
    def active(self) -> dict[Path, Located]:
        """The sites that are quantized, by path."""
        pairs = zip(self.analysis.located, self.decisions, strict=True)
        return {item.path: item for item, decision in pairs if decision.scheme is not None}

    def asked(self, rule: Rule) -> dict[Path, Located]:
        """The sites at which a rule is asked, by path: the active ones, or all that could be."""
        if not rule.floats:
            return self.active
        return {item.path: item for item in self.analysis.located if not item.site.obstacle}

    @property
    def coded(self) -> set[int]:
        """The parameter leaves that quantized weights are made of."""
        return {i for item in self.active.values() for i in item.sources}

    @property
    def execute(self) -> Execute:
        """The rule that runs every active site quantized."""
        pairs = zip(self.analysis.located, self.decisions, strict=True)
        return Execute({item.path: decision for item, decision in pairs})

    @property
    def all_ranges(self) -> list[tuple[Leaf | None, ...]]:
        """For each site the static ranges of its operands, its own or those of outputs, and of its quantized output."""
        return [_all_ranges(*three) for three in zip(self.decisions, self.ranges, self.supplied, strict=True)]

    def channel(self, leaves: list, weights: dict[str, QArray], key: jax.Array | None) -> Channel:
        """Return what each site is given: its ranges, its converted weight if there is one, a key of its own.

        A static range says nothing of NaN in the data, which would pass for a number; so NaN in an input makes every
        static range NaN, and with it what comes out.
        """
        ranges = self.all_ranges
        alarm = self.alarm(leaves, not weights) if jax.tree.leaves(ranges) else None
        keys = [None] * len(ranges) if key is None else jax.random.split(key, len(ranges))
        channel = {}
        for item, decision, own, noise in zip(self.analysis.located, self.decisions, ranges, keys, strict=True):
            *inputs, out = (r and _alarmed(r, alarm) for r in own)
            if not item.site.obstacle:
                channel[item.path] = Given(tuple(inputs), weights.get(decision.site.name), out, noise)
        return channel

    def alarm(self, leaves: list, parameters: bool) -> jax.Array:
        """Return zero, or NaN where an array that enters in float holds NaN.

        Quantized weights have scales to show it; converted parameters were checked when they were converted.
        """
        coded = self.coded
        pairs = zip(leaves, self.weights, strict=True)
        inputs = [x for x, i in pairs if i is None or (parameters and i not in coded)]
        data = [x for x in inputs if isinstance(x, (jax.Array, np.ndarray)) and jaxpr.is_float(x)]
        # A maximum of zeros and ones: XLA may drop NaN from a maximum, and reduces floats faster than booleans.
        bells = [jnp.isnan(jax.lax.stop_gradient(x)).astype(jnp.float32) for x in data if 0 not in x.shape]
        alarm = functools.reduce(jnp.maximum, [jnp.max(bell) for bell in bells], jnp.float32(0))
        return jnp.where(alarm > 0, jnp.float32(jnp.nan), jnp.float32(0))

    def run(
        self,
        rule: Rule,
        leaves: list,
        weights: dict[str, QArray],
        key: jax.Array | None = None,
        *,
        signals: dict[Path, Any] | None = None,
    ) -> tuple[Any, dict[Path, Any]]:
        """Return `(out, module changes)` and the observations. Without a site to ask at it is the program itself.

        signals: what a rule of its own kind gives to its sites.
        """
        sites = self.asked(rule)
        if not sites:
            return jax.tree.unflatten(self.out_structure, jaxpr.evaluate(self.body, *leaves)), {}
        channel = {path: given for path, given in self.channel(leaves, weights, key).items() if path in sites}
        if signals is not None:
            channel = {path: given._replace(signal=signals[path]) for path, given in channel.items()}
        outs, seen = Interpreter(sites, rule).run(self.veiled(self.active), self.veil(leaves), channel)
        return jax.tree.unflatten(self.out_structure, outs), seen

    def veil(self, leaves: list) -> list:
        """Return the leaves with those that quantized weights are made of behind a barrier."""
        coded = self.coded
        return [hide(x) if i in coded else x for x, i in zip(leaves, self.weights, strict=True)]

    def veiled(self, active: dict[Path, Located]) -> jaxpr.Body:
        """Return the body; its constants are hidden where a quantized weight is one."""
        if not any(item.weight is not None and not item.sources for item in active.values()):
            return self.body
        return self.body._replace(consts=tuple(hide(list(self.body.consts))))


def _all_ranges(decision: Decision, own: tuple, supplied: tuple) -> tuple[Leaf | None, ...]:
    """Return the static range of every operand, its own or that of the output it is, and of the site's output."""
    inputs = own[: len(decision.site.operands)]
    filled = tuple(a if b is None else b for a, b in zip(inputs, supplied or (None,) * len(inputs), strict=True))
    return (*filled, own[-1] if decision.out else None)


def _alarmed(r: Leaf, alarm: jax.Array) -> Leaf:
    """Return a range that is NaN in an alarm; layers that saw nothing, being untaken branches, get the others'.

    That is their hull, and the centroids of the one that saw most.

    Learned parameters stay as they are: what is quantized by them is looked at for NaN itself.
    """
    if isinstance(r, Parameters):
        return r
    if jnp.ndim(r.count):
        seen = r.count > 0
        r = r._replace(lo=jnp.where(seen, r.lo, jnp.min(r.lo)), hi=jnp.where(seen, r.hi, jnp.max(r.hi)))
        if r.table is not None:
            table = jnp.asarray(r.table)
            most = table.reshape(-1, table.shape[-1])[jnp.argmax(r.count)]
            r = r._replace(table=jnp.where(seen[..., None], table, jnp.broadcast_to(most, table.shape)))
    return r._replace(hi=r.hi + alarm)


def load(fn: Callable, layout: Layout, leaves: list, policy: Policy | Plan, shown: bool = True) -> Program:
    """Trace a function on the leaves of a call and resolve a policy, or fit a plan, to its sites.

    shown: look up what only plans show, which is slow: source lines and BatchNorms.
    """

    def flat(*arrays):
        before = list(arrays)
        args, kwargs = layout.unflatten(before)
        out = fn(*args, **kwargs)
        changed = modules.changes(layout, before, (args, kwargs)) if modules.holds_module((args, kwargs)) else {}
        return out, changed

    body, out = jaxpr.trace(flat, *(shape_of(leaf) for leaf in leaves))
    analysis = analyze(body, layout.weights, layout.names, shown)
    if isinstance(policy, Plan):
        decisions, ranges = resolve.fit(policy, analysis.sites)
    else:
        policy = resolve.make(policy, analysis.sites, tuple(item.feeds for item in analysis.located))
        decisions, ranges = policy.decisions, policy.ranges
    supplied = resolve.supplied(policy, decisions)
    return Program(body, jax.tree.structure(out), analysis, decisions, ranges, supplied, layout.weights)
