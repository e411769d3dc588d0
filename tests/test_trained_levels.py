"""Levels that are trained: TTQ's two numbers and APoT's range, against the papers' formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxq

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 64)).astype(np.float32)
W = RNG.normal(size=(64, 5)).astype(np.float32)
G = RNG.normal(size=(6, 5)).astype(np.float32)


def product(params, x):
    return x @ params["w"]


def plan_of(quantizer, w=W):
    return jaxq.observe(product, jaxq.weight_only(quantizer))({"w": w}, X)[1]


def gradients(plan, w=W):
    """Return the gradients of `sum(g * x @ q(w))` by the plan's parameters and by the weight."""

    def loss(plan, w):
        return jnp.sum(G * jaxq.qat(product, plan)({"w": w}, X))

    plan, w = jax.jit(jax.grad(loss, (0, 1)))(plan, w)
    return plan.range(plan.names[0])[1].value, w


def upstream():
    """Return the gradient that comes back to the quantized weight."""
    return X.astype(np.float64).T @ G.astype(np.float64)


def with_value(plan, value):
    """Return the plan with other parameters of its one weight."""
    act, weight, *rest = plan.range(plan.names[0])
    return jaxq.Plan(plan.decisions, ((act, weight._replace(value=value), *rest),))


def weight_of(plan, w=W):
    return np.asarray(jaxq.convert(product, plan)({"w": w}, X)["w"].decode(), np.float64)


# --- TTQ -------------------------------------------------------------------------------------------------------------


def test_ttq_starts_from_the_means_beyond_its_thresholds():
    w = W.astype(np.float64)
    limit = 0.3 * np.abs(w).max()
    plan = plan_of(jaxq.ttq(0.3))
    up, down = plan.range(plan.names[0])[1].value
    np.testing.assert_allclose(up, w[w > limit].mean().reshape(1, 1), rtol=1e-6)
    np.testing.assert_allclose(down, -w[w < -limit].mean().reshape(1, 1), rtol=1e-6)
    expected = np.where(w > limit, float(up[0, 0]), np.where(w < -limit, -float(down[0, 0]), 0))
    np.testing.assert_array_equal(weight_of(plan), expected)


def test_ttq_gradients_are_those_of_the_paper():
    plan, w, g = plan_of(jaxq.ttq(0.3)), W.astype(np.float64), upstream()
    up, down = (float(v[0, 0]) for v in plan.range(plan.names[0])[1].value)
    limit = 0.3 * np.abs(w).max()
    above, below = w > limit, w < -limit
    (d_up, d_down), dw = gradients(plan)
    np.testing.assert_allclose(d_up[0, 0], g[above].sum(), rtol=1e-4)
    np.testing.assert_allclose(d_down[0, 0], -g[below].sum(), rtol=1e-4)
    np.testing.assert_allclose(dw, g * np.where(above, up, np.where(below, down, 1)), rtol=1e-4, atol=1e-5)


def test_ttq_of_values_on_one_side_has_a_number_for_the_other():
    plan = plan_of(jaxq.ttq(0.5, per_tensor=False), np.abs(W))
    up, down = plan.range(plan.names[0])[1].value
    assert up.shape == down.shape == (1, 5) and np.all(np.asarray(up) > 0) and np.all(np.asarray(down) > 0)


def test_ttq_numbers_that_training_throws_below_zero_count_by_their_size():
    plan = plan_of(jaxq.ttq(0.3))
    turned = with_value(plan, tuple(-v for v in plan.range(plan.names[0])[1].value))
    np.testing.assert_array_equal(weight_of(turned), weight_of(plan))
    for a, b in zip(gradients(turned)[0], gradients(plan)[0], strict=True):
        np.testing.assert_allclose(a, -b, rtol=1e-6)


# --- APoT ------------------------------------------------------------------------------------------------------------

# Li et al. 2020, section 2.2: sums of one number of each list, over the largest.
TERMS = {
    2: [[0, 1 / 2, 1 / 4, 1 / 8]],
    3: [[0, 1 / 2, 1 / 4, 1 / 16], [0, 1 / 8]],
    4: [[0, 1 / 2, 1 / 8, 1 / 32], [0, 1 / 4, 1 / 16, 1 / 64]],
}


@pytest.mark.parametrize("bits", TERMS)
def test_levels_are_sums_of_powers_of_two(bits):
    sums = sorted({sum(c) for c in np.stack(np.meshgrid(*TERMS[bits]), -1).reshape(-1, len(TERMS[bits]))})
    assert len(sums) == 2**bits
    unsigned = np.asarray(jaxq.apot(bits, signed=False).format.values)
    np.testing.assert_allclose(unsigned, np.asarray(sums) / sums[-1], rtol=1e-12)
    signed = np.asarray(jaxq.apot(bits + 1).format.values)
    np.testing.assert_array_equal(signed, np.concatenate([-unsigned[:0:-1], unsigned]))


def test_two_bits_are_ternary():
    assert jaxq.apot(2).format.values == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_the_range_starts_near_the_least_error(bits):
    w = RNG.normal(size=(4000, 1)).astype(np.float32)
    levels = np.asarray(jaxq.apot(bits).format.values)

    def error(a):
        return np.square(a * levels[np.abs(w / a - levels).argmin(1)] - w[:, 0]).mean()

    best = min(error(a) for a in np.linspace(0.3, 5, 1000))
    plan = jaxq.observe(product, jaxq.weight_only(jaxq.apot(bits)))({"w": w}, np.ones((1, 4000), np.float32))[1]
    assert error(float(plan.range(plan.names[0])[1].value[0, 0])) <= 1.01 * best


