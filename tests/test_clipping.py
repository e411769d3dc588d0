"""Histograms against exact counts, clipping rules against brute force, published tables and NumPy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from jaxq.numbers import clipping, histogram
from jaxq.numbers.histogram import BINS, HALF

pytestmark = pytest.mark.shared

SETTINGS = settings(deadline=None, derandomize=True, database=None, max_examples=40)
GAUSS, LAPLACE = stats.norm(), stats.laplace(scale=0.5**0.5)

# Clip points of OCTAV by bits, over sigma, and over sigma / sqrt(2) for Laplace.
OCTAV_GAUSS = [1.7388, 2.1611, 2.5621, 2.9371, 3.2872, 3.6152, 3.9241]
OCTAV_LAPLACE = [2.874, 3.913, 5.034, 6.207, 7.414, 8.646, 9.897]
# Steps of least error by bits b: codes [-2^(b-1), 2^(b-1) - 1], or [1 - 2^(b-1), 2^(b-1) - 1] where narrow.
TABLES = [
    (GAUSS, False, {2: 1.048385, 3: 0.601824, 4: 0.338608, 5: 0.188792, 6: 0.104179}),
    (GAUSS, True, {2: 1.224006, 3: 0.650770, 4: 0.353411, 5: 0.193249, 6: 0.105488}),
    (LAPLACE, False, {4: 0.467647}),
    (LAPLACE, True, {2: 1.414214, 3: 0.821753, 4: 0.486885}),
]
# And of the half-Gaussian, codes [0, 2^b - 1].
HALF_GAUSS = {2: 0.650770, 3: 0.353411, 4: 0.193249, 5: 0.105488}

of = jax.jit(histogram.of)
merge = jax.jit(histogram.merge)
merge_axis = jax.jit(histogram.merge_axis)
percentile = jax.jit(clipping.percentile)
# The bounds are traced, so that all bit widths compile once.
histogram_step = jax.jit(lambda h, low, high: clipping.mse(h, low, high, True)[1] / high)
mse_scale = jax.jit(lambda x, low, high: clipping.mse_scale(x, low, high))
mse_affine = jax.jit(lambda x, low, high: clipping.mse_affine(x, low, high))
histogram_affine = jax.jit(lambda h, low, high: clipping.mse(h, low, high, False))


@functools.cache
def million(dist) -> np.ndarray:
    """Return 10^6 values in random order, one from each of as many equally likely intervals."""
    rng = np.random.default_rng(0)
    return dist.ppf((rng.permutation(10**6) + rng.random(10**6)) / 10**6).astype(np.float32)


def codes(bits: int, narrow: bool) -> tuple[np.float32, np.float32]:
    top = 2 ** (bits - 1) - 1
    return np.float32(-top if narrow else -top - 1), np.float32(top)


def reference(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Count in float64, where the division by a power of two is exact; exponents from `frexp`."""
    x = np.asarray(x, np.float64).reshape(-1)
    mantissa, exponent = np.frexp(np.abs(x).max(initial=0))
    exponent = max(int(exponent) - int(mantissa == 0.5), -100) if mantissa else -100
    at = x * 2.0 ** (11 - exponent)
    j = np.where(at < 0, np.floor(at), np.maximum(np.ceil(at) - 1, 0)).astype(int)
    return np.bincount(j + HALF, minlength=BINS), exponent


class BruteForce:
    """The squared error of rounding to `scale * code`, in float64, fast by sums over sorted values."""

    def __init__(self, x: np.ndarray):
        self.x = np.sort(x.astype(np.float64))
        self.sums = np.concatenate([[0], np.cumsum(self.x)])
        self.squares = (self.x**2).sum()

    def error(self, scale: float, low: float, high: float) -> float:
        c = np.arange(low, high + 1)
        at = np.concatenate([[0], np.searchsorted(self.x, scale * (c[1:] - 0.5)), [self.x.size]])
        return self.squares - 2 * scale * (c * np.diff(self.sums[at])).sum() + scale**2 * (c**2 * np.diff(at)).sum()

    def least(self, low: float, high: float) -> float:
        scale = np.abs(self.x).max() / high
        for row in (2.0 ** -np.arange(0, 9, 1 / 32), 2 ** (np.arange(-32, 33) / 1024)):
            scale = min(scale * row, key=lambda s: self.error(s, low, high))
        return self.error(scale, low, high)


