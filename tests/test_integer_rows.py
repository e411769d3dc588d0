"""Softmax, norms and embeddings in integers: Python's integers, published errors, and the functions that they are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import integers
import jaxq
from inspection import traced
from jaxq.integer.audit import floats
from jaxq.integer.norms import isqrt, mean, normalized
from jaxq.integer.softmax import exp2, log2, log_sum_exp, softmax
from jaxq.integer.values import Coded
from random_nets import grid

pytestmark = pytest.mark.shared

STATIC = jaxq.w8a8(static=True)
RNG = np.random.default_rng(0)


def coded(codes, scale, reach=None):
    codes = np.asarray(codes, np.int64)
    reach = np.full((1,) * codes.ndim, reach or np.abs(codes).max())
    return Coded(jnp.asarray(codes, jnp.int32), np.full((1,) * codes.ndim, scale), -reach, reach)


def held(v):
    return integers.Held(np.asarray(v.codes, np.int64), v.scale, v.low, v.high)


def rows_of(length, seed, count=24):
    """Return rows from one step to thirty bits, some of them all alike, one all zero."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.6, 2.0**29 / 4, count)[:, None]
    rows = np.clip(np.rint((rng.normal(size=(count, length)) + rng.normal(size=(count, 1))) * sizes), -(2**29), 2**29)
    rows[1], rows[5] = 0, rows[5, :1]
    return rows.astype(np.int64)


# --- functions of integers -------------------------------------------------------------------------------------------


def test_square_roots_are_those_of_python():
    every = np.arange(2**20, dtype=np.uint32)
    drawn = np.concatenate([RNG.integers(0, 2**32, 10**6, np.uint32), np.uint32([2**32 - 1, 2**32 - 2**17])])
    for x in (every, drawn):
        found = np.asarray(jax.jit(isqrt)(x), np.uint64)
        np.testing.assert_array_equal(found, [math.isqrt(n) for n in x.tolist()])


