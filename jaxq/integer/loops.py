"""Loops: over time one program, in which what is carried keeps one scale; over layers, each layer by itself.

What is carried from one iteration to the next is int32 between two bounds, which are found first, by carrying bounds
through the body: a state that stays within bounds, as a gated unit's output or a moving average, or that grows by no
more than so much in each iteration, as a sum, has one for the whole loop. It is proved to stay there, or saturated.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import curves, moves
from jaxq.integer.inputs import ENTRY
from jaxq.integer.scales import finite, power_above, rescaled, uniform
from jaxq.integer.values import (
    HIDDEN,
    ROOM,
    Coded,
    Constant,
    Entry,
    Mapped,
    Plain,
    Refusal,
    Refused,
    Value,
    as_array,
    ones,
    there,
)
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Loop

Run = Callable[[Sequence[Value]], list[Value]]
# What bounds are wider than what is found; what is no growth of a bound, but rounding, of which a hundred thousand
# iterations take up the slack; how much more than in the first iterations a bound may grow in the last.
SLACK, ROUNDING, FASTER = 1e-3, 1e-8, 17 / 16


def varies(loop: Loop, operands: Sequence[Value]) -> bool:
    """Tell whether real numbers of the parameters differ from one iteration to the next."""
    scanned = zip(loop.body.jaxpr.invars[loop.constants + loop.carries :], _parts(loop, operands)[2], strict=True)
    return any(isinstance(x, Constant) and jaxpr.is_float(v.aval) and _differs(x) for v, x in scanned)


def _differs(x: Constant) -> bool:
    return x.array is None or np.shape(x.array)[0] > 1


def _parts(loop: Loop, operands: Sequence[Value]) -> tuple[list[Value], list[Value], list[Value]]:
    """Return constants, what is carried into the first iteration, and what is scanned over."""
    first, last = loop.constants, loop.constants + loop.carries
    return list(operands[:first]), list(operands[first:last]), list(operands[last:])


# --- layer by layer --------------------------------------------------------------------------------------------------


def written_out(loop: Loop, operands: Sequence[Value], run: Callable[[int, Sequence[Value]], list[Value]]) -> list:
    """Run a loop iteration by iteration, each a program of its own."""
    constants, carries, xs = _parts(loop, operands)
    if not loop.length:
        raise Refusal("has no iterations: leave it out")
    iterations = [*range(loop.length)][:: -1 if loop.reverse else 1]
    rows: dict[int, list[Value]] = {}
    for n in iterations:
        outs = run(n, [*constants, *carries, *(_slice(x, n) for x in xs)])
        carries, rows[n] = outs[: loop.carries], outs[loop.carries :]
    stacks = zip(*(rows[n] for n in sorted(rows)), strict=True)
    avals = (v.aval for v in loop.body.jaxpr.outvars[loop.carries :])
    return [*carries, *(_stacked(ys, aval) for ys, aval in zip(stacks, avals, strict=True))]


def _slice(x: Value, n: int) -> Value:
    """Return what an iteration takes of an array that is scanned over."""
    if isinstance(x, Constant):
        return x if x.array is None else Constant(x.array[n if _differs(x) else 0])
    arrays, of = _opened(x, None)
    with jax.named_scope(ENTRY) if isinstance(x, Entry) else contextlib.nullcontext():
        return of(jax.tree.map(lambda array: array[n], arrays))


def _stacked(values: Sequence[Value], aval: Any) -> Value:
    """Return the values of all iterations as one array."""
    if any(isinstance(x, Refused) for x in values):
        return Refused()
    if all(isinstance(x, Constant) for x in values):
        known = (x for x in values if isinstance(x, Constant))
        return Constant(np.stack([np.broadcast_to(x.held, aval.shape) for x in known]))
    if not jaxpr.is_float(aval):
        return Plain(jnp.stack([as_array(x, aval) for x in values]))
    rows = [_lengthened(x if isinstance(x, Constant) else _coded(x)) for x in values]
    return moves.joined(rows, [(1, *aval.shape)] * len(rows), lambda codes: lax.concatenate(codes, 0))


def _lengthened(x: Coded | Constant) -> Coded | Constant:
    """Return an array with an axis of iterations in front."""
    if isinstance(x, Constant):
        return Constant(np.asarray(x.held)[None])
    return dataclasses.replace(
        x, codes=x.codes[None], scale=x.scale[None], low=x.low[None], high=x.high[None], line=None, by=None
    )


# --- over time -------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """The body has no integer form, which has been said."""


def scanned(loop: Loop, operands: Sequence[Value], run: Run) -> list[Value]:
    """Run a loop as a scan. Raises `Refusal` for what grows so fast that no bound is known."""
    constants, inits, xs = _parts(loop, operands)
    invars = loop.body.jaxpr.invars[loop.constants : loop.constants + loop.carries]
    still = [v is out for v, out in zip(invars, loop.body.jaxpr.outvars, strict=False)]
    slices = (v.aval for v in loop.body.jaxpr.invars[loop.constants + loop.carries :])
    whole = (jax.ShapeDtypeStruct((loop.length, *aval.shape), aval.dtype) for aval in slices)
    opened = [_opened(x, aval) for x, aval in zip(xs, whole, strict=True)]
    arrays = [a for a, _ in opened]

    def body(states: Sequence[Value], slices: Sequence) -> tuple[list[Value], list[Value]]:
        own = [x if same else state for x, state, same in zip(inits, states, still, strict=True)]
        outs = run([*constants, *own, *(of(a) for a, (_, of) in zip(slices, opened, strict=True))])
        if any(isinstance(x, Refused) for x in outs):
            raise _Stop
        return [_settled(x) for x in outs[: loop.carries]], [_settled(x) for x in outs[loop.carries :]]

    try:
        states = _States(loop, [v.aval for v in invars], still, body, arrays).of(inits)
        return _run(loop, states, inits, body, arrays)
    except _Stop:
        return [Refused()] * len(loop.body.jaxpr.outvars)


@dataclasses.dataclass(frozen=True)
class _State:
    """How something is carried: codes of a scale between two ends; scale None: an array as it is, or, if `still`, not
    at all."""

    aval: Any
    scale: float | None = None
    reach: int = 0
    still: bool = False

    def opened(self, array: Any) -> Value:
        """Return the value that is carried into an iteration."""
        if self.scale is None:
            return Plain(array)
        rank = len(self.aval.shape)
        ends = ones(-self.reach, rank, np.int64), ones(self.reach, rank, np.int64)
        return Coded(array, ones(self.scale, rank), *ends)

    def array(self, value: Value) -> Any:
        """Return what is carried of a value: saturated, where it may not be within the bounds."""
        if self.still:
            return None
        if self.scale is None:
            return as_array(value, self.aval)
        like = ones(self.scale, len(self.aval.shape))
        if isinstance(value, Constant):
            known = np.clip(np.rint(finite(value) / self.scale), -self.reach, self.reach)
            return jnp.broadcast_to(jnp.asarray(known, jnp.int32), self.aval.shape)
        v = rescaled(uniform(_coded(value)), like)
        inside = v.reach.max() <= self.reach
        return jnp.broadcast_to(v.codes if inside else jnp.clip(v.codes, -self.reach, self.reach), self.aval.shape)

    @property
    def bound(self) -> float:
        """The largest real number that is carried."""
        return self.reach * (self.scale or 0.0)

    @property
    def shape(self) -> Any:
        """What carries it, as a shape; None for nothing."""
        dtype = self.aval.dtype if self.scale is None else jnp.int32
        return None if self.still else jax.ShapeDtypeStruct(self.aval.shape, dtype)


@dataclasses.dataclass(frozen=True)
class _States:
    """Finds how a loop's state is carried. body: returns the values of an iteration."""

    loop: Loop
    avals: Sequence[Any]
    still: Sequence[bool]
    body: Callable
    arrays: Sequence

    def of(self, inits: Sequence[Value]) -> list[_State]:
        """Return how values are carried from the first iteration on. Raises `Refusal` where no bounds are found."""
        moving = [jaxpr.is_float(aval) and not still for aval, still in zip(self.avals, self.still, strict=True)]
        bounds = [_reach(x) if moves else 0.0 for x, moves in zip(inits, moving, strict=True)]
        steps = [0.0] * len(bounds)
        for _ in range(2 + sum(moving)):  # what one takes from another has come round by then
            before, (bounds, steps) = steps, self.grown(bounds)
            if not any(steps):
                return self.within(bounds)
        # What steps come to in the end, where that is less than what they come to within the loop.
        rests = [_rest(a, step) for a, step in zip(before, steps, strict=True)]
        settled = [b + rest for b, rest in zip(bounds, rests, strict=True)]
        short = all(r <= FASTER * self.loop.length * step for r, step in zip(rests, steps, strict=True))
        if short and not any(self.grown(settled)[1]):
            return self.within(settled)
        last = [b + FASTER * self.loop.length * step for b, step in zip(bounds, steps, strict=True)]
        for b, step, further in zip(last, steps, self.grown(last)[1], strict=True):
            if further > FASTER * step + 10 * ROUNDING * b:
                raise Refusal(
                    f"carries a value that may grow from {b:.3g} to {b + further:.3g} in an iteration, ever faster, so "
                    "that no integer type holds it: bound it, with jnp.clip or tanh, within the loop"
                )
        return self.within(last)

    def grown(self, bounds: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the bounds after an iteration, and by how much each is beyond what was carried in but for rounding."""
        states = self.within(bounds)
        later = [max(b, x) for b, x in zip(bounds, self.after(states), strict=True)]
        pairs = zip((s.bound for s in states), later, strict=True)
        return later, [b - a if b > (1 + ROUNDING) * a else 0.0 for a, b in pairs]

    def within(self, bounds: Sequence[float]) -> list[_State]:
        return [self.state(*three) for three in zip(self.avals, bounds, self.still, strict=True)]

    def state(self, aval: Any, bound: float, still: bool) -> _State:
        if not jaxpr.is_float(aval):
            return _State(aval, still=still)
        scale = power_above((1 + SLACK) * bound / ROOM) if bound else 1 / ROOM
        return _State(aval, scale, math.ceil((1 + SLACK) * bound / scale), still)

    def after(self, states: Sequence[_State]) -> list[float]:
        """Return the bounds of what is carried out of an iteration."""
        found: list[Value] = []

        def traced(carried: Sequence, slices: Sequence) -> None:
            outs, _ = self.body([s.opened(a) for s, a in zip(states, carried, strict=True)], slices)
            found.extend(outs)

        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), list(self.arrays))
        jax.eval_shape(traced, [s.shape for s in states], shapes)
        return [_reach(x) if s.scale and not s.still else 0.0 for s, x in zip(states, found, strict=True)]


def _rest(before: float, step: float) -> float:
    """Return all that steps will come to that become smaller as the last one has: as those of a moving average."""
    share = step / before if before > step else 0.0
    return (1 + SLACK) * step * share / (1 - share) if step and share else 0.0


def _reach(x: Value) -> float:
    """Return the largest real number that a value may be."""
    if isinstance(x, Constant):
        return float(np.max(np.abs(finite(x)), initial=0.0))
    x = _coded(x)
    return x.real_reach


def _run(loop: Loop, states: list[_State], inits: list[Value], body: Callable, arrays: list) -> list[Value]:
    likes: list[Callable] = []

    def step(carried: Sequence, slices: Sequence) -> tuple[list, list]:
        outs, ys = body([s.opened(a) for s, a in zip(states, carried, strict=True)], slices)
        closed = [_closed(y) for y in ys]
        likes[:] = [of for _, of in closed]
        return [s.array(x) for s, x in zip(states, outs, strict=True)], [a for a, _ in closed]

    first = [s.array(_settled(x)) for s, x in zip(states, inits, strict=True)]
    carried, stacks = lax.scan(step, first, arrays, length=loop.length, reverse=loop.reverse, unroll=loop.unroll)
    last = [x if s.still else s.opened(a) for s, a, x in zip(states, carried, inits, strict=True)]
    return [*last, *(of(a) for of, a in zip(likes, stacks, strict=True))]


# --- in and out of an iteration --------------------------------------------------------------------------------------


def _settled(x: Value) -> Value:
    """Return a value that can leave an iteration."""
    return x if isinstance(x, Constant | Plain) else _coded(x)


def _coded(x: Value) -> Coded:
    """Return real numbers as codes."""
    if isinstance(x, Entry):
        if x.coded is not None:
            return x.coded
        raise Refusal("passes a float input on, for which no range is known: do this outside of the loop")
    x = there(x)
    if isinstance(x, Mapped):
        x = curves.made(x)
    if not isinstance(x, Coded):
        raise Refusal("carries integers where the program has real numbers")
    if x.far < math.inf:
        raise Refusal(f"passes on {HIDDEN}")
    return x


def _opened(x: Value, aval: Any) -> tuple[Any, Callable[[Any], Value]]:
    """Return the array of a value that is scanned over, [length, ...], and what makes a value of its slice."""
    if isinstance(x, Entry):
        if any(c.ndim and c.shape[0] > 1 for c in (x.factor, x.offset)):
            raise Refusal("passes on a float input that is scaled by iteration: do this before the call")
        factor, offset = (c[0] if c.ndim else c for c in (x.factor, x.offset))
        codes, of = (None, lambda _: None) if x.coded is None else _opened(x.coded, aval)
        return (x.array, codes), lambda both: Entry(both[0], factor, offset, of(both[1]))
    if isinstance(x, Plain):
        return x.array, Plain
    if isinstance(x, Constant):
        if _differs(x):
            return as_array(x, aval), Plain
        return None, lambda _: Constant(x.array[0])
    v = _coded(x)
    v = uniform(v) if v.scale.shape[0] > 1 else v
    scale, low, high = v.scale[0], v.low.min(0), v.high.max(0)
    return v.codes, lambda codes: Coded(codes, scale, low, high, v.zero_point)


def _closed(y: Value) -> tuple[Any, Callable[[Any], Value]]:
    """Return the array of a value that an iteration puts out, and what makes a value of all of them, stacked."""
    if isinstance(y, Plain):
        return y.array, Plain
    if isinstance(y, Constant):
        return None, lambda _: _lengthened(y)
    assert isinstance(y, Coded)
    whole = _lengthened(y)
    return y.codes, lambda codes: dataclasses.replace(whole, codes=codes)
