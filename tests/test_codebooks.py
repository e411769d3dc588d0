"""Codebooks in plans: calibrated tables, importance, frozen codes, vectors, DKM, lookups; NumPy is the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.numbers import clustering, lloyd

X = jax.random.normal(jax.random.key(9), (64, 8))


def linear(params, x):
    return x @ params["w"]


def weights(*shape, seed=0):
    return {"w": jax.random.normal(jax.random.key(seed), shape)}


def squared_error(x, centroids, importance=1.0):
    """Return `sum w min_j (x - c_j)^2` in float64."""
    x, centroids = (np.asarray(a, np.float64) for a in (x, centroids))
    return np.sum(importance * np.min((x[..., None] - centroids.ravel()) ** 2, axis=-1))


# --- static activations -----------------------------------------------------------------------------------------------


def test_the_plan_holds_the_centroids_of_a_calibrated_activation():
    params, static = weights(8, 4), jaxq.kmeans(8, calibrator=jaxq.minmax())
    scheme = jaxq.Scheme(weight=jaxq.int8(), act=static)
    plan = jaxq.calibrate(linear, scheme, progress=False)(params, [X[:32], X[32:]])
    table = plan.range("w")[0].table
    assert squared_error(X, table) < 1.01 * squared_error(X, clustering.optimal(X, 8))
    text = str(jax.make_jaxpr(jaxq.quantize(linear, plan))(params, X))
    assert "while" not in text and "cumsum" not in text  # nothing is fitted
    moved = jaxq.Plan.from_json(jax.tree.map(lambda leaf: leaf * 2, plan).to_json())
    nearest = np.abs(np.asarray(X)[..., None] - 2 * np.asarray(table)).argmin(-1)
    want = (2 * np.asarray(table, np.float64))[nearest] @ np.asarray(jaxq.int8()(params["w"]).decode(), np.float64)
    np.testing.assert_allclose(jaxq.quantize(linear, moved)(params, X), want, rtol=1e-5, atol=1e-5)
    halved = jaxq.revise(plan, jaxq.Scheme(weight=jaxq.int8(), act=jaxq.kmeans(4, calibrator=jaxq.minmax())))
    assert squared_error(X, halved.range("w")[0].table) < 1.01 * squared_error(X, clustering.optimal(X, 4))


# --- importance -------------------------------------------------------------------------------------------------------


def learned(size, **options):
    return jaxq.kmeans(size, calibrator=jaxq.learned(), **options)


def test_importance_makes_the_output_of_layers_the_best_there_is():
    """The error of `x @ w` is that of w weighted by `E[x^2]`: with it as importance, no other centroids do better."""

    def f(params, x):
        def layer(carry, w):
            return carry, x @ w.T

        return jax.lax.scan(layer, 0, params["w"])[1] @ params["head"]

    params = {
        "w": jax.random.normal(jax.random.key(1), (2, 6, 8)),
        "head": jax.random.normal(jax.random.key(2), (6, 4)),
    }
    spread = jnp.asarray([10.0, 5, 2, 1, 0.5, 0.2, 0.1, 0.01])
    second = jnp.broadcast_to(spread**2, (2, 6, 8))
    policy = {"head": jaxq.weight_only(learned(3, group=3)), "*": jaxq.weight_only(learned(4))}
    plan = jaxq.make_plan(f, policy)(params, X)
    importance = {"w": 1e-20 * second, "head": jnp.zeros((6, 4))}
    y, plan = jax.jit(jaxq.observe(f, plan, importance=importance))(params, X)
    np.testing.assert_allclose(y, f(params, X), rtol=1e-6)
    for w, table in zip(params["w"], plan.range("w")[1].value, strict=True):
        best = clustering.optimal(w, 4, second[0])
        assert squared_error(w, table, second[0]) < 1.001 * squared_error(w, best, second[0])
        assert 1.1 * squared_error(w, table, second[0]) < squared_error(w, clustering.optimal(w, 4), second[0])
    # Without any importance all values count the same.
    best = clustering.optimal(params["head"][:3, 0], 3)
    np.testing.assert_allclose(plan.range("head")[1].value[0, 0], best, rtol=1e-6)


@pytest.mark.parametrize(
    "policy, importance, message",
    [
        (jaxq.weight_only(jaxq.kmeans(4)), {"w": np.ones((8, 4))}, "this plan has none"),
        (jaxq.weight_only(learned(4)), {"v": np.ones((8, 4))}, "'v', which is no parameter; parameters are: w"),
        (jaxq.weight_only(learned(4)), {}, "nothing for 'w'"),
        (jaxq.weight_only(learned(4)), {"w": np.ones((4, 8))}, "another shape"),
        (jaxq.weight_only(learned(4)), {"w": -np.ones((8, 4))}, "negative"),
    ],
)
def test_importance_that_does_not_fit_is_refused(policy, importance, message):
    with pytest.raises(ValueError, match=message):
        jaxq.observe(linear, policy, importance=importance)(weights(8, 4), X)


def test_importance_comes_first():
    _, plan = jaxq.observe(linear, jaxq.weight_only(learned(4)))(weights(8, 4), X)
    with pytest.raises(ValueError, match="fitted before: w; give importance= at the first"):
        jaxq.observe(linear, plan, importance={"w": jnp.ones((8, 4))})(weights(8, 4), X)


# --- lookups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight",
    [jaxq.kmeans(5), jaxq.kmeans(4, group=8), jaxq.mxfp6(8), jaxq.float8()],
    ids=repr,
)
def test_lookups_decode_only_the_rows_they_take(weight):
    def f(params, ids):
        return params["w"].at[ids].get(mode="fill", fill_value=7.0)

    params, ids = weights(40, 16), jnp.array([3, 39, 0, 100, 3])
    converted = jaxq.convert(f, jaxq.weight_only(weight))(params, ids)
    serve = jax.jit(jaxq.quantize(f, jaxq.weight_only(weight)))
    want = np.where(np.asarray(ids)[:, None] < 40, np.asarray(converted["w"].decode())[np.minimum(ids, 39)], 7.0)
    np.testing.assert_array_equal(serve(converted, ids), want)
    assert "f32[40,16]" not in serve.lower(converted, ids).compile().as_text()


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_vectors_of_values_are_coded_together():
    """Against NumPy: the nearest of the table's vectors along the inputs, one index for each, held in its bits."""
    x = jax.random.normal(jax.random.key(0), (6, 16, 10))
    q = jaxq.kmeans(12, dim=4)(x)
    assert q.shape == (6, 16, 10) and q.stored.shape == (6, 2, 10) and q.nbytes == 6 * 2 * 10 + 12 * 4 * 4
    table, vectors = np.asarray(q.table).reshape(12, 4), np.asarray(x).reshape(6, 4, 4, 10).swapaxes(2, 3)
    distance = np.sum((vectors[..., None, :] - table) ** 2, axis=-1)
    want = table[distance.argmin(-1)].swapaxes(2, 3).reshape(6, 16, 10)
    np.testing.assert_array_equal(q.decode(), want)
    np.testing.assert_array_equal(q.transpose((1, 2, 0)).decode(), want.transpose(1, 2, 0))
    few = np.tile(vectors[0, 0, :5], (3, 1)).T  # five different vectors
    np.testing.assert_allclose(jaxq.kmeans(8, dim=4)(few).decode(), few, rtol=1e-6)


