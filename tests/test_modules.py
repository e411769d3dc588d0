"""NNX modules as arguments: what a call changes inside reaches the caller, as under `nnx.jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxq
from inspection import assert_bitwise


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.up(x)))))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (32, 8)) + 3


@pytest.fixture(autouse=True)
def flax_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def run(module, x):
    return module(x)


def test_batch_statistics_and_rng_counts_reach_the_caller(x):
    module, reference = Plain(nnx.Rngs(0)), Plain(nnx.Rngs(0))
    jaxq.quantize(run, None)(module, x)
    nnx.jit(run)(reference, x)
    assert_bitwise(nnx.state(module), nnx.state(reference))
    assert float(jnp.abs(module.norm.mean[...]).max()) > 0
    assert int(module.drop.rngs.count[...]) == 1


def test_quantized_statistics_are_near_float_ones(x):
    module, reference = Plain(nnx.Rngs(0)), Plain(nnx.Rngs(0))
    jaxq.qat(run, jaxq.w8a8())(module, x)
    reference(x)
    np.testing.assert_allclose(module.norm.mean[...], reference.norm.mean[...], atol=0.02)
    assert not np.array_equal(module.norm.mean[...], reference.norm.mean[...])


def test_training_with_an_nnx_optimizer_learns_and_updates_statistics(x):
    module = Plain(nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    target = x[:, :4] * 2

    def loss(module, x, y):
        return jnp.mean((module(x) - y) ** 2)

    @nnx.jit
    def step(module, optimizer, x, y):
        value, gradients = nnx.value_and_grad(jaxq.qat(loss, jaxq.w8a8()))(module, x, y)
        optimizer.update(module, gradients)
        return value

    losses = [float(step(module, optimizer, x, target)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert int(module.drop.rngs.count[...]) == 40
    assert float(jnp.abs(module.norm.mean[...]).max()) > 0


def test_adding_a_variable_inside_the_call_is_an_error(x):
    def grows(module, x):
        module.extra = nnx.Param(jnp.ones(3))
        return module(x)

    with pytest.raises(ValueError, match=r"structure of an nnx\.Module"):
        jaxq.quantize(grows, None)(Plain(nnx.Rngs(0)), x)


def test_the_module_of_the_serving_call_is_converted_in_place_of_its_weights(x):
    module = Plain(nnx.Rngs(0))
    module.eval()
    plan = jaxq.make_plan(run, jaxq.w8a8())(module, x)
    assert plan.names == ("up", "head")
    converted = jaxq.convert(run, plan)(module, x)
    assert_bitwise(jaxq.qat(run, plan)(module, x), jaxq.quantize(run, plan)(converted, x))
    assert jaxq.quantize(run, plan)(converted, x).shape == (32, 4)


def test_closed_over_weights_are_sites(x):
    module = Plain(nnx.Rngs(0))
    module.eval()

    def closed(scale, x):
        return scale["s"] * module(x)

    plan = jaxq.make_plan(closed, jaxq.w8a8())({"s": jnp.ones(())}, x)
    assert len(plan.sites) == 2 and all(d.is_integer for d in plan.decisions)
    near = jaxq.quantize(closed, plan)({"s": jnp.ones(())}, x)
    np.testing.assert_allclose(near, module(x), atol=0.1)


def test_rngs_and_variables_as_arguments_of_their_own(x):
    module, rngs, counter = Plain(nnx.Rngs(0)), nnx.Rngs(5), nnx.Variable(jnp.zeros(()))

    def fn(module, rngs, counter, x):
        counter[...] += 1
        return module.up(x) * jax.random.bernoulli(rngs.dropout(), 0.5, (x.shape[0], 16))

    quantized = jaxq.quantize(fn, jaxq.w8a8())
    first, second = quantized(module, rngs, counter, x), quantized(module, rngs, counter, x)
    assert not np.array_equal(first, second)
    assert float(counter[...]) == 2


def test_a_variable_may_hold_a_tree(x):
    class Counts(nnx.Module):
        def __init__(self):
            self.seen = nnx.Variable({"a": jnp.zeros(()), "b": jnp.ones(())})
            self.up = nnx.Linear(8, 16, rngs=nnx.Rngs(0))

        def __call__(self, x):
            value = self.seen.get_value()
            self.seen.set_value({**value, "b": value["b"] + 1})
            return self.up(x)

    module = Counts()
    jaxq.quantize(run, jaxq.w8a8())(module, x)
    assert {name: float(v) for name, v in module.seen.get_value().items()} == {"a": 0.0, "b": 2.0}


def test_state_that_cannot_leave_is_an_error(x):
    class Loose(nnx.Module):
        def __init__(self):
            self.calls = nnx.Variable(0)
            self.array = nnx.data(jnp.zeros(()))

    def counts(module, x):
        module.calls.set_value(module.calls.get_value() + 1)
        return x

    def adds(module, x):
        module.array = module.array + 1
        return x

    with pytest.raises(ValueError, match="Python value"):
        jaxq.quantize(counts, None)(Loose(), x)
    with pytest.raises(ValueError, match=r"not in an nnx\.Variable"):
        jaxq.quantize(adds, None)(Loose(), x)

    class Twice(nnx.Module):
        def __init__(self):
            self.a = self.b = Counter()

    class Counter(nnx.Module):
        def __init__(self):
            self.n = nnx.Variable(jnp.zeros(()))

    def both(module, x):
        module.a.n[...] += 1
        module.b.n[...] += 1
        return x

    with pytest.raises(ValueError, match="stands twice"):
        jaxq.quantize(both, None)(Twice(), x)
