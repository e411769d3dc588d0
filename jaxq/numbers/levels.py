"""The numbers that the codes of an array stand for: the grid to draw a histogram against."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.numbers.formats import Codebook, Format, Integers, Levels
from jaxq.numbers.qarray import QArray
from jaxq.numbers.quantizers import Quantizer

MOST = 256  # codes of more than 8 bits are too many to tell apart


def codes_of(quantizer: Quantizer) -> np.ndarray:
    """Return all codes in use, in the format's storage; none where there are more than 256.

    >>> import jaxq
    >>> codes_of(jaxq.int2()).tolist(), len(codes_of(jaxq.float8())), len(codes_of(jaxq.int16()))
    ([-1, 0, 1], 254, 0)
    """
    form: Format = quantizer.format
    if form.bits > 8:
        return np.zeros(0, np.uint8)
    if isinstance(form, Integers):
        low, high = quantizer.bounds()
        return np.arange(low, high + 1, 2 if form.bits == 1 and low < 0 else 1).astype(form.storage)
    if isinstance(form, Levels):
        return np.arange(len(form.values), dtype=np.uint8)
    if isinstance(form, Codebook):
        return np.arange(form.entries if form.entries <= MOST else 0, dtype=np.uint8)
    codes = np.arange(2**form.bits, dtype=np.uint8).view(form.storage)
    return codes[np.isfinite(codes.astype(np.float32))] if form.storage != np.uint8 else codes


def levels(quantizer: Quantizer, q: QArray) -> jax.Array:
    """Return what the codes of the widest block stand for, in the order of the codes: float32 [number of codes]."""
    codes = jnp.asarray(codes_of(quantizer))
    if 0 in q.grid or not codes.size:
        return jnp.zeros(codes.size, jnp.float32)
    if q.scale is None:
        tables = q.table.reshape(-1, q.table.shape[-1])
        return tables[jnp.argmax(jnp.max(jnp.abs(tables), axis=1))]
    scales = q.real_scale().reshape(-1)
    widest = jnp.argmax(scales)
    zero = None if q.zero_point is None else q.zero_point.reshape(-1)[widest][None]
    return QArray(codes, scales[widest][None], zero, q.format, np.dtype(np.float32)).decode()
