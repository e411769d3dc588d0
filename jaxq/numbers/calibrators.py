"""How a static range follows the data it is shown: pure functions from an old range and a new observation to a range.

Ranges always contain zero, so that zero is exact, and an unobserved range is a count of zero: every rule here treats
`count == 0` as "no information", which is what an untaken branch reports.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Range(NamedTuple):
    """What is known of an operand's values: lo <= 0 <= hi and the number of observations, all float32, one shape.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> _, plan = jaxq.observe(f, jaxq.w8a8(static=True))(params, -2 * jnp.ones((2, 4)))
    >>> [float(x) for x in plan.range("w")[0]]
    [-2.0, 0.0, 1.0]
    """

    lo: Any
    hi: Any
    count: Any


def unobserved(shape: tuple[int, ...]) -> Range:
    """Return the range of an operand that nothing has been seen of."""
    zero = np.zeros(shape, np.float32)
    return Range(zero, zero, zero)


def merge(a: Range, b: Range) -> Range:
    """Return what two observations of the same thing amount to: their hull."""
    return Range(jnp.minimum(a.lo, b.lo), jnp.maximum(a.hi, b.hi), jnp.maximum(a.count, b.count))


def merge_axis(r: Range) -> Range:
    """Return the hull of the observations stacked along the leading axis."""
    return Range(r.lo.min(0, initial=0), r.hi.max(0, initial=0), r.count.max(0, initial=0))


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Static range = hull of everything seen. The order of batches does not matter.

    >>> import jaxq
    >>> jaxq.w8a8(static=True).scheme.act.calibrator
    MinMax()
    """

    def update(self, old: Range, new: Range) -> Range:
        hull = merge(old, new)
        return hull._replace(count=old.count + new.count)


@dataclasses.dataclass(frozen=True)
class EMA:
    """Static range = exponential moving average of per-call ranges (Jacob et al. 2018, section 3.1).

    The first observation is taken as it is, so that no bias correction is needed.

    >>> import jaxq
    >>> jaxq.ema(0.9)
    EMA(decay=0.9)
    """

    decay: float = 0.99

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"an EMA decays by a factor in [0, 1), got {self.decay!r}")

    def update(self, old: Range, new: Range) -> Range:
        keep = jnp.where(old.count > 0, jnp.float32(self.decay), jnp.float32(0))
        seen = new.count > 0

        def mix(a, b):
            return jnp.where(seen, keep * a + (1 - keep) * b, a)

        return Range(mix(old.lo, new.lo), mix(old.hi, new.hi), old.count + new.count)


Calibrator = MinMax | EMA


def minmax() -> MinMax:
    """Make a calibrator that keeps the hull of everything seen.

    >>> import jaxq
    >>> jaxq.minmax()
    MinMax()
    """
    return MinMax()


def ema(decay: float = 0.99) -> EMA:
    """Make a calibrator that keeps a moving average of the ranges of single calls; `decay` in [0, 1).

    >>> import jaxq
    >>> jaxq.ema(0.999)
    EMA(decay=0.999)
    """
    return EMA(decay)
