"""The one file that knows what JAX's programs look like inside.

Every equation with programs in its parameters is seen as one of the few frozen `records`, whatever the JAX version
calls it; `subprogram` returns that record, and `issue` issues an equation again, unchanged. Everything else in jaxq
works on these.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex
from jax.extend import source_info_util
from jax.extend.core import primitives as prims
from jax.interpreters import ad, batching, mlir, partial_eval

from jaxq.programs.records import (
    Body,
    Branches,
    CustomRule,
    Inline,
    Loop,
    Manual,
    Opaque,
    Remat,
    Subprogram,
    While,
)

Literal = jex.Literal
Zero = ad.Zero  # a tangent or gradient known to be zero
filled = ad.instantiate_zeros  # one with numbers
Eqn = Any  # a jex.JaxprEqn; its declared types hide that values have shapes and dtypes

DOT = prims.dot_general_p
CONV = prims.conv_general_dilated_p
GATHER = prims.gather_p
CONVERT = prims.convert_element_type_p
TRANSPOSE = prims.transpose_p
READ = prims.get_p
SLICE = prims.dynamic_slice_p
LOOKUPS = frozenset({GATHER, SLICE})
SAME_VALUE = frozenset({CONVERT, prims.copy_p, lax.optimization_barrier_p, prims.sharding_constraint_p, prims.name_p})

# What moves values and computes none: all of them; some of them; one of several operands' each time.
MOVES = SAME_VALUE | {
    TRANSPOSE,
    prims.reshape_p,
    prims.squeeze_p,
    prims.broadcast_in_dim_p,
    prims.rev_p,
    prims.stop_gradient_p,
}
PICKS = frozenset({prims.slice_p, SLICE, prims.reduce_window_max_p, prims.reduce_max_p, prims.reduce_min_p})
JOINS = frozenset({prims.max_p, prims.min_p, prims.concatenate_p})
ROOTS = frozenset({prims.rsqrt_p, prims.sqrt_p, prims.pow_p})
SCALINGS = frozenset({prims.mul_p, prims.div_p})
LINEAR = SCALINGS | {prims.add_p, prims.sub_p, prims.neg_p, prims.reduce_window_sum_p}  # in the first operand
SUM = prims.reduce_sum_p
LATE = jex.Primitive("late")  # whose rules are in `late`
SELECT = prims.select_n_p
PAD = prims.pad_p

# Most of what a program consists of, known to hold no program in its parameters: not looked into, which saves time.
ORDINARY = frozenset(
    {DOT, CONV, GATHER, CONVERT, TRANSPOSE, prims.copy_p, lax.optimization_barrier_p}
    | {prims.add_p, prims.sub_p, prims.mul_p, prims.div_p, prims.neg_p, prims.max_p, prims.min_p, prims.square_p}
    | {prims.integer_pow_p, prims.exp_p, prims.log_p, prims.tanh_p, prims.logistic_p, prims.erf_p, prims.rsqrt_p}
    | {prims.sqrt_p, prims.select_n_p, prims.eq_p, prims.ne_p, prims.lt_p, prims.le_p, prims.gt_p, prims.ge_p}
    | {prims.reshape_p, prims.broadcast_in_dim_p, prims.squeeze_p, prims.slice_p, prims.concatenate_p, prims.iota_p}
    | {prims.reduce_sum_p, prims.reduce_max_p, prims.reduce_min_p, prims.stop_gradient_p}
)


def trace(fn: Callable, *args) -> tuple[Body, Any]:
    """Trace `fn` on flat array-like arguments; return its program and the shapes of its output tree."""
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return as_body(closed), out


def as_body(jaxpr: Any) -> Body:
    """See a Jaxpr or ClosedJaxpr (one class since JAX 0.12) as a program with its constants."""
    consts = tuple(getattr(jaxpr, "consts", ()) or ())
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return Body(inner, consts)


def is_program(value: Any) -> bool:
    """Tell whether a parameter of an equation is a program."""
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))


@functools.cache
def ragged_dot() -> Any:
    """Return the primitive behind `lax.ragged_dot`, which JAX does not export."""
    shapes = jax.ShapeDtypeStruct((2, 2), "float32"), jax.ShapeDtypeStruct((1, 2, 2), "float32")
    closed = jax.make_jaxpr(lax.ragged_dot)(*shapes, jax.ShapeDtypeStruct((1,), "int32"))
    return next(eqn.primitive for eqn in all_equations(as_body(closed)) if eqn.primitive.name.startswith("ragged_dot"))


def is_ragged_dot(eqn: Eqn) -> bool:
    """Tell whether an equation is a ragged dot; the primitive is looked up only for equations with its parameters."""
    return "ragged_dot_dimension_numbers" in eqn.params and eqn.primitive is ragged_dot()


def is_site_primitive(eqn: Eqn) -> bool:
    """Tell whether an equation multiplies matrices or convolves."""
    return eqn.primitive in (DOT, CONV) or is_ragged_dot(eqn)


# --- the records ---------------------------------------------------------------------------------------------------


def subprogram(eqn: Eqn) -> Subprogram | None:
    """Return how the programs inside an equation run; None for an ordinary equation."""
    if eqn.primitive in ORDINARY:
        return None
    record = _RECORDS.get(eqn.primitive)
    if record is not None:
        return record(eqn)
    if "_prim" in eqn.params:
        return _hijax(eqn)
    if "newly_manual_axes" in eqn.params or "manual_axes" in eqn.params:
        return _shard_map(eqn)
    inner = tuple(as_body(p) for p in programs_in(eqn.params.values()))
    if not inner:
        return None
    if len(inner) == 1 and eqn.primitive.name in _PLAIN_CALLS:
        return Inline(inner[0], None)
    return Opaque(inner)


# Plain calls that JAX does not export as objects.
_PLAIN_CALLS = ("eval_jaxpr", "core_call", "core_closed_call", "closed_call")


def _jit(eqn: Eqn) -> Inline:
    p = eqn.params
    named = [s for s in (*p["in_shardings"], *p["out_shardings"]) if not _is_unspecified(s)]
    shardings = {key: _specified(p[key]) for key in ("in_shardings", "out_shardings")} if named else None
    return Inline(as_body(p["jaxpr"]), shardings)


def _is_unspecified(sharding: Any) -> bool:
    return type(sharding).__name__ == "UnspecifiedValue"


def _specified(shardings: Sequence) -> tuple:
    return tuple(None if _is_unspecified(s) else s for s in shardings)


def _scan(eqn: Eqn) -> Loop:
    p = eqn.params
    if "num_consts" in p:
        constants, carries = p["num_consts"], p["num_carry"]
    else:
        constants, carries, _ = (len(group) for group in p["ft_in"].unpack())
    return Loop(as_body(p["jaxpr"]), constants, carries, p["length"], p["reverse"], p["unroll"])


def _while(eqn: Eqn) -> While:
    p = eqn.params
    return While(as_body(p["cond_jaxpr"]), as_body(p["body_jaxpr"]), p["cond_nconsts"], p["body_nconsts"])


def _cond(eqn: Eqn) -> Branches:
    return Branches(tuple(as_body(branch) for branch in eqn.params["branches"]))


def on_platform(eqn: Eqn, platform: str) -> Iterable[Any]:
    """Return an equation's parameters; of what differs by platform, the program of one."""
    platforms = eqn.params.get("branches_platforms")
    if not platforms:
        return eqn.params.values()
    fits = [names is None or platform in names for names in platforms]
    return [eqn.params["branches"][fits.index(True)]]


