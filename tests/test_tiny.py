"""The whole stack in a few seconds: plan, observe, train, convert, serve, print."""

import jax
import jax.numpy as jnp

import jaxq
from inspection import assert_bitwise, products


def network(params, x):
    hidden = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return hidden @ params["head"]["kernel"]


def test_the_whole_stack():
    keys = jax.random.split(jax.random.key(0), 4)
    up = {"kernel": jax.random.normal(keys[0], (16, 32)), "bias": jnp.zeros(32)}
    params = {"up": up, "head": {"kernel": jax.random.normal(keys[1], (32, 4))}}
    x, y = jax.random.normal(keys[2], (64, 16)), jax.random.normal(keys[3], (64, 4))

    plan = jaxq.make_plan(network, {"head": jaxq.w8a8(), "*": jaxq.w8a8(static=True)})(params, x)
    assert plan.names == ("up", "head") and plan.unobserved() == ["up"]
    plan = jaxq.calibrate(network, plan, progress=False)(params, [x, 2 * x])

    def loss(params, x, y):
        return jnp.mean((network(params, x) - y) ** 2)

    step = jax.jit(jax.value_and_grad(jaxq.qat(loss, plan)))
    losses = []
    for _ in range(30):
        value, gradient = step(params, x, y)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]

    converted = jaxq.convert(network, plan)(params, x)
    assert isinstance(converted["up"]["kernel"], jaxq.QArray)
    serve = jax.jit(jaxq.quantize(network, plan))
    assert products(serve, converted, x) == [("int8", "int8")] * 2
    assert_bitwise(jax.jit(jaxq.qat(network, plan))(params, x), serve(converted, x))
    assert "2 of 2 sites quantized" in str(plan)
