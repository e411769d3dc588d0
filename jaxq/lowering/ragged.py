"""Integer `ragged_dot`: every row takes the scale of the expert it is sent to."""

import jax
import jax.numpy as jnp

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

    acc = op.apply(a, b, sizes, *rest, out_dtype=jnp.int32)
    if za is not None:
        acc = acc - za * per_row(jnp.sum(b, 1, dtype=jnp.int32, keepdims=True))
    if zb is not None:
        acc = acc - per_row(zb) * jnp.sum(a, 1, dtype=jnp.int32, keepdims=True)
    if za is not None and zb is not None:
        acc = acc + k * za * per_row(zb)
    inside = jnp.arange(a.shape[0]) < jnp.sum(sizes)
    return jnp.where(inside[:, None], acc, 0), lhs.scale * per_row(rhs.scale)
