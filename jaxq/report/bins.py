"""Histograms made small enough to draw."""

import math
from typing import NamedTuple

import jax
import numpy as np

from jaxq.numbers import histogram
from jaxq.numbers.histogram import HALF, Histogram


class Bins(NamedTuple):
    """Counts of bins of equal width between `low` and `high`."""

    low: float
    high: float
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """The ends of all bins: [len(counts) + 1]."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)


def binned(h: Histogram, most: int = 96) -> Bins:
    """Return the occupied part of a histogram in at most `most` bins, all layers together.

    >>> h = histogram.of(np.float32([-1.0, 0.5, 0.5, 1.0]))
    >>> b = binned(jax.tree.map(np.asarray, h), 4)
    >>> b.low, b.high, b.counts.tolist()
    (-1.0, 1.0, [1.0, 0.0, 2.0, 1.0])
    """
    h = _together(h)
    used = np.flatnonzero(h.counts)
    if not used.size:
        return Bins(0.0, 0.0, np.zeros(0))
    first, last = int(used[0]), int(used[-1]) + 1
    run = max(1, math.ceil((last - first) / most))
    count = math.ceil((last - first) / run)
    padded = np.zeros(count * run)
    padded[: last - first] = h.counts[first:last]
    width = 2.0 ** float(h.exponent) / HALF
    low = (first - HALF) * width
    return Bins(low, low + count * run * width, padded.reshape(count, run).sum(1))


def _together(h: Histogram) -> Histogram:
    if np.ndim(h.exponent) == 0:
        return h
    empty = np.asarray(h.counts).sum(-1) == 0
    exponent = np.where(empty, np.float32(histogram.SMALLEST), h.exponent)
    flat = Histogram(np.reshape(h.counts, (-1, histogram.BINS)), exponent.reshape(-1))
    return jax.tree.map(np.asarray, histogram.merge_axis(flat))


def widest(levels: np.ndarray) -> np.ndarray:
    """Return the grid of the layer whose grid is widest, ascending: [*stack, n] -> [n]."""
    if not levels.size:
        return np.zeros(0, np.float32)
    rows = np.reshape(levels, (-1, levels.shape[-1]))
    return np.sort(rows[np.argmax(np.abs(rows).max(-1, initial=0))])
