"""How much of a distribution a range keeps: from a histogram of it, or from the values themselves.

A narrow range rounds finely and clips much. Each rule strikes that balance its own way: by the error of the codes, by
the information they keep, by a share of the values, or by their spread. Rules for a `Histogram` take any stack of them
and return `(lo, hi)`, float32 [*stack], `lo <= 0 <= hi`; rules for weights take `[blocks, n]` and return `[blocks]`.

Sharp edges: what is inside a bin is taken to be spread evenly over it. Where NaN or infinity was counted the range is
infinite and the scale NaN; where there is nothing but zeros the range is zero and the scale one.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import smallfit
from jaxq.numbers.histogram import HALF, NOT_FINITE, SMALLEST, Histogram, width
from jaxq.numbers.smallfit import TINY

Ends = tuple[jax.Array, jax.Array]

LARGEST = np.finfo(np.float32).max
# The edges of the bins, in widths.
EDGES = np.arange(-HALF, HALF + 1, dtype=np.float32)

# What to multiply the range by that clips nothing: the best of a sweep is where the next one starts, ever closer. Small
# blocks have many local minima about one, outliers have their minimum far below it.
_WIDE = 2 ** np.concatenate([[0], np.arange(63, -64, -1) / 64, np.arange(-1, -10, -1 / 16)])
SCALE_SWEEPS = tuple(row[:, None] for row in (_WIDE, 2 ** (np.arange(-8, 9) / 128), 2 ** (np.arange(-4, 5) / 1024)))
# The same for a lower and an upper end that move by themselves.
_FAR = 2.0 ** -np.concatenate([np.arange(0, 3, 1 / 2), np.arange(3, 9)])
_NEAR = [2 ** (np.arange(-2, 3) * step) for step in (1 / 4, 1 / 10, 1 / 25, 1 / 60, 1 / 150)]
ENDS_SWEEPS = tuple(np.stack(np.meshgrid(row, row), -1).reshape(-1, 2) for row in (_FAR, *_NEAR))


def _per_histogram(rule: Callable[..., Ends]) -> Callable[..., Ends]:
    """Make of a rule for the counts of one histogram, in widths, one for any stack of histograms, in real numbers."""

    @functools.wraps(rule)
    def stacked(h: Histogram, *args, **options) -> Ends:
        def each(counts):
            return rule(counts, *args, **options)

        h = Histogram(jnp.asarray(h.counts), jnp.asarray(h.exponent))
        for _ in range(h.exponent.ndim):
            each = jax.vmap(each)
        known = (h.exponent > SMALLEST) & (h.counts.sum(-1) > 0)
        lo, hi = (jnp.where(known, jnp.clip(end * width(h), -LARGEST, LARGEST), 0) for end in each(h.counts))
        finite = h.exponent < NOT_FINITE
        return jnp.where(finite, lo, -np.inf), jnp.where(finite, hi, np.inf)

    return stacked


@_per_histogram
def percentile(counts: jax.Array, p: float) -> Ends:
    """Keep the central `p` percent of the values: what `(100 - p) / 2` percent lie below, and above.

    Order statistics interpolate as `numpy.percentile` does, and are as exact as a bin is wide.
    """
    share = jnp.float32((100 - p) / 200)
    return jnp.minimum(_quantile(counts, share), 0), jnp.maximum(-_quantile(counts[::-1], share), 0)


@_per_histogram
def sigmas(counts: jax.Array, k: float) -> Ends:
    """Keep what is within `k` standard deviations of the mean, zero included, and no more than there is."""
    middles, total = (EDGES[:-1] + EDGES[1:]) / 2, counts.sum()
    mean = (counts * middles).sum() / total
    reach = jnp.float32(k) * jnp.sqrt((counts * (middles - mean) ** 2).sum() / total)
    return _within(counts, mean - reach, mean + reach)


@_per_histogram
def mse(counts: jax.Array, low: int, high: int, symmetric: bool) -> Ends:
    """Minimise the squared error of integer codes `low..high`; return what the codes reach, `scale * (code - zero)`.

    low, high: whole numbers, Python's or float32 arrays (one program for all bit widths); here and below.
    symmetric: the zero point is 0, so that `lo / low == hi / high`; otherwise it is an integer from `low` to `high`.
    """

    def error(scale, zero):
        # With u = x / scale and n its code, the integral of (u - n)^2 is n / 12 + (u - n)^3 / 3, clipped or not.
        u = EDGES / scale
        n = jnp.clip(jnp.round(u), low - zero, high - zero)
        integral = jnp.diff(n) * np.float32(1 / 12) + jnp.diff((u - n) ** 3) * np.float32(1 / 3)
        return (counts * integral).sum() * scale

    # Values that were not counted may use the codes up to the end: no coarser than needed for that.
    search = functools.partial(_best_scale, most=1) if symmetric else _best_affine
    scale, zero = search(error, _seen(counts), low, high)
    return scale * (low - zero), scale * (high - zero)


@_per_histogram
def octav(counts: jax.Array, bits: int, signed: bool = True) -> Ends:
    """Clip at the fixed point of `s = E[|x| 1(|x| > s)] / (c 4^-bits P(0 < |x| <= s) + P(|x| > s))`.

    c is 1/3 if signed, for the range [-s, s], and 1/12 otherwise, for [0, s], where negative values do not count. No
    wider than what there is. OCTAV (Sakr et al. 2022).
    """
    weights, upper = _magnitudes(counts, signed), EDGES[HALF + 1 :]
    noise = np.float32(4.0**-bits / (3 if signed else 12))

    def newton(_, s):
        beyond = jnp.clip(upper - s, 0, 1)  # the part of every bin that is clipped, in widths
        clipped = weights * beyond
        moment = (clipped * (upper - beyond / 2)).sum()
        return moment / jnp.maximum(noise * (weights - clipped).sum() + clipped.sum(), TINY)

    s = lax.fori_loop(0, 64, newton, jnp.float32(0))
    return _within(counts, -s if signed else jnp.zeros_like(s), s)


@_per_histogram
def entropy(counts: jax.Array, levels: int) -> Ends:
    """Keep the magnitudes that lose the least information when told apart by `levels` codes.

    For every number of bins `i >= levels` of |x|: P has the first `i`, the rest added to the last of them; Q has the
    first `i` averaged over `levels` groups of neighbours, empty bins left out. The least `KL(P || Q)` wins. Divergence
    is infinite where Q has nothing of what P has. `levels` is 128 for int8. TensorRT (Migacz 2017), as in
    pytorch-quantization, which leaves zeros out too.
    """
    weights = _magnitudes(counts, True)
    sizes = jnp.arange(levels, HALF + 1)
    divergence = lax.map(functools.partial(_divergence, weights, levels), sizes, batch_size=64)
    last = _seen(weights, EDGES[HALF:])[1]
    divergence = jnp.where(sizes.astype(jnp.float32) <= last, divergence, np.inf)
    size = jnp.where(divergence.min() < np.inf, sizes[divergence.argmin()], HALF).astype(jnp.float32)
    return _within(counts, -size, size)


def mse_scale(values: jax.Array, low: int, high: int) -> jax.Array:
    """Return the scales that minimise `sum (x - s clip(round(x / s), low, high))^2` over every block.

    values: [blocks, n]; result: float32 [blocks], one for a block of zeros, NaN for one with NaN or infinity. The
    memory needed does not grow with the number of scales that are tried.
    """
    return _over_values(_best_scale, values, low, high)[0]


def mse_affine(values: jax.Array, low: int, high: int) -> tuple[jax.Array, jax.Array]:
    """Return scales and zero points that minimise `sum (x - s (clip(round(x / s) + z, low, high) - z))^2`.

    values: [blocks, n]; result: float32 [blocks] and int32 [blocks], `low <= z <= high`; otherwise as `mse_scale`.
    """
    scale, zero = _over_values(_best_affine, values, low, high)
    return scale, lax.convert_element_type(zero, jnp.int32)


def twn(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return threshold and scale of ternary weights: `t = 0.7 E|w|`, `s = E(|w| given |w| > t)`.

    values: [blocks, n]; result: float32 [blocks] each; the scale of a block of zeros is one. Li et al. 2016.
    """
    size = jnp.abs(lax.convert_element_type(values, jnp.float32))
    threshold = np.float32(0.7) * mean_abs(values)
    kept = size > threshold[:, None]
    count = kept.sum(1, dtype=jnp.float32)
    scale = jnp.where(kept, size, 0).sum(1) / jnp.maximum(count, 1)
    return threshold, jnp.where(threshold == 0, 1, jnp.where(threshold < np.inf, scale, np.nan))


