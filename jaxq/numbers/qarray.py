"""A quantized array: codes, what is needed to decode them, and the format they are in.

`x ~ scale * (codes - zero_point)`. The scale's shape is the granularity (see `blocks`). A `QArray` is a pytree, reports
the shape and dtype of the float array it stands for, and `Dropped` / `Stored` are what else can stand at a leaf of
converted parameters.
"""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import blocks
from jaxq.numbers.formats import Int


def held_bytes(tree: Any) -> int:
    """Return the bytes that the arrays of `tree` really occupy."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """Codes with their scale: `x ~ scale * (codes - zero_point)`.

    codes: [*shape] in `format.storage`; scale: float32, each dimension divides the codes'; zero_point: int32 of the
    scale's shape, or None for a symmetric array. `dtype` is that of the float array this stands for.

    >>> import jax.numpy as jnp, jaxq
    >>> q = jaxq.int8()(jnp.array([[1.0, -2.0], [0.5, 4.0]]))
    >>> q.shape, q.scale.shape, q.codes.tolist()
    ((2, 2), (1, 2), [[127, -64], [64, 127]])
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    format: Int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        return math.prod(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales and zero points really occupy."""
        return held_bytes(self)

    def decode(self, dtype: Any = None) -> jax.Array:
        """Return `scale * (codes - zero_point)`, computed in float32 and cast to `dtype` (default: its own)."""
        values = lax.convert_element_type(self.codes, jnp.float32)
        if self.zero_point is not None:
            zero = blocks.spread(self.zero_point, self.shape)
            values = lax.sub(values, lax.convert_element_type(zero, jnp.float32))
        values = lax.mul(values, blocks.spread(self.scale, self.shape))
        # The outermost code may lie beyond the largest number, by up to a step: what is finite decodes to what is.
        largest = np.float32(min(float(jnp.finfo(dtype or self.dtype).max), float(np.finfo(np.float32).max)))
        return lax.convert_element_type(lax.clamp(-largest, values, largest), dtype or self.dtype)

    def transpose(self, permutation: tuple[int, ...]) -> "QArray":
        """Return the array with its axes, and its scale's, permuted."""

        def move(x):
            return None if x is None else lax.transpose(x, permutation)

        return dataclasses.replace(
            self, codes=move(self.codes), scale=move(self.scale), zero_point=move(self.zero_point)
        )

    def __repr__(self) -> str:
        return f"QArray({self.format}{list(self.shape)}, scale {list(self.scale.shape)}, for {np.dtype(self.dtype)})"


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
    """Return the static part of a node as JSON, for `jax.export`: a format or a shape, and a dtype."""
    kind, dtype = auxiliary
    spec = [kind.bits, kind.signed] if isinstance(kind, Int) else list(kind)
    return json.dumps([spec, np.dtype(dtype).name]).encode()


def _read_format(data: bytes) -> tuple:
    spec, dtype = json.loads(data)
    return Int(*spec), jnp.dtype(dtype)


def _read_shape(data: bytes) -> tuple:
    spec, dtype = json.loads(data)
    return tuple(spec), jnp.dtype(dtype)


for _node, _read in ((QArray, _read_format), (Dropped, _read_shape), (Stored, _read_shape)):
    jax.export.register_pytree_node_serialization(
        _node, serialized_name=f"jaxq.{_node.__name__}", serialize_auxdata=_write, deserialize_auxdata=_read
    )

CONVERTED = (QArray, Dropped, Stored)


def is_converted(leaf: Any) -> bool:
    """Tell whether `leaf` is what `convert` puts in the place of a float array."""
    return isinstance(leaf, CONVERTED)
