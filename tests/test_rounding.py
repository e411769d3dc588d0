"""The laws of rounding: exact for every float32, unbiased where random, transparent to derivatives; exact overflow.

The judges are float64 NumPy, where every float32 and its half are exact, and Python's integers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxq.numbers.rounding import (
    Floor,
    NearestAway,
    NearestEven,
    Rounding,
    Saturate,
    TowardZero,
    Wrap,
    stochastic,
    straight_through,
)

pytestmark = pytest.mark.shared

quick = functools.partial(settings, deadline=None, derandomize=True, database=None)

ORACLES: dict[Rounding, Callable] = {
    NearestEven(): np.rint,
    NearestAway(): lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
    Floor(): np.floor,
    TowardZero(): np.trunc,
}
ROUNDINGS = pytest.mark.parametrize("rounding", ORACLES, ids=repr)


@pytest.fixture(autouse=True)
def strict_types():
    """Refuse implicit promotion of types."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def floats():
    """Return float32 of every kind: random bits, denormals, and the neighbours of halves and of powers of two."""
    bits = np.random.default_rng(0).integers(0, 2**31, 10**6)
    denormal = np.concatenate([np.arange(4000), 2**23 - np.arange(4000)])
    halves = np.concatenate([np.arange(1, 5000) / 2, 2**22 + np.arange(-9, 10) / 2, 2.0 ** np.arange(-30, 127)])
    near = halves.astype(np.float32).view(np.int32)[:, None] + np.arange(-3, 4)
    bits = np.concatenate([bits, denormal, near.ravel()]).astype(np.uint32)
    x = np.concatenate([bits, bits | np.uint32(2**31)]).view(np.float32)
    return x[np.isfinite(x)]


@ROUNDINGS
def test_rounding_is_exact_for_every_float32(rounding):
    x = floats()
    assert np.float32(0.49999997) in x and np.float32(2**23 + 1) in x and np.float32(-1e-45) in x
    expected = ORACLES[rounding](x.astype(np.float64))
    for f in (rounding, jax.jit(rounding), jax.jit(jax.vmap(rounding))):
        y = f(x)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(y, np.float64), expected)


@ROUNDINGS
def test_rounding_passes_on_what_is_not_finite_and_refuses_other_types(rounding):
    np.testing.assert_array_equal(rounding(jnp.float32([np.inf, -np.inf, np.nan])), [np.inf, -np.inf, np.nan])
    assert hash(rounding) == hash(type(rounding)()) and rounding == type(rounding)()
    with pytest.raises(TypeError, match="float32"):
        rounding(jnp.ones(3, jnp.bfloat16))


@pytest.mark.parametrize("x", [0.25, -0.25, 2.7, -1e-3, 1000.1, 3 * 2.0**-18, -(2.0**-17), 1 - 2.0**-16, 2.0**22 + 0.5])
def test_stochastic_rounding_is_unbiased(x):
    n, x = 2**21, np.float32(x)
    y = np.asarray(jax.jit(stochastic)(jax.random.key(7), jnp.full((n,), x)), np.float64)
    low, real = np.floor(np.float64(x)), np.float64(x)
    assert set(np.unique(y)) == {low, low + 1}
    deviation = np.sqrt((real - low) * (low + 1 - real) / n)
    assert abs(y.mean() - real) < 4.5 * deviation
    # Neighbours are independent: the chance to go up is the same after one that went up.
    up = y > low
    assert abs(up[1:][up[:-1]].mean() - (real - low)) < 4.5 * deviation / np.sqrt(real - low)


def test_stochastic_rounding_never_moves_an_integer():
    @jax.jit
    def moved(keys):
        return jax.lax.map(lambda key: (stochastic(key, jnp.full((2**22,), 3.0)) != 3).sum(), keys).sum()

    # Enough to draw the smallest u eight times.
    assert moved(jax.random.split(jax.random.key(5), 32)) == 0


