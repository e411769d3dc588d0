"""Small floats and shared scales against ml_dtypes, the written rules in float64, and the published SQNR on N(0, 1)."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.numbers import microscaling
from jaxq.numbers.floats import BFLOAT16, E2M1, E2M3, E3M2, E4M3, E5M2, FLOAT16, Float, decode, encode

pytestmark = pytest.mark.shared

# Format: (NumPy's dtype, bits, largest number, exponent of the largest binade). OCP OFP8; OCP MX v1.0, section 5.3.
KNOWN = {
    FLOAT16: (np.float16, 16, 65504.0, 15),
    BFLOAT16: (ml_dtypes.bfloat16, 16, 3.3895313892515355e38, 127),
    E4M3: (ml_dtypes.float8_e4m3fn, 8, 448.0, 8),
    E5M2: (ml_dtypes.float8_e5m2, 8, 57344.0, 15),
    E3M2: (ml_dtypes.float6_e3m2fn, 6, 28.0, 4),
    E2M3: (ml_dtypes.float6_e2m3fn, 6, 7.5, 2),
    E2M1: (ml_dtypes.float4_e2m1fn, 4, 6.0, 2),
}
FORMATS = pytest.mark.parametrize("format", KNOWN, ids=str)


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def patterns(x):
    """Return the bits of an array of 8- or 16-bit numbers."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def every_code(format):
    """Return all bit patterns of a format, in NumPy's dtype for it."""
    dtype = np.dtype(KNOWN[format][0])
    return np.arange(2**format.bits, dtype=f"u{dtype.itemsize}").view(dtype)


def reals(x):
    """Return float32 values of small floats; NumPy warns of the NaN among them."""
    with np.errstate(invalid="ignore"):
        return x.astype(np.float32)


def numbers(format):
    """Return the finite numbers of a format in increasing order: float64."""
    values = reals(every_code(format))
    return np.sort(values[np.isfinite(values)]).astype(np.float64)


def saturated(format, x):
    """Return the bits of ml_dtypes' cast of `x` (float32, no NaN), saturating."""
    dtype, _, largest, _ = KNOWN[format]
    return patterns(np.clip(x, np.float32(-largest), np.float32(largest)).astype(dtype))


def hard_values(format):
    """Return float32 numbers of all exponents and signs, subnormal ones too, and all ties with their neighbours."""
    rng = np.random.default_rng(0)
    random = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    subnormal = rng.integers(0, 2**23, 1000, dtype=np.uint32).view(np.float32)
    exact = numbers(format)
    tie = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    near = [tie, *(np.nextafter(tie, np.float32(end)) for end in (np.inf, -np.inf))]
    return np.concatenate([random[np.isfinite(random)], subnormal, -subnormal, *near])


@FORMATS
def test_formats_are_what_is_published(format):
    dtype, bits, largest, emax = KNOWN[format]
    assert (format.bits, format.largest, format.emax) == (bits, largest, emax)
    assert str(format) == np.dtype(dtype).name and format.storage == (dtype if bits >= 8 else np.uint8)
    assert Float(**json.loads(json.dumps(dataclasses.asdict(format)))) == format and hash(format)


def test_what_nothing_holds_is_refused():
    for fields in [(5, 6, 0, "float12"), (1, 2, 0, "float4_e1m2"), (9, 2, 0, "x"), (4, 3, 9, "float8_e4m3")]:
        with pytest.raises(ValueError, match=fields[-1]):
            Float(*fields)
    for error, words, call in [
        (TypeError, "int32", lambda: encode(E4M3, jnp.zeros(2, jnp.int32))),
        (TypeError, "held in uint8", lambda: decode(E2M1, jnp.zeros(2, jnp.float32))),
        (ValueError, "increasing", lambda: microscaling.nearest_level(jnp.ones(2), (0.0, 0.0, 1.0))),
        (ValueError, "do not divide", lambda: microscaling.mx_scale(jnp.ones((2, 33)), 2)),
        (ValueError, "does not divide", lambda: microscaling.divide(jnp.ones((2, 32)), jnp.ones((2, 5)))),
    ]:
        with pytest.raises(error, match=words):
            call()