def _remat(eqn: Eqn) -> Remat:
    return Remat(as_body(eqn.params["jaxpr"]), eqn.params["policy"], _any(eqn.params["prevent_cse"]))


def _any(flag: Any) -> bool:
    return flag if isinstance(flag, bool) else any(flag)


def _shard_map(eqn: Eqn) -> Manual:
    p = eqn.params
    axes = p.get("newly_manual_axes", p.get("manual_axes"))
    return Manual(as_body(p["jaxpr"]), p["mesh"], p["in_specs"], p["out_specs"], frozenset(axes), p["check_vma"])


def _hijax(eqn: Eqn) -> Subprogram:
    """See a high-level primitive (`jax_remat3`, `jax_custom_jvp3`, `jax_custom_vjp3`) as its first-order twin."""
    prim = eqn.params["_prim"]
    parts = {**getattr(prim, "params", {}), **vars(prim)}
    body = parts.get("jaxpr") or getattr(parts.get("traced"), "jaxpr", None)
    if body is None:
        return _expanded(eqn, prim)
    if "policy" in parts:
        return Remat(as_body(body), parts["policy"], _any(parts.get("prevent_cse", True)))
    if "bwd" in parts or any(key.startswith("jvp_") for key in parts):  # jvp_rule, jvp_fun: names vary
        return CustomRule(as_body(body), forward="bwd" not in parts)
    return _expanded(eqn, prim)


