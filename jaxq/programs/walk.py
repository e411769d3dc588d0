"""A walk over a traced program with something known of every value: what the small analyses for plans have in common.

A subclass says what an ordinary equation makes of what is known of its operands. Nothing known is anything false.
"""

import functools
from collections.abc import Sequence
from typing import Any

from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Branches, Eqn, Loop, Opaque, While
from jaxq.programs.sites import Path


class Walk:
    """Goes through a program. constant: what is known of closed-over arrays."""

    constant: Any = None

    def ordinary(self, eqn: Eqn, ins: list, path: Path, around: Sequence[Eqn]) -> Any:
        """Return what is known of an equation's results. around: the equations that hold it, outermost first."""
        raise NotImplementedError

    def either(self, a: Any, b: Any) -> Any:
        """Return what is known of a value that comes from one of two places."""
        return a or b

    def through(self, body: Body, args: Sequence, path: Path = (), around: Sequence[Eqn] = ()) -> list:
        """Return what is known of a program's outputs. args: what is known of its arguments."""
        env = dict(zip(body.invars, [*(self.constant for _ in body.consts), *args], strict=True))

        def read(v: Any) -> Any:
            return None if isinstance(v, jaxpr.Literal) else env[v]

        for number, eqn in enumerate(body.jaxpr.eqns):
            outs = self.step(eqn, [read(v) for v in eqn.invars], (*path, number), around)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in body.jaxpr.outvars]

    def step(self, eqn: Eqn, ins: list, path: Path, around: Sequence[Eqn]) -> list:
        """Return what is known of an equation's results, from the programs inside it where it has any."""
        sub, inside = jaxpr.subprogram(eqn), (*around, eqn)
        if sub is None or isinstance(sub, While | Opaque):
            return [self.ordinary(eqn, ins, path, around)] * len(eqn.outvars)
        if isinstance(sub, Branches):
            each = [self.through(branch, ins[1:], (*path, n), inside) for n, branch in enumerate(sub.bodies)]
            return [functools.reduce(self.either, found) for found in zip(*each, strict=True)]
        if not isinstance(sub, Loop):
            return self.through(sub.body, ins, (*path, 0), inside)
        carried = slice(sub.constants, sub.constants + sub.carries)
        while True:  # until what is carried is what it was before
            outs = self.through(sub.body, ins, (*path, 0), inside)
            later = [self.either(a, b) for a, b in zip(ins[carried], outs[: sub.carries], strict=True)]
            if later == ins[carried]:
                return outs
            ins = [*ins[: carried.start], *later, *ins[carried.stop :]]
