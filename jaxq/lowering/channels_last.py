"""Convolution in the one layout that XLA:CPU has a vector kernel for: images [n, h, w, c], kernels [h, w, i, o].

All others, lines and volumes too, run as loops without vectors; so do paddings that make the output larger than the
image. Lines are images of height one. Volumes are a sum over the taps in depth, each a convolution of all planes as
images. Wide paddings are written out.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxq.numbers.blocks import spread_axes
from jaxq.programs.ops import Conv

# A volume's taps in depth become a convolution each.
MOST_PLANES = 64
IMAGE = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def suits(op: Conv, image: Any, kernel: Any) -> bool:
    """Tell whether a dense convolution over one to three axes is none of images, channels last, that do not grow."""
    dense = op.feature_groups == op.batch_groups == 1 and set(op.lhs_dilation) <= {1}
    known = op.has_sizes(image.shape, kernel.shape)
    if not (dense and known and 3 <= len(image.shape) <= 5) or any(spread_axes(image)[1:]):
        return False
    if len(image.shape) == 5 and kernel.shape[op.rhs_spec[2]] > MOST_PLANES:
        return False
    return (op.lhs_spec, op.rhs_spec, op.out_spec) != IMAGE or _grows(op, image.shape, kernel.shape)


def _grows(op: Conv, image: Sequence[int], kernel: Sequence[int]) -> bool:
    """Tell whether an output is larger than its image on some axis, which is to have channels last."""
    spans = [(size - 1) * dilation for size, dilation in zip(kernel[:-2], op.rhs_dilation, strict=True)]
    paddings = zip(image[1:-1], op.padding, spans, op.strides, strict=True)
    return any((n + low + high - 1 - span) // stride + 1 > n for n, (low, high), span, stride in paddings)


def convolve(op: Conv, image: jax.Array, kernel: jax.Array, then) -> jax.Array:
    """Return int32 sums in the op's output layout."""
    batch, feature, *spatial = op.lhs_spec
    out, into, *window = op.rhs_spec
    x = _moved(image, (batch, *spatial, feature), spatial)
    return op.laid_out(_OVER[len(spatial)](op, x, _moved(kernel, (*window, into, out), window), then))


def _adjoin(axes: list[int]) -> bool:
    return axes == [*range(axes[0], axes[0] + len(axes))]


def _moved(x: jax.Array, order: tuple[int, ...], space: list[int]) -> jax.Array:
    """Return `x` transposed with its spatial axes as one: XLA would make a mere transposition part of the loops."""
    if order == (*range(x.ndim),):
        return x
    if not _adjoin(space):
        first = (*(axis for axis in order if axis not in space), *space)
        x, order = lax.transpose(x, first), tuple(first.index(axis) for axis in order)
        space = [first.index(axis) for axis in space]
    shape = [x.shape[axis] for axis in order]
    merged = [math.prod(x.shape[a] for a in space) if axis == space[0] else n for axis, n in enumerate(x.shape)]
    rest = [axis for axis in range(x.ndim) if axis not in space[1:]]
    x = lax.reshape(x, [merged[axis] for axis in rest])
    return lax.reshape(lax.transpose(x, [rest.index(axis) for axis in order if axis in rest]), shape)


def _line(op: Conv, x: jax.Array, kernel: jax.Array, then) -> jax.Array:
    flat = dataclasses.replace(
        _image_op(op), strides=(1, *op.strides), padding=((0, 0), *op.padding), rhs_dilation=(1, *op.rhs_dilation)
    )
    return lax.squeeze(_image(flat, lax.expand_dims(x, (1,)), lax.expand_dims(kernel, (0,)), then), (1,))


def _image(op: Conv, x: jax.Array, kernel: jax.Array, then) -> jax.Array:
    op = _image_op(op)
    if _grows(op, x.shape, kernel.shape):
        # Rows and channels as one axis: XLA would take a padding of the image itself back into the convolution.
        (n, h, w, c), (vertical, (low, high)) = x.shape, op.padding
        x = lax.pad(lax.reshape(x, (n, h, w * c)), x.dtype.type(0), [(0, 0, 0), (*vertical, 0), (low * c, high * c, 0)])
        x = lax.reshape(x, (n, x.shape[1], x.shape[2] // c, c))
        op = dataclasses.replace(op, padding=((0, 0), (0, 0)))
    return then(op, x, kernel)


def _volume(op: Conv, x: jax.Array, kernel: jax.Array, then) -> jax.Array:
    plane = dataclasses.replace(
        _image_op(op), strides=op.strides[1:], padding=op.padding[1:], rhs_dilation=op.rhs_dilation[1:]
    )
    low, high = op.padding[0]
    x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), (low, high, 0), *[(0, 0, 0)] * 3])
    span = (kernel.shape[0] - 1) * op.rhs_dilation[0] + 1
    depth = max(0, (x.shape[1] - span) // op.strides[0] + 1)
    total = None
    for tap in range(kernel.shape[0]):
        start = tap * op.rhs_dilation[0] if depth else 0
        stop = start + (depth - 1) * op.strides[0] + 1 if depth else 0
        planes = lax.slice_in_dim(x, start, stop, op.strides[0], axis=1)
        images = lax.reshape(planes, (x.shape[0] * depth, *x.shape[2:]))
        sums = _image(plane, images, lax.index_in_dim(kernel, tap, 0, keepdims=False), then)
        total = sums if total is None else lax.add(total, sums)
    return lax.reshape(total, (x.shape[0], depth, *total.shape[1:]))


_OVER = {1: _line, 2: _image, 3: _volume}


def _image_op(op: Conv) -> Conv:
    lhs, rhs, out = IMAGE
    return dataclasses.replace(op, lhs_spec=lhs, rhs_spec=rhs, out_spec=out, lhs_dilation=(1, 1))
