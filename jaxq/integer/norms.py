"""Norms in integers: a row over its own root mean square, with one square root and one division for each row.

A row is shifted so far that its largest number has fifteen bits, whatever is proved of it: that keeps the precision of
rows that are far smaller than they might be. The square root is exact, bit by bit.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.reductions import largest, sums_of_words
from jaxq.integer.scales import refined, uniform, within
from jaxq.integer.values import INT32, Coded, Refusal, ones, wide

# Bits that the largest number of a row is shifted to; its square has twice as many.
BITS = 14
LONGEST = 2**14


def isqrt(x: jax.Array) -> jax.Array:
    """Return the square root of unsigned integers, rounded down, as `math.isqrt`. x: uint32.

    Warren, Hacker's Delight, section 11-1: one bit after the other, from the highest.

    >>> isqrt(jnp.uint32([0, 15, 16, 2**32 - 1])).tolist()
    [0, 3, 4, 65535]
    """
    root = lax.full_like(x, 0)
    for bit in range(15, -1, -1):
        tried = root | np.uint32(1 << bit)
        root = lax.select(lax.le(tried * tried, x), tried, root)
    return root


def mean(codes: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Return the mean over axes, kept as ones, rounded to nearest. codes: int32 within +-2^30, at most 2^14 of them.

    Two sums of sixteen bits each, which int32 holds, divided one after the other, as by hand.
    """
    count = math.prod(codes.shape[axis] for axis in axes)
    high, low = sums_of_words(codes, 16, axes)
    number = np.int32(count)
    whole = lax.div(high + np.int32(2**14 * count), lax.full_like(high, number)) - 2**14  # rounded down
    rest = ((high - whole * number) << 16) + low + np.int32(count // 2)
    return (whole << 16) + lax.div(rest, lax.full_like(rest, number))


def normalized(v: Coded, axes: Sequence[int], *, centered: bool, epsilon: float) -> Coded:
    """Return `d / sqrt(mean(d^2) + epsilon)` over axes, where d is v or, if centered, v less its mean.

    At most `2^-13` of `sqrt(n)` off, where n is how many numbers a row has; zero where all of a row is zero. Refuses
    rows of more than 2^14 numbers. Ba et al. 2016; Zhang and Sennrich 2019; with the square root of I-BERT (Kim et al.
    2021, section 3.5) made exact.
    """
    count = math.prod(v.codes.shape[axis] for axis in axes)
    if count > LONGEST:
        raise Refusal(f"is a norm over {count} numbers: up to {LONGEST} have an integer form")
    v = within(refined(uniform(v)), 2**30 - 1)
    codes = v.codes - mean(v.codes, axes) if centered else v.codes
    reach = largest(lax.abs(codes), axes)
    added = epsilon / float(v.scale.max()) ** 2
    least = max(0, math.ceil(math.log2(added) / 2)) if added else 0
    if least > 31:
        raise Refusal(f"is a norm beside whose epsilon, {epsilon:.3g}, its operand is nothing: use a smaller one")
    length = jnp.maximum(32 - lax.clz(reach), least)
    short = _to_length(codes, length)
    # Two sums of fourteen bits each, put together without the last bits, so that int32 holds it.
    down = max(0, math.ceil(math.log2(count)) - 2)
    high, low = sums_of_words(short * short, BITS, axes)
    squares = (high << (BITS - down)) + ((low + (1 << down >> 1)) >> down)
    lengths = np.arange(32, dtype=np.float64)
    table = np.rint(added * 4.0 ** (BITS - lengths) * count / 2**down).clip(0, 2**30 - 1).astype(np.int32)
    squares = squares + jnp.take(jnp.asarray(table), length, mode="clip")
    inverse, up = _inverse_root(squares)
    # The sum is at least 2^(26 - down), which has no more than 5 + down zeros before it.
    most = (5 + down) // 2
    quotient = _rounded_down_by(short * inverse, jnp.maximum(most - up, 0))
    scale = 2.0 ** (most - 31) * math.sqrt(count / 2**down)
    end = ones(min(2**30, math.ceil(math.sqrt(count) * (1 + 2**-12) / scale)), codes.ndim, np.int64)
    return wide(quotient, ones(scale, codes.ndim), -end, end)


def _inverse_root(squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `2^31 / sqrt(squares 4^up)`, of sixteen bits, and up, by which squares fill a word. squares: int32."""
    up = lax.clz(jnp.maximum(squares, 1)) >> 1
    root = isqrt(lax.bitcast_convert_type(squares << (2 * up), jnp.uint32))
    return lax.div(jnp.int32(INT32[1]), jnp.maximum(lax.bitcast_convert_type(root, jnp.int32), 1)), up


def _to_length(codes: jax.Array, length: jax.Array) -> jax.Array:
    """Return codes of at most `length` bits shifted to fourteen, rounded."""
    down = length - BITS
    longer, shorter = _rounded_down_by(codes, jnp.maximum(down, 0)), codes << jnp.maximum(-down, 0)
    return jnp.where(down > 0, longer, shorter)


def _rounded_down_by(codes: jax.Array, n: jax.Array) -> jax.Array:
    """Return `codes / 2^n`, halves up: what is shifted out last is added, so that nothing overflows."""
    return (codes >> n) + jnp.where(n > 0, (codes >> jnp.maximum(n - 1, 0)) & 1, 0)