def squared_error(x, scale, zero, low, high) -> np.ndarray:
    x, scale, zero = np.float64(x), np.float64(scale)[..., None], np.float64(zero)[..., None]
    return ((x - scale * (np.clip(np.round(x / scale) + zero, low, high) - zero)) ** 2).sum(-1)


EXPONENTS = st.sampled_from([-120, -101, -100, -20, -3, -2, -1, 0, 1, 2, 11, 12, 60, 127])
VALUES = st.builds(lambda m, e: np.float32(m * 2.0 ** (e - 10)), st.integers(-1024, 1024), EXPONENTS)
ARRAYS = st.lists(VALUES, max_size=4).map(lambda v: np.array(v, np.float32))


@SETTINGS
@given(ARRAYS)
def test_counts_are_exact(x):
    counts, exponent = reference(x)
    h = of(x)
    assert h.exponent == exponent and h.exponent.dtype == h.counts.dtype == jnp.float32
    np.testing.assert_array_equal(h.counts, counts)


@SETTINGS
@given(st.lists(ARRAYS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_parts_in_any_order_are_the_whole(parts, random):
    whole = of(np.concatenate(parts))
    stack = jax.tree.map(lambda *h: np.stack(h), *map(of, parts))
    hs = [of(part) for part in parts] + [histogram.empty()]
    while len(hs) > 1:
        random.shuffle(hs)
        hs.append(merge(hs.pop(), hs.pop()))
    for h in (hs[0], merge_axis(stack)):
        jax.tree.map(np.testing.assert_array_equal, h, whole)


def test_histogram_of_many_values_and_of_stacks():
    x = million(LAPLACE)
    np.testing.assert_array_equal(of(x).counts, reference(x)[0])
    blocks = (x * np.repeat(np.float32([1, 1e-3, 1e3, 0]), 250_000)).reshape(2, 2, -1)
    stack = jax.vmap(jax.vmap(histogram.of))(blocks)
    assert stack.counts.shape == (2, 2, BINS) and stack.exponent.shape == (2, 2)
    jax.tree.map(np.testing.assert_array_equal, merge_axis(merge_axis(stack)), of(blocks))
    half = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(of(half).counts, reference(half)[0])


def test_the_empty_histogram_and_what_is_not_finite():
    jax.tree.map(np.testing.assert_array_equal, of(jnp.zeros((0, 3))), histogram.empty())
    assert histogram.empty((2, 3)).counts.shape == (2, 3, BINS)
    for bad in (np.nan, np.inf, -np.inf):
        h = histogram.merge(histogram.of(jnp.array([1.0, bad])), histogram.of(jnp.array([3e38])))
        assert h.exponent == histogram.NOT_FINITE
        assert [float(end) for end in percentile(h, 99)] == [-np.inf, np.inf]


@pytest.mark.parametrize("dist", [GAUSS, LAPLACE], ids=["gauss", "laplace"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_is_within_three_thousandths_of_brute_force(dist, bits):
    x = million(dist) if bits in (2, 8) else million(dist)[::5]
    h, brute = of(x), BruteForce(x)
    for narrow in (False, True):
        low, high = codes(bits, narrow)
        most = 1.003 * brute.least(low, high)
        assert brute.error(float(histogram_step(h, low, high)), low, high) <= most
        assert brute.error(float(mse_scale(x[None], low, high)[0]), low, high) <= most


def test_steps_are_those_of_the_tables():
    u = (np.arange(10**5) + 0.5) / 10**5
    for dist, narrow, table in TABLES:
        x = dist.ppf(u).astype(np.float32)
        for bits, step in table.items():
            assert histogram_step(of(x), *codes(bits, narrow)) == pytest.approx(step, rel=0.01)
            assert mse_scale(x[None], *codes(bits, narrow))[0] == pytest.approx(step, rel=0.01)
    x = np.abs(GAUSS.ppf(u)).astype(np.float32)
    for bits, step in HALF_GAUSS.items():
        low, high = np.float32(-(2 ** (bits - 1))), np.float32(2 ** (bits - 1) - 1)
        assert histogram_step(of(x), np.float32(0), high - low) == pytest.approx(step, rel=0.01)
        scale, zero = mse_affine(x[None], low, high)
        assert squared_error(x[None], scale, zero, low, high) <= 1.003 * squared_error(x, step, low, low, high)


@pytest.mark.parametrize("bits", [2, 4])
def test_affine_mse_is_near_brute_force(bits):
    rng = np.random.default_rng(0)
    x = np.stack([GAUSS.ppf(rng.random(2000)), rng.gamma(2, 1, 2000) - 1, rng.standard_t(3, 2000)]).astype(np.float32)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    width = (x.max(1) - x.min(1)) / (high - low)
    trials = [(width * f, np.full(3, z)) for f in 2.0 ** -np.arange(0, 4, 1 / 24) for z in range(low, high + 1)]
    least = np.min([squared_error(x, scale, zero, low, high) for scale, zero in trials], 0)
    scale, zero = mse_affine(x, np.float32(low), np.float32(high))
    assert zero.dtype == jnp.int32 and (squared_error(x, scale, zero, low, high) <= 1.01 * least).all()
    lo, hi = map(np.float64, histogram_affine(jax.vmap(histogram.of)(x), np.float32(low), np.float32(high)))
    scale = (hi - lo) / (high - low)
    zero = np.round(low - lo / scale)
    np.testing.assert_allclose(scale * (low - zero), lo, atol=1e-5)
    assert (squared_error(x, scale, zero, low, high) <= 1.01 * least).all()


def least_of_few(x, low, high) -> float:
    """Return the least error that any scale leaves of one block, exactly: one candidate for every way to round.

    As the scale falls, |x| goes from code c - 1 to c at |x| / (c - 1/2); codes n are best served by sum xn / sum nn.
    """
    at, products, squares = [], [], []
    for size, count in ((abs(v), int(high if v > 0 else -low)) for v in x if v):
        c = np.arange(1, count + 1)
        at, products, squares = [*at, *(size / (c - 0.5))], [*products, *(c * 0 + size)], [*squares, *(2 * c - 1)]
    order = np.argsort(at)[::-1]
    a, b = np.cumsum(np.array(products)[order]), np.cumsum(np.array(squares)[order])
    best = np.argsort(a * a / b)[-50:]
    return min(squared_error(x, s, 0, low, high) for s in (a / b)[best])


def least_affine_of_few(x, low, high) -> np.ndarray:
    """Return the least error of [blocks, n] for zero points next to those that clip one end or neither."""
    lo, hi, least = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0), np.inf
    for factor in 2 ** np.arange(-0.06, 1, 1 / 2000):
        s = (hi - lo) / (high - low) * factor
        first, last = low - np.round(lo / s), high - np.round(hi / s)
        for zero in (np.clip(z, low, high) for z in (first, last, np.round((first + last) / 2))):
            n = np.clip(np.round(x / s[:, None]), (low - zero)[:, None], (high - zero)[:, None])
            least = np.minimum(least, ((x - ((x * n).sum(1) / (n * n).sum(1))[:, None] * n) ** 2).sum(1))
    return least


@pytest.mark.parametrize("n", [4, 8, 32, 49, 100])
def test_small_blocks_are_within_three_thousandths_of_the_least_error(n):
    x = np.random.default_rng(n).standard_normal((16, n)).astype(np.float32)
    for low, high in np.float32([(-127, 127), (-128, 127), (-7, 7), (-2, 1)]):
        error = squared_error(x, mse_scale(x, low, high), np.zeros(16), low, high)
        least = np.array([least_of_few(np.float64(row), low, high) for row in x])
        assert (error <= 1.003 * least + 1e-12 * (x**2).sum(1)).all()


@pytest.mark.parametrize("n", [8, 32])
def test_small_affine_blocks_are_within_three_thousandths_of_the_least_error(n):
    x = (np.random.default_rng(n).standard_normal((16, n)) + 0.5).astype(np.float32)
    for low, high in [(-128, 127), (0, 255)]:
        scale, zero = clipping.mse_affine(x, low, high)
        assert (zero >= low).all() and (zero <= high).all()
        least = least_affine_of_few(np.float64(x), low, high)
        assert (squared_error(x, scale, zero, low, high) <= 1.003 * least + 1e-12 * (x**2).sum(1)).all()


def test_mse_scale_of_small_blocks_of_outliers_and_of_codes():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 32)).astype(np.float32)
    fractions = np.linspace(0.02, 2, 2000)[:, None] * np.abs(x).max(1) / 7
    least = np.min([squared_error(x, scale, np.zeros(64), -7, 7) for scale in fractions], 0)
    scale = mse_scale(x, np.float32(-7), np.float32(7))
    assert (squared_error(x, scale, np.zeros(64), -7, 7) <= 1.003 * least).all()
    for factor in np.float32([2.0**-90, 2.0**100]):  # nothing under- or overflows, nor rounds otherwise
        np.testing.assert_array_equal(mse_scale(x * factor, np.float32(-7), np.float32(7)), scale * factor)
    outlier = np.concatenate([million(GAUSS)[:50_000], np.float32([60])])
    for high in np.float32([1, 7, 127]):
        most = 1.003 * BruteForce(outlier).least(-high, high)
        assert BruteForce(outlier).error(float(mse_scale(outlier[None], -high, high)[0]), -high, high) <= most
    # What is on a grid stays there, whether it uses the last code or not.
    grid = (0.013 * rng.integers(-90, 101, (4, 500))).astype(np.float32)
    scale = mse_scale(grid, np.float32(-127), np.float32(127))
    assert np.abs(np.round(grid / np.asarray(scale)[:, None]) * 0.013 - grid).max() < 1e-6


def test_degenerate_blocks():
    x = np.float32([[0, 0, 0], [np.nan, 1, 2], [np.inf, 1, 2], [0, -1, -2]])
    low, high = np.float32([-8, 7])
    for scale in (mse_scale(x, low, high), mse_affine(x, low, high)[0], clipping.twn(x)[1]):
        assert scale[0] == 1 and np.isnan(scale[1:3]).all() and 0 < scale[3] <= 2
    assert mse_scale(x, low * 0, high)[3] == 1  # no code below zero: nothing to choose
    assert squared_error(x[3], *(a[3] for a in mse_affine(x, low * 0, high)), 0, 7) < 1e-3


def test_mse_scale_needs_no_memory_per_candidate():
    abstract = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((100, 10_000), (), ()))
    used = mse_scale.lower(*abstract).compile().memory_analysis()
    assert used.temp_size_in_bytes < 4 * 4 * 10**6