def test_powers_of_two_are_near_and_those_of_python():
    x = np.unique(np.concatenate([-RNG.integers(0, 2**19, 4000), -np.arange(300), [-(2**31)]]))
    for bits in (12, 15, 22, 29):
        found = np.asarray(exp2(jnp.asarray(x, jnp.int32), bits))
        np.testing.assert_array_equal(found, [integers.power_of_two(n, bits) for n in x])
    assert np.abs(found / 2**29 - 2.0 ** (x / 2**15)).max() < 2e-4  # I-BERT's polynomial: 1.9e-3


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_means_are_rounded_to_nearest(length):
    codes = rows_of(length, length)
    found = np.asarray(mean(jnp.asarray(codes, jnp.int32), (1,)))[:, 0]
    np.testing.assert_array_equal(found, [(sum(row) + length // 2) // length for row in codes.tolist()])


@pytest.mark.parametrize(("length", "slope"), [(1, 1.0), (7, 0.25), (64, -2.0), (300, 1.0)])
def test_softmax_is_pythons_and_within_a_thousandth(length, slope):
    codes, scale = rows_of(length, length), 2.0**-12
    v = coded(codes, scale, 2**30)
    out = softmax(v, slope, (1,))
    np.testing.assert_array_equal(out.codes, integers.softmax(held(v), slope).codes)
    z = slope * scale * codes
    true = np.exp(z - z.max(-1, keepdims=True))
    np.testing.assert_allclose(out.codes * out.scale, true / true.sum(-1, keepdims=True), atol=5e-4)


def test_logarithms_are_near_and_those_of_python():
    x = np.unique(np.concatenate([np.arange(1, 5000), np.geomspace(1, 2**31 - 1, 20_000).astype(np.int64)]))
    found = np.asarray(log2(jnp.asarray(x, jnp.int32)))
    np.testing.assert_array_equal(found, [integers.logarithm(n) for n in x])
    assert np.abs(found - 2**15 * np.log2(x)).max() < 3


@pytest.mark.parametrize("length", [1, 7, 64, 300])
def test_sums_of_powers_have_the_logarithms_of_python(length):
    codes, scale = rows_of(length, length), 2.0**-12
    v = coded(codes, scale, 2**30)
    out = log_sum_exp(v, (1,), shifted=True)
    np.testing.assert_array_equal(out.codes, integers.log_sum_exp(held(v)))
    z, top = scale * codes, scale * codes.max(-1, keepdims=True)
    true = np.log(np.exp(z - top).sum(-1, keepdims=True))
    np.testing.assert_allclose(out.codes * out.scale, true, atol=5e-4)
    whole = log_sum_exp(v, (1,), shifted=False)
    np.testing.assert_allclose(whole.codes * whole.scale, true + top, atol=6e-4)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5, 10.0])
@pytest.mark.parametrize("length", [2, 7, 384, 4096])
def test_norms_are_pythons_and_near_the_real_ones(length, epsilon, centered):
    codes, scale = rows_of(length, length), 2.0**-12
    v = coded(codes, scale, 2**30 - 1)
    out = normalized(v, (1,), centered=centered, epsilon=epsilon)
    np.testing.assert_array_equal(out.codes, integers.norm(held(v), epsilon, centered).codes)
    x = codes.astype(np.float64)
    d = x - np.floor(x.mean(-1, keepdims=True) + 0.5) if centered else x
    square = (d * d).mean(-1, keepdims=True) + epsilon / scale**2
    true = np.divide(d, np.sqrt(square), out=np.zeros_like(d), where=square > 0)
    np.testing.assert_allclose(out.codes * out.scale, true, atol=2**-13 * math.sqrt(length))


@pytest.mark.parametrize("length", [384, 1024, 8192, 2**15])
def test_long_rows_keep_their_tails(length):
    """One number, and others so small that each of them is nothing beside it, and all of them are much."""
    codes = np.full((1, length), -math.log(length) * 2**12).astype(np.int64)
    codes[0, 0] = 0
    true = np.exp(codes * 2.0**-12) / np.exp(codes * 2.0**-12).sum()
    out = softmax(coded(codes, 2.0**-12), 1.0, (1,))
    np.testing.assert_allclose(out.codes * out.scale, true, atol=5e-4)
    if length > 2**14:
        return
    for size in (math.isqrt(1 << max(0, math.ceil(math.log2(length)) - 2) >> 1), 90):
        codes = np.full((1, length), size)
        codes[0, 0] = 8192
        out = normalized(coded(codes, 1.0, 2**30 - 1), (1,), centered=False, epsilon=0.0)
        true = codes / np.sqrt((codes * codes).mean())
        np.testing.assert_allclose(out.codes * out.scale, true, atol=2**-13 * math.sqrt(length))


def test_rows_that_are_too_long_or_hidden_by_an_epsilon_are_refused():
    long = coded(np.ones((1, 2**14 + 1)), 1.0)
    with pytest.raises(ValueError, match="norm over 16385 numbers"):
        normalized(long, (1,), centered=True, epsilon=0.0)
    with pytest.raises(ValueError, match="softmax of 32769 numbers"):
        softmax(coded(np.ones((1, 2**15 + 1)), 1.0), 1.0, (1,))
    with pytest.raises(ValueError, match="beside whose epsilon"):
        normalized(coded(np.ones((1, 4)), 1e-12), (1,), centered=True, epsilon=1.0)


# --- recognized, however they are written ----------------------------------------------------------------------------


def variables(module, x):
    return jax.tree.map(
        lambda w: w + 0.3 * RNG.normal(size=w.shape).astype(np.float32), module.init(jax.random.key(0), x)
    )


def linen(module, shape=(6, 32)):
    held_by = variables(module, jnp.ones(shape))
    return lambda h: module.apply(held_by, h)


def in_two_passes(h):
    centered = h - h.mean(-1, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5) * GAIN + 0.5


def by_deviation(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)


def by_power(h):
    return h * (jnp.mean(h * h, -1, keepdims=True) + 1e-6) ** -0.5 * GAIN


def by_hand(h):
    powers = jnp.exp(3 * h - jnp.max(3 * h, -1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def masked(h):
    return jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(h.shape, bool), 3), h, -jnp.inf), axis=-1)


