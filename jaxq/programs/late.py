"""Linear functions that fetch what they multiply late: in a backward pass, once the gradient is there and not before.

    y = f(step; residuals)      d step = f^T(g; residuals), decoded when g is known

A backward pass keeps residuals small (as codes) and decodes them where they are multiplied. Decoding depends on nothing
but them, so a compiler may do it for all layers as soon as it likes, and hold everything in float after all: XLA's does
on a CPU, where barriers are gone before the order is found. `f` is therefore given a zero to add to what it decodes by,
and in the transposed program that zero is computed from the gradient, by arithmetic that no compiler sees through.

This makes two primitives of JAX, `late` and `zero_after`; the rest of a program knows them as calls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jaxq.programs.jaxpr import LATE, evaluate, trace

ZERO = np.float32(0)


def late(fn: Callable, step: jax.Array, *residuals: Any) -> jax.Array:
    """Return `fn(step, zero, *residuals)`, which is linear in `step`; zero: float32, for what is to come late.

    Like any function it differentiates and batches; what is kept for its transpose are the residuals.

    >>> import jax, jax.numpy as jnp
    >>> def scaled(step, zero, codes):
    ...     return step * (2 * (codes + zero))
    >>> y, pull = jax.vjp(lambda step: late(scaled, step, jnp.array([1, 3], jnp.int8)), jnp.ones(2))
    >>> y.tolist(), pull(jnp.ones(2))[0].tolist()
    ([2.0, 6.0], [2.0, 6.0])
    """
    flat, tree = jax.tree.flatten(residuals)

    def call(step: jax.Array, zero: jax.Array, *flat: Any) -> jax.Array:
        return fn(step, zero, *jax.tree.unflatten(tree, flat))

    return _bind(call, step, flat)


def _bind(call: Callable, step: Any, flat: Sequence) -> jax.Array:
    """Issue the primitive for a function of flat arguments."""
    program, _ = trace(call, step, ZERO, *flat)
    return LATE.bind(step, *flat, program=program)


def _run(step: Any, *flat: Any, program: Any, zero: Any = ZERO) -> jax.Array:
    return evaluate(program, step, zero, *flat)[0]


def _jvp(primals: Sequence, tangents: Sequence, *, program: Any) -> tuple[jax.Array, Any]:
    """Differentiate: the function itself on a change of the step; its program where residuals change as well."""
    out = LATE.bind(*primals, program=program)
    if all(type(t) is ad.Zero for t in tangents[1:]):
        return out, LATE.bind(tangents[0], *primals[1:], program=program)
    made = [ad.instantiate_zeros(t) for t in tangents]
    return out, jax.jvp(lambda *args: _run(*args, program=program), tuple(primals), tuple(made))[1]


def _transpose(g: Any, step: Any, *flat: Any, program: Any) -> list:
    """Pull a gradient back; the barrier and the zero hold back what the program decodes until it is there."""
    if type(g) is ad.Zero:
        return [ad.Zero(step.aval)] + [None] * len(flat)
    *flat, g = lax.optimization_barrier((*flat, g))
    zero = ZERO_AFTER.bind(g)
    start = ad.instantiate_zeros(ad.Zero(step.aval))  # linear, so anywhere; with the type that a step has
    _, pull = jax.vjp(lambda step: _run(step, *flat, program=program, zero=zero), start)
    return [pull(g)[0]] + [None] * len(flat)


def _batched(args: Sequence, axes: Sequence, *, program: Any) -> tuple[jax.Array, int]:
    def call(step: Any, zero: Any, *flat: Any) -> jax.Array:
        mapped = jax.vmap(lambda *args: _run(*args, program=program, zero=zero), in_axes=tuple(axes))
        return mapped(step, *flat)

    return _bind(call, args[0], args[1:]), 0


def _zero_of_bits(g: jax.Array) -> jax.Array:
    """Return zero: the product of two neighbours is even, of which compilers know nothing."""
    if not g.size or any(axis is not None for axis in jax.typeof(g).sharding.spec):
        return jnp.float32(0)
    first = lax.reshape(lax.slice(g, (0,) * g.ndim, (1,) * g.ndim), ())
    bits = lax.bitcast_convert_type(lax.convert_element_type(first, jnp.float32), jnp.int32)
    odd = lax.bitwise_and(lax.mul(bits, lax.add(bits, np.int32(1))), np.int32(1))
    return lax.convert_element_type(odd, jnp.float32)


def _constant(primals: Sequence, tangents: Sequence) -> tuple[jax.Array, Any]:
    del tangents
    zero = ZERO_AFTER.bind(*primals)
    return zero, ad.Zero(jax.typeof(zero))


ZERO_AFTER = core.Primitive("zero_after")
ZERO_AFTER.def_impl(_zero_of_bits)
ZERO_AFTER.def_abstract_eval(lambda g: trace(lambda: jnp.float32(0))[0].jaxpr.outvars[0].aval)
batching.primitive_batchers[ZERO_AFTER] = lambda args, axes: (ZERO_AFTER.bind(*args), None)
ad.primitive_jvps[ZERO_AFTER] = _constant
# Elsewhere the barrier is enough, and slicing a gradient that is spread over devices would have them wait.
mlir.register_lowering(ZERO_AFTER, mlir.lower_fun(lambda g: jnp.float32(0), multiple_results=False))
mlir.register_lowering(ZERO_AFTER, mlir.lower_fun(_zero_of_bits, multiple_results=False), platform="cpu")

LATE.def_impl(_run)
LATE.def_abstract_eval(lambda *avals, program: program.jaxpr.outvars[0].aval)
ad.primitive_jvps[LATE] = _jvp
ad.primitive_transposes[LATE] = _transpose
batching.primitive_batchers[LATE] = _batched
mlir.register_lowering(LATE, mlir.lower_fun(_run, multiple_results=False))
