"""The laws of formats: every quantizer of the catalog on one array, against NumPy in float64, ml_dtypes and tables.

Integers of 2 to 8 bits with a range of their own are in `test_numbers`; roundings, casts and clipping rules by
themselves in `test_rounding`, `test_floats` and `test_clipping`. Here they are what a quantizer stores and decodes.
"""

import functools
import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

import jaxq
import oracle
from jaxq.numbers import codecs, packing
from jaxq.numbers.floats import BFLOAT16, E2M1, E2M3, E4M3, E5M2, FLOAT16

pytestmark = pytest.mark.shared

quick = functools.partial(settings, deadline=None, derandomize=True, database=None)
FLOAT32_MAX = float(np.finfo(np.float32).max)
# Two float32 roundings on the way to a ratio: next to a tie either neighbour is right.
NEAR = 2.0**-21
# Codes of what is smaller may be those of zero, or of the smallest scale.
SMALLEST = 1e-36


@pytest.fixture(autouse=True)
def strict_types():
    """Refuse implicit promotion of types."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def as_64(x):
    return np.asarray(x).astype(np.float64)


def assert_same(got, want):
    """Assert that two pytrees hold the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PLAIN = {
    "int8": jaxq.int8(),
    "int8 asymmetric": jaxq.int8(symmetric=False),
    "int8 full range": jaxq.int8(narrow=False),
    "int4": jaxq.int4(),
    "int4 full range": jaxq.int4(narrow=False),
    "int2": jaxq.int2(),
    "int2 full range": jaxq.int2(narrow=False),
    "int16": jaxq.int16(),
    "int16 asymmetric": jaxq.int16(symmetric=False),
    "uint16": jaxq.Quantizer(jaxq.Int(16, signed=False), symmetric=False),
    "uint8": jaxq.uint8(),
    "uint1": jaxq.Quantizer(jaxq.Int(1, signed=False), symmetric=False),
    "int1 asymmetric": jaxq.Quantizer(jaxq.Int(1), symmetric=False),
    "int3": jaxq.Quantizer(jaxq.Int(3)),
    "int5": jaxq.Quantizer(jaxq.Int(5), per_tensor=True),
    "int7": jaxq.Quantizer(jaxq.Int(7)),
    "Q6.1": jaxq.fixed(8, 1),
    "Q1.2": jaxq.fixed(4, 2),
    "Q7.8": jaxq.fixed(16, 8),
    "dynamic fixed": jaxq.dynamic_fixed(),
    "dynamic fixed of 4 bits": jaxq.dynamic_fixed(4),
    "float16": jaxq.float16(),
    "bfloat16": jaxq.bfloat16(),
    "float8": jaxq.float8(),
    "float8 e5m2": jaxq.float8_e5m2(per_tensor=True),
}
# A scale is a sum here, not a maximum.
SUMS = {
    "binary": jaxq.binary(),
    "ternary": jaxq.ternary(),
    "b158": jaxq.b158(),
    "kmeans 2": jaxq.kmeans(2),
    "kmeans 16": jaxq.kmeans(16),
    "kmeans 256": jaxq.kmeans(256),
}
GROUPED = {
    "int4 group": jaxq.int4(group=3),
    "int4 group asymmetric": jaxq.int4(group=2, symmetric=False),
    "int3 group": jaxq.Quantizer(jaxq.Int(3), group=3),
    "binary group": jaxq.binary(group=3),
    "ternary group": jaxq.ternary(group=2),
    "kmeans group": jaxq.kmeans(4, group=3),
    "float8 group": jaxq.float8(group=3),
    "nf4": jaxq.nf4(3),
    "mxfp8": jaxq.mxfp8(3),
    "mxfp6": jaxq.mxfp6(3),
    "mxfp4": jaxq.mxfp4(2),
    "mxint8": jaxq.mxint8(3),
    "nvfp4": jaxq.nvfp4(3),
}
FITTED = {
    "mse": jaxq.int4(fit=jaxq.mse()),
    "mse asymmetric": jaxq.int4(fit=jaxq.mse(), symmetric=False),
    "mse group": jaxq.int4(fit=jaxq.mse(), group=3),
    "percentile": jaxq.int8(fit=jaxq.percentile(99.0)),
    "octav": jaxq.int4(fit=jaxq.octav()),
    "entropy": jaxq.int8(fit=jaxq.entropy(), per_tensor=True),
    "sigmas": jaxq.int4(fit=jaxq.sigmas(2.0), symmetric=False),
    "mean abs": jaxq.int2(fit=jaxq.mean_abs()),
}
CATALOG = {**PLAIN, **SUMS, **GROUPED, **FITTED}
# One of each family; the others run the same operations with other numbers.
FIRST = {
    *("int8", "int8 asymmetric", "Q6.1", "bfloat16", "float8", "binary", "ternary", "kmeans 16"),
    *("int4 group", "nf4", "mxfp4", "nvfp4"),
}
NO_ZERO = {"binary", "binary group", "kmeans 2", "kmeans 16", "kmeans 256", "kmeans group"}

# Of no axes, of none of a size, of odd sizes, of every type.
ARRAYS = {
    "scalar": ((), jnp.float32),
    "no rows": ((0, 6), jnp.bfloat16),
    "no columns": ((5, 0), jnp.float16),
    "odd": ((7,), jnp.float16),
    "stack": ((2, 3, 6), jnp.bfloat16),
    "matrix": ((4, 6), jnp.float32),
}
PATTERNS = {
    "normal": lambda x: x,
    "constant": lambda x: np.full_like(x, -0.3),
    "zeros": np.zeros_like,
    "positive and zeros": lambda x: np.maximum(x, 0),
    "one alone": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1, 1.0, 0.0),
    "all sizes": lambda x: np.sign(x) * 10.0 ** np.random.default_rng(1).uniform(-7, 0, x.shape),
}
SIZES = {"one": 1.0, "tiny": 1e-30, "smaller": 1e-37, "subnormal": 1e-40, "huge": 1e37}