def mean_abs(values: jax.Array) -> jax.Array:
    """Return `E|w|` of every block, the scale of BitNet b1.58. values: [blocks, n]; result: float32 [blocks]."""
    return jnp.abs(lax.convert_element_type(values, jnp.float32)).mean(1)


def _over_values(search: Callable, values: jax.Array, low: int, high: int) -> tuple[jax.Array, jax.Array]:
    # A quarter of everything, so that the reciprocal of the largest scale is a normal number.
    quarter = lax.convert_element_type(values, jnp.float32) * np.float32(0.25)

    def error(scale, zero):
        u = quarter * (1 / (scale * np.float32(0.25)))[:, None]
        n = jnp.clip(jnp.round(u), (low - zero)[:, None], (high - zero)[:, None])
        return ((u - n) ** 2).sum(1)

    seen = jnp.where(jnp.isfinite(values), lax.convert_element_type(values, jnp.float32), np.float32(np.inf))
    lo, hi = seen.min(1, initial=0), seen.max(1, initial=0)
    if smallfit.is_small(values.shape[1], low, high):
        scale, zero, _ = SMALL[search](jnp.where(seen < np.inf, quarter, 0), (lo, hi), low, high)
    else:
        scale, zero = search(error, (lo, hi), low, high)
    return jnp.where(hi < np.inf, scale, np.nan), zero