def test_vectors_do_better_than_numbers_at_the_same_size():
    """Two bits a value of a Gaussian: 0.1175 is the least error of four levels (Max 1960), pairs have less."""
    x = jax.random.normal(jax.random.key(0), (256, 128))
    pairs = jaxq.kmeans(16, dim=2)(x)
    assert pairs.nbytes == 256 * 128 // 4 + 16 * 2 * 4
    assert np.mean((pairs.decode() - x) ** 2) < 0.95 * 0.1175


def layered(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), params["table"][x], params["layers"])
    return jax.nn.relu(x) @ params["head"].T


VECTORS = {"table": jaxq.kmeans(16, dim=2), "layers": jaxq.kmeans(16, dim=4), "head": learned(8, dim=2)}


def test_training_equals_serving_with_vectors_everywhere():
    params = {"table": weights(20, 8)["w"], "layers": weights(3, 8, 8)["w"], "head": weights(6, 8)["w"]}
    ids, policy = jnp.array([3, 0, 19, 7]), {name: jaxq.weight_only(q) for name, q in VECTORS.items()}
    importance = jax.tree.map(jnp.ones_like, params)
    _, plan = jaxq.observe(layered, policy, importance=importance)(params, ids)
    plan = jaxq.Plan.from_json(jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sin(10 * leaf), plan).to_json())
    converted = jaxq.convert(layered, plan)(params, ids)
    assert {name: leaf.stored.shape for name, leaf in converted.items()} == {
        "table": (20, 2), "layers": (3, 1, 8), "head": (6, 2)
    }  # fmt: skip
    served = jax.jit(jaxq.quantize(layered, plan))(converted, ids)
    np.testing.assert_array_equal(served, jax.jit(jaxq.qat(layered, plan))(params, ids))
    decoded = {name: leaf.decode() for name, leaf in converted.items()}
    np.testing.assert_allclose(served, layered(decoded, ids), rtol=1e-5, atol=1e-6)

    def loss(plan, params):
        return jnp.sum(jnp.sin(jaxq.qat(layered, plan)(params, ids)))

    by_plan, by_params = jax.grad(loss, argnums=(0, 1))(plan, params)
    index = np.asarray(converted["head"].codes)
    sums = [np.sum(np.asarray(by_params["head"], np.float64), where=index == n) for n in range(16)]
    np.testing.assert_allclose(by_plan.range("head")[1].value.ravel(), sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jaxq.kmeans(16, dim=4, group=8), "one for all"),
        (lambda: jaxq.Scheme(act=jaxq.kmeans(16, dim=4)), "are for weights"),
        (lambda: jaxq.kmeans(16, dim=4, calibrator=jaxq.minmax()), "learned"),
        (
            lambda: jaxq.make_plan(linear, jaxq.weight_only(jaxq.kmeans(16, dim=3)))(weights(8, 4), X),
            "'w': vectors of 3",
        ),
        (lambda: jaxq.kmeans(16, dim=0), "dim=0"),
    ],
)
def test_vectors_where_they_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- training ---------------------------------------------------------------------------------------------------------