def make(pattern, size, seed=0):
    """Return an array of every kind, of numbers of a pattern and a size, saturated to their type's largest."""

    def one(shape, dtype):
        top = float(jnp.finfo(dtype).max)
        x = PATTERNS[pattern](np.random.default_rng(seed).standard_normal(shape))
        return jnp.asarray(np.clip(x * size, -top, top), dtype)

    return {name: one(*kind) for name, kind in ARRAYS.items()}


def contracted(x):
    """Return the last axis, so that groups are cut there."""
    return (x.ndim - 1,) if x.ndim else ()


def kinds(name):
    """Return the kinds of arrays to try: all that it takes for one quantizer of a family. Groups need an axis."""
    chosen = tuple(ARRAYS) if name in FIRST else ("scalar", "no rows", "matrix")
    if "group" in name or name in GROUPED:
        return tuple(kind for kind in chosen if kind not in ("scalar", "odd"))
    return chosen


@functools.cache
def compiled(name):
    """Return what quantizes and decodes an array of every kind, in one program."""

    def one(x):
        q = CATALOG[name](x, contracted(x))
        return q, q.decode()

    return jax.jit(lambda xs: {kind: one(xs[kind]) for kind in kinds(name)})


def check(name, x, q, decoded):
    """Assert what holds for any format: shape and type, finite, zero, and nothing far beyond the array's own range."""
    assert q.shape == decoded.shape == x.shape and q.dtype == decoded.dtype == x.dtype
    decoded, x = as_64(decoded), as_64(x)
    assert np.isfinite(decoded).all()
    if name not in NO_ZERO:
        assert not decoded[x == 0].any()
    if not name.startswith("Q"):
        # One bit with a zero point, of a range whose ends are alike, decodes to twice the one and to zero.
        largest = np.abs(x).max(initial=0)
        assert (np.abs(decoded) <= 2.01 * largest + SMALLEST).all()


# --- every quantizer on every kind of array --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOG)
def test_every_kind_of_array(name):
    @quick(max_examples=8 if name in FIRST else 3)
    @given(st.sampled_from(list(PATTERNS)), st.sampled_from(list(SIZES)), st.integers(0, 9))
    @example("normal", "one", 0)
    @example("constant", "huge", 0)
    @example("normal", "subnormal", 0)
    def run(pattern, size, seed):
        xs = make(pattern, SIZES[size], seed)
        for kind, found in compiled(name)(xs).items():
            check(name, xs[kind], *found)

    run()


@pytest.mark.parametrize("name", CATALOG)
def test_the_largest_numbers_stay_finite(name):
    """What is finite decodes to what is finite, up to the largest number of a type."""
    for pattern in ("constant", "normal"):
        xs = make(pattern, 4 * FLOAT32_MAX)
        for kind, found in compiled(name)(xs).items():
            check(name, xs[kind], *found)


@pytest.mark.parametrize("name", sorted(FIRST))
def test_eagerly_as_compiled(name):
    """Bit for bit."""
    for pattern, size in (
        [("normal", 1.0)] if name in FITTED else [("normal", 1.0), ("all sizes", 1e30), ("zeros", 1.0)]
    ):
        xs = make(pattern, size)
        eager = CATALOG[name](xs["matrix"], contracted(xs["matrix"]))
        assert_same((eager, eager.decode()), compiled(name)(xs)["matrix"])


@pytest.mark.parametrize("name", ["binary", "ternary", "b158", "mean abs", "kmeans 16"])
def test_sums_of_huge_numbers_stay_finite(name):
    x = jnp.asarray(normal(0, 64, 64) * np.float32(1e37))
    q = CATALOG[name](x, (0, 1))
    check(name, x, q, q.decode())


@pytest.mark.parametrize("name", CATALOG)
def test_what_is_refused(name):
    for bad in (np.nan, np.inf, -np.inf):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            x = np.ones((4, 6), dtype)
            x[1, 2] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                CATALOG[name](x)
    for other in (np.int32, np.uint8, bool, np.complex64):
        with pytest.raises(TypeError, match="float"):
            CATALOG[name](np.ones((4, 6), other))


# --- fixed point -----------------------------------------------------------------------------------------------------

ROUNDINGS = {
    jaxq.NearestEven(): np.rint,
    jaxq.NearestAway(): lambda v: np.sign(v) * np.floor(np.abs(v) + 0.5),
    jaxq.Floor(): np.floor,
    jaxq.TowardZero(): np.trunc,
}
OVERFLOWS = {
    jaxq.Saturate(): lambda n, low, high: np.clip(n, low, high),
    jaxq.Wrap(): lambda n, low, high: np.mod(np.mod(n, high - low + 1) - low, high - low + 1) + low,
}


