"""Parameters of a quantizer that are trained: leaves of a plan, started from the first array they are shown.

`Learned` is the calibrator that asks for them, `Parameters` the leaf. What they are for a format, and how values follow
them, is in `learning`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Parameters(NamedTuple):
    """What training may change of a quantizer, and how often it was observed; all leaves float32.

    value: [*stack, ...], an array or a tuple of arrays as the format has it (centroids: [*stack, *grid, entries]);
    count: [*stack], zero where nothing was observed, less than one where nothing but zeros was, whose parameters serve
    until something else is, as do those of NaN and infinity, which are NaN. Differentiable by `value`.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.array([[1.0], [2.0], [9.0]])}
    >>> policy = jaxq.weight_only(jaxq.kmeans(2, calibrator=jaxq.learned()))
    >>> _, plan = jaxq.observe(f, policy)(params, jnp.ones((1, 3)))
    >>> plan.range("w")[1].value.tolist()
    [[[1.5, 9.0]]]
    """

    value: Any
    count: Any


LSQ, PACT = "lsq", "pact"
OF_ZEROS = 2.0**-20  # what an array of zeros adds to a count: it says nothing of a range


@dataclasses.dataclass(frozen=True)
class Learned:
    """Parameters are leaves of the plan: the best for the first array seen, then whatever training makes of them.

    frozen: of codebooks, values stay with the centroids that they had at first. rule: of integers, how steps learn.
    threshold: of codebooks of three, the part of the largest value below which all is zero (TTQ).

    >>> import jaxq
    >>> jaxq.kmeans(16, calibrator=jaxq.learned())
    codebook of 16 per tensor static (Learned())
    """

    frozen: bool = False
    rule: str = LSQ
    threshold: float | None = None
    histogram = False

    def __post_init__(self):
        if self.rule not in (LSQ, PACT):
            raise ValueError(f"rule= of learned steps is 'lsq' or 'pact', got {self.rule!r}")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold= is a part of the largest value, in [0, 1), got {self.threshold!r}")

    def __repr__(self) -> str:
        own = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Learned({', '.join(f'{name}={value!r}' for name, value in own)})"

    def update(self, old: Parameters, new: Parameters) -> Parameters:
        """Return the parameters as they were, or as they are seen now for the first time."""
        value = jax.tree.map(lambda a, b: jnp.reshape(b, jnp.shape(a)), old.value, new.value)  # of whatever rank
        return first(old, new._replace(value=value))._replace(count=old.count + new.count)


def learned(*, frozen: bool = False, rule: str = LSQ) -> Learned:
    """Make a calibrator whose parameters are trained: differentiate by the plan, `optax` over `(plan, params)`.

    Of a codebook these are its centroids, of integers their steps (LSQ; LSQ+ where there are zero points, TQT where
    steps are powers of two). Values are assigned to centroids anew at every call. frozen: of a codebook, only the
    centroids are trained, and every value stays with its own (Han et al. 2016, section 3.3): parameters are a pair, the
    centroids and what they were at first, by which values are assigned, and no gradient goes on to the values; decay
    neither (`jaxq.labels` marks the second as fixed). rule: of integers, "lsq" or "pact", by which only what is clipped
    moves a step (Choi et al. 2018, eq. 3); its L2 penalty is `optax.add_decayed_weights` on the steps. A step is used
    by its absolute value, at least 2^-120, so that training cannot make it zero or negative. Raises `ValueError` for
    other rules.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.array([[1.0], [2.0], [9.0]])}
    >>> policy, x = jaxq.weight_only(jaxq.kmeans(2, calibrator=jaxq.learned())), jnp.ones((1, 3))
    >>> _, plan = jaxq.observe(f, policy)(params, x)
    >>> gradient = jax.grad(lambda plan: jaxq.qat(f, plan)(params, x).sum())(plan)
    >>> gradient.range("w")[1].value.tolist()  # the sums over what the centroids stand for
    [[[2.0, 1.0]]]
    """
    return Learned(frozen, rule)


def change_of_size(value: jax.Array, change: jax.Array) -> jax.Array:
    """Return how the absolute value of a parameter changes with it: `sign(value) change`, zero counting as positive."""
    return jnp.where(value < 0, -change, change)


def first(a: Parameters, b: Parameters) -> Parameters:
    """Return the parameters that were observed, the former of two."""
    return _chosen(is_settled(a) | (~is_settled(b) & (jnp.asarray(a.count) > 0)), a, b)


def is_settled(p: Parameters) -> jax.Array:
    """Tell where something was observed other than zeros, NaN and infinity: [*stack]."""
    return (jnp.asarray(p.count) >= 1) & (_largest(p) < np.float32(np.inf))


def widest(a: Parameters, b: Parameters) -> Parameters:
    """Return the wider parameters of two observations: a recurrent state starts as zeros, which say nothing of it."""
    return _chosen(_width(a) >= _width(b), a, b)


def widest_of_axis(stacked: Parameters) -> Parameters:
    """Return the widest along the leading axis; zeros where there is none."""
    at = jnp.argmax(_width(stacked), axis=0) if stacked.count.shape[0] else None

    def pick(x: jax.Array) -> jax.Array:
        if at is None:
            return jnp.zeros(x.shape[1:], x.dtype)
        index = at.reshape(1, *at.shape, *(1,) * (x.ndim - 1 - at.ndim))
        return jnp.take_along_axis(x, index, axis=0)[0]

    return jax.tree.map(pick, stacked)


def _chosen(former: jax.Array, a: Parameters, b: Parameters) -> Parameters:
    """Return, for every place in the stack, the parameters of `a` or of `b`."""

    def pick(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(former.reshape(former.shape + (1,) * (jnp.ndim(x) - former.ndim)), x, y)

    return Parameters(jax.tree.map(pick, a.value, b.value), jnp.maximum(a.count, b.count))


def _width(p: Parameters) -> jax.Array:
    """Return the largest absolute number, [*stack]; less than zero where nothing was observed, or only zeros."""
    count = jnp.asarray(p.count)
    return jnp.where(count >= 1, _largest(p), jnp.where(count > 0, jnp.float32(-1), jnp.float32(-2)))


def _largest(p: Parameters) -> jax.Array:
    """Return the largest absolute number, infinity for NaN: [*stack]."""

    def largest(leaf: jax.Array) -> jax.Array:
        size = jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), jnp.float32(np.inf))
        return size.max(tuple(range(jnp.ndim(p.count), size.ndim)), initial=0)

    return functools.reduce(jnp.maximum, [largest(leaf) for leaf in jax.tree.leaves(p.value)])
