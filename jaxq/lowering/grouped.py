"""Grouped convolution, group by group: the fast form on a CPU, and on a GPU the right one.

XLA:CPU has no vector kernel for groups. cuDNN's integer convolutions with groups compile and return a wrong channel
(openxla/xla issue 49123). A convolution for each group has neither trouble.
"""

import dataclasses
from typing import Any

import jax
from jax import lax

from jaxq.programs.ops import Conv


def suits(op: Conv, image: Any, kernel: Any) -> bool:
    """Tell whether there are groups, and something in them."""
    return op.feature_groups > 1 and 0 not in (image.shape[op.lhs_spec[1]], kernel.shape[op.rhs_spec[0]])


def convolve(op: Conv, image: jax.Array, kernel: jax.Array, then) -> jax.Array:
    """Return the sums of every group side by side."""
    groups = op.feature_groups
    single = dataclasses.replace(op, feature_groups=1)
    images, kernels = _split(image, groups, op.lhs_spec[1]), _split(kernel, groups, op.rhs_spec[0])
    sums = [then(single, a, b) for a, b in zip(images, kernels, strict=True)]
    return lax.concatenate(sums, op.out_spec[1])


def _split(x: jax.Array, parts: int, axis: int) -> list[jax.Array]:
    size = x.shape[axis] // parts
    return [lax.slice_in_dim(x, n * size, (n + 1) * size, axis=axis) for n in range(parts)]
