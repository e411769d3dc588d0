"""Embedding lookup on codes: gather the codes and, with the same indices, their scales."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.numbers import blocks, packing
from jaxq.numbers.qarray import QArray, as_type
from jaxq.programs.ops import Embedding


def lookup(op: Embedding, table: jax.Array | QArray, indices: Sequence[jax.Array]) -> jax.Array:
    """Return rows of the decoded table. Indices out of bounds give what the op fills with: it is in their scale."""
    if not isinstance(table, QArray):
        return op.apply(table, *indices)
    if not table.format.integer:
        return op.apply(table.decode(), *indices)
    codes, table = _codes(op, table, indices), table.plain()
    if table.zero_point is not None:
        zero = op.apply(_thin(op, table, table.zero_point), *indices, fill_value=0)
        codes = codes.astype(jnp.int32) - zero.astype(jnp.int32)
    scale = op.apply(_thin(op, table, table.scale), *indices)
    rows = codes.astype(jnp.float32) * scale
    return jnp.where(jnp.isinf(scale), rows.astype(op.out_dtype), as_type(rows, op.out_dtype))


def _codes(op: Embedding, table: QArray, indices: Sequence[jax.Array]) -> jax.Array:
    """Return the codes of the rows, unpacked after the lookup where the rows are packed along a whole axis."""
    where = table.packing
    if where is None or where.axis % table.ndim not in op.contracted[0]:
        return op.apply(table.codes, *indices, fill_value=1)
    rows = op.apply(table.stored, *indices, fill_value=packing.byte_of(1, table.format))
    return packing.unpack(rows, table.format, op.output_axis(where.axis % table.ndim), where.length)


def _thin(op: Embedding, table: QArray, per_block: jax.Array) -> jax.Array:
    """Return a per-block array as `Embedding.apply` takes it: full along indexed axes, one or full elsewhere."""
    wide = blocks.spread(per_block, table.shape)
    indexed = (*op.numbers.start_index_map, *op.numbers.operand_batching_dims)
    full = [
        n if g != 1 or axis in indexed else 1 for axis, (n, g) in enumerate(zip(table.shape, wide.shape, strict=True))
    ]
    return jnp.broadcast_to(wide, full)
