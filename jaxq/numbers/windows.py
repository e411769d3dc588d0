"""A better partition of many sorted values, from a good one: dynamic programming with each boundary in a window.

A boundary's window is the two clusters beside it, each cut into a few parts. So all boundaries may shift by a whole
cluster in one pass, which is how a cluster is given up where it is worth little and found anew far away: what Lloyd's
iteration, where every step has to pay, never does. A new cluster lies within three old ones, and its cost is put
together from their parts, all terms positive, whatever the size of the array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Parts of a cluster, and how often all boundaries move.
PARTS, PASSES = 8, 4


def improve(ends: jax.Array, grouped: Callable) -> jax.Array:
    """Return where clusters begin, and the end, of a partition that costs no more: int32 [blocks, k + 1] -> the same.

    grouped: of groups between any ends [blocks, m + 1] the mean, and the weight: float32 [blocks, m] each.
    """
    return lax.fori_loop(0, PASSES, lambda _, ends: _pass(ends, grouped), ends)


def _pass(ends: jax.Array, grouped: Callable) -> jax.Array:
    blocks, k = ends.shape[0], ends.shape[1] - 1
    part, rest = jnp.divmod(jnp.diff(ends)[:, :, None], PARTS)
    number = jnp.arange(PARTS, dtype=jnp.int32)[None, None, :]
    places = ends[:, :-1, None] + part * number + rest * number // PARTS  # [blocks, k, PARTS]
    groups = grouped(jnp.concatenate([places.reshape(blocks, k * PARTS), ends[:, -1:]], axis=1))
    mean, weight = (x.reshape(blocks, k, PARTS) for x in groups)
    index = jax.vmap(_choose)(jax.vmap(_costs)(mean, weight))
    # Boundary m takes one of 2 PARTS + 1 places, of which the middle one is where it was.
    filled = [jnp.broadcast_to(end[:, :, None], (blocks, n, PARTS)) for end, n in ((ends[:, :1], 1), (ends[:, -1:], 2))]
    padded = jnp.concatenate([filled[0], places, filled[1]], axis=1)
    window = jnp.concatenate([padded[:, :-2], padded[:, 1:-1], padded[:, 2:, :1]], axis=2)  # [blocks, k + 1, ...]
    return jnp.take_along_axis(window, index[:, :, None], axis=2)[:, :, 0]


def _costs(mean: jax.Array, weight: jax.Array) -> jax.Array:
    """Return what a cluster costs from every place of one window to every place of the next: [k, PARTS] -> [k, a, b].

    From all that begin in a window, those that end a part later: their means move, their costs grow (Welford 1962).
    """
    padded = [jnp.pad(x, ((1, 1), (0, 0))) for x in (mean, weight)]
    three = [jnp.concatenate([x[:-2], x[1:-1], x[2:]], axis=1) for x in padded]
    begin = jnp.arange(2 * PARTS + 1)[None, :]

    def extend(clusters, new):
        (total, centre, cost), (i, x, w) = clusters, new
        begun = begin <= i
        grown = jnp.where(begun, total + w[:, None], 0)
        share = jnp.where(begun, w[:, None] / jnp.where(grown > 0, grown, 1), 0)
        apart = x[:, None] - centre
        cost = jnp.where(begun, cost + total * share * apart * apart, 0)
        return (grown, jnp.where(begun, centre + share * apart, 0), cost), jnp.where(begun, cost, jnp.inf)

    none = jnp.zeros((mean.shape[0], 2 * PARTS + 1), jnp.float32)
    costs = lax.scan(extend, (none, none, none), (jnp.arange(3 * PARTS), *(x.T for x in three)))[1]
    costs = jnp.where((begin == jnp.arange(1, 3 * PARTS + 1)[:, None])[:, None, :], 0, costs)  # of no values
    return jnp.transpose(costs[PARTS - 1 :], (1, 2, 0))


def _choose(costs: jax.Array) -> jax.Array:
    """Return the place of every boundary on the cheapest path through all windows: [k, a, b] -> int32 [k + 1]."""

    def layer(least, costs):
        total = least[:, None] + costs
        return total.min(axis=0), total.argmin(axis=0).astype(jnp.int32)

    def follow(place, choice):
        return choice[place], place

    still = jnp.int32(PARTS)
    start = jnp.where(jnp.arange(2 * PARTS + 1) == PARTS, np.float32(0), np.float32(np.inf))
    choices = lax.scan(layer, start, costs)[1]
    first, places = lax.scan(follow, still, choices, reverse=True)
    return jnp.concatenate([first[None], places])