@pytest.mark.parametrize("dist, table", [(GAUSS, OCTAV_GAUSS), (LAPLACE, np.array(OCTAV_LAPLACE) * 0.5**0.5)])
def test_octav_finds_the_published_fixed_points(dist, table):
    x = dist.ppf((np.arange(10**6) + 0.5) / 10**6).astype(np.float32)
    for bits, s in zip(range(2, 9), table, strict=True):
        lo, hi = clipping.octav(of(x), bits)
        assert hi == pytest.approx(s, rel=0.005) and lo == -hi
    # Without a sign there is one bit more to tell magnitudes, and zeros do not count.
    rectified = np.concatenate([np.maximum(x, 0), np.zeros(10**6, np.float32)])
    lo, hi = clipping.octav(of(rectified), 4, signed=False)
    assert hi == pytest.approx(table[3], rel=0.005) and lo == 0


@pytest.mark.parametrize("p", [0, 50, 99, 99.99, 99.999, 100])
def test_percentile_is_within_a_bin_of_numpy(p):
    for x in (million(GAUSS), np.maximum(million(LAPLACE), -0.2) + 0.1, np.float32([-3, -1, 0.5, 7])):
        h = of(x)
        lo, hi = np.percentile(x.astype(np.float64), [50 - p / 2, 50 + p / 2])
        expected = min(lo, 0), max(hi, 0)
        np.testing.assert_allclose(percentile(h, p), expected, rtol=0, atol=float(histogram.width(h)))


