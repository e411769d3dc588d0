"""Clustering inside a JAX program: Lloyd's iteration for blocks of numbers, for vectors, and a differentiable one.

A number's nearest centroid is told by the midpoints between centroids, so the values of a block are sorted once, and an
iteration is k binary searches and k differences of running sums. Running sums are pairs of float32 whose sum is exact
to about 2**-46: the difference of two of them is as good as the sum of the values between.

Sharp edges: float32, no x64. Lloyd finds a local optimum; `fit` starts it next to the best, which `clustering.optimal`
finds on the host. A cluster without values keeps its centroid. Sums of all the values of a block must be finite.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import partition, windows

# A number as the unrounded sum of two float32.
Pair = tuple[jax.Array, jax.Array]
# A cluster of a smaller part of a block's weight counts as empty: running sums cannot tell it from none.
NEGLIGIBLE = np.float32(2.0**-40)
# Steps of the quantile function from which a density is estimated.
QUANTILES = 2**14
# Up to here comparisons, which fuse with what surrounds them, are faster than binary searches.
MOST_COMPARISONS = 15
# Points that stand for a block of more values: so many for each cluster, within these limits. Where there are fewer of
# them than that, the partition is improved once more.
POINTS_EACH, FEWEST, MOST = 16, 256, 1024
# Vectors whose distances to all centroids are in memory at once.
BATCH = 2**14


def _float32(x) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def linear_init(values: jax.Array, k: int) -> jax.Array:
    """Return k centroids evenly spaced from the smallest to the largest value. [blocks, n] -> [blocks, k].

    Han et al. 2016 (Deep Compression), section 3.2.
    """
    values = _float32(values)
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    share = jnp.linspace(0, 1, k, dtype=jnp.float32)[None, :]
    return low * (1 - share) + high * share


def companding_init(values: jax.Array, k: int, weights: jax.Array | None = None) -> jax.Array:
    """Return the k quantiles `(j + 1/2) / k` of `density^(1/3)`: near the optimum. [blocks, n] -> [blocks, k].

    Over a step d of the values that holds a part p of the weight, the cube root has the mass `p^(1/3) d^(2/3)`.
    Panter and Dite 1951.
    """
    return _companding(*_sorted(values, weights), k)


def plus_plus_init(key: jax.Array, values: jax.Array, k: int, weights: jax.Array | None = None) -> jax.Array:
    """Return k of the values, ascending, each drawn in proportion to weight times squared distance to those before.

    values, weights: [blocks, n] -> [blocks, k]. Arthur and Vassilvitskii 2007 (k-means++), section 2.2.
    """
    values = _float32(values)
    weights = jnp.ones_like(values) if weights is None else _float32(weights)
    keys = jax.random.split(key, values.shape[0])
    seed = jax.vmap(functools.partial(_plus_plus, k=k))
    return jnp.sort(seed(keys, values[:, :, None], weights)[:, :, 0], axis=-1)


def lloyd(values: jax.Array, centroids: jax.Array, weights: jax.Array | None = None, iterations: int = 100):
    """Return the centroids after Lloyd's iterations, ascending: `c_j <- sum_{i in j} w_i x_i / sum_{i in j} w_i`.

    values, weights: [blocks, n]; centroids: [blocks, k] -> [blocks, k] float32. Stops before `iterations` where no
    centroid moves. A value between two centroids belongs to the lower; an empty cluster keeps its centroid. Lloyd 1982.
    """
    return _lloyd(*_sorted(values, weights), jnp.sort(_float32(centroids), axis=-1), iterations)


def assign(values: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return the index of the nearest of the ascending centroids, the lower of two. [blocks, n], [blocks, k] -> uint8.

    It is the number of midpoints below the value. Raises `ValueError` for more than 256 centroids.
    """
    k = centroids.shape[-1]
    if k > 256:
        raise ValueError(f"indices have 8 bits: at most 256 centroids, got {k}; use fewer, or assign_vectors")
    values, middle = _float32(values), _middle(_float32(centroids))
    if k - 1 > MOST_COMPARISONS:
        return jax.vmap(jnp.searchsorted)(middle, values).astype(jnp.uint8)
    index = jnp.zeros(values.shape, jnp.uint8)
    for j in range(k - 1):
        index += (values > middle[:, j : j + 1]).astype(jnp.uint8)
    return index


