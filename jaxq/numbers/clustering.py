"""The best k values to stand for many: exact k-means in one dimension, on the host.

Clusters of an optimum are intervals of the sorted values, so it is a shortest path through k - 1 boundaries. Boundaries
are searched in blocks, coarse to fine: a path's cost without the values of the blocks its boundaries lie in is a lower
bound, a block whose bound exceeds the cost of a known path is dropped, the rest are split until they are positions.

Sharp edges: NumPy in float64, not traceable (`lloyd` is). Sums round: paths closer than about 1e-13 of the total
variance are not told apart, unless a power of two makes values and weights integers whose sums fit 61 bits; then ties
are found exactly, by fractions. Among equal optima the boundaries lie as far left as possible: the centroids are the
lexicographically smallest.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Blocks at the start and parts of a block that is split; any numbers give the same result.
BLOCKS, PARTS = 4096, 8
# Pairs of boundaries in which exact ties are looked for.
MOST_PAIRS = 2**22


class Sums(NamedTuple):
    """Running sums over the sorted values: what any interval of them costs takes O(1). Each: float64 [n + 1]."""

    weight: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def cost(self, start, stop, empty: float) -> np.ndarray:
        """Return `sum w (x - mean)^2` over the values [start, stop), and `empty` where there are none."""
        w = self.weight[stop] - self.weight[start]
        s = self.first[stop] - self.first[start]
        cost = self.second[stop] - self.second[start] - s * (s / np.where(w > 0, w, 1))
        return np.where(start < stop, np.maximum(cost, 0), empty)


class Blocks(NamedTuple):
    """Disjoint ascending ranges of positions that one boundary may take: low to high, both included."""

    low: np.ndarray
    high: np.ndarray


def optimal(values, k: int, weights=None) -> np.ndarray:
    """Return the centroids that minimise `sum_i w_i min_j (x_i - c_j)^2`, ascending: float64 [min(k, distinct values)].

    values: any shape, finite; weights: as many, finite and not negative, those of zero do not count. Ties: see above.
    O(n log n) for the sort, then about k sqrt(n) log(n) on ordinary data; k n log(n) where no block can be dropped.
    Raises `ValueError` for what is not finite, weights that do not fit and a `k` below one.
    Dynamic programming over sorted values: Wang and Song 2011 (Ckmeans.1d.dp); monotone minima: Groenlund et al. 2017.

    >>> optimal([1, 2, 3, 10, 11, 12], 2).tolist()
    [2.0, 11.0]
    """
    check_count(k)
    values, weights = _distinct(values, weights)
    if len(values) <= k:
        return values
    exponent = np.frexp(np.abs(values).max())[1]
    x = np.ldexp(values, -exponent)
    # Minus one of the values: integers stay integers, and close floats lose nothing.
    centre = x[np.searchsorted(x[:-1], np.average(x, weights=weights))]
    x = x - centre
    starts = _boundaries(x, weights, k, _integers(values, weights))[:-1]
    means = np.add.reduceat(weights * x, starts) / np.add.reduceat(weights, starts)
    return np.ldexp(centre + means, exponent)


def k_means_quantize(data, n_clusters: int) -> tuple[jax.Array, jax.Array]:
    """Return `(quantized_data, centroids)`: every value replaced by the nearest of the best `n_clusters` values.

    data: an array, a number or nested lists, of any shape. quantized_data: [*data.shape]; centroids: [k], ascending;
    both in data's floating dtype, float32 for integers and lists. k is `n_clusters`, or the number of distinct values
    where that is less. The centroids are the best there are (`optimal`); a value as near to two takes the lower.
    Raises `ValueError` for NaN, infinity and a bad `n_clusters`, `TypeError` for what are not real numbers. Han et al.
    2016 (Deep Compression), section 3.

    >>> import jaxq
    >>> quantized, centroids = jaxq.k_means_quantize([1, 3, 5, 7, 9], 2)
    >>> quantized.tolist(), centroids.tolist()
    ([2.0, 2.0, 7.0, 7.0, 7.0], [2.0, 7.0])
    """
    check_count(n_clusters)
    array = np.asarray(data)
    dtype = _float_dtype(data, array)
    values = array.astype(np.float64)
    if not np.all(np.abs(values) <= float(jnp.finfo(dtype).max)):
        raise ValueError(f"the data hold NaN, infinity or what {dtype} cannot hold: remove or scale them first")
    # Rounded before the values are assigned: nearest to what is returned.
    centroids = np.unique(optimal(values, n_clusters).astype(dtype).astype(np.float64))
    middle = 0.5 * centroids[:-1] + 0.5 * centroids[1:]
    quantized = centroids[np.searchsorted(middle, values)] if values.size else values
    return jnp.asarray(quantized.astype(dtype)), jnp.asarray(centroids.astype(dtype))


def check_count(k) -> None:
    """Raise `ValueError` unless `k` is a number of clusters."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"the number of clusters is an integer of at least 1, got {k!r}; use 16 for 4 bits")


