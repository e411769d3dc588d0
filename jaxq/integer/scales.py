"""From one scale to another, in integers: the fixed-point multiplier, or a shift where all ratios are powers of two.

`rescaled` keeps int32, `narrowed` rounds to a grid of int8 codes. `together` brings values to one scale, a power of two
that leaves their sum thirty bits: rounding there is a billionth of what the sum could be.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.values import INT32, ROOM, Affine, Coded, Constant, Refusal, Value, ones, wide
from jaxq.numbers.requantize import SINGLE, quantize_multiplier, requantize, rescale, to_codes

# What a sum with a narrow value is computed in: steps of 2^-16 of the value's own.
FRACTION = 16
# How much larger than a value a constant that takes its place may be: what is left of thirty bits is fifteen.
FAR = 2.0**15
# The scale of zeros, which any other value outweighs.
NOTHING = 2.0**-100
SMALLER = "give the program int16 or less, or compute with integers before they become real numbers"


def widened(v: Coded) -> Coded:
    """Return the same values in int32, without zero point."""
    if not v.is_narrow:
        return v
    codes = lax.convert_element_type(v.codes, jnp.int32)
    return wide(codes - np.int32(v.zero_point) if v.zero_point else codes, v.scale, v.low, v.high, v.line)


def refined(v: Coded) -> Coded:
    """Return int32 codes, of a narrow value in steps so small that a constant can be added without much rounding."""
    return shifted(widened(v)) if v.is_narrow else v


def shifted(w: Coded, bits: int = FRACTION) -> Coded:
    """Return int32 codes in steps of 2^-bits of what they are."""
    return wide(w.codes << bits, w.scale / 2**bits, w.low << bits, w.high << bits, w.line) if bits else w


def rescaled(v: Coded, scale: np.ndarray) -> Coded:
    """Return `round(codes * v.scale / scale)` in int32, saturated; scale: of the codes' rank."""
    w = widened(v)
    ratio = np.broadcast_arrays(w.scale / scale, scale)[0]
    if np.all(ratio == 1):
        return Coded(w.codes, scale, w.low, w.high, 0, w.line)
    if np.any(ratio >= 2.0**31):
        raise Refusal("has a scale 2^31 times as large as the one it is to have")
    low, high = np.floor(w.low * ratio) - 1, np.ceil(w.high * ratio) + 1
    low, high = np.where(w.low < 0, low, low.clip(0)), np.where(w.high > 0, high, high.clip(max=0))
    low, high = (np.clip(end, *INT32).astype(np.int64) for end in (low, high))
    return Coded(_multiplied(w.codes, ratio), scale, low, high, 0, w.line)


def _multiplied(codes: jax.Array, ratio: np.ndarray) -> jax.Array:
    fractions, exponents = np.frexp(ratio)
    if np.all(fractions == 0.5) and np.all(np.abs(exponents - 1) <= 31):
        return rescale(codes, jnp.asarray(_small(exponents - 1)))
    mantissa, shift = quantize_multiplier(ratio)
    return requantize(codes, _small(mantissa), _small(shift), rounding=SINGLE)


def _small(x: np.ndarray) -> np.ndarray:
    """Return int32, a scalar where there is one for all."""
    x = np.asarray(x, np.int32)
    return x.reshape(()) if x.size == 1 else x


def narrowed(v: Coded, affine: Affine) -> Coded:
    """Return int8 codes on a grid: `clip(round(codes * v.scale / scale) + zero_point)`."""
    scale, zero = ones(affine.scale, v.codes.ndim), affine.zero_point
    low, high = ones(affine.low - zero, v.codes.ndim, np.int64), ones(affine.high - zero, v.codes.ndim, np.int64)
    on_it = v.is_narrow and v.zero_point == zero and v.scale.size == 1 and float(v.scale.max()) == affine.scale
    if on_it and v.low.min() >= low.min() and v.high.max() <= high.max():
        return v
    codes = to_codes(rescaled(v, scale).codes, zero, affine.low, affine.high)
    return Coded(codes, scale, low, high, zero)


# --- one scale -----------------------------------------------------------------------------------------------------


def power_above(x: float) -> float:
    """Return the power of two that is at least x."""
    fraction, exponent = np.frexp(x)
    return float(np.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent))


def uniform(v: Coded) -> Coded:
    """Return the same values with one scale for all."""
    if v.scale.size == 1:
        return v
    if np.all(v.scale == v.scale.max()):
        return Coded(v.codes, ones(v.scale.max(), v.codes.ndim), v.low, v.high, v.zero_point, v.line)
    return coarser(v, power_above(v.real_reach / ROOM))


