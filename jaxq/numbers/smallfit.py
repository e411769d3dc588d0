"""The least squared error of small blocks, where it has a local minimum for every way to round.

Of few values, the best scale is one at which they all happen to lie near codes, and a sweep that narrows down on the
best so far passes it by. So every scale of a fine sweep is tried, and for the codes that it gives the best scale is
known: with `x = s (n + r)` for codes n it is `s (1 + sum rn / sum nn)`, and the error, in units of s squared, falls to
`sum r^2 - (sum rn)^2 / sum nn`. Nothing beyond twice the scale that clips nothing is ever better: half of it has the
codes 2n, and more between them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A scale below this has a reciprocal that overflows.
TINY = np.float32(2.0**-120)

# Blocks of fewer values than this, or than codes, are small.
FEW = 64
# Trials per doubling of the scale: for each of 128 codes on one side about eight, less for fewer codes.
FINEST, COARSEST = 1024, 64


class Fit(NamedTuple):
    """Scale and zero point of every block, and the squared error they leave: float32 [blocks]."""

    scale: jax.Array
    zero: jax.Array
    error: jax.Array


def is_small(n: int, low, high) -> bool:
    """Tell whether blocks of `n` values are small for codes `low..high`."""
    return n < max(FEW, high - low if _known(low, high) else 256)


def _known(low, high) -> bool:
    return not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer)


def _factors(low, high) -> Iterator[float]:
    """Yield what to multiply by the scale that clips nothing: finely where little is clipped, and far below that."""
    known = _known(low, high)
    per_octave = int(np.clip(8 * (high - low + 1) / 2, COARSEST, FINEST)) if known else FINEST
    yield from 2.0 ** (np.arange(-0.1 * per_octave, per_octave + 1) / per_octave)
    if not known or high - low < 64:  # more codes than that clip next to nothing of a few values
        yield from 2.0 ** (-np.arange(0.1 * COARSEST, 1.5 * COARSEST) / COARSEST)
        yield from 2.0 ** -np.arange(1.5, 5, 1 / 16)


def scale(values: jax.Array, ends: tuple[jax.Array, jax.Array], low: int, high: int) -> Fit:
    """Return the scales of least error for codes `low..high` without a zero point.

    values: [blocks, n], finite, a quarter of what is to be fitted; ends: [blocks] each, what that reaches, and zero.
    """
    lo, hi = ends
    whole = jnp.maximum(hi / high, jnp.where(low == 0, 0, lo / low))
    trials = np.asarray(list(_factors(low, high)), np.float32)

    def one(factor: jax.Array) -> Fit:
        return _refined(values, whole * factor, jnp.zeros_like(whole), low, high)

    return _best(one, whole, trials)


def affine(values: jax.Array, ends: tuple[jax.Array, jax.Array], low: int, high: int) -> Fit:
    """Return the scales and zero points of least error for codes `low..high`, `low <= zero <= high`.

    Codes that are too many are cut off on either side, in several proportions.
    """
    lo, hi = ends
    whole = hi / (high - low) - lo / (high - low)
    parts = np.linspace(0, 1, 3 if _known(low, high) and high - low >= 64 else 9)
    trials = np.asarray([(factor, part) for factor in _factors(low, high) for part in parts], np.float32)

    def one(trial: jax.Array) -> Fit:
        s = jnp.maximum(whole * trial[0], TINY)
        first, last = jnp.round(lo / s), jnp.round(hi / s)
        cut = jnp.round(trial[1] * jnp.maximum(last - first - (high - low), 0))
        return _refined(values, s, jnp.clip(low - first - cut, low, high), low, high)

    return _best(one, whole, trials)


def _refined(quarter: jax.Array, s: jax.Array, zero: jax.Array, low: int, high: int) -> Fit:
    """Return the best scale for the codes that scale `s` gives."""
    s = jnp.maximum(s, TINY)
    u = quarter * (1 / (s * np.float32(0.25)))[:, None]
    n = jnp.clip(jnp.round(u), (low - zero)[:, None], (high - zero)[:, None])
    r = u - n
    slope, power = (r * n).sum(1), jnp.maximum((n * n).sum(1), 1)
    shift = slope / power
    return Fit(jnp.maximum(s * (1 + shift), TINY), zero, (r * r).sum(1) - shift * slope)


def _best(one, whole: jax.Array, trials: np.ndarray) -> Fit:
    """Return the best of all trials, errors in units of `whole` squared; a scale of one where there is no range."""
    some = whole > 0
    unit = jnp.where(some, jnp.maximum(whole, TINY), 1)

    def step(best: Fit, trial: jax.Array):
        new, tried = one(trial), trial if trial.ndim == 0 else trial[0]
        new = new._replace(error=new.error * tried**2)
        better = new.error < best.error
        return Fit(*(jnp.where(better, a, b) for a, b in zip(new, best, strict=True))), None

    # From the data, so that inside `shard_map` it varies over the devices that they do.
    start = Fit(unit, *(jnp.where(some, x, x) for x in (np.float32(0), np.float32(np.inf))))
    best, _ = lax.scan(step, start, jnp.asarray(trials))
    return best._replace(scale=jnp.where(some, best.scale, 1))
