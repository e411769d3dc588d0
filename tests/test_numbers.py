"""The laws of numbers: decode after encode is within half a step, exact where it can be; zero is exact; ranges add up.

The judge is `oracle`, in float64. A step is what the oracle says it should be, not what the array under test reports.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

import jaxq
import oracle
from jaxq.numbers import affine
from jaxq.numbers.affine import Affine, encode

pytestmark = pytest.mark.shared

quick = functools.partial(settings, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)

# Three float32 roundings of codes of up to 255 steps.
SLACK = 1e-4
# A scale is a difference of halves times a constant.
SCALE_ROUNDINGS = 4 * 2.0**-24
# The smallest scale: below it, codes would be finer than the reciprocal of a scale can be in float32.
SMALLEST = 2.0**-120
# Numbers below, or their halves and sums of halves, are zeros to backends that flush.
SUBNORMAL = 2.0**-124
FLOAT32_MAX = float(np.finfo(np.float32).max)


@pytest.fixture(autouse=True)
def strict_types():
    """Refuse implicit promotion of types."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def as_64(x):
    return np.asarray(x, np.float64)


formats = st.builds(jaxq.Int, st.integers(2, 8), st.booleans())


@st.composite
def quantizers(draw):
    """Draw a quantizer of every format and granularity that takes its range from the array."""
    form, symmetric = draw(formats), draw(st.booleans())
    grain = draw(st.sampled_from([{}, {"per_tensor": True}, {"group": 1}, {"group": 2}]))
    return jaxq.Quantizer(form, symmetric=symmetric, **grain)


def expected(x, quantizer, grid):
    """Return the float64 range, scale and unrounded zero point of every element of `x`."""
    form = quantizer.format
    lo, hi = oracle.collapse(x, grid, np.minimum), oracle.collapse(x, grid, np.maximum)
    scale, zero = oracle.affine(lo, hi, form.bits, signed=form.signed, symmetric=quantizer.symmetric)
    small = scale < SMALLEST
    if not quantizer.symmetric:
        zero = np.where(small, quantizer.bounds()[0] - lo / SMALLEST, zero)
    return (oracle.spread(v, x.shape) for v in (lo, hi, np.maximum(scale, SMALLEST), zero))


def grid_of(shape, contracted, quantizer):
    """Return the scale shape that the documentation promises."""
    if quantizer.per_tensor:
        return (1,) * len(shape)
    grid = [1 if axis in contracted else n for axis, n in enumerate(shape)]
    if quantizer.group and contracted:
        grid[max(contracted)] = shape[max(contracted)] // quantizer.group
    return tuple(grid)