def together(values: Sequence[Coded], extra: float = 0.0) -> list[Coded]:
    """Return int32 values of one scale, whose sum, and `extra` with it, int32 holds."""
    total = sum(v.real_reach for v in values) + extra
    scales = {float(v.scale.max()) for v in values}
    if len(scales) == 1 and all(v.scale.size == 1 for v in values) and total / min(scales) <= ROOM:
        return [widened(v) for v in values]
    scale = power_above(total / ROOM)
    return [coarser(v, scale) for v in values]


def alongside(values: Sequence[Coded]) -> list[Coded]:
    """Return int32 values of one scale to be compared, whose sum nobody takes: what was of one scale is not rounded."""
    if len({float(v.scale.max()) for v in values}) == 1 and all(v.scale.size == 1 for v in values):
        return [widened(v) for v in values]
    scale = power_above(max(v.real_reach for v in values) / ROOM)
    return [coarser(v, scale) for v in values]


def within(v: Coded, reach: float) -> Coded:
    """Return int32 codes between `-reach` and `reach`: as they are, or of one coarser scale."""
    if np.max(v.reach) <= reach:
        return widened(v)
    return coarser(v, power_above(v.real_reach / (reach - 1)))


# --- whole numbers of the program, and constants ---------------------------------------------------------------------


def is_full(v: Coded) -> bool:
    """Tell whether values are the program's own integers of 32 bits: each step of them counts."""
    return not v.is_narrow and bool(np.max(v.reach) >= INT32[1])


def coarser(v: Coded, scale: float) -> Coded:
    """Return int32 codes of one scale, a power of two; refuse what would drop bits of the program's own integers."""
    if is_full(v) and scale > np.min(v.scale):
        raise Refusal(f"may drop the last bits of integers of 32 bits: {SMALLER}")
    return rescaled(v, ones(scale, v.codes.ndim))


def check_whole(v: Coded, reals: np.ndarray) -> None:
    """Refuse a constant that the program's own integers of 32 bits, which have no fractions, cannot be limited to."""
    if not is_full(v):
        return
    finite = np.where(np.isfinite(reals), reals, 0.0)
    wrong = np.abs(np.rint(finite / v.scale) * v.scale - finite)
    if np.any(wrong > 0.01 * np.abs(finite)):
        raise Refusal(f"takes {np.max(np.abs(finite)):.3g}, which is between two integers of 32 bits: {SMALLER}")


def finite(c: Constant) -> np.ndarray:
    """Return a constant's numbers; refuse infinity and NaN."""
    if not np.isfinite(c.reals).all():
        raise Refusal("has a constant that is not finite, for which there is no code: use a finite number")
    return c.reals


def coded(x: Value, aval: Any) -> Coded:
    """Return codes of one scale: of parameters, thirty bits of their largest number; zeros have next to none.

    Numbers like those that hide positions stand for larger ones.
    """
    if isinstance(x, Coded):
        return uniform(x)
    assert isinstance(x, Constant), "real numbers are codes or parameters here"
    reals = finite(x)
    largest, rank = float(np.max(np.abs(reals), initial=0.0)), len(aval.shape)
    scale = largest / ROOM or NOTHING
    codes = np.rint(reals / scale).astype(np.int64).reshape((1,) * (rank - reals.ndim) + reals.shape)
    array = jnp.broadcast_to(jnp.asarray(codes, jnp.int32), aval.shape)
    v = alike(array, scale, int(codes.min(initial=0)), int(codes.max(initial=0)))
    return dataclasses.replace(v, far=far_of(largest))


def far_of(largest: float) -> float:
    """Return the size from which numbers stand for larger ones, if the largest of them is one that hides others."""
    return 0.5 * largest if largest > FAR else math.inf


def alike(codes: jax.Array, scale: float, low: int, high: int) -> Coded:
    """Return codes of one scale and one range."""
    ends = ones(low, codes.ndim, np.int64), ones(high, codes.ndim, np.int64)
    return Coded(codes, ones(scale, codes.ndim), *ends)


def beside(values: Sequence[Coded], constants: Sequence[Constant]) -> float:
    """Return the largest of constants that are to have the values' scale; refuse one that leaves too little of them."""
    extra = max([float(np.max(np.abs(finite(c)), initial=0.0)) for c in constants], default=0.0)
    if extra > FAR * max(v.real_reach for v in values):
        raise Refusal(f"puts in {extra:.3g}, beside which the other values are nothing: use a smaller number")
    return extra


def constant(c: Constant, like: Coded) -> Coded:
    """Return a constant in int32 codes of another value's scale, to nearest even."""
    reals = c.reals if c.reals.ndim else ones(c.reals, like.codes.ndim)
    codes = np.rint(reals / like.scale)
    if np.any(np.abs(codes) > INT32[1]):
        raise Refusal("adds a constant that int32 does not hold at the scale of the sum")
    codes = codes.astype(np.int64)
    return Coded(jnp.asarray(codes, jnp.int32), like.scale, codes, codes)