def fixed_points():
    """Return ties and their neighbours in steps of 2^-10, random numbers, and some that overflow, up to 3e38."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-(2**19), 2**19, 400) / 2.0**10
    sizes = rng.standard_normal(200) * 10.0 ** rng.integers(-20, 38, 200)
    edges = np.array([0.0, -0.0, 1e-20, -1e-20, 3e38, -3e38, 127.75, -128.25, 2.0**31, -(2.0**63)])
    x = np.concatenate([steps, np.arange(-40, 41) / 8, sizes, edges]).astype(np.float32)
    return np.concatenate([x, np.nextafter(x[:400], np.float32(np.inf))])


@pytest.mark.parametrize("overflow", OVERFLOWS, ids=repr)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=repr)
def test_fixed_point_is_exact(rounding, overflow):
    """Codes are `overflow(rounding(x 2^f))` in float64, which holds all of it; what they stand for is exact."""
    x = fixed_points()
    for bits, frac, signed in [(8, 1, True), (4, 2, True), (16, 8, True), (8, 12, True), (6, -3, True), (5, 3, False)]:
        quantizer = jaxq.fixed(bits, frac, signed=signed, rounding=rounding, overflow=overflow)
        q = quantizer(jnp.asarray(x))
        low, high = oracle.bounds(bits, signed=signed, symmetric=False)
        # Three roundings are exact as written; half away is, as no |x 2^f| next below a half is near 2^52.
        want = OVERFLOWS[overflow](ROUNDINGS[rounding](np.ldexp(as_64(x), frac)), low, high)
        np.testing.assert_array_equal(as_64(q.codes), want)
        np.testing.assert_array_equal(as_64(q.decode()), np.ldexp(want, -frac))
        again = quantizer(q.decode())
        np.testing.assert_array_equal(again.codes, q.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_dynamic_fixed_point_takes_the_least_power_of_two(bits):
    """s = 2^ceil(log2(max|x| / top)): exactly at the edge too, where max|x| is top times a power of two."""
    top = 2 ** (bits - 1) - 1
    rng = np.random.default_rng(bits)
    for exponent in (-90, -7, 0, 3, 100):
        for edge in (top, top * (1 + 1e-5), top * (1 - 1e-5), top * rng.uniform(0.5, 1)):
            x = (rng.uniform(-0.99, 0.99, 12) * edge).astype(np.float32)
            x[5] = -edge
            x = np.ldexp(x, exponent)
            q = jaxq.dynamic_fixed(bits)(jnp.asarray(x))
            mantissa, power = np.frexp(np.abs(as_64(x)).max() / top)
            scale = np.ldexp(1.0, int(power) - int(mantissa == 0.5))
            assert float(q.scale[0]) == scale
            np.testing.assert_array_equal(as_64(q.decode()), scale * np.rint(as_64(x) / scale))
            # The largest keeps more than half of top, so that what was decoded takes the same scale.
            np.testing.assert_array_equal(jaxq.dynamic_fixed(bits)(q.decode()).decode(), q.decode())


# --- signs -----------------------------------------------------------------------------------------------------------


def ternary_rows():
    x = normal(0, 8, 301) * np.exp2(np.arange(8, dtype=np.float32) * 9 - 30)[:, None]
    x[0, :150], x[1, 3], x[2] = 0, -0.0, np.abs(x[2])
    return x


def test_binary_is_the_sign_times_the_mean_magnitude():
    x = ternary_rows()
    for axes in ((1,), (0, 1)):
        q = jaxq.binary()(jnp.asarray(x), axes)
        scale = np.abs(as_64(x)).mean(axis=axes, keepdims=True)
        np.testing.assert_allclose(as_64(q.scale), scale, rtol=1e-6)
        np.testing.assert_array_equal(q.codes, np.where(x < 0, -1, 1))
        np.testing.assert_allclose(as_64(q.decode()), np.where(x < 0, -scale, scale), rtol=1e-6)
        np.testing.assert_allclose(jaxq.binary()(q.decode(), axes).decode(), q.decode(), rtol=1e-6)


def test_binary_zeros_are_zeros():
    """The mean magnitude of a channel without weights is zero, and so is what it decodes to."""
    x = jnp.asarray([[1.0, -3.0], [0.0, -0.0], [1e-42, -1e-42]], jnp.float32)
    decoded = as_64(jaxq.binary()(x, (1,)).decode())
    assert decoded[0].tolist() == [2, -2] and not decoded[1].any() and (np.abs(decoded[2]) < SMALLEST).all()


@pytest.mark.parametrize("threshold", [0.7, 0.767, 0.05, 1.3])
def test_ternary_weights_follow_their_paper(threshold):
    """+-1 beyond `threshold` mean magnitudes; the scale is the mean magnitude of those (Li et al. 2016)."""
    x, quantizer = ternary_rows(), jaxq.ternary(threshold)
    q, size = quantizer(jnp.asarray(x), (1,)), np.abs(as_64(x))
    limit = threshold * size.mean(axis=1, keepdims=True)
    kept = size > limit
    clear = np.abs(size / limit - 1) > 1e-5
    assert clear.mean() > 0.99 and 0 < kept.mean() < 1
    np.testing.assert_array_equal(np.asarray(q.codes)[clear], (np.sign(x) * kept)[clear])
    np.testing.assert_allclose(
        as_64(q.scale), (size * kept).sum(1, keepdims=True) / kept.sum(1, keepdims=True), rtol=1e-5
    )


def test_b158_rounds_multiples_of_the_mean_magnitude():
    x = ternary_rows()[3:5]
    q, scale = jaxq.b158()(jnp.asarray(x)), np.abs(as_64(x)).mean()
    clear = np.abs(np.abs(as_64(x)) / scale - 0.5) > 1e-5
    np.testing.assert_allclose(float(q.scale[0, 0]), scale, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(q.codes)[clear], np.clip(np.rint(as_64(x) / scale), -1, 1)[clear])
    assert clear.mean() > 0.99 and q.scale.shape == (1, 1)


# --- floating point and levels ---------------------------------------------------------------------------------------


def cast(v, dtype):
    """Return the nearest number of a type of ml_dtypes, saturated: float64."""
    top = float(ml_dtypes.finfo(dtype).max)
    return np.clip(v, -top, top).astype(np.float32).astype(dtype).astype(np.float64)


def assert_nearest(q, x, scale, nearest):
    """Assert that `q` decodes to `scale * nearest(x / scale)`, to either neighbour where float32 cannot tell."""
    ratio, scale = as_64(x) / scale, np.broadcast_to(scale, x.shape).astype(np.float32)
    low, high = (nearest(ratio * (1 + side * NEAR)).astype(np.float32) * scale for side in (-1, 1))
    got = np.asarray(q.decode(), np.float32)
    assert ((got == low) | (got == high)).all() and (low == high).mean() > 0.99


def rows_of_all_sizes():
    """Return rows of very different sizes, one of zeros, one with its largest at a power of two, one just below."""
    x = normal(3, 12, 64) * np.exp2(np.arange(12, dtype=np.float32) * 9 - 50)[:, None]
    x[2], x[3, ::2], x[4, 5], x[5, 5] = 0, 0, np.exp2(np.float32(12)), np.nextafter(np.float32(2**13), np.float32(0))
    return x


def spread(small, shape):
    return oracle.spread(np.asarray(small), shape)


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [(jaxq.float8, ml_dtypes.float8_e4m3fn), (jaxq.float8_e5m2, ml_dtypes.float8_e5m2)],
)
@pytest.mark.parametrize("grain", [{}, {"per_tensor": True}, {"group": 16}], ids=str)
def test_float8_is_the_nearest_of_ml_dtypes(quantizer, dtype, grain):
    x = rows_of_all_sizes() if grain != {"per_tensor": True} else normal(5, 12, 64)
    q, top = quantizer(**grain)(jnp.asarray(x), (1,)), float(ml_dtypes.finfo(dtype).max)
    width = oracle.collapse(np.abs(x), q.scale.shape, np.maximum)
    np.testing.assert_allclose(as_64(q.scale), np.where(width == 0, 1, width / top), rtol=2.0**-22)
    assert q.codes.dtype == dtype
    assert_nearest(q, x, spread(as_64(q.scale), x.shape), lambda v: cast(v, dtype))
    # Where the scale is exact, what was decoded comes back: the largest number is the largest again.
    exact = quantizer(**grain)(jnp.asarray(cast(normal(6, 12, 64) * 9, dtype), jnp.float32).at[:, ::16].set(top), (1,))
    assert_same(quantizer(**grain)(exact.decode(), (1,)), exact)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_16_bit_floats_are_casts(dtype):
    quantizer = {ml_dtypes.bfloat16: jaxq.bfloat16, np.float16: jaxq.float16}[dtype]()
    x = np.concatenate([rows_of_all_sizes(), normal(1, 4, 64) * np.float32(1e-6)])
    q = quantizer(jnp.asarray(x))
    np.testing.assert_array_equal(as_64(q.decode()), cast(as_64(x), dtype))
    assert_same(quantizer(q.decode()), q)


MX = {
    jaxq.mxfp8: (8, functools.partial(cast, dtype=ml_dtypes.float8_e4m3fn)),
    jaxq.mxfp6: (2, functools.partial(cast, dtype=ml_dtypes.float6_e2m3fn)),
    jaxq.mxfp4: (2, functools.partial(cast, dtype=ml_dtypes.float4_e2m1fn)),
    jaxq.mxint8: (0, lambda v: np.clip(np.rint(64 * v), -127, 127) / 64),
}


@pytest.mark.parametrize("make_mx", MX, ids=lambda f: f.__name__)
@pytest.mark.parametrize("group", [32, 8])
def test_mx_formats_are_exact(make_mx, group):
    """`2^(floor(log2 max) - emax)` times the elements of ml_dtypes, every bit of it (OCP MX v1.0, section 6.3)."""
    emax, nearest = MX[make_mx]
    x = rows_of_all_sizes()
    q = make_mx(group)(jnp.asarray(x), (1,))
    width = oracle.collapse(np.abs(x), (12, 64 // group), np.maximum)
    scale = np.where(width == 0, 1.0, np.ldexp(1.0, np.frexp(width)[1] - 1 - emax))
    wide = spread(scale, x.shape)
    np.testing.assert_array_equal(as_64(q.decode()), wide * nearest(as_64(x) / wide))
    assert q.scale.dtype == jnp.uint8 and q.scale.shape == scale.shape
    # The largest stays in its binade, so that the exponent is what it was.
    assert_same(make_mx(group)(q.decode(), (1,)), q)


def test_nvfp4_is_the_two_level_rule():
    """`t = max / 2688`, a block's scale `e4m3(max / 6t)`, at least the smallest of e4m3; elements of ml_dtypes."""
    x = normal(4, 12, 64) * np.exp2(np.arange(12, dtype=np.float32) - 11)[:, None]
    x[2], x[3] = 0, x[3] * 2.0**-20
    q = jaxq.nvfp4()(jnp.asarray(x), (1,))
    assert q.scale.dtype == jnp.float8_e4m3fn and q.scale.shape == (12, 4) and q.outer.shape == (1, 1)
    outer = float(q.outer[0, 0])
    np.testing.assert_allclose(outer, np.abs(as_64(x)).max() / 2688, rtol=2.0**-22)
    width = oracle.collapse(np.abs(x), (12, 4), np.maximum) / (6 * outer)
    low, high = (np.maximum(cast(width * (1 + s * NEAR), ml_dtypes.float8_e4m3fn), 2.0**-9) for s in (-1, 1))
    assert ((as_64(q.scale) == low) | (as_64(q.scale) == high)).all()
    scale = as_64((np.asarray(q.scale, np.float32) * np.float32(outer)).astype(np.float32))
    assert_nearest(q, x, spread(scale, x.shape), lambda v: cast(v, ml_dtypes.float4_e2m1fn))


