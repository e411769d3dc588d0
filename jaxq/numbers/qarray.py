"""A quantized array: codes, what is needed to decode them, and the format they are in.

`x ~ scale * (codes - zero_point)`, or `scale * table[codes]`. The shape of the scale is the granularity (see `blocks`).
A `QArray` is a pytree, reports the shape and dtype of the float array it stands for, and holds codes of fewer than 8
bits packed when it is at rest (see `packing`). `Dropped` / `Stored` are what else can stand at a leaf of converted
parameters.
"""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import blocks, floats, microscaling, packing, spec
from jaxq.numbers.floats import Float
from jaxq.numbers.formats import Codebook, Format, Levels
from jaxq.numbers.scaling import Microscale, Nested, Scaling


def held_bytes(tree: Any) -> int:
    """Return the bytes that the arrays of `tree` really occupy."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Packing(NamedTuple):
    """Where codes are packed: the axis, counted from the end, and how many codes there are along it."""

    axis: int
    length: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """Codes with their scale: `x ~ scale * (codes - zero_point)`, or `scale * table[codes]`.

    stored: the codes, [*shape] in `format.storage`, or bytes where `packing` says so; scale: each dimension divides the
    codes', float32, or uint8 exponents of two (MX), or float8 to be multiplied by `outer` (NVFP4), or None for
    codebooks; zero_point: in `format.storage`, of the scale's shape, or None for a symmetric array; table: float32
    [*grid, entries] of a codebook's centroids. `dtype` is that of the float array this stands for.

    >>> import jax.numpy as jnp, jaxq
    >>> q = jaxq.int8()(jnp.array([[1.0, -2.0], [0.5, 4.0]]))
    >>> q.shape, q.scale.shape, q.codes.tolist()
    ((2, 2), (1, 2), [[127, -64], [64, 127]])
    """

    stored: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    table: jax.Array | None = None
    outer: jax.Array | None = None
    packing: Packing | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def codes(self) -> jax.Array:
        """The codes, unpacked: [*shape] in `format.storage`."""
        if self.packing is None:
            return self.stored
        return packing.unpack(self.stored, self.format, *self.packing)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.packing is None:
            return self.stored.shape
        axis = self.packing.axis % len(self.stored.shape)
        return tuple(self.packing.length if a == axis else n for a, n in enumerate(self.stored.shape))

    @property
    def grid(self) -> tuple[int, ...]:
        """The granularity: how many blocks there are along each axis."""
        return self.table.shape[:-1] if self.scale is None else self.scale.shape

    @property
    def scaling(self) -> Scaling | None:
        """How the scales are stored."""
        if self.outer is not None:
            return Nested()
        return Microscale() if self.scale is not None and self.scale.dtype == jnp.uint8 else None

    @property
    def ndim(self) -> int:
        return len(self.stored.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales, zero points and tables really occupy."""
        return held_bytes(self)

    def packed(self, skip: int = 0) -> "QArray":
        """Return the same array with codes of fewer than 8 bits packed into bytes, not along the first `skip` axes."""
        axis = None if self.packing else packing.best_axis(self.shape[skip:], self.format)
        if axis is None:
            return self
        axis += skip
        where = Packing(axis - self.ndim, self.shape[axis])
        return dataclasses.replace(self, stored=packing.pack(self.stored, self.format, axis), packing=where)

    def plain(self) -> "QArray":
        """Return the same array as kernels take it: one code to an element, the scale in float32."""
        if self.packing is None and (self.scale is None or self.scale.dtype == jnp.float32):
            return self
        scale = None if self.scale is None else self.real_scale()
        return dataclasses.replace(self, stored=self.codes, packing=None, scale=scale, outer=None)

    def real_scale(self) -> jax.Array:
        """Return the scale as float32, whatever it is stored as."""
        assert self.scale is not None, "codebooks have no scale"
        if self.scale.dtype == jnp.uint8:
            return microscaling.from_e8m0(self.scale)
        scale = lax.convert_element_type(self.scale, jnp.float32)
        return scale if self.outer is None else lax.mul(scale, jnp.broadcast_to(self.outer, scale.shape))

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return `scale * (codes - zero_point)`, computed in float32 and cast to `dtype` (default: its own)."""
        values = self.values()
        if self.scale is not None:
            values = lax.mul(values, blocks.spread(self.real_scale(), self.shape))
        return as_type(values, dtype or self.dtype)

    def values(self) -> jax.Array:
        """Return what the codes stand for before the scale: float32."""
        codes = self.codes
        if isinstance(self.format, Float):
            return floats.decode(self.format, codes)
        if isinstance(self.format, Levels):
            return microscaling.level_values(codes, self.format.values)
        if isinstance(self.format, Codebook):
            assert self.table is not None, "a codebook has a table"
            rows = jnp.take_along_axis(self.table.reshape(-1, self.table.shape[-1]), self._rows(codes), axis=1)
            return blocks.from_rows(rows, self.grid, self.shape)
        values = lax.convert_element_type(codes, jnp.float32)
        if self.zero_point is None:
            return values
        return lax.sub(values, lax.convert_element_type(blocks.spread(self.zero_point, self.shape), jnp.float32))

    def _rows(self, codes: jax.Array) -> jax.Array:
        return lax.convert_element_type(blocks.to_rows(codes, self.grid), jnp.int32)

    def transpose(self, permutation: tuple[int, ...]) -> "QArray":
        """Return the array with its axes, and its scale's, permuted."""

        def move(x):
            return None if x is None else lax.transpose(x, (*permutation, *range(self.ndim, x.ndim)))

        where = self.packing
        if where is not None:
            where = where._replace(axis=permutation.index(where.axis % self.ndim) - self.ndim)
        moved = {name: move(getattr(self, name)) for name in ("stored", "scale", "zero_point", "table", "outer")}
        return dataclasses.replace(self, packing=where, **moved)

    def __repr__(self) -> str:
        name = "table" if self.scale is None else "scale"
        return f"QArray({self.format}{list(self.shape)}, {name} {list(self.grid)}, for {np.dtype(self.dtype)})"


