"""Rules that measure what quantization does to values: against float, operand by operand and site by site.

`Compare` runs two programs at once, under `vmap` over two lanes: the float program, and the one with every site
quantized. At a site the lanes meet, which shows three things in one pass: what the site does to
float operands (alone), what has become of the product where everything before it was quantized too (together), and
the operands themselves. `Weigh` looks at weights, once. Sums, histograms and grids merge where programs loop, branch
and spread over devices, so that memory does not depend on how much is seen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.interpretation.numerics import Task, to_codes, weight_codes
from jaxq.interpretation.rules import Execute, Given, Rule, all_counts, over
from jaxq.numbers import histogram, noise
from jaxq.numbers.blocks import hide
from jaxq.numbers.calibrators import Leaf
from jaxq.numbers.histogram import Histogram
from jaxq.numbers.levels import levels
from jaxq.numbers.noise import Noise
from jaxq.programs import jaxpr


class Seen(NamedTuple):
    """An operand and what its codes stand for: noise, the histogram of its values, the grid of its widest block."""

    noise: Noise
    histogram: Histogram
    levels: jax.Array


class Sight(NamedTuple):
    """What one execution of a site shows. operands: per operand, None where it is float; runs: how often it ran.

    alone: the noise of its output where it alone is quantized, None for a float site; together: where all are.
    """

    operands: tuple[Seen | None, ...]
    alone: Noise | None
    together: Noise
    runs: jax.Array


@dataclasses.dataclass(frozen=True)
class Weigh(Rule):
    """Look at every quantized weight, once; the float program carries on."""

    execute: Execute
    once = True

    def __call__(self, item, eqn, operands, given):
        task, outs = self.execute.task(item), jaxpr.rebind(eqn, *operands)
        wanted = item.weight is not None and task.quantizers[item.weight] is not None
        return outs, _weighed(task, operands[item.weight], given.ranges[item.weight]) if wanted else None

    def merge(self, a, b):
        del b
        return a

    def merge_axis(self, stacked):
        return jax.tree.map(lambda x: jnp.take(x, 0, axis=0), stacked)

    def merge_devices(self, seen, axes):
        return _through(_over_devices(axes), seen)


@dataclasses.dataclass(frozen=True)
class Compare(Rule):
    """Run float and quantized side by side, and look at every site; to be run by `side_by_side`."""

    execute: Execute
    floats = True

    def __call__(self, item, eqn, operands, given):
        # The lanes meet in a batching rule: a collective over them would not mix with the axes of a mesh. What the
        # function does without a batch is never run, it only says what comes out.
        @jax.custom_batching.custom_vmap
        def site(given, operands):
            y, _, sight = self.compared(item, eqn, (operands, operands), given)
            return y, sight

        @site.def_vmap
        def both(axis_size, batched, given, operands):
            lanes = tuple(_lane(n, operands, batched[1]) for n in range(axis_size))
            y, together, sight = self.compared(item, eqn, lanes, _lane(0, given, batched[0]))
            return (jnp.stack([y, together]), sight), (True, jax.tree.map(lambda _: False, sight))

        out, sight = site(given, operands)
        return [out], sight

    def compared(self, item, eqn, lanes: tuple[list, list], given: Given) -> tuple[jax.Array, jax.Array, Sight]:
        """Return a site's output in the float program, in the quantized one, and what there is to see."""
        exact, rough = lanes
        (y,) = jaxpr.rebind(eqn, *exact)
        if self.execute.decisions[item.path].scheme is None:
            (out,) = jaxpr.rebind(eqn, *rough)
            return y, out, Sight((None,) * item.op.operands, None, noise.of(y, out), jnp.float32(1))
        given = self.with_codes(item, exact, given)
        (alone,), _ = self.execute(item, eqn, exact, given)
        (out,), _ = self.execute(item, eqn, rough, given)
        seen = self.watched(item, exact, given.ranges)
        return y, out, Sight(seen, noise.of(y, alone), noise.of(y, out), jnp.float32(1))

    def with_codes(self, item, operands: list, given: Given) -> Given:
        """Return what is given, with the weight's codes, which both lanes share."""
        task = self.execute.task(item)
        if item.weight is None or task.quantizers[item.weight] is None:
            return given
        return given._replace(weight=weight_codes(task, operands[item.weight], given.ranges[item.weight]))

    def watched(self, item, exact: list, ranges: tuple[Leaf | None, ...]) -> tuple[Seen | None, ...]:
        """Look at the activations among the operands; weights are looked at once, by `Weigh`."""
        task = self.execute.task(item)
        wanted = [q is not None and n != item.weight for n, q in enumerate(task.quantizers)]
        return tuple(_watched(task, n, exact[n], ranges[n]) if w else None for n, w in enumerate(wanted))

    def merge(self, a, b):
        return merged(a, b)

    def merge_axis(self, stacked):
        return _through(ALONG_AXIS, stacked)

    def merge_devices(self, seen, axes):
        return _through(_over_devices(axes), seen)


