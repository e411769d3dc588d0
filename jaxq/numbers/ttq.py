"""Trained ternary quantization: `-n`, 0 and `p`, two learned numbers (TTQ; Zhu et al. 2017).

    x^ = p where x > t max|x|,  -n where x < -t max|x|,  else 0                     (eq. 6)
    dp = sum of g over the first, dn = minus its sum over the second                (eq. 7)
    dx = p g, n g and g                                                             (eq. 8)

The parameters are `p` and `n`, used by their absolute values and never as zero, one pair for each block.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import affine, blocks, codecs, means
from jaxq.numbers.formats import Codebook
from jaxq.numbers.parameters import Learned, change_of_size
from jaxq.numbers.qarray import QArray

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer

Grid = tuple[int, ...]
Pair = tuple[jax.Array, jax.Array]
NEGATIVE, POSITIVE = 0, 2  # codes; 1 is zero


def start(quantizer: Quantizer, x: jax.Array, grid: Grid, importance: jax.Array | None = None) -> Pair:
    """Return the means of what is beyond the thresholds on either side, [*grid]; of all values where nothing is."""
    del importance
    sides = _codes(quantizer, x, grid)
    rows, every = blocks.to_rows(x, grid), means.mean_abs(blocks.to_rows(x, grid))

    def mean(code: int) -> jax.Array:
        beyond = means.mean_abs(rows, blocks.to_rows(lax.eq(sides, np.uint8(code)), grid))
        return lax.reshape(lax.select(lax.eq(beyond, np.float32(0)), every, beyond), grid)

    return mean(POSITIVE), mean(NEGATIVE)


def encode(quantizer: Quantizer, x: jax.Array, grid: Grid, value: Pair) -> QArray:
    """Return codes of a table of three, NaN where a block is not finite."""
    assert isinstance(quantizer.format, Codebook)
    pair = (lax.mul(affine.positive(part), codecs.constant(x, grid, 1.0)) for part in value)
    return QArray(_codes(quantizer, x, grid), None, None, quantizer.format, x.dtype, table=_table(*pair))


def passed(quantizer: Quantizer, x: jax.Array, q: QArray, dx: jax.Array) -> jax.Array:
    """Return the gradient times the number that a value stands for, times one where that is zero."""
    del quantizer
    size = jnp.abs(q.table).at[..., 1].set(1)
    factor = dataclasses.replace(q, table=size).values()
    return lax.mul(dx, lax.convert_element_type(factor, dx.dtype))


def follow(quantizer: Quantizer, x: jax.Array, q: QArray, value: Pair, change: Pair) -> jax.Array:
    """Return how the decoded array moves with the two numbers."""
    del quantizer
    moved = dataclasses.replace(q, table=_table(*map(change_of_size, value, change)))
    return lax.convert_element_type(moved.values(), x.dtype)


def _table(up: jax.Array, down: jax.Array) -> jax.Array:
    """Return what the three codes stand for: [*grid, 3]."""
    return jnp.stack([lax.neg(down), lax.full_like(up, 0), up], axis=-1)


def _codes(quantizer: Quantizer, x: jax.Array, grid: Grid) -> jax.Array:
    """Return on which side of the thresholds every value is: uint8, of x's shape."""
    wide = lax.convert_element_type(x, jnp.float32)
    assert isinstance(quantizer.calibrator, Learned) and quantizer.calibrator.threshold is not None
    width = affine.width_of(affine.range_of(x, grid))
    limit = blocks.broadcast(lax.mul(width, np.float32(quantizer.calibrator.threshold)), x.shape)
    above, below = lax.gt(wide, limit), lax.lt(wide, lax.neg(limit))
    return lax.select(
        above,
        lax.full_like(x, POSITIVE, jnp.uint8),
        lax.select(below, *(lax.full_like(x, c, jnp.uint8) for c in (0, 1))),
    )
