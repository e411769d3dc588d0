"""Depthwise convolution as shifted products: the fast form where every output channel sees one input channel.

There is nothing to sum over but the taps of the window, so no matrix unit and no vector kernel of a convolution helps.
A product for each tap and a sum fuse into one loop over the channels, which compilers vectorize. Exact, as all kernels.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.lowering.patches import tap_lengths, tap_of
from jaxq.numbers.blocks import hide
from jaxq.programs.ops import Conv

MOST_TAPS = 128


def suits(op: Conv, image: Any, kernel: Any) -> bool:
    """Tell whether a convolution is depthwise, and small enough in its window."""
    taps = math.prod(kernel.shape[axis] for axis in op.rhs_spec[2:])
    single = op.feature_groups > 1 and kernel.shape[op.rhs_spec[1]] == 1
    known = op.has_sizes(image.shape, kernel.shape)
    return single and known and op.batch_groups == 1 and set(op.lhs_dilation) <= {1} and taps <= MOST_TAPS


def convolve(op: Conv, image: jax.Array, kernel: jax.Array, then) -> jax.Array:
    """Return int32 sums in the op's output layout."""
    del then
    batch, feature, *spatial = op.lhs_spec
    out, into, *window = op.rhs_spec
    x = lax.transpose(image, (batch, *spatial, feature))
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in op.padding), (0, 0, 0)))
    # Kept: a slice that padding does not reach would be what was padded, computed for it once more.
    x = hide(x)
    weights = lax.transpose(kernel, (*window, into, out)).astype(jnp.int16)
    channels, copies = x.shape[-1], kernel.shape[out] // x.shape[-1]
    lengths = tap_lengths(op, x, [kernel.shape[axis] for axis in window])
    sums = jnp.zeros((x.shape[0], *lengths, channels * copies), jnp.int32)
    for offset in itertools.product(*(range(kernel.shape[axis]) for axis in window)):
        # A product of two 8-bit codes fits in 16 bits, where vectors are twice as wide as in 32.
        pixels = jnp.repeat(tap_of(op, x, offset, lengths).astype(jnp.int16), copies, axis=-1)
        row = lax.reshape(weights[offset], (1,) * (x.ndim - 1) + (channels * copies,))
        sums = sums + lax.mul(pixels, jnp.broadcast_to(row, pixels.shape)).astype(jnp.int32)
    return op.laid_out(sums)
