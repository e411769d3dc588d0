"""The centroids of a codebook: the best for the blocks of an array, or for all that a histogram has counted."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import blocks, histogram, lloyd, means
from jaxq.numbers.fits import DKM
from jaxq.numbers.formats import Codebook
from jaxq.numbers.histogram import Histogram

Grid = tuple[int, ...]

# The least temperature of soft assignments, for values of about one: of anything colder rounding is all that is left.
COLD = 1e-7


def centroids(form: Codebook, x: jax.Array, grid: Grid, importance: jax.Array | None = None) -> jax.Array:
    """Return the best centroids of every block of `x`, ascending: float32 [*grid, size].

    importance: what a squared error counts, of x's shape, at least zero; all the same in a block that has none. Vectors
    run along the last axis and count what their values do together; their centroids, near the best, are in no order:
    [*grid, size * dim].
    """
    rows, weights = (y if y is None else _rows(y, grid) for y in (x, importance))
    fitted = _fitted_table if form.dim == 1 else _fitted_vectors
    return lax.reshape(fitted(rows, form, weights), (*grid, form.entries))


def _rows(x: jax.Array, grid: Grid) -> jax.Array:
    return blocks.to_rows(lax.convert_element_type(x, jnp.float32), grid)


def follow_softly(form: Codebook, fit: DKM, x: jax.Array, table: jax.Array, dx: jax.Array) -> jax.Array:
    """Return how `x`, at the nearest of the centroids [*grid, entries], moves with a change of x: linear in it.

    Vectors run along the last axis.
    """
    grid = table.shape[:-1]
    rows, power = _scaled(_rows(x, grid))
    start = lax.reshape(table, (rows.shape[0], form.entries))
    start = lax.div(start, jnp.broadcast_to(power, start.shape))
    spread = jnp.var(rows, axis=1)[:, None, None]
    temperature = lax.max(lax.mul(spread, np.float32(fit.temperature)), np.float32(COLD))

    def vectors(rows: jax.Array) -> jax.Array:
        return lax.reshape(rows, (rows.shape[0], rows.shape[1] // form.dim, form.dim))

    def soft(rows: jax.Array) -> jax.Array:
        values = lloyd.dkm(vectors(rows), vectors(start), temperature, fit.iterations)[0]
        return lax.reshape(values, rows.shape)

    # Both sides are over the same power of two, and the map between them is linear.
    step = jax.jvp(soft, (rows,), (_rows(dx, grid),))[1]
    return lax.convert_element_type(blocks.from_rows(step, grid, x.shape), dx.dtype)


def table_of(form: Codebook, h: Histogram) -> jax.Array:
    """Return the best centroids of all that was counted, as if it were in the middle of its bins: [*stack, size]."""
    h = jax.tree.map(lambda leaf: lax.stop_gradient(jnp.asarray(leaf)), h)
    stack, bins = h.counts.shape[:-1], h.counts.shape[-1]
    counts = lax.reshape(h.counts, (h.exponent.size, bins))
    middle = lax.broadcasted_iota(jnp.float32, counts.shape, 1) - np.float32((bins - 1) / 2)
    table = lax.reshape(lloyd.fit(middle, form.size, counts), (*stack, form.size))
    return lax.mul(table, jnp.broadcast_to(histogram.width(h)[..., None], table.shape))


def _fitted_table(rows: jax.Array, form: Codebook, weights: jax.Array | None) -> jax.Array:
    """Return the centroids of every row, found near one: squares of huge numbers overflow, of tiny ones vanish."""
    if 0 in rows.shape:
        return jnp.zeros((rows.shape[0], form.size), jnp.float32)
    scaled, power = _scaled(rows)
    table = lloyd.fit(scaled, form.size, None if weights is None else _near_one(weights))
    own, few = _distinct(rows, form.size)
    table = lax.mul(table, jnp.broadcast_to(power, table.shape))
    return lax.select(jnp.broadcast_to(few[:, None], table.shape), own, table)


def _fitted_vectors(rows: jax.Array, form: Codebook, weights: jax.Array | None) -> jax.Array:
    """Return the centroids of every row's vectors: k-means++ from a key that is always the same, and Lloyd."""
    if 0 in rows.shape:
        return jnp.zeros((rows.shape[0], form.entries), jnp.float32)
    scaled, power = _scaled(rows)
    weights = jnp.ones_like(rows) if weights is None else _near_one(weights)
    vectors, weights = (lax.reshape(y, (rows.shape[0], rows.shape[1] // form.dim, form.dim)) for y in (scaled, weights))
    key = jax.random.key(0, impl="threefry2x32")
    table = jax.vmap(lambda v, w: lloyd.fit_vectors(key, v, form.size, weights=w.sum(-1)))(vectors, weights)
    table = lax.reshape(table, (rows.shape[0], form.entries))
    return lax.mul(table, jnp.broadcast_to(power, table.shape))


def _scaled(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return every row over a power of two, zeros for what is not finite, and the powers: [blocks, 1]."""
    finite = lax.select(lax.is_finite(rows), rows, lax.full_like(rows, 0))
    power = means.power_of(lax.reduce_max(lax.abs(finite), (1,)))[:, None]
    return lax.mul(finite, jnp.broadcast_to(lax.div(np.float32(1), power), rows.shape)), power


def _near_one(weights: jax.Array) -> jax.Array:
    """Return the weights of every row over a power of two; ones for zeros."""
    most = lax.reduce_max(weights, (1,))[:, None]
    scaled = lax.mul(weights, jnp.broadcast_to(lax.div(np.float32(1), means.power_of(most)), weights.shape))
    return lax.select(jnp.broadcast_to(most > 0, weights.shape), scaled, lax.full_like(weights, 1))


def _distinct(rows: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Return the values of every row without repetition, filled up with the last, and whether `size` hold them all."""
    values = lax.sort(lax.select(lax.is_finite(rows), rows, lax.full_like(rows, 0)))
    new = lax.convert_element_type(values[:, 1:] > values[:, :-1], jnp.int32)
    rank = jnp.pad(jnp.cumsum(new, axis=1), ((0, 0), (1, 0)))
    table = jnp.broadcast_to(values[:, -1:], (rows.shape[0], size))
    number = lax.broadcasted_iota(jnp.int32, rank.shape, 0)
    return table.at[number, rank].set(values, mode="drop"), rank[:, -1] < size
