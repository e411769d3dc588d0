"""Integers: from an array or a range to a scale and a zero point, and from there to codes.

`affine_of` is the only place where a range becomes a scale and `encode` the only place where a real number becomes an
integer code. Both are written so that XLA has nothing to reassociate: a division by a constant is a multiplication by a
constant, ranges are exact reductions (min, max), no product is followed by a sum (which would be contracted to one
fused operation in one program and not in another).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import blocks, clipping, histogram, means
from jaxq.numbers.calibrators import Range
from jaxq.numbers.fits import MSE, Keeping, MeanAbs
from jaxq.numbers.formats import Fixed, Int
from jaxq.numbers.rounding import Saturate, stochastic

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer

# Below this a scale's reciprocal would overflow float32, above it nothing is lost but codes of denormal numbers.
TINY = np.float32(2.0**-120)
LARGEST = np.finfo(np.float32).max
# A sum with an integer below 2^22 has it in its last bits, next to this number's own. Those are not zero (but even, for
# ties), so that taking them away is an instruction: ptxas 13.0 stores a sum as a byte converted, not cut.
BESIDE = np.float32(1.5 * 2**23 + 128)


class Affine(NamedTuple):
    """The map from codes to reals: `x ~ scale * (code - zero_point)`; zero_point, of the codes' type, is None when
    symmetric."""

    scale: jax.Array
    zero_point: jax.Array | None


def range_of(x: jax.Array, grid: Sequence[int]) -> Range:
    """Return the exact range of every block of `x`, zero included. lo, hi: float32 of shape `grid`.

    NaN comes out as infinity: reductions may drop NaN (XLA's do, on a CPU, in large arrays), infinity they cannot.
    """
    lo = _float32(blocks.collapse(_nan_as(x, -np.inf), grid, lax.reduce_min))
    hi = _float32(blocks.collapse(_nan_as(x, np.inf), grid, lax.reduce_max))
    return Range(lax.min(lo, np.float32(0)), lax.max(hi, np.float32(0)), lax.full_like(lo, 1))


def width_of(r: Range) -> jax.Array:
    """Return the largest absolute value of a range."""
    return lax.max(lax.neg(r.lo), r.hi)


def observe(quantizer: Quantizer, x: jax.Array) -> Range:
    """Return what one array shows of its values: its range, one observation; none if it is empty."""
    x = lax.stop_gradient(x)
    r = range_of(x, (1,) * x.ndim)
    count = jnp.float32(0 if 0 in x.shape else 1)
    seen = histogram.of(_float32(x)) if quantizer.counts else None
    return Range(lax.reshape(r.lo, ()), lax.reshape(r.hi, ()), count, seen)


def _nan_as(x: jax.Array, value: float) -> jax.Array:
    return lax.select(lax.ne(x, x), lax.full_like(x, value), x)


def affine_of(quantizer: Quantizer, r: Range) -> Affine:
    """Return scale and zero point that cover the range `r`; an empty range gives a scale of one and codes of zero."""
    low, high = quantizer.bounds()
    if quantizer.symmetric:
        width = r.hi
        if low:
            # In units of `high`: the full range of two's complement has one step more below than above.
            width = lax.max(lax.mul(lax.neg(r.lo), np.float32(high / -low)), r.hi)
        return Affine(rounded_up(quantizer, step(width, high)), None)
    # Half of the width first: the whole may not fit in float32.
    half = lax.mul(r.hi, np.float32(0.5)) - lax.mul(r.lo, np.float32(0.5))
    scale = rounded_up(quantizer, step(half, 0.5 * (high - low)))
    return Affine(scale, zero_point_of(quantizer, r.lo, scale))


def zero_point_of(quantizer: Quantizer, lowest: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the code of zero where the lowest code stands for `lowest`, in the codes' type."""
    low, high = (np.float32(end) for end in quantizer.bounds())
    return lax.convert_element_type(
        lax.clamp(low, _round(low - lax.div(lowest, scale)), high), quantizer.format.storage
    )


def affine_for(quantizer: Quantizer, x: jax.Array, grid: Sequence[int]) -> Affine:
    """Return the scale and zero point for every block of `x`, by the quantizer's fit; by default they cover it."""
    if quantizer.fit is not None:
        return _fitted(quantizer, x, grid)
    if not is_plain(quantizer):
        return affine_of(quantizer, range_of(x, grid))
    width = _float32(blocks.collapse(_nan_as(lax.abs(x), np.inf), grid, lax.reduce_max))
    return Affine(step(lax.max(width, np.float32(0)), quantizer.bounds()[1]), None)


def is_plain(quantizer: Quantizer) -> bool:
    """Tell whether the scale is the largest absolute value over the largest code: one reduction."""
    plain = isinstance(quantizer.format, Int) and quantizer.format.signed and quantizer.symmetric
    plain = plain and quantizer.narrow and quantizer.fit is None and not quantizer.learned
    return plain and not quantizer.power_of_two and not quantizer.scaling


def _fitted(quantizer: Quantizer, x: jax.Array, grid: Sequence[int]) -> Affine:
    """Return scale and zero point by a rule that may leave values out: by least error, by a statistic."""
    r = range_of(x, grid)
    low, high = quantizer.bounds()
    rows = blocks.to_rows(_float32(x), grid)
    zero = None
    if isinstance(quantizer.fit, MSE):
        if quantizer.symmetric:
            scale = clipping.mse_scale(rows, low, high)
        else:
            scale, zero = (lax.reshape(part, grid) for part in clipping.mse_affine(rows, low, high))
            zero = lax.convert_element_type(zero, quantizer.format.storage)
    elif isinstance(quantizer.fit, MeanAbs):
        scale = means.mean_abs(rows)
    else:
        # A histogram for each block would be larger than the array: a few blocks at a time.
        rule = quantizer.fit
        assert isinstance(rule, Keeping), "integers have no other fits"
        lo, hi = lax.map(lambda row: rule.keep(quantizer, histogram.of(row)), rows, batch_size=16)
        kept = Range(lax.reshape(lo, grid), lax.reshape(hi, grid), r.count)
        return _guarded(r, affine_of(quantizer, kept))
    return _guarded(r, Affine(rounded_up(quantizer, lax.max(lax.reshape(scale, grid), TINY)), zero))


def _guarded(r: Range, affine: Affine) -> Affine:
    """Return a scale that is one where all values are zero, and NaN where one is NaN or infinite."""
    width = width_of(r)
    scale = lax.select(lax.eq(width, np.float32(0)), lax.full_like(width, 1), affine.scale)
    return Affine(lax.select(lax.eq(width, np.float32(np.inf)), lax.full_like(width, np.nan), scale), affine.zero_point)


def rounded_up(quantizer: Quantizer, scale: jax.Array) -> jax.Array:
    """Return the scale, rounded up to a power of two if the quantizer wants that; exact, by its bits."""
    if not quantizer.power_of_two:
        return scale
    # A range that ends at a code times a power of two has one for its scale, but for the rounding of a product.
    scale = lax.mul(scale, np.float32(1 - 2.0**-21))
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    floor = lax.bitcast_convert_type(lax.bitwise_and(bits, np.int32(0x7F800000)), jnp.float32)
    up = lax.select(lax.eq(floor, scale), floor, lax.mul(floor, np.float32(2)))
    return lax.select(lax.ne(scale, scale), scale, up)


def positive(parameter: jax.Array) -> jax.Array:
    """Return what a learned step, range or level is used as: its absolute value, never zero.

    At zero all would be zero, and a ReLU after it would let no gradient through to bring it back.
    """
    return lax.max(lax.abs(parameter), TINY)


def raw_scale(quantizer: Quantizer, x: jax.Array, grid: Sequence[int]) -> jax.Array:
    """Return minus the width of every block, one reduction and nothing after it; `settle` makes it a scale.

    A scale is positive and a width is told by its sign, so that `settle` takes both: programs that compute a weight's
    scale and programs that are given it run the same operations on an array in memory, and round alike after it. NaN
    counts as infinity.
    """
    if 0 in x.shape:
        return jnp.zeros(grid, jnp.float32)
    x = blocks.thinned(_float32(x), grid, _larger)
    return blocks.collapse(_nan_as(-lax.abs(x), -np.inf), grid, lax.reduce_min)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the larger absolute value, NaN if one is NaN."""
    return lax.max(lax.abs(a), lax.abs(b))


def settle(quantizer: Quantizer, raw: jax.Array) -> jax.Array:
    """Return the scale that a `raw_scale` stands for, equal to `affine_for`'s; a scale stays what it is."""
    return lax.select(lax.gt(raw, np.float32(0)), raw, step(lax.neg(raw), quantizer.bounds()[1]))


def step(width: jax.Array, steps: float) -> jax.Array:
    """Return the scale for a range of `width`: one where it is empty, NaN where it is not finite."""
    # Two codes that are 2^128 apart have no step in float32: the largest there is will do.
    scale = lax.clamp(TINY, lax.mul(width, np.float32(1 / steps)), LARGEST)
    # Sums are shorter programs than selections, and exact: infinity times zero is NaN, and TINY is lost in one.
    scale = lax.add(scale, lax.mul(width, np.float32(0)))
    return lax.add(scale, lax.convert_element_type(lax.eq(width, np.float32(0)), np.float32))


def _float32(x: jax.Array) -> jax.Array:
    return lax.convert_element_type(x, jnp.float32)


def _round(x: jax.Array) -> jax.Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def _steps(x: jax.Array, affine: Affine) -> jax.Array:
    """Return `x / scale`, in float32."""
    # A quarter of both, so that the reciprocal of the largest scale is a normal number too: exact, a power of two.
    # A division would be one where the scale is an array and a product with a reciprocal where it is a scalar.
    inverse = lax.div(np.float32(1), lax.mul(affine.scale, np.float32(0.25)))
    return lax.mul(lax.mul(_float32(x), np.float32(0.25)), blocks.spread(inverse, x.shape))


def rounded(quantizer: Quantizer, x: jax.Array, affine: Affine, key: jax.Array | None = None) -> jax.Array:
    """Return `round(x / scale) + zero_point` in float32, not yet clipped: what the clip mask of a gradient tests."""
    steps = _steps(x, affine)
    nearest = quantizer.format.rounding if isinstance(quantizer.format, Fixed) else _round
    codes = nearest(steps) if key is None else stochastic(key, steps)
    if affine.zero_point is None:
        return codes
    return lax.add(codes, _float32(blocks.spread(affine.zero_point, x.shape)))


def encode(quantizer: Quantizer, x: jax.Array, affine: Affine, key: jax.Array | None = None) -> jax.Array:
    """Return codes: rounded to nearest even and saturated, as a fixed-point format says, or stochastically by a key."""
    low, high = quantizer.bounds()
    if isinstance(quantizer.format, Int) and key is None:
        return _nearest(quantizer, x, affine)
    codes = rounded(quantizer, x, affine, key)
    if isinstance(quantizer.format, Fixed) and not isinstance(quantizer.format.overflow, Saturate):
        codes = quantizer.format.overflow(codes, low, high)
    else:
        codes = lax.clamp(np.float32(low), codes, np.float32(high))
    return lax.convert_element_type(codes, quantizer.format.storage)


def _nearest(quantizer: Quantizer, x: jax.Array, affine: Affine) -> jax.Array:
    """Return codes rounded to nearest even and saturated, read from the bits of a sum: no slower than reading `x`.

    Next to 1.5 * 2^23 float32 has the integers and nothing between: the sum rounds, and its bits count the integers.
    The clip comes first, which no compiler can contract with the sum. NaN, which has bits of its own, counts as zero.
    """
    steps, zero = _nan_as(_steps(x, affine), 0), affine.zero_point
    low, high = (lax.full_like(steps, end) for end in quantizer.bounds())
    if zero is not None:
        zero = blocks.spread(lax.convert_element_type(zero, jnp.int32), x.shape)
        low, high = low - _float32(zero), high - _float32(zero)
    # Selections, which are one instruction each on a CPU: a clamp's are more, for it lets NaN through.
    steps = lax.select(lax.gt(steps, low), steps, low)
    steps = lax.select(lax.lt(steps, high), steps, high)
    codes = lax.sub(lax.bitcast_convert_type(lax.add(steps, BESIDE), jnp.int32), BESIDE.view(np.int32))
    return lax.convert_element_type(codes if zero is None else codes + zero, quantizer.format.storage)


def inside(quantizer: Quantizer, x: jax.Array, affine: Affine) -> jax.Array:
    """Return where the rounded value has a code of its own: where nothing is clipped."""
    low, high = quantizer.bounds()
    codes = rounded(quantizer, x, affine)
    return lax.bitwise_and(lax.ge(codes, np.float32(low)), lax.le(codes, np.float32(high)))
