"""How a range follows the data it is shown: pure functions from an old range and a new observation to a range.

Ranges always contain zero, so that zero is exact, and an unobserved range is a count of zero: every rule here treats
`count == 0` as "no information", which is what an untaken branch reports. Min-max and moving averages need the ends of
what was seen; the other calibrators a histogram, whose memory does not grow and whose merging is exact (see
`histogram`). Those serve as `fit=` of a weight too, where the array itself is at hand.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.numbers import codebooks, histogram
from jaxq.numbers.fits import Keeping
from jaxq.numbers.formats import Codebook
from jaxq.numbers.histogram import Histogram
from jaxq.numbers.parameters import Learned, Parameters, is_settled, widest, widest_of_axis

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer


class Range(NamedTuple):
    """What is known of an operand's values: lo <= 0 <= hi and the number of observations, all float32, one shape.

    histogram: how the values are distributed, where the calibrator asks for it; table: the centroids that are best for
    them, [*stack, size], in the plan of a codebook.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> _, plan = jaxq.observe(f, jaxq.w8a8(static=True))(params, -2 * jnp.ones((2, 4)))
    >>> [float(x) for x in plan.range("w")[0][:3]]
    [-2.0, 0.0, 1.0]
    """

    lo: Any
    hi: Any
    count: Any
    histogram: Histogram | None = None
    table: Any = None


def unobserved(shape: tuple[int, ...], quantizer: Quantizer) -> Range:
    """Return the range of an operand that nothing has been seen of."""
    zero = np.zeros(shape, np.float32)
    form = quantizer.format
    table = np.zeros((*shape, form.size), np.float32) if isinstance(form, Codebook) else None
    return Range(zero, zero, zero, histogram.empty(shape) if quantizer.counts else None, table)


def with_table(quantizer: Quantizer, r: Leaf) -> Leaf:
    """Return a range with the centroids of what it has seen, where its quantizer is a codebook."""
    if not isinstance(r, Range) or not isinstance(quantizer.format, Codebook):
        return r
    assert r.histogram is not None, "a static codebook comes with a histogram"
    return r._replace(table=codebooks.table_of(quantizer.format, r.histogram))


# What a plan keeps of an operand.
Leaf = Range | Parameters


def is_blank(r: Leaf) -> bool:
    """Tell whether a range was observed in no layer, or parameters not in all; False while they are traced."""
    if isinstance(r.count, jax.core.Tracer) or not np.size(r.count):
        return False
    seen = np.asarray(r.count) > 0
    return not (np.all(seen) if isinstance(r, Parameters) else np.any(seen))


def shown_if_blank(r: Leaf) -> Leaf:
    """Return a leaf whose numbers are NaN where it is blank, if that is not known while the program is traced.

    What is computed by them is NaN then: neither an error, which a compiled program cannot raise, nor a wrong number.
    """
    if not isinstance(r.count, jax.core.Tracer) or not np.size(r.count):
        return r
    seen = jnp.all(r.count > 0) if isinstance(r, Parameters) else jnp.any(r.count > 0)

    def shown(x: Any) -> jax.Array:
        return jnp.where(seen, x, jnp.float32(np.nan))

    if isinstance(r, Parameters):
        return r._replace(value=jax.tree.map(shown, r.value))
    return r._replace(lo=shown(r.lo), hi=shown(r.hi))


def is_seen(leaf: Leaf) -> jax.Array:
    """Tell where there is something to quantize by, [*stack]: what zeros alone, and NaN, have left gives way."""
    return is_settled(leaf) if isinstance(leaf, Parameters) else jnp.asarray(leaf.lo) < leaf.hi


def merge(a: Leaf, b: Leaf) -> Leaf:
    """Return what two observations of the same thing amount to: the hull of ranges, the wider parameters."""
    if isinstance(a, Parameters) and isinstance(b, Parameters):
        return widest(a, b)
    assert isinstance(a, Range) and isinstance(b, Range), "observations of one operand are of one kind"
    return hull(a, b)


def hull(a: Range, b: Range) -> Range:
    """Return the hull of two ranges, and all their values."""
    counts = jnp.maximum(a.count, b.count)
    return Range(jnp.minimum(a.lo, b.lo), jnp.maximum(a.hi, b.hi), counts, _together(a, b))


def _together(a: Range, b: Range) -> Histogram | None:
    return None if a.histogram is None or b.histogram is None else histogram.merge(a.histogram, b.histogram)


def merge_axis(r: Leaf) -> Leaf:
    """Return the hull of the observations stacked along the leading axis, of parameters the widest."""
    if isinstance(r, Parameters):
        return widest_of_axis(r)
    seen = None if r.histogram is None else histogram.merge_axis(r.histogram)
    return Range(r.lo.min(0, initial=0), r.hi.max(0, initial=0), r.count.max(0, initial=0), seen)


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Static range = hull of everything seen. The order of batches does not matter.

    >>> import jaxq
    >>> jaxq.w8a8(static=True).scheme.act.calibrator
    MinMax()
    """

    histogram = False

    def update(self, old: Range, new: Range) -> Range:
        """Return the hull of both."""
        return hull(old, new)._replace(count=old.count + new.count)


