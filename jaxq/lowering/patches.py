"""Convolution as patches and one dot: the fast form where there are few input channels to a window.

A first layer's convolution (3 channels) has no vector kernel in int8; gathering its patches costs little, because there
are few of them to a pixel, and one dot product does the rest. Exact, like every kernel here.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.numbers.blocks import spread_axes
from jaxq.programs.ops import Conv

MOST_CHANNELS = 4
MOST_TAPS = 64


def suits(op: Conv, image: Any, kernel: Any) -> bool:
    """Tell whether a convolution is better written as patches and a dot."""
    taps = math.prod(kernel.shape[axis] for axis in op.rhs_spec[2:])
    dense = op.feature_groups == 1 and op.batch_groups == 1 and set(op.lhs_dilation) <= {1}
    known = op.has_sizes(image.shape, kernel.shape)
    few = dense and known and image.shape[op.lhs_spec[1]] <= MOST_CHANNELS and taps > 1
    return few and (taps <= MOST_TAPS or _are_tiles(op, image, kernel))


def _are_tiles(op: Conv, image: Any, kernel: Any) -> bool:
    """Tell whether windows lie side by side, in an image that may be cut up."""
    side_by_side = op.strides == tuple(kernel.shape[axis] for axis in op.rhs_spec[2:]) and set(op.rhs_dilation) <= {1}
    return side_by_side and not any(spread_axes(image))


def convolve(op: Conv, image: jax.Array, kernel: jax.Array, then) -> jax.Array:
    """Return int32 sums in the op's output layout."""
    del then
    batch, feature, *spatial = op.lhs_spec
    out, into, *window = op.rhs_spec
    x = lax.transpose(image, (batch, *spatial, feature))
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in op.padding), (0, 0, 0)))
    sizes = [kernel.shape[axis] for axis in window]
    lengths = tap_lengths(op, x, sizes)
    weights = lax.transpose(kernel, (*window, into, out)).reshape(-1, kernel.shape[out])
    rank = x.ndim
    numbers = (((rank - 1,), (0,)), ((), ()))
    seen = _tiles(x, sizes, lengths) if _are_tiles(op, image, kernel) else _taps(op, x, sizes, lengths)
    sums = lax.dot_general(seen, weights, numbers, preferred_element_type=jnp.int32)
    return op.laid_out(sums)


def _taps(op: Conv, x: jax.Array, sizes: list[int], lengths: list[int]) -> jax.Array:
    """Return what each window sees, [batch, *output, taps and channels], tap by tap."""
    offsets = itertools.product(*(range(size) for size in sizes))
    return lax.concatenate([tap_of(op, x, offset, lengths) for offset in offsets], x.ndim - 1)


def _tiles(x: jax.Array, sizes: list[int], lengths: list[int]) -> jax.Array:
    """Return the same where windows lie side by side: the image, cut up."""
    ends = [size * length for size, length in zip(sizes, lengths, strict=True)]
    x = lax.slice(x, (0,) * x.ndim, (x.shape[0], *ends, x.shape[-1]))
    split = [n for pair in zip(lengths, sizes, strict=True) for n in pair]
    axes = range(1, 2 * len(sizes) + 1)
    x = lax.transpose(lax.reshape(x, (x.shape[0], *split, x.shape[-1])), (0, *axes[::2], *axes[1::2], len(axes) + 1))
    return lax.reshape(x, (x.shape[0], *lengths, math.prod(sizes) * x.shape[-1]))


def tap_lengths(op: Conv, x: jax.Array, sizes: list[int]) -> list[int]:
    """Return the output's spatial sizes for a padded image [batch, *spatial, channels] and a window of `sizes`."""
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(sizes, op.rhs_dilation, strict=True)]
    return [max(0, (n - s) // t + 1) for n, s, t in zip(x.shape[1:-1], spans, op.strides, strict=True)]


def tap_of(op: Conv, x: jax.Array, offset: tuple[int, ...], lengths: list[int]) -> jax.Array:
    """Return the pixels that one tap of the window sees, [batch, *output, channels]."""
    starts = [o * d if n else 0 for o, d, n in zip(offset, op.rhs_dilation, lengths, strict=True)]
    stops = [start + (n - 1) * t + 1 if n else start for start, n, t in zip(starts, lengths, op.strides, strict=True)]
    return lax.slice(x, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *op.strides, 1))