def check_laws(x, quantizer, contracted, wrap=lambda f: f):
    """Assert the laws of one array: half a step, zero, scale, type, doing it twice. wrap: `jax.jit` or nothing."""

    def run(x):
        q = quantizer(x, contracted)
        wide = q.decode(jnp.float32)
        return q, wide, q.decode(), encode(quantizer, wide, Affine(q.scale, q.zero_point)), quantizer(wide, contracted)

    q, wide, narrow, same_scale, own_range = wrap(run)(x)
    exact, reals, grid = as_64(x), as_64(wide), grid_of(x.shape, contracted, quantizer)
    assert q.shape == x.shape and q.dtype == narrow.dtype == x.dtype
    assert q.scale.dtype == jnp.float32 and (q.zero_point is None) == quantizer.symmetric
    if 0 in x.shape and quantizer.group:  # how many groups there are in nothing is nobody's business
        assert wide.shape == x.shape and q.scale.ndim == x.ndim
        return
    assert q.scale.shape == grid
    low, high = quantizer.bounds()
    codes = np.asarray(q.codes, np.int64)
    assert ((codes >= low) & (codes <= high)).all()

    lo, hi, step, zero = expected(exact, quantizer, grid)
    assert (np.abs(reals - exact) <= (0.5 + SLACK) * step).all()
    assert not reals[exact == 0].any()
    normal = (np.maximum(-lo, hi) >= SUBNORMAL) | (np.maximum(-lo, hi) == 0)
    np.testing.assert_allclose(oracle.spread(as_64(q.scale), x.shape)[normal], step[normal], rtol=SCALE_ROUNDINGS)
    if not quantizer.symmetric:
        assert q.zero_point.shape == grid and q.zero_point.dtype == q.codes.dtype
        assert (np.abs(oracle.spread(as_64(q.zero_point), x.shape) - zero)[normal] <= 0.5 + SLACK).all()
    largest = float(jnp.finfo(x.dtype).max)
    cut = jnp.asarray(np.clip(reals, -largest, largest), jnp.float32).astype(x.dtype)
    np.testing.assert_array_equal(as_64(narrow), as_64(cut))

    np.testing.assert_array_equal(same_scale, q.codes)
    # By its own range too, but where both ends lie halfway between codes, which makes what is decoded a code narrower,
    # or an end decodes to more than float32 holds.
    halves = oracle.is_near_tie(lo / step) & (not quantizer.symmetric)
    beyond = oracle.spread(oracle.collapse(np.abs(reals), grid, np.maximum), x.shape) >= FLOAT32_MAX
    clear = ~halves & ~beyond
    np.testing.assert_array_equal(np.asarray(own_range.codes)[clear], np.asarray(q.codes)[clear])
    np.testing.assert_allclose(as_64(own_range.decode())[clear], reals[clear], rtol=SCALE_ROUNDINGS)


@st.composite
def arrays(draw):
    """Draw (seed, shape, contracted axes), with axes of every size down to none, even ones where groups are cut."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 4, 6]), max_size=3))
    axes = [axis for axis in range(len(sizes)) if draw(st.booleans())]
    return draw(seeds), tuple(sizes), tuple(axes)


def some_numbers(seed, shape, positive, exponent=0):
    """Return numbers of very different sizes around 2**exponent, with zeros and signs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp2(rng.integers(-3, 3, shape)) * (rng.random(shape) < 0.9)
    return np.ldexp(np.abs(x) if positive or rng.random() < 0.2 else x, exponent)


@quick(max_examples=30)
@given(arrays(), quantizers(), st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16]))
@example((0, (), ()), jaxq.int8(), jnp.float32)
@example((0, (0, 3), (0,)), jaxq.uint8(), jnp.float32)
@example((0, (3, 0), (0,)), jaxq.int8(), jnp.bfloat16)
@example((0, (1, 1, 1), (0, 2)), jaxq.int2(symmetric=False), jnp.float16)
def test_decode_of_encode_is_within_half_a_step(array, quantizer, dtype):
    seed, shape, contracted = array
    if quantizer.group and not contracted:
        with pytest.raises(ValueError, match="need an axis"):
            quantizer(jnp.ones(shape, dtype), contracted)
        return
    if quantizer.group and shape[max(contracted)] % quantizer.group:
        shape = tuple(2 * n for n in shape)
    positive = not quantizer.format.signed and quantizer.symmetric
    check_laws(jnp.asarray(some_numbers(seed, shape, positive), dtype), quantizer, contracted, jax.jit)


