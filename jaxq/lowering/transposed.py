"""Transposed convolution as one plain convolution for each phase of the output.

An image dilated by d holds d - 1 zeros between its pixels, and a window meets pixels at every d-th tap only. Outputs
whose position has the same remainder by d meet the same taps: they are a plain convolution of the image with those taps
(sub-pixel convolution, Shi et al. 2016, section 3). The phases, interleaved, are the output. There are no products with
zeros left, and no dilated image.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.programs.ops import Conv


class Phase(NamedTuple):
    """The taps that one phase of an output axis meets, and the padding of the image for them."""

    first: int
    taps: int
    padding: tuple[int, int]


def suits(op: Conv, image: Any, kernel: Any) -> bool:
    """Tell whether the image is dilated, with outputs at every position, and sizes are known."""
    space = [image.shape[axis] for axis in op.lhs_spec[2:]]
    known = all(isinstance(n, int) for n in space) and 0 not in (*space, *kernel.shape)
    plain = set(op.strides) <= {1} and set(op.rhs_dilation) <= {1}
    return plain and known and op.batch_groups == 1 and max(op.lhs_dilation, default=1) > 1


def convolve(op: Conv, image: jax.Array, kernel: jax.Array, then) -> jax.Array:
    """Return int32 sums in the op's output layout."""
    steps, sizes = op.lhs_dilation, _output_sizes(op, image, kernel)
    cells = [-(-size // step) for size, step in zip(sizes, steps, strict=True)]
    sums = []
    for corner in itertools.product(*(range(step) for step in steps)):
        phases = [_phase(op, image, kernel, axis, *pair) for axis, pair in enumerate(zip(corner, cells, strict=True))]
        sums.append(_of_phases(op, image, kernel, phases, cells, then))
    return _interleaved(op, sums, cells, sizes)


def _output_sizes(op: Conv, image: jax.Array, kernel: jax.Array) -> list[int]:
    shape = jax.eval_shape(lambda a, b: op.apply(a, b, out_dtype=jnp.int32), image, kernel).shape
    return [shape[axis] for axis in op.out_spec[2:]]


def _phase(op: Conv, image: jax.Array, kernel: jax.Array, axis: int, offset: int, cells: int) -> Phase:
    """Return the phase of outputs `offset + d * n`: tap k meets pixel `(offset + d * n + k - low) / d`, if whole."""
    step, low = op.lhs_dilation[axis], op.padding[axis][0]
    first = (low - offset) % step
    taps = len(range(first, kernel.shape[op.rhs_spec[2 + axis]], step))
    before = (low - offset - first) // step
    return Phase(first, taps, (before, cells + taps - 1 - image.shape[op.lhs_spec[2 + axis]] - before))


def _of_phases(op: Conv, image, kernel, phases: list[Phase], cells: list[int], then) -> jax.Array:
    """Return the sums of one phase on every axis: zeros where it meets no tap."""
    if not all(phase.taps for phase in phases) or 0 in cells:
        space = dict(zip(op.out_spec[2:], cells, strict=True))
        ends = {op.out_spec[0]: image.shape[op.lhs_spec[0]], op.out_spec[1]: kernel.shape[op.rhs_spec[0]]}
        return jnp.zeros([{**space, **ends}[axis] for axis in range(image.ndim)], jnp.int32)
    for axis, phase in zip(op.rhs_spec[2:], phases, strict=True):
        step = op.lhs_dilation[op.rhs_spec[2:].index(axis)]
        kernel = lax.slice_in_dim(kernel, phase.first, kernel.shape[axis], step, axis)
    ones = (1,) * len(phases)
    plain = dataclasses.replace(op, padding=tuple(p.padding for p in phases), lhs_dilation=ones)
    return then(plain, image, kernel)


def _interleaved(op: Conv, sums: list[jax.Array], cells: list[int], sizes: list[int]) -> jax.Array:
    """Return the phases, in the order of their corners, one beside the other along every spatial axis."""
    for axis in reversed(range(len(cells))):
        step, where = op.lhs_dilation[axis], op.out_spec[2 + axis]
        rows = [sums[n : n + step] for n in range(0, len(sums), step)]
        sums = [_zipped(row, where) for row in rows]
    (whole,) = sums
    for axis, size in zip(op.out_spec[2:], sizes, strict=True):
        whole = lax.slice_in_dim(whole, 0, size, axis=axis)
    return whole


def _zipped(parts: list[jax.Array], axis: int) -> jax.Array:
    """Return arrays interleaved along an axis: element n of part p at `n * len(parts) + p`."""
    stacked = lax.concatenate([lax.expand_dims(part, (axis + 1,)) for part in parts], axis + 1)
    shape = parts[0].shape
    return lax.reshape(stacked, (*shape[:axis], shape[axis] * len(parts), *shape[axis + 1 :]))
