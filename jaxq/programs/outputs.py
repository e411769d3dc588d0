"""Which operands of sites are outputs of functions whose range is known: a softmax, a tanh, a logistic function.

Found by dataflow, so a softmax is what divides exponentials by their sum, merely moved, whoever wrote it. A walk of its
own over a program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Eqn
from jaxq.programs.sites import Path
from jaxq.programs.walk import Walk

FUNCTIONS = ("softmax", "tanh", "logistic")
EXPONENTIAL, SUM, ZEROS = "exp", "sum of exp", "zeros"


class Output(NamedTuple):
    """What a function puts out, merely moved since. path: of the exponential, if it has to do with one."""

    function: str
    path: Path = ()


def outputs(body: Body, sites: frozenset[Path]) -> dict[Path, tuple[str, ...]]:
    """Return for every site the function that each of its operands is an output of, or nothing. sites: their paths."""
    walk = _Walk(sites)
    walk.through(body, [None] * len(body.jaxpr.invars))
    return walk.found


def is_zero(v: Any) -> bool:
    """Tell whether a variable is the number zero."""
    return isinstance(v, jaxpr.Literal) and not np.any(v.val)


class _Walk(Walk):
    def __init__(self, sites: frozenset[Path]):
        self.sites, self.found = sites, dict[Path, tuple[str, ...]]()

    def step(self, eqn: Eqn, ins: list, path: Path, around: Sequence[Eqn]) -> list:
        if path not in self.sites:
            return super().step(eqn, ins, path, around)
        self.found[path] = tuple(x.function if x and x.function in FUNCTIONS else "" for x in ins)
        return [None] * len(eqn.outvars)

    def either(self, a: Output | None, b: Output | None) -> Output | None:
        """Of both places, or of one where the other has zeros, as states of loops start: zero is in every range."""
        if a and b and ZEROS in (a.function, b.function):
            return b if a.function == ZEROS else a
        return a if a and b and a.function == b.function else None

    def ordinary(self, eqn: Eqn, ins: list, path: Path, around: Sequence[Eqn]) -> Output | None:
        del around
        name, first = eqn.primitive.name, ins[0] if ins else None
        if name in (*FUNCTIONS, EXPONENTIAL):
            return Output(name, path)
        if eqn.primitive in jaxpr.MOVES:
            return Output(ZEROS) if is_zero(eqn.invars[0]) else first
        if eqn.primitive is jaxpr.SUM and first and first.function == EXPONENTIAL:
            return Output(SUM, first.path)
        divides = name == "div" and all(ins)
        if divides and [x.function for x in ins] == [EXPONENTIAL, SUM] and ins[0].path == ins[1].path:
            return Output("softmax", first.path)
        return None
