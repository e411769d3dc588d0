"""A product with one row as a product with two: the fast form of decoding on a CPU.

XLA:CPU takes a matrix times a vector of integers for a loop without vectors; a second row of zeros brings its matrix
kernel, which reads the matrix once all the same.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.programs.ops import Dot

# Shorter sums are not worth a padded row.
MANY_TERMS = 64


def suits(op: Dot, a: Any, b: Any) -> bool:
    """Tell whether an operand is one long vector."""
    return op.out_sharding is None and any(_is_one_row(op, side, x) for side, x in enumerate((a, b)))


def _is_one_row(op: Dot, side: int, x: Any) -> bool:
    sizes = [x.shape[axis] for axis in op.free(side, len(x.shape))]
    terms = [x.shape[axis] for axis in op.contract[side]]
    known = all(isinstance(n, int) for n in x.shape) and 0 not in x.shape
    return known and math.prod(sizes) == 1 and math.prod(terms) >= MANY_TERMS


def product(op: Dot, a: jax.Array, b: jax.Array, then) -> jax.Array:
    """Return the sums with a row of zeros added to one operand, and taken away again."""
    del then
    side = 0 if _is_one_row(op, 0, a) else 1
    x = (a, b)[side]
    two = lax.pad(lax.expand_dims(x, (0,)), np.int8(0), [(0, 1, 0), *((0, 0, 0) for _ in x.shape)])
    contract, batch = (_moved(axes, side) for axes in (op.contract, op.batch))
    a, b = (two, b) if side == 0 else (a, two)
    out = lax.dot_general(a, b, (contract, batch), preferred_element_type=jnp.int32)
    position = len(op.batch[0]) + (len(op.free(0, a.ndim)) if side else 0)
    return lax.index_in_dim(out, 0, position, keepdims=False)


def _moved(axes: tuple, side: int) -> tuple:
    """Return axes of both operands after one of them got a new leading axis."""
    moved = tuple(axis + 1 for axis in axes[side])
    return (moved, axes[1]) if side == 0 else (axes[0], moved)