@FORMATS
def test_every_code_decodes_exactly_and_encodes_to_itself(format):
    codes = every_code(format)
    stored = jnp.asarray(codes if format.bits >= 8 else codes.view(np.uint8))
    values = np.asarray(jax.jit(functools.partial(decode, format))(stored))
    want = reals(codes)
    number = ~np.isnan(want)
    assert np.array_equal(values.view(np.uint32)[number], want.view(np.uint32)[number])
    assert np.isnan(values[~number]).all()
    assert np.array_equal(patterns(encode(format, want[np.isfinite(want)])), patterns(codes[np.isfinite(want)]))


@FORMATS
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_precision_number_encodes_as_ml_dtypes_casts(format, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    x = x[~np.isnan(reals(x))]  # infinities stay, and saturate
    assert np.array_equal(patterns(encode(format, jnp.asarray(x))), saturated(format, x.astype(np.float32)))


@FORMATS
def test_float32_encodes_as_ml_dtypes_casts(format):
    x = hard_values(format)
    codes = jax.jit(functools.partial(encode, format))(jnp.asarray(x))
    assert codes.dtype == format.storage and np.array_equal(patterns(codes), saturated(format, x))
    # XLA may drop a pair of casts under `jit`; this one must survive, or imitation would be a no-op.
    values = jax.jit(lambda x: decode(format, encode(format, x)))(x)
    assert np.array_equal(values, saturated(format, x).view(KNOWN[format][0]).astype(np.float32))


@FORMATS
def test_nan_and_infinity(format):
    values = decode(format, encode(format, jnp.array([np.inf, -np.inf, np.nan], jnp.float32))).tolist()
    assert values[:2] == [format.largest, -format.largest]
    assert math.isnan(values[2]) if format.bits >= 8 else values[2] == format.largest


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(list(KNOWN)))
def test_no_number_of_the_format_is_nearer(x, format):
    assert abs(float(decode(format, encode(format, jnp.float32(x)))) - x) == np.abs(numbers(format) - x).min()