def _best_scale(error: Callable, ends: Ends, low: int, high: int, *, most: float = 2) -> tuple[jax.Array, jax.Array]:
    """Return the scale of least error, and a zero point of zero. error(scale, zero) is in units of scale squared.

    most: what to multiply by at most the scale that clips nothing. Fewer codes than there are serve where values lie on
    a grid of their own.
    """
    lo, hi = ends
    whole = jnp.maximum(hi / high, jnp.where(low == 0, 0, lo / low))
    some = whole > 0
    whole = jnp.where(some, jnp.maximum(whole, TINY), 1)
    zero = jnp.zeros_like(whole)

    def scale_of(factor):
        return jnp.maximum(whole * jnp.minimum(factor[0], most), TINY)

    def cost(factor):
        return error(scale_of(factor), zero) * (scale_of(factor) / whole) ** 2

    return jnp.where(some, scale_of(_sweep(cost, whole, SCALE_SWEEPS)), 1), zero


def _best_affine(error: Callable, ends: Ends, low: int, high: int) -> tuple[jax.Array, jax.Array]:
    """Return scale and zero point of least error, both float32: those of either end's best distance from zero."""
    lo, hi = (end / (high - low) for end in ends)
    whole = jnp.where(hi > lo, jnp.maximum(hi - lo, TINY), 1)

    def affine(factor):
        below, above = lo * factor[0], hi * factor[1]
        scale = jnp.where(above > below, jnp.maximum(above - below, TINY), 1)
        return scale, jnp.clip(jnp.round(low - below * (high - low) / scale), low, high)

    def cost(factor):
        scale, zero = affine(factor)
        return error(scale, zero) * (scale / whole) ** 2

    return affine(_sweep(cost, whole, ENDS_SWEEPS))


