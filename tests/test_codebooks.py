"""Codebooks in plans: calibrated tables, importance, frozen codes, vectors, DKM, lookups; NumPy is the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.numbers import clustering

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
