"""What happens at a site: run it quantized, watch it, or capture its weight.

A rule returns the site's outputs and an observation (or None), and says how observations combine where programs loop,
branch and spread over devices. This is all that differs between the interpretations.
"""

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.decisions.decision import Decision
from jaxq.interpretation.numerics import Task, round_output, run_site, weight_codes
from jaxq.numbers import calibrators, histogram, learning
from jaxq.numbers.affine import observe
from jaxq.numbers.blocks import varying_axes
from jaxq.numbers.calibrators import Leaf, Range
from jaxq.numbers.histogram import Histogram
from jaxq.numbers.parameters import Parameters
from jaxq.numbers.qarray import QArray
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs import jaxpr
from jaxq.programs.sites import Located, Path


class Given(NamedTuple):
    """What a site is given from outside: what the plan keeps of its operands and of its output, its weight's codes if
    they were converted, and a random key if something is to be rounded stochastically.

    signal: whatever else the rule wants to know that is traced; like all of it, [*stack] in front.
    """

    ranges: tuple[Leaf | None, ...]
    weight: QArray | None
    out: Any = None
    key: jax.Array | None = None
    signal: Any = None


class Rule(abc.ABC):
    """How to run a site, and how its observations combine. An observation of zeros means "nothing seen"."""

    once: bool = False  # run every branch, and loop bodies once: for what does not depend on data
    floats: bool = False  # asked at sites left in float too

    @abc.abstractmethod
    def __call__(self, item: Located, eqn: jaxpr.Eqn, operands: list, given: Given) -> tuple[list, Any]:
        """Return the outputs of a site equation and an observation or None."""

    @abc.abstractmethod
    def merge(self, a: Any, b: Any) -> Any:
        """Return what two observations of one site amount to."""

    @abc.abstractmethod
    def merge_axis(self, stacked: Any) -> Any:
        """Return what the observations stacked along the leading axis amount to."""

    @abc.abstractmethod
    def merge_devices(self, seen: Any, axes: frozenset[str]) -> Any:
        """Return what the observations of all devices along mesh axes amount to."""


@dataclasses.dataclass(frozen=True)
class Execute(Rule):
    """Run every site quantized."""

    decisions: dict[Path, Decision]

    def __call__(self, item, eqn, operands, given):
        del eqn
        return [self.rounded(item, self.product(item, operands, given), given.out)], None

    def task(self, item: Located) -> Task:
        decision = self.decisions[item.path]
        return Task(item.op, decision.quantizers, item.weight, decision.scheme.backward)

    def product(self, item: Located, operands: list, given: Given) -> jax.Array:
        """Return what a site computes from its quantized operands."""
        own = list(operands[: item.op.operands])
        if given.weight is not None:
            own[item.weight] = given.weight
        return run_site(self.task(item), tuple(own), given.ranges, tuple(operands[item.op.operands :]), given.key)

    def rounded(self, item: Located, y: jax.Array, r: Range | None) -> jax.Array:
        """Return what a site puts out: `y` as its output's quantizer has it."""
        quantizer = self.decisions[item.path].out
        return y if quantizer is None else round_output(quantizer, y, r)

    def merge(self, a, b):
        raise NotImplementedError("running observes nothing")

    def merge_axis(self, stacked):
        raise NotImplementedError("running observes nothing")

    def merge_devices(self, seen, axes):
        raise NotImplementedError("running observes nothing")


