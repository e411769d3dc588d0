"""What of a program is float and has no integer form, besides its sites: for a plan to say before anything is run.

A walk of its own over a program: what depends on parameters alone is computed ahead, and does not count. What has a
form by its name may still be refused by `jaxq.integer` for its numbers: a sum too long for int32, say.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import NamedTuple

from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Branches, Eqn, Loop, Manual, Opaque, While
from jaxq.programs.sites import Path

_ARITHMETIC = "add sub neg mul div square integer_pow pow rem max min clamp select_n abs sign floor ceil round"
_FUNCTIONS = (
    "exp exp2 expm1 log log1p sqrt rsqrt cbrt tanh logistic erf erfc erf_inv sin cos tan sinh cosh asin acos atan "
    "asinh acosh atanh atan2"
)
_QUESTIONS = "eq ne lt le gt ge and or not is_finite argmax argmin"
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_window_sum reduce_window_max"
_MOVES = (
    "broadcast_in_dim concatenate convert_element_type copy name optimization_barrier pad reshape rev slice split "
    "sharding_constraint squeeze stack stop_gradient tile transpose"
)
# The names of all primitives that an integer program knows.
FORMS = frozenset(" ".join((_ARITHMETIC, _FUNCTIONS, _QUESTIONS, _REDUCTIONS, _MOVES)).split())


@dataclasses.dataclass(frozen=True)
class Floating:
    """An operation that stays float. scope: the name scopes it is in; source: its line, where it is known."""

    primitive: str
    scope: str
    source: str

    def __str__(self) -> str:
        source, scope = self.source and f" at {self.source}", self.scope and f" in {self.scope}"
        return f"{self.primitive}{source}{scope}"


def floating(body: Body, is_data: Iterable[bool], sites: frozenset[Path]) -> tuple[Floating, ...]:
    """Return the operations on data without an integer form, once for each line. sites: paths of what is a site."""
    walk = _Walk(sites, {})
    walk.through(body, list(is_data), (), Floating("", "", ""))
    return tuple(walk.found)


class _Walk(NamedTuple):
    """Tells what depends on data. around: the equation that a program is in."""

    sites: frozenset[Path]
    found: dict[Floating, None]

    def through(self, body: Body, flags: list[bool], path: Path, around: Floating) -> list[bool]:
        """Return which outputs of a program depend on data."""
        env = dict(zip(body.invars, [*(False for _ in body.consts), *flags], strict=True))

        def read(v) -> bool:
            return not isinstance(v, jaxpr.Literal) and env[v]

        for number, eqn in enumerate(body.jaxpr.eqns):
            outs = self.step(eqn, [read(v) for v in eqn.invars], (*path, number), around)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in body.jaxpr.outvars]

    def step(self, eqn: Eqn, ins: list[bool], path: Path, around: Floating) -> list[bool]:
        if path in self.sites or not any(ins):
            return [any(ins)] * len(eqn.outvars)
        sub = jaxpr.subprogram(eqn)
        if sub is None or isinstance(sub, While | Branches | Manual | Opaque):
            if eqn.primitive.name not in FORMS and any(jaxpr.is_float(v.aval) for v in (*eqn.invars, *eqn.outvars)):
                self.found[_seen(eqn, around)] = None
            return [True] * len(eqn.outvars)
        here = _seen(eqn, around)
        if not isinstance(sub, Loop):
            return self.through(sub.body, ins, (*path, 0), here)
        carried = slice(sub.constants, sub.constants + sub.carries)
        while True:  # until no more of what is carried depends on data
            outs = self.through(sub.body, ins, (*path, 0), here)
            later = [a or b for a, b in zip(ins[carried], outs[: sub.carries], strict=True)]
            if later == ins[carried]:
                return outs
            ins = [*ins[: carried.start], *later, *ins[carried.stop :]]


def _seen(eqn: Eqn, around: Floating) -> Floating:
    """Return an equation as it is named; within functions of JAX, by the line that called them."""
    scope = "/".join(filter(None, (around.scope, *jaxpr.scopes(eqn)[0])))
    source = os.path.basename(jaxpr.source_line(eqn)) or around.source
    return Floating(eqn.primitive.name, scope, source)
