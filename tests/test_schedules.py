"""Quantization that changes with the step: one program for all steps, made of JAX's own control flow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxq

RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.normal(size=(32, 8)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(32, 3)), jnp.float32)
PARAMS = {
    "up": jnp.asarray(RNG.normal(size=(8, 16)) / 3, jnp.float32),
    "head": jnp.asarray(RNG.normal(size=(16, 3)) / 4, jnp.float32),
}


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["head"]


def loss_of(f):
    return lambda params, x: jnp.mean((f(params, x) - Y) ** 2)


def test_quantization_that_starts_late_and_loses_bits_is_one_program():
    plans = [jaxq.make_plan(model, policy)(PARAMS, X) for policy in (jaxq.w8a8(), jaxq.weight_only(jaxq.int2()))]
    stages = [loss_of(model), *(loss_of(jaxq.qat(model, plan)) for plan in plans)]
    traces = []

    @jax.jit
    def step(params, number):
        traces.append(number)

        def loss(params):
            stage = jnp.searchsorted(jnp.array([2, 4]), number, side="right")
            return jax.lax.switch(stage, stages, params, X)

        return jax.value_and_grad(loss)(params)

    for number, stage in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (9, 2)):
        got, want = step(PARAMS, number), jax.jit(jax.value_and_grad(stages[stage]))(PARAMS, X)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)
    assert len(traces) == 1
    served = jaxq.quantize(model, plans[-1])(jaxq.convert(model, plans[-1])(PARAMS, X), X)
    np.testing.assert_allclose(step(PARAMS, 9)[0], jnp.mean((served - Y) ** 2), rtol=1e-6)


def test_ranges_that_are_averaged_and_then_frozen():
    ema = jaxq.int8(per_tensor=True, calibrator=jaxq.ema(0.5))
    plan = jaxq.make_plan(model, jaxq.Scheme(weight=jaxq.int8(), act=ema))(PARAMS, X)
    _, plan = jaxq.observe(model, plan)(PARAMS, X)

    @jax.jit
    def step(plan, x, number):
        _, seen = jaxq.observe(model, plan, quantized=True)(PARAMS, x)
        return jax.tree.map(lambda new, old: jnp.where(number < 2, new, old), seen, plan)

    ends = []
    for number in range(4):
        plan = step(plan, X * 2.0**number, number)
        ends.append(float(plan.range("up")[0].hi))
    top = float(X.max())
    np.testing.assert_allclose(ends, [top, top * 1.5, top * 1.5, top * 1.5], rtol=1e-6)


def test_dampening_is_the_squared_rounding_error_of_what_is_not_clipped():
    fixed = jaxq.Quantizer(jaxq.Fixed(4, 2))
    plan = jaxq.make_plan(model, {"up": jaxq.weight_only(fixed), "*": None})(PARAMS, X)
    params = {**PARAMS, "up": PARAMS["up"] * 4}
    value, gradient = jax.jit(jax.value_and_grad(jaxq.dampening(model, plan)))(params, X)
    w = np.asarray(params["up"], np.float64)
    rounded = np.clip(np.round(w * 4), -8, 7) / 4
    error = np.where(np.abs(w - rounded) <= 0.125, w - rounded, 0)
    assert (error == 0).sum() > 5  # some are clipped
    np.testing.assert_allclose(value, np.sum(error**2), rtol=1e-5)
    np.testing.assert_allclose(gradient["up"], 2 * error, rtol=1e-4, atol=1e-6)
    assert not np.any(gradient["head"])


def test_dampening_takes_weights_to_their_codes():
    plan = jaxq.make_plan(model, jaxq.weight_only(jaxq.Quantizer(jaxq.Fixed(6, 4))))(PARAMS, X)
    penalty, optimizer = jaxq.dampening(model, plan), optax.sgd(0.25)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(30):
        updates, state = optimizer.update(jax.jit(jax.grad(penalty))(params, X), state)
        params = optax.apply_updates(params, updates)
    assert float(penalty(PARAMS, X)) > 1e-3 > 1e-8 > float(penalty(params, X))


def test_dampening_of_derived_weights_is_refused():
    def merged(params, x):
        return x @ jnp.concatenate([params["a"], params["b"]], axis=1)

    params = {"a": jnp.ones((8, 2)), "b": jnp.ones((8, 3))}
    with pytest.raises(ValueError, match=r"site a\+b is derived from leaves, \['a'\] among them"):
        jaxq.dampening(merged, jaxq.w8a8())(params, X)


@pytest.mark.parametrize(
    "policy, reason",
    [
        (jaxq.weight_only(jaxq.int4()), r"\['w'\] has codes of its own at each of the sites w, w#1: give .* one quant"),
        ({"w": jaxq.weight_only(jaxq.int4()), "w#1": None}, r"\['w'\] is read in float too, beside site w"),
    ],
    ids=["both", "one"],
)
def test_tied_weights_with_codes_for_each_use_are_refused(policy, reason):
    def tied(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    params = {"w": PARAMS["up"]}
    with pytest.raises(ValueError, match=reason):
        jaxq.dampening(tied, policy)(params, X)
    with pytest.raises(ValueError, match=reason):
        jaxq.freezing(tied, policy).init(params, X)
    alike = jaxq.weight_only(jaxq.int4(per_tensor=True))
    assert jaxq.dampening(tied, alike)(params, X) > 0


def test_distillation_is_one_line_of_loss():
    plan = jaxq.make_plan(model, jaxq.weight_only(jaxq.int2()))(PARAMS, X)
    student, teacher = jaxq.qat(model, plan), jax.nn.softmax(model(PARAMS, X))

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(
            lambda params: optax.softmax_cross_entropy(student(params, X), teacher).mean()
        )(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    optimizer = optax.adam(1e-2)
    params, state, losses = PARAMS, optimizer.init(PARAMS), []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    entropy = float(jnp.mean(-jnp.sum(teacher * jnp.log(teacher), axis=-1)))
    assert losses[-1] - entropy < 0.5 * (losses[0] - entropy)
