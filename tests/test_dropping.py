"""QDrop: `qat(key=)` leaves a share of the values as they are, others for every key; serving knows nothing of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq

X = jax.random.normal(jax.random.key(0), (64, 32))
W = jax.random.normal(jax.random.key(1), (32, 32))
ACT = {
    "dynamic": jaxq.int2(per_tensor=True),
    "learned": jaxq.Quantizer(jaxq.Int(2), per_tensor=True, calibrator=jaxq.learned()),
    "float8": jaxq.float8(),
}


def product(w, x):
    return x @ w


def dropped(quantizer, share):
    return jaxq.Scheme(act=jaxq.Quantizer(**{**vars(quantizer), "drop": share}))


def plans(name, share=0.5):
    """Return plans that differ in what is dropped alone."""
    return [jaxq.observe(product, dropped(ACT[name], s))(W, X)[1] for s in (share, 0.0)]


def rounded(plan, x=X):
    return np.asarray(jaxq.qat(product, plan)(jnp.eye(32), x))


@pytest.mark.parametrize("name", ACT)
def test_every_value_is_rounded_or_as_it_was(name):
    plan, plain = plans(name)
    ours = np.asarray(jaxq.qat(product, plan, key=jax.random.key(3))(jnp.eye(32), X))
    values = rounded(plain)
    kept = ours == np.asarray(X)
    np.testing.assert_array_equal(ours, np.where(kept, X, values))
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(X.size)


def test_the_mean_over_keys_is_half_way():
    plan, plain = plans("dynamic", 0.25)
    keys = jax.random.split(jax.random.key(2), 2000)
    ys = np.asarray(jax.jit(jax.vmap(lambda key: jaxq.qat(product, plan, key=key)(W, X[:4])))(keys), np.float64)
    error = ys.std(axis=0) / np.sqrt(len(keys))
    expected = 0.25 * np.asarray(X[:4]) @ np.asarray(W) + 0.75 * rounded(plain, X[:4]) @ np.asarray(W)
    assert np.all(np.abs(ys.mean(axis=0) - expected) < 4.5 * error + 1e-5) and error.min() > 0


def test_gradients_pass_what_is_kept_beyond_the_range_too():
    signed = jaxq.Quantizer(jaxq.Int(4), per_tensor=True, calibrator=jaxq.minmax())
    plan = jaxq.observe(product, dropped(signed, 0.5))(W, X / 4)[1]  # so that much of X is clipped

    def loss(x, key):
        return jnp.sum(jaxq.qat(product, plan, key=key)(jnp.eye(32), x))

    key = jax.random.key(5)
    kept = np.asarray(jaxq.qat(product, plan, key=key)(jnp.eye(32), X)) == np.asarray(X)
    top = np.abs(np.asarray(X / 4)).max()
    clipped = np.abs(np.asarray(X)) > top * (1 + 0.5 / 7)
    assert clipped.mean() > 0.1
    np.testing.assert_array_equal(jax.grad(loss)(X, key), (kept | ~clipped).astype(np.float32))


def test_learned_steps_learn_from_what_is_rounded():
    plan, plain = plans("learned")

    def by_step(plan, key):
        def loss(plan):
            return jnp.sum(jnp.square(jaxq.qat(product, plan, key=key)(W, X)))

        return float(jax.grad(loss)(plan).range(plan.names[0])[0].value.squeeze())

    dropping, whole = by_step(plan, jax.random.key(0)), by_step(plain, jax.random.key(0))
    assert np.isfinite(dropping) and dropping != 0 and dropping != whole


def test_serving_and_evaluation_drop_nothing():
    plan, plain = plans("dynamic")
    np.testing.assert_array_equal(jaxq.quantize(product, plan)(W, X), jaxq.quantize(product, plain)(W, X))
    with pytest.raises(ValueError, match="drop quantization, by a key that is not there"):
        jaxq.qat(product, plan)(W, X)


@pytest.mark.parametrize("share", [1.0, -0.1, True, "half"])
def test_a_share_is_one(share):
    with pytest.raises(ValueError, match="drop= is a share"):
        jaxq.int8(drop=share)


def test_outputs_cannot_drop():
    with pytest.raises(ValueError, match="drop= from out="):
        jaxq.Scheme(out=jaxq.int8(per_tensor=True, drop=0.5))