def test_sigmas_are_those_of_the_values():
    x = million(GAUSS) * np.float32(0.5) + np.float32(0.25)
    expected = x.mean(dtype=np.float64) + np.array([-3, 3]) * x.std(dtype=np.float64)
    np.testing.assert_allclose(clipping.sigmas(of(x), 3), expected, rtol=2e-3)
    np.testing.assert_allclose(clipping.sigmas(of(np.abs(x)), 100), [0, np.abs(x).max()], atol=2e-3)


def divergences(bins: np.ndarray, levels: int) -> np.ndarray:
    """Follow `_compute_amax_entropy` of pytorch-quantization, in float64: KL by number of bins kept, from `levels`."""
    out = []
    for i in range(levels, len(bins) + 1):
        group, filled = np.arange(i) * levels // i, bins[:i] > 0
        mean = np.bincount(group, bins[:i], levels) / np.maximum(np.bincount(group, filled, levels), 1)
        p, q = bins[:i].astype(np.float64), np.where(filled, mean[group], 0)
        p[-1] += bins[i:].sum()
        out.append(special.rel_entr(p / p.sum(), q / q.sum()).sum() if filled.any() else np.inf)
    return np.array(out)


@pytest.mark.parametrize("levels, outliers", [(32, True), (128, False)])
def test_entropy_follows_tensorrt(levels, outliers):
    rng = np.random.default_rng(3)
    far = np.concatenate([million(GAUSS)[:200_000], rng.uniform(20, 40, 20)])
    x = np.float32(far if outliers else rng.uniform(-1, 1, 200_000))
    h = of(x)
    top, step = np.abs(x).max(), float(histogram.width(h))
    magnitudes = np.bincount(np.ceil(np.abs(x) / step).astype(int) - 1, minlength=HALF)
    expected = divergences(magnitudes, levels)[: int(np.ceil(top / step)) - levels + 1]
    lo, hi = map(float, clipping.entropy(h, levels))
    assert expected[round(max(-lo, hi) / step) - levels] <= expected.min() * 1.001 + 1e-6
    assert lo == -hi and (hi < 0.25 * top if outliers else hi > 0.98)


