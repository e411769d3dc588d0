"""BatchNorm after a quantized site, trained as it is written, is what folding it into the weights gives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
