"""Clustering: optima against all partitions in exact fractions, and against published quantizers of known densities."""

import itertools
import warnings
from fractions import Fraction

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import special, stats

import jaxq
from jaxq.numbers import clustering, lloyd

pytestmark = pytest.mark.shared

SETTINGS = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=300)

# Max 1960, to more digits: the mean squared error of the best quantizer of 1, 2, 3, 4 bits.
GAUSS = {2: 0.36338023, 4: 0.11748185, 8: 0.034547761, 16: 0.009501008}
LAPLACE = {2: 0.5, 4: 0.17619488, 8: 0.054475988, 16: 0.015372527}
SHARES = (np.arange(200_000) + 0.5) / 200_000
QUANTILES = special.ndtri(SHARES)


def cost(values, centroids, weights=1.0):
    distance = np.subtract.outer(np.asarray(values, np.float64), np.asarray(centroids, np.float64))
    return float(np.sum(weights * np.min(distance**2, axis=-1)))


def every_partition(values, weights, k):
    """The centroids of the cheapest of all partitions into k intervals, the smallest of several, in fractions."""
    pairs = sorted((Fraction(v), Fraction(w)) for v, w in zip(values, weights, strict=True) if w)
    points = [(v, sum(w for u, w in pairs if u == v)) for v in sorted({v for v, _ in pairs})]
    k = min(k, len(points))
    best = None
    for inner in itertools.combinations(range(1, len(points)), k - 1):
        clusters = [points[a:b] for a, b in itertools.pairwise((0, *inner, len(points)))]
        means = [sum(v * w for v, w in c) / sum(w for _, w in c) for c in clusters]
        total = sum(w * (v - m) ** 2 for c, m in zip(clusters, means, strict=True) for v, w in c)
        best = min(best, (total, means)) if best else (total, means)
    return best


def every_boundary(values, weights, k):
    """The cheapest cost of k clusters of sorted values, by the plain recursion over all pairs of boundaries."""
    n = len(values)
    total, first, second = (np.append(0, np.cumsum(weights * values**p)) for p in (0, 1, 2))
    start, stop = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    mass = np.where(start < stop, total[stop] - total[start], 1)
    costs = second[stop] - second[start] - (first[stop] - first[start]) ** 2 / mass
    costs = np.where(start < stop, costs, np.inf)
    left = costs[0]
    for _ in range(k - 1):
        left = np.min(left[:, None] + costs, axis=0)
    return left[n]


small = st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 3)), min_size=1, max_size=9)


@SETTINGS
@hypothesis.given(small, st.integers(1, 5), st.sampled_from([1.0, 0.25, 1e6, 1e-300, 1e300]))
def test_optimal_is_the_smallest_optimum_of_all_partitions(pairs, k, unit):
    values, weights = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs])
    hypothesis.assume(weights.any())
    _, expected = every_partition(values.tolist(), weights.tolist(), k)
    np.testing.assert_allclose(
        clustering.optimal(values * unit, k, weights), np.array(expected, float) * unit, rtol=1e-14, atol=1e-15 * unit
    )


@SETTINGS
@hypothesis.given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9),
    st.lists(st.floats(1e-3, 10), min_size=9, max_size=9),
    st.integers(1, 5),
)
def test_optimal_of_floats_costs_as_little_as_any_partition(values, weights, k):
    weights = weights[: len(values)]
    best, _ = every_partition(values, weights, k)
    found = cost(values, clustering.optimal(values, k, weights), np.array(weights))
    assert found <= float(best) + 1e-12 * sum(w * v * v for v, w in zip(values, weights, strict=True))


