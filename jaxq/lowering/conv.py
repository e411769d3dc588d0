"""Integer `conv_general_dilated`: int8 x int8 -> int32 in every layout, zero points included."""

import dataclasses

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
        # Padding is zero in codes, so it must not be corrected: convolve where the image is, not where padding is.
        one = op.batch_groups  # images of different groups go to different outputs
        inside = jnp.ones([one if axis == op.lhs_spec[0] else n for axis, n in enumerate(a.shape)], jnp.int8)
        acc = acc - _image(op, za) * _sums(op, inside, b)
    if zb is not None:
        acc = acc - _kernel(op, zb) * _sums(op, a, jnp.ones_like(b))
    if za is not None and zb is not None:
        acc = acc + _image(op, za) * _kernel(op, zb) * _sums(op, inside, jnp.ones_like(b))
    return acc, joint_scale(_image(op, lhs.scale), _kernel(op, rhs.scale), acc.shape)


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