SMALL: dict[Callable, Callable] = {_best_scale: smallfit.scale, _best_affine: smallfit.affine}


def _sweep(cost: Callable, like: jax.Array, sweeps: Sequence[np.ndarray]) -> jax.Array:
    """Return the factors of least cost, [d, *like.shape]: each sweep, [k, d], is relative to the best so far."""

    def step(center, best, factor):
        trial = center * factor.reshape(-1, *(1,) * like.ndim)
        paid = cost(trial)
        better = paid < best[0]
        return (jnp.where(better, paid, best[0]), jnp.where(better[None], trial, best[1])), None

    best = jnp.full(like.shape, np.inf, jnp.float32), jnp.ones((sweeps[0].shape[1], *like.shape), jnp.float32)
    for sweep in sweeps:
        best, _ = lax.scan(functools.partial(step, best[1]), best, sweep.astype(np.float32))
    return best[1]


def _seen(counts: jax.Array, edges: np.ndarray = EDGES) -> Ends:
    """Return the outer edges of the outermost bins that hold anything, zero included."""
    return jnp.where(counts > 0, edges[:-1], 0).min(initial=0), jnp.where(counts > 0, edges[1:], 0).max(initial=0)


def _within(counts: jax.Array, lo: jax.Array, hi: jax.Array) -> Ends:
    least, most = _seen(counts)
    return jnp.clip(lo, least, 0), jnp.clip(hi, 0, most)


def _magnitudes(counts: jax.Array, signed: bool) -> jax.Array:
    """Return the counts of |x|, [HALF] (of positive x only unless signed), less the zeros.

    Zeros stand out from among the smallest values: there are no more of those than in the bins on either side.
    """
    positive, negative = counts[HALF:], counts[:HALF][::-1]
    positive = positive.at[0].min(jnp.maximum(positive[1], negative[0]))
    return positive + negative if signed else positive


def _quantile(counts: jax.Array, share: jax.Array) -> jax.Array:
    """Return the value at rank `share * (n - 1)`, between the two order statistics next to it."""
    last = counts.sum() - 1
    rank = share * last
    before = jnp.floor(rank)
    a, b = _order_statistic(counts, before), _order_statistic(counts, jnp.minimum(before + 1, last))
    return a + (rank - before) * (b - a)


def _order_statistic(counts: jax.Array, rank: jax.Array) -> jax.Array:
    """Return the value that `rank` values are below, the values of a bin spread evenly."""
    upto = jnp.cumsum(counts)
    i = jnp.minimum((upto <= rank).sum(), counts.size - 1)
    inside = (rank - (upto[i] - counts[i]) + np.float32(0.5)) / jnp.maximum(counts[i], 1)
    return jnp.asarray(EDGES)[i] + jnp.clip(inside, 0, 1)


def _divergence(weights: jax.Array, levels: int, size: jax.Array) -> jax.Array:
    """Return KL(P || Q) of `entropy` for the first `size` bins."""
    below = jnp.concatenate([jnp.zeros(1), jnp.cumsum(weights)])
    filled = jnp.concatenate([jnp.zeros(1), jnp.cumsum((weights > 0).astype(jnp.float32))])
    k = jnp.arange(HALF)
    group = k * levels // size
    start, end = ((g * size + levels - 1) // levels for g in (group, group + 1))
    p = jnp.where(k < size, weights, 0) + jnp.where(k == size - 1, below[-1] - below[size], 0)
    q = (below[end] - below[start]) / jnp.maximum(filled[end] - filled[start], 1)
    q = jnp.where(weights > 0, q, 0)
    each = jnp.where(p > 0, p * jnp.log(p / q), 0)
    divergence = each.sum() / below[-1] + jnp.log(below[size] / below[-1])
    return jnp.where(below[size] > 0, divergence, np.inf)
