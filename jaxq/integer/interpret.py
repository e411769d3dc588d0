"""The loop: one value for each variable, one rule for each primitive, and a list of what has none.

What is computed from parameters alone is computed ahead, in float, while the program is traced. Whatever else is float
in the program becomes integers or a line in `problems`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic, branches, curves, inputs, loops, moves, picks, quotients, reductions, rows, tables
from jaxq.integer.entry import leave
from jaxq.integer.hidden import far_after
from jaxq.integer.inputs import EXIT
from jaxq.integer.origins import origin
from jaxq.integer.products import Job
from jaxq.integer.values import (
    HIDDEN,
    Coded,
    Constant,
    Entry,
    Mapped,
    Plain,
    Refusal,
    Refused,
    Rowed,
    Value,
    as_array,
    is_extended,
    there,
)
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Branches, CustomRule, Eqn, Inline, Loop, Remat
from jaxq.programs.sites import Path

RULES: dict[Any, Callable[..., Value]] = {**arithmetic.RULES, **moves.RULES, **picks.RULES, **reductions.RULES}
# Of two values that are functions of one, these are integers all the same; other operations become part of a table.
DIRECT = frozenset({lax.add_p, lax.sub_p, lax.mul_p, lax.max_p, lax.min_p, lax.select_n_p, *arithmetic.COMPARISONS})


@dataclasses.dataclass(frozen=True, eq=False)
class Integers:
    """Runs a program in integers. jobs: what the plan says of each site, by path; problems: what could not be done;
    forms: which equations complete a softmax or a norm, to be added to; layers: which iterations of loops this runs."""

    jobs: dict[Path, Job]
    problems: list[str]
    forms: dict[Path, rows.Found]
    layers: tuple[int, ...] = ()

    def run(self, body: Body, args: Sequence[Value], path: Path = ()) -> list[Value]:
        """Return the values of a program's outputs."""
        env: dict[Any, Value] = dict(zip(body.invars, [*map(known, body.consts), *args], strict=True))

        def read(v: Any) -> Value:
            return known(v.val) if isinstance(v, jaxpr.Literal) else env[v]

        for number, eqn in enumerate(body.jaxpr.eqns):
            with jaxpr.Context(eqn):
                outs = self.step(eqn, [read(v) for v in eqn.invars], (*path, number))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in body.jaxpr.outvars]

    def step(self, eqn: Eqn, operands: Sequence[Value], path: Path) -> Sequence[Value]:
        """Return the values of an equation's outputs; where it has no integer form, say so once."""
        if any(isinstance(x, Refused) for x in operands):
            return [Refused()] * len(eqn.outvars)
        try:
            return self.outputs(eqn, operands, path)
        except Refusal as refusal:
            where = refusal.where or _named(eqn, self.jobs.get(path))
            if (problem := f"{where} {refusal}") not in self.problems:
                self.problems.append(problem)
            return [Refused()] * len(eqn.outvars)

    def outputs(self, eqn: Eqn, operands: Sequence[Value], path: Path) -> Sequence[Value]:
        constants = [x for x in operands if isinstance(x, Constant)]
        if path in self.jobs:
            return [self.jobs[path].run(operands)]
        if len(constants) == len(operands) and not eqn.effects and not _counts_symbols(eqn):
            return _ahead(eqn, constants)
        sub = jaxpr.subprogram(eqn)
        if sub is not None:
            return self.inside(sub, eqn, operands, path)
        if _is_whole(eqn, operands):
            arrays = [as_array(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
            return [Plain(y) for y in jaxpr.rebind(eqn, *arrays)]
        if any(isinstance(x, Entry) for x in operands):
            return self.entering(eqn, operands, path)
        if eqn.primitive is lax.split_p:
            return moves.split(eqn, there(operands[0]))
        if eqn.primitive in picks.SEVERAL:
            return picks.SEVERAL[eqn.primitive](eqn, *(curves.formed(there(x)) for x in operands))
        return [_filled(eqn, self.ordinary(eqn, operands, path))]

    def entering(self, eqn: Eqn, operands: Sequence[Value], path: Path) -> Sequence[Value]:
        """Keep an input that is scaled, shifted or moved on its way to a site; where something else takes it, enter."""
        coded = [x.coded if isinstance(x, Entry) else x for x in operands]
        known = [x for x in coded if x is not None]
        try:
            entry = inputs.followed(eqn, operands)
        except Refusal:
            if len(known) < len(coded):
                raise
            return self.outputs(eqn, known, path)
        if len(known) < len(coded):
            return [entry]
        (value,) = self.outputs(eqn, known, path)
        return [dataclasses.replace(entry, coded=value if isinstance(value, Coded) else None)]

    def inside(self, sub: jaxpr.Subprogram, eqn: Eqn, operands: Sequence[Value], path: Path) -> list[Value]:
        """Run what an equation holds."""
        if isinstance(sub, Inline | CustomRule | Remat):
            return self.run(sub.body, operands, (*path, 0))
        if isinstance(sub, Loop):
            return self.loop(sub, operands, path)
        if not isinstance(sub, Branches):
            raise Refusal("has no integer form: use lax.scan or fori_loop with a known number of steps")

        def branch(n: int) -> list[Value]:
            return self.run(sub.bodies[n], operands[1:], (*path, n))

        return branches.run(operands[0], len(sub.bodies), branch, [v.aval for v in eqn.outvars])

    def loop(self, loop: Loop, operands: Sequence[Value], path: Path) -> list[Value]:
        """Run a loop: layer by layer, where each has weights of its own, else as a loop."""
        if loops.varies(loop, operands) or any(path in job.item.stacked for job in self.jobs.values()):
            return loops.written_out(loop, operands, lambda n, args: self.at(path, n).run(loop.body, args, (*path, 0)))
        return loops.scanned(loop, operands, lambda args: self.run(loop.body, args, (*path, 0)))

    def at(self, path: Path, n: int) -> "Integers":
        """Return what runs one iteration of the loop at `path`."""
        jobs = {key: job.layer(path, n) for key, job in self.jobs.items()}
        return dataclasses.replace(self, jobs=jobs, layers=(*self.layers, n))

    def ordinary(self, eqn: Eqn, operands: Sequence[Value], path: Path) -> Value:
        """Apply the rule of an ordinary equation, or of what it is the last one of."""
        by = origin(eqn, operands)
        if by is not None and rows.may_complete(eqn, operands):
            form = self.form(eqn, Rowed(by, Refusal()), (*self.layers, *path))
            if form is not None:
                return form
        try:
            value = self.alone(eqn, operands)
        except Refusal as why:  # what nobody asks for may have no integers
            if by is None:
                raise
            why.where = why.where or _named(eqn)
            return Rowed(by, why)
        return dataclasses.replace(value, by=by) if by and isinstance(value, Coded | Mapped) else value

    def form(self, eqn: Eqn, result: Rowed, path: Path) -> Coded | None:
        """Return the integers of what an equation completes; of a batch whose size is a symbol, it is what it was at
        the size that the program was built for."""
        completed = rows.completed(eqn, result, self.forms.get(path))
        if completed is None:
            return None
        self.forms[path], value = completed
        return value

    def alone(self, eqn: Eqn, operands: Sequence[Value]) -> Value:
        """Apply the rule of an equation by itself."""
        operands = [there(x) for x in operands]
        far = far_after(eqn, operands)
        value = self.ruled(eqn, operands)
        return dataclasses.replace(value, far=far) if far < math.inf and isinstance(value, Coded) else value

    def ruled(self, eqn: Eqn, operands: Sequence[Value]) -> Value:
        """Apply a move, a table or a rule."""
        if eqn.primitive in moves.MOVES:
            return moves.move(eqn, operands[0])
        line, rule = tables.composed(eqn, operands), _rule(eqn)
        data = [x for x in operands if not isinstance(x, Constant)]
        waits = any(isinstance(x, Mapped) for x in data) or (len(data) > 1 and eqn.primitive not in DIRECT)
        divides = eqn.primitive is lax.div_p and not isinstance(operands[1], Constant)
        if line is not None and (waits or rule is None or divides):
            return Mapped(line)
        if divides:
            return quotients.quotient(*operands)
        if rule is None:
            raise Refusal(f"has no integer form{', and no table, as it takes several values' if len(data) > 1 else ''}")
        rank = len(eqn.outvars[0].aval.shape)
        operands = [curves.formed(x) for x in operands]
        if eqn.primitive in tables.ELEMENTWISE:
            operands = [_raised(x, rank) for x in operands]
        result = rule(eqn, *operands)
        return dataclasses.replace(result, line=line) if line and isinstance(result, Coded | Plain) else result


def _named(eqn: Eqn, job: Job | None = None) -> str:
    """Return a site's or a primitive's name, and its line."""
    name, line = f"site '{job.item.site.name}'" if job else eqn.primitive.name, jaxpr.source_line(eqn)
    return f"{name} at {line}" if line else name


def _raised(x: Value, rank: int) -> Value:
    """Return a number without axes, which JAX combines with an array as it is, with as many as the array has."""
    if not isinstance(x, Coded) or x.codes.ndim == rank:
        return x
    one = (1,) * rank
    return dataclasses.replace(
        x, codes=x.codes.reshape(one), scale=x.scale.reshape(one), low=x.low.reshape(one), high=x.high.reshape(one)
    )


def _rule(eqn: Eqn) -> Callable[..., Value] | None:
    """Return the rule of an equation, if it has one: of powers, the second is a product."""
    if eqn.primitive is lax.integer_pow_p and eqn.params["y"] == 2:
        return arithmetic.square
    return RULES.get(eqn.primitive)


def known(array: Any) -> Constant:
    """Return a constant, with ones for the axes along which all numbers are alike."""
    if array is None or is_extended(array):
        return Constant(array)
    array = np.asarray(array)
    for axis in range(array.ndim):
        first = array[(slice(None),) * axis + (slice(0, 1),)]
        if array.shape[axis] > 1 and np.array_equal(array, np.broadcast_to(first, array.shape)):
            array = first
    return Constant(array)


def _ahead(eqn: Eqn, operands: Sequence[Constant]) -> Sequence[Constant]:
    """Compute what depends on parameters alone, in float, on the host."""
    if any(x.array is None for x in operands):
        return [Constant(None)] * len(eqn.outvars)
    if eqn.primitive is lax.broadcast_in_dim_p and len(operands) == 1:  # to a batch of any size
        shape = [1] * len(eqn.params["shape"])
        for axis, n in zip(eqn.params["broadcast_dimensions"], operands[0].array.shape, strict=True):
            shape[axis] = n
        return [Constant(operands[0].array.reshape(shape))]
    pairs = zip(operands, eqn.invars, strict=True)
    with jax.ensure_compile_time_eval():
        return [known(y) for y in jaxpr.rebind(eqn, *(as_array(x, v.aval) for x, v in pairs))]


def _counts_symbols(eqn: Eqn) -> bool:
    """Tell whether integers of a size that is a symbol come out, which are known when the program runs."""
    return any(not jaxpr.is_float(v.aval) and not all(isinstance(n, int) for n in v.aval.shape) for v in eqn.outvars)


def _is_whole(eqn: Eqn, operands: Sequence[Value]) -> bool:
    """Tell whether an equation is about integers that stand for themselves."""
    if not all(isinstance(x, Plain | Constant) for x in operands):
        return False
    return not any(jaxpr.is_float(v.aval) for v in (*eqn.invars, *eqn.outvars))


def _filled(eqn: Eqn, value: Value) -> Value:
    """Return codes of the shape that the program has: an operand with ones may have been the only array."""
    shape = eqn.outvars[0].aval.shape
    if isinstance(value, Coded) and value.codes.shape != shape:
        return dataclasses.replace(value, codes=jnp.broadcast_to(value.codes, shape))
    if isinstance(value, Plain) and value.array.shape != shape:
        return dataclasses.replace(value, array=jnp.broadcast_to(value.array, shape))
    return value


def finished(value: Value, aval: Any) -> jax.Array:
    """Return an output of the program in the type that it has: codes are dequantized."""
    if isinstance(value, Constant):
        with jax.named_scope(EXIT):  # a float, if it is one, that nothing was computed for
            return as_array(value, aval)
    value = there(value)
    if isinstance(value, Coded) and value.far < math.inf:
        raise Refusal(f"is {HIDDEN}")
    if isinstance(value, Coded | Mapped):
        return leave(curves.made(value) if isinstance(value, Mapped) else value, aval.dtype)
    assert isinstance(value, Plain | Entry)
    if isinstance(value, Entry) and value.is_changed:
        if value.coded is None:
            raise Refusal("is a float input, scaled or shifted, for which no range is known: do this after the call")
        return leave(value.coded, aval.dtype)
    return value.array
