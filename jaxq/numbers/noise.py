"""Signal and noise of an array that stands in for another: streaming, mergeable, free of overflow.

Squares are taken in units of the largest value, so that neither huge nor tiny numbers overflow or vanish; what is
counted in parts is what is counted at once, up to float32 rounding of the sums.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Noise(NamedTuple):
    """`signal = sum x^2 / peak^2`, `noise = sum (y - x)^2 / peak^2` for y in the place of x. All zeros: nothing seen.

    peak: the largest `|x|` or `|y - x|`. Leaves are float32 [*stack].
    """

    peak: Any
    signal: Any
    noise: Any


def of(exact: jax.Array, near: jax.Array) -> Noise:
    """Compare an array with what stands in for it; NaN or infinity on either side make the sums NaN."""
    x = lax.convert_element_type(exact, jnp.float32)
    error = lax.convert_element_type(near, jnp.float32) - x
    peak = jnp.maximum(jnp.max(jnp.abs(x), initial=0), jnp.max(jnp.abs(error), initial=0))
    return Noise(peak, _squares(x, peak), _squares(error, peak))


def _squares(x: jax.Array, peak: jax.Array) -> jax.Array:
    unit = x / jnp.where(peak > 0, peak, jnp.float32(1))
    return jnp.sum(unit * unit)


def merge_axis(stacked: Noise) -> Noise:
    """Return signal and noise of all that is stacked along the leading axis."""
    peak = stacked.peak.max(0, initial=0)
    share = stacked.peak / jnp.where(peak > 0, peak, jnp.float32(1))[None]
    return Noise(peak, jnp.sum(stacked.signal * share**2, 0), jnp.sum(stacked.noise * share**2, 0))


def decibels(n: Noise) -> np.ndarray:
    """Return `SQNR = 10 log10(signal / noise)` in dB, [*stack]: infinity without noise, NaN for nothing seen."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * np.log10(np.asarray(n.signal, np.float64) / np.asarray(n.noise, np.float64))
    return np.where(np.asarray(n.peak) > 0, ratio, np.nan)
