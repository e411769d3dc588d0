"""Means of absolute values that come out the same in every program: sums of integers, which have no order.

A float sum depends on how a compiler vectorizes the program around it, and a scale that is one would differ between
training and serving. Here every block is scaled by a power of two, cut into limbs of a few bits, and added up exactly;
so neither huge nor tiny numbers overflow or vanish.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FRACTION = 26
# How many limbs of how many bits fit into an int32 sum: short rows take half of the reductions.
WIDE, MOST_WIDE = 14, 2**16
LIMB, MOST = 7, 2**23


def mean_abs(rows: jax.Array, chosen: jax.Array | None = None) -> jax.Array:
    """Return `E|x|` of every row, of the `chosen` elements only: [blocks, n] -> float32 [blocks]; 0 of nothing.

    NaN and infinity give NaN. Exact but for 2^-26 of the largest element and two roundings.

    >>> mean_abs(jnp.array([[1.0, -3.0], [3e38, 3e38]])).tolist() == [2.0, float(np.float32(3e38))]
    True
    """
    if 0 in rows.shape:
        return jnp.zeros(rows.shape[0], jnp.float32)
    size = lax.abs(lax.convert_element_type(rows, jnp.float32))
    if chosen is None:
        chosen, share = lax.full_like(size, True, jnp.bool_), jnp.float32(2.0**-FRACTION / rows.shape[1])
    else:
        count = lax.convert_element_type(lax.reduce_sum(lax.convert_element_type(chosen, jnp.int32), (1,)), jnp.float32)
        share = lax.div(np.float32(2.0**-FRACTION), lax.max(count, np.float32(1)))
    bad = lax.reduce_or(lax.bitwise_not(lax.is_finite(size)), (1,))
    power = power_of(lax.reduce_max(lax.select(lax.is_finite(size), size, lax.full_like(size, 0)), (1,)))
    unit = lax.mul(size, jnp.broadcast_to(lax.div(np.float32(1), power)[:, None], size.shape))
    unit = lax.select(lax.bitwise_and(chosen, lax.is_finite(unit)), unit, lax.full_like(unit, 0))
    steps = lax.convert_element_type(lax.round(lax.mul(unit, np.float32(2**FRACTION))), jnp.int32)
    total = jnp.zeros(rows.shape[0], jnp.float32)
    for start in range(0, rows.shape[1], MOST):
        total = lax.add(total, _sum(lax.slice_in_dim(steps, start, min(start + MOST, rows.shape[1]), axis=1)))
    # The constants first, as one: a division by a constant would be a product in one program and not in another, and a
    # small power times a constant may be subnormal.
    mean = lax.mul(lax.mul(total, share), power)
    return lax.select(bad, lax.full_like(mean, np.nan), mean)


def power_of(width: jax.Array) -> jax.Array:
    """Return the power of two at or below a finite width, from 2^-126 to 2^126: normal, like its reciprocal."""
    bits = lax.bitwise_and(lax.bitcast_convert_type(width, jnp.int32), np.int32(0x7F800000))
    return lax.clamp(np.float32(2.0**-126), lax.bitcast_convert_type(bits, jnp.float32), np.float32(2.0**126))


def _sum(steps: jax.Array) -> jax.Array:
    """Return the sums of non-negative int32 below 2^28 as float32, exact until they are put together from limbs."""
    width = WIDE if steps.shape[1] <= MOST_WIDE else LIMB
    total = jnp.zeros(steps.shape[0], jnp.float32)
    for shift in range(28 - width, -1, -width):
        limb = lax.bitwise_and(lax.shift_right_logical(steps, np.int32(shift)), np.int32(2**width - 1))
        part = lax.convert_element_type(lax.reduce_sum(limb, (1,)), jnp.float32)
        total = lax.add(lax.mul(total, np.float32(2**width)), part)  # a product with a power of two is exact
    return total
