"""Softmax in integers: powers of two by a polynomial and a shift, their sum, one division for each row.

`exp(x - max) = 2^w 2^g` with whole `w <= 0` and `0 <= g < 1`, as in I-BERT (Kim et al. 2021, algorithm 2), with a
polynomial of third degree where theirs is of second, and powers of two where theirs are of e.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.arithmetic import add, scaled
from jaxq.integer.reductions import largest, sums_of_words
from jaxq.integer.scales import rescaled, uniform, within
from jaxq.integer.values import INT32, Coded, Refusal, ones, span, wide

# Bits of fractions, of exponents and of the polynomial's values.
FRACTION = 15
# Bits of the largest number of a row's powers; how many of them two sums hold.
BITS, LONGEST = 29, 2**15
# 2^g on [0, 1) within 1e-4: interpolated where a Chebyshev polynomial is zero, lowest degree first.
POWERS = tuple(round(c * 2**FRACTION) for c in (0.99990029, 0.69632477, 0.22469316, 0.07896726))

# log2(1 + f) / f on [0, 1] within 1e-5, likewise.
LOGARITHM = tuple(
    round(c * 2**FRACTION) for c in (1.44268147, -0.72035877, 0.46865888, -0.30163801, 0.14447110, -0.03382205)
)


def exp2(x: jax.Array, bits: int) -> jax.Array:
    """Return `2^(x / 2^15) 2^bits`, rounded down, within 2e-4 of it and one. x: int32, at most 0; bits: up to 29.

    >>> exp2(jnp.int32([0, -(2**14), -(2**15), -(2**31)]), 10).tolist()
    [1023, 724, 511, 0]
    """
    part, whole = x & (2**FRACTION - 1), x >> FRACTION
    value = jnp.int32(POWERS[-1])
    for c in POWERS[-2::-1]:
        value = ((value * part + (1 << (FRACTION - 1))) >> FRACTION) + c
    up = bits - FRACTION
    return (value << max(up, 0)) >> lax.clamp(np.int32(0), max(-up, 0) - whole, np.int32(31))


class Powers(NamedTuple):
    """The powers of rows over the largest of each, in 29 bits, and their sums, kept as ones, without `spare` bits."""

    codes: jax.Array
    total: jax.Array
    spare: int


def powers_of(v: Coded, slope: float, axes: Sequence[int]) -> Powers:
    """Return `exp(slope (v - max))` over axes, within 2e-4; refuse rows of more than 2^15 numbers."""
    count = math.prod(v.codes.shape[axis] for axis in axes)
    if count > LONGEST:
        raise Refusal(f"is a softmax of {count} numbers: up to {LONGEST} have an integer form")
    far = v.far * abs(slope)
    v = within(uniform(scaled(v, np.array(slope))), 2**30 - 1)
    below = v.codes - largest(v.codes, axes)
    reach = ones(2 * int(v.reach.max()), below.ndim, np.int64)
    exponents = rescaled(wide(below, v.scale * math.log2(math.e), -reach, 0 * reach), ones(2.0**-FRACTION, below.ndim))
    powers = exp2(exponents.codes, BITS)
    if far < math.inf:
        powers = _hidden(powers, v.codes, int(far / v.scale.max()), axes)
    powers = lax.optimization_barrier(powers)  # computed once, for two sums and the result
    # Two sums of fifteen bits each, put together without the bits that a sum of so many has no room for.
    spare = max(0, math.ceil(math.log2(max(count, 1))))
    high, low = sums_of_words(powers, 15, axes)
    return Powers(powers, (high << (15 - spare)) + (low >> spare), spare)


def softmax(v: Coded, slope: float, axes: Sequence[int]) -> Coded:
    """Return `softmax(slope v)` over axes, in steps of 2^-30, within 5e-4; refuse rows of more than 2^15 numbers."""
    powers, total, spare = powers_of(v, slope, axes)
    # The sum's first bit becomes the last but one of a word, and all that it is a sum of is shifted as far.
    up = lax.clz(total) - 1
    inverse = lax.div(jnp.int32(INT32[1]), (total << up) >> 15)
    down = 16 + spare - up
    codes = ((powers + (1 << (down - 1))) >> down) * inverse
    return wide(codes, ones(2.0**-30, codes.ndim), ones(0, codes.ndim), ones(2**30 + 2**16, codes.ndim))


def log2(x: jax.Array) -> jax.Array:
    """Return `2^15 log2(x)`, within three steps of it. x: int32, at least 1.

    >>> log2(jnp.int32([1, 3, 2**30])).tolist()
    [0, 51937, 983040]
    """
    up = lax.clz(x)
    part = ((x << up) >> (31 - FRACTION)) & (2**FRACTION - 1)
    value = jnp.int32(LOGARITHM[-1])
    for c in LOGARITHM[-2::-1]:
        value = ((value * part + (1 << (FRACTION - 1))) >> FRACTION) + c
    return ((31 - up) << FRACTION) + ((value * part + (1 << (FRACTION - 1))) >> FRACTION)


def log_sum_exp(v: Coded, axes: Sequence[int], *, shifted: bool) -> Coded:
    """Return `log(sum(exp(v)))` over axes, kept as ones, within 5e-4; shifted: less the largest of each row."""
    _, total, spare = powers_of(v, 1.0, axes)
    codes = jnp.maximum(log2(total) - ((BITS - spare) << FRACTION), 0)
    end = ones((spare << FRACTION) + 2, codes.ndim, np.int64)
    above = wide(codes, ones(math.log(2) * 2.0**-FRACTION, codes.ndim), 0 * end, end)
    if shifted:
        return above
    v = uniform(v)
    low, high = (ones(end, codes.ndim, np.int64) for end in span([v]))
    return add(None, above, Coded(largest(v.codes, axes), v.scale, low, high, v.zero_point))


def _hidden(powers: jax.Array, codes: jax.Array, far: int, axes: Sequence[int]) -> jax.Array:
    """Return zero for what is far below; where all of a row is, nothing is hidden."""
    below = codes <= -far
    return jnp.where(below & ~jnp.all(below, tuple(axes), keepdims=True), 0, powers)
