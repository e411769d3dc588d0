"""From int32 sums to codes in integers alone: multiplication by a real number held as a 32-bit mantissa and a shift.

A multiplier is `m = mantissa * 2 ** (shift - 31)`, and `requantize` is `round(acc * m)` to the bit as TensorFlow Lite
computes it. JAX runs in 32 bits, so that the 64-bit product is two words, put together from products of 16-bit halves.
Sharp edges: the two roundings differ from one another, and each from the real one, by one on ties or close to them;
`double_rounding` shifts left before it multiplies and wraps if that overflows, as in C. Shifts outside [-31, 31] are
undefined.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INT_MIN, INT_MAX = np.int32(-(2**31)), np.int32(2**31 - 1)


class Words(NamedTuple):
    """A 64-bit integer in two's complement, `high * 2 ** 32 + low`. high: int32; low: uint32."""

    high: jax.Array
    low: jax.Array


def quantize_multiplier(m: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return `(mantissa, shift)`, int32 of m's shape, with `m ~ mantissa * 2 ** (shift - 31)`. On the host, in float64.

    mantissa: in [2 ** 30, 2 ** 31), halves rounded away from zero; shift: in [-31, 31]. Zero, and what would need a
    smaller shift, give (0, 0). Raises `ValueError` for negative, infinite or NaN multipliers and for 2 ** 31 and more,
    which no shift of an int32 holds. TensorFlow Lite, `QuantizeMultiplier`.

    >>> [x.tolist() for x in quantize_multiplier([0.25, 1.5, 0.0])]
    [[1073741824, 1610612736, 0], [-1, 1, 0]]
    """
    m = np.asarray(m, np.float64)
    if not np.all((m >= 0) & (m < np.inf)):
        raise ValueError(f"a multiplier is a finite, non-negative number, got {m}")
    fraction, shift = np.frexp(m)
    mantissa = np.floor(fraction * 2.0**31 + 0.5)  # exact: a float64 has 22 bits to spare
    carried = mantissa == 2.0**31
    mantissa, shift = np.where(carried, 2.0**30, mantissa), shift + carried
    if np.any(shift > 31):
        raise ValueError(f"a multiplier is below 2 ** 31, got {m}; move a power of two into the scale")
    kept = shift >= -31
    return np.where(kept, mantissa, 0).astype(np.int32), np.where(kept, shift, 0).astype(np.int32)


def double_rounding(acc: jax.Array, mantissa: jax.Array, shift: jax.Array) -> jax.Array:
    """Return `shift_right_rounded(high_mul(acc << left, mantissa), right)` with left, right = max(+-shift, 0).

    `high_mul` rounds and saturates, the left shift wraps. gemmlowp and TensorFlow Lite's reference kernels,
    `MultiplyByQuantizedMultiplier`; Jacob et al. 2018, section 2.2.

    >>> import jax.numpy as jnp
    >>> double_rounding(jnp.int32(1000), jnp.int32(2**30), jnp.int32(-1)).tolist()
    250
    """
    zero = jnp.int32(0)
    return shift_right_rounded(high_mul(acc << jnp.maximum(shift, zero), mantissa), jnp.maximum(-shift, zero))


def single_rounding(acc: jax.Array, mantissa: jax.Array, shift: jax.Array) -> jax.Array:
    """Return `(acc * mantissa + 2 ** (30 - shift)) >> (31 - shift)` of 64-bit integers, saturated to int32.

    One rounding, halves up. TensorFlow Lite built with `TFLITE_SINGLE_ROUNDING`.

    >>> import jax.numpy as jnp
    >>> single_rounding(jnp.int32(1000), jnp.int32(2**30), jnp.int32(-1)).tolist()
    250
    """
    return _product_shifted(acc, mantissa, 31 - shift)


# What `rounding=` may be.
DOUBLE, SINGLE = double_rounding, single_rounding


def requantize(
    acc: jax.Array,
    mantissa: jax.Array | np.ndarray,
    shift: jax.Array | np.ndarray,
    *,
    rounding: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = DOUBLE,
) -> jax.Array:
    """Return `round(acc * mantissa * 2 ** (shift - 31))` in int32, rounded as `rounding` does: DOUBLE or SINGLE.

    acc, mantissa, shift: int32, scalars or of one rank, broadcast; shift: positive to the left, in [-31, 31]. Raises
    `TypeError` for other dtypes and `ValueError` for ranks that differ.

    >>> import jax.numpy as jnp
    >>> mantissa, shift = quantize_multiplier([[0.01, 0.3]])
    >>> requantize(jnp.int32([[1000, 1000], [-49, -5]]), mantissa, shift).tolist()
    [[10, 300], [0, -2]]
    """
    operands = (acc, mantissa, shift)
    if any(x.dtype != jnp.int32 for x in operands):
        raise TypeError(f"acc, mantissa and shift are int32, got {', '.join(str(x.dtype) for x in operands)}")
    if len({x.ndim for x in operands if x.ndim}) > 1:
        raise ValueError(f"acc, mantissa and shift are of one rank, got shapes {[tuple(x.shape) for x in operands]}")
    return rounding(*(jnp.asarray(x) for x in operands))


def high_mul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `round(a * b / 2 ** 31)` of int32, halves up; the one product that does not fit becomes 2 ** 31 - 1.

    gemmlowp, `SaturatingRoundingDoublingHighMul`. There it is a nudge and a division by d = 2 ** 31 that truncates
    towards zero, the nudge being 1 - 2 ** 30 for negative products. As `trunc(p / d) == floor((p + d - 1) / d)` for
    p <= 0, and that nudge plus d - 1 is 2 ** 30, both signs are `floor((a * b + 2 ** 30) / d)`.

    >>> import jax.numpy as jnp
    >>> high_mul(jnp.int32([1000, -(2**31)]), jnp.int32([2**30, -(2**31)])).tolist()
    [500, 2147483647]
    """
    return _product_shifted(a, b, jnp.int32(31))


def shift_right_rounded(x: jax.Array, n: jax.Array | int) -> jax.Array:
    """Return `round(x / 2 ** n)` of int32, halves away from zero: rescaling by a power of two.

    n: int32 in [0, 31], a scalar or of x's rank. gemmlowp, `RoundingDivideByPOT`.

    >>> import jax.numpy as jnp
    >>> shift_right_rounded(jnp.int32([-6, -5, 5, 6, 7]), 2).tolist()
    [-2, -1, 1, 2, 2]
    """
    n = jnp.asarray(n, jnp.int32)
    mask = (jnp.int32(1) << n) - 1
    threshold = (mask >> 1) + _as_int(x < 0)
    return (x >> n) + _as_int((x & mask) > threshold)


def exponent_of(scale: jax.Array) -> jax.Array:
    """Return `log2(scale)` of powers of two, int32: `rescale` by it, or by the difference of two, is exact.

    scale: float32 powers of two, normal numbers; other scales give the exponent of the next one below.

    >>> import jax.numpy as jnp
    >>> exponent_of(jnp.float32([0.25, 1.0, 64.0])).tolist()
    [-2, 0, 6]
    """
    return (lax.bitcast_convert_type(scale, jnp.int32) >> 23) - 127


def rescale(acc: jax.Array, exponent: jax.Array | int) -> jax.Array:
    """Return `round(acc * 2 ** exponent)` in int32 by a shift alone: halves away from zero, saturated.

    This is `requantize` for power-of-two scales (fixed point): from scale 2^a to 2^b it is `rescale(acc, a - b)`.
    acc: int32; exponent: int32 in [-31, 31], a scalar or of acc's rank.

    >>> import jax.numpy as jnp
    >>> rescale(jnp.int32([-6, 5, 7, 2**30]), jnp.int32([-2, -2, 3, 3])).tolist()
    [-2, 1, 56, 2147483647]
    """
    exponent = jnp.asarray(exponent, jnp.int32)
    left = jnp.maximum(exponent, 0)
    up = acc << left
    up = jnp.where(up >> left == acc, up, jnp.where(acc < 0, INT_MIN, INT_MAX))
    return jnp.where(exponent < 0, shift_right_rounded(acc, jnp.maximum(-exponent, 0)), up)


def to_codes(acc32: jax.Array, zero_point: jax.Array | int, low: int, high: int) -> jax.Array:
    """Return `clip(acc32 + zero_point, low, high)` as int8; the sum saturates instead of wrapping.

    acc32: int32; zero_point: int32, a scalar or of acc32's rank. Raises `ValueError` for bounds outside int8.

    >>> import jax.numpy as jnp
    >>> to_codes(jnp.int32([-400, 7, 2**31 - 1]), 10, -128, 127).tolist()
    [-128, 17, 127]
    """
    if not -128 <= low <= high <= 127:
        raise ValueError(f"codes are int8, between -128 and 127, got the bounds [{low}, {high}]")
    zero_point = jnp.asarray(zero_point, jnp.int32)
    total = acc32 + zero_point
    # Overflow: the sum's sign is neither summand's.
    overflows = ((acc32 ^ total) & (zero_point ^ total)) < 0
    total = jnp.where(overflows, jnp.where(acc32 < 0, INT_MIN, INT_MAX), total)
    return lax.convert_element_type(lax.clamp(np.int32(low), total, np.int32(high)), jnp.int8)


def _as_int(flag: jax.Array) -> jax.Array:
    return lax.convert_element_type(flag, jnp.int32)


def _unsigned(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _product_shifted(a: jax.Array, b: jax.Array, n: jax.Array) -> jax.Array:
    """Return `(a * b + 2 ** (n - 1)) >> n` of 64-bit integers, saturated to int32; nothing is added for n = 0.

    n: int32 in [0, 62]. The sum fits: it is at most 2 ** 62 + 2 ** 61.
    """
    return _saturated(_shifted(_plus_half(_product(a, b), n), n))


def _product(a: jax.Array, b: jax.Array) -> Words:
    """Return the 64-bit product of int32. Warren, Hacker's Delight, section 8-2 (`mulhs`).

    Low halves are unsigned and high ones signed: only the product of two low halves needs the 32nd bit.
    """
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    low = a_low * b_low
    middle = a_high * b_low + lax.shift_right_logical(low, lax.full_like(low, 16))
    carry = (a_low * b_high + (middle & 0xFFFF)) >> 16
    return Words(a_high * b_high + (middle >> 16) + carry, _unsigned(a * b))


def _plus_half(x: Words, n: jax.Array) -> Words:
    """Return `x + 2 ** (n - 1)` for n in [1, 63], and x for n = 0."""
    bit = jnp.int32(1) << ((n - 1) & 31)
    low = x.low + _unsigned(jnp.where((n >= 1) & (n <= 32), bit, 0))
    high = x.high + jnp.where(n > 32, bit, 0) + _as_int(low < x.low)
    return Words(high, low)


def _shifted(x: Words, n: jax.Array) -> Words:
    """Return `x >> n` for n in [0, 63]: by a whole word, then by less than one, as every backend can."""
    low = jnp.where(n < 32, x.low, _unsigned(x.high))
    high = jnp.where(n < 32, x.high, x.high >> 31)
    n = n & 31
    # By 1 and by 31 - n, because by 32 is undefined.
    spill = _unsigned((high << 1) << (31 - n))
    return Words(high >> n, (low >> _unsigned(n)) | spill)


def _saturated(x: Words) -> jax.Array:
    """Return x as int32: it fits if the high word is nothing but the sign of the low one."""
    low = lax.bitcast_convert_type(x.low, jnp.int32)
    return jnp.where(x.high == low >> 31, low, jnp.where(x.high < 0, INT_MIN, INT_MAX))
