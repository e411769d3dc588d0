"""Every method of training in low precision: at 16 bits it is the float model, and it serves what it trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxq
from zoo import model

pytestmark = pytest.mark.shared
KEY = jax.random.key(0)


def learned(bits, *, signed=True, **options):
    return jaxq.Quantizer(jaxq.Int(bits, signed), calibrator=jaxq.learned(), **options)


def per_tensor(bits, **options):
    return learned(bits, per_tensor=True, **options)


def of_integers(bits):
    """Return the methods for integers of so many bits, and whether they need a key."""
    pact = jaxq.Quantizer(jaxq.Int(bits), per_tensor=True, calibrator=jaxq.learned(rule="pact"))
    return {
        "STE": (jaxq.Scheme(weight=jaxq.Quantizer(jaxq.Int(bits)), act=jaxq.Quantizer(jaxq.Int(bits))), False),
        "LSQ": (jaxq.Scheme(weight=learned(bits), act=per_tensor(bits)), False),
        "LSQ+": (jaxq.Scheme(weight=learned(bits), act=per_tensor(bits, signed=False, symmetric=False)), False),
        "PACT": (jaxq.Scheme(weight=learned(bits), act=pact), False),
        "TQT": (jaxq.Scheme(weight=learned(bits, power_of_two=True), act=per_tensor(bits, power_of_two=True)), False),
        "EWGS": (jaxq.Scheme(weight=jaxq.Quantizer(jaxq.Int(bits), estimator=jaxq.EWGS(0.01))), False),
        "QDrop": (jaxq.Scheme(weight=learned(bits), act=per_tensor(bits, drop=0.5)), True),
        "stochastic": (jaxq.weight_only(jaxq.Quantizer(jaxq.Int(bits), rounding=jaxq.Stochastic())), True),
        "dynamic fixed point": (jaxq.Scheme(weight=jaxq.dynamic_fixed(bits), act=jaxq.dynamic_fixed(bits)), False),
    }


OTHERS = {
    "binary": (jaxq.Scheme(weight=jaxq.binary(estimator=jaxq.HardTanh()), act=jaxq.int8()), False),
    "TWN": (jaxq.Scheme(weight=jaxq.ternary(), act=jaxq.int8()), False),
    "TTQ": (jaxq.Scheme(weight=jaxq.ttq(), act=jaxq.int8()), False),
    "b1.58": (jaxq.Scheme(weight=jaxq.b158(), act=jaxq.int8()), False),
    "APoT": (jaxq.Scheme(weight=jaxq.apot(4), act=jaxq.apot(5, per_tensor=True)), False),
    "k-means": (jaxq.weight_only(jaxq.kmeans(16, calibrator=jaxq.learned())), False),
    "frozen k-means": (jaxq.weight_only(jaxq.kmeans(16, calibrator=jaxq.learned(frozen=True))), False),
    "DKM": (jaxq.weight_only(jaxq.kmeans(16, fit=jaxq.dkm(0.01))), False),
    "float8": (jaxq.Scheme(weight=jaxq.float8(), act=jaxq.float8()), False),
}
METHODS = of_integers(4) | OTHERS


def started(scheme):
    """Return a small network, its arguments, a target and a plan that has seen them."""
    entry = model("linen_cnn_eval")
    plan = jaxq.observe(entry.fn, scheme)(entry.params, *entry.args)[1]
    target = jax.random.normal(KEY, entry.fn(entry.params, *entry.args).shape)
    return entry, plan, target


def loss_of(fn, entry, target):
    return lambda params: jnp.mean(jnp.square(fn(params, *entry.args) - target))


@pytest.mark.parametrize("name", of_integers(16))
def test_at_16_bits_the_loss_is_that_of_the_float_model(name):
    scheme, noisy = of_integers(16)[name]
    entry, plan, target = started(scheme)
    exact = float(loss_of(entry.fn, entry, target)(entry.params))
    ours = float(loss_of(jaxq.qat(entry.fn, plan, key=KEY if noisy else None), entry, target)(entry.params))
    assert ours != exact
    assert abs(ours - exact) < 1e-3 * exact


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_is_what_is_served(name):
    scheme, noisy = METHODS[name]
    entry, plan, target = started(scheme)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(trained, memory, key):
        def loss(trained):
            plan, params = trained
            fn = jaxq.qat(entry.fn, plan, key=key if noisy else None)
            return loss_of(fn, entry, target)({**entry.params, "params": params})

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, memory = optimizer.update(gradient, memory, trained)
        return optax.apply_updates(trained, updates), memory, value

    trained, losses = (plan, entry.params["params"]), []
    memory = optimizer.init(trained)
    for n in range(25):
        trained, memory, value = step(trained, memory, jax.random.fold_in(KEY, n))
        losses.append(float(value))
    assert min(losses) < losses[0]
    plan, variables = trained[0], {**entry.params, "params": trained[1]}
    converted = jaxq.convert(entry.fn, plan)(variables, *entry.args)
    served = jax.jit(jaxq.quantize(entry.fn, plan))
    # Training that rounds, or skips, at random has no outputs of its own: there it is the codes that are the same.
    imitated = served if noisy else jax.jit(jaxq.qat(entry.fn, plan))
    np.testing.assert_array_equal(served(converted, *entry.args), imitated(variables, *entry.args))
