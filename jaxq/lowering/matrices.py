"""A float product as one of matrices: the fast form on a CPU of what differentiates a product of more axes.

XLA:CPU multiplies matrices as they lie, transposed or not. Operands with several free or summed axes it first brings
into one order, and a weight's gradient, which sums over all axes of a batch, waits longer for the copy of the
activations than for the product. Reshaped before they are multiplied, matrices need no copy. On other platforms the
axes stay, as they may be spread over devices.
"""

import math

import jax
from jax import lax

from jaxq.programs.ops import Dot


def product(op: Dot, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product of float arrays; where it is traced for a CPU, of matrices if they are that in memory."""
    layouts = [_layout(op, side, x.ndim) for side, x in enumerate((a, b))]
    several = max(len(op.contract[0]), *(len(op.free(side, x.ndim)) for side, x in enumerate((a, b)))) > 1
    if not several or None in layouts or op.is_spread(a, b) or jax.default_backend() != "cpu":
        return op.apply(a, b)
    batch = (*range(len(op.batch[0])),)
    left, right = (_matrix(op, side, x, layout) for side, (x, layout) in enumerate(zip((a, b), layouts, strict=True)))
    numbers = (((len(batch) + layouts[0],), (len(batch) + layouts[1],)), (batch, batch))
    out = lax.dot_general(left, right, numbers, op.precision, op.out_dtype)
    free = [x.shape[axis] for side, x in enumerate((a, b)) for axis in op.free(side, x.ndim)]
    return lax.reshape(out, (*out.shape[: len(batch)], *free))


def _layout(op: Dot, side: int, ndim: int) -> int | None:
    """Return where the summed axes are: before the free ones (0) or after (1); None if they are in no such order."""
    orders = [
        (*op.batch[side], *op.contract[side], *op.free(side, ndim)),
        (*op.batch[side], *op.free(side, ndim), *op.contract[side]),
    ]
    return next((n for n, order in enumerate(orders) if order == (*range(ndim),)), None)


def _matrix(op: Dot, side: int, x: jax.Array, layout: int) -> jax.Array:
    free, terms = (math.prod(x.shape[a] for a in axes) for axes in (op.free(side, x.ndim), op.contract[side]))
    head = x.shape[: len(op.batch[side])]
    return lax.reshape(x, (*head, free, terms) if layout else (*head, terms, free))