def _float_dtype(data, array: np.ndarray) -> np.dtype:
    if jnp.issubdtype(array.dtype, np.floating):
        given = array.dtype if hasattr(data, "dtype") else np.dtype(np.float32)
        return np.dtype(jax.dtypes.canonicalize_dtype(given))
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"only real numbers are clustered, got {array.dtype}; convert them to float first")
    return np.dtype(np.float32)


def _distinct(values, weights) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values, ascending, and the weight of each; values of no weight are left out."""
    values = np.asarray(values, np.float64).ravel()
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64).ravel()
    if len(weights) != len(values):
        raise ValueError(f"{len(weights)} weights for {len(values)} values; give one weight per value")
    if not np.all(np.isfinite(values)):
        raise ValueError("the values hold NaN or infinity: they have no mean; remove them first")
    if not np.all(weights >= 0) or not math.isfinite(weights.sum()) or (values.size and not weights.any()):
        raise ValueError("weights are finite, at least zero and not all zero; add a small constant to them")
    values, inverse = np.unique(values[weights > 0], return_inverse=True)
    return values, np.bincount(inverse.ravel(), weights[weights > 0], len(values))


def _running(x: np.ndarray) -> np.ndarray:
    """Return `[0, x0, x0 + x1, ...]`, in two levels: the rounding error grows with sqrt(n)."""
    width = math.isqrt(len(x)) + 1
    rows = np.zeros((width, width), x.dtype)
    rows.ravel()[: len(x)] = x
    rows = np.cumsum(rows, axis=1)
    rows[1:] += np.cumsum(rows[:-1, -1])[:, None]
    return np.concatenate([np.zeros(1, x.dtype), rows.ravel()[: len(x)]])


def _integers(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return exact running sums of weight and of `weight * value * 2**m`, int64; None where there are none."""
    with np.errstate(over="ignore"):
        total = np.sum(weights * np.abs(values))
    if not np.isfinite(total) or weights.sum() > 2.0**61 or np.any(weights != np.rint(weights)):
        return None
    scaled = np.ldexp(values, 61 - np.frexp(total)[1])
    if np.any(scaled != np.rint(scaled)):
        return None
    counts = weights.astype(np.int64)
    return _running(counts), _running(counts * scaled.astype(np.int64))


def _boundaries(x: np.ndarray, weights: np.ndarray, k: int, integers) -> np.ndarray:
    """Return where the k clusters of the sorted `x` start and the last stops: int [k + 1]."""
    n = len(x)
    sums = Sums(_running(weights), _running(weights * x), _running(weights * x * x))
    # What the costs of two paths may be wrong by: running sums err by 2 sqrt(n) roundings each.
    slack = 16 * k * (1 + math.sqrt(n)) * np.finfo(np.float64).eps * np.abs(x).max() * np.sum(weights * np.abs(x))
    coarse = _coarse(x, weights, BLOCKS)
    layers = [_clip(coarse, j, n - k + j) for j in range(1, k)]
    layers = [Blocks(np.array([0]), np.array([0])), *layers, Blocks(np.array([n]), np.array([n]))]
    path = _descend(sums, x, _shortest(sums, [blocks.low for blocks in layers]))
    limit = sums.cost(path[:-1], path[1:], 0.0).sum() + slack
    while any(np.any(blocks.low < blocks.high) for blocks in layers):
        layers = [_split(blocks) for blocks in _prune(sums, layers, limit)]
    if integers is not None:
        layers = _prune(sums, layers, limit)
        if sum(len(a.low) * len(b.low) for a, b in itertools.pairwise(layers)) <= MOST_PAIRS:
            return _decide(integers, _pairs(sums, layers, limit), n)
    return _shortest(sums, [blocks.low for blocks in layers])


def _coarse(x: np.ndarray, weights: np.ndarray, count: int) -> Blocks:
    """Return about `count` blocks of all boundaries, spread half like the values and half like centroids.

    Clusters of an optimum are spread like `density^(1/3)` (Panter and Dite 1951): blocks are finer where those are.
    """
    spread = np.cumsum(np.cbrt(np.diff(x) ** 2 * weights[1:]))
    share = spread / max(spread[-1], np.finfo(np.float64).tiny) + np.arange(1, len(x)) / len(x)
    edges = np.unique(np.append(np.searchsorted(share, np.linspace(share[0], share[-1], count)) + 1, len(x)))
    return Blocks(edges[:-1], edges[1:] - 1)


def _clip(blocks: Blocks, low: int, high: int) -> Blocks:
    """Return the blocks within the positions that leave a value for every other cluster."""
    keep = (blocks.high >= low) & (blocks.low <= high)
    return Blocks(np.maximum(blocks.low[keep], low), np.minimum(blocks.high[keep], high))


