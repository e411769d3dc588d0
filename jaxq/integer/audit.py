"""The proof that nothing in between is float: every operation of the traced program is looked at.

Only the scopes of `inputs` may hold floats. The one exception is named where it is: the sums of a convolution on a GPU,
which are integers in float32, exact (`lowering.cudnn`). Of products that differ by platform the audit sees the form
of a CPU.
"""

from collections.abc import Iterator
from typing import Any

from jaxq.integer.inputs import ENTRY, EXIT
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Eqn


def floats(body: Body, around: tuple[str, ...] = ()) -> Iterator[Eqn]:
    """Yield the operations on floats outside of the entry and the exit. around: the name scopes the program is in."""
    for eqn in body.jaxpr.eqns:
        scopes = (*around, *jaxpr.scopes(eqn)[0])
        if ENTRY in scopes or EXIT in scopes:
            continue
        inner = [jaxpr.as_body(held) for held in jaxpr.programs_in(jaxpr.on_platform(eqn, "cpu"))]
        for held in inner:
            yield from floats(held, scopes)
        if not inner and any(jaxpr.is_float(v.aval) for v in (*eqn.invars, *eqn.outvars)):
            yield eqn


def check(program: Any) -> None:
    """Raise `RuntimeError` if a traced program has floats inside: a rule of jaxq's is wrong then."""
    found = list(floats(jaxpr.as_body(program)))
    if found:
        lines = "\n".join(f"  {eqn.primitive.name} at {jaxpr.source_line(eqn)}" for eqn in found)
        raise RuntimeError(f"{len(found)} operations of this integer program are float; please report them:\n{lines}")
