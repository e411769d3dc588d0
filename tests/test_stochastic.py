"""Stochastic rounding in training: unbiased, by a key, with a noise of its own for every site and iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq

pytestmark = pytest.mark.shared

ROUNDED = {
    "int4": jaxq.int4(rounding=jaxq.Stochastic()),
    "fixed": jaxq.fixed(6, 3, rounding=jaxq.Stochastic()),
    "dynamic fixed": jaxq.dynamic_fixed(5, rounding=jaxq.Stochastic()),
}
X = jax.random.normal(jax.random.key(0), (3, 8))
W = jnp.clip(0.6 * jax.random.normal(jax.random.key(1), (8, 4)), -1.9, 1.9)


def product(w, x):
    return x @ w


def layers(w, x):
    @jax.checkpoint
    def layer(x, w):
        return x, x @ w

    return jax.lax.scan(layer, x, w)[1]


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("role", ["weight", "act"])
def test_the_mean_over_keys_is_the_float_product(name, role):
    policy = jaxq.Scheme(**{role: ROUNDED[name]})
    keys = jax.random.split(jax.random.key(2), 4000)
    ys = np.asarray(jax.jit(jax.vmap(lambda key: jaxq.qat(product, policy, key=key)(W, X)))(keys), np.float64)
    error = ys.std(axis=0) / np.sqrt(len(keys))
    assert error.min() > 0
    assert np.all(np.abs(ys.mean(axis=0) - np.asarray(X, np.float64) @ np.asarray(W, np.float64)) < 4 * error + 1e-6)


def test_sites_iterations_and_keys_differ_and_one_key_repeats():
    policy, w = jaxq.weight_only(ROUNDED["int4"]), jnp.stack([W] * 3)

    def f(params, x):
        return *layers(params["a"], x), x @ params["b"], x @ params["c"]

    params = {"a": w, "b": W, "c": W}

    @jax.jit
    def run(key):
        return jnp.stack(jaxq.qat(f, policy, key=key)(params, X))

    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, jnp.stack(jaxq.qat(f, policy, key=jax.random.key(0))(params, X)))
    both = np.concatenate([first, other])
    assert len({y.tobytes() for y in both}) == len(both)


def test_gradients_do_not_see_the_noise_of_their_own_operand():
    policy = jaxq.weight_only(ROUNDED["int4"])

    def loss(w, key):
        return jnp.sum(jaxq.qat(layers, policy, key=key)(w, X))

    gradient = jax.jit(jax.grad(loss))(jnp.stack([W] * 2), jax.random.key(3))
    np.testing.assert_allclose(gradient, np.broadcast_to(X.sum(0)[:, None], (2, 8, 4)), rtol=1e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_serving_rounds_to_nearest(name):
    plain = {"int4": jaxq.int4(), "fixed": jaxq.fixed(6, 3), "dynamic fixed": jaxq.dynamic_fixed(5)}
    policy = jaxq.weight_only(ROUNDED[name])
    want = jax.jit(jaxq.quantize(product, jaxq.weight_only(plain[name])))(W, X)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(product, policy))(W, X), want)
    np.testing.assert_array_equal(jax.jit(jaxq.quantize(product, policy))(jaxq.convert(product, policy)(W, X), X), want)


@pytest.mark.parametrize(
    "key", [0, "a", jax.random.split(jax.random.key(0), 3), jnp.zeros(2)], ids=["int", "text", "three", "floats"]
)
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match="key= is one key, such as jax.random.key"):
        jaxq.qat(product, jaxq.weight_only(ROUNDED["int4"]), key=key)


def test_a_raw_key_is_a_key():
    jaxq.qat(product, jaxq.weight_only(ROUNDED["int4"]), key=jax.random.PRNGKey(0))(W, X)


def test_no_key_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"key=key"):
        jaxq.qat(product, jaxq.weight_only(ROUNDED["int4"]))(W, X)
    plan = jaxq.make_plan(product, jaxq.weight_only(ROUNDED["fixed"]))(W, X)
    assert jaxq.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="option of integers"):
        jaxq.float8(rounding=jaxq.Stochastic())
    with pytest.raises(ValueError, match="to nearest"):
        jaxq.Scheme(out=jaxq.fixed(8, 4, rounding=jaxq.Stochastic()))