def fit(values: jax.Array, k: int, weights: jax.Array | None = None) -> jax.Array:
    """Return the best k centroids of every block, ascending: `partition.best` and `lloyd`. [blocks, n] -> [blocks, k].

    The optimum where a block has at most 256 values, or 16 k if that is more, up to 1024; otherwise they are grouped
    into so many points to start from and, for more than 64 clusters, improved with `windows`. Costs are float32: of two
    that differ by less than 1e-6 either may be taken.

    >>> import jax.numpy as jnp
    >>> from jaxq.numbers.lloyd import fit
    >>> fit(jnp.array([[1.0, 2.0, 3.0, 11.0, 12.0, 13.0]]), 2).tolist()
    [[2.0, 12.0]]
    """
    return _fit(*_sorted(values, weights), k)


def dkm(values: jax.Array, centroids: jax.Array, temperature, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Return soft values and centroids of differentiable k-means: gradients flow through all its iterations.

    `A = softmax_j(-(x_i - c_j)^2 / temperature)`, `c_j <- sum_i A_ij x_i / sum_i A_ij`, soft values `A c`. values:
    [blocks, n], or vectors [blocks, n, d]; centroids: [blocks, k] or [blocks, k, d]; temperature: positive, in units of
    the values' variance, one number or [blocks, 1, 1]. Memory is that of one iteration, `n k` numbers per block: the
    others are computed again in the gradient. Cho et al. 2022 (DKM), algorithm 1.
    """
    values, centroids, temperature = _float32(values), _float32(centroids), _float32(temperature)
    if values.ndim == 2:
        soft, centroids = dkm(values[:, :, None], centroids[:, :, None], temperature, iterations)
        return soft[:, :, 0], centroids[:, :, 0]
    precise = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    @jax.checkpoint
    def step(centroids, _):
        attention = _attention(values, centroids, temperature)
        mass = attention.sum(axis=1)[:, :, None]
        sums = precise("bnk,bnd->bkd", attention, values)
        full = mass > NEGLIGIBLE
        return jnp.where(full, sums / jnp.where(full, mass, 1), centroids), None

    centroids, _ = lax.scan(step, centroids, None, length=iterations)
    return precise("bnk,bkd->bnd", _attention(values, centroids, temperature), centroids), centroids


def centroid_gradient(gradient: jax.Array, indices: jax.Array, k: int) -> jax.Array:
    """Return the gradient of every centroid, `g_j = sum_{i in j} g_i`. [blocks, n] -> [blocks, k].

    A sum, not a mean, so that it grows with the cluster. Han et al. 2016 (Deep Compression), section 3.3.
    """
    total = functools.partial(jax.ops.segment_sum, num_segments=k)
    return jax.vmap(total)(_float32(gradient), indices.astype(jnp.int32))


def fit_vectors(
    key: jax.Array, vectors: jax.Array, k: int, iterations: int = 20, weights: jax.Array | None = None
) -> jax.Array:
    """Return a codebook for vectors, by k-means++ and Lloyd's iterations. [n, d], weights [n] -> [k, d].

    An entry that is nearest to no vector stays where it is.
    """
    vectors = _float32(vectors)
    weights = jnp.ones(vectors.shape[0], jnp.float32) if weights is None else _float32(weights)

    def step(_, codebook):
        index = assign_vectors(vectors, codebook)
        mass = jax.ops.segment_sum(weights, index, k)[:, None]
        # The mean of the distances from the old entry: smaller numbers, smaller rounding errors.
        moved = jax.ops.segment_sum(weights[:, None] * (vectors - codebook[index]), index, k)
        return codebook + moved / jnp.where(mass > 0, mass, 1)

    return lax.fori_loop(0, iterations, step, _plus_plus(key, vectors, weights, k))


def assign_vectors(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    """Return the index of the nearest entry, the first of several. [n, d], [k, d] -> int32 [n]."""
    codebook = _float32(codebook)

    def nearest(vector):
        return jnp.argmin(_distances(codebook, vector)).astype(jnp.int32)

    return lax.map(nearest, _float32(vectors), batch_size=BATCH)


def _distances(vectors: jax.Array, centre: jax.Array) -> jax.Array:
    return jnp.sum((vectors - centre[None, :]) ** 2, axis=-1)


def _middle(centroids: jax.Array) -> jax.Array:
    # Halves are exact and their sum is rounded once, whether or not it is fused: the same in every program.
    return 0.5 * centroids[..., :-1] + 0.5 * centroids[..., 1:]


def _sorted(values: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    values = _float32(values)
    if weights is None:
        return jnp.sort(values, axis=-1), None
    ordered, weights = lax.sort((values, _float32(weights)), dimension=-1, num_keys=1)
    return ordered, weights


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `a + b` rounded and the rounding error, exactly (Knuth 1969, section 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _add(a: Pair, b: Pair) -> Pair:
    total, error = _two_sum(a[0], b[0])
    return _two_sum(total, error + (a[1] + b[1]))


def _before(pair: Pair) -> tuple[Pair, Pair]:
    """Return the sums over the leading axis of what is before each index, and of all."""
    zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), pair)
    total, before = lax.scan(lambda sofar, x: (_add(sofar, x), sofar), zero, pair)
    return before, total


def _running(x: jax.Array) -> Pair:
    """Return `[0, x0, x0 + x1, ...]` along the last axis as an unrounded sum of two float32: [blocks, n + 1] each.

    In two levels, rows and then inside of rows: two loops of about sqrt(n) steps, of sqrt(n) sums each.
    """
    n = x.shape[1]
    width = math.isqrt(n) + 1
    rows = jnp.pad(x, ((0, 0), (0, width * width - n))).reshape(-1, width, width)
    steps = jnp.transpose(rows, (2, 0, 1))
    inside, totals = _before((steps, jnp.zeros_like(steps)))
    outside, _ = _before(jax.tree.map(jnp.transpose, totals))
    high, low = _add(jax.tree.map(lambda x: jnp.transpose(x)[None], outside), inside)

    def flat(part):
        return jnp.transpose(part, (1, 2, 0)).reshape(-1, width * width)[:, : n + 1]

    return flat(high), flat(low)


def _between(running: Pair, ends: jax.Array) -> jax.Array:
    """Return the sums of the values between successive `ends`: [blocks, k + 1] -> [blocks, k]."""
    high, low = (jnp.take_along_axis(part, ends, axis=1) for part in running)
    return (high[:, 1:] - high[:, :-1]) + (low[:, 1:] - low[:, :-1])


def _ends(values: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return where the clusters of ascending values begin, and the end: int32 [blocks, k + 1]."""
    search = jax.vmap(functools.partial(jnp.searchsorted, side="right"))
    inner = search(values, _middle(centroids)).astype(jnp.int32)
    return jnp.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, values.shape[-1])))


