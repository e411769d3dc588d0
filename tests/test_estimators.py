"""Gradients past a rounding (EWGS, hard tanh, ApproxSign) and into a clip (PACT), against formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxq

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8)).astype(np.float32)
W = RNG.normal(size=(8, 5)).astype(np.float32)
G = RNG.normal(size=(6, 5)).astype(np.float32)


def product(w, x):
    return x @ w


def pulled(quantizer, g=G):
    """Return dW of `sum(g * x @ q(w))` with the weight quantized."""
    policy = jaxq.weight_only(quantizer)
    return jax.jit(jax.grad(lambda w: jnp.sum(g * jaxq.qat(product, policy)(w, X))))(W)


def by_hand(w):
    """Return the gradient that comes back to the quantized weight, in float64."""
    del w
    return X.astype(np.float64).T @ G.astype(np.float64)


def test_ewgs_scales_by_the_rounding_error_in_units_of_the_range():
    g, w = by_hand(W), W.astype(np.float64)
    step = np.abs(w).max(axis=0, keepdims=True) / 7
    error = (w - step * np.round(w / step)) / (14 * step)
    got = pulled(jaxq.int4(estimator=jaxq.EWGS(0.5)))
    np.testing.assert_allclose(got, g * (1 + 0.5 * np.sign(g) * error), rtol=1e-4, atol=1e-5)
    assert np.abs(got - g).max() > 0.01


def test_ewgs_of_zero_is_the_plain_estimator_bit_for_bit():
    np.testing.assert_array_equal(pulled(jaxq.int4(estimator=jaxq.EWGS(0.0))), pulled(jaxq.int4()))


@pytest.mark.parametrize(
    ("estimator", "slope"),
    [
        (jaxq.HardTanh(), lambda w: np.abs(w) <= 1),
        (jaxq.HardTanh(0.25), lambda w: np.abs(w) <= 0.25),
        (jaxq.ApproxSign(), lambda w: np.maximum(2 - 2 * np.abs(w), 0)),
    ],
    ids=repr,
)
def test_gradients_of_signs(estimator, slope):
    got = pulled(jaxq.binary(estimator=estimator))
    np.testing.assert_allclose(got, by_hand(W) * slope(W.astype(np.float64)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", [jaxq.HardTanh(), jaxq.ApproxSign()], ids=repr)
def test_gradients_of_signs_in_forward_mode(estimator):
    """A derivative along a direction is the gradient times the direction."""
    policy, direction = (
        jaxq.weight_only(jaxq.binary(estimator=estimator)),
        jnp.asarray(RNG.normal(size=W.shape), W.dtype),
    )
    _, along = jax.jvp(lambda w: jnp.sum(G * jaxq.qat(product, policy)(w, X)), (W,), (direction,))
    gradient = np.asarray(pulled(jaxq.binary(estimator=estimator)), np.float64)
    np.testing.assert_allclose(along, np.sum(gradient * direction), rtol=1e-4)


@pytest.mark.parametrize("quantizer", [jaxq.int4(estimator=jaxq.EWGS(0.1)), jaxq.binary(estimator=jaxq.ApproxSign())])
def test_forward_passes_and_serving_know_of_no_estimator(quantizer):
    policy = jaxq.Scheme(weight=quantizer, act=jaxq.int8(estimator=jaxq.EWGS()))
    plan = jaxq.make_plan(product, policy)(W, X)
    trained = jax.jit(jaxq.qat(product, plan))(W, X)
    served = jax.jit(jaxq.quantize(product, plan))(jaxq.convert(product, plan)(W, X), X)
    np.testing.assert_array_equal(trained, served)
    assert jaxq.Plan.from_json(plan.to_json()) == plan
    rows = jax.vmap(jax.grad(lambda x: jnp.sum(jaxq.qat(product, plan)(W, x))))(X[:, None])
    for x, row in zip(X, rows, strict=True):
        one = jax.grad(lambda x: jnp.sum(jaxq.qat(product, plan)(W, x)))(x[None])
        np.testing.assert_allclose(row, one, rtol=1e-5)


def test_pact_learns_from_what_is_clipped_alone():
    act = jaxq.Quantizer(jaxq.Int(4, signed=False), per_tensor=True, calibrator=jaxq.learned(rule="pact"))
    x = np.abs(X) * 3
    _, plan = jaxq.observe(product, jaxq.Scheme(weight=jaxq.int8(), act=act))(W, x)
    alpha = 15 * float(plan.range("dot0" if "dot0" in plan.names else plan.names[0])[0].value.ravel()[0])
    gradient = jax.jit(jax.grad(lambda plan: jnp.sum(G * jaxq.qat(product, plan)(W, x))))(plan)
    back = G.astype(np.float64) @ np.asarray(jaxq.int8()(jnp.asarray(W)).decode(), np.float64).T
    clipped = x / (alpha / 15) > 15
    assert 0 < clipped.sum() < clipped.size
    got = jax.tree.leaves(gradient)[0].ravel()[0] / 15  # by the step; alpha is 15 of them
    np.testing.assert_allclose(got, np.sum(back * clipped), rtol=1e-4)


def test_what_estimators_and_rules_are_not_for():
    with pytest.raises(ValueError, match="EWGS"):
        jaxq.binary(estimator=jaxq.EWGS())
    with pytest.raises(TypeError, match="estimator="):
        jaxq.int4(estimator="ste")
    with pytest.raises(ValueError, match="not negative"):
        jaxq.EWGS(-1.0)
    with pytest.raises(ValueError, match="positive"):
        jaxq.HardTanh(0.0)
    with pytest.raises(ValueError, match="'lsq' or 'pact'"):
        jaxq.learned(rule="sgd")
    with pytest.raises(ValueError, match="centroids"):
        jaxq.kmeans(4, calibrator=jaxq.learned(rule="pact"))


# --- labels ----------------------------------------------------------------------------------------------------------


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["head"]


PARAMS = {"up": jnp.asarray(W), "head": jnp.ones((5, 3))}
STEPS = jaxq.int4(calibrator=jaxq.learned())


def observed(policy):
    return jaxq.observe(model, policy)(PARAMS, X)[1]


def test_labels_train_every_kind_of_leaf_in_its_own_way():
    static = jaxq.int8(per_tensor=True, calibrator=jaxq.minmax())
    plan = observed({"up": jaxq.Scheme(weight=STEPS, act=static), "*": jaxq.weight_only(STEPS)})
    names = (jaxq.labels(plan, {"head": "slow", "*": "fast"}), {"up": "weights", "head": "weights"})
    kinds = {"slow": optax.sgd(0.0), "fast": optax.sgd(0.1), "fixed": optax.set_to_zero(), "weights": optax.adamw(0.1)}
    optimizer = optax.multi_transform(kinds, names)

    @jax.jit
    def step(trained, state):
        gradient = jax.grad(lambda trained: jnp.sum(jaxq.qat(model, trained[0])(trained[1], X) ** 2))(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    trained = plan, PARAMS
    (new, params), _ = step(trained, optimizer.init(trained))
    assert not np.array_equal(new.range("up")[1].value, plan.range("up")[1].value)
    for old, fresh in ((plan.range("up")[0], new.range("up")[0]), (plan.range("head"), new.range("head"))):
        jax.tree.map(np.testing.assert_array_equal, old, fresh)
    assert not np.array_equal(params["head"], PARAMS["head"])


def test_labels_that_match_nothing_are_refused():
    plan = observed({"up": jaxq.weight_only(STEPS), "*": None})
    with pytest.raises(ValueError, match="matches head; they are: up"):
        jaxq.labels(plan, {"up": "a", "head": "b"})
    with pytest.raises(ValueError, match="no label for up, head"):
        jaxq.labels(observed(jaxq.weight_only(STEPS)), {})
    with pytest.raises(ValueError, match="nothing is learned"):
        jaxq.labels(jaxq.make_plan(model, jaxq.w8a8())(PARAMS, X))
    with pytest.raises(ValueError, match="have one label, 'fixed'"):
        jaxq.labels(observed(jaxq.weight_only(STEPS)), "fixed")
    with pytest.raises(TypeError, match="labels are those of a plan's leaves"):
        jaxq.labels(jaxq.w8a8())
