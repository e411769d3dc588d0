"""Float inputs that no site takes as they are.

Those that are scaled, shifted and moved, as images are before the first layer, enter at the site that takes the result
and has a range of it, from which that of the input follows. Others, such as the state of a recurrent cell, enter in the
range of the arrays that the program was built with, and far beyond. All enter in 24 bits, as many as a float has, and
what is done to them is done in integers.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic
from jaxq.integer.scales import finite, narrowed
from jaxq.integer.values import Affine, Coded, Constant, Entry, Refusal, Value, ones
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn

# Name scopes of the only operations of a program that are float: an audit finds floats nowhere else.
ENTRY, EXIT = "jaxq_entry", "jaxq_exit"
# Bits of codes that an input enters in before a site rounds what became of it; how far beyond the arrays that the
# program was built with it may reach.
BITS, BEYOND = 24, 16.0


def followed(eqn: Eqn, operands: Sequence[Value]) -> Entry:
    """Return what an equation makes of an input; refuse what is no scale, shift or move."""
    found = (
        _moved(eqn, operands[0]) if len(operands) == 1 else _combined(eqn, *operands) if len(operands) == 2 else None
    )
    if found is None:
        raise Refusal(
            "takes a float input that no site of the plan takes as it is, or scaled, shifted and moved, so that no "
            "range is known for it: build the program with arrays that show one (not with shapes or zeros), do this "
            "before the call, or give the program integers, such as pixels in uint8"
        )
    return found


def _combined(eqn: Eqn, a: Value, b: Value) -> Entry | None:
    """Return what a constant makes of an input; None for anything else."""
    if isinstance(a, Entry) and isinstance(b, Constant):
        return _scaled(eqn, a, finite(b))
    if not (isinstance(a, Constant) and isinstance(b, Entry)) or eqn.primitive is lax.div_p:
        return None
    if eqn.primitive is lax.sub_p:  # c - x = -x + c
        return _changed(b, -1.0, finite(a))
    return _scaled(eqn, b, finite(a))


def _scaled(eqn: Eqn, x: Entry, c: np.ndarray) -> Entry | None:
    """Return `x + c`, `x - c`, `x c` or `x / c`."""
    if eqn.primitive is lax.add_p:
        return _changed(x, 1.0, c)
    if eqn.primitive is lax.sub_p:
        return _changed(x, 1.0, -c)
    if eqn.primitive is lax.mul_p:
        return _changed(x, c, 0.0)
    return _changed(x, 1 / c, 0.0) if eqn.primitive is lax.div_p and np.all(c) else None


def _changed(x: Entry, factor: np.ndarray | float, offset: np.ndarray | float) -> Entry:
    return dataclasses.replace(x, factor=x.factor * factor, offset=x.offset * factor + offset)


def _moved(eqn: Eqn, x: Value) -> Entry | None:
    """Return an input moved, where what was done to it is the same everywhere."""
    assert isinstance(x, Entry), "an input is the only operand"
    if eqn.primitive is lax.neg_p:
        return _changed(x, -1.0, 0.0)
    alike = np.size(x.factor) == np.size(x.offset) == 1
    if eqn.primitive not in jaxpr.MOVES or not alike or not jaxpr.is_float(eqn.outvars[0].aval):
        return None
    with jax.named_scope(ENTRY):
        array = jaxpr.rebind(eqn, x.array)[0]
    return Entry(array, x.factor.reshape(()), x.offset.reshape(()))


def placed(x: Entry, grid: Affine) -> Coded:
    """Return int8 codes of an input on the grid of who takes it: saturated; NaN is taken for zero."""
    ends = (grid.scale * (end - grid.zero_point) for end in (grid.low, grid.high))
    factor, offset = (np.asarray(part, np.float64) for part in np.broadcast_arrays(x.factor, x.offset))
    if not factor.all():
        raise Refusal("takes an input times zero: leave it out")
    v, rank = _entered(x.array, max(float(np.max(np.abs((end - offset) / factor))) for end in ends)), x.array.ndim
    v = arithmetic.scaled(v, _ranked(factor, rank))
    return narrowed(arithmetic.add(None, v, Constant(_ranked(offset, rank))) if offset.any() else v, grid)


def entry(array: jax.Array, reach: float) -> Entry:
    """Return a float input. reach: the largest number of the one that the program was built with, zero if unknown."""
    return Entry(array, coded=_entered(array, BEYOND * reach) if reach else None)


def _entered(array: jax.Array, reach: float) -> Coded:
    """Return codes of a float array between `-reach` and `reach`: saturated; NaN is taken for zero."""
    scale, bound = reach / 2**BITS, ones(2**BITS, array.ndim, np.int64)
    with jax.named_scope(ENTRY):
        real = lax.convert_element_type(undifferentiated(array), jnp.float32)
        steps = lax.clamp(np.float32(-(2**BITS)), real / np.float32(scale), np.float32(2**BITS))
        codes = lax.convert_element_type(lax.round(jnp.where(steps == steps, steps, 0.0)), jnp.int32)
    return Coded(codes, ones(scale, array.ndim), -bound, bound)


def _ranked(c: np.ndarray, rank: int) -> np.ndarray:
    return c.reshape((1,) * (rank - c.ndim) + c.shape)


@jax.custom_jvp
def undifferentiated(x: jax.Array) -> jax.Array:
    """Return x, which nothing is to be differentiated by."""
    return x


@undifferentiated.defjvp
def _refuse(primals, tangents):
    raise TypeError("an integer program has no derivative, and a gradient of zero would be wrong: train with jaxq.qat")
