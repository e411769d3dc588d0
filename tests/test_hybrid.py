"""Every number format inside programs: in plans, in training, converted, calibrated, served, mixed.

A program here carries one site for each quantizer under test and returns what every site gives, so that dozens of
formats share a few compilations. The judge is float64 NumPy; of jaxq it takes `decode()` of converted weights alone,
which are themselves compared with encoders written here.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import lax

import jaxq
import oracle
from inspection import assert_bitwise, products
from jaxq import Quantizer, Scheme

WIDTH = 64
ROWS = 8

WEIGHTS = {
    "int8": jaxq.int8(),
    "int8_full": jaxq.int8(narrow=False),
    "int8_mse": jaxq.int8(fit=jaxq.mse()),
    "int8_tensor": jaxq.int8(per_tensor=True),
    "int4": jaxq.int4(),
    "int4_group": jaxq.int4(group=16),
    "int4_percentile": jaxq.int4(fit=jaxq.percentile(99.0)),
    "int2": jaxq.int2(),
    "uint8": jaxq.uint8(),
    "int16": jaxq.int16(),
    "binary": jaxq.binary(),
    "ternary": jaxq.ternary(),
    "b158": jaxq.b158(),
    "fixed8": jaxq.fixed(8, 5),
    "fixed4": jaxq.fixed(4, 2),
    "dynamic_fixed": jaxq.dynamic_fixed(8),
    "kmeans": jaxq.kmeans(16),
    "kmeans_channel": jaxq.kmeans(4, per_tensor=False),
    "nf4": jaxq.nf4(),
    "float8": jaxq.float8(),
    "bfloat16": jaxq.bfloat16(),
    "mxint8": jaxq.mxint8(),
    "mxfp4": jaxq.mxfp4(),
    "nvfp4": jaxq.nvfp4(),
}
DYNAMIC = {
    "int8": jaxq.int8(),
    "int8_asymmetric": jaxq.int8(symmetric=False),
    "int4": jaxq.int4(),
    "fixed8": jaxq.fixed(8, 6),
    "fixed4": jaxq.fixed(4, 3),
    "dynamic_fixed": jaxq.dynamic_fixed(8),
    "kmeans": jaxq.kmeans(16),
    "float8": jaxq.float8(),
    "bfloat16": jaxq.bfloat16(),
    "binary": jaxq.binary(),
    "ternary": jaxq.ternary(),
}
PER_TENSOR = ("fixed8", "fixed4", "dynamic_fixed", "kmeans", "bfloat16")
CALIBRATORS = {
    "minmax": jaxq.minmax(),
    "percentile": jaxq.percentile(98.0),
    "mse": jaxq.mse(),
    "entropy": jaxq.entropy(),
    "octav": jaxq.octav(),
    "sigmas": jaxq.sigmas(2.5),
}
STATIC = {name: jaxq.int8(per_tensor=True, calibrator=rule) for name, rule in CALIBRATORS.items()} | {
    "ema": jaxq.int8(per_tensor=True, calibrator=jaxq.ema(0.75)),
    "uint8": jaxq.uint8(per_tensor=True, calibrator=jaxq.mse()),
    "int4": jaxq.int4(per_tensor=True, calibrator=jaxq.mse()),
    "overflow_rate": jaxq.dynamic_fixed(8, calibrator=jaxq.overflow_rate(0.01)),
    "kmeans": jaxq.kmeans(16, calibrator=jaxq.minmax()),
    "float8": jaxq.float8(per_tensor=True, calibrator=jaxq.minmax()),
}


@pytest.fixture(autouse=True)
def strict_types():
    """Refuse implicit promotion of types."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weights(names, *shape, scale=0.4):
    return {name: normal(seed, *shape, scale=scale) for seed, name in enumerate(names)}


def float64(x):
    return np.asarray(x, np.float64)


# --- programs: every one returns a dict of what its sites give -------------------------------------------------------


def chain(params, x):
    """One dot after the other; what each gives, before the nonlinearity."""
    outs = {}
    for name, w in params.items():
        outs[name] = x @ w
        x = jnp.tanh(outs[name])
    return outs


def fan(params, x):
    """A layer in float, and what it gives to one dot for each quantizer."""
    h = jnp.tanh(x @ params["stem"])
    return {name: h @ w for name, w in params.items() if name != "stem"}


def dots(params, xs):
    """One dot with each input."""
    return {name: xs[name] @ w for name, w in params.items()}


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convs(params, x):
    """One convolution after the other."""
    outs = {}
    for name, w in params.items():
        outs[name] = conv(x, w)
        x = jnp.tanh(outs[name])
    return outs


def lookups(params, ids):
    """Rows of each table, and a dot with them."""
    rows = {name: table[ids] for name, table in params["table"].items()}
    return {"rows": rows, "head": {name: rows[name] @ w for name, w in params["head"].items()}}


