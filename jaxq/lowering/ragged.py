"""Integer `ragged_dot`: every row takes the scale of the expert it is sent to."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.lowering import rowwise
from jaxq.lowering.codes import signed
from jaxq.numbers.qarray import QArray
from jaxq.programs.ops import RaggedDot


def integer_ragged_dot(op: RaggedDot, lhs: QArray, rhs: QArray, sizes: jax.Array, *rest) -> tuple[jax.Array, jax.Array]:
    """Return int32 sums [m, n] and their float32 scale [m, n]; lhs [m, k], rhs [g, k, n], sizes [g]."""
    (a, za), (b, zb) = signed(lhs), signed(rhs)
    experts, k = b.shape[0], b.shape[1]
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(a.shape[0]), side="right").clip(0, experts - 1)

    def per_row(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (experts, *x.shape[1:]))[group, 0, :]

    acc = _sums(op, a, b, sizes, *rest)
    if za is not None:
        acc = acc - za * per_row(jnp.sum(b, 1, dtype=jnp.int32, keepdims=True))
    if zb is not None:
        acc = acc - per_row(zb) * jnp.sum(a, 1, dtype=jnp.int32, keepdims=True)
    if za is not None and zb is not None:
        acc = acc + k * za * per_row(zb)
    inside = jnp.arange(a.shape[0]) < jnp.sum(sizes)
    return jnp.where(inside[:, None], acc, 0), lhs.scale * per_row(rhs.scale)


def _sums(op: RaggedDot, a: jax.Array, b: jax.Array, *rest) -> jax.Array:
    """Return the int32 product of codes; on a GPU of operands filled up to whole tiles, as every product there."""

    def plain(a, b, *rest):
        return op.apply(a, b, *rest, out_dtype=jnp.int32)

    def filled(a, b, *rest):
        m, n = a.shape[0], b.shape[2]
        a, b = rowwise.filled(a, (rowwise.ROWS, rowwise.TERMS)), rowwise.filled(b, (rowwise.TERMS, rowwise.ROWS))
        return lax.slice(plain(a, b, *rest), (0, 0), (m, n))

    if 0 in (*a.shape, *b.shape) or not rowwise.is_cut((a.shape[0], b.shape[2]), a.shape[1]):
        return plain(a, b, *rest)
    return lax.platform_dependent(a, b, *rest, cuda=filled, default=plain)