@dataclasses.dataclass(frozen=True)
class Observe(Rule):
    """Record the range of every operand and output with a static quantizer; run the site as it was, or quantized.

    What is seen of an output is what it is before it is rounded. The signal is the importance of the weight's values.
    """

    execute: Execute
    quantized: bool

    def __call__(self, item, eqn, operands, given):
        decision = self.execute.decisions[item.path]
        inputs = operands[: item.op.operands]
        if self.quantized:
            triples = zip(decision.quantizers, inputs, given.ranges, strict=True)
            ranges = tuple(self.at_first_sight(item, n, *triple, given.signal) for n, triple in enumerate(triples))
            y = self.execute.product(item, operands, given._replace(ranges=ranges))
            outs = [self.execute.rounded(item, y, self.at_first_sight(item, len(inputs), decision.out, y, given.out))]
        else:
            outs = jaxpr.rebind(eqn, *operands)
            y = outs[0]
        triples = zip(decision.ranged, [*inputs, y], [*given.ranges, given.out], strict=False)
        seen = tuple(q and self.sight(item, n, q, x, old, given.signal) for n, (q, x, old) in enumerate(triples))
        return outs, seen if any(r is not None for r in seen) else None

    def sight(self, item: Located, number: int, quantizer: Quantizer, x, old: Leaf | None, importance=None) -> Leaf:
        """Return what one operand, or the output, shows of itself; importance: of the weight's values."""
        if not quantizer.learned:
            return observe(quantizer, x)
        assert isinstance(old, Parameters), "a learned quantizer comes with parameters"
        axes = item.op.contracted[number]
        grid, x = quantizer.grid(x.shape, axes), quantizer.turn(x, axes)
        own = quantizer.turn(importance, axes) if importance is not None and number == item.weight else None
        return learning.observe(quantizer, x, grid, old, own)

    def at_first_sight(self, item: Located, number: int, quantizer: Quantizer | None, x, old, importance=None) -> Any:
        """Return the range to quantize `x` with: the plan's, or that of `x` where the plan has seen nothing."""
        if quantizer is None or not quantizer.static or old is None:
            return old
        new = calibrators.with_table(quantizer, self.sight(item, number, quantizer, x, old, importance))
        return jax.tree.map(functools.partial(jnp.where, calibrators.is_seen(old)), old, new)

    def merge(self, a, b):
        return jax.tree.map(calibrators.merge, a, b, is_leaf=_is_range)

    def merge_axis(self, stacked):
        return jax.tree.map(calibrators.merge_axis, stacked, is_leaf=_is_range)

    def merge_devices(self, seen, axes):
        def hull(r: Leaf) -> Leaf:
            if isinstance(r, Parameters):
                return jax.tree.map(lambda x: over(lax.pmean, x, axes), r)
            lo, hi, count = (
                over(reduce, x, axes) for reduce, x in zip((lax.pmin, lax.pmax, lax.pmax), r, strict=False)
            )
            return Range(lo, hi, count, None if r.histogram is None else all_counts(r.histogram, axes))

        return jax.tree.map(hull, seen, is_leaf=_is_range)


def _is_range(node: Any) -> bool:
    return isinstance(node, (Range, Parameters))


def over(reduce, x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Reduce over the mesh axes along which a value varies; where that is not tracked, over all."""
    varying = varying_axes(x)
    names = tuple(axes & varying) if varying else tuple(axes)
    return reduce(x, names) if names and (varying or varying is None) else x


def all_counts(h: Histogram, axes: frozenset[str]) -> Histogram:
    """Return the histogram of the values of all devices: as wide as the widest, then added up."""
    wide = histogram.coarsen(h, over(lax.pmax, h.exponent, axes))
    return wide._replace(counts=over(lax.psum, wide.counts, axes))


class Ahead(Rule):
    """Observe what depends on weights alone; the float program carries on. Weights are the same in all iterations."""

    once = True

    def merge(self, a, b):
        del b
        return a

    def merge_axis(self, stacked):
        return jax.tree.map(lambda x: jnp.take(x, 0, axis=0), stacked)

    def merge_devices(self, seen, axes):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Start(Ahead):
    """Observe the learned parameters of weights that a run may pass by: they do not depend on which branch it takes."""

    watch: Observe

    def starts(self, item: Located) -> bool:
        """Tell whether a site's weight is one of these."""
        if not (item.maybe and item.convertible):
            return False
        quantizer = self.watch.execute.decisions[item.path].ranged[item.weight]
        return quantizer is not None and quantizer.learned

    def __call__(self, item, eqn, operands, given):
        outs = jaxpr.rebind(eqn, *operands)
        if not self.starts(item):
            return outs, None
        n = item.weight
        quantizer = self.watch.execute.decisions[item.path].ranged[n]
        return outs, self.watch.sight(item, n, quantizer, operands[n], given.ranges[n], given.signal)


@dataclasses.dataclass(frozen=True)
class Capture(Ahead):
    """Observe the codes of every weight that can be computed ahead of time."""

    execute: Execute

    def __call__(self, item, eqn, operands, given):
        task, outs = self.execute.task(item), jaxpr.rebind(eqn, *operands)
        if not item.convertible or not item.sources or task.quantizers[item.weight] is None:
            return outs, None
        return outs, weight_codes(task, operands[item.weight], given.ranges[item.weight])
