"""Embedding lookup: the codes of the rows, times whole numbers that bring the rows' scales together.

A table has a scale for each row, which differ by what is looked up: a row's scale is a multiple, of up to 2^20, of one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.picks import check_filling
from jaxq.integer.values import Coded, Refusal, ones, wide
from jaxq.lowering.embedding import each
from jaxq.numbers.qarray import QArray
from jaxq.programs.ops import Embedding

MULTIPLE = 2**20


def lookup(op: Embedding, table: QArray, indices: Sequence[jax.Array]) -> Coded:
    """Return rows of a table in int32; zeros where an index is out of bounds and the program has NaN."""
    if table.scale is None or table.zero_point is not None or table.codes.dtype != jnp.int8:
        raise Refusal("looks up rows that are no symmetric integers: use jaxq.int8()")
    check_filling(op.mode, op.fill_value)
    rows = lax.convert_element_type(op.apply(table.codes, *indices, fill_value=0), jnp.int32)
    with jax.ensure_compile_time_eval():
        scale = np.asarray(table.real_scale(), np.float64)
        codes = np.asarray(table.codes)
    largest, end = float(scale.max(initial=0.0)) or 1.0, int(np.abs(codes.astype(np.int64)).max(initial=0))
    multiple = 1 if scale.size == 1 else MULTIPLE
    if scale.size > 1:
        multiples = jnp.asarray(np.rint(scale / largest * multiple), jnp.int32)
        rows = rows * each(op, table, multiples, indices, rows.shape)
    reach = ones(end * multiple, rows.ndim, np.int64)
    return wide(rows, ones(largest / multiple, rows.ndim), -reach, reach)
