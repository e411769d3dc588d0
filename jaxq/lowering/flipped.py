"""A product written the other way round: the fast form on a CPU where the left operand is summed over its first axis.

XLA:CPU takes the left operand's rows from memory and the right operand's columns; an activation on the left and a
weight [k, n] on the right is what its kernel is made for. `a^T b = (b^T a)^T`.
"""

import dataclasses
from typing import Any

import jax
from jax import lax

from jaxq.programs.ops import Dot


def suits(op: Dot, a: Any, b: Any) -> bool:
    """Tell whether the left operand is a matrix [k, n] and the right one is not: [..., k]."""
    if op.out_sharding is not None or op.batch != ((), ()) or len(op.contract[0]) != 1:
        return False
    (left,), (right,) = op.contract
    return len(a.shape) == 2 and len(b.shape) >= 2 and left == 0 and right == len(b.shape) - 1


def product(op: Dot, a: jax.Array, b: jax.Array, then) -> jax.Array:
    """Return the sums of the operands swapped, with the axes of the result back in place."""
    swapped = dataclasses.replace(op, contract=op.contract[::-1])
    sums = then(swapped, b, a)
    return lax.transpose(sums, (sums.ndim - 1, *range(sums.ndim - 1)))