SIZES = {
    "subnormal": 1e-38,
    "tiny": 2e-38,
    "smaller than the smallest scale": 1e-37,
    "half a code": 3e-36,
    "small": 1e-30,
    "large": 1e30,
    "huge": 3e38,
    "largest": FLOAT32_MAX,
}
KINDS = {
    "int8": jaxq.int8(),
    "int8 asymmetric": jaxq.int8(symmetric=False),
    "uint8": jaxq.uint8(),
    "int4 asymmetric": jaxq.int4(symmetric=False),
    "int3 asymmetric": jaxq.Quantizer(jaxq.Int(3), symmetric=False),
    "int2": jaxq.int2(),
    "int2 asymmetric": jaxq.int2(symmetric=False),
}
# Both signs, positive, negative, lopsided, constant, one alone: a scale for each row.
PATTERNS = np.array([[-1, 1, 0, 0.5, -0.25], [1, 0.9, 0.1, 0, 0], [-1, -0.3, 0, 0, 0], [-1, 0.1, 0.004, 0, 0]])
PATTERNS = np.concatenate([PATTERNS, np.ones((1, 5)), -np.eye(1, 5)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_extreme_sizes(size, kind):
    check_laws(jnp.asarray(PATTERNS * SIZES[size], jnp.float32), KINDS[kind], (1,))


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_numbers_are_finite_and_zeros_stay(kind):
    x = jnp.asarray([1e-45, -1e-40, 0.0, 5e-39], jnp.float32)
    reals = as_64(KINDS[kind](x, (0,)).decode())
    assert np.isfinite(reals).all() and reals[2] == 0 and (np.abs(reals - as_64(x)) <= SMALLEST).all()
    half = jnp.asarray([6e-8, -6e-8, 0.0, 3e-7], jnp.float16)
    check_laws(half, KINDS[kind], (0,))


def test_a_float16_array_reaches_its_end():
    check_laws(jnp.asarray([65504.0, -65504.0, 1.0], jnp.float16), jaxq.int8(), (0,))
    check_laws(jnp.asarray([3.3e38, -3.3e38, 1.0], jnp.bfloat16), jaxq.int8(), (0,))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_dead_channels(kind):
    """An empty range has a scale of one and decodes to zeros, whatever its neighbours."""
    x = jnp.asarray([[0.0, 1.0, -0.0], [0.0, -3.0, 0.0]], jnp.float32)
    q = KINDS[kind](x)
    assert not as_64(q.decode())[:, [0, 2]].any() and as_64(q.scale)[0, [0, 2]].tolist() == [1.0, 1.0]
    check_laws(x, KINDS[kind], (0,))


@quick(max_examples=25)
@given(formats, st.booleans(), st.integers(-20, 20), seeds)
def test_representable_numbers_are_exact(form, symmetric, exponent, seed):
    """With a power of two for a scale, what is a multiple of it in range comes back bit for bit, its codes too."""
    quantizer = jaxq.Quantizer(form, symmetric=symmetric)
    low, high = oracle.bounds(form.bits, signed=form.signed, symmetric=symmetric)
    zero = 0 if symmetric else int(np.random.default_rng(seed).integers(low, high, endpoint=True))
    codes = np.arange(low, high + 1)
    x = jnp.asarray(np.ldexp(codes - float(zero), exponent), jnp.float32)
    q = quantizer(x, (0,))
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.decode(), x)
    assert float(q.scale[0]) == 2.0**exponent and (symmetric or int(q.zero_point[0]) == zero)


@quick(max_examples=40)
@given(formats, st.booleans(), st.floats(-80, 80), seeds)
def test_a_given_scale_is_exact_on_its_numbers(form, symmetric, exponent, seed):
    """Any scale: encoding what was decoded gives the codes back, and clips beyond them."""
    quantizer, rng = jaxq.Quantizer(form, symmetric=symmetric), np.random.default_rng(seed)
    low, high = oracle.bounds(form.bits, signed=form.signed, symmetric=symmetric)
    scale = np.float32(2.0**exponent)
    zero = None if symmetric else jnp.asarray([rng.integers(low, high, endpoint=True)], jnp.int32)
    codes = np.arange(low, high + 1)
    q = jaxq.QArray(jnp.asarray(codes, form.storage), jnp.asarray([scale]), zero, form, jnp.float32)
    np.testing.assert_array_equal(encode(quantizer, q.decode(), Affine(q.scale, zero)), codes)
    want = ((codes - (0 if symmetric else int(zero[0]))) * np.float64(scale)).astype(np.float32)
    np.testing.assert_array_equal(q.decode(), want)
    far = encode(quantizer, jnp.asarray([-1e3, 1e3, 3e38, -3e38], jnp.float32) * scale, Affine(q.scale, zero))
    np.testing.assert_array_equal(far, [low, high, high, low])


def test_rounding_is_to_nearest_even():
    x = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5, 3.49, 3.51, 127.0], jnp.float32)
    assert jaxq.int8()(x, (0,)).codes.tolist() == [0, 2, 2, 0, -2, 3, 4, 127]