@functools.partial(jax.jit, static_argnames="iterations")
def _lloyd(values: jax.Array, weights: jax.Array | None, centroids: jax.Array, iterations: int) -> jax.Array:
    n = values.shape[-1]
    if n == 0:
        return centroids
    first = _running(values if weights is None else weights * values)
    mass = None if weights is None else _running(weights)

    def step(centroids):
        ends = _ends(values, centroids)
        count = jnp.diff(ends, axis=1)
        held = count.astype(jnp.float32) if mass is None else _between(mass, ends)
        full = (count > 0) & (held > NEGLIGIBLE * jnp.sum(held, axis=1, keepdims=True))
        mean = _between(first, ends) / jnp.where(full, held, 1)
        # Between its cluster's outermost values, whatever the rounding: so centroids stay ascending.
        low = jnp.take_along_axis(values, jnp.minimum(ends[:, :-1], n - 1), axis=1)
        high = jnp.take_along_axis(values, jnp.maximum(ends[:, 1:] - 1, 0), axis=1)
        return jnp.where(full, jnp.clip(mean, low, high), centroids)

    def unfinished(state):
        count, before, now = state
        return (count < iterations) & jnp.any(before != now)

    def advance(state):
        count, _, now = state
        return count + 1, now, step(now)

    return lax.while_loop(unfinished, advance, (jnp.int32(0), centroids + jnp.inf, centroids))[2]


