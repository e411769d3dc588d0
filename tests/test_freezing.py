"""Iterative freezing of oscillating weights, against a loop over single weights in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxq

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
STEP = 0.25
FIXED = jaxq.weight_only(jaxq.Quantizer(jaxq.Fixed(4, 2)))


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["head"]


def one_weight(values, thresholds, momentum):
    """Return what algorithm 1 of Nagel et al. 2022 makes of the values that one weight would take: in float64."""

    def code(w):
        return int(np.clip(np.round(w / STEP), -8, 7))

    last, direction, frequency, average, frozen, out = code(values[0]), 0, 0.0, float(code(values[0])), False, []
    for w, threshold in zip(values[1:], thresholds, strict=True):
        now = last if frozen else code(w)
        move = np.sign(now - last)
        frequency = momentum * (move != 0 and move == -direction) + (1 - momentum) * frequency
        average = momentum * now + (1 - momentum) * average
        direction = move or direction
        if frequency > threshold and not frozen:
            frozen, now = True, int(np.round(average))
        last = now
        out.append(STEP * now if frozen else w)
    return out


def test_every_weight_follows_the_algorithm():
    momentum, steps = 0.2, 60
    schedule = optax.cosine_decay_schedule(0.5, steps, 0.1)
    thresholds = [np.float32(schedule(n)) for n in range(steps)]
    walks = RNG.choice([0.01, 0.3], (6, 5)) * RNG.normal(size=(steps + 1, 6, 5)) + RNG.uniform(-1.5, 1.5, (6, 5))
    walks = walks.astype(np.float32)
    freeze = jaxq.freezing(model, {"up": FIXED, "head": None}, momentum=momentum)
    params = [{"up": jnp.asarray(w), "head": jnp.ones((5, 2))} for w in walks]
    state, update, got = freeze.init(params[0], X), jax.jit(freeze.update), []
    for n in range(steps):
        new, state = update(state, schedule(n), params[n + 1], X)
        got.append(new["up"])
        np.testing.assert_array_equal(new["head"], params[n + 1]["head"])
    expected = np.empty((steps, 6, 5))
    for i, j in np.ndindex(6, 5):
        expected[:, i, j] = one_weight(walks[:, i, j].astype(np.float64), thresholds, momentum)
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-6)
    assert 0.2 < np.mean(np.asarray(state.frozen[0])) < 1


def test_training_with_learned_steps_comes_to_rest():
    """Steps move too: frozen weights keep their codes, whatever their scale becomes."""
    quantizer = jaxq.Quantizer(jaxq.Int(3), calibrator=jaxq.learned())
    params = {"up": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), "head": jnp.ones((5, 2))}
    target = jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)
    policy = {"up": jaxq.weight_only(quantizer), "head": None}
    plan = jaxq.observe(model, policy)(params, X)[1]
    optimizer = optax.sgd(0.3)

    @jax.jit
    def step(trained, memory, state, threshold):
        gradient = jax.grad(lambda t: jnp.mean(jnp.square(jaxq.qat(model, t[0])(t[1], X) - target)))(trained)
        updates, memory = optimizer.update(gradient, memory, trained)
        plan, params = optax.apply_updates(trained, updates)
        params, state = jaxq.freezing(model, plan, momentum=0.1).update(state, threshold, params, X)
        return (plan, params), memory, state

    state = jaxq.freezing(model, plan).init(params, X)
    trained, memory = (plan, params), optimizer.init((plan, params))
    for n in range(40):
        trained, memory, state = step(trained, memory, state, 1.0 if n < 30 else -1.0)
    assert np.all(np.asarray(state.frozen[0]))
    plan, params = trained
    np.testing.assert_array_equal(jaxq.convert(model, plan)(params, X)["up"].codes, state.codes[0])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"*": None}, "no weight is quantized"),
        (jaxq.weight_only(jaxq.binary()), "up: freezing averages integer codes, not those of binary"),
        (jaxq.weight_only(jaxq.b158()), "up: rounded weights have another scale by MeanAbs"),
        (jaxq.weight_only(jaxq.int4(fit=jaxq.percentile(95))), "up: rounded weights have another scale by Percentile"),
    ],
)
def test_what_cannot_freeze_is_refused(policy, message):
    params = {"up": jnp.ones((6, 5)), "head": jnp.ones((5, 2))}
    with pytest.raises(ValueError, match=message):
        jaxq.freezing(model, policy).init(params, X)


def test_momentum_is_a_share():
    with pytest.raises(ValueError, match="momentum="):
        jaxq.freezing(model, momentum=0.0)