def test_symmetric_is_odd():
    x = jnp.asarray(some_numbers(0, (50, 4), False), jnp.float32)
    for quantizer in (jaxq.int8(), jaxq.int4(), jaxq.int2(), jaxq.int8(group=10)):
        np.testing.assert_array_equal(quantizer(-x).decode(), -quantizer(x).decode())


def test_the_largest_number_keeps_its_code():
    """The end of a range must not be rounded out of it."""
    for n in range(200):
        x = jnp.asarray(np.random.default_rng(n).normal(size=7) * 2.0 ** (n - 100), jnp.float32)
        q = jaxq.int8()(x, (0,))
        assert int(np.abs(np.asarray(q.codes, np.int64)).max()) == 127
        np.testing.assert_allclose(np.abs(as_64(q.decode())).max(), np.abs(as_64(x)).max(), rtol=SCALE_ROUNDINGS)


# --- granularity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_have_scales_of_their_own(group, symmetric):
    x = jnp.asarray(some_numbers(0, (5, 12, 3), False), jnp.float32)
    quantizer = jaxq.int8(group=group, symmetric=symmetric)
    check_laws(x, quantizer, (0, 1))
    q = quantizer(x, (0, 1))
    assert q.scale.shape == (1, 12 // group, 3)
    for n in range(12 // group):
        part = jaxq.int8(symmetric=symmetric)(x[:, n * group : (n + 1) * group], (0, 1))
        np.testing.assert_array_equal(part.codes, q.codes[:, n * group : (n + 1) * group])
        np.testing.assert_array_equal(part.scale, q.scale[:, n : n + 1])


def test_a_group_must_divide_the_axis():
    with pytest.raises(ValueError, match="5.*12"):
        jaxq.int4(group=5)(jnp.ones((12, 3)))
    for bad in (0, -1, 2.0):
        with pytest.raises(ValueError, match="group"):
            jaxq.int4(group=bad)


def test_the_default_is_one_scale_per_last_index():
    x = jnp.asarray(some_numbers(0, (4, 3, 5), False), jnp.float32)
    assert jaxq.int8()(x).scale.shape == (1, 1, 5)
    assert jaxq.int8()(x, [-1]).scale.shape == (4, 3, 1)
    assert jaxq.int8(per_tensor=True)(x).scale.shape == (1, 1, 1)
    assert jaxq.int8()(x[0, 0]).scale.shape == (1,)  # a vector is one row
    assert jaxq.int8()(x[0, 0, 0]).scale.shape == ()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_nan_and_infinity_are_refused(bad, dtype):
    x = jnp.asarray([1.0, bad, 2.0], dtype)
    for call in (jaxq.int8(), jaxq.uint8(), jaxq.int4(per_tensor=True), jaxq.linear_quantize):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call(x)
    jax.jit(jaxq.int8())(x)  # not known where it is traced


def test_what_is_not_floating_point_is_refused():
    for x in (jnp.arange(3), jnp.ones(3, bool), jnp.ones(3, jnp.complex64)):
        for call in (jaxq.int8(), jaxq.linear_quantize):
            with pytest.raises(TypeError, match="float"):
                call(x)


@pytest.mark.parametrize("bits", [-1, 0, 9, 15, 17, 32, 8.0, "8", None, True])
def test_unknown_bit_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 or 16 bits"):
        jaxq.Int(bits)
    with pytest.raises(ValueError, match="1 to 8 or 16 bits"):
        jaxq.linear_quantize(jnp.ones(3), bits)


def test_formats():
    for bits in range(2, 9):
        for signed in (True, False):
            form = jaxq.Int(bits, signed)
            assert form.bounds() == oracle.bounds(bits, signed=signed, symmetric=False)
            assert form.bounds(symmetric=True) == oracle.bounds(bits, signed=signed, symmetric=True)
            assert form.storage == (jnp.int8 if signed else jnp.uint8)
            assert str(form) == f"{'' if signed else 'u'}int{bits}" and hash(form) == hash(jaxq.Int(bits, signed))
            for symmetric in (True, False):
                assert form.reach(symmetric) >= max(map(abs, form.bounds(symmetric)))


# --- linear_quantize -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (-2,)], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_quantize(symmetric, signed, axis):
    for bits in range(2, 9):
        x = some_numbers(bits, (4, 3, 5), False).astype(np.float32)
        kept = {a % 3 for a in ((axis,) if isinstance(axis, int) else axis or ())}
        grid = tuple(n if a in kept else 1 for a, n in enumerate(x.shape))
        q, scale, zero = jaxq.linear_quantize(x, bits, symmetric=symmetric, signed=signed, axis=axis)
        assert q.dtype == (jnp.int8 if signed else jnp.uint8) and scale.dtype == jnp.float32 and zero.dtype == jnp.int32
        assert q.shape == x.shape and scale.shape == zero.shape == grid
        ends = [oracle.collapse(x, grid, reduce) for reduce in (np.minimum, np.maximum)]
        want, real_zero = oracle.affine(*ends, bits, signed=signed, symmetric=symmetric)
        np.testing.assert_allclose(as_64(scale), want, rtol=SCALE_ROUNDINGS)
        assert (np.abs(as_64(zero) - real_zero) <= 0.5 + SLACK).all()
        wide, zero = oracle.spread(want, x.shape), oracle.spread(np.asarray(zero, np.int64), x.shape)
        codes = oracle.encode(x, wide, zero, *oracle.bounds(bits, signed=signed, symmetric=symmetric))
        clear = ~oracle.is_near_tie(x / wide)
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(np.asarray(q, np.int64)[clear], codes[clear])


def test_linear_quantize_of_odd_shapes():
    for x, axis in (
        (jnp.float32(3.0), None),
        (jnp.zeros((0, 3)), 1),
        (jnp.zeros((3, 0)), 0),
        (jnp.zeros((2, 0)), None),
    ):
        for symmetric in (True, False):
            q, scale, zero = jaxq.linear_quantize(x, 8, symmetric=symmetric, axis=axis)
            assert q.shape == x.shape and scale.shape == zero.shape and scale.ndim == x.ndim
            np.testing.assert_allclose(as_64(scale) * (as_64(q) - as_64(zero)), as_64(x), rtol=SCALE_ROUNDINGS)


def test_linear_quantize_under_transformations():
    """The same codes under jit; and row by row under vmap, which is `axis=0`."""
    x = jnp.asarray(some_numbers(3, (6, 8), False), jnp.float32)
    plain = jaxq.linear_quantize(x, 4, symmetric=False, axis=0)
    for other in (
        jax.jit(lambda x: jaxq.linear_quantize(x, 4, symmetric=False, axis=0))(x),
        jax.vmap(lambda row: jaxq.linear_quantize(row, 4, symmetric=False))(x),
    ):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_array_equal(a, b)


# --- QArray ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer", [jaxq.int8(), jaxq.uint8(), jaxq.int4(group=2), jaxq.int2(symmetric=False, group=3)]
)
def test_qarray(quantizer):
    x = jnp.asarray(some_numbers(0, (6, 4, 5), False), jnp.bfloat16)
    q = quantizer(x, (0,))
    scales = 20 * (6 // quantizer.group if quantizer.group else 1)
    assert q.shape == (6, 4, 5) and q.ndim == 3 and q.size == 120 and q.dtype == jnp.bfloat16
    codes = 120 * quantizer.format.bits // 8
    assert q.nbytes == codes + scales * (4 if quantizer.symmetric else 5)
    assert q.decode().dtype == jnp.bfloat16 and q.decode(jnp.float16).dtype == jnp.float16

    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == (2 if quantizer.symmetric else 3)
    for other in (jax.tree.unflatten(tree, leaves), jax.jit(lambda q: q)(q), jax.device_put(q)):
        assert type(other) is jaxq.QArray and other.format == q.format and other.dtype == q.dtype
        assert (other.zero_point is None) == quantizer.symmetric
        np.testing.assert_array_equal(other.decode(), q.decode())
    assert jax.eval_shape(lambda q: q.decode(), q).shape == (6, 4, 5)

    for order in [(2, 0, 1), (1, 2, 0), (0, 1, 2), (2, 1, 0)]:
        turned = q.transpose(order)
        assert turned.shape == tuple((6, 4, 5)[a] for a in order) and turned.dtype == q.dtype
        np.testing.assert_array_equal(turned.decode(), np.asarray(q.decode()).transpose(order))
        inverse = tuple(int(a) for a in np.argsort(order))
        for a, b in zip(jax.tree.leaves(turned.transpose(inverse)), leaves, strict=True):
            np.testing.assert_array_equal(a, b)


def test_qarrays_decode_alike_under_jit_and_scan():
    q = jaxq.uint8(group=3)(jnp.asarray(some_numbers(0, (5, 6, 4), False), jnp.float32), (1,))
    want = np.asarray(q.decode())
    np.testing.assert_array_equal(jax.jit(lambda q: q.decode())(q), want)
    _, rows = lax.scan(lambda carry, row: (carry, row.decode()), 0, q)
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_array_equal(jax.vmap(lambda row: row.decode())(q), want)


# --- calibrators -----------------------------------------------------------------------------------------------------


@st.composite
def observations(draw):
    """Draw a list of (lo, hi) or None, for "nothing seen"."""
    plain = {"width": 32, "allow_subnormal": False}
    ends = st.tuples(st.floats(-100, 0, **plain), st.floats(0, 100, **plain))
    return draw(st.lists(st.one_of(st.none(), ends, ends), min_size=1, max_size=8))


def as_range(pair):
    lo, hi = pair or (0.0, 0.0)
    return jaxq.Range(*(np.asarray(v, np.float32) for v in (lo, hi, 0.0 if pair is None else 1.0)))


def run_calibrator(calibrator, pairs):
    state = as_range(None)
    for pair in pairs:
        state = calibrator.update(state, as_range(pair))
    return [float(v) for v in state[:3]]


@quick(max_examples=25)
@given(observations())
def test_minmax_is_the_hull(pairs):
    seen = [pair for pair in pairs if pair is not None]
    want = [min([0.0, *(a for a, _ in seen)]), max([0.0, *(b for _, b in seen)]), len(seen)]
    assert run_calibrator(jaxq.minmax(), pairs) == want == run_calibrator(jaxq.minmax(), pairs[::-1])


@quick(max_examples=25)
@given(observations(), st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_ema_is_the_moving_average(pairs, decay):
    """The first as it is, then `decay` of the old and the rest of the new; seeing nothing changes nothing."""
    lo = hi = 0.0
    for pair in pairs:
        if pair is not None:
            keep = decay if lo < hi else 0.0  # zeros say nothing of a range
            lo, hi = (keep * old + (1 - keep) * new for old, new in zip((lo, hi), pair, strict=True))
    got = run_calibrator(jaxq.ema(decay), pairs)
    np.testing.assert_allclose(got[:2], [lo, hi], rtol=1e-5, atol=1e-5)
    assert got[2] == sum(pair is not None for pair in pairs)


def test_ema_starts_from_the_first_range_that_is_not_of_zeros():
    got = run_calibrator(jaxq.ema(0.75), [(0.0, 0.0), (0.0, 0.0), (-2.0, 4.0), (0.0, 0.0)])
    assert got == [-1.5, 3.0, 4]


@pytest.mark.parametrize("calibrator", [jaxq.ema(), jaxq.minmax()])
def test_ranges_of_zeros_give_way_to_what_is_seen_later(calibrator):
    """A batch of zeros, then another: as if the other had been the first, also while it is quantized."""
    w, x = jnp.eye(4), jnp.full((2, 4), 300.0)
    policy = jaxq.w8a8(static=True, calibrator=calibrator)

    def f(w, x):
        return x @ w

    _, plan = jaxq.observe(f, policy)(w, 0 * x)
    y, plan = jaxq.observe(f, plan, quantized=True)(w, x)
    np.testing.assert_allclose(y, x, rtol=1e-6)
    assert_range(plan.ranges[0][0], (0.0, 300.0), 2)


def test_ema_decays_by_less_than_one():
    for decay in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match="EMA"):
            jaxq.ema(decay)


# --- ranges of programs ----------------------------------------------------------------------------------------------


def whole(seed, *shape):
    """Return small whole numbers, whose float32 products are exact in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 3, shape, endpoint=True), jnp.float32)


def ends(arrays):
    """Return the hull of arrays and zero."""
    arrays = [as_64(x) for x in arrays]
    return min(0.0, *(x.min() for x in arrays)), max(0.0, *(x.max() for x in arrays))


def assert_range(r, pairs, count):
    """Assert that a range holds the given (lo, hi), one or one per layer."""
    lo, hi = zip(*pairs, strict=True) if isinstance(pairs, list) else pairs
    np.testing.assert_array_equal(r.lo, lo)
    np.testing.assert_array_equal(r.hi, hi)
    np.testing.assert_array_equal(r.count, np.full(np.shape(lo), count))
    assert all(np.asarray(leaf).dtype == np.float32 for leaf in jax.tree.leaves(r))


static = jaxq.w8a8(static=True)


def layer(h, w):
    return jnp.clip(h @ w, -9, 7)


def test_ranges_of_stacked_layers():
    """A scan over stacked weights has a range per layer, those of the loop written out."""
    params, x = {"w": whole(0, 4, 6, 6)}, whole(1, 5, 6)

    def scanned(params, x):
        return lax.scan(lambda h, w: (layer(h, w), None), x, params["w"])[0]

    inputs = [as_64(x)]
    for w in as_64(params["w"]):
        inputs.append(np.clip(inputs[-1] @ w, -9, 7))
    out, plan = jaxq.observe(scanned, static)(params, x)
    np.testing.assert_array_equal(out, inputs[-1])
    (name,) = plan.names
    assert_range(plan.range(name)[0], [ends([h]) for h in inputs[:-1]], 1)
    _, plan = jaxq.observe(scanned, plan)(params, 2 * x)
    assert (plan.range(name)[0].count == 2).all() and plan.range(name)[0].hi[0] == 2 * ends([x])[1]


def test_ranges_of_shared_weights_over_time():
    """A weight shared over time has one range, over all steps; so has one in a loop that counts."""
    params, xs = {"h": whole(0, 4, 4), "x": whole(1, 3, 4)}, whole(2, 7, 2, 3)

    def cell(params, h, x):
        return jnp.clip(h @ params["h"] + x @ params["x"], -5, 6)

    def scanned(params, xs):
        return lax.scan(lambda h, x: (cell(params, h, x), None), jnp.zeros((2, 4)), xs)[0]

    def counted(params, xs):
        return lax.fori_loop(0, 7, lambda i, h: cell(params, h, xs[i]), jnp.zeros((2, 4)))

    states = [np.zeros((2, 4))]
    for x in as_64(xs):
        states.append(np.clip(states[-1] @ as_64(params["h"]) + x @ as_64(params["x"]), -5, 6))
    for f in (scanned, counted):
        out, plan = jaxq.observe(f, static)(params, xs)
        np.testing.assert_array_equal(out, states[-1])
        assert_range(plan.range("h")[0], ends(states[:-1]), 1)
        assert_range(plan.range("x")[0], ends([xs]), 1)


def test_ranges_of_layers_under_microbatches():
    """Layers inside, microbatches outside: a range per layer, over all microbatches."""
    params, xs = {"w": whole(0, 3, 4, 4)}, whole(1, 5, 2, 4)

    def f(params, xs):
        def one(x):
            return lax.scan(lambda h, w: (layer(h, w), None), x, params["w"])[0]

        return lax.scan(lambda carry, x: (carry, one(x)), 0, xs)[1]

    inputs = [as_64(xs)]
    for w in as_64(params["w"]):
        inputs.append(np.clip(inputs[-1] @ w, -9, 7))
    _, plan = jaxq.observe(f, static)(params, xs)
    assert_range(plan.range(plan.names[0])[0], [ends([h]) for h in inputs[:-1]], 1)


def test_ranges_of_branches_and_of_products_of_activations():
    """An untaken branch tells nothing; both operands of a weightless product are observed."""
    params, x = {"a": whole(0, 4, 4), "b": whole(1, 4, 4)}, whole(2, 3, 4)

    def f(params, x):
        y = lax.cond(x[0, 0] > 100, lambda x: x @ params["a"], lambda x: 2 * x @ params["b"], x)
        return y @ x.T

    plan = jaxq.make_plan(f, static)(params, x)
    _, plan = jaxq.observe(f, plan)(params, x)
    assert_range(plan.range("a")[0], (0.0, 0.0), 0)
    assert_range(plan.range("b")[0], ends([2 * x]), 1)
    left, right = plan.ranges[-1]
    assert_range(left, ends([2 * as_64(x) @ as_64(params["b"])]), 1)
    assert_range(right, ends([x]), 1)


def test_calibration_is_a_loop():
    """Min-max: the hull of the batches in any order. Moving average: the loop in the order of the batches."""
    params = {"w": whole(0, 4, 4)}
    batches = [whole(n, 3, 4) * (n + 1) for n in range(5)]

    def f(params, x):
        return x @ params["w"]

    for order in (batches, batches[::-1]):
        plan = jaxq.calibrate(f, static, progress=False)(params, order)
        assert_range(plan.range("w")[0], ends(batches), 5)
    plan = jaxq.calibrate(f, jaxq.w8a8(static=True, calibrator=jaxq.ema(0.75)), progress=False)(params, batches)
    lo, hi = ends(batches[:1])
    for x in batches[1:]:
        lo, hi = 0.75 * lo + 0.25 * ends([x])[0], 0.75 * hi + 0.25 * ends([x])[1]
    np.testing.assert_allclose([plan.range("w")[0].lo, plan.range("w")[0].hi], [lo, hi], rtol=1e-6)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0x7FC000C5])
def test_nan_of_every_kind_has_the_code_of_zero(bits):
    nan = jnp.asarray([bits], jnp.uint32).view(jnp.float32)
    for quantizer, zero in (
        (jaxq.int4(), None),
        (jaxq.int8(), None),
        (jaxq.uint8(), 133),
        (jaxq.int8(symmetric=False), -5),
    ):
        zero = None if zero is None else jnp.asarray([zero], quantizer.format.storage)
        code = encode(quantizer, nan, Affine(jnp.float32([0.1]), zero))
        np.testing.assert_array_equal(code, [0] if zero is None else zero)


def test_bits_of_a_code_are_computed_not_cut_out():
    """What stands beside a code in the sum is even, for ties, and not zero in the byte that is stored."""
    beside = int(affine.BESIDE.view(np.int32))
    assert beside % 2 == 0 and beside % 256 != 0 and affine.BESIDE == 2**23 + 2**22 + 128


@pytest.mark.parametrize("shape", [(64, 3), (128, 5, 7), (3, 3, 80, 33), (96, 1), (64, 2, 64), (65, 4)])
def test_ranges_of_thinned_weights_are_exact(shape):
    """Over leading axes, in pieces; NaN and infinity anywhere are seen."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    grid = (1,) * (len(shape) - 1) + shape[-1:]
    raw_scale = jax.jit(lambda x: affine.raw_scale(jaxq.int8(), x, grid))
    np.testing.assert_array_equal(-raw_scale(x), np.abs(x).max(tuple(range(len(shape) - 1)), keepdims=True))
    for bad in (np.nan, np.inf, -np.inf):
        hit = x.copy()
        hit[(*(n // 2 for n in shape[:-1]), 0)] = bad
        assert np.isneginf(np.ravel(raw_scale(hit))).tolist() == [n == 0 for n in range(shape[-1])]