def test_ternary_weights_have_the_published_errors():
    x = million(GAUSS).reshape(2, -1)
    threshold, scale = map(np.asarray, clipping.twn(x))
    np.testing.assert_allclose(threshold, 0.7 * np.abs(x).mean(1, dtype=np.float64), rtol=1e-5)
    ternary = np.where(np.abs(x) > threshold[:, None], np.sign(x) * scale[:, None], 0)
    np.testing.assert_allclose(((x - ternary) ** 2).mean(), 0.1917, rtol=2e-3)
    error = squared_error(x, clipping.mean_abs(x), np.zeros(2), -1, 1).sum() / x.size
    np.testing.assert_allclose(error, 0.2635, rtol=2e-3)


RULES = {
    "percentile": lambda h: clipping.percentile(h, 99.9),
    "sigmas": lambda h: clipping.sigmas(h, 4.0),
    "mse": lambda h: clipping.mse(h, -7, 7, True),
    "affine": lambda h: clipping.mse(h, -8, 7, False),
    "octav": lambda h: clipping.octav(h, 4),
    "entropy": lambda h: clipping.entropy(h, 128),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_take_stacks_any_scale_and_nothing(rule):
    rule = jax.jit(rule)
    with jax.numpy_dtype_promotion("strict"):
        x = million(LAPLACE)[:10_000] * np.float32([[1], [2.0**-60], [2.0**120], [0]])
        stack = jax.tree.map(lambda h, e: np.concatenate([h, e]), jax.vmap(histogram.of)(x), histogram.empty((1,)))
        lo, hi = map(np.float64, rule(stack))
        np.testing.assert_allclose([lo[0], hi[0]], rule(of(x[0])), rtol=1e-2)
        for end in (lo, hi):
            np.testing.assert_array_equal(end[:3], end[0] * np.array([1, 2.0**-60, 2.0**120]))
        assert lo[0] < 0 < hi[0] and lo[3:].tolist() == hi[3:].tolist() == [0, 0]
