"""How a value was computed, and the values that all of it went through: what else it may be seen as a function of.

An operation without integers of its own is not lost: `Rowed` says how its result would be computed (`By`). Whatever
completes a softmax or a norm goes back to one value as a whole, an input of it or something on the way. That is a
*cut*, and what lies between a cut and the result is a function that can be run on any numbers.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxq.integer.moves import MOVES
from jaxq.integer.tables import ELEMENTWISE, run
from jaxq.integer.values import By, Coded, Constant, Mapped, Rowed, Value, as_array
from jaxq.programs.jaxpr import Eqn

REDUCTIONS = frozenset({lax.reduce_sum_p, lax.reduce_max_p, lax.reduce_min_p})


def origin(eqn: Eqn, operands: Sequence[Value]) -> By | None:
    """Return how an equation's result is computed, if that can be run on other numbers."""
    if eqn.primitive not in ELEMENTWISE | MOVES | REDUCTIONS:
        return None
    runs = all(
        isinstance(x, Coded | Mapped | Rowed) or (isinstance(x, Constant) and x.array is not None) for x in operands
    )
    return By(eqn, tuple(operands)) if runs else None


class View(NamedTuple):
    """The shape in which rows are along some axes: a norm of groups is one of an array with an axis more."""

    shape: tuple[Any, ...]
    axes: tuple[int, ...]

    @property
    def each(self) -> tuple[Any, ...]:
        """The shape with one number for each row."""
        return tuple(1 if axis in self.axes else n for axis, n in enumerate(self.shape))


class Cut(NamedTuple):
    """A value that a result goes back to as a whole. steps: what is in between, the result itself first."""

    root: Coded | Mapped
    steps: tuple[Any, ...]

    def of(self, x: jax.Array) -> jax.Array:
        """Return what the result would be if the root were x."""
        done = {id(self.root): x}
        for step in reversed(self.steps):
            pairs = zip(step.by.operands, step.by.eqn.invars, strict=True)
            args = [as_array(o, v.aval) if isinstance(o, Constant) else done[id(o)] for o, v in pairs]
            done[id(step)] = run(step.by.eqn, args)
        return done[id(self.steps[0])]

    @property
    def view(self) -> View | None:
        """How the steps see rows of the root; None where they reduce nothing of its size, or in several shapes."""
        reductions = [step.by.eqn for step in self.steps if step.by.eqn.primitive in REDUCTIONS]
        seen = [(eqn.invars[0].aval.shape, eqn.params["axes"]) for eqn in reductions]
        whole = [(shape, axes) for shape, axes in seen if math.prod(shape) == math.prod(self.root.shape)]
        if len({shape for shape, _ in whole}) != 1:
            return None
        return View(whole[0][0], tuple(sorted({axis for _, axes in whole for axis in axes})))


def cuts(result: Rowed) -> Iterator[Cut]:
    """Yield the cuts of a result, the nearest first: where nothing else is open, everything goes through a value."""
    uses = _uses(result)
    opened: dict[int, Any] = {id(result): result}
    ready: list[Any] = [result]
    steps: list[Any] = []
    while ready:
        value = ready.pop()
        if len(opened) == 1 and isinstance(value, Coded | Mapped):
            yield Cut(value, tuple(steps))
        if value.by is None:  # an end of which the rest, if there is any, does not go through what is open
            return
        del opened[id(value)]
        steps.append(value)
        for x in _inputs(value):
            opened[id(x)] = x
            uses[id(x)] -= 1
            if not uses[id(x)]:
                ready.append(x)


def _uses(result: Rowed) -> Counter[int]:
    """Return how often each value is an operand of others that a result is computed from."""
    uses, found, seen = Counter[int](), [result], {id(result)}
    while found:
        for x in _inputs(found.pop()):
            uses[id(x)] += 1
            if id(x) not in seen:
                seen.add(id(x))
                found.append(x)
    return uses


def _inputs(value: Any) -> list[Any]:
    """Return the values that one is computed from, besides constants."""
    return [] if value.by is None else [x for x in value.by.operands if not isinstance(x, Constant)]