def as_type(values: jax.Array, dtype: Any) -> jax.Array:
    """Return decoded values in `dtype`, saturated: the outermost code may lie a step beyond its largest number."""
    largest = np.float32(min(float(jnp.finfo(dtype).max), float(np.finfo(np.float32).max)))
    return lax.convert_element_type(lax.clamp(-largest, values, largest), dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropped:
    """Marks a leaf that the converted program no longer reads. Holds no data.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ (p["v"] * p["g"])), {"g": jnp.ones((1, 4)), "v": jnp.eye(4)}
    >>> jaxq.convert(f, jaxq.w8a8())(params, jnp.ones((2, 4)))["v"]
    Dropped(shape=(4, 4), dtype=dtype('float32'))
    """

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    nbytes = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A leaf that feeds more than one plain quantized weight: codes by site name, and the float array if still read.

    codes: site name -> QArray as the site's operand (a derived weight, such as a concatenation, has its own shape).

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ (p["v"] * p["g"])), {"g": jnp.ones((1, 4)), "v": jnp.eye(4)}
    >>> jaxq.convert(f, jaxq.w8a8())(params, jnp.ones((2, 4)))["g"].codes
    {'g+v': QArray(int8[4, 4], scale [1, 4], for float32)}
    """

    codes: dict[str, QArray]
    value: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales and the float array really occupy."""
        return held_bytes(self)


def _write(auxiliary: tuple) -> bytes:
    """Return the static part of a node as JSON, for `jax.export`."""
    *parts, dtype = (auxiliary[0], *auxiliary[2:], auxiliary[1])
    return json.dumps([[spec.encode(part) for part in parts], np.dtype(dtype).name]).encode()


def _read(data: bytes) -> tuple:
    parts, dtype = json.loads(data)
    first, *rest = (spec.decode(part) for part in parts)
    return (first, jnp.dtype(dtype), *(Packing(*part) if part else None for part in rest))


for _node in (QArray, Dropped, Stored):
    jax.export.register_pytree_node_serialization(
        _node, serialized_name=f"jaxq.{_node.__name__}", serialize_auxdata=_write, deserialize_auxdata=_read
    )

CONVERTED = (QArray, Dropped, Stored)


def is_converted(leaf: Any) -> bool:
    """Tell whether `leaf` is what `convert` puts in the place of a float array."""
    return isinstance(leaf, CONVERTED)
