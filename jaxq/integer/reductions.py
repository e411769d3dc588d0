"""Sums, means, maxima and pools: integers over some axes, along which there is one scale.

A mean is a sum whose scale is divided: no rounding. Sums are shifted down first where their range says that int32 might
not hold them.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.scales import uniform, within
from jaxq.integer.values import INT32, Coded, Plain, Refusal, Value, wide
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn

# Integers that a vector holds.
LANES = 8


def _even(v: Coded, axes: Sequence[int]) -> Coded:
    """Return the same values with one scale along some axes."""
    return uniform(v) if any(v.scale.shape[a] > 1 for a in axes) else v


def _summable(v: Coded, terms: int, axes: Sequence[int]) -> Coded:
    """Return int32 codes of which that many can be added up, with one scale along some axes."""
    if not isinstance(terms, int):
        raise Refusal("sums over an axis whose length is a symbol: int32 may not hold it, export with a known length")
    return within(_even(v, axes), INT32[1] // max(terms, 1))


def total(eqn: Eqn, x: Coded) -> Coded:
    """Sum over axes."""
    axes = tuple(eqn.params["axes"])
    v = _summable(x, math.prod(x.codes.shape[a] for a in axes), axes)
    low, high = (np.squeeze(_over(end, v, axes), axes) for end in (v.low, v.high))
    return wide(jaxpr.rebind(eqn, v.codes)[0], np.squeeze(v.scale, axes), low, high)


def running(eqn: Eqn, x: Coded) -> Coded:
    """Sum of a value and all before it along an axis."""
    axis = eqn.params["axis"]
    v = _summable(x, x.codes.shape[axis], (axis,))
    low, high = (_over(end, v, (axis,)) for end in (np.minimum(v.low, 0), np.maximum(v.high, 0)))
    return wide(jaxpr.rebind(eqn, v.codes)[0], v.scale, low, high)


def sums_of_words(codes: jax.Array, bits: int, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Return the sums over axes, kept as ones, of what is above the last `bits` of int32 codes, and of those bits."""
    words = (codes >> bits, codes & (2**bits - 1))
    folded = (_folded(word, axes, lax.add) for word in words)
    high, low = (jnp.sum(x, tuple(axes), keepdims=True, dtype=jnp.int32) for x in folded)
    return high, low


def largest(codes: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Return the largest of integers over axes, kept as ones."""
    return jnp.max(_folded(codes, axes, lax.max), tuple(axes), keepdims=True)


def _folded(codes: jax.Array, axes: Sequence[int], join: Callable) -> jax.Array:
    """Return codes of which one half of the last axis is joined with the other, again and again.

    XLA's CPU compiler has vectors for that, and hardly any for a reduction along the axis in which numbers are next to
    each other. What computes the codes stays out of it: it would be compiled again for each half of a half.
    """
    last, codes = codes.ndim - 1, lax.optimization_barrier(codes)
    while last in axes and isinstance(n := codes.shape[last], int) and n % 2 == 0 and n > LANES:
        halves = (lax.slice_in_dim(codes, start, start + n // 2, axis=last) for start in (0, n // 2))
        codes = join(*halves)
    return codes


def _over(end: np.ndarray, v: Coded, axes: Sequence[int]) -> np.ndarray:
    """Return the sum of a bound over axes, kept as ones."""
    for axis in axes:
        end = end.sum(axis, keepdims=True) * (1 if end.shape[axis] > 1 else v.codes.shape[axis])
    return end


def _window(eqn: Eqn) -> tuple[tuple[int, ...], list[int]]:
    """Return a window's size, and the axes along which it is more than a copy. Refuse windows with nothing in them."""
    p = eqn.params
    window = tuple(p["window_dimensions"])
    spans = [(n - 1) * d + 1 for n, d in zip(window, p["window_dilation"], strict=True)]
    if any(max(pads) >= span > 0 and any(pads) for pads, span in zip(p["padding"], spans, strict=True)):
        raise Refusal("has windows that lie outside of the image as a whole: pad less")
    if any(span < step for span, step in zip(spans, p["base_dilation"], strict=True)):
        raise Refusal("has windows that lie between the points of a dilated image: dilate less")
    strides = zip(window, p["window_strides"], p["base_dilation"], p["padding"], strict=True)
    return window, [axis for axis, (n, s, b, pads) in enumerate(strides) if (n, s, b) != (1, 1, 1) or any(pads)]


def window_sum(eqn: Eqn, x: Coded) -> Coded:
    """Sum over windows; what is padded is zero, as the zero point is taken off first."""
    window, axes = _window(eqn)
    terms = math.prod(window)
    v = _summable(x, terms, axes)
    low, high = (end.min(tuple(axes), keepdims=True) for end in (v.low, -v.high))
    low, high = np.minimum(low, 0) * terms, np.maximum(-high, 0) * terms
    return wide(jaxpr.rebind(eqn, v.codes)[0], v.scale, low, high)


def window_maximum(eqn: Eqn, x: Coded) -> Coded:
    """The largest code of each window, on the grid of the codes."""
    _, axes = _window(eqn)
    v = _even(x, axes)
    return Coded(jaxpr.rebind(eqn, v.codes)[0], v.scale, *_lowest_highest(v, axes), v.zero_point)


def _lowest_highest(v: Coded, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return v.low.min(tuple(axes), keepdims=True), v.high.max(tuple(axes), keepdims=True)


def extreme(eqn: Eqn, x: Coded) -> Coded:
    """The largest or the smallest code over axes."""
    axes = tuple(eqn.params["axes"])
    v = _even(x, axes)
    low, high = (np.squeeze(end, axes) for end in _lowest_highest(v, axes))
    return Coded(jaxpr.rebind(eqn, v.codes)[0], np.squeeze(v.scale, axes), low, high, v.zero_point)


def which(eqn: Eqn, x: Coded) -> Plain:
    """The index of the largest or the smallest code."""
    return Plain(jaxpr.rebind(eqn, _even(x, tuple(eqn.params["axes"])).codes)[0])


RULES: dict[object, Callable[..., Value]] = {
    lax.reduce_sum_p: total,
    lax.cumsum_p: running,
    lax.reduce_window_sum_p: window_sum,
    lax.reduce_window_max_p: window_maximum,
    lax.reduce_max_p: extreme,
    lax.reduce_min_p: extreme,
    lax.argmax_p: which,
    lax.argmin_p: which,
}