# Dettmers et al. 2023, appendix E.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
NF4 = np.array(NF4.split(), np.float64)


@pytest.mark.parametrize("group", [64, 16])
def test_nf4_is_the_nearest_level(group):
    x = rows_of_all_sizes()
    q = jaxq.nf4(group)(jnp.asarray(x), (1,))
    width = oracle.collapse(np.abs(x), (12, 64 // group), np.maximum)
    np.testing.assert_array_equal(as_64(q.scale), np.where(width == 0, 1, width))
    assert_nearest(q, x, spread(as_64(q.scale), x.shape), lambda v: NF4[np.abs(v[..., None] - NF4).argmin(-1)])
    assert_same(jaxq.nf4(group)(q.decode(), (1,)), q)


# --- least error -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_mse_fit_is_the_best_of_a_scan(bits, narrow):
    """Never worse than the range of all values, and within 0.3 % of the best of 6000 scales, on small rows."""
    rng = np.random.default_rng(bits)
    x = np.concatenate([rng.standard_normal((6, 48)), rng.laplace(size=(4, 48)), rng.standard_t(2, (4, 48))])
    x[3], x[4, 0] = np.abs(x[3]), 40
    x = x.astype(np.float32)
    decoded = jax.jit(jaxq.Quantizer(jaxq.Int(bits), fit=jaxq.mse(), narrow=narrow, group=48))(x.T).decode()
    error = ((as_64(decoded).T - as_64(x)) ** 2).sum(1)
    low, high = oracle.bounds(bits, symmetric=narrow)
    scale = np.abs(as_64(x)).max(1)[:, None] / high * np.exp2(np.linspace(-7, 1, 6000))
    scale[:, -1] = np.maximum(-x.min(1) / -low, x.max(1) / high)
    best = np.full(len(x), np.inf)
    for part in np.split(scale, 20, axis=1):
        n = np.clip(np.rint(as_64(x)[:, None, :] / part[..., None]), low, high)
        best = np.minimum(best, ((as_64(x)[:, None, :] - part[..., None] * n) ** 2).sum(-1).min(1))
    n = np.clip(np.rint(as_64(x) / scale[:, -1:]), low, high)
    assert (error <= ((as_64(x) - scale[:, -1:] * n) ** 2).sum(1) * (1 + 1e-6)).all()
    assert (error <= 1.003 * best).all()


def test_the_asymmetric_mse_fit_is_never_worse_than_the_range_of_all():
    x = np.random.default_rng(1).standard_t(3, (40, 33)).astype(np.float32)
    error = []
    for fit in (jaxq.mse(), None):
        decoded = jax.jit(jaxq.int4(fit=fit, symmetric=False))(x.T).decode()
        error.append(((as_64(decoded).T - as_64(x)) ** 2).sum(1))
    assert (error[0] <= error[1] * (1 + 1e-6)).all() and error[0].sum() < 0.95 * error[1].sum()


DATA = {
    "normal": lambda rng: rng.standard_normal(600),
    "laplace": lambda rng: rng.laplace(size=600),
    "uniform": lambda rng: rng.random(600),
    "clusters": lambda rng: rng.choice([-3.0, 0.0, 0.5, 4.0], 600) + 0.05 * rng.standard_normal(600),
}


@functools.cache
def codebook(size):
    return jax.jit(jaxq.kmeans(size))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("data", DATA)
def test_codebooks_are_as_good_as_scikit_learn(data, size):
    """Every value is its nearest centroid, and the error at most 2 % above the best of ten runs of k-means."""
    cluster, threadpoolctl = pytest.importorskip("sklearn.cluster"), pytest.importorskip("threadpoolctl")
    x = DATA[data](np.random.default_rng(size)).astype(np.float32)
    q = codebook(size)(jnp.asarray(x))
    table = as_64(q.table).ravel()
    assert q.table.shape == (1, size) and (np.diff(table) >= 0).all()
    gap = np.abs(as_64(x)[:, None] - table)
    decoded = as_64(q.decode())
    assert np.isin(decoded, table).all()
    np.testing.assert_allclose(np.abs(decoded - as_64(x)), gap.min(1), atol=1e-6)
    with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
        warnings.simplefilter("ignore")
        peer = cluster.KMeans(size, n_init=10, random_state=0).fit(as_64(x)[:, None])
    assert ((decoded - as_64(x)) ** 2).sum() <= 1.02 * peer.inertia_


@pytest.mark.parametrize("size", [4, 16, 256])
def test_few_distinct_values_are_their_own_codebook(size):
    """An array of at most `size` distinct values is exact, and quantizing it again changes nothing."""
    rng = np.random.default_rng(size)
    values = rng.standard_normal(size).astype(np.float32)
    x = jnp.asarray(rng.permutation(np.concatenate([values, rng.choice(values, 600 - size)])))
    for data in (x, jnp.asarray(rng.choice(values[: size // 2], x.size))):
        np.testing.assert_array_equal(codebook(size)(data).decode(), data)


# --- packing ---------------------------------------------------------------------------------------------------------

PACKED = {
    "int4": jaxq.Int(4),
    "uint4": jaxq.Int(4, signed=False),
    "int2": jaxq.Int(2),
    "uint2": jaxq.Int(2, signed=False),
    "int1": jaxq.Int(1),
    "uint1": jaxq.Int(1, signed=False),
    "binary": jaxq.Binary(),
    "ternary": jaxq.Ternary(),
    "nf4": jaxq.nf4().format,
    "kmeans 16": jaxq.Codebook(16),
    "kmeans 4": jaxq.Codebook(4),
    "mxfp4": E2M1,
}
TWOS_COMPLEMENT = {"int4", "int2", "int1", "ternary"}


def codes_of(name):
    """Return what the bit patterns of a code stand for, in their order: a sign, two's complement or an index."""
    bits = np.arange(2 ** PACKED[name].bits)
    if name == "binary":
        return 2 * bits - 1
    return np.where(bits >= len(bits) // 2, bits - len(bits), bits) if name in TWOS_COMPLEMENT else bits


@pytest.mark.parametrize("name", PACKED)
def test_packing_is_a_bijection(name):
    """Every byte is the codes of its bits, which pack to that byte; every code comes back, along any axis."""
    form, codes, shape = PACKED[name], codes_of(name), (5, 7, 9)
    per_byte = 8 // form.bits
    every = np.arange(256)
    want = [codes[every >> plane * form.bits & len(codes) - 1] for plane in range(per_byte)]

    @jax.jit
    def run(every, x):
        unpacked = packing.unpack(every, form, 0, 256 * per_byte)
        stored = [packing.pack(x, form, axis) for axis in (0, 1, -1)]
        back = [packing.unpack(part, form, axis, shape[axis]) for part, axis in zip(stored, (0, 1, -1), strict=True)]
        return unpacked, packing.pack(unpacked, form, 0), stored, back

    x = np.random.default_rng(0).choice(codes, shape).astype(form.storage)
    unpacked, packed, stored, back = run(jnp.asarray(every, jnp.uint8), jnp.asarray(x))
    assert unpacked.dtype == form.storage and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, np.concatenate(want))
    np.testing.assert_array_equal(packed, every)
    sizes = [-(-n // per_byte) for n in shape]
    assert [part.shape for part in stored] == [(sizes[0], 7, 9), (5, sizes[1], 9), (5, 7, sizes[2])]
    for part in back:
        np.testing.assert_array_equal(part, x)


ODD = {
    "int3": jaxq.Int(3),
    "Q1.3": jaxq.Fixed(5, 3),
    "mxfp6": jaxq.mxfp6().format,
    "kmeans 100": jaxq.Codebook(100),
    "int7": jaxq.Int(7),
}


@pytest.mark.parametrize("name", ODD)
def test_codes_of_odd_widths_are_cut_into_fields(name):
    """Against the bits in NumPy: fields of 4, 2 and 1 bits, each planar, one behind the other; any axis and length."""
    form, shape = ODD[name], (5, 1, 19)
    codes = np.random.default_rng(0).integers(0, 100 if form.bits == 7 else 2**form.bits, shape)
    signed = np.where(codes >= 2 ** (form.bits - 1), codes - 2**form.bits, codes)
    codes = signed if form.storage == jnp.int8 else codes
    for axis in range(3):
        stored = packing.pack(jnp.asarray(codes, form.storage), form, axis)
        bits, want = np.moveaxis(codes, axis, -1), []
        for width, low in ((4, 0), (2, form.bits & 4), (1, form.bits & 6)):
            if form.bits & width:
                padding = -shape[axis] % (8 // width)
                field = np.pad(bits >> low & 2**width - 1, ((0, 0), (0, 0), (0, padding)))
                planes = np.split(field, 8 // width, axis=-1)
                want.append(sum(plane << n * width for n, plane in enumerate(planes)))
        np.testing.assert_array_equal(np.moveaxis(stored, axis, -1), np.concatenate(want, axis=-1))
        np.testing.assert_array_equal(packing.unpack(stored, form, axis, shape[axis]), codes)


BYTES = {
    "int8": (jaxq.int8(per_tensor=True), 256 * 256 + 4),
    "int4": (jaxq.int4(per_tensor=True), 32768 + 4),
    "int4 per channel": (jaxq.int4(), 32768 + 256 * 4),
    "int4 group asymmetric": (jaxq.int4(group=32, symmetric=False), 32768 + 8 * 256 * (4 + 1)),
    "int2": (jaxq.int2(per_tensor=True), 16384 + 4),
    "b158": (jaxq.b158(), 16384 + 4),
    "ternary": (jaxq.ternary(), 16384 + 256 * 4),
    "binary": (jaxq.binary(per_tensor=True), 8192 + 4),
    "uint1": (jaxq.Quantizer(jaxq.Int(1, signed=False), per_tensor=True, symmetric=False), 8192 + 4 + 1),
    "int16": (jaxq.int16(per_tensor=True), 2 * 65536 + 4),
    "int3": (jaxq.Quantizer(jaxq.Int(3), per_tensor=True), 24576 + 4),
    "kmeans 16": (jaxq.kmeans(16), 32768 + 16 * 4),
    "kmeans 4": (jaxq.kmeans(4), 16384 + 4 * 4),
    "nf4": (jaxq.nf4(), 32768 + 4 * 256 * 4),
    "mxfp4": (jaxq.mxfp4(), 32768 + 8 * 256),
    "mxfp6": (jaxq.mxfp6(), 49152 + 8 * 256),
    "nvfp4": (jaxq.nvfp4(), 32768 + 16 * 256 + 4),
}


@pytest.mark.parametrize("name", BYTES)
def test_sizes_are_those_of_the_theory(name):
    quantizer, want = BYTES[name]
    x = jnp.asarray(normal(0, 256, 256))
    q = jax.eval_shape(quantizer, x)
    assert q.shape == (256, 256) and q.nbytes == want
    assert want == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(q))
    if name in ("int4", "kmeans 16"):
        real = quantizer(x)
        assert real.nbytes == want == sum(leaf.nbytes for leaf in jax.tree.leaves(real))
    assert name != "kmeans 16" or want <= 256 * 256 * 4 / 7.8


STACKED = {
    "int4": jaxq.int4(),
    "int2 asymmetric": jaxq.int2(symmetric=False),
    "binary": jaxq.binary(),
    "ternary group": jaxq.ternary(group=2),
    "nf4": jaxq.nf4(2),
    "kmeans 16": jaxq.kmeans(16, per_tensor=False),
    "mxfp4": jaxq.mxfp4(2),
}


@pytest.mark.parametrize("name", STACKED)
def test_packed_arrays_pass_through_programs(name):
    """Transposed, compiled, scanned, mapped, exported and read again: the same numbers."""
    order = (2, 0, 1)
    q, want = jax.jit(lambda x: (lambda q: (q, q.decode()))(STACKED[name](x, (1,))))(normal(1, 3, 4, 6))
    assert q.packing is not None and q.stored.dtype == jnp.uint8 and q.stored.size < 72

    @jax.jit
    def transform(q):
        scanned = lax.scan(lambda carry, row: (carry, row.decode()), 0, q)[1]
        mapped = jax.vmap(lambda row: row.decode())(q)
        turned = q.transpose(order)
        return q, [q.decode(), scanned, mapped, q.plain().packed(skip=1).decode()], turned, turned.decode()

    same, alike, turned, decoded = transform(q)
    assert_same(same, q)
    for other in alike:
        np.testing.assert_array_equal(other, want)
    assert turned.packing is not None and turned.shape == (6, 3, 4)
    np.testing.assert_array_equal(decoded, np.asarray(want).transpose(order))

    exported = jax.export.export(jax.jit(lambda q: (q, q.decode())))(q).serialize()
    same, decoded = jax.export.deserialize(bytearray(exported)).call(q)
    assert_same(same, q)
    np.testing.assert_array_equal(decoded, want)


# --- signal to noise -------------------------------------------------------------------------------------------------


def decibels(x, decoded):
    """Return the ratio of the signal's variance to the mean squared error, in dB."""
    x = as_64(x)
    return 10 * math.log10(x.var() / ((x - as_64(decoded)) ** 2).mean())


def stratified(low, high, n=2**18):
    """Return n uniform numbers, one from each of n equal intervals."""
    share = (np.arange(n) + np.random.default_rng(n).random(n)) / n
    return (low + (high - low) * share).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_uniform_source_has_six_decibels_a_bit(bits):
    """20 log10(2^b): the source reaches half a step beyond the outermost codes, so that every code has a whole one.

    Codes of two's complement lie half a step off their middle: the signal is what varies. By its own range, from code
    to code, a source loses the outer halves: 20 log10(2^b - 1).
    """
    for signed, zero in ((True, 0), (True, 1), (False, 1)):
        low, high = oracle.bounds(bits, signed=signed, symmetric=False)
        step, one = 0.25, (1,)
        ends = [jnp.full(one, (end - zero) * step, jnp.float32) for end in (low, high)]
        x = jnp.asarray(stratified((low - zero - 0.5) * step, (high - zero + 0.5) * step))
        quantizer = jaxq.Quantizer(jaxq.Int(bits, signed), symmetric=False)
        static = codecs.encode(quantizer, x, one, jaxq.Range(*ends, jnp.ones(one, jnp.float32)))
        assert decibels(x, static.decode()) == pytest.approx(6.0206 * bits, abs=0.05)
        own = quantizer(jnp.asarray(stratified(0.0, 1.0)), (0,))
        assert decibels(stratified(0.0, 1.0), own.decode()) == pytest.approx(20 * math.log10(2**bits - 1), abs=0.05)
    low, high = oracle.bounds(bits, symmetric=False)
    x = stratified((low - 0.5) / 8, (high + 0.5) / 8)
    assert decibels(x, jaxq.fixed(bits, 3)(jnp.asarray(x)).decode()) == pytest.approx(6.0206 * bits, abs=0.05)
    top = 2 ** (bits - 1) - 1
    x = stratified(-1.0, 1.0)  # symmetric codes: one fewer, the outermost at the ends
    decoded = jaxq.Quantizer(jaxq.Int(bits))(jnp.asarray(x), (0,)).decode()
    assert decibels(x, decoded) == pytest.approx(20 * math.log10(2 * top), abs=0.05)


# Per group size: decibels of int8, int4, int3, int2 on N(0, 1), 2 million samples.
SYMMETRIC = {
    32: (45.43, 20.26, 12.90, 3.64),
    64: (44.53, 19.36, 12.00, 2.88),
    128: (43.79, 18.61, 11.26, 2.31),
    1024: (42.10, 16.93, 9.58, 1.24),
}
ASYMMETRIC = {32: (46.47, 21.85, 15.23, 7.82), 64: (45.42, 20.81, 14.19, 6.80), 128: (44.56, 19.95, 13.33, 5.97)}
OTHERS = {
    "binary": (jaxq.binary(), 4.396, 0.05),
    "b158": (jaxq.b158(), 5.79, 0.05),
    "ternary": (jaxq.ternary(), 7.17, 0.05),
    "mxfp8": (jaxq.mxfp8(), 30.65, 0.05),
    "mxfp6": (jaxq.mxfp6(), 30.94, 0.05),
    "mxfp4": (jaxq.mxfp4(), 18.79, 0.05),
    "mxint8": (jaxq.mxint8(), 41.66, 0.05),
    "nvfp4": (jaxq.nvfp4(), 20.44, 0.05),
    "nf4": (jaxq.nf4(), 20.73, 0.05),
    "bfloat16": (jaxq.bfloat16(), 55.6, 0.1),
    "float8": (jaxq.float8(per_tensor=True), 31.5, 0.1),
}


@functools.cache
def gaussian():
    return jnp.asarray(normal(11, 2**10, 2**10))


def sqnr(quantizer):
    x = gaussian()
    return decibels(x, jax.jit(lambda x: quantizer(x, (1,)).decode())(x))


@pytest.mark.parametrize("group", SYMMETRIC)
def test_groups_have_the_published_error_on_normal_numbers(group):
    for symmetric, table in ((True, SYMMETRIC), (False, ASYMMETRIC)):
        for bits, want in zip((8, 4, 3, 2), table.get(group, ()), strict=False):
            quantizer = jaxq.Quantizer(jaxq.Int(bits), group=group, symmetric=symmetric)
            assert sqnr(quantizer) == pytest.approx(want, abs=0.05), (bits, symmetric)


@pytest.mark.parametrize("name", OTHERS)
def test_formats_have_the_published_error_on_normal_numbers(name):
    quantizer, want, within = OTHERS[name]
    assert sqnr(quantizer) == pytest.approx(want, abs=within)


def test_formats_are_those_of_their_names():
    for quantizer, form in [
        (jaxq.float16(), FLOAT16), (jaxq.bfloat16(), BFLOAT16), (jaxq.float8(), E4M3), (jaxq.float8_e5m2(), E5M2),
        (jaxq.mxfp8(), E4M3), (jaxq.mxfp6(), E2M3), (jaxq.mxfp4(), E2M1), (jaxq.nvfp4(), E2M1),
        (jaxq.mxint8(), jaxq.Int(8)), (jaxq.b158(), jaxq.Int(2)), (jaxq.dynamic_fixed(6), jaxq.Int(6)),
    ]:  # fmt: skip
        assert quantizer.format == form
    assert [q().group for q in (jaxq.mxfp8, jaxq.mxfp6, jaxq.mxfp4, jaxq.mxint8)] == [32] * 4
    assert jaxq.nvfp4().group == 16 and jaxq.nf4().group == 64


# --- linear_quantize and k_means_quantize ----------------------------------------------------------------------------


def check_linear(x, bits, grid, *, symmetric, signed, narrow, **options):
    """Assert that codes and scales are the oracle's for a scale of shape `grid`."""
    q, scale, zero = jaxq.linear_quantize(x, bits, symmetric=symmetric, signed=signed, narrow=narrow, **options)
    storage = f"{'' if signed else 'u'}int{16 if bits == 16 else 8}"
    assert q.dtype == storage and scale.dtype == jnp.float32 and zero.dtype == jnp.int32
    assert q.shape == x.shape and scale.shape == zero.shape == grid
    lo, hi = (oracle.collapse(x, grid, reduce) for reduce in (np.minimum, np.maximum))
    low, high = oracle.bounds(bits, signed=signed, symmetric=symmetric and narrow)
    want, real_zero = np.maximum(-lo / max(-low, 1), hi / max(high, 1)), np.zeros(grid)
    if not symmetric:
        want, real_zero = (hi - lo) / (high - low), low - lo * (high - low) / (hi - lo)
    np.testing.assert_allclose(as_64(scale), want, rtol=2.0**-21)
    assert (np.abs(as_64(zero) - real_zero) <= 0.5 + 1e-2).all() and (symmetric is False or not np.any(zero))
    steps, zero = as_64(x) / spread(as_64(scale), x.shape), spread(as_64(zero), x.shape)
    codes = np.clip(np.rint(steps) + zero, low, high)
    clear = ~oracle.is_near_tie(steps, 1e-2 if bits == 16 else 1e-4)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(as_64(q)[clear], codes[clear])


@pytest.mark.parametrize("bits", [1, *range(2, 9), 16])
def test_linear_quantize_of_every_width(bits):
    """Groups along an axis, with and without the most negative code, of one bit and of sixteen."""
    x = normal(bits, 6, 8) * np.float32(3)
    x[0] += 2
    for symmetric, signed, narrow in itertools.product([True, False], repeat=3):
        if bits == 1 and signed and symmetric:
            continue
        options = {"symmetric": symmetric, "signed": signed, "narrow": narrow}
        data = np.abs(x) if symmetric and not signed else x
        check_linear(data, bits, (1, 1), **options)
        check_linear(data, bits, (6, 1), axis=0, **options)
        check_linear(data, bits, (6, 2), axis=1, group=4, **options)


def test_linear_quantize_of_one_signed_bit_is_the_sign():
    x = normal(0, 6, 8)
    for options, grid in (({}, (1, 1)), ({"axis": 1}, (1, 8)), ({"axis": -1, "group": 4}, (6, 2))):
        q, scale, zero = jaxq.linear_quantize(x, 1, **options)
        np.testing.assert_array_equal(q, np.where(x < 0, -1, 1))
        want = oracle.collapse(np.abs(x), grid, np.add) / (48 / math.prod(grid))
        np.testing.assert_allclose(as_64(scale), want, rtol=1e-6)
        assert q.dtype == jnp.int8 and zero.dtype == jnp.int32 and not np.any(zero)


def test_linear_quantize_refuses_groups_that_do_not_fit():
    x = jnp.ones((6, 8))
    for options in ({"group": 4}, {"group": 4, "axis": (0, 1)}):
        with pytest.raises(ValueError, match="axis"):
            jaxq.linear_quantize(x, 4, **options)
    with pytest.raises(ValueError, match="3.*8"):
        jaxq.linear_quantize(x, 4, axis=1, group=3)


@pytest.mark.parametrize("data, k", [([1, 3, 5, 7, 9], 2), (list(range(10, 100, 10)), 3), ([-10, -5, 0, 5, 10], 2)])
def test_k_means_quantize_is_the_best_of_all_partitions(data, k):
    quantized, centroids = jaxq.k_means_quantize(data, k)
    cuts = itertools.combinations(range(1, len(data)), k - 1)
    parts = [np.split(np.array(data, np.float64), cut) for cut in cuts]
    best = min(sum(((part - part.mean()) ** 2).sum() for part in split) for split in parts)
    assert ((as_64(quantized) - np.array(data)) ** 2).sum() == pytest.approx(best, rel=1e-6)
    held = as_64(centroids)
    assert held.shape == (k,) and (np.diff(held) > 0).all() and np.isin(as_64(quantized), held).all()
    gap = np.abs(np.array(data)[:, None] - held)
    np.testing.assert_array_equal(np.abs(as_64(quantized) - np.array(data)), gap.min(1))
