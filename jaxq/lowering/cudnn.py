"""Convolution on a GPU: sums in float32, which is all that cuDNN gives out, in parts short enough to be exact.

"CuDNN integer convolutions must have s8 input and f32 or s8 output" (jax issues 7637, 14585). Products of two 8-bit
codes are at most 2^14 in size and float32 holds every integer up to 2^24, so 1024 of them add up exactly in any order.
Longer sums are cut into parts along the input channels, and windows with more taps than that into halves; the parts
are added as int32. Each part is behind a barrier: XLA would put the parts' operands back together, and convolve them in
float32.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.programs.ops import Conv

MOST_TERMS = 2**24 // 2**14
# Tensor cores take channels by 32; a part keeps to that where it can.
ALIGNMENT = 32
# One image of three channels, 32 x 32, was seen to be summed wrongly (on an H200), one of 16 rightly.
FEWEST_CHANNELS = 16

Part = tuple[Conv, jax.Array, jax.Array]


def convolve(op: Conv, image: jax.Array, kernel: jax.Array, then) -> jax.Array:
    """Return int32 sums in the op's output layout."""
    del then
    total = None
    for part, a, b in parts(op, *_filled_up(op, image, kernel)):
        a, b = lax.optimization_barrier((a, b))
        sums = lax.convert_element_type(part.apply(a, b, out_dtype=jnp.float32), jnp.int32)
        total = sums if total is None else lax.add(total, sums)
    return total


def _filled_up(op: Conv, image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the operands with channels of zeros where there is one image of few."""
    missing = FEWEST_CHANNELS - kernel.shape[op.rhs_spec[1]]
    if image.shape[op.lhs_spec[0]] != 1 or missing <= 0:
        return image, kernel

    def filled_up(x: jax.Array, channels: int) -> jax.Array:
        return lax.pad(x, x.dtype.type(0), [(0, missing * (axis == channels), 0) for axis in range(x.ndim)])

    return filled_up(image, op.lhs_spec[1]), filled_up(kernel, op.rhs_spec[1])


def parts(op: Conv, image: jax.Array, kernel: jax.Array) -> Iterator[Part]:
    """Yield convolutions whose sums are short enough, and add up to those of `op`."""
    window = [kernel.shape[axis] for axis in op.rhs_spec[2:]]
    if math.prod(window) <= MOST_TERMS:
        yield from _few_channels(op, image, kernel, math.prod(window))
        return
    longest = window.index(max(window))
    middle = window[longest] // 2
    for start, stop in ((0, middle), (middle, window[longest])):
        part = lax.slice_in_dim(kernel, start, stop, axis=op.rhs_spec[2 + longest])
        yield from parts(_within(op, longest, start, window[longest] - stop), image, part)


def _within(op: Conv, axis: int, before: int, after: int) -> Conv:
    """Return the convolution by a window without `before` and `after` taps: with the padding that they saw less."""
    low, high = op.padding[axis]
    step = op.rhs_dilation[axis]
    padding = (*op.padding[:axis], (low - before * step, high - after * step), *op.padding[axis + 1 :])
    return dataclasses.replace(op, padding=padding)


def _few_channels(op: Conv, image: jax.Array, kernel: jax.Array, taps: int) -> Iterator[Part]:
    channels = kernel.shape[op.rhs_spec[1]]
    most = MOST_TERMS // max(1, taps)
    most -= most % ALIGNMENT if most > ALIGNMENT else 0
    for start in range(0, max(1, channels), most):
        stop = min(start + most, channels)
        a = lax.slice_in_dim(image, start, stop, axis=op.lhs_spec[1])
        yield op, a, lax.slice_in_dim(kernel, start, stop, axis=op.rhs_spec[1])
