"""Embedding lookup: `gather` of whole rows of a table at indices that are data, or one `dynamic_slice` of it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.programs import jaxpr


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A lookup; axes of the table that are taken whole share a scale, axes that are indexed keep one per index.

    separate: the indices come as one scalar for every axis of the table, as those of a `dynamic_slice` do.
    """

    numbers: Any
    slice_sizes: tuple[int, ...]
    mode: Any
    fill_value: Any
    unique_indices: bool
    indices_are_sorted: bool
    table_shape: tuple[int, ...]
    out_dtype: Any
    separate: bool = False

    name: ClassVar[str] = "embedding"
    operands: ClassVar[int] = 1

    @staticmethod
    def read(eqn: jaxpr.Eqn) -> "Embedding":
        p = eqn.params
        return Embedding(
            p["dimension_numbers"],
            tuple(p["slice_sizes"]),
            p["mode"],
            p["fill_value"],
            p["unique_indices"],
            p["indices_are_sorted"],
            tuple(eqn.invars[0].aval.shape),
            eqn.outvars[0].aval.dtype,
        )

    @staticmethod
    def read_slice(eqn: jaxpr.Eqn) -> "Embedding":
        """Return a `dynamic_slice` as the `gather` that it is: indices out of bounds are moved inside."""
        shape, sizes = tuple(eqn.invars[0].aval.shape), tuple(eqn.params["slice_sizes"])
        indexed = tuple(axis for axis, (size, n) in enumerate(zip(sizes, shape, strict=True)) if size != n)
        numbers = lax.GatherDimensionNumbers(tuple(range(len(shape))), (), indexed)
        clip, dtype = lax.GatherScatterMode.CLIP, eqn.outvars[0].aval.dtype
        return Embedding(numbers, sizes, clip, None, True, True, shape, dtype, separate=True)

    @property
    def contracted(self) -> tuple[tuple[int, ...]]:
        """Axes of the table that every lookup takes whole."""
        whole = zip(self.slice_sizes, self.table_shape, strict=True)
        indexed = self.numbers.start_index_map
        return (tuple(a for a, (size, n) in enumerate(whole) if size == n and (n > 1 or a not in indexed)),)

    def terms(self, shapes) -> int:
        """Nothing is summed."""
        del shapes
        return 0

    def reuse(self, shapes, out_shape) -> tuple[int, ...]:
        """Nothing is multiplied."""
        del shapes, out_shape
        return (0,)

    def output_axis(self, axis: int) -> int:
        """Return where a whole axis of the table is in the output."""
        gone = (*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims)
        return self.numbers.offset_dims[axis - sum(other < axis for other in gone)]

    def apply(self, table: jax.Array, *indices, out_dtype=None, fill_value=None) -> jax.Array:
        """Look up in a plain array, or in one whose whole axes have another size: scales, packed codes."""
        del out_dtype
        (whole,), pairs = self.contracted, zip(self.slice_sizes, table.shape, strict=True)
        return lax.gather(
            table,
            jnp.stack([indices[axis] for axis in self.numbers.start_index_map]) if self.separate else indices[0],
            self.numbers,
            tuple(n if axis in whole else min(size, n) for axis, (size, n) in enumerate(pairs)),
            mode=self.mode,
            fill_value=self.fill_value if fill_value is None else fill_value,
            unique_indices=self.unique_indices,
            indices_are_sorted=self.indices_are_sorted,
        )