def test_stochastic_rounding__stays_between_neighbours():
    x = floats()
    y = np.asarray(stochastic(jax.random.key(1), x), np.float64)
    assert np.all((y == np.floor(x.astype(np.float64))) | (y == np.ceil(x.astype(np.float64))))
    with pytest.raises(TypeError, match="float32"):
        stochastic(jax.random.key(0), jnp.ones(3, jnp.float16))


@pytest.mark.parametrize(
    "rounding", [*ORACLES, functools.partial(stochastic, jax.random.key(3))], ids=[*map(str, ORACLES), "stochastic"]
)
def test_straight_through_rounds_and_differentiates_as_the_identity(rounding):
    x = jnp.float32([-2.5, -0.3, 0.49999997, 1e-3, 7.0, 2**24 + 2, np.inf])
    v = jnp.arange(1, 8, dtype=jnp.float32)
    f = functools.partial(straight_through, rounding)
    np.testing.assert_array_equal(jax.jit(f)(x), rounding(x))
    y, tangent = jax.jvp(f, (x,), (v,))
    np.testing.assert_array_equal(y, rounding(x))
    np.testing.assert_array_equal(tangent, v)
    np.testing.assert_array_equal(jax.jit(jax.vjp(f, x)[1])(v)[0], v)
    each = jax.vmap(jax.grad(lambda a: straight_through(NearestEven(), a) * a))
    np.testing.assert_array_equal(each(x), np.rint(np.asarray(x)) + np.asarray(x))
    second = jax.jacfwd(jax.jacrev(f))(x), jax.jacrev(jax.jacfwd(f))(x)
    assert not np.any(second[0]) and not np.any(second[1])


def wrapped(q, low, high):
    return float((int(q) - low) % (high - low + 1) + low)


HUGE = float(np.float32(1e30))
integral = st.one_of(
    st.integers(-(2**18), 2**18).map(float), st.floats(-HUGE, HUGE, width=32).map(lambda x: float(np.rint(x)))
)


@quick(max_examples=300)
@given(st.lists(integral, min_size=1, max_size=4), st.integers(0, 16), st.data())
@example([2.0**24 - 1, -(2.0**24) + 1, 3.0 * 2**100, float(np.finfo(np.float32).max)], 8, None)
def test_wrap_is_twos_complement(q, bits, data):
    low = -(2**bits // 2) if data is None else data.draw(st.sampled_from([0, -(2**bits // 2), 1 - 2**bits, -1]))
    high = low + 2**bits - 1
    expected = [wrapped(v, low, high) for v in q]
    np.testing.assert_array_equal(Wrap()(jnp.float32(q), low, high), expected)


def test_wrap_and_saturate_compiled_over_every_size():
    rng = np.random.default_rng(2)
    q = np.rint(rng.choice([-1, 1], 20000) * 2 ** rng.uniform(0, 100, 20000)).astype(np.float32)
    for low, high in ((-128, 127), (0, 255), (-8, 7), (-32768, 32767), (0, 65535)):
        wrap = jax.jit(jax.vmap(functools.partial(Wrap(), low=low, high=high)))
        np.testing.assert_array_equal(wrap(q), [wrapped(v, low, high) for v in q])
        saturate = jax.jit(functools.partial(Saturate(), low=low, high=high))
        np.testing.assert_array_equal(saturate(q), np.clip(q, low, high))


@pytest.mark.parametrize("low, high", [(-127, 127), (0, 2**17 - 1), (5, 2), (2**20, 2**20 + 255)])
def test_wrap_refuses_bounds_it_is_not_exact_for(low, high):
    with pytest.raises(ValueError, match="power of two"):
        Wrap()(jnp.zeros(2, jnp.float32), low, high)


def test_overflow_modes_refuse_other_types_and_reversed_bounds():
    for mode in (Wrap(), Saturate()):
        with pytest.raises(TypeError, match="float32"):
            mode(jnp.zeros(2, jnp.int32), -8, 7)
    with pytest.raises(ValueError, match="low"):
        Saturate()(jnp.zeros(2, jnp.float32), 7, -8)
