"""A histogram of fixed size that follows a stream of arrays and merges exactly, whatever their ranges.

The range is a power of two and the number of bins is one too, so that a doubled range joins bins in pairs: no count is
ever split, and what is counted in parts is what is counted at once, bit for bit. Bins mirror each other about zero.

Sharp edges: counts are float32, so that a histogram can be a leaf of a plan: they are exact up to 2^24 per bin and
rounded beyond. What is smaller than a bin is in one of the two next to zero: an outlier of 2048 times the spread leaves
nothing to see of the rest. Zero counts as the smallest positive number.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BINS = 4096
HALF = BINS // 2
HALF_BITS = HALF.bit_length() - 1

# The least exponent, for what holds no value of magnitude above 2^-100 (or none at all): the identity of `merge`.
SMALLEST = -100
# The exponent of what holds NaN or infinity: above that of any number, so that merging keeps it.
NOT_FINITE = 129


class Histogram(NamedTuple):
    """Counts per bin, and the range: `|x| <= 2^exponent`. All leaves are float32.

    counts: [*stack, BINS]; exponent: [*stack], whole numbers. With `width = 2^exponent / HALF`, bin `j + HALF` holds
    `j * width < x <= (j + 1) * width` for `j > 0`, `0 <= x <= width` for `j = 0` and `j * width <= x < (j + 1) * width`
    for `j < 0`: closed away from zero, so that the range's ends are in the last bins.
    """

    counts: Any
    exponent: Any


def empty(stack: tuple[int, ...] = ()) -> Histogram:
    """Return the histogram of no values, NumPy arrays: the identity of `merge`."""
    return Histogram(np.zeros((*stack, BINS), np.float32), np.full(stack, SMALLEST, np.float32))


def of(x: jax.Array) -> Histogram:
    """Count the values of one array of any shape, with the least range that holds them.

    exponent: the least whole `e >= SMALLEST` with `max|x| <= 2^e`; `NOT_FINITE` if there is NaN or infinity among them,
    which are in no particular bin.
    """
    x = lax.convert_element_type(x, jnp.float32).reshape(-1)
    exponent = _exponent(x)
    # Bins are told by the sign of x, not of this product: it may underflow.
    position = x * _power(HALF_BITS - exponent)
    below = jnp.minimum(jnp.floor(position), np.float32(-1))
    above = jnp.maximum(jnp.ceil(position) - np.float32(1), np.float32(0))
    bins = lax.convert_element_type(jnp.where(x < 0, below, above), jnp.int32)
    bins = jnp.clip(bins, -HALF, HALF - 1) + HALF
    counts = jnp.zeros(BINS, jnp.int32).at[bins].add(1, mode="promise_in_bounds")
    return Histogram(lax.convert_element_type(counts, jnp.float32), lax.convert_element_type(exponent, jnp.float32))


def coarsen(h: Histogram, exponent: jax.Array) -> Histogram:
    """Widen the range to `2^exponent`: bin `j` goes to `j >> (exponent - h.exponent)`. Exact.

    exponent: float32 [*stack], at least the histogram's own.
    """
    # All there is to join is joined after HALF_BITS doublings: one bin on either side of zero.
    doublings = jnp.clip(jnp.asarray(exponent) - h.exponent, np.float32(0), np.float32(HALF_BITS))
    times = lax.convert_element_type(doublings, jnp.int32)[..., None]
    counts = jnp.asarray(h.counts)
    for bit in range(HALF_BITS.bit_length()):
        counts = jnp.where((times >> bit) & 1 == 1, _join(counts, 2**bit), counts)
    return Histogram(counts, jnp.asarray(exponent))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """Return the histogram of both: commutative, and associative while counts are below 2^24."""
    exponent = jnp.maximum(a.exponent, b.exponent)
    return Histogram(coarsen(a, exponent).counts + coarsen(b, exponent).counts, exponent)


def merge_axis(h: Histogram) -> Histogram:
    """Return the histogram of all that is stacked along the leading axis."""
    exponent = h.exponent.max(0, initial=SMALLEST)
    everywhere = jnp.broadcast_to(exponent[None], h.exponent.shape)
    return Histogram(coarsen(h, everywhere).counts.sum(0), exponent)


def width(h: Histogram) -> jax.Array:
    """Return the width of a bin, a power of two: float32 [*stack]."""
    return _power(lax.convert_element_type(jnp.asarray(h.exponent), jnp.int32) - HALF_BITS)


def _join(counts: jax.Array, doublings: int) -> jax.Array:
    """Add up runs of `2^doublings` bins; they end up in the middle, in the order they had."""
    runs = BINS >> doublings
    joined = counts.reshape(*counts.shape[:-1], runs, BINS // runs).sum(-1)
    pad = (BINS - runs) // 2
    return jnp.pad(joined, [(0, 0)] * (counts.ndim - 1) + [(pad, pad)])


def _exponent(x: jax.Array) -> jax.Array:
    """Return the exponent of `of`, int32: the bits of a float order as its magnitude does, NaN above infinity."""
    bits = lax.bitcast_convert_type(lax.abs(x), jnp.int32).max(initial=0)
    # A mantissa of zero is a power of two, any other carries into the next exponent.
    exponent = ((jnp.minimum(bits, 0x7F800000) + 0x7FFFFF) >> 23) - 127
    return jnp.where(bits >= 0x7F800000, NOT_FINITE, jnp.maximum(exponent, SMALLEST))


def _power(exponent: jax.Array) -> jax.Array:
    """Return 2^exponent exactly, for the exponents of normal numbers (`exp2` is not exact)."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
