"""From a real number to an integer, and from an integer to one that has a code: roundings and overflow modes.

A rounding maps float32 to integral float32, exactly, for every float32; an overflow mode brings an integral float32 of
any size into the bounds of a format. Both are frozen values, so that they can be fields of what uses them. Sharp edges:
`floor(x + 0.5)` is no rounding (it is wrong for 0.49999997 and beyond 2 ** 23), a backend that flushes denormal numbers
rounds the negative ones up instead of down (`Floor` looks at the bits; where they are computed they are zero already),
and the sign of a zero is not specified. Roundings leave NaN and infinity as they are.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The bits of -0.0 and of the smallest normal negative number: what is strictly between is denormal.
MINUS_ZERO, MINUS_NORMAL = np.uint32(0x80000000), np.uint32(0x80800000)


def _check(x: jax.Array) -> None:
    if x.dtype != jnp.float32:
        raise TypeError(f"rounding is defined on float32, got {x.dtype}; convert with .astype(jnp.float32)")


@dataclasses.dataclass(frozen=True)
class NearestEven:
    """Round to the nearest integer, halves to the even one. IEEE 754, roundTiesToEven.

    >>> import jax.numpy as jnp
    >>> NearestEven()(jnp.float32([-2.5, -1.5, 0.5, 0.75])).tolist()
    [-2.0, -2.0, 0.0, 1.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        _check(x)
        return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


@dataclasses.dataclass(frozen=True)
class NearestAway:
    """Round to the nearest integer, halves away from zero: C's `round`.

    >>> import jax.numpy as jnp
    >>> NearestAway()(jnp.float32([-2.5, -1.5, 0.5, 0.75])).tolist()
    [-3.0, -2.0, 1.0, 1.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        _check(x)
        return lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)


@dataclasses.dataclass(frozen=True)
class Floor:
    """Round down: what dropping the low bits of a two's complement number does.

    >>> import jax.numpy as jnp
    >>> Floor()(jnp.float32([-2.5, -1e-40, 0.75])).tolist()
    [-3.0, -1.0, 0.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        _check(x)
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        denormal = (bits > MINUS_ZERO) & (bits < MINUS_NORMAL)
        return lax.select(denormal, lax.full_like(x, -1), lax.floor(x))


@dataclasses.dataclass(frozen=True)
class TowardZero:
    """Round towards zero: dropping the low bits of sign and magnitude, and C's cast to an integer.

    >>> import jax.numpy as jnp
    >>> TowardZero()(jnp.float32([-2.5, -1.5, 0.75, 3.0])).tolist()
    [-2.0, -1.0, 0.0, 3.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        _check(x)
        return lax.sign(x) * lax.floor(lax.abs(x))


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Round up with the probability of the fraction, by the key of `jaxq.qat`: unbiased. Without a key, to nearest.

    Training takes a new key for every step; serving has none. See `stochastic`. Gupta et al. 2015.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> policy = jaxq.weight_only(jaxq.fixed(8, 0, rounding=jaxq.Stochastic()))
    >>> f, w = (lambda w, x: x @ w), jnp.full((1, 50), 2.25)
    >>> sorted(set(jaxq.qat(f, policy, key=jax.random.key(0))(w, jnp.ones((1, 1)))[0].tolist()))
    [2.0, 3.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return NearestEven()(x)


Rounding = NearestEven | NearestAway | Floor | TowardZero | Stochastic


def stochastic(key: jax.Array, x: jax.Array) -> jax.Array:
    """Round up with the probability of the fraction: `floor(x) + (u < x - floor(x))`, u uniform in [0, 1).

    Integers stay. u has 24 bits, all that float32 holds, so that the expectation is x to within 2 ** -24; it is exact
    where the fraction is a multiple of 2 ** -24. Gupta et al. 2015.

    >>> import jax, jax.numpy as jnp
    >>> sorted(set(stochastic(jax.random.key(0), jnp.full((100,), 2.25)).tolist()))
    [2.0, 3.0]
    """
    down = Floor()(x)
    u = lax.convert_element_type(jax.random.bits(key, x.shape, jnp.uint32) >> 8, jnp.float32) * np.float32(2.0**-24)
    return down + lax.convert_element_type(u < x - down, jnp.float32)


@jax.custom_jvp
def _in_place_of(rounded: jax.Array, x: jax.Array) -> jax.Array:
    del x
    return rounded


# Not x + stop_gradient(rounded - x): NaN for infinity, and an integer only because the errors of two sums cancel.
_in_place_of.defjvps(None, lambda tangent, ans, rounded, x: tangent)


def straight_through(rounding: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return `rounding(x)` with the derivative of `x`: one, in forward and reverse mode, and zero beyond the first.

    rounding: one of the classes here, or a function such as `partial(stochastic, key)`. Bengio et al. 2013.

    >>> import jax, jax.numpy as jnp
    >>> jax.value_and_grad(lambda x: 3 * straight_through(NearestEven(), x))(jnp.float32(1.7))
    (Array(6., dtype=float32), Array(3., dtype=float32))
    """
    return _in_place_of(rounding(lax.stop_gradient(x)), x)


@dataclasses.dataclass(frozen=True)
class Saturate:
    """Clip to the nearest bound: `min(max(q, low), high)`.

    >>> import jax.numpy as jnp
    >>> Saturate()(jnp.float32([-300, 5, 300]), -128, 127).tolist()
    [-128.0, 5.0, 127.0]
    """

    def __call__(self, q: jax.Array, low: int, high: int) -> jax.Array:
        _check(q)
        if low > high:
            raise ValueError(f"bounds are a low and a high code, got [{low}, {high}]")
        return lax.clamp(np.float32(low), q, np.float32(high))


@dataclasses.dataclass(frozen=True)
class Wrap:
    """Keep the low bits, as registers do: the integer in [low, high] congruent to q modulo the count of codes.

    Two's complement where low is -high - 1. Exact for every integral float32; those beyond 2 ** 24 are multiples of a
    power of two, and often wrap to zero. Infinity and NaN become NaN. Raises `ValueError` unless the count of codes is
    a power of two, at most 2 ** 16, and the bounds are within it.

    >>> import jax.numpy as jnp
    >>> Wrap()(jnp.float32([-129, 5, 128, 300]), -128, 127).tolist()
    [127.0, 5.0, -128.0, 44.0]
    """

    def __call__(self, q: jax.Array, low: int, high: int) -> jax.Array:
        _check(q)
        count = high - low + 1
        if not 1 <= count <= 2**16 or count & (count - 1) or max(abs(low), abs(high)) > 2**16:
            raise ValueError(f"wrapping needs a power of two of codes, at most 65536, got [{low}, {high}]; saturate")
        # Twice, because q - low may not be a float32 where q is large.
        return _modulo(_modulo(q, count) - np.float32(low), count) + np.float32(low)


Overflow = Saturate | Wrap


def _modulo(q: jax.Array, n: int) -> jax.Array:
    """Return `q - n * floor(q / n)` for n a power of two: no step of it rounds, and neither does a fused one."""
    return q - lax.floor(q * np.float32(1 / n)) * np.float32(n)