def in_groups(h):
    rows = h.reshape(2, 2, 4, 3, 4)
    centered = rows - rows.mean((2, 3, 4), keepdims=True)
    units = centered / jnp.sqrt((centered**2).mean((2, 3, 4), keepdims=True) + 1e-5)
    return units.reshape(h.shape) * jnp.linspace(-1, 1, 8)[None, :, None, None]


def masked_scores(h):
    return jnp.where(h > -1.5, h, -1e9)


GAIN = jnp.linspace(-1.0, 2.0, 32)[None]
LAYER = linen(nn.LayerNorm())
GROUPS, INSTANCES = (linen(module, (2, 3, 4, 8)) for module in (nn.GroupNorm(4), nn.InstanceNorm()))
NNX_GROUPS = nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))
FORMS = {
    "two_passes": in_two_passes,
    "deviation": by_deviation,
    "power": by_power,
    "layer_norm": linen(nn.LayerNorm()),
    "layer_norm_slow": linen(nn.LayerNorm(use_fast_variance=False, epsilon=1e-3)),
    "rms_norm": linen(nn.RMSNorm()),
    "standardize": jax.nn.standardize,
    "length_one": lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "softmax": jax.nn.softmax,
    "over_columns": lambda h: jax.nn.softmax(h / 2, axis=0),
    "by_hand": by_hand,
    "softmin": lambda h: jax.nn.softmax(-h),
    "masked": masked,
    "hidden": lambda h: jax.nn.softmax(jnp.where(jnp.arange(32) % 3 > 0, h, -1e9)),
    "constant_mask": lambda h: jax.nn.softmax(h + jnp.where(jnp.arange(32) > 9, 0.0, -1e9)[None]),
    "infinite_mask": lambda h: jax.nn.softmax(h + jnp.where(jnp.tri(6, 32, 9, dtype=bool), 0.0, -jnp.inf)),
    "masked_twice": lambda h: jax.nn.softmax(jnp.where(jnp.arange(32) > 9, masked_scores(h), -jnp.inf)),
    "masked_and_added": lambda h: jax.nn.softmax(masked_scores(h) + jnp.where(jnp.arange(32) > 9, 0.0, -1e9)[None]),
    "clipped": lambda h: jax.nn.softmax(jnp.clip(h, -60, 60)),
    "added_mask": lambda h: jax.nn.softmax(h + jnp.where(h > 0, 0.0, -1e9)),
    "groups": linen(nn.GroupNorm(num_groups=4)),
    "softmax_of_a_function": lambda h: jax.nn.softmax(8 * jnp.tanh(h / 4)),
    "softmax_of_a_relu": lambda h: jax.nn.softmax(jax.nn.relu(h)),
    "log_softmax": jax.nn.log_softmax,
    "log_softmax_over_columns": lambda h: jax.nn.log_softmax(h / 2, axis=0),
    "log_softmax_by_hand": lambda h: h - jnp.log(jnp.exp(h).sum(-1, keepdims=True)),
    "soft_maximum": lambda h: 2 * jax.nn.logsumexp(h / 2, axis=-1),
    "soft_minimum": lambda h: -jax.nn.logsumexp(-h, axis=-1),
    "mean_surprise": lambda h: -(jax.nn.softmax(h) * jax.nn.log_softmax(h)).sum(-1),
    "norm_of_a_relu": lambda h: LAYER(jax.nn.relu(h)),
    "norm_of_a_function": lambda h: LAYER(jax.nn.gelu(h)),
    "norm_of_a_norm": lambda h: by_power(in_two_passes(h)),
    "groups_of_images": lambda h: GROUPS(h.reshape(2, 3, 4, 8)),
    "groups_of_nnx": lambda h: NNX_GROUPS(h.reshape(2, 3, 4, 8)),
    "groups_of_channels_first": lambda h: in_groups(h.reshape(2, 8, 3, 4)),
    "instances": lambda h: INSTANCES(h.reshape(2, 3, 4, 8)),
    "power_of_a_norm": lambda h: h / (h.var(-1, keepdims=True) + 1e-3) ** 0.4,
    "with_a_jump": lambda h: h / jnp.maximum(jnp.sqrt(jnp.mean(h * h, -1, keepdims=True)), 1.0),
    "all_hidden": lambda h: jax.nn.softmax(jnp.where(jnp.arange(6)[:, None] > 0, h, -1e9)),
}