def _expanded(eqn: Eqn, prim: Any) -> Subprogram:
    avals = [v.aval for v in eqn.invars]
    try:
        closed = jax.make_jaxpr(lambda *flat: prim.expand(*jax.tree.unflatten(prim.in_tree, flat)))(*avals)
    except Exception:  # a primitive that cannot be expanded out of context: the audit looks at what its parameters hold
        return Opaque(tuple(as_body(p) for p in programs_in([prim])))
    return Inline(as_body(closed), None)


_RECORDS: dict[Any, Callable[[Eqn], Subprogram]] = {
    prims.jit_p: _jit,
    prims.scan_p: _scan,
    prims.while_p: _while,
    prims.cond_p: _cond,
    prims.remat_p: _remat,
    prims.custom_jvp_call_p: lambda eqn: CustomRule(as_body(eqn.params["call_jaxpr"]), forward=True),
    prims.custom_vjp_call_p: lambda eqn: CustomRule(as_body(eqn.params["call_jaxpr"]), forward=False),
    LATE: lambda eqn: Inline(eqn.params["program"], None),
    prims.closed_call_p: lambda eqn: Inline(as_body(eqn.params["call_jaxpr"]), None),
}


# --- walking -------------------------------------------------------------------------------------------------------


def programs_in(values: Any) -> Iterator[Any]:
    """Yield every program held by parameter values, however they are nested (tuples, dicts, traced stages)."""
    for value in values:
        if is_program(value):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from programs_in(value)
        elif isinstance(value, dict):
            yield from programs_in(value.values())
        elif hasattr(value, "in_avals_flat") or is_program(getattr(value, "jaxpr", None)):
            yield from programs_in(list(getattr(value, "__dict__", {}).values()) or [value.jaxpr])


def all_equations(body: Body) -> Iterator[Eqn]:
    """Yield every equation of a program and of every program in its parameters, reached or not."""
    for eqn in body.jaxpr.eqns:
        yield eqn
        if eqn.primitive not in ORDINARY:
            # A high-level primitive holds its program under several names.
            inner = {id(held.jaxpr): held for held in map(as_body, programs_in(eqn.params.values()))}
            for held in inner.values():
                yield from all_equations(held)


# --- running -------------------------------------------------------------------------------------------------------


def rebind(eqn: Eqn, *operands) -> list:
    """Issue an equation again, unchanged, with its custom rules, effects and shardings."""
    out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def issue(eqn: Eqn, operands: Sequence) -> list:
    """Issue an equation again, unchanged, under its name scopes, traceback and configuration."""
    outs = _copied(eqn, operands) if eqn.primitive in ORDINARY and not eqn.effects else None
    if outs is None:
        with Context(eqn):
            outs = rebind(eqn, *operands)
    return outs


