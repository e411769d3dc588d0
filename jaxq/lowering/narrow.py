"""Convolution with few channels on both sides, filled up with kernels of zeros: the fast form on a CPU.

XLA:CPU has no vector kernel for so few channels on both sides; with more outputs than needed it takes the fast one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.programs.ops import Conv

NARROW, WIDE = 16, 32


def suits(op: Conv, image: Any, kernel: Any) -> bool:
    """Tell whether a dense convolution has few channels on both sides."""
    del image
    out, into, *window = (kernel.shape[axis] for axis in op.rhs_spec)
    dense = op.feature_groups == op.batch_groups == 1 and math.prod(window) > 1
    return dense and 0 < out <= NARROW and 0 < into <= NARROW


def convolve(op: Conv, image: jax.Array, kernel: jax.Array, then) -> jax.Array:
    """Return the sums of the kernels that are not filled in."""
    del then
    axis, outputs = op.rhs_spec[0], kernel.shape[op.rhs_spec[0]]
    filling = [(0, WIDE - outputs if n == axis else 0, 0) for n in range(kernel.ndim)]
    wider = lax.pad(kernel, jnp.zeros((), kernel.dtype), filling)
    return lax.slice_in_dim(op.apply(image, wider, out_dtype=jnp.int32), 0, outputs, axis=op.out_spec[1])