DATA = {
    "gauss": lambda r: r.standard_normal(400),
    "heavy": lambda r: r.standard_t(1.2, 400),
    "blobs": lambda r: r.integers(0, 9, 400) + 0.01 * r.standard_normal(400),
    "grid": lambda r: r.integers(0, 150, 400),
    "far": lambda r: 1e6 + r.random(400),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("weighted", [False, True])
def test_coarse_to_fine_drops_no_optimum(name, weighted, monkeypatch):
    monkeypatch.setattr(clustering, "BLOCKS", 12)
    monkeypatch.setattr(clustering, "PARTS", 3)
    random = np.random.default_rng(7)
    values = np.sort(DATA[name](random).astype(np.float64))
    weights = random.random(400) ** 3 if weighted else np.ones(400)
    centred = values - values.mean()
    for k in (2, 5, 8, 20):
        found = clustering.optimal(values, k, weights)
        assert len(found) == k and np.all(np.diff(found) > 0)
        best = every_boundary(centred, weights, k)
        np.testing.assert_allclose(cost(values, found, weights), best, rtol=1e-9)


def test_equal_optima_among_many_give_the_lowest_centroids():
    # Evenly spaced values: sizes differ by one at most, in any order; the small clusters come first.
    found = clustering.optimal(np.arange(100_000) * 3, 7)
    sizes = [100_000 // 7] * 2 + [100_000 // 7 + 1] * 5
    assert sum(sizes) == 100_000
    ends = np.cumsum([0, *sizes])
    np.testing.assert_array_equal(found, 3 * (ends[:-1] + ends[1:] - 1) / 2)


def test_a_hundred_thousand_values_meet_both_conditions_of_lloyd():
    # A sample of a log-concave density; every sum in float64.
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32).astype(np.float64)
    found = clustering.optimal(values, 16)
    index = np.searchsorted((found[:-1] + found[1:]) / 2, values)
    means = np.bincount(index, values) / np.bincount(index)
    np.testing.assert_allclose(found, means, rtol=0, atol=1e-12)
    for seed in range(20):
        start = np.sort(np.random.default_rng(seed).choice(values, (1, 16), replace=False)).astype(np.float32)
        other = lloyd.lloyd(jnp.asarray(values[None], jnp.float32), jnp.asarray(start))
        assert cost(values, other[0]) >= cost(values, found) * (1 - 1e-9)


@pytest.mark.parametrize("k", GAUSS)
@pytest.mark.parametrize("best", [GAUSS, LAPLACE], ids=["gauss", "laplace"])
def test_known_densities_reach_the_published_optimum(k, best):
    values = QUANTILES if best is GAUSS else stats.laplace.ppf(SHARES) / np.sqrt(2)
    exact = cost(values, clustering.optimal(values, k)) / len(values)
    # What the quantiles leave out of a Laplace density's tails is 0.2 %.
    assert 0.998 * best[k] < exact < 1.001 * best[k]


@pytest.mark.parametrize("k", GAUSS)
def test_fit_reaches_the_published_optimum(k):
    fitted = cost(QUANTILES, lloyd.fit(jnp.asarray(QUANTILES[None], jnp.float32), k)[0]) / len(QUANTILES)
    exact = cost(QUANTILES, clustering.optimal(QUANTILES, k)) / len(QUANTILES)
    assert exact * (1 - 1e-9) <= fitted < 1.001 * GAUSS[k]


def test_scikit_learn_is_never_better():
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(6):
        random = np.random.default_rng(seed)
        values, weights = random.standard_normal(300) * random.integers(1, 4, 300), random.random(300)
        k = int(random.integers(2, 12))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = cluster.KMeans(k, n_init=5, random_state=seed).fit(values[:, None], sample_weight=weights)
        theirs = cost(values, peer.cluster_centers_[:, 0], weights)
        ours = cost(values, clustering.optimal(values, k, weights), weights)
        assert 0.7 * theirs < ours <= theirs * (1 + 1e-12)


@pytest.mark.parametrize(
    ("data", "k", "centroids", "quantized"),
    [
        ([1, 3, 5, 7, 9], 2, [2, 7], [2, 2, 7, 7, 7]),
        (range(10, 100, 10), 3, [20, 50, 80], [20] * 3 + [50] * 3 + [80] * 3),
        ([-10, -5, 0, 5, 10], 2, [-7.5, 5], [-7.5, -7.5, 5, 5, 5]),
        ([[2.5, 2.5], [7.0, 2.5]], 5, [2.5, 7.0], [[2.5, 2.5], [7.0, 2.5]]),
        (4, 3, [4], 4),
        ([], 3, [], []),
    ],
)
def test_k_means_quantize_examples(data, k, centroids, quantized):
    values, found = jaxq.k_means_quantize(list(data) if isinstance(data, range) else data, k)
    assert isinstance(values, jax.Array) and values.dtype == found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.array(centroids, np.float32))
    np.testing.assert_array_equal(values, np.array(quantized, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, np.int32, np.float64])