@functools.partial(jax.jit, static_argnames="k")
def _fit(values: jax.Array, weights: jax.Array | None, k: int) -> jax.Array:
    """Return the centroids of ascending values."""
    n = values.shape[-1]
    if 0 in values.shape:
        return jnp.zeros((values.shape[0], k), jnp.float32)
    first = _running(values if weights is None else weights * values)
    masses = None if weights is None else _running(weights)

    def grouped(ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the means and the weights of the values between successive ends."""
        mass = jnp.diff(ends, axis=1).astype(jnp.float32) if masses is None else _between(masses, ends)
        alone = jnp.take_along_axis(values, jnp.minimum(ends[:, :-1], n - 1), axis=1)
        return jnp.where(mass > 0, _between(first, ends) / jnp.where(mass > 0, mass, 1), alone), mass

    count = min(n, max(FEWEST, min(POINTS_EACH * k, MOST)))
    best = partition.best(*grouped(partition.edges(values, weights, count)), k)
    if count < min(n, POINTS_EACH * k):
        best = grouped(windows.improve(_ends(values, best), grouped))[0]
    return _lloyd(values, weights, jnp.sort(best, axis=-1), 100)


@functools.partial(jax.jit, static_argnames="k")
def _companding(values: jax.Array, weights: jax.Array | None, k: int) -> jax.Array:
    n = values.shape[-1]
    if n == 0:
        return jnp.zeros((values.shape[0], k), jnp.float32)
    grid = np.unique(np.linspace(0, n - 1, min(n, QUANTILES + 1)).astype(np.int32))
    points = values[:, grid]
    if weights is None:
        part = jnp.asarray(np.diff(grid), jnp.float32)[None, :]
    else:
        part = jnp.diff(jnp.cumsum(weights, axis=-1)[:, grid], axis=-1)
    root = jnp.cbrt(jnp.maximum(part, 0) * jnp.diff(points, axis=-1) ** 2)
    mass = jnp.pad(jnp.cumsum(root, axis=-1), ((0, 0), (1, 0)))
    share = (np.arange(k, dtype=np.float32) + np.float32(0.5)) / np.float32(k)
    return jax.vmap(jnp.interp)(mass[:, -1:] * share[None, :], mass, points)


@functools.partial(jax.jit, static_argnames="k")
def _plus_plus(key: jax.Array, points: jax.Array, weights: jax.Array, k: int) -> jax.Array:
    """Return k of the points: [n, d], weights [n] -> [k, d]."""

    def draw(state, key):
        distance, likely = state
        chosen = points[jax.random.categorical(key, jnp.log(likely))]
        distance = jnp.minimum(distance, _distances(points, chosen))
        return (distance, weights * distance), chosen

    start = (jnp.full(points.shape[:1], jnp.inf, jnp.float32), weights)
    return lax.scan(draw, start, jax.random.split(key, k))[1]


def _attention(values: jax.Array, centroids: jax.Array, temperature: jax.Array) -> jax.Array:
    """Return `softmax_j(-(x_i - c_j)^2 / temperature)`: [blocks, n, d], [blocks, k, d] -> [blocks, n, k]."""
    distance = jnp.sum((values[:, :, None, :] - centroids[:, None, :, :]) ** 2, axis=-1)
    # Shifted before it is divided: a small temperature makes infinities of the far ones only.
    nearest = lax.stop_gradient(distance.min(axis=-1, keepdims=True))
    return jax.nn.softmax((nearest - distance) / temperature, axis=-1)