def soft_values(w, centroids, temperature, iterations):
    """Return differentiable k-means of vectors in float64 NumPy (Cho et al. 2022, algorithm 1)."""
    for step in range(iterations + 1):
        logits = -np.sum((w[:, None] - centroids) ** 2, axis=-1) / temperature
        attention = np.exp(logits - logits.max(1, keepdims=True))
        attention /= attention.sum(1, keepdims=True)
        if step < iterations:
            centroids = attention.T @ w / attention.sum(0)[:, None]
    return attention @ centroids


@pytest.mark.parametrize("dim", [1, 2])
def test_dkm_is_hard_forward_and_soft_backward(dim):
    """The gradient is that of soft values in NumPy, by differences; what is served is what was trained."""
    params, quantizer = weights(8, 4), jaxq.kmeans(4, dim=dim, fit=jaxq.dkm(0.05, iterations=2))
    plan = jaxq.make_plan(linear, jaxq.weight_only(quantizer))(params, X)
    plan = jaxq.Plan.from_json(plan.to_json())
    converted = jaxq.convert(linear, plan)(params, X)
    trained, pull = jax.vjp(jax.jit(jaxq.qat(linear, plan)), params, X)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(linear, plan))(converted, X), trained)
    cotangent = jnp.sin(jnp.arange(256.0)).reshape(64, 4)
    got = np.asarray(pull(cotangent)[0]["w"]).T.reshape(-1, dim)
    w, by_decoded = (np.asarray(a, np.float64).T.reshape(-1, dim) for a in (params["w"], X.T @ cotangent))
    how = (np.asarray(converted["w"].table, np.float64).reshape(4, dim), 0.05 * w.var(), 2)
    moves = 1e-6 * np.eye(32).reshape(32, *w.shape)
    want = [np.sum(by_decoded * (soft_values(w + d, *how) - soft_values(w - d, *how))) / 2e-6 for d in moves]
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_frozen_values_stay_with_their_centroids():
    frozen = jaxq.kmeans(4, calibrator=jaxq.learned(frozen=True))
    params, policy = weights(8, 4), jaxq.weight_only(frozen)
    _, plan = jaxq.observe(linear, policy)(params, X)
    codes = jaxq.convert(linear, plan)(params, X)["w"].codes

    def loss(plan, params):
        return jnp.sum(jaxq.qat(linear, plan)(params, X) ** 2)

    by_plan, by_params = jax.grad(loss, argnums=(0, 1))(plan, params)
    assert not by_params["w"].any() and not by_plan.range("w")[1].value[1].any()
    assert jaxq.labels(plan).range("w")[1].value == ("learned", "fixed")
    rate = 1e-2 * np.ptp(params["w"])
    moved = jax.tree.map(lambda leaf, g: leaf - rate * g, plan, by_plan)  # so far that centroids pass one another
    moved = jaxq.Plan.from_json(moved.to_json())
    table = np.asarray(moved.range("w")[1].value[0])
    assert np.any(np.diff(table.ravel()) < 0)
    converted = jaxq.convert(linear, moved)(params, X)
    np.testing.assert_array_equal(converted["w"].codes, codes)
    np.testing.assert_array_equal(converted["w"].decode(), table.ravel()[np.asarray(codes)])
    trained = jax.jit(jaxq.qat(linear, moved))(params, X)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(linear, moved))(converted, X), trained)
    decoded = np.asarray(converted["w"].decode(), np.float64)
    by_decoded = 2 * np.asarray(X, np.float64).T @ (np.asarray(X, np.float64) @ decoded)
    got = jax.grad(loss)(moved, params).range("w")[1].value[0].ravel()
    want = [np.sum(by_decoded, where=np.asarray(codes) == n) for n in range(4)]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jaxq.int8(fit=jaxq.dkm(0.1)), "is for codebooks"),
        (lambda: jaxq.Scheme(act=jaxq.kmeans(4, fit=jaxq.dkm(0.1))), "trains weights"),
        (lambda: jaxq.Scheme(jaxq.kmeans(4, fit=jaxq.dkm(0.1)), jaxq.int8(), grad=jaxq.int8()), "soft assignments"),
        (lambda: jaxq.dkm(-1.0), "at least 0"),
        (lambda: jaxq.int8(calibrator=jaxq.learned(frozen=True)), "drop frozen="),
    ],
)
def test_ways_to_train_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- many centroids ---------------------------------------------------------------------------------------------------


