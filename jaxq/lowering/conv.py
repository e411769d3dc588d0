"""Integer `conv_general_dilated`: int8 x int8 -> int32 in every layout, zero points included."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.lowering import depthwise, patches
from jaxq.lowering.codes import signed
from jaxq.numbers.qarray import QArray
from jaxq.programs.ops import Conv

# XLA:CPU has no vector kernel for so few channels on both sides; filled up with zero kernels it takes the fast one.
NARROW, WIDE = 16, 32


def integer_conv(op: Conv, lhs: QArray, rhs: QArray) -> tuple[jax.Array, jax.Array]:
    """Return int32 sums in the op's output layout and a float32 scale that broadcasts against them."""
    (a, za), (b, zb) = signed(lhs), signed(rhs)
    acc = _sums(op, a, b)
    if za is not None:
        # Padding is zero in codes, so it must not be corrected: convolve where the image is, not where padding is.
        inside = jnp.ones([1 if axis == op.lhs_spec[0] else n for axis, n in enumerate(a.shape)], jnp.int8)
        acc = acc - _image(op, za) * _sums(op, inside, b)
    if zb is not None:
        acc = acc - _kernel(op, zb) * _sums(op, a, jnp.ones_like(b))
    if za is not None and zb is not None:
        acc = acc + _image(op, za) * _kernel(op, zb) * _sums(op, inside, jnp.ones_like(b))
    return acc, lax.mul(_image(op, lhs.scale), _kernel(op, rhs.scale))


def _sums(op: Conv, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the int32 convolution of codes."""
    if patches.suits(op, a, b):
        return patches.convolve(op, a, b)
    if depthwise.suits(op, a, b):
        return depthwise.convolve(op, a, b)
    plain = dataclasses.replace(op, precision=None)
    outputs = b.shape[op.rhs_spec[0]]
    if not _is_narrow(op, b):
        return plain.apply(a, b, out_dtype=jnp.int32)
    wider = lax.pad(
        b, jnp.zeros((), b.dtype), [(0, WIDE - outputs if n == op.rhs_spec[0] else 0, 0) for n in range(b.ndim)]
    )
    return lax.slice_in_dim(plain.apply(a, wider, out_dtype=jnp.int32), 0, outputs, axis=op.out_spec[1])


def _is_narrow(op: Conv, kernel: jax.Array) -> bool:
    out, into, *window = (kernel.shape[axis] for axis in op.rhs_spec)
    dense = op.feature_groups == op.batch_groups == 1 and max(window, default=1) > 1
    return dense and 0 < out <= NARROW and 0 < into <= NARROW


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