def _lane(number: int, tree: Any, batched: Any) -> Any:
    return jax.tree.map(lambda x, b: x[number] if b else x, tree, batched)


def side_by_side(run: Callable[[Any], Any]) -> Any:
    """Return what a program run by `Compare` returns, the float one and the quantized one stacked in front.

    run: takes the lane's number, which every site must be given: it is what makes lanes of what is the same in both.
    """
    return jax.vmap(run)(jnp.arange(2))


@dataclasses.dataclass(frozen=True)
class Switch(Rule):
    """Imitate each quantizer where its switch is on: `decode(encode(x))`; signal: one boolean for each operand."""

    execute: Execute

    def __call__(self, item, eqn, operands, given):
        task, count = self.execute.task(item), item.op.operands
        own = [self.switched(task, n, x, given) for n, x in enumerate(operands[:count])]
        return jaxpr.rebind(eqn, *own, *operands[count:]), None

    def switched(self, task: Task, number: int, x: jax.Array, given: Given) -> jax.Array:
        """Return an operand, imitated if it is quantized and its switch is on; off, it costs nothing."""
        if task.quantizers[number] is None:
            return x

        def imitated(x):
            is_weight, r = number == task.weight, given.ranges[number]
            q = weight_codes(task, x, r) if is_weight else to_codes(task, number, x, hide(r))
            return q.decode(x.dtype)

        return lax.cond(given.signal[number], imitated, lambda x: x, x)

    def merge(self, a, b):
        raise NotImplementedError("switching observes nothing")

    def merge_axis(self, stacked):
        raise NotImplementedError("switching observes nothing")

    def merge_devices(self, seen, axes):
        raise NotImplementedError("switching observes nothing")


@functools.partial(jax.jit, static_argnums=0)
def _weighed(task: Task, w: jax.Array, r: Leaf | None) -> Seen:
    return _seen(task, task.weight, w, weight_codes(task, w, r))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _watched(task: Task, number: int, x: jax.Array, r: Leaf | None) -> Seen:
    return _seen(task, number, x, to_codes(task, number, x, hide(r)))


def _seen(task: Task, number: int, x: jax.Array, q: Any) -> Seen:
    near = q.decode(jnp.float32)
    return Seen(noise.of(x, near), histogram.of(x), levels(task.quantizers[number], q))


# --- how the parts merge ---------------------------------------------------------------------------------------------


def merged(a: Any, b: Any) -> Any:
    """Return what two observations of one site, or of the outputs, amount to."""
    return _through(ALONG_AXIS, jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b))


class Merging(NamedTuple):
    """How each part of an observation merges."""

    noise: Callable[[Noise], Noise]
    histogram: Callable[[Histogram], Histogram]
    levels: Callable[[jax.Array], jax.Array]
    runs: Callable[[jax.Array], jax.Array]


def _through(way: Merging, seen: Any) -> Any:
    if isinstance(seen, Noise):
        return way.noise(seen)
    if isinstance(seen, Seen):
        return Seen(way.noise(seen.noise), way.histogram(_vacated(seen.histogram)), way.levels(seen.levels))
    operands = tuple(operand and _through(way, operand) for operand in seen.operands)
    return Sight(operands, seen.alone and way.noise(seen.alone), way.noise(seen.together), way.runs(seen.runs))


def _vacated(h: Histogram) -> Histogram:
    """Return a histogram whose zeros, where nothing was seen, are the identity of merging."""
    return h._replace(exponent=jnp.where(h.counts.sum(-1) > 0, h.exponent, jnp.float32(histogram.SMALLEST)))


def _widest(stacked: jax.Array) -> jax.Array:
    """Return the grid with the largest number of those stacked along the leading axis: [layers, ..., n] -> [..., n]."""
    if 0 in stacked.shape:
        return jnp.zeros(stacked.shape[1:], jnp.float32)
    number = jnp.argmax(jnp.max(jnp.abs(stacked), axis=-1), axis=0)
    return jnp.take_along_axis(stacked, number[None, ..., None], axis=0)[0]


ALONG_AXIS = Merging(noise.merge_axis, histogram.merge_axis, _widest, lambda runs: runs.sum(0))


def _over_devices(axes: frozenset[str]) -> Merging:
    def sums(n: Noise) -> Noise:
        peak = over(lax.pmax, n.peak, axes)
        share = (n.peak / jnp.where(peak > 0, peak, jnp.float32(1))) ** 2
        return Noise(peak, over(lax.psum, n.signal * share, axes), over(lax.psum, n.noise * share, axes))

    def widest(grid: jax.Array) -> jax.Array:
        width = jnp.max(jnp.abs(grid), initial=0)
        here = jnp.where(width == over(lax.pmax, width, axes), jnp.float32(1), jnp.float32(0))
        return over(lax.psum, grid * here, axes) / over(lax.psum, here, axes)

    return Merging(sums, lambda h: all_counts(h, axes), widest, lambda runs: over(lax.pmax, runs, axes))
