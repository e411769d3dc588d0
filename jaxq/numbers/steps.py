"""Learned steps of integers: LSQ; LSQ+ with a zero point; TQT where steps are powers of two.

    q = clip(round(x / s) + z)      x^ = s (q - z)
    ds: round(x / s) - x / s where x / s is in range, else the end of the range             (Esser et al. 2020, eq. 3)

The parameter is a step, used by its absolute value and never as zero (`affine.positive`), so that steps stay positive
wherever training takes them; and with a zero point the lowest value too, which moves all that is clipped below (Bhalgat
et al. 2020, eq. 5 and 6). Gradients are scaled by `1 / sqrt(n Q)`, n values sharing a step and Q being the largest code
(LSQ, section 2.2). Rounding up to a power of two is passed straight through, in the logarithm (TQT, Jain et al. 2020,
eq. 6). By PACT's rule only what is clipped counts, unscaled: the derivative of the clipping, without that of the
rounding (Choi et al. 2018, eq. 3).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import affine, blocks, codecs
from jaxq.numbers.affine import Affine
from jaxq.numbers.fits import MSE
from jaxq.numbers.parameters import PACT, Learned, change_of_size
from jaxq.numbers.qarray import QArray

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer

Grid = tuple[int, ...]


def start(quantizer: Quantizer, x: jax.Array, grid: Grid, importance: jax.Array | None = None) -> Any:
    """Return the steps of least squared error, [*grid], and with a zero point the lowest values too: a pair."""
    del importance
    best = affine.affine_for(dataclasses.replace(quantizer, calibrator=None, fit=MSE()), x, grid)
    if best.zero_point is None:
        return best.scale
    low = np.float32(quantizer.bounds()[0])
    return best.scale, lax.mul(best.scale, lax.sub(low, lax.convert_element_type(best.zero_point, jnp.float32)))


def encode(quantizer: Quantizer, x: jax.Array, grid: Grid, value: Any) -> QArray:
    """Return the codes of `x` by learned steps; the scale is NaN where a block is not finite."""
    step, lowest = _parts(quantizer, value)
    scale = affine.rounded_up(quantizer, affine.positive(step))
    zero = None if lowest is None else affine.zero_point_of(quantizer, lowest, scale)
    codes = affine.encode(quantizer, x, Affine(scale, zero))
    return QArray(codes, lax.mul(scale, codecs.constant(x, grid, 1.0)), zero, quantizer.format, x.dtype)


def passed(quantizer: Quantizer, x: jax.Array, q: QArray, dx: jax.Array) -> jax.Array:
    """Return the gradient where nothing is clipped."""
    return lax.select(affine.inside(quantizer, x, Affine(q.scale, q.zero_point)), dx, lax.full_like(dx, 0))


def follow(quantizer: Quantizer, x: jax.Array, q: QArray, value: Any, change: Any) -> jax.Array:
    """Return how the decoded array moves with the steps and, where it is clipped, with the lowest values."""
    (step, _), (longer, higher) = _parts(quantizer, value), _parts(quantizer, change)
    units = lax.div(lax.convert_element_type(x, jnp.float32), blocks.broadcast(q.scale, x.shape))
    low, high = (_end(quantizer, q, x, end) for end in quantizer.bounds())
    kept = lax.bitwise_and(lax.ge(units, low), lax.le(units, high))
    rounded = _end(quantizer, q, x, q.codes)
    inner = rounded if _is_pact(quantizer) else units
    steps = lax.sub(rounded, lax.select(kept, inner, _origin(quantizer, low)))
    ratio = lax.div(q.scale, affine.positive(step))  # how far it was rounded up
    moved = lax.mul(steps, blocks.broadcast(lax.mul(ratio, change_of_size(step, longer)), x.shape))
    if higher is not None:
        moved = lax.add(moved, lax.select(kept, lax.full_like(moved, 0), blocks.broadcast(higher, x.shape)))
    return lax.convert_element_type(lax.mul(moved, np.float32(_share(quantizer, x, q))), x.dtype)


def _end(quantizer: Quantizer, q: QArray, x: jax.Array, codes: Any) -> jax.Array:
    """Return codes as what they stand for, in steps."""
    wide = jnp.broadcast_to(jnp.asarray(codes, jnp.float32), x.shape)
    return (
        wide
        if q.zero_point is None
        else lax.sub(wide, blocks.broadcast(lax.convert_element_type(q.zero_point, jnp.float32), x.shape))
    )


def _origin(quantizer: Quantizer, low: jax.Array) -> jax.Array:
    """Return what stays where a step grows: zero, or the lowest value where that is a parameter."""
    return lax.full_like(low, 0) if quantizer.symmetric else low


def _is_pact(quantizer: Quantizer) -> bool:
    assert isinstance(quantizer.calibrator, Learned), "only learned steps move"
    return quantizer.calibrator.rule == PACT


def _share(quantizer: Quantizer, x: jax.Array, q: QArray) -> float:
    """Return what the gradient by a step is scaled by."""
    if _is_pact(quantizer):
        return 1.0
    low, high = quantizer.bounds()
    steps = high if quantizer.symmetric else high - low
    return 1 / math.sqrt(max(1, x.size // max(1, math.prod(q.grid))) * steps)


def _parts(quantizer: Quantizer, value: Any) -> tuple[jax.Array, jax.Array | None]:
    return (value, None) if quantizer.symmetric else value
