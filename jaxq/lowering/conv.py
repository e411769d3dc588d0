"""Integer `conv_general_dilated`: int8 x int8 -> int32 in every layout, zero points included."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.lowering import forms
from jaxq.lowering.codes import signed
from jaxq.lowering.dequantize import joint_scale
from jaxq.numbers.qarray import QArray
from jaxq.programs.ops import Conv


def integer_conv(op: Conv, lhs: QArray, rhs: QArray) -> tuple[jax.Array, jax.Array]:
    """Return int32 sums in the op's output layout and a float32 scale that broadcasts against them."""
    (a, za), (b, zb) = signed(lhs), signed(rhs)
    acc = _sums(op, a, b)
    if za is not None:
        acc = acc - _image(op, za) * sums_of_kernel(op, a.shape, b, acc.shape)
    if zb is not None:
        acc = acc - _kernel(op, zb) * _sums(op, a, jnp.ones_like(b))
    if za is not None and zb is not None:
        acc = acc + _image(op, za) * _kernel(op, zb) * sums_of_kernel(op, a.shape, jnp.ones_like(b), acc.shape)
    return acc, joint_scale(_image(op, lhs.scale), _kernel(op, rhs.scale), acc.shape)


def sums_of_kernel(op: Conv, image: Sequence[int], kernel: jax.Array, out: Sequence[int]) -> jax.Array:
    """Return what an image of ones, of the shape `image`, would give: int32 in the output's layout, of one image.

    out: the shape of the convolution's output.

    Padding is zero in codes, so a zero point counts only for the taps that lie inside the image. Sums are taken axis by
    axis, without a convolution: that of one image would cost as much as the product itself at batch 1, and cuDNN's was
    wrong for three channels.
    """
    features, into, *window = op.rhs_spec
    channels = lax.convert_element_type(kernel, jnp.int32).sum(into, keepdims=True)
    sums = lax.transpose(channels, (into, *window, features))  # [1, *window, features]
    for axis, inside in enumerate(_inside(op, image, kernel.shape, out), 1):
        if inside is None:
            sums = sums.sum(axis, keepdims=True)
            continue
        taps = lax.expand_dims(sums, (axis,))  # [1, ..., 1, taps, ..., features]
        mask = lax.expand_dims(inside, (*range(axis), *range(axis + 2, taps.ndim)))
        sums = jnp.where(mask, taps, 0).sum(axis + 1)
    return op.laid_out(sums)


def _inside(op: Conv, image: Sequence[int], kernel: Sequence[int], out: Sequence[int]) -> Iterator[jax.Array | None]:
    """Yield for each axis of space which taps lie inside the image, [outputs, taps]; None where all of them do."""
    for axis, (low, high) in enumerate(op.padding):
        size, taps, outputs = (
            shape[spec[2 + axis]] for shape, spec in ((image, op.lhs_spec), (kernel, op.rhs_spec), (out, op.out_spec))
        )
        step, spread = op.lhs_dilation[axis], op.rhs_dilation[axis]
        if low <= 0 and high <= 0 and step == 1:
            yield None
            continue
        span = (size - 1) * step + 1
        first = lax.broadcasted_iota(jnp.int32, (outputs, taps), 0) * op.strides[axis] - low
        position = first + lax.broadcasted_iota(jnp.int32, (outputs, taps), 1) * spread
        yield (position >= 0) & (position < span) & (position % step == 0)


def _sums(op: Conv, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the int32 convolution of codes."""
    return forms.sums(dataclasses.replace(op, precision=None), a, b)


def to_output(op: Conv, x: jax.Array, side: int, ranks: tuple[int, int]) -> jax.Array:
    """Return a per-image (side 0) or per-output-channel array in the output's layout, ones elsewhere."""
    del ranks
    return _kernel(op, x) if side else _image(op, x)


def _image(op: Conv, x: jax.Array) -> jax.Array:
    """Return a per-image array, ones on all axes but the batch, in the output's layout."""
    return lax.reshape(x, [x.size if axis == op.out_spec[0] else 1 for axis in range(x.ndim)])


def _kernel(op: Conv, x: jax.Array) -> jax.Array:
    """Return a per-output-channel array, ones elsewhere, in the output's layout."""
    return lax.reshape(x, [x.size if axis == op.out_spec[1] else 1 for axis in range(x.ndim)])
