"""Quantizers whose parameters are learned: what they are for each format, and how the decoded array follows them.

A format is here if it has a `Trait`: the best parameters of an array, the codes that parameters give, where nothing is
clipped, and the derivative of the decoded array. Assignments are made anew at every call, by the parameters as they are
then or, where they are frozen, as they were at first; they are constant to derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import apot, blocks, codebooks, codecs, steps, ttq
from jaxq.numbers.blocks import varying_axes
from jaxq.numbers.formats import Codebook, Int, Levels, vector_length
from jaxq.numbers.parameters import OF_ZEROS, Learned, Parameters, is_settled
from jaxq.numbers.qarray import QArray

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer

Grid = tuple[int, ...]


class Trait(NamedTuple):
    """What a format with learned parameters can do; `value` is what `Parameters` hold for one array.

    start: `(quantizer, x, grid, importance) -> value`, the best for an array whose errors may count differently.
    encode: `(quantizer, x, grid, value) -> QArray`, of values that are constant to derivatives. passed: `(quantizer, x,
    q, dx) -> dx`, what passes of a step of x, linear in it. follow: `(quantizer, x, q, value, change) -> dx`, how the
    decoded array moves when the value does, linear in the change.
    """

    start: Callable[..., Any]
    encode: Callable[..., QArray]
    passed: Callable[..., jax.Array]
    follow: Callable[..., jax.Array]


def unobserved(stack: tuple[int, ...], quantizer: Quantizer, shape: Sequence[int], grid: Grid) -> Parameters:
    """Return the parameters of an array of `shape` that nothing has been seen of: NumPy zeros, a count of zero."""
    x = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    value = jax.eval_shape(lambda x: _trait(quantizer).start(quantizer, x, grid, None), x)
    zeros = jax.tree.map(lambda leaf: np.zeros((*stack, *leaf.shape), np.float32), value)
    return Parameters(zeros, np.zeros(stack, np.float32))


def observe(
    quantizer: Quantizer, x: jax.Array, grid: Grid, old: Parameters, importance: jax.Array | None = None
) -> Parameters:
    """Return one observation: the best parameters of an array, which are looked for only where there are none yet.

    importance: what the squared error of each value counts, of x's shape; of codebooks only. Channels of zeros, and
    groups of them, say nothing of what they will be trained to: they start as other weights of a layer do before they
    are trained, with a variance of one over their number (LeCun et al. 1998, section 4.6). Of NaN and infinity all
    parameters are NaN: they show in what is quantized, and give way to the next ones.
    """
    x = lax.stop_gradient(x)
    known = is_settled(old)
    settled, finite = jnp.any(x != 0) | known, jnp.all(jnp.isfinite(x)) | known
    if _has_zero_channels(quantizer):
        x = _drawn(x, grid)

    def start() -> Any:
        return _trait(quantizer).start(quantizer, x, grid, importance)

    # Inside shard_map the two sides of a branch must vary over the same devices, which they do not.
    apart = bool(varying_axes(x))
    value = start() if apart else lax.cond(known, lambda: jax.tree.map(jnp.asarray, old.value), start)
    value = jax.tree.map(lambda v: jnp.where(finite, v, jnp.float32(np.nan)), value)
    if 0 in x.shape:
        return Parameters(value, jnp.float32(0))
    return Parameters(value, jnp.where(settled, jnp.float32(1), jnp.float32(OF_ZEROS)))


def _has_zero_channels(quantizer: Quantizer) -> bool:
    """Tell whether it is for weights, which activations are not by channel, and zeros stay zero whatever is learned."""
    assert isinstance(quantizer.calibrator, Learned), "only learned quantizers have parameters"
    ternary = quantizer.calibrator.threshold is not None
    return ternary or not (quantizer.per_tensor or isinstance(quantizer.format, Codebook))


def _drawn(x: jax.Array, grid: Grid) -> jax.Array:
    """Return the array with evenly spread numbers, of a variance of one over their number, in its blocks of zeros."""
    rows = blocks.to_rows(x, grid)
    count = rows.shape[1]
    spread = jnp.asarray(np.linspace(-1, 1, count) * np.sqrt(3 / max(1, count)), x.dtype)
    empty = jnp.all(rows == 0, axis=1, keepdims=True)
    return blocks.from_rows(jnp.where(empty, spread[None], rows), grid, x.shape)


def encode(quantizer: Quantizer, x: jax.Array, grid: Grid, parameters: Parameters) -> QArray:
    """Return the codes of `x` by learned parameters."""
    value = lax.stop_gradient(jax.tree.map(jnp.asarray, parameters.value))
    return _trait(quantizer).encode(quantizer, x, grid, value)


def passed(quantizer: Quantizer, x: jax.Array, q: QArray, dx: jax.Array) -> jax.Array:
    """Return what passes of a step of `x`, straight through where nothing is clipped."""
    return _trait(quantizer).passed(quantizer, x, q, dx)


def follow(quantizer: Quantizer, x: jax.Array, q: QArray, parameters: Parameters, change: Any) -> jax.Array:
    """Return how `decode(q)`, the codes of `x`, moves with a change of the parameters' value: linear in it."""
    value = lax.stop_gradient(jax.tree.map(jnp.asarray, parameters.value))
    return _trait(quantizer).follow(quantizer, x, q, value, change)