def test_k_means_quantize_gives_every_value_the_nearest_centroid(dtype):
    data = (np.random.default_rng(1).standard_normal((4, 5, 30)) * 100).astype(dtype)
    values, centroids = jaxq.k_means_quantize(jnp.asarray(data) if dtype is not np.float64 else data, 9)
    expected = np.dtype(dtype) if dtype in (jnp.bfloat16, jnp.float16) else np.float32
    assert values.shape == data.shape and values.dtype == centroids.dtype == expected
    given, held = data.astype(np.float64), np.asarray(centroids, np.float64)
    nearest = held[np.argmin(np.abs(given[..., None] - held), axis=-1)]
    np.testing.assert_array_equal(np.asarray(values, np.float64), nearest)
    best = cost(given.ravel(), clustering.optimal(given, 9))
    assert best * (1 - 1e-9) <= cost(given.ravel(), held) <= best * (1.001 if expected == np.float32 else 1.1)


@pytest.mark.parametrize(
    ("data", "k", "error", "words"),
    [
        ([1.0, np.nan], 2, ValueError, "NaN"),
        (np.array([1.0, -np.inf]), 2, ValueError, "infinity"),
        ([1e39, 1.0], 1, ValueError, "float32"),
        ([1.0, 2.0], 0, ValueError, "at least 1"),
        ([1.0, 2.0], 2.0, ValueError, "use 16"),
        ([1.0, 2.0], True, ValueError, "integer"),
        ([1.0, 2j], 2, TypeError, "complex"),
        (["a", "b"], 2, TypeError, "real numbers"),
        ([None], 2, TypeError, "real numbers"),
        ([True, False], 2, TypeError, "bool"),
    ],
)
def test_bad_data_is_refused(data, k, error, words):
    with pytest.raises(error, match=words):
        jaxq.k_means_quantize(data, k)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, np.nan]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        clustering.optimal([1.0, 2.0], 1, weights)


def blocks_of(seed, shape=(3, 500)):
    random = np.random.default_rng(seed)
    return random.standard_normal(shape).astype(np.float32), random.random(shape).astype(np.float32)


