"""From real numbers to codes and back to their neighbours: one encoder per family of formats.

`encode` gives an array's codes by a static range, or by its own where there is none; `inside` says where a
straight-through gradient passes, which is where a value was not clipped. Integers and fixed point are in `affine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import affine, blocks, codebooks, floats, lloyd, means, microscaling, packing
from jaxq.numbers.affine import Affine
from jaxq.numbers.calibrators import Range
from jaxq.numbers.fits import MeanAbs
from jaxq.numbers.formats import Binary, Codebook, Fixed, Float, Int, Levels, Ternary
from jaxq.numbers.qarray import Packing, QArray
from jaxq.numbers.scaling import Microscale, Nested

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer

Grid = tuple[int, ...]


def encode(quantizer: Quantizer, x: jax.Array, grid: Sequence[int], r: Range | None = None) -> QArray:
    """Return the codes of `x`: by the range `r`, whose leaves have the shape `grid`, or by the range of each block."""
    return ENCODERS[type(quantizer.format)](quantizer.format, quantizer, x, tuple(grid), r)


def encode_stochastically(
    quantizer: Quantizer, x: jax.Array, grid: Sequence[int], key: jax.Array, r: Range | None = None
) -> QArray:
    """Return codes rounded up with the probability of the fraction: unbiased where nothing is clipped.

    Raises `TypeError` for formats that are not integers, fixed point or floats of at most 8 bits.
    """
    form = quantizer.format
    if isinstance(form, Float) and form.bits <= 8 and quantizer.scaling is None:
        return _scaled(quantizer, x, tuple(grid), r, form.largest, lambda v: floats.encode(form, v, key))
    if not isinstance(form, (Int, Fixed)) or quantizer.scaling is not None:
        raise TypeError(
            f"integers, fixed point and small floats are rounded stochastically, {quantizer!r} is not: drop key="
        )
    fitted = _affine(quantizer, x, grid, r)
    codes = affine.encode(quantizer, x, fitted, key)
    return QArray(codes, fitted.scale, fitted.zero_point, quantizer.format, x.dtype)


def inside(quantizer: Quantizer, x: jax.Array, q: QArray, r: Range | None = None) -> jax.Array | None:
    """Return where no value of `x` is clipped in its codes `q`, or None where none ever is: gradients pass there.

    Codes of a mean are clipped by intent, and the gradient passes all of them (`MeanAbs`).
    """
    form = quantizer.format
    if isinstance(quantizer.fit, MeanAbs):
        return None
    if isinstance(form, (Int, Fixed)):
        covers = r is None and isinstance(form, Int) and quantizer.fit is None
        if covers and (form.signed or not quantizer.symmetric):
            return None
        return affine.inside(quantizer, x, Affine(q.scale, q.zero_point))
    if r is None:
        return None
    return lax.bitwise_and(*(_beyond(x, end, sign) for end, sign in ((r.lo, -1), (r.hi, 1))))


def _beyond(x: jax.Array, end: jax.Array, sign: int) -> jax.Array:
    """Return where `x` is not beyond one end of a range."""
    wide = blocks.broadcast(end, x.shape)
    values = lax.convert_element_type(x, jnp.float32)
    return lax.le(values, wide) if sign > 0 else lax.ge(values, wide)


# --- integers and fixed point -----------------------------------------------------------------------------------------


def _affine(quantizer: Quantizer, x: jax.Array, grid: Sequence[int], r: Range | None) -> Affine:
    if isinstance(quantizer.format, Fixed):
        return Affine(constant(x, grid, quantizer.format.scale), None)
    return affine.affine_for(quantizer, x, grid) if r is None else affine.affine_of(quantizer, r)


def _integers(form: Int | Fixed, quantizer: Quantizer, x: jax.Array, grid: Grid, r: Range | None) -> QArray:
    if isinstance(quantizer.scaling, Microscale):
        # The largest code is one step short of two: the exponent of the range is that of the second highest bit.
        power = lax.max(_floor_power(_width(x, grid, r), form.bits - 2), affine.TINY)
        codes = affine.encode(quantizer, x, Affine(power, None))
        return QArray(codes, microscaling.to_e8m0(power), None, form, x.dtype)
    fitted = _affine(quantizer, x, grid, r)
    return QArray(affine.encode(quantizer, x, fitted), fitted.scale, fitted.zero_point, form, x.dtype)


def constant(x: jax.Array, grid: Sequence[int], scale: float) -> jax.Array:
    """Return a constant scale, NaN where a block holds NaN or infinity: codes do not show it."""
    bad = lax.convert_element_type(lax.bitwise_not(lax.is_finite(x)), jnp.float32)
    bad = blocks.collapse(bad, grid, lax.reduce_max)
    return lax.select(lax.gt(bad, np.float32(0)), lax.full_like(bad, np.nan), lax.full_like(bad, scale))


# --- signs ------------------------------------------------------------------------------------------------------------


def _binary(form: Binary, quantizer: Quantizer, x: jax.Array, grid: Grid, r: Range | None) -> QArray:
    """`sign(x)` with the mean absolute value as scale: the least squared error (Rastegari et al. 2016, section 3.1)."""
    del r
    codes = lax.select(lax.lt(x, lax.full_like(x, 0)), _ones(x, -1), _ones(x, 1))
    mean = lax.reshape(means.mean_abs(blocks.to_rows(x, grid)), grid)  # zero for zeros, which no code stands for
    return QArray(codes, mean, None, form, x.dtype)


def _ternary(form: Ternary, quantizer: Quantizer, x: jax.Array, grid: Grid, r: Range | None) -> QArray:
    """`sign(x) [|x| > t mean|x|]`, and the mean absolute value of the rest as scale (Li et al. 2016, equation 6)."""
    del r
    size = lax.abs(lax.convert_element_type(x, jnp.float32))
    mean = lax.reshape(means.mean_abs(blocks.to_rows(x, grid)), grid)
    limit = blocks.broadcast(lax.mul(mean, np.float32(form.threshold)), x.shape)
    large = lax.gt(size, limit)
    codes = lax.select(large, lax.select(lax.lt(x, lax.full_like(x, 0)), _ones(x, -1), _ones(x, 1)), _ones(x, 0))
    of_large = lax.reshape(means.mean_abs(blocks.to_rows(size, grid), blocks.to_rows(large, grid)), grid)
    scale = lax.select(lax.eq(of_large, np.float32(0)), mean, of_large)
    return QArray(codes, lax.select(lax.eq(scale, np.float32(0)), lax.full_like(scale, 1), scale), None, form, x.dtype)


def _ones(x: jax.Array, value: int) -> jax.Array:
    return lax.full_like(x, value, jnp.int8)


# --- floating point and tables of levels ------------------------------------------------------------------------------


def _floats(form: Float, quantizer: Quantizer, x: jax.Array, grid: Grid, r: Range | None) -> QArray:
    """Numbers of few bits: 16 bits as they are; fewer scaled so that the range's end is the largest number."""
    if form.bits == 16:
        return QArray(floats.encode(form, x), constant(x, (1,) * x.ndim, 1.0), None, form, x.dtype)
    return _scaled(quantizer, x, grid, r, form.largest, lambda v: floats.encode(form, v))