def _copied(eqn: Eqn, operands: Sequence) -> list | None:
    """Return the outputs of an equation copied into the program being traced, a fifth of the work of binding it.

    None where no program is being traced (or one is transformed), or an operand is of another type than it was.
    """
    info = eqn.source_info
    around = source_info_util.current_name_stack()
    if around.stack:
        info = info.replace(name_stack=around + info.name_stack)
    tracers: list[Any] = []
    with jex.take_current_trace() as trace:
        for v, x in zip(eqn.invars, operands, strict=True):
            if isinstance(v, Literal):
                tracers.append(None)
            elif is_staged(x) and x._trace is trace and (x.aval is v.aval or x.aval == v.aval):
                tracers.append(x)
            else:
                return None
        if all(x is None for x in tracers):
            return None
        for n, v in enumerate(eqn.invars):
            if tracers[n] is None:
                tracers[n] = partial_eval.DynamicJaxprTracer(trace, v.aval, v, info)
        types = [v.aval for v in eqn.outvars]
        return trace.emit_eqn(tracers, types, eqn.primitive, eqn.params, eqn.effects, info, eqn.ctx)


class Context:
    """Runs what an equation stands for under its name scopes, traceback and configuration."""

    __slots__ = ("configuration", "source")

    def __init__(self, eqn: Eqn):
        info = eqn.source_info
        around = source_info_util.current_name_stack()
        stack = around + info.name_stack if around.stack else info.name_stack
        self.source = source_info_util.user_context(info.traceback, name_stack=stack)
        self.configuration = eqn.ctx.manager

    def __enter__(self):
        self.source.__enter__()
        self.configuration.__enter__()

    def __exit__(self, *error):
        self.configuration.__exit__(*error)
        return self.source.__exit__(*error)


def evaluate(body: Body, *args) -> list:
    """Run a program as it is."""
    return jax.core.eval_jaxpr(body.jaxpr, body.consts, *args)


def prune(body: Body) -> tuple[Body, list[bool]]:
    """Return a program without what its outputs do not depend on, and which arguments it still takes."""
    every = [True] * len(body.jaxpr.outvars)
    jaxpr, used = partial_eval.dce_jaxpr(body.jaxpr, every, instantiate=False)
    return Body(jaxpr, body.consts), list(used)[-len(body.jaxpr.invars) :] if body.jaxpr.invars else []


def is_staged(value: Any) -> bool:
    """Tell whether a value is an argument of a program that is being traced right now (`jit`, `scan`, `make_jaxpr`)."""
    return isinstance(value, partial_eval.DynamicJaxprTracer)


def define(primitive: Any, *, run: Callable, jvp: Callable, transpose: Callable, batched: Callable) -> None:
    """Give a primitive of one output, that of the program it has for a parameter, its rules."""
    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda *avals, program: program.jaxpr.outvars[0].aval)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))


# --- reading -------------------------------------------------------------------------------------------------------


def scopes(eqn: Eqn) -> tuple[tuple[str, ...], bool]:
    """Return the user's name scopes around an equation, and whether it belongs to a backward pass."""
    names: list[str] = []
    backward = False
    for entry in eqn.source_info.name_stack.stack:
        wrapped = type(entry).__name__ == "Transform"
        backward |= wrapped and entry.name == "transpose"
        if not wrapped:
            names += entry.name.split("/")
    return tuple(names), backward


def source_line(eqn: Eqn) -> str:
    """Return `file:line` of the user's code an equation comes from."""
    return source_info_util.summarize(eqn.source_info)


def is_zero(var: Any) -> bool:
    """Tell whether an operand is a zero written into the program."""
    return isinstance(var, Literal) and not np.any(var.val)


def is_float(aval: Any) -> bool:
    """Tell whether a value is a floating-point array."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