@dataclasses.dataclass(frozen=True)
class EMA:
    """Static range = exponential moving average of per-call ranges (Jacob et al. 2018, section 3.1).

    The first observation is taken as it is, so that no bias correction is needed; and so is the first after zeros
    alone, of which a recurrent state or a batch of padding consists, and which say nothing of a range.

    >>> import jaxq
    >>> jaxq.ema(0.9)
    EMA(decay=0.9)
    """

    decay: float = 0.99
    histogram = False

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"an EMA decays by a factor in [0, 1), got {self.decay!r}")

    def update(self, old: Range, new: Range) -> Range:
        """Return the average, moved by one observation."""
        keep = jnp.where(old.lo < old.hi, jnp.float32(self.decay), jnp.float32(0))
        seen = new.count > 0

        def mix(a, b):
            return jnp.where(seen, keep * a + (1 - keep) * b, a)

        return Range(mix(old.lo, new.lo), mix(old.hi, new.hi), old.count + new.count)


@dataclasses.dataclass(frozen=True)
class OverflowRate:
    """Range = a power of two, doubled where more than `rate` of a batch overflows, halved where that would not.

    The dynamic fixed point of Courbariaux et al. 2014 (section 5): one step for each observation; the first one is
    taken from the largest value.

    >>> import jaxq
    >>> jaxq.dynamic_fixed(8, calibrator=jaxq.overflow_rate(1e-4))
    int8 per tensor static (OverflowRate(rate=0.0001)) power of two
    """

    rate: float = 1e-4
    histogram = True

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"an overflow rate is a fraction in [0, 1), got {self.rate!r}")

    def move(self, quantizer: Quantizer, old: Range, new: Range) -> Range:
        """Return the range moved by at most one power of two; zeros alone move nothing.

        The range ends at the largest code, `2^e (1 - 2^(1 - bits))`, so that the scale is a power of two as it is.
        """
        top = np.float32(1 - 2.0 ** (1 - quantizer.format.bits))
        first = top * histogram.width(new.histogram) * jnp.float32(new.histogram.counts.shape[-1] // 2)
        beyond, beyond_half = (_share_beyond(new.histogram, limit / top) for limit in (old.hi, 0.5 * old.hi))
        moved = jnp.where(beyond > self.rate, 2 * old.hi, jnp.where(beyond_half <= self.rate, 0.5 * old.hi, old.hi))
        hi = jnp.where(new.hi > new.lo, jnp.where(old.hi > 0, moved, first), old.hi)
        hi = jnp.where(_is_finite(new), hi, jnp.float32(jnp.inf))
        return Range(-hi, hi, old.count + new.count, old.histogram)


Calibrator = MinMax | EMA | OverflowRate | Learned | Keeping


@functools.partial(jax.jit, static_argnums=0)
def update(quantizer: Quantizer, old: Any, new: Any) -> Any:
    """Return a static range, moved by one observation as the quantizer's calibrator says; compiled once."""
    calibrator: Any = quantizer.calibrator
    if isinstance(calibrator, Keeping):
        return _accumulated(calibrator, quantizer, old, new)
    if isinstance(calibrator, OverflowRate):
        return calibrator.move(quantizer, old, new)
    return with_table(quantizer, calibrator.update(old, new))


def combine(quantizer: Quantizer, a: Leaf, b: Leaf) -> Leaf:
    """Return what one pass over the data of both would have given; raise `ValueError` where the order matters."""
    if isinstance(quantizer.calibrator, (EMA, OverflowRate)):
        raise ValueError(
            f"{quantizer.calibrator!r} follows the order of the batches, so two of its ranges cannot be merged; "
            "use a calibrator that counts, such as jaxq.minmax() or jaxq.percentile()"
        )
    return update(quantizer, a, b)


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


def overflow_rate(rate: float = 1e-4) -> OverflowRate:
    """Make a calibrator of powers of two that lets a fraction `rate` of the values overflow.

    >>> import jaxq
    >>> jaxq.overflow_rate(0.01)
    OverflowRate(rate=0.01)
    """
    return OverflowRate(rate)


def _accumulated(rule: Keeping, quantizer: Quantizer, old: Range, new: Range) -> Range:
    """Return the range that a rule keeps of everything seen."""
    seen = histogram.merge(old.histogram, new.histogram)
    lo, hi = rule.keep(quantizer, seen)
    count = old.count + new.count
    fine = _is_finite(new)
    return Range(jnp.where(fine, lo, new.lo), jnp.where(fine, hi, new.hi), count, seen)


def _is_finite(r: Range) -> jax.Array:
    """Tell whether all values were finite: NaN and infinity do not show in a histogram, they do in the ends."""
    return jnp.isfinite(r.lo) & jnp.isfinite(r.hi)


def _share_beyond(h: Histogram, limit: jax.Array) -> jax.Array:
    """Return the share of values beyond +-limit, a power of two; of shape [*stack]."""
    bins = h.counts.shape[-1]
    number = jnp.arange(bins, dtype=jnp.float32) - jnp.float32(bins // 2)
    distance = jnp.where(number < 0, -number - 1, number)  # of a bin's inner edge from zero, in widths
    # The limit is a power of two but for rounding, so a bin either begins at it or is far from it.
    outside = distance * histogram.width(h)[..., None] >= 0.99999 * limit[..., None]
    return jnp.sum(jnp.where(outside, h.counts, jnp.float32(0)), -1) / jnp.maximum(
        jnp.sum(h.counts, -1), jnp.float32(1)
    )