@pytest.mark.parametrize("name", FORMS)
def test_softmax_and_norms_are_recognized_in_every_form(name):
    def f(params, x):
        h = x @ params["w"] + params["b"]
        return h, FORMS[name](h)

    params = {"w": RNG.normal(size=(16, 32)).astype(np.float32), "b": RNG.normal(size=(1, 32)).astype(np.float32)}
    x = jnp.asarray(RNG.normal(size=(6, 16)), jnp.float32)
    program = jaxq.integer(f, jaxq.calibrate(f, STATIC, progress=False)(params, [x]))(params, x)
    h, out = program(x)
    np.testing.assert_allclose(out, FORMS[name](h), atol=5e-4 if "soft" in name else 2e-3)
    assert not list(floats(traced(program, x)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_recognized_too(dtype):
    def f(params, x):
        h = x @ params["w"] * jnp.asarray(0.25, dtype)
        return h, jax.nn.softmax(h), nn.LayerNorm(dtype=dtype, use_scale=False, use_bias=False).apply({}, h)

    params, x = {"w": jnp.asarray(RNG.normal(size=(16, 32)), dtype)}, jnp.asarray(RNG.normal(size=(6, 16)), dtype)
    program = jaxq.integer(f, jaxq.calibrate(f, STATIC, progress=False)(params, [x]))(params, x)
    h, weights, rows = (np.asarray(a, np.float32) for a in program(x))
    np.testing.assert_allclose(weights, jax.nn.softmax(h), atol=0.02)  # of h, which was rounded on its way out
    np.testing.assert_allclose(rows, jax.nn.standardize(h, epsilon=1e-6), atol=0.04)


OTHERS = {
    "floored": lambda h: jnp.exp(h) / (jnp.exp(h).sum(-1, keepdims=True) + 1e-6),
    "far_above": lambda h: jax.nn.softmax(jnp.where(h > 0, h, 1e9)),
    "entropy": lambda h: jax.nn.softmax(h) * h / jnp.sqrt(h.var(-1, keepdims=True)),
    "sparsemax_like": lambda h: jax.nn.relu(h) / (1e-3 + jnp.sqrt(jnp.sum(h * h, -1, keepdims=True))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm_is_not_taken_for_one(name):
    def f(params, x):
        return OTHERS[name](x @ params["w"])

    params = {"w": RNG.normal(size=(16, 32)).astype(np.float32)}
    x = jnp.asarray(RNG.normal(size=(6, 16)), jnp.float32)
    plan = jaxq.calibrate(f, STATIC, progress=False)(params, [x])
    with pytest.raises(ValueError, match=r"(mul|div) at .*too fast|\w+ at .*test_integer_rows.py:\d+"):
        jaxq.integer(f, plan)(params, x)


def test_numbers_that_hide_go_nowhere_else():
    def f(params, x):
        h = x @ params["w"]
        return (jnp.where(x[:, :1] > 0, h, -1e9) + 1.0) @ params["w"]

    params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
    plan = jaxq.calibrate(f, STATIC, progress=False)(params, [x])
    with pytest.raises(ValueError, match="add at .*far from all others"):
        jaxq.integer(f, plan)(params, x)

    def g(params, x):
        return jnp.where(x[:, :1] > 0, x @ params["w"], -1e9) @ params["w"]

    plan = jaxq.calibrate(g, STATIC, progress=False)(params, [x])
    with pytest.raises(ValueError, match="site 'w.*far from all others"):
        jaxq.integer(g, plan)(params, x)


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [jaxq.int8(), jaxq.int8(per_tensor=True), jaxq.int4()])
def test_rows_of_a_table_have_one_scale(weight):
    def f(params, tokens):
        return jnp.take(params["table"], tokens, axis=0, mode="clip")

    table = RNG.normal(size=(50, 8)) * np.geomspace(0.01, 1, 50)[:, None]
    params, tokens = {"table": jnp.asarray(table, jnp.float32)}, jnp.asarray(RNG.integers(0, 50, (3, 7)))
    plan = jaxq.make_plan(f, jaxq.Scheme(weight))(params, tokens)
    program = jaxq.integer(f, plan)(params, tokens)
    reals = jaxq.quantize(f, plan)(params, tokens)
    np.testing.assert_allclose(program(tokens), reals, atol=127 * 2.0**-21 * float(jnp.max(jnp.abs(reals))))
    assert not list(floats(traced(program, tokens)))


def test_tables_that_are_no_integers_are_refused():
    def f(params, tokens):
        return params["table"][tokens]

    params, tokens = {"table": jnp.ones((5, 4))}, jnp.array([1, 2])
    plan = jaxq.make_plan(f, jaxq.Scheme(jaxq.kmeans(4)))(params, tokens)
    with pytest.raises(ValueError, match="site 'table' at .*codebook"):
        jaxq.integer(f, plan)(params, tokens)


def test_what_a_lookup_fills_in_or_rounds_is_refused():
    def f(params, tokens):
        return jnp.take(params["table"], tokens, axis=0, mode="fill", fill_value=7.0)

    params, tokens = {"table": jnp.asarray(RNG.normal(size=(50, 8)), jnp.float32)}, jnp.array([1, 50])
    with pytest.raises(ValueError, match="site 'table'.* fills in 7"):
        jaxq.integer(f, jaxq.make_plan(f, jaxq.Scheme(jaxq.int8()))(params, tokens))(params, tokens)

    def g(params, tokens):
        return jnp.take(params["table"], tokens, axis=0)

    tokens = jnp.arange(50)
    scheme = jaxq.Scheme(jaxq.int8(), out=jaxq.int8(per_tensor=True, calibrator=jaxq.minmax()))
    plan = jaxq.calibrate(g, scheme, progress=False)(params, [tokens])
    with pytest.raises(ValueError, match="site 'table'.* drop out="):
        jaxq.integer(g, plan)(params, tokens)


def test_each_kind_of_call_keeps_what_it_is():
    def f(params, x, sharp=True):
        return jax.nn.softmax((x @ params["w"]) * (2.0 if sharp else 0.5))

    params, x = {"w": jnp.eye(8)}, jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32)
    program = jaxq.integer(f, jaxq.calibrate(f, STATIC, progress=False)(params, [x]))(params, x)
    sharp, _ = program(x), program(x, sharp=False)
    n = jax.export.symbolic_shape("n")[0]
    exported = jax.export.export(jax.jit(program))(jax.ShapeDtypeStruct((n, 8), jnp.float32))
    np.testing.assert_array_equal(exported.call(x), sharp)


# --- a whole encoder -------------------------------------------------------------------------------------------------

WIDTH, TOKENS = 16, 12


def norm(x, gain, shift):
    centered = x - x.mean(-1, keepdims=True)
    return centered * lax.rsqrt((centered * centered).mean(-1, keepdims=True) + 1e-5) * gain + shift


def encoder(p, x):
    """Attention of one head and two dense layers, each after a norm and around a shortcut; and a norm."""
    x = x @ p["enter"]
    h = norm(x, p["gain"], p["shift"])
    scores = jnp.einsum("qd,kd->qk", h @ p["query"], h @ p["key"]) / math.sqrt(WIDTH)
    x = x + (jax.nn.softmax(scores) @ (h @ p["value"])) @ p["out"]
    h = norm(x, p["gain"], p["shift"])
    x = x + jax.nn.relu(h @ p["up"] + p["bias"]) @ p["down"]
    return norm(x, p["gain"], p["shift"])


def encoder_params(seed):
    rng = np.random.default_rng(seed)
    shapes = {name: (WIDTH, WIDTH) for name in ("enter", "query", "key", "value", "out")}
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH), "bias": (1, 4 * WIDTH)}
    params = {name: rng.normal(size=s) / math.sqrt(s[0]) for name, s in shapes.items()}
    params |= {"gain": 1 + 0.2 * rng.normal(size=(1, WIDTH)), "shift": 0.2 * rng.normal(size=(1, WIDTH))}
    return {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}