def stack(params, x):
    """A scan over weights [L, n, n]: each quantizer has its own hidden state."""

    def body(h, layer):
        new = {name: jnp.tanh(h[name] @ w) for name, w in layer.items()}
        return new, new

    return lax.scan(body, {name: x for name in params}, params)[1]


def joined(params, x):
    """Dots with weights that are put together from two leaves."""
    return {name: x @ jnp.concatenate([p["a"], p["b"]], axis=1) for name, p in params.items()}


def by_weight(quantizers, act=None):
    return {name: Scheme(weight=q, act=act) for name, q in quantizers.items()}


def by_act(quantizers, weight=None):
    return {name: Scheme(weight=weight, act=q) for name, q in quantizers.items()}


def _mixed(names, acts):
    """Give every weight quantizer one of the activation quantizers, in turn."""
    return {name: Scheme(weight=WEIGHTS[name], act=acts[n % len(acts)]) for n, name in enumerate(names)}


def _subset(names, *shape):
    return weights(names, *shape)


X = normal(99, ROWS, WIDTH)
IMAGES = normal(98, 2, 5, 5, 8)
IDS = jnp.asarray([[0, 3, 8], [7, 1, 2]], jnp.int32)
FAN = {"stem": normal(97, WIDTH, WIDTH, scale=0.15)}
CONV = ("int8", "int4", "uint8", "int2", "binary", "ternary", "fixed8", "kmeans", "float8", "bfloat16", "int8_mse")
TABLES = ("int8", "int4", "int4_group", "int2", "uint8", "binary", "ternary", "fixed8", "kmeans", "nf4", "float8")
STACK = ("int8", "int4", "int4_group", "uint8", "binary", "ternary", "fixed8", "kmeans", "nf4", "float8", "int8_mse")
JOINED = ("int8", "int4", "int4_group", "uint8", "binary", "b158", "fixed8", "kmeans", "nf4", "mxfp4")
STATIC_ACTS = (jaxq.int8(), STATIC["minmax"], STATIC["percentile"], None, STATIC["kmeans"], DYNAMIC["dynamic_fixed"])

PROGRAMS = {
    "weights_int8": (chain, lambda: _subset(WEIGHTS, WIDTH, WIDTH), X, by_weight(WEIGHTS, jaxq.int8())),
    "weights_only": (chain, lambda: _subset(WEIGHTS, WIDTH, WIDTH), X, by_weight(WEIGHTS)),
    "dynamic": (fan, lambda: FAN | _subset(DYNAMIC, WIDTH, 6), X, {"stem": None} | by_act(DYNAMIC, jaxq.int8())),
    "static": (fan, lambda: FAN | _subset(STATIC, WIDTH, 6), X, {"stem": None} | by_act(STATIC, jaxq.int8())),
    "conv": (convs, lambda: _subset(CONV, 3, 3, 8, 8), IMAGES, _mixed(CONV, STATIC_ACTS)),
    "embedding": (
        lookups,
        lambda: {"table": _subset(TABLES, 9, WIDTH), "head": _subset(TABLES, WIDTH, 4)},
        IDS,
        {f"{kind}/{name}": Scheme(WEIGHTS[name], jaxq.int8()) for name in TABLES for kind in ("table", "head")},
    ),
    "scan": (stack, lambda: _subset(STACK, 3, WIDTH, WIDTH), X, _mixed(STACK, STATIC_ACTS)),
    "joined": (
        joined,
        lambda: {name: weights("ab", WIDTH, 6) for name in JOINED},
        X,
        {name: Scheme(weight=WEIGHTS[name], act=jaxq.int8()) for name in JOINED},
    ),
}


@functools.cache
def run(key):
    """Return a program's parameters, plan, converted parameters, and what training and serving give."""
    fn, make, x, policy = PROGRAMS[key]
    params = make()
    plan = jaxq.make_plan(fn, policy)(params, x)
    if plan.unobserved():
        plan = jaxq.calibrate(fn, plan, progress=False)(params, [x])
    plan.check(observed=True)
    converted = jaxq.convert(fn, plan)(params, x)
    train, serve = jax.jit(jaxq.qat(fn, plan)), jax.jit(jaxq.quantize(fn, plan))
    return types.SimpleNamespace(
        fn=fn, params=params, x=x, plan=plan, converted=converted, train=train, serve=serve,
        trained=train(params, x), served=serve(converted, x),
    )  # fmt: skip


def outputs():
    """Name every output of every program."""
    for key, (fn, make, x, _) in PROGRAMS.items():
        for path, _ in jax.tree_util.tree_flatten_with_path(jax.eval_shape(fn, make(), x))[0]:
            yield key, jax.tree_util.keystr(path, simple=True, separator="/")


# --- train equals serve ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, name", outputs())
def test_train_equals_serve(key, name):
    case = run(key)
    trained, served = case.trained, case.served
    for part in name.split("/"):
        trained, served = trained[part], served[part]
    assert np.isfinite(trained).all() and np.ptp(trained) > 0
    assert_bitwise(trained, served)
