"""Straight-through estimators: what a gradient becomes on its way back past a rounding.

Rounding has no derivative worth the name. By default its gradient passes unchanged wherever nothing was clipped; these
change it, as `estimator=` of a quantizer. Forward passes, serving and what is stored do not know of them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class EWGS:
    """Element-wise gradient scaling (Lee et al. 2021, eq. 6): `g (1 + scaling sign(g) (x - x^))`.

    A gradient counts for more where the value has yet to go to where it was rounded to, and less where it was rounded
    beyond; the rounding error is in units of the range. With a scaling of zero it is the plain estimator.

    >>> import jaxq
    >>> jaxq.int4(estimator=jaxq.EWGS(0.02))
    int4 per channel EWGS(scaling=0.02)
    """

    scaling: float = 1e-3

    def __post_init__(self):
        object.__setattr__(self, "scaling", float(self.scaling))
        if not 0 <= self.scaling < float("inf"):
            raise ValueError(f"the scaling of a gradient is a number that is not negative, got {self.scaling!r}")

    def pull(self, gradient: jax.Array, x: jax.Array, error: jax.Array) -> jax.Array:
        """Return the gradient by `x`; error: of its rounding, in units of the range."""
        del x
        return lax.add(gradient, self.scaling * lax.mul(lax.abs(gradient), error))


@dataclasses.dataclass(frozen=True)
class HardTanh:
    """`g` where `|x| <= limit`, else zero: that of hard tanh in the place of a sign (Hubara et al. 2016, eq. 4).

    >>> import jaxq
    >>> jaxq.binary(estimator=jaxq.HardTanh())
    binary per channel HardTanh(limit=1.0)
    """

    limit: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "limit", float(self.limit))
        if not self.limit > 0:
            raise ValueError(f"a limit is a positive number, got {self.limit!r}")

    def pull(self, gradient: jax.Array, x: jax.Array, error: jax.Array) -> jax.Array:
        """Return the gradient by `x`."""
        del error
        return jnp.where(lax.abs(x) <= self.limit, gradient, 0)


@dataclasses.dataclass(frozen=True)
class ApproxSign:
    """`g (2 - 2 |x|)` where `|x| < 1`, else zero: a sign seen as two parabolas (Bi-Real Net; Liu et al. 2018, eq. 8).

    >>> import jaxq
    >>> jaxq.binary(estimator=jaxq.ApproxSign())
    binary per channel ApproxSign()
    """

    def pull(self, gradient: jax.Array, x: jax.Array, error: jax.Array) -> jax.Array:
        """Return the gradient by `x`."""
        del error
        return lax.mul(gradient, lax.convert_element_type(jnp.maximum(2 - 2 * lax.abs(x), 0), gradient.dtype))


Estimator = EWGS | HardTanh | ApproxSign


def shaped(estimator: Estimator, x: jax.Array, error: jax.Array) -> jax.Array:
    """Return `x`; the gradient that comes back to it is the estimator's. error: as `pull` takes it.

    In forward mode a tangent is scaled likewise; EWGS, which is not linear in the gradient, has no forward mode.
    """
    return (_by_gradient if isinstance(estimator, EWGS) else _by_tangent)(estimator, x, error)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_tangent(estimator: HardTanh | ApproxSign, x: jax.Array, error: jax.Array) -> jax.Array:
    del error
    return x


@_by_tangent.defjvp
def _pushed(estimator: HardTanh | ApproxSign, primals: tuple[jax.Array, jax.Array], tangents: tuple):
    x, error = primals
    return x, estimator.pull(tangents[0], x, error)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_gradient(estimator: EWGS, x: jax.Array, error: jax.Array) -> jax.Array:
    del error
    return x


def _forward(estimator: EWGS, x: jax.Array, error: jax.Array):
    return x, (x, error)


def _backward(estimator: EWGS, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, error = saved
    return estimator.pull(gradient, x, lax.convert_element_type(error, gradient.dtype)), jnp.zeros_like(error)


_by_gradient.defvjp(_forward, _backward)