class Judge:
    """The encoder in Python's integers. Of jaxq only grids and the codes of weights are read."""

    def __init__(self, plan, qparams, params):
        self.plan, self.qparams, self.params = plan, qparams, params
        self.products = [site.name for site in plan.sites if site.name not in qparams]

    def grids(self, name):
        pairs = zip(self.plan[name].quantizers, self.plan.range(name), strict=False)
        return [grid(q, r) if r is not None else None for q, r in pairs]

    def dense(self, name, v):
        own, w = self.grids(name)[0], self.qparams[name].plain()
        v = integers.entered(v, own) if isinstance(v, np.ndarray) else v
        return integers.dense(v, np.asarray(w.codes, np.int64), np.asarray(w.scale, np.float64), own)

    def constant(self, name):
        return np.asarray(self.params[name], np.float64)

    def norm(self, v):
        whole = integers.norm(v, float(np.float32(1e-5)))
        return integers.plus(integers.times(whole, self.constant("gain")), self.constant("shift"))

    def __call__(self, x):
        x = self.dense("enter", np.asarray(x))
        h = self.norm(x)
        query, key, value = (self.dense(name, h) for name in ("query", "key", "value"))
        scores = integers.dot(query, key, *self.grids(self.products[0]), (1, 1))
        weights = integers.softmax(integers.times(scores, np.array(0.25)), 1.0)
        x = integers.add(x, self.dense("out", integers.dot(weights, value, *self.grids(self.products[1]), (1, 0))))
        up = integers.plus(self.dense("up", self.norm(x)), self.constant("bias"))
        return integers.left(self.norm(integers.add(x, self.dense("down", integers.clamped(up, np.maximum, 0.0)))))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))])