def _levels(form: Levels, quantizer: Quantizer, x: jax.Array, grid: Grid, r: Range | None) -> QArray:
    """The nearest of a constant table's levels, whose largest is the range's end (Dettmers et al. 2023, section 3)."""
    levels = form.values
    return _scaled(quantizer, x, grid, r, 1.0, lambda v: microscaling.nearest_level(v, levels))


def _scaled(quantizer: Quantizer, x: jax.Array, grid, r: Range | None, largest: float, nearest) -> QArray:
    """Return the codes `nearest(x / scale)` for a scale that takes the range's end to `largest`."""
    width = _width(x, grid, r)
    outer = None
    if isinstance(quantizer.scaling, Microscale):
        scale = microscaling.to_e8m0(_floor_power(width, math.frexp(largest)[1] - 1))
    elif isinstance(quantizer.scaling, Nested):
        scale, outer = _nested(width, largest)
    else:
        scale = affine.step(width, largest)
    q = QArray(x, scale, None, quantizer.format, x.dtype, outer=outer)
    real = blocks.broadcast(q.real_scale(), x.shape)
    values = lax.div(lax.convert_element_type(x, jnp.float32), real)
    codes = nearest(lax.select(lax.eq(real, np.float32(0)), lax.full_like(values, 0), values))
    return QArray(codes, scale, None, quantizer.format, x.dtype, outer=outer)


