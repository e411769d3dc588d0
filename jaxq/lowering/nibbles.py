"""Products with 4-bit codes as they are stored, two to a byte: a product with the low halves, and one with the high.

Bytes are planar (`numbers.packing`): the low halves of all bytes are the first half of the packed axis, the high ones
the second. Shifted up, or masked, a byte is sixteen times one of its codes; sixteen times the sum is exact in int32.
For few rows, where reading the weight is all the work, this is faster than writing it out unpacked and reading that.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers.qarray import QArray
from jaxq.programs.ops import Dot

FEW_ROWS = 16
BITS = 4


def packed_side(op: Dot, operands: Sequence[QArray]) -> int | None:
    """Return which operand is packed so that its halves can be multiplied, by few rows; None if none is."""
    return next((side for side in (0, 1) if _suits(op, side, operands[side], operands[1 - side])), None)


def _suits(op: Dot, side: int, q: QArray, other: QArray) -> bool:
    if q.packing is None or q.format.bits != BITS or q.format.storage != jnp.int8 or op.out_sharding is not None:
        return False
    rows = [other.shape[axis] for axis in op.free(1 - side, other.ndim)]
    known = all(isinstance(n, int) for n in other.shape)
    if not known or math.prod(rows) > FEW_ROWS or q.packing.axis % q.ndim in op.batch[side]:
        return False
    return op.terms((other.shape, q.shape) if side else (q.shape, other.shape)) < 2**31 // 2**14


def sums(op: Dot, side: int, q: QArray, other: jax.Array, then: Callable) -> jax.Array:
    """Return the int32 sums of `other` with the codes of `q`, the operand on `side`; then: multiplies int8."""

    def product(x: jax.Array, codes: jax.Array) -> jax.Array:
        return then(op, codes, x) if side == 0 else then(op, x, codes)

    def unpacked(stored: jax.Array, x: jax.Array) -> jax.Array:
        return product(x, dataclasses.replace(q, stored=stored).codes)

    def halves(stored: jax.Array, x: jax.Array) -> jax.Array:
        return _in_halves(op, side, dataclasses.replace(q, stored=stored), x, product)

    # XLA:GPU unpacks within the product; two products of one array it would write out, multiplied, before it sums.
    return lax.platform_dependent(q.stored, other, cuda=unpacked, default=halves)


def _in_halves(op: Dot, side: int, q: QArray, other: jax.Array, product: Callable) -> jax.Array:
    axis = q.packing.axis % q.ndim
    stored = lax.bitcast_convert_type(q.stored, jnp.int8)
    low = lax.shift_left(stored, lax.full_like(stored, BITS))
    high = lax.bitwise_and(stored, lax.full_like(stored, -(2**BITS)))
    if axis in op.contract[side]:
        first, second = _halves(other, op.contract[1 - side][op.contract[side].index(axis)], stored.shape[axis])
        sixteenfold = lax.add(product(first, low), product(second, high))
    else:
        position = len(op.batch[0]) + op.free(side, q.ndim).index(axis)
        position += len(op.free(0, other.ndim)) if side else 0
        both = lax.concatenate([product(other, low), product(other, high)], position)
        sixteenfold = lax.slice_in_dim(both, 0, q.packing.length, axis=position)
    return lax.shift_right_arithmetic(sixteenfold, lax.full_like(sixteenfold, BITS))


def _halves(x: jax.Array, axis: int, middle: int) -> tuple[jax.Array, jax.Array]:
    """Return the part of an array below `middle`, and the rest filled up with zeros to the same size."""
    rest = lax.slice_in_dim(x, middle, x.shape[axis], axis=axis)
    filling = [(0, middle - rest.shape[axis] if n == axis else 0, 0) for n in range(x.ndim)]
    return lax.slice_in_dim(x, 0, middle, axis=axis), lax.pad(rest, np.int8(0), filling)
