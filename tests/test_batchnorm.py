"""BatchNorm after a quantized site, trained as it is written, is what folding it into the weights gives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq

EPSILON = 1e-5


class Net(nn.Module):
    """A convolution, or a dense layer, and BatchNorm."""

    conv: bool

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False, name="site")(x) if self.conv else nn.Dense(6, name="site")(x)
        return nn.BatchNorm(use_running_average=not train, epsilon=EPSILON, name="norm")(x)


def start(conv):
    net, x = Net(conv), jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = net.init(jax.random.key(1), x)
    keys = jax.random.split(jax.random.key(2), 4)
    norm = {"scale": jax.random.normal(keys[0], (6,)), "bias": jax.random.normal(keys[1], (6,))}
    stats = {"mean": jax.random.normal(keys[2], (6,)), "var": jax.random.uniform(keys[3], (6,), minval=0.1, maxval=9)}
    return net, {"params": {**variables["params"], "norm": norm}, "batch_stats": {"norm": stats}}, x


def factor(variables):
    """Return what folding multiplies every output channel by, in float64."""
    scale, var = variables["params"]["norm"]["scale"], variables["batch_stats"]["norm"]["var"]
    return np.asarray(scale, np.float64) / np.sqrt(np.asarray(var, np.float64) + EPSILON)


@pytest.mark.parametrize("weight", [jaxq.int8(), jaxq.int4(), jaxq.ternary()], ids=repr)
@pytest.mark.parametrize("conv", [False, True])
def test_folded_weights_have_the_same_codes(conv, weight):
    net, variables, x = start(conv)
    scheme = jaxq.Scheme(weight=weight, act=jaxq.int8(per_tensor=True))
    times = factor(variables)
    folded = jax.tree.map(lambda a: a, variables)
    kernel = np.asarray(variables["params"]["site"]["kernel"], np.float64) * times
    folded["params"]["site"] = {**variables["params"]["site"], "kernel": jnp.asarray(kernel, jnp.float32)}
    ours, theirs = (
        jaxq.convert(net.apply, scheme)(v, x)["params"]["site"]["kernel"].plain() for v in (variables, folded)
    )
    different = np.mean(np.asarray(ours.codes) * np.sign(times) != np.asarray(theirs.codes))
    assert different < 2e-3  # ties, and rounding of the folded weights themselves
    np.testing.assert_allclose(theirs.scale.ravel(), ours.scale.ravel() * np.abs(times), rtol=2e-3)


@pytest.mark.parametrize("conv", [False, True])
def test_training_imitates_folding_and_the_integers_fold(conv):
    """In evaluation mode outputs are the site's sums, times one number for each channel, plus another."""
    net, variables, x = start(conv)
    plan = jaxq.calibrate(net.apply, jaxq.w8a8(static=True), progress=False)(variables, [x])
    site = jaxq.convert(net.apply, plan)(variables, x)["params"]["site"]
    weight, step = np.asarray(site["kernel"].decode(), np.float64), float(plan.range("site")[0].hi)
    step = max(step, -float(plan.range("site")[0].lo)) / 127
    codes = np.clip(np.round(np.asarray(x, np.float64) / step), -127, 127)
    times, mean = factor(variables), np.asarray(variables["batch_stats"]["norm"]["mean"], np.float64)
    bias = np.asarray(variables["params"]["norm"]["bias"], np.float64) - mean * times
    if conv:
        padded = np.pad(codes, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        sums = np.einsum("nhwcij,ijco->nhwo", windows, weight * times)
    else:
        sums, bias = codes @ (weight * times), bias + np.asarray(site["bias"], np.float64) * times
    expected = step * sums + bias
    trained = jaxq.qat(net.apply, plan)(variables, x)
    np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    integers = jaxq.integer(net.apply, plan)(variables, x)(x)
    np.testing.assert_allclose(integers, expected, atol=2e-3 * np.abs(expected).max())


def test_batch_statistics_change_no_codes():
    """What a site multiplies is the same with the statistics of the batch as with running ones."""
    net, variables, x = start(conv=True)

    def trained(variables, x):
        return net.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    def whitened(y):
        return (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + EPSILON)

    scale, bias = (np.asarray(variables["params"]["norm"][name], np.float64) for name in ("scale", "bias"))
    running = np.asarray(jaxq.qat(net.apply, jaxq.w8a8())(variables, x), np.float64)
    sums = (running - bias) / factor(variables)
    np.testing.assert_allclose(jaxq.qat(trained, jaxq.w8a8())(variables, x), whitened(sums) * scale + bias, atol=1e-3)


# --- what plans say --------------------------------------------------------------------------------------------------


def norms(f, *args):
    """Return what a plan says of the BatchNorms of a function, site by site."""
    return [site.norms for site in jaxq.make_plan(f)(*args).sites]


FOLDS, OF_BATCH = ("BatchNorm folds",), ("BatchNorm does not fold: statistics of the batch",)


def test_plans_say_which_batchnorms_fold():
    net, variables, x = start(conv=True)
    assert norms(net.apply, variables, x) == [FOLDS]
    assert norms(lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"]), variables, x) == [OF_BATCH]
    plan = jaxq.make_plan(net.apply)(variables, x)
    assert "BatchNorm folds" in str(plan) and jaxq.Plan.from_json(plan.to_json()) == plan


def test_plans_say_so_of_another_framework():
    module = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.BatchNorm(6, rngs=nnx.Rngs(0)))
    module.eval()
    assert norms(lambda m, x: m(x), module, jnp.ones((8, 4))) == [FOLDS]


def _by_hand(x, p):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + EPSILON) * p["gain"] + p["bias"]