def _width(x: jax.Array, grid, r: Range | None) -> jax.Array:
    """Return the largest absolute value of every block, infinity for NaN."""
    return affine.width_of(affine.range_of(x, grid) if r is None else r)


def _floor_power(width: jax.Array, emax: int) -> jax.Array:
    """Return `2^(floor(log2 width) - emax)`: MX scales, taken from the range of a block (OCP MX v1.0, section 6.3)."""
    return microscaling.mx_scale(width[..., None], emax, 1)[..., 0]


def _nested(width: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """Return NVFP4's scales: `e4m3(width / largest / t)` of a block and `t = max width / (448 largest)`."""
    if 0 in width.shape:
        return jnp.ones(width.shape, floats.E4M3.storage), jnp.ones((1,) * width.ndim, jnp.float32)
    flat, tensor = microscaling.nvfp4_scales(lax.reshape(width, (width.size,)), 1, largest)
    return lax.reshape(flat, width.shape), lax.reshape(tensor, (1,) * width.ndim)


# --- codebooks --------------------------------------------------------------------------------------------------------


def _codebook(form: Codebook, quantizer: Quantizer, x: jax.Array, grid: Grid, r: Range | None) -> QArray:
    """The nearest of k centroids: those of every block (k-means), or those of a static range."""
    if r is None:
        return by_table(form, x, grid, codebooks.centroids(form, x, grid))
    return by_table(form, x, grid, lax.reshape(r.table, (*grid, form.entries)), r)


def by_table(form: Codebook, x: jax.Array, grid: Grid, table: jax.Array, r: Range | None = None) -> QArray:
    """Return the codes of the nearest of centroids [*grid, entries]: NaN where a block is not finite.

    Numbers as centroids are ascending; vectors run along the last axis, and their codes come packed along it.
    """
    rows = blocks.to_rows(lax.convert_element_type(x, jnp.float32), grid)
    width = jnp.broadcast_to(lax.expand_dims(_width(x, grid, r), (len(grid),)), table.shape)
    table = lax.select(lax.lt(width, np.float32(np.inf)), table, lax.full_like(table, np.nan))
    if form.dim > 1:
        return _by_vectors(form, x, table)
    codes = blocks.from_rows(lloyd.assign(rows, lax.reshape(table, (rows.shape[0], form.size))), grid, x.shape)
    return QArray(codes, None, None, form, x.dtype, table=table)


def _by_vectors(form: Codebook, x: jax.Array, table: jax.Array) -> QArray:
    """Return the codes of the nearest vectors, of one table for all."""
    vectors = lax.reshape(lax.convert_element_type(x, jnp.float32), (x.size // form.dim, form.dim))
    index = lloyd.assign_vectors(vectors, lax.reshape(table, (form.size, form.dim)))
    first = lax.reshape(index, (*x.shape[:-1], x.shape[-1] // form.dim))
    stored = packing.pack_indices(lax.convert_element_type(first, jnp.uint8), form, x.ndim - 1)
    return QArray(stored, None, None, form, x.dtype, table=table, packing=Packing(-1, x.shape[-1]))


ENCODERS: dict[type, Callable[..., QArray]] = {
    Int: _integers,
    Fixed: _integers,
    Binary: _binary,
    Ternary: _ternary,
    Float: _floats,
    Levels: _levels,
    Codebook: _codebook,
}
