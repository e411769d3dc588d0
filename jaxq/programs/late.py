"""Linear functions that fetch what they multiply late: in a backward pass, once the gradient is there and not before.

    y = f(step; residuals)      d step = f^T(g; residuals), decoded when g is there

A backward pass keeps residuals small (as codes) and decodes them where they are multiplied. Decoding depends on nothing
but them, so a compiler may do it for all layers as soon as it likes, and hold everything in float after all. Here it
waits behind a barrier that the gradient passes too. `jax.checkpoint` would do as much, with more equations in the
program that is differentiated, and not by the newer primitive, which cannot be transposed.

This makes a primitive of JAX, `late`; the rest of a program knows it as a call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jaxq.numbers.blocks import varying_axes
from jaxq.programs.jaxpr import LATE, Zero, define, evaluate, filled, trace
from jaxq.programs.records import Body


def late(fn: Callable, step: jax.Array, *residuals: Any) -> jax.Array:
    """Return `fn(step, *residuals)`, one array, linear in `step`; its transpose keeps the residuals and nothing else.

    Like any function it differentiates, by the residuals too, and batches.

    >>> import jax, jax.numpy as jnp
    >>> def scaled(step, codes):
    ...     return step * (0.5 * codes)
    >>> y, pull = jax.vjp(lambda step: late(scaled, step, jnp.array([2, 6], jnp.int8)), jnp.ones(2))
    >>> y.tolist(), pull(jnp.ones(2))[0].tolist()
    ([1.0, 3.0], [1.0, 3.0])
    """
    flat, tree = jax.tree.flatten(residuals)
    return _bind(lambda step, *flat: fn(step, *jax.tree.unflatten(tree, flat)), step, flat)


def _bind(fn: Callable, step: Any, flat: Sequence) -> jax.Array:
    """Issue the primitive for a function of flat arguments; constants of its program become residuals."""
    program = trace(fn, step, *flat)[0]
    held = program.consts
    if held:

        def closed(step: Any, *flat: Any) -> jax.Array:
            return evaluate(Body(program.jaxpr, flat[: len(held)]), step, *flat[len(held) :])[0]

        return _bind(closed, step, [*held, *flat])
    return LATE.bind(step, *flat, program=program)


def _run(step: Any, *flat: Any, program: Any) -> jax.Array:
    return evaluate(program, step, *flat)[0]


def _jvp(primals: Sequence, tangents: Sequence, *, program: Any) -> tuple[jax.Array, Any]:
    """Differentiate: the function itself on a change of the step; its program where residuals change as well."""
    out = LATE.bind(*primals, program=program)
    if all(type(t) is Zero for t in tangents[1:]):
        return out, LATE.bind(tangents[0], *primals[1:], program=program)
    made = [filled(t) for t in tangents]
    return out, jax.jvp(lambda *args: _run(*args, program=program), tuple(primals), tuple(made))[1]


def _transpose(g: Any, step: Any, *flat: Any, program: Any) -> list:
    """Pull a gradient back, through a barrier that holds back what the residuals are decoded to."""
    if type(g) is Zero:
        return [Zero(step.aval)] + [None] * len(flat)
    *rest, g = _barred([*flat, g])
    start = filled(Zero(step.aval))  # linear, so anywhere; with the type that a step has
    _, pull = jax.vjp(lambda step: _run(step, *rest, program=program), start)
    return [pull(g)[0]] + [None] * len(rest)


def _barred(arrays: list) -> list:
    """Put one barrier around arrays; those that vary over other devices than the last stay outside, as they are."""
    kinds = [varying_axes(x) for x in arrays]
    same = [n for n, kind in enumerate(kinds) if kind == kinds[-1]]
    for n, x in zip(same, lax.optimization_barrier([arrays[n] for n in same]), strict=True):
        arrays[n] = x
    return arrays


def _batched(args: Sequence, axes: Sequence, *, program: Any) -> tuple[jax.Array, int]:
    mapped = jax.vmap(lambda *args: _run(*args, program=program), in_axes=tuple(axes))
    return _bind(mapped, args[0], args[1:]), 0


define(LATE, run=_run, jvp=_jvp, transpose=_transpose, batched=_batched)
