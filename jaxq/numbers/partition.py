"""The best partition of a few weighted points into intervals: exact k-means in one dimension, inside a program.

Dynamic programming over the ends of clusters. `D_m[i] = min_j D_(m-1)[j] + cost(j, i)` is the least cost of the first i
points in m clusters; a layer is one sum of a matrix and a vector, and its minima. Costs are put together from those of
points one by one, all terms positive, so that nothing cancels and float32 will do. Wang and Song 2011.

Sharp edge: n^2 numbers for n points and k n^2 sums, so this is for some hundreds of them; `edges` groups more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Numbers of the cost matrices that are in memory at once: what fits a core's cache.
MATRIX = 2**18


def best(points: jax.Array, mass: jax.Array, k: int) -> jax.Array:
    """Return the k centroids of least `sum_i w_i min_j (x_i - c_j)^2`, ascending: [blocks, n] twice -> [blocks, k].

    points: ascending; mass: at least zero. With fewer points than k the last centroid is repeated.
    """
    n = points.shape[-1]
    clusters = min(k, n)
    count = points.shape[0]
    # Blocks at once: a divisor of their number, so that no remainder is compiled too.
    batch = max(size for size in range(1, max(1, MATRIX // n**2) + 1) if count % size == 0)
    some = jax.vmap(functools.partial(_best, k=clusters))
    parts = [x.reshape(count // batch, batch, n) for x in (points, mass)]
    found = some(*(x[0] for x in parts)) if batch == count else lax.map(lambda pair: some(*pair), tuple(parts))
    found = found.reshape(count, clusters)
    return jnp.pad(found, ((0, 0), (0, k - clusters)), mode="edge")


def _best(points: jax.Array, mass: jax.Array, k: int) -> jax.Array:
    """Return the centroids of one block: [n], [n] -> [k]."""
    n = points.shape[0]
    costs = _costs(points, mass)

    def layer(before, _):
        least = jnp.min(before[:, None] + costs, axis=0)
        return jnp.concatenate([jnp.full(1, jnp.inf, jnp.float32), least[:-1]]), before

    def choose(stop, before):
        start = jnp.argmin(before + lax.dynamic_index_in_dim(costs, stop - 1, 1, keepdims=False)).astype(jnp.int32)
        return start, start

    first = jnp.where(jnp.arange(n) == 0, jnp.float32(0), jnp.float32(jnp.inf))
    layers = lax.scan(layer, first, None, length=k)[1]
    starts = lax.scan(choose, jnp.int32(n), layers, reverse=True)[1]
    cluster = jnp.sum(jnp.arange(n)[:, None] >= starts[None, 1:], axis=1)
    weight, first = (jax.ops.segment_sum(x, cluster, k) for x in (mass, mass * points))
    return jnp.where(weight > 0, first / jnp.where(weight > 0, weight, 1), points[starts])


def _costs(points: jax.Array, mass: jax.Array) -> jax.Array:
    """Return what the points [j, i] cost as a cluster at row j, column i, and infinity where i < j. [n] -> [n, n].

    All clusters that end at a point from those that end before it: their means move, their costs grow (Welford 1962).
    """
    number = jnp.arange(points.shape[0])

    def extend(clusters, new):
        (weight, mean, cost), (i, x, w) = clusters, new
        begun = number <= i
        total = jnp.where(begun, weight + w, 0)
        share = jnp.where(total > 0, w / jnp.where(total > 0, total, 1), 0)
        apart = x - mean
        cost = jnp.where(begun, cost + weight * share * apart * apart, 0)
        return (total, jnp.where(begun, mean + share * apart, 0), cost), jnp.where(begun, cost, jnp.inf)

    none = jnp.zeros_like(points)
    return lax.scan(extend, (none, none, none), (number, points, mass))[1].T


def edges(values: jax.Array, weights: jax.Array | None, count: int) -> jax.Array:
    """Return where `count` groups of the ascending values begin, and the end: int32 [blocks, count + 1].

    Half of them spread like the weight, half like the centroids of an optimum, whose density is the cube root of the
    values' (Panter and Dite 1951): a step d that holds a part p of the weight has the mass `p^(1/3) d^(2/3)`.
    """
    n = values.shape[-1]
    if count == n:
        return jnp.broadcast_to(jnp.arange(n + 1, dtype=jnp.int32), (values.shape[0], n + 1))
    part = jnp.ones_like(values) if weights is None else weights
    apart = jnp.diff(values, axis=-1)
    spread = jnp.cumsum(jnp.cbrt(part[:, :-1] * apart**2), axis=-1)
    filled = jnp.cumsum(part[:, :-1], axis=-1)
    whole = [x / jnp.maximum(x[:, -1:], np.float32(1e-30)) for x in (spread, filled)]
    share = whole[0] + whole[1]
    steps = jnp.linspace(0, 1, count + 1, dtype=jnp.float32)[None, 1:-1] * share[:, -1:]
    inner = jax.vmap(jnp.searchsorted)(share, steps).astype(jnp.int32) + 1
    return jnp.pad(jnp.minimum(inner, n), ((0, 0), (1, 1)), constant_values=((0, 0), (0, n)))
