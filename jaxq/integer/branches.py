"""Branches: all of them are run, and one is selected, as by `jnp.where`; where it is known which, only that one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.integer import curves
from jaxq.integer.arithmetic import selected
from jaxq.integer.hidden import check_near
from jaxq.integer.scales import coded
from jaxq.integer.values import Coded, Constant, Entry, Plain, Refusal, Refused, Value, as_array, there
from jaxq.programs import jaxpr

Run = Callable[[int], list[Value]]


def run(index: Value, count: int, branch: Run, avals: Sequence[Any]) -> list[Value]:
    """Return the values of the branch that an index chooses, of so many, saturated. avals: of the results."""
    if isinstance(index, Constant):
        return branch(min(max(int(index.reals.max()), 0), count - 1))
    if not isinstance(index, Plain):
        raise Refusal("chooses a branch by what is no integer of the program")
    which = lax.clamp(jnp.int32(0), index.array, jnp.int32(count - 1))
    results = zip(*(branch(n) for n in range(count)), strict=True)
    return [_chosen(which, cases, aval) for cases, aval in zip(results, avals, strict=True)]


def _chosen(which: jax.Array, cases: Sequence[Value], aval: Any) -> Value:
    """Return one of several values. which: int32, a number."""
    if any(isinstance(case, Refused) for case in cases):
        return Refused()
    if all(case is cases[0] for case in cases):
        return cases[0]
    cases = [case.coded or case if isinstance(case, Entry) else case for case in cases]
    if any(isinstance(case, Entry) for case in cases):
        raise Refusal("passes a float input on, for which no range is known: do this outside of the branches")
    index = which != 0 if len(cases) == 2 else which
    if not jaxpr.is_float(aval):
        return Plain(lax.select_n(index, *(as_array(case, aval) for case in cases)))
    made = [curves.formed(there(case)) for case in cases]
    if not any(isinstance(case, Coded) for case in made):
        made = [coded(case, aval) for case in made]
    check_near(made)
    return selected(jnp.broadcast_to(index, aval.shape), made)
