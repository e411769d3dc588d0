"""What of a program is float and has no integer form, besides its sites: for a plan to say before anything is run.

A walk of its own over a program: what depends on parameters alone is computed ahead, and does not count. What has a
form by its name may still be refused by `jaxq.integer` for its numbers: a sum too long for int32, say.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence

from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Eqn, Manual
from jaxq.programs.sites import Path
from jaxq.programs.walk import Walk

_ARITHMETIC = "add sub neg mul div square integer_pow pow rem max min clamp select_n abs sign floor ceil round"
_FUNCTIONS = (
    "exp exp2 expm1 log log1p sqrt rsqrt cbrt tanh logistic erf erfc erf_inv sin cos tan sinh cosh asin acos atan "
    "asinh acosh atanh atan2"
)
_QUESTIONS = "eq ne lt le gt ge and or not is_finite argmax argmin"
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_window_sum reduce_window_max cumsum cummax cummin sort top_k"
_MOVES = (
    "broadcast_in_dim concatenate convert_element_type copy name optimization_barrier pad reshape rev slice split "
    "sharding_constraint squeeze stack stop_gradient tile transpose gather scatter dynamic_slice dynamic_update_slice"
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
    walk = _Walk(sites)
    walk.through(body, list(is_data))
    return tuple(walk.found)


class _Walk(Walk):
    """Knows what depends on data."""

    def __init__(self, sites: frozenset[Path]):
        self.sites, self.found = sites, dict[Floating, None]()

    def step(self, eqn: Eqn, ins: list, path: Path, around: Sequence[Eqn]) -> list:
        if path in self.sites or not any(ins):
            return [any(ins)] * len(eqn.outvars)
        if isinstance(jaxpr.subprogram(eqn), Manual):  # which has no integer form as a whole
            return [self.ordinary(eqn, ins, path, around)] * len(eqn.outvars)
        return super().step(eqn, ins, path, around)

    def ordinary(self, eqn: Eqn, ins: list, path: Path, around: Sequence[Eqn]) -> bool:
        if eqn.primitive.name not in FORMS and any(jaxpr.is_float(v.aval) for v in (*eqn.invars, *eqn.outvars)):
            self.found[_seen((*around, eqn))] = None
        return True


def _seen(held: Sequence[Eqn]) -> Floating:
    """Return the last of equations that hold one another, with its line, or the nearest one that there is."""
    scope = "/".join(name for eqn in held for name in jaxpr.scopes(eqn)[0])
    lines = filter(None, map(jaxpr.source_line, reversed(held)))
    return Floating(held[-1].primitive.name, scope, os.path.basename(next(lines, "")))
