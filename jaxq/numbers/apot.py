"""Additive powers of two: levels that are sums of few powers of two, with a learned range (APoT; Li et al. 2020).

    x^ = a level(x / a)      da: level(x / a) - x / a where |x| <= a, else the end of the range         (eq. 5)

Multiplying by such a level is a few shifts and a sum. `a`, the range, is the parameter, used by its absolute value, one
for each block; where levels reach to one side only, what is on the other side is clipped to zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import affine, blocks, codecs, microscaling
from jaxq.numbers.formats import Levels
from jaxq.numbers.parameters import change_of_size
from jaxq.numbers.qarray import QArray

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer

Grid = tuple[int, ...]
TRIED = np.linspace(0.1, 1.0, 46, dtype=np.float32)  # parts of the largest value, to start from


def levels(bits: int, *, signed: bool) -> Levels:
    """Return the levels of `bits` bits: a sum of terms of two bits, and one of one bit where the number is odd.

    A term is zero or one of three powers of two, dealt out in turns from 1/2 down; a signed level is such a sum of one
    bit less, or its negative. Raises `ValueError` for other than 2 to 7 bits, 2 to 6 unsigned ones.

    >>> [round(8 * v, 2) for v in levels(4, signed=True).values][7:]
    [0.0, 0.8, 1.6, 2.4, 3.2, 4.8, 6.4, 8.0]
    """
    most = 7 if signed else 6
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= most:
        raise ValueError(f"{'' if signed else 'un'}signed additive powers of two have 2 to {most} bits, got {bits!r}")
    count = bits - signed
    terms: list[list[float]] = [[0.0] for _ in range(count // 2)]
    single = [[0.0]] if count % 2 else []
    power = 1.0
    for term in (*terms, *terms, *single, *terms):
        power /= 2
        term.append(power)
    sums = np.zeros(1)
    for term in (*terms, *single):
        sums = (sums[:, None] + np.asarray(term)).reshape(-1)
    sums = np.unique(sums) / sums.max()
    values = np.concatenate([-sums[:0:-1], sums]) if signed else sums
    return Levels(tuple(values.tolist()), f"{'' if signed else 'u'}apot{bits}")


def start(quantizer: Quantizer, x: jax.Array, grid: Grid, importance: jax.Array | None = None) -> jax.Array:
    """Return the range of least squared error among parts of the largest value, [*grid]; one for zeros."""
    del importance
    width = affine.width_of(affine.range_of(x, grid))
    rows = blocks.to_rows(lax.convert_element_type(x, jnp.float32), grid)
    whole = lax.reshape(lax.select(lax.eq(width, np.float32(0)), lax.full_like(width, 1), width), (rows.shape[0], 1))
    values = _form(quantizer).values

    def error(part: jax.Array) -> jax.Array:
        scaled = rows / (part * whole)
        near = microscaling.level_values(microscaling.nearest_level(scaled, values), values)
        return jnp.sum(jnp.square((near - scaled) * part), axis=1)

    best = jnp.argmin(lax.map(error, jnp.asarray(TRIED)), axis=0)
    return lax.reshape(jnp.asarray(TRIED)[best][:, None] * whole, grid)


def encode(quantizer: Quantizer, x: jax.Array, grid: Grid, value: jax.Array) -> QArray:
    """Return the nearest levels by a learned range; the scale is NaN where a block is not finite."""
    scale = affine.positive(value)
    codes = microscaling.nearest_level(_units(x, scale), _form(quantizer).values)
    return QArray(codes, lax.mul(scale, codecs.constant(x, grid, 1.0)), None, quantizer.format, x.dtype)


def passed(quantizer: Quantizer, x: jax.Array, q: QArray, dx: jax.Array) -> jax.Array:
    """Return the gradient, of levels of one side only where nothing is clipped (else the authors' code has none)."""
    if _form(quantizer).values[0] < 0:
        return dx
    return lax.select(_inside(quantizer, _units(x, q.scale)), dx, lax.full_like(dx, 0))


def follow(quantizer: Quantizer, x: jax.Array, q: QArray, value: jax.Array, change: jax.Array) -> jax.Array:
    """Return how the decoded array moves with the range."""
    units = _units(x, q.scale)
    kept = lax.select(_inside(quantizer, units), units, lax.full_like(units, 0))
    moved = lax.mul(lax.sub(q.values(), kept), blocks.broadcast(change_of_size(value, change), x.shape))
    return lax.convert_element_type(moved, x.dtype)


def _form(quantizer: Quantizer) -> Levels:
    assert isinstance(quantizer.format, Levels), "only levels have a range without steps"
    return quantizer.format


def _inside(quantizer: Quantizer, units: jax.Array) -> jax.Array:
    low, high = (np.float32(end) for end in (_form(quantizer).values[0], _form(quantizer).values[-1]))
    return lax.bitwise_and(lax.ge(units, low), lax.le(units, high))


def _units(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return values in units of their range."""
    return lax.div(lax.convert_element_type(x, jnp.float32), blocks.broadcast(scale, x.shape))
