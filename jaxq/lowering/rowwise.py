"""A product as tensor cores of a GPU take it: both operands stored along the sum, sizes filled up to those of a tile.

The int8 instructions read both operands along the summed axis. Where one is stored otherwise, XLA:GPU writes a copy of
it with a slow loop; an explicit transposition becomes a tiled kernel, ten times as fast.

They sum 32 terms at once, but XLA may cut the sum into tiles of 16, of which each product is then counted twice: seen
on an H100 with sizes that cuBLAS does not take, where nothing checks the tile. Zeros up to the next size that it takes
cost next to nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxq.programs.ops import Dot

# Products with fewer rows are bound by reading the other operand, once as it is.
MANY_ROWS = 64
ROWS, TERMS = 4, 32


def suits(op: Dot, a: Any, b: Any) -> bool:
    """Tell whether a product of matrices has other sizes, or many rows and an operand not stored along the sum."""
    if op.is_spread(a, b) or any(_is(n, 0) for n in (*a.shape, *b.shape)):
        return False
    rows = [_rows(op, side, x) for side, x in enumerate((a, b))]
    if any(_is(n, 1) for n in rows) and not op.batch[0]:
        return False  # no product of matrices
    across = any(_order(op, side, x) != (*range(len(x.shape)),) for side, x in enumerate((a, b)))
    return (across and _many(rows)) or is_cut(rows, math.prod(a.shape[axis] for axis in op.contract[0]))


def is_cut(rows: Sequence[Any], terms: Any) -> bool:
    """Tell whether sizes are no multiples of a tile's, or not known to be."""
    return not _is(_missing(terms, TERMS), 0) or not all(_is(_missing(n, ROWS), 0) for n in rows)


def product(op: Dot, a: jax.Array, b: jax.Array, then) -> jax.Array:
    """Return the sums of the operands as [*batch, rows, terms], filled up with zeros."""
    del then
    batch = len(op.batch[0])
    rows = [_rows(op, side, x) for side, x in enumerate((a, b))]
    left, right = (filled(_matrix(op, side, x, _many(rows)), (ROWS, TERMS)) for side, x in enumerate((a, b)))
    both = tuple(range(batch))
    numbers = (((batch + 1,), (batch + 1,)), (both, both))
    sums = lax.dot_general(left, right, numbers, preferred_element_type=np.int32)
    head = [a.shape[axis] for axis in op.batch[0]]
    sums = lax.slice(sums, (0,) * sums.ndim, (*head, *rows))
    free = [x.shape[axis] for side, x in enumerate((a, b)) for axis in op.free(side, x.ndim)]
    return lax.reshape(sums, (*head, *free))


def _matrix(op: Dot, side: int, x: jax.Array, many: bool) -> jax.Array:
    """Return an operand as [*batch, rows, terms]; a barrier keeps XLA from taking its copy back."""
    order, batch = _order(op, side, x), len(op.batch[side])
    if order != (*range(x.ndim),):
        x = lax.transpose(x, order)
        x = lax.optimization_barrier(x) if many else x
    middle = x.ndim - len(op.contract[side])
    rows, terms = math.prod(x.shape[batch:middle]), math.prod(x.shape[middle:])
    return lax.reshape(x, (*x.shape[:batch], rows, terms))


def filled(x: jax.Array, steps: tuple[int, int]) -> jax.Array:
    """Return an array with zeros up to multiples of `steps` along its last two axes."""
    missing = [_missing(n, step) for n, step in zip(x.shape[-2:], steps, strict=True)]
    if all(_is(n, 0) for n in missing):
        return x
    return lax.pad(x, np.int8(0), [(0, 0, 0)] * (x.ndim - 2) + [(0, n, 0) for n in missing])


def _rows(op: Dot, side: int, x: Any) -> Any:
    return math.prod(x.shape[axis] for axis in op.free(side, len(x.shape)))


def _order(op: Dot, side: int, x: Any) -> tuple[int, ...]:
    return (*op.batch[side], *op.free(side, len(x.shape)), *op.contract[side])


# --- sizes, which are symbols in some exported programs: those are taken for large, and for odd --------------------


def _missing(n: Any, step: int) -> Any:
    """Return how many are missing to the next multiple."""
    return -n % step


def _many(rows: Sequence[Any]) -> bool:
    return not any(isinstance(n, int) and n < MANY_ROWS for n in rows)


def _is(n: Any, value: int) -> bool:
    return isinstance(n, int) and n == value