def lloyd_step(values, centroids, weights):
    """One step for one block in float64."""
    values, centroids = values.astype(np.float64), centroids.astype(np.float64)
    index = np.argmin(np.abs(values[:, None] - centroids), axis=1)
    mass, total = (np.bincount(index, w, len(centroids)) for w in (weights, weights * values))
    return np.where(mass > 0, total / np.where(mass > 0, mass, 1), centroids)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_of_lloyd_is_a_step_of_lloyd(weighted):
    values, weights = blocks_of(3)
    weights = weights if weighted else np.ones_like(weights)
    # The last two are nearest to nothing, and stay.
    start = np.tile(np.array([-2, -0.5, 0.25, 0.75, 50, 60], np.float32), (3, 1))
    found = jax.jit(lloyd.lloyd, static_argnums=3)(values, start, weights if weighted else None, 1)
    expected = np.stack([lloyd_step(v, c, w) for v, c, w in zip(values, start, weights, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_array_equal(found[:, 4:], start[:, 4:])


def test_sums_of_many_values_are_as_good_as_float32():
    values = np.sort(np.random.default_rng(0).standard_normal((1, 2**20)) * 3 + 100).astype(np.float32)
    start = np.linspace(values.min(), values.max(), 64, dtype=np.float32)[None]
    found = lloyd.lloyd(values, start, iterations=1)
    index = np.searchsorted((start[0, :-1].astype(np.float64) + start[0, 1:]) / 2, values[0].astype(np.float64))
    count = np.bincount(index, minlength=64)
    expected = np.bincount(index, values[0].astype(np.float64), 64) / np.maximum(count, 1)
    expected = np.where(count > 0, expected, start[0])
    np.testing.assert_allclose(found[0], expected, rtol=2e-7)


def test_lloyd_is_never_better_than_the_optimum_and_finds_separated_clusters():
    for seed in range(6):
        values, weights = blocks_of(seed, (1, 300))
        for k in (2, 6):
            found = np.asarray(lloyd.fit(values, k, weights))[0]
            best = clustering.optimal(values, k, weights)
            assert np.all(np.diff(found) >= 0)
            assert cost(values[0], found, weights[0]) >= cost(values[0], best, weights[0]) * (1 - 1e-6)
        middle = 10 * np.random.default_rng(seed).permutation(np.repeat(np.arange(6), 50))[None]
        apart = (middle + 0.3 * values).astype(np.float32)
        for start in (lloyd.companding_init(apart, 6), lloyd.plus_plus_init(jax.random.key(seed), apart, 6)):
            np.testing.assert_allclose(lloyd.lloyd(apart, start)[0], clustering.optimal(apart, 6), rtol=1e-5, atol=1e-5)


def shapes(n):
    """Rows of n values, one for each kind of distribution: smooth, heavy-tailed, clustered, tied, sparse."""
    random = np.random.default_rng(n)
    rows = {
        "gauss": random.normal(size=n),
        "laplace": random.laplace(size=n),
        "uniform": random.uniform(size=n),
        "tails": random.standard_t(2, size=n),
        "clusters": 10 * random.normal(size=7)[random.integers(7, size=n)] + 0.3 * random.normal(size=n),
        "ties": np.round(10 * random.normal(size=n)) / 10,
        "sparse": random.normal(size=n) * (random.random(n) < 0.1),
        "logarithmic": np.exp(2 * random.normal(size=n)),
    }
    return np.stack(list(rows.values())).astype(np.float32)


@pytest.mark.parametrize(("n", "k", "allowed"), [(40, 3, 1e-5), (250, 16, 1e-5), (3000, 16, 1e-3)])
def test_fit_is_the_optimum_whatever_the_distribution(n, k, allowed):
    rows = shapes(n)
    for row, centroids in zip(rows, np.asarray(lloyd.fit(rows, k)), strict=True):
        best = cost(row, clustering.optimal(row, k))
        assert np.all(np.diff(centroids) >= 0)
        assert best * (1 - 1e-6) <= cost(row, centroids) <= best * (1 + allowed) + 1e-10


def test_fit_is_the_best_of_all_partitions_of_weighted_values():
    random = np.random.default_rng(0)
    values, weights = random.integers(-6, 7, (40, 9)), random.integers(0, 4, (40, 9))
    weights[:, 0] = 1
    found = np.asarray(lloyd.fit(values, 3, weights))
    for row, weight, centroids in zip(values, weights, found, strict=True):
        best = every_partition(row.tolist(), weight.tolist(), 3)[0]
        assert cost(row, centroids, weight) == pytest.approx(float(best), rel=1e-5, abs=1e-9)


def test_weights_count_values():
    values, _ = blocks_of(5, (2, 60))
    counts = np.random.default_rng(5).integers(1, 4, 60)
    counts = np.stack([counts, counts[::-1]])
    repeated = np.stack([np.repeat(v, c) for v, c in zip(values, counts, strict=True)])
    start = lloyd.linear_init(values, 5)
    weighted = lloyd.lloyd(values, start, counts.astype(np.float32))
    np.testing.assert_allclose(weighted, lloyd.lloyd(repeated, start), rtol=1e-6, atol=1e-6)
    same = lloyd.fit(values, 5, np.full_like(values, 0.5))
    np.testing.assert_allclose(same, lloyd.fit(values, 5), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(clustering.optimal(values, 5, np.full(120, 3)), clustering.optimal(values, 5))


@pytest.mark.parametrize("k", [1, 2, 5, 16, 17, 256])
def test_assign_is_the_nearest_centroid_and_the_lower_of_two(k):
    random = np.random.default_rng(k)
    # Small integers: every midpoint and distance is exact, and ties are many.
    values = random.integers(-200, 200, (3, 800)).astype(np.float32)
    centroids = np.sort([random.choice(400, k, replace=False) - 200 for _ in range(3)]).astype(np.float32)
    index = jax.jit(lloyd.assign)(values, centroids)
    assert index.dtype == jnp.uint8
    distance = np.abs(values[:, :, None] - centroids[:, None, :])
    np.testing.assert_array_equal(index, np.argmin(distance, axis=-1))
    with pytest.raises(ValueError, match="256"):
        lloyd.assign(values, np.zeros((3, 257), np.float32))


def test_fit_works_where_there_is_little_to_fit():
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(lloyd.fit(jnp.full((2, 5), 3.0), 4), np.full((2, 4), 3))
        np.testing.assert_array_equal(lloyd.fit(jnp.array([[7.0]]), 2, jnp.array([[2.0]])), [[7, 7]])
        assert lloyd.fit(jnp.zeros((2, 0)), 3).shape == (2, 3)
        values, weights = (jnp.asarray(x) for x in blocks_of(0))
        stacked = jax.vmap(lambda v, w: lloyd.fit(v[None], 4, w[None])[0])(values, weights.astype(jnp.bfloat16))
        np.testing.assert_allclose(stacked, lloyd.fit(values, 4, weights.astype(jnp.bfloat16)), rtol=1e-6)
        lloyd.dkm(values.astype(jnp.bfloat16), lloyd.linear_init(values, 3), 0.1, 2)


def test_initial_centroids():
    values, weights = blocks_of(2)
    linear = lloyd.linear_init(values, 5)
    np.testing.assert_allclose(linear, np.linspace(values.min(1), values.max(1), 5, axis=1), rtol=1e-6)
    # The cube root of the normal density is that of a normal of three times the variance.
    expected = special.ndtri((np.arange(16) + 0.5) / 16) * np.sqrt(3)
    found = lloyd.companding_init(jnp.asarray(QUANTILES[None], jnp.float32), 16)[0]
    np.testing.assert_allclose(found, expected, rtol=0.03)
    masked = np.where(values > 0, weights, 0)
    for seed in range(5):
        drawn = np.asarray(lloyd.plus_plus_init(jax.random.key(seed), values, 8, masked))
        assert all(np.all(np.isin(d, v[v > 0])) and len(set(d)) == 8 for d, v in zip(drawn, values, strict=True))


def soft(values, centroids, temperature, iterations):
    """Differentiable k-means of one block in float64."""

    def attention():
        logits = -(np.subtract.outer(values, centroids) ** 2) / temperature
        a = np.exp(logits - logits.max(1, keepdims=True))
        return a / a.sum(1, keepdims=True)

    for _ in range(iterations):
        a = attention()
        centroids = a.T @ values / a.sum(0)
    return attention() @ centroids, centroids


def test_dkm_and_its_gradient_follow_the_equations():
    values, direction = blocks_of(4, (2, 40))
    start, pull = lloyd.linear_init(values, 3), np.random.default_rng(0).standard_normal((2, 40))

    def numpy_loss(v):
        return sum(np.sum(p * soft(x, c, 0.3, 4)[0]) for p, x, c in zip(pull, v, np.asarray(start, float), strict=True))

    def loss(v):
        return jnp.sum(jnp.asarray(pull, jnp.float32) * lloyd.dkm(v, start, 0.3, 4)[0])

    found = lloyd.dkm(values, start, 0.3, 4)
    for b in range(2):
        for one, two in zip(found, soft(values[b].astype(float), np.asarray(start[b], float), 0.3, 4), strict=True):
            np.testing.assert_allclose(one[b], two, rtol=1e-5, atol=1e-5)
    step = 1e-5 * direction.astype(float)
    numeric = (numpy_loss(values + step) - numpy_loss(values - step)) / 2e-5
    np.testing.assert_allclose(np.sum(np.asarray(jax.jit(jax.grad(loss))(values)) * direction), numeric, rtol=1e-4)


def test_cold_dkm_is_lloyd_and_soft_values_stay_in_the_hull():
    values, _ = blocks_of(6)
    start = jnp.tile(jnp.array([[-1.5, -0.5, 0.4, 1.1, 90.0]]), (3, 1))
    cold, centroids = lloyd.dkm(values, start, 1e-9, 1)
    np.testing.assert_allclose(centroids, lloyd.lloyd(values, start, iterations=1), rtol=1e-5)
    nearest = np.take_along_axis(np.asarray(centroids), np.asarray(lloyd.assign(values, centroids)).astype(int), 1)
    np.testing.assert_allclose(cold, nearest, rtol=1e-5)
    warmed = jax.jit(lambda v, t: lloyd.dkm(v, lloyd.linear_init(v, 4), t, 5))
    slope = jax.jit(jax.grad(lambda v, t: warmed(v, t)[0].sum()))
    for temperature in (1e-30, 1e-3, 1.0, 1e6):
        warm, centroids = warmed(values, temperature)
        low, high = (np.asarray(f(centroids, axis=1, keepdims=True)) for f in (jnp.min, jnp.max))
        assert np.all(warm >= low - 1e-5) and np.all(warm <= high + 1e-5)
        gradient = slope(values, temperature)
        assert np.all(np.isfinite(gradient))


def test_the_gradient_of_a_centroid_is_the_sum_over_its_cluster():
    random = np.random.default_rng(0)
    gradient, index = random.standard_normal((3, 1000)), random.integers(0, 200, (3, 1000))
    expected = np.zeros((3, 256))
    np.add.at(expected, (np.arange(3)[:, None], index), gradient)
    found = lloyd.centroid_gradient(jnp.asarray(gradient, jnp.float32), jnp.asarray(index, jnp.uint8), 256)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_vector_codebooks():
    random = np.random.default_rng(0)
    centres = 20 * np.array([[0, 0], [0, 1], [1, 0], [1, 1], [3, 2]], np.float64) + 1000
    which = random.integers(0, 5, 20_000)
    vectors = (centres[which] + random.standard_normal((20_000, 2))).astype(np.float32)
    codebook = np.asarray(jax.jit(lloyd.fit_vectors, static_argnums=(2, 3))(jax.random.key(0), vectors, 5, 5))
    index = np.asarray(lloyd.assign_vectors(vectors, codebook))
    assert index.dtype == np.int32
    distance = ((vectors[:, None].astype(float) - codebook.astype(float)) ** 2).sum(-1)
    np.testing.assert_array_equal(index, np.argmin(distance, axis=1))
    for j in range(5):
        mean = vectors[which == j].astype(np.float64).mean(0)
        np.testing.assert_allclose(codebook[index[which == j][0]], mean, rtol=3e-7)
    books = [lloyd.fit_vectors(jax.random.key(1), vectors, 12, i) for i in (0, 1, 10)]
    losses = [((vectors - book[lloyd.assign_vectors(vectors, book)]) ** 2).sum() for book in books]
    assert losses[0] > losses[1] > losses[2]
