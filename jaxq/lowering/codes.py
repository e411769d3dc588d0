"""Codes as every kernel wants them: signed 8-bit, with a zero point that goes with them."""

import jax
import jax.numpy as jnp

from jaxq.numbers.qarray import QArray


def signed(q: QArray) -> tuple[jax.Array, jax.Array | None]:
    """Return codes as int8 and their zero point as int32 (None if symmetric); unsigned codes move down by 128.

    Mixed signs and other types have no fast kernel on the backends, so there is one form only.
    """
    if q.codes.dtype == jnp.int8:
        return q.codes, None if q.zero_point is None else q.zero_point.astype(jnp.int32)
    codes = (q.codes.astype(jnp.int16) - 128).astype(jnp.int8)
    zero = jnp.zeros(q.scale.shape, jnp.int32) if q.zero_point is None else q.zero_point.astype(jnp.int32)
    return codes, zero - 128