def blocks_of_all_sizes():
    """Return [200, 64] float32 in which every block of 32 has its own exponent, with zero and one-number blocks."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, 2, 32)) * 2.0 ** rng.integers(-90, 125, (200, 2, 1))
    x *= 2.0 ** rng.integers(-20, 1, x.shape)
    x[0], x[1, :, 1:] = 0, 0
    x[2] = 2.0 ** -np.arange(64).reshape(2, 32)
    x[3, 0], x[3, 1] = 2.0**-126, np.finfo(np.float32).max * np.tile([1, -1], 16)
    return x.astype(np.float32).reshape(200, 64)


def mx_by_the_rule(x, emax):
    """Return x / scale in float64 and the scales: 2 ** (floor(log2 max|v|) - emax) >= 2 ** -126, 1 for zeros."""
    blocks = x.astype(np.float64).reshape(-1, 32)
    exponents = np.frexp(np.abs(blocks).max(axis=1))[1] - 1 - emax
    scales = np.where(blocks.any(axis=1), np.ldexp(1.0, np.maximum(exponents, -126)), 1.0)
    return (blocks / scales[:, None]).reshape(x.shape), scales.reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("format", [E4M3, E5M2, E3M2, E2M3, E2M1], ids=str)
def test_mx_is_the_ocp_rule(format):
    x = blocks_of_all_sizes()
    ratio, scales = mx_by_the_rule(x, KNOWN[format][3])
    scale = jax.jit(functools.partial(microscaling.mx_scale, format_emax=format.emax))(jnp.asarray(x))
    assert np.array_equal(np.asarray(scale), scales)
    codes = jax.jit(lambda x, s: encode(format, microscaling.divide(x, s)))(jnp.asarray(x), scale)
    assert np.array_equal(patterns(codes), saturated(format, ratio.astype(np.float32)))


def test_mxint8_is_the_ocp_rule():
    x = blocks_of_all_sizes()
    ratio, scales = mx_by_the_rule(x, 0)
    scale = microscaling.mx_scale(jnp.asarray(x), 0)
    codes = jax.jit(microscaling.mxint8_codes)(jnp.asarray(x), scale)
    assert np.array_equal(scale, scales)
    assert codes.dtype == jnp.int8 and np.array_equal(codes, np.clip(np.rint(ratio * 64), -127, 127))
    one = jnp.full((1, 32), 2.0**127)  # a single block: its scale is broadcast, not repeated
    assert np.array_equal(jax.jit(microscaling.mxint8_codes)(one, microscaling.mx_scale(one, 0)), np.full((1, 32), 64))


def test_mx_scale_of_what_has_none():
    x = np.ones((4, 32), np.float32)
    x[0, 3], x[1, 0], x[2] = np.nan, -np.inf, 2.0**-140
    scale = np.asarray(microscaling.mx_scale(jnp.asarray(x), 2))
    assert np.isnan(scale[:2]).all() and scale[2:].tolist() == [[2.0**-126], [0.25]]


def test_e8m0_is_the_exponent():
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = np.asarray(microscaling.from_e8m0(jnp.asarray(codes)))
    assert np.array_equal(got[:255].view(np.uint32), want[:255].view(np.uint32)) and np.isnan(got[255])
    assert np.array_equal(microscaling.to_e8m0(jnp.asarray(want)), codes)


@pytest.mark.parametrize("size", [1.0, 2.0**-100, 2.0**120])
def test_nvfp4_scales_are_the_two_level_rule(size):
    x = np.random.default_rng(3).standard_normal((64, 128)) * 2.0 ** np.random.default_rng(4).integers(-7, 1, (64, 1))
    x[5], x[6] = 0, x[6] * 2.0**-30
    x = (x * size).astype(np.float32)
    codes, tensor = jax.jit(microscaling.nvfp4_scales)(jnp.asarray(x))
    assert codes.dtype == jnp.float8_e4m3fn and codes.shape == (64, 8) and tensor.shape == (1, 1)
    assert float(tensor[0, 0]) == pytest.approx(float(np.abs(x).max()) / 2688, rel=2**-22)
    ratio = np.abs(x.astype(np.float64)).reshape(64, 8, 16).max(axis=2) / (6 * float(tensor[0, 0]))
    # Two float32 roundings before the one to E4M3: next to a tie either neighbour is right.
    low, high = (
        np.maximum((ratio * r).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32), 2.0**-9)
        for r in (1 - 2**-21, 1 + 2**-21)
    )
    got = np.asarray(codes).astype(np.float32)
    assert ((got == low) | (got == high)).all() and (low == high).mean() > 0.99
    scale = microscaling.nvfp4_scale(codes, tensor)
    elements = np.asarray(decode(E2M1, encode(E2M1, microscaling.divide(jnp.asarray(x), scale))))
    assert np.isfinite(elements).all() and not elements[5].any()


def test_nvfp4_of_zeros_of_tiny_numbers_and_of_nan():
    assert microscaling.nvfp4_scale(*microscaling.nvfp4_scales(jnp.zeros((2, 32)))).tolist() == [[2.0**-9] * 2] * 2
    scale = microscaling.nvfp4_scale(*microscaling.nvfp4_scales(jnp.full((2, 32), 2.0**-126).at[0].set(0.0)))
    assert np.asarray(scale).min() >= np.finfo(np.float32).tiny
    for bad in (jnp.nan, -jnp.inf):
        scale = microscaling.nvfp4_scale(*microscaling.nvfp4_scales(jnp.ones((2, 32)).at[0, 1].set(bad)))
        assert np.isnan(np.asarray(scale)).all()


@pytest.mark.parametrize("levels", [microscaling.NF4_LEVELS, (-1.0, 0.0, 1.0), (0.1, 0.7, 3e9)], ids=len)
def test_the_nearest_level_is_the_nearest(levels):
    table = np.asarray(levels, np.float32).astype(np.float64)
    tie = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    random = np.random.default_rng(5).uniform(-1.2, 1.2, 10_000).astype(np.float32)
    x = np.concatenate([random, tie, *(np.nextafter(tie, np.float32(end)) for end in (np.inf, -np.inf))])
    codes = jax.jit(lambda x: microscaling.nearest_level(x, levels))(jnp.asarray(x))
    want = np.abs(x.astype(np.float64)[:, None] - table).argmin(axis=1)  # the first of equals: the lower level
    assert codes.dtype == jnp.uint8 and np.array_equal(codes, want)
    assert np.array_equal(microscaling.level_values(codes, levels), table[want].astype(np.float32))


def through(scale_of, there_and_back):
    """Return the round trip `scale * there_and_back(x / scale)` with the scales `scale_of(x)`."""

    def round_trip(x):
        scale = scale_of(x)
        values = there_and_back(microscaling.divide(x, scale))
        return values * jnp.repeat(scale, x.shape[-1] // scale.shape[-1], axis=-1)

    return round_trip


def rounded(format):
    return lambda x: decode(format, encode(format, x))


def mx(emax, there_and_back):
    return through(lambda x: microscaling.mx_scale(x, emax), there_and_back)


def levels(table):
    return lambda x: microscaling.level_values(microscaling.nearest_level(x, table), table)


def mean_magnitude(x):
    return jnp.abs(x).mean(keepdims=True)


def int8_steps(x):
    return microscaling.mxint8_codes(x, jnp.ones((1, 1))).astype(jnp.float32) / 64


def twn(x):  # alpha sign(x) where |x| > 0.7 E|x|, alpha being the mean magnitude of those
    signs = levels((-1.0, 0.0, 1.0))(microscaling.divide(x, 1.4 * mean_magnitude(x)))
    return signs * (signs * x).sum() / jnp.abs(signs).sum()


SQNR = {
    "MXFP4": (mx(E2M1.emax, rounded(E2M1)), 18.79, 0.05),
    "NVFP4": (through(lambda x: microscaling.nvfp4_scale(*microscaling.nvfp4_scales(x)), rounded(E2M1)), 20.44, 0.05),
    "MXFP6-E2M3": (mx(E2M3.emax, rounded(E2M3)), 30.94, 0.05),
    "MXFP6-E3M2": (mx(E3M2.emax, rounded(E3M2)), 25.35, 0.05),
    "MXFP8-E4M3": (mx(E4M3.emax, rounded(E4M3)), 30.65, 0.05),
    "MXFP8-E5M2": (mx(E5M2.emax, rounded(E5M2)), 25.35, 0.05),
    "MXINT8": (mx(0, int8_steps), 41.66, 0.05),
    "NF4-g64": (through(lambda x: microscaling.block_largest(x, 64), levels(microscaling.NF4_LEVELS)), 20.73, 0.05),
    "E4M3 per tensor": (through(lambda x: jnp.abs(x).max(keepdims=True) / 448, rounded(E4M3)), 31.5, 0.1),
    "bfloat16": (rounded(BFLOAT16), 55.6, 0.1),
    "ternary b1.58": (through(mean_magnitude, levels((-1.0, 0.0, 1.0))), 5.79, 0.05),
    "ternary TWN": (twn, 7.17, 0.05),
    "binary": (through(mean_magnitude, levels((-1.0, 1.0))), 4.396, 0.05),
}


@pytest.mark.parametrize("name", SQNR)
def test_sqnr_on_normal_numbers(name):
    round_trip, want, within = SQNR[name]
    x = np.random.default_rng(6).standard_normal((2**14, 128)).astype(np.float32)
    error = x.astype(np.float64) - np.asarray(jax.jit(round_trip)(jnp.asarray(x)))
    assert 10 * math.log10((x.astype(np.float64) ** 2).mean() / (error**2).mean()) == pytest.approx(want, abs=within)