def test_the_gradient_of_a_range_is_that_of_reparameterized_clipping():
    quantizer = jaxq.apot(4)
    plan, w, g = plan_of(quantizer), W.astype(np.float64), upstream()
    plan = with_value(plan, plan.range(plan.names[0])[1].value / 2)  # so that much is clipped
    a = np.asarray(plan.range(plan.names[0])[1].value, np.float64)
    levels = np.asarray(quantizer.format.values)
    units = w / a
    nearest = levels[np.abs(units[..., None] - levels).argmin(-1)]
    kept = np.abs(units) <= 1
    assert 0.05 < (~kept).mean() < 0.9
    np.testing.assert_allclose(weight_of(plan), a * nearest, rtol=1e-6)
    da, dw = gradients(plan)
    expected = (g * np.where(kept, nearest - units, np.sign(w))).sum(0, keepdims=True)
    np.testing.assert_allclose(da, expected, rtol=1e-3, atol=1e-3)
    # Weights beyond the range keep their gradients, so that they can come back (the authors' code).
    np.testing.assert_allclose(dw, g, rtol=1e-4, atol=1e-5)


# --- both ------------------------------------------------------------------------------------------------------------

QUANTIZERS = [jaxq.ttq(0.2), jaxq.ttq(per_tensor=False), jaxq.apot(4), jaxq.apot(2, per_tensor=True)]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_trained_they_serve_what_they_were_trained_for(quantizer, tmp_path):
    target = X @ RNG.normal(size=(64, 5)).astype(np.float32)
    acts = jaxq.apot(4, per_tensor=True) if quantizer.format.bits > 2 else None
    trained = jaxq.observe(product, jaxq.Scheme(weight=quantizer, act=acts))({"w": W}, X)[1], jnp.asarray(W)
    optimizer = optax.adam(0.02)
    memory = optimizer.init(trained)

    def loss(trained):
        return jnp.mean(jnp.square(jaxq.qat(product, trained[0])({"w": trained[1]}, X) - target))

    @jax.jit
    def step(trained, memory):
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, memory = optimizer.update(gradient, memory, trained)
        return optax.apply_updates(trained, updates), memory, value

    values = []
    for _ in range(150):
        trained, memory, value = step(trained, memory)
        values.append(float(value))
    assert values[-1] < 0.25 * values[0]
    plan, w = trained
    converted = jaxq.convert(product, plan)({"w": w}, X)
    np.testing.assert_array_equal(
        jax.jit(jaxq.quantize(product, plan))(converted, X), jax.jit(jaxq.qat(product, plan))({"w": w}, X)
    )
    jaxq.save(tmp_path / "model", converted, plan)
    same, plan_again = jaxq.load(tmp_path / "model")
    assert plan_again == plan
    np.testing.assert_array_equal(same["w"].decode(), converted["w"].decode())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxq.ttq(1.0), "part of the largest value"),
        (lambda: jaxq.kmeans(4, calibrator=jaxq.ttq().calibrator), "codebook of three"),
        (lambda: jaxq.apot(9), "2 to 7 bits, got 9"),
        (lambda: jaxq.apot(7, signed=False), "2 to 6 bits, got 7"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- DoReFa: a line of the model, and levels -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dorefa_is_a_derived_weight_at_uniform_levels(bits):
    """Zhou et al. 2016, eq. 9: `2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1`, straight through `quantize_k`."""

    def net(params, x):
        w = jnp.tanh(params["w"])
        return x @ (w / jax.lax.stop_gradient(jnp.max(jnp.abs(w))))

    levels = jaxq.Levels(tuple(np.linspace(-1, 1, 2**bits).tolist()), f"dorefa{bits}")
    policy = jaxq.weight_only(jaxq.Quantizer(levels, per_tensor=True))
    bent = np.tanh(W.astype(np.float64))
    most, steps = np.abs(bent).max(), 2**bits - 1
    expected = 2 * np.round((bent / (2 * most) + 0.5) * steps) / steps - 1
    np.testing.assert_allclose(jaxq.qat(net, policy)({"w": W}, np.eye(64, dtype=np.float32)), expected, atol=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(G * jaxq.qat(net, policy)({"w": w}, X)))(W)
    np.testing.assert_allclose(gradient, upstream() * (1 - bent**2) / most, rtol=1e-4, atol=1e-5)
    converted = jaxq.convert(net, policy)({"w": W}, X)
    np.testing.assert_array_equal(
        jax.jit(jaxq.quantize(net, policy))(converted, X), jax.jit(jaxq.qat(net, policy))({"w": W}, X)
    )


def test_dorefa_of_one_bit_is_binary_of_a_layer():
    """Zhou et al. 2016, eq. 8: `sign(w) E|w|`."""
    converted = jaxq.convert(product, jaxq.weight_only(jaxq.binary(per_tensor=True)))({"w": W}, X)["w"]
    expected = np.where(W < 0, -1, 1) * np.abs(W.astype(np.float64)).mean()
    np.testing.assert_allclose(converted.decode(), expected, rtol=1e-6)
