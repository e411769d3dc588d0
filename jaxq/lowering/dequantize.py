"""From int32 sums to real numbers: one product with the scale, the only float arithmetic after a kernel."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers.blocks import hide

LARGEST = np.finfo(np.float32).max


def dequantize(acc: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `acc * scale` in float32; a product of two huge scales saturates, so that zero stays zero."""
    saturated = lax.select(lax.eq(scale, np.float32(np.inf)), lax.full_like(scale, LARGEST), scale)
    return lax.mul(lax.convert_element_type(acc, jnp.float32), saturated)


def joint_scale(left: jax.Array, right: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return the scale of sums of `shape`, whose operands' scales are `left` and `right`, both broadcast against it.

    It is computed once and kept, if it is smaller than the sums; XLA would compute it again for every one of them.
    """
    pairs = zip(left.shape, right.shape, shape, strict=True)
    whole = all(a != 1 or b != 1 for a, b, n in pairs if n != 1)
    return lax.mul(hide(left), hide(right)) if whole else hide(lax.mul(left, right))