def _split(blocks: Blocks) -> Blocks:
    step = -(-(blocks.high - blocks.low + 1) // PARTS)[:, None]
    low = blocks.low[:, None] + step * np.arange(PARTS)
    high = np.minimum(low + step - 1, blocks.high[:, None])
    return Blocks(low[low <= high], high[low <= high])


def _row_minima(matrix: Callable, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every row's minimum and its leftmost column, of a matrix whose leftmost minima move right row by row.

    Halving: the rows between two known ones look only between their columns, all rows of a level at once.
    """
    best, where = np.empty(rows), np.zeros(rows, np.int64)
    for level in reversed(range(rows.bit_length())):
        stride = 2**level
        row = np.arange(stride - 1, rows, 2 * stride)
        low = np.where(row >= stride, where[row - stride], 0)
        high = np.where(row + stride < rows, where[np.minimum(row + stride, rows - 1)], columns - 1)
        width = high - low + 1
        first = np.cumsum(width) - width
        column = np.arange(width.sum()) - np.repeat(first - low, width)
        values = matrix(np.repeat(row, width), column)
        best[row] = np.minimum.reduceat(values, first)
        minima = np.flatnonzero(values == np.repeat(best[row], width))
        where[row] = column[minima[np.searchsorted(minima, first)]]
    return best, where


def _onward(sums: Sums, start: np.ndarray, stop: np.ndarray, rest: np.ndarray, empty: float):
    """Return `min_c cost(start[r], stop[c]) + rest[c]` for every r, and the leftmost c.

    The cost satisfies the quadrangle inequality, with intervals of no values at zero as well as at infinity.
    """
    return _row_minima(lambda r, c: sums.cost(start[r], stop[c], empty) + rest[c], len(start), len(stop))


def _bounds(sums: Sums, layers: Sequence[Blocks]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return for every block what the values certainly left, and certainly right, of a boundary in it cost at least."""

    def came(start: np.ndarray, stop: np.ndarray, cost: np.ndarray) -> np.ndarray:
        return _row_minima(lambda r, c: sums.cost(start[c], stop[r], 0.0) + cost[c], len(stop), len(start))[0]

    left, right = [np.zeros(1)], [np.zeros(1)]
    for here, there in itertools.pairwise(layers):
        left.append(came(here.high, there.low, left[-1]))
    for there, here in itertools.pairwise(reversed(layers)):
        right.append(_onward(sums, here.high, there.low, right[-1], 0.0)[0])
    return left, right[::-1]


def _prune(sums: Sums, layers: Sequence[Blocks], limit: float) -> list[Blocks]:
    """Drop the blocks that no path of a cost up to `limit` goes through."""
    keep = [before + after <= limit for before, after in zip(*_bounds(sums, layers), strict=True)]
    return [Blocks(blocks.low[kept], blocks.high[kept]) for blocks, kept in zip(layers, keep, strict=True)]


def _shortest(sums: Sums, layers: Sequence[np.ndarray]) -> np.ndarray:
    """Return the cheapest path through one position of every layer, the leftmost if there are several."""
    layers = list(layers)
    choices, rest = [], np.zeros(1)
    for j in reversed(range(len(layers) - 1)):
        # A position with nothing to its right in the next layer is on no path.
        layers[j] = layers[j][layers[j] < layers[j + 1][-1]]
        rest, choice = _onward(sums, layers[j], layers[j + 1], rest, np.inf)
        choices.append(choice)
    index, path = 0, [layers[0][0]]
    for layer, choice in zip(layers[1:], reversed(choices), strict=True):
        index = choice[index]
        path.append(layer[index])
    return np.array(path)


def _descend(sums: Sums, x: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Improve a path by Lloyd's iteration; any path without empty clusters will do, a better one drops more blocks."""
    for _ in range(100):
        means = np.diff(sums.first[path]) / np.maximum(np.diff(sums.weight[path]), np.finfo(np.float64).tiny)
        moved = path.copy()
        moved[1:-1] = np.searchsorted(x, 0.5 * (means[:-1] + means[1:]), side="right")
        if np.array_equal(moved, path) or np.any(np.diff(moved) < 1):
            break
        path = moved
    return path


def _pairs(sums: Sums, layers: Sequence[Blocks], limit: float) -> list[np.ndarray]:
    """Return the pairs of successive positions that a path of a cost up to `limit` goes through: int [m, 2] each."""
    left, right = _bounds(sums, layers)
    pairs = []
    for j, (here, there) in enumerate(itertools.pairwise(layers)):
        cost = sums.cost(here.low[:, None], there.low[None, :], np.inf)
        near = np.argwhere(left[j][:, None] + cost + right[j + 1][None, :] <= limit)
        pairs.append(np.stack([here.low[near[:, 0]], there.low[near[:, 1]]], axis=1))
    return pairs


def _decide(integers: tuple[np.ndarray, np.ndarray], pairs: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Return the cheapest path by exact arithmetic: the one of the largest `sum_clusters (sum w x)^2 / sum w`."""
    weight, first = integers
    worth = {n: Fraction(0)}
    onward: list[dict[int, int]] = []
    for steps in reversed(pairs):
        best: dict[int, Fraction] = {}
        choice: dict[int, int] = {}
        for start, stop in (pair for pair in steps.tolist() if pair[1] in worth):
            total = Fraction(int(first[stop] - first[start]) ** 2, int(weight[stop] - weight[start])) + worth[stop]
            if start not in best or total > best[start]:
                best[start], choice[start] = total, stop
        worth, onward = best, [choice, *onward]
    return np.array(list(itertools.accumulate(onward, lambda at, choice: choice[at], initial=0)))