def test_many_centroids_are_near_the_optimum_where_tails_are_heavy():
    """256 centroids of Student's t with two degrees of freedom; the optimum is that of dynamic programming."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(2, 20000).astype(np.float32)
    importance = rng.uniform(size=x.size).astype(np.float32)
    found = lloyd.fit(x[None], 256, importance[None])
    best = squared_error(x, clustering.optimal(x, 256, importance), importance)
    assert best * (1 - 1e-6) <= squared_error(x, found, importance) < 1.003 * best


def test_plans_with_tables_for_layers_come_back_from_json_and_run_compiled():
    params = {"w": jax.random.normal(jax.random.key(3), (2, 8, 8))}
    f = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    scheme = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.kmeans(8, calibrator=jaxq.minmax()))
    plan = jaxq.calibrate(f, scheme, progress=False)(params, [X])
    converted = jaxq.convert(f, plan)(params, X)
    loaded = jaxq.Plan.from_json(plan.to_json())
    want = jax.jit(jaxq.quantize(f, plan))(converted, X)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(f, loaded))(converted, X), want)


@pytest.mark.parametrize("values", ["normal", "constant"])
def test_the_coldest_gradient_is_the_mean_over_a_cluster(values):
    w = weights(16, 4)["w"] if values == "normal" else jnp.full((16, 4), 3.0)
    scheme = jaxq.weight_only(jaxq.kmeans(3, per_tensor=True, fit=jaxq.dkm(0.0)))
    a = jax.random.normal(jax.random.key(1), w.shape)
    g = jax.grad(lambda w: jnp.sum(a * jaxq.qat(lambda p, x: x @ p["w"], scheme)({"w": w}, jnp.eye(16))))(w)
    decoded = np.asarray(jaxq.qat(lambda p, x: x @ p["w"], scheme)({"w": w}, jnp.eye(16)))
    want = np.zeros(w.shape)
    for value in np.unique(decoded):
        want[decoded == value] = np.asarray(a, np.float64)[decoded == value].mean()
    np.testing.assert_allclose(g, want, atol=1e-5)
