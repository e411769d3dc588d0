"""Embedding lookup on codes: gather the codes and, with the same indices, what they are decoded with.

Only the rows that are looked up are unpacked and decoded, whatever the format.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import blocks, packing
from jaxq.numbers.qarray import QArray, as_type
from jaxq.programs.ops import Embedding


def lookup(op: Embedding, table: jax.Array | QArray, indices: Sequence[jax.Array]) -> jax.Array:
    """Return rows of the decoded table. Indices out of bounds give what the op fills with."""
    if not isinstance(table, QArray):
        return op.apply(table, *indices)
    codes = _codes(op, table, indices)
    rows = as_type((_centroids if table.scale is None else _scaled)(op, table, codes, indices), op.out_dtype)
    if op.mode != lax.GatherScatterMode.FILL_OR_DROP:
        return rows
    there = each(op, table, jnp.ones((1,) * table.ndim, jnp.bool_), indices, rows.shape)
    filling = np.nan if op.fill_value is None else op.fill_value
    return jnp.where(there, rows, jnp.asarray(filling, op.out_dtype))


def _codes(op: Embedding, table: QArray, indices: Sequence[jax.Array]) -> jax.Array:
    """Return the codes of the rows, unpacked after the lookup where the rows are packed along a whole axis."""
    where = table.packing
    if where is None or where.axis % table.ndim not in op.contracted[0]:
        return op.apply(table.codes, *indices, fill_value=0)
    rows = op.apply(table.stored, *indices, fill_value=0)
    return packing.unpack(rows, table.format, op.output_axis(where.axis % table.ndim), where.length)


def _scaled(op: Embedding, table: QArray, codes: jax.Array, indices: Sequence[jax.Array]) -> jax.Array:
    """Return `scale * (codes - zero_point)` of the rows."""
    if table.zero_point is None:
        values = dataclasses.replace(table, stored=codes, packing=None).values()
    else:
        zero = each(op, table, table.zero_point, indices, codes.shape)
        values = (codes.astype(jnp.int32) - zero.astype(jnp.int32)).astype(jnp.float32)
    return values * each(op, table, table.real_scale(), indices, codes.shape)


def _centroids(op: Embedding, table: QArray, codes: jax.Array, indices: Sequence[jax.Array]) -> jax.Array:
    """Return the centroids of the rows: where a block has centroids of its own, those of each code's block."""
    assert table.table is not None, "a codebook has a table"
    size, place = table.table.shape[-1], codes.astype(jnp.int32)
    if table.table.size > size:
        first = size * jnp.arange(table.table.size // size, dtype=jnp.int32).reshape(table.grid)
        place = place + each(op, table, first, indices, codes.shape)
    return jnp.take(table.table.reshape(-1), place, mode="clip")


def each(op: Embedding, table: QArray, per_block: jax.Array, indices: Sequence[jax.Array], shape: tuple) -> jax.Array:
    """Return what the blocks have, for the rows that are looked up: an array that broadcasts against `shape`."""
    indexed = (*op.numbers.start_index_map, *op.numbers.operand_batching_dims)
    pairs = zip(table.shape, per_block.shape, strict=True)
    full = [n if axis in indexed else g for axis, (n, g) in enumerate(pairs)]
    return blocks.spread(op.apply(jnp.broadcast_to(per_block, full), *indices, fill_value=0), shape)