def _trait(quantizer: Quantizer) -> Trait:
    assert isinstance(quantizer.calibrator, Learned), "only learned quantizers have parameters"
    if quantizer.calibrator.threshold is not None:
        return TERNARY
    return FROZEN if quantizer.calibrator.frozen else TRAITS[type(quantizer.format)]


# --- codebooks --------------------------------------------------------------------------------------------------------


def _table(quantizer: Quantizer, x: jax.Array, grid: Grid, importance: jax.Array | None) -> jax.Array:
    """Return the best centroids of every block, [*grid, size]."""
    assert isinstance(quantizer.format, Codebook)
    return codebooks.centroids(quantizer.format, x, grid, importance)


def _nearest(quantizer: Quantizer, x: jax.Array, grid: Grid, table: jax.Array) -> QArray:
    """Return the nearest centroids; numbers are sorted first, since training may have moved one past another."""
    assert isinstance(quantizer.format, Codebook)
    table = jnp.sort(table, axis=-1) if quantizer.format.dim == 1 else table
    return codecs.by_table(quantizer.format, x, grid, table)


def _everywhere(quantizer: Quantizer, x: jax.Array, q: QArray, dx: jax.Array) -> jax.Array:
    return dx


def _moved(quantizer: Quantizer, x: jax.Array, q: QArray, value: jax.Array, change: jax.Array) -> jax.Array:
    """`dx_i = dc_(code of i)`: the gradient of a centroid is its cluster's sum (Han et al. 2016, section 3.3)."""
    if vector_length(quantizer.format) == 1:
        change = jnp.take_along_axis(change, jnp.argsort(value, axis=-1), axis=-1)  # codes are by the sorted table
    return lax.convert_element_type(dataclasses.replace(q, table=change).values(), x.dtype)


def _pair(quantizer: Quantizer, x: jax.Array, grid: Grid, importance: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the best centroids twice: those that are trained, and those that values are assigned by."""
    table = _table(quantizer, x, grid, importance)
    return table, table


def _assigned(quantizer: Quantizer, x: jax.Array, grid: Grid, pair: tuple[jax.Array, jax.Array]) -> QArray:
    """Return the codes by what the centroids were at first, with the centroids as they are."""
    assert isinstance(quantizer.format, Codebook)
    q = codecs.by_table(quantizer.format, x, grid, pair[1])
    return dataclasses.replace(q, table=lax.select(lax.eq(q.table, q.table), pair[0], q.table))


def _nowhere(quantizer: Quantizer, x: jax.Array, q: QArray, dx: jax.Array) -> jax.Array:
    return lax.full_like(dx, 0)


def _moved_alone(quantizer: Quantizer, x: jax.Array, q: QArray, value: Any, change: Any) -> jax.Array:
    """`dx_i = dc_(code of i)`, whatever happens to the centroids of the assignment."""
    return lax.convert_element_type(dataclasses.replace(q, table=change[0]).values(), x.dtype)


TERNARY = Trait(ttq.start, ttq.encode, ttq.passed, ttq.follow)
FROZEN = Trait(_pair, _assigned, _nowhere, _moved_alone)
TRAITS: dict[type, Trait] = {
    Codebook: Trait(_table, _nearest, _everywhere, _moved),
    Int: Trait(steps.start, steps.encode, steps.passed, steps.follow),
    Levels: Trait(apot.start, apot.encode, apot.passed, apot.follow),
}