def _in_one(x, p):
    factor = p["gain"] * (p["var"] + EPSILON) ** -0.5
    return x * factor + (p["bias"] - p["mean"] * factor)


P = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 6))}
P |= {name: jnp.ones((1, 6)) for name in ("mean", "var", "gain", "bias")}


@pytest.mark.parametrize("norm", [_by_hand, _in_one, jax.jit(_by_hand), jax.checkpoint(_in_one)])
def test_plans_say_so_of_what_is_written_by_hand(norm):
    x = jnp.ones((8, 4))
    assert norms(lambda p, x: norm(x @ p["up"] + 1, p), P, x) == [FOLDS]
    (after,) = norms(lambda p, x: norm(jax.nn.relu(x @ p["up"]), p), P, x)[0]
    assert after.startswith("BatchNorm does not fold: after max")
    (after,) = norms(lambda p, x: norm(jnp.tanh(x @ p["up"]), p), P, x)[0]
    assert after.startswith("BatchNorm does not fold: after tanh at test_batchnorm.py:")
    both = norms(lambda p, x: norm(jax.nn.relu(norm(x @ p["up"], p)) @ p["down"], p), P, x)
    assert both == [FOLDS, FOLDS]


def test_plans_say_so_of_what_runs_in_a_loop():
    def f(p, x):
        h, _ = jax.lax.scan(lambda h, layer: (jax.nn.relu(_by_hand(h @ layer["down"], layer)), None), x, p)
        return h

    stacked = jax.tree.map(lambda a: jnp.stack([a] * 3), {name: a for name, a in P.items() if name != "up"})
    assert norms(f, stacked, jnp.ones((8, 6))) == [FOLDS]


def test_other_norms_are_no_batchnorms():
    def layer_norm(x, p):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPSILON) * p["gain"]

    def scores(x, p):
        return jax.nn.softmax(x @ p["down"] / jnp.sqrt(6.0))

    assert norms(lambda p, x: scores(layer_norm(x @ p["up"], p), p), P, jnp.ones((8, 4))) == [(), ()]
    assert norms(lambda p, x: _by_hand(x, p) @ p["down"], P, jnp.ones((8, 6))) == [()]