def test_an_encoder_is_an_encoder_of_pythons_integers(seed):
    params = encoder_params(seed)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(TOKENS, WIDTH)), jnp.float32)
    plan = jaxq.calibrate(encoder, STATIC, progress=False)(params, [x])
    qparams = jaxq.convert(encoder, plan)(params, x)
    program = jaxq.integer(encoder, plan)(qparams, x)
    judge = Judge(plan, qparams, params)
    for scale in (1.0, 1.5):  # of which the second saturates
        np.testing.assert_array_equal(program(scale * x), judge(scale * x))
    assert np.abs(program(x) - encoder(params, x)).max() < 0.3
    assert not list(floats(traced(program, x)))


class Encoder(nn.Module):
    """Two blocks of Linen's attention and a GELU network, on embedded tokens."""

    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(40, 32)(tokens) + self.param("place", nn.initializers.normal(0.5), (1, tokens.shape[1], 32))
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, mask=mask[:, None, None, :])
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.RMSNorm()(x))))
        return nn.LayerNorm()(x)


def test_an_encoder_of_linen_runs_in_integers_from_tokens_on_in_batches_of_any_size():
    model, tokens = Encoder(), jnp.asarray(RNG.integers(0, 40, (4, 10)))
    mask = jnp.arange(10)[None] < jnp.array([10, 4, 7, 9])[:, None]
    params = model.init(jax.random.key(0), tokens, mask)
    policy = jaxq.w8a8(static=True, symmetric=False)
    plan = jaxq.calibrate(model.apply, policy, progress=False)(params, [(tokens, mask)])
    program = jaxq.integer(model.apply, plan)(params, tokens, mask)
    true, imitated = model.apply(params, tokens, mask), jaxq.quantize(model.apply, plan)(params, tokens, mask)
    assert float(jnp.linalg.norm(program(tokens, mask) - true)) < 1.5 * float(jnp.linalg.norm(imitated - true)) + 0.1
    other = tokens.at[1, 4:].set(3)  # what is hidden does not count
    np.testing.assert_array_equal(program(other, mask)[1, :4], program(tokens, mask)[1, :4])
    assert not list(floats(traced(program, tokens, mask)))

    n = jax.export.symbolic_shape("n")[0]
    shapes = [jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) for a in (tokens, mask)]
    exported = jax.export.export(jax.jit(program))(*shapes)
    np.testing.assert_array_equal(exported.call(tokens[:3], mask[:3]), program(tokens[:3], mask[:3]))
