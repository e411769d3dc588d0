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
from inspection import assert_bitwise
from jaxq import Quantizer, Scheme

pytestmark = pytest.mark.shared

WIDTH = 64
ROWS = 8

WEIGHTS = {
    "int8": jaxq.int8(),
    "int8_full": jaxq.int8(narrow=False),
    "int8_mse": jaxq.int8(fit=jaxq.mse()),
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
    "fixed_wrap": jaxq.fixed(6, 5, rounding=jaxq.Floor(), overflow=jaxq.Wrap()),
    "dynamic_fixed": jaxq.dynamic_fixed(8),
    "kmeans": jaxq.kmeans(16),
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
    "fixed8": jaxq.fixed(8, 4),
    "fixed4": jaxq.fixed(4, 0),
    "dynamic_fixed": jaxq.dynamic_fixed(8),
    "kmeans": jaxq.kmeans(16),
    "float8": jaxq.float8(),
    "bfloat16": jaxq.bfloat16(),
    "binary": jaxq.binary(),
    "ternary": jaxq.ternary(),
    "int8_group": jaxq.int8(group=16),
    "mxint8": jaxq.mxint8(),
    "mxfp8": jaxq.mxfp8(),
    "mxfp4": jaxq.mxfp4(),
    "nvfp4": jaxq.nvfp4(),
}
# A scale, of the first kind or of the second, for the whole tensor.
PER_TENSOR = ("fixed8", "fixed4", "dynamic_fixed", "kmeans", "bfloat16", "nvfp4")
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
    "uint8": jaxq.uint8(per_tensor=True, calibrator=jaxq.minmax()),
    "int4": jaxq.int4(per_tensor=True, calibrator=jaxq.mse()),
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


# --- programs: every one returns what its sites are given and what they give ------------------------------------------


def chain(params, x):
    """One dot after the other: {name: (activation, product)}."""
    outs = {}
    for name, w in params.items():
        outs[name] = (x, x @ w)
        x = jnp.tanh(outs[name][1])
    return outs


def fan(params, x):
    """One dot with the same activations for each quantizer: after a layer in float, if there is one."""
    h = tailed(x @ params["stem"]) if "stem" in params else x
    return {name: h if name == "stem" else h @ w for name, w in params.items()}


def tailed(x):
    """Return values with longer tails than a Gaussian's."""
    return x * jnp.abs(x)


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
    """Rows of each table, and a dot with all of them."""
    rows = {name: jnp.take(table, ids, axis=0) for name, table in params["table"].items()}
    return rows | {"head": sum(rows.values()) @ params["head"]}


def stack(params, x):
    """A scan over weights [L, n, n]: the hidden states [L, ...] of each quantizer."""

    def body(h, layer):
        new = {name: jnp.tanh(h[name] @ w) for name, w in layer.items()}
        return new, new

    return lax.scan(body, {name: x for name in params}, params)[1]


def joined(params, x):
    """Dots with weights that are put together from two leaves."""
    return {name: x @ jnp.concatenate([p["a"], p["b"]], axis=1) for name, p in params.items()}


X = normal(99, ROWS, WIDTH)
TAILED = tailed(X)
IMAGES = normal(98, 2, 5, 5, 8)
IDS = jnp.asarray([[0, 3, 8], [7, 1, 2]], jnp.int32)
STEM = {"stem": normal(97, WIDTH, WIDTH, scale=0.15)}
ONLY = ("int8", "int4_group", "uint8", "binary", "b158", "fixed4", "nf4", "mxfp4")
CONV = ("int8", "int4", "uint8", "binary", "fixed8", "float8")
TABLES = ("int4", "int2", "uint8", "binary", "fixed8", "kmeans", "nf4")
STACK = ("int8", "int4_group", "uint8", "binary", "kmeans", "nf4")
JOINED = ("int4_group", "uint8", "binary", "fixed4", "nf4")
ACTS = (STATIC["minmax"], jaxq.int8(), STATIC["percentile"], None, DYNAMIC["dynamic_fixed"], STATIC["float8"])
CONV_ACTS = (STATIC["minmax"], jaxq.int8(), None, STATIC["float8"], DYNAMIC["dynamic_fixed"])


def by_weight(names, acts):
    """Give every weight quantizer one of `acts`, in turn."""
    return {name: Scheme(weight=WEIGHTS[name], act=acts[n % len(acts)]) for n, name in enumerate(names)}


def by_act(quantizers):
    return {name: Scheme(weight=jaxq.int8(), act=q) for name, q in quantizers.items()}


PROGRAMS = {
    "weights": (chain, lambda: weights(WEIGHTS, WIDTH, WIDTH), X, by_weight(WEIGHTS, [jaxq.int8()])),
    "weights_only": (chain, lambda: weights(ONLY, WIDTH, WIDTH), X, by_weight(ONLY, [None])),
    "dynamic": (fan, lambda: STEM | weights(DYNAMIC, WIDTH, 6), X, {"stem": None} | by_act(DYNAMIC)),
    "static": (fan, lambda: weights(STATIC, WIDTH, 6), TAILED, by_act(STATIC)),
    "conv": (convs, lambda: weights(CONV, 3, 3, 8, 8), IMAGES, by_weight(CONV, CONV_ACTS)),
    "embedding": (
        lookups,
        lambda: {"table": weights(TABLES, 9, WIDTH), "head": normal(96, WIDTH, 4)},
        IDS,
        {"head": jaxq.w8a8()} | {f"table/{name}": Scheme(weight=WEIGHTS[name]) for name in TABLES},
    ),
    "scan": (stack, lambda: weights(STACK, 3, WIDTH, WIDTH), X, by_weight(STACK, ACTS)),
    "joined": (joined, lambda: {n: weights("ab", WIDTH, 6) for n in JOINED}, X, by_weight(JOINED, [jaxq.int8()])),
}


def paths(tree):
    """Return the leaves of a tree of dicts and tuples by their path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.cache
def case(key):
    """Return a program with its parameters, plan, converted parameters, and verbs that are compiled once."""
    fn, make, x, policy = PROGRAMS[key]
    params = make()
    made = jaxq.make_plan(fn, policy)(params, x)
    observe = jax.jit(lambda plan, params, x: jaxq.observe(fn, plan)(params, x))
    # Less than what is served, so that static ranges saturate.
    seen = x if key == "embedding" else np.float32(0.6) * x
    plan = observe(made, params, seen)[1] if made.unobserved() else made
    plan.check(observed=True)
    return types.SimpleNamespace(
        fn=fn, params=params, x=x, made=made, plan=plan, observe=observe,
        converted=jaxq.convert(fn, plan)(params, x),
        train=jax.jit(jaxq.qat(fn, plan)), serve=jax.jit(jaxq.quantize(fn, plan)),
    )  # fmt: skip


@functools.cache
def trained(key):
    return paths(case(key).train(case(key).params, case(key).x))


@functools.cache
def served(key):
    return paths(case(key).serve(case(key).converted, case(key).x))


def every_output():
    return [(key, name) for key, (fn, make, x, _) in PROGRAMS.items() for name in paths(jax.eval_shape(fn, make(), x))]


# --- train equals serve ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, name", every_output())
def test_train_equals_serve(key, name):
    train, serve = trained(key)[name], served(key)[name]
    assert np.isfinite(serve).all() and np.ptp(serve) > 0
    assert_bitwise(train, serve)


@pytest.mark.parametrize("key", PROGRAMS)
def test_every_site_has_the_format_it_was_given(key):
    plan, policy = case(key).plan, PROGRAMS[key][3]
    table = {line.split()[0]: line for line in str(plan).splitlines()[2:] if line}
    for name, rule in policy.items():
        scheme = rule.scheme if isinstance(rule, jaxq.Uniform) else rule
        assert plan[name].scheme == scheme
        wanted = [] if scheme is None else [q for q in (scheme.weight, scheme.act) if q is not None]
        assert all(repr(q) in table[name] for q in wanted)
    assert set(plan.names) == set(policy)


@pytest.mark.parametrize("key", PROGRAMS)
def test_plans_survive_json(key):
    for plan in (case(key).made, case(key).plan):
        read = jaxq.Plan.from_json(plan.to_json())
        assert read == plan
        assert_bitwise(jax.tree.leaves(read) + [X], jax.tree.leaves(plan) + [X])
    assert (case(key).made == case(key).plan) == (not jax.tree.leaves(case(key).plan))


def test_every_other_quantizer_survives_json():
    others = [
        jaxq.float16(), jaxq.float8_e5m2(), jaxq.mxfp6(), jaxq.mxfp8(), jaxq.nvfp4(32), jaxq.nf4(32),
        jaxq.ternary(0.5, group=16), jaxq.binary(group=8), jaxq.kmeans(5, group=32), jaxq.b158(per_tensor=False),
        jaxq.fixed(12, 9, rounding=jaxq.NearestAway()), jaxq.fixed(5, -2, rounding=jaxq.TowardZero()),
        jaxq.int8(fit=jaxq.entropy()), jaxq.int4(group=8, fit=jaxq.octav()), jaxq.uint8(fit=jaxq.sigmas(2.0)),
        Quantizer(jaxq.Int(3), narrow=False, power_of_two=True), Quantizer(jaxq.Levels((-1.0, 0.0, 0.5), "three")),
    ]  # fmt: skip
    moving = [
        jaxq.dynamic_fixed(8, calibrator=jaxq.overflow_rate(0.25)),
        jaxq.int4(per_tensor=True, calibrator=jaxq.ema()),
    ]
    schemes = [Scheme(weight=q) for q in others] + [Scheme(act=q) for q in moving]
    policy = {f"w{n}": scheme for n, scheme in enumerate(schemes)}
    plan = jaxq.make_plan(chain, policy)(weights(policy, WIDTH, WIDTH), X)
    read = jaxq.Plan.from_json(plan.to_json())
    assert read == plan and [d.scheme for d in read.decisions] == [policy[d.site.name] for d in plan.decisions]
    assert str(read) == str(plan)


# --- quantizers in float64: decoded values, and by how much float32 may differ where it rounds the other way ----------


def integers(x, scale, zero, low, high):
    reals = x / scale
    step = np.broadcast_to(scale, x.shape)
    tie = oracle.is_near_tie(reals, max(1e-4, 3e-7 * high))
    doubt = np.where(tie & (reals > low - zero - 1) & (reals < high - zero + 1), step, 0)
    return (oracle.encode(x, scale, zero, low, high) - zero) * scale, doubt


def rows_of(x, axis, group):
    """Return `x` with the blocks that share a scale along axis 1 of [*, block, *]."""
    count = 1 if group is None else x.shape[axis] // group
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])


def absmax(x, axis):
    return np.abs(x).max(axis, keepdims=True)


def symmetric(bits, low=None):
    high = 2 ** (bits - 1) - 1
    low = -high if low is None else low

    def quantizer(x, axis, ends=None):
        lo, hi = ends or (np.minimum(x.min(axis, keepdims=True), 0), np.maximum(x.max(axis, keepdims=True), 0))
        return integers(x, np.maximum(lo / low, hi / high), 0, low, high)

    return quantizer


def asymmetric(low, high):
    def quantizer(x, axis, ends=None):
        lo, hi = ends or (np.minimum(x.min(axis, keepdims=True), 0), np.maximum(x.max(axis, keepdims=True), 0))
        scale = (hi - lo) / (high - low)
        assert not oracle.is_near_tie(low - lo / scale).any(), "choose another seed"
        return integers(x, scale, np.round(low - lo / scale), low, high)

    return quantizer


def fixed_point(bits, frac_bits):
    def quantizer(x, axis, ends=None):
        codes = np.clip(np.round(x * 2.0**frac_bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return codes * 2.0**-frac_bits, 0 * x

    return quantizer


def wrapped(x, axis, ends=None):
    """Drop the bits below 2^-5 and above the sixth, in two's complement."""
    return ((np.floor(x * 32) + 32) % 64 - 32) / 32, 0 * x


def power_of_two(x, axis, ends=None):
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / 127))
    return np.clip(np.round(x / scale), -127, 127) * scale, 0 * x


def small_float(dtype, scale, largest):
    """Return the encoder to a float of few bits, scaled by `scale(x, axis)`; beyond the largest it saturates."""

    def quantizer(x, axis, ends=None):
        s = scale(x, axis) if ends is None else max(-ends[0], ends[1]) / largest

        def near(nudge):
            return np.clip(x / s * nudge, -largest, largest).astype(np.float32).astype(dtype).astype(np.float64) * s

        return near(1), np.abs(near(1 + 1e-6) - near(1 - 1e-6))

    return quantizer


def micro(x, axis, emax):
    """Return the shared scale of MX: the power of two of the largest value, less the format's own."""
    return 2.0 ** (np.floor(np.log2(absmax(x, axis))) - emax)


def nested(x, axis):
    """Return NVFP4's scales: float8 multiples of one float32."""
    outer = np.abs(x).max() / (448 * 6)
    return (absmax(x, axis) / 6 / outer).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * outer


def mx_int8(x, axis, ends=None):
    return integers(x, micro(x, axis, 6), 0, -127, 127)


def signs(x, axis, ends=None):
    return np.where(x < 0, -1.0, 1.0) * np.abs(x).mean(axis, keepdims=True), 0 * x


def twn(x, axis, ends=None):
    limit = 0.7 * np.abs(x).mean(axis, keepdims=True)
    assert (np.abs(np.abs(x) / limit - 1) > 1e-6).all(), "choose another seed"
    large = np.abs(x) > limit
    return np.sign(x) * large * (np.abs(x) * large).sum(axis, keepdims=True) / large.sum(axis, keepdims=True), 0 * x


def bitnet(x, axis, ends=None):
    return integers(x, np.abs(x).mean(keepdims=True), 0, -1, 1)


def bfloat(x, axis, ends=None):
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64), 0 * x


# Dettmers et al. 2023, appendix E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def normal_float(x, axis, ends=None):
    scale = absmax(x, axis)
    distance = np.abs((x / scale)[..., None] - NF4)
    first, second = np.partition(distance, 1, axis=-1)[..., :2].transpose(-1, *range(x.ndim))
    gap = np.where(second - first < 1e-5, 0.4, 0) * scale
    return NF4[distance.argmin(-1)] * scale, gap


E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
JUDGES = {
    "int8": symmetric(8),
    "int8_asymmetric": asymmetric(-128, 127),
    "int8_full": symmetric(8, -128),
    "int8_group": symmetric(8),
    "int4": symmetric(4),
    "int4_group": symmetric(4),
    "int2": symmetric(2),
    "int16": symmetric(16),
    "uint8": asymmetric(0, 255),
    "binary": signs,
    "ternary": twn,
    "b158": bitnet,
    "fixed8": fixed_point(8, 5),
    "fixed4": fixed_point(4, 2),
    "fixed_wrap": wrapped,
    "dynamic_fixed": power_of_two,
    "nf4": normal_float,
    "float8": small_float(E4M3, lambda x, axis: absmax(x, axis) / 448, 448),
    "bfloat16": bfloat,
    "mxint8": mx_int8,
    "mxfp8": small_float(E4M3, lambda x, axis: micro(x, axis, 8), 448),
    "mxfp4": small_float(E2M1, lambda x, axis: micro(x, axis, 2), 6),
    "nvfp4": small_float(E2M1, nested, 6),
}


def judged(name, x, axis, ends=None, group=None):
    """Return the decoded values of `x` with one scale for all of `axis` (or group of it), and their doubt."""
    x = float64(x)
    blocks = rows_of(x, axis, group)
    values, doubt = JUDGES[name](blocks, axis + 1, ends)
    return values.reshape(x.shape), np.broadcast_to(doubt, blocks.shape).reshape(x.shape)


def ends_of(plan, name, layer=()):
    """Return the ends of the static range of a site's activations."""
    (r,) = (r for r in plan.range(name) if r is not None)
    return float(r.lo[layer]), float(r.hi[layer])


def assert_product(got, x, w, doubt):
    """Assert that `got` is x @ w, within float32 rounding and the doubts about x."""
    room = 2e-6 * (np.abs(x) @ np.abs(w)) + 1.01 * doubt @ np.abs(w)
    assert (np.abs(float64(got) - x @ w) <= room).all()


# --- correctness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name in JUDGES])
def test_weights_decode_to_what_their_format_says(name):
    w = case("weights").params[name]
    values, doubt = judged(name, w, 0, group=WEIGHTS[name].group)
    got = float64(case("weights").converted[name].decode())
    assert (np.abs(got - values) <= 1e-6 * np.abs(values).max() + 1.01 * doubt).all()
    assert (doubt > 0).mean() < 0.05


def assert_codebook(x, values, size):
    """Assert that values are at most `size` centroids: x goes to the nearest, and each is the mean of its members."""
    x, values = float64(x).ravel(), float64(values).ravel()
    centroids, members = np.unique(values, return_inverse=True)
    assert size / 2 < len(centroids) <= size
    nearest = np.abs(x[:, None] - centroids).min(1)
    assert (np.abs(x - values) <= nearest + 1e-6 * np.abs(x).max()).all()
    means = np.bincount(members, x) / np.bincount(members)
    return np.abs(means - centroids).max() / np.abs(x).max()


def test_kmeans_weights_are_the_means_of_what_is_nearest():
    w, q = case("weights").params["kmeans"], case("weights").converted["kmeans"]
    assert assert_codebook(w, q.decode(), 16) < 2e-3
    assert set(np.unique(q.decode())) <= set(np.unique(q.table))


def test_fitted_weights_beat_those_that_cover_everything():
    w = float64(case("weights").params["int8_mse"])
    got = float64(case("weights").converted["int8_mse"].decode())
    scales = np.abs(w).max(0) / 127 * np.linspace(0.5, 1.2, 400)[:, None, None]
    tried = ((np.clip(np.round(w / scales), -127, 127) * scales - w) ** 2).sum(1)
    covering = np.argmin(np.abs(np.linspace(0.5, 1.2, 400) - 1))
    paid = ((got - w) ** 2).sum(0)
    assert (paid <= 1.01 * tried[covering]).all() and paid.sum() < 0.95 * tried[covering].sum()
    assert paid.sum() <= 1.05 * tried.min(0).sum()


def test_percentile_weights_keep_the_central_part():
    w, q = float64(case("weights").params["int4_percentile"]), case("weights").converted["int4_percentile"]
    reach = np.maximum(-np.percentile(w, 0.5, axis=0), np.percentile(w, 99.5, axis=0))
    bins = 2 ** np.ceil(np.log2(np.abs(w).max(0))) / 2048
    assert (np.abs(7 * float64(q.scale)[0] - reach) <= bins).all()
    assert (np.abs(q.codes).max(0) == 7).all() and (np.abs(w).max(0) > 7 * float64(q.scale)[0]).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_times_int8_activations(name):
    x, got = served("weights")[f"{name}/0"], served("weights")[f"{name}/1"]
    values, doubt = judged("int8", x, 1)
    assert_product(got, values, float64(case("weights").converted[name].decode()), doubt)


@pytest.mark.parametrize("name", ONLY)
def test_weights_times_float_activations(name):
    x, got = float64(served("weights_only")[f"{name}/0"]), served("weights_only")[f"{name}/1"]
    assert_product(got, x, float64(case("weights_only").converted[name].decode()), 0 * x)


@pytest.mark.parametrize("name", [name for name in DYNAMIC if name != "kmeans"])
def test_dynamic_activations(name):
    h, got = served("dynamic")["stem"], served("dynamic")[name]
    exact = {"fixed8": fixed_point(8, 4), "fixed4": fixed_point(4, 0)}.get(name)
    values, doubt = exact(float64(h), 1) if exact else judged(name, h, 1, group=DYNAMIC[name].group)
    assert_product(got, values, float64(case("dynamic").converted[name].decode()), doubt)


@pytest.mark.parametrize("name", [name for name in STATIC if name != "kmeans"])
def test_static_activations(name):
    ends, got = ends_of(case("static").plan, name), served("static")[name]
    assert ends[0] > TAILED.min() or ends[1] < TAILED.max(), "nothing saturates"
    values, doubt = judged(name if name in JUDGES else "int8", TAILED, 1, ends)
    assert_product(got, values, float64(case("static").converted[name].decode()), doubt)


PROBES = {
    "dynamic": jaxq.kmeans(16),
    "static": jaxq.kmeans(16, calibrator=jaxq.minmax()),
    "power": jaxq.dynamic_fixed(8, calibrator=jaxq.overflow_rate(0.01)),
}


@functools.cache
def probe():
    """Return `(plan, observe, decoded)` of float identities: what they give is the decoded activations."""
    eye = {name: jnp.eye(16, dtype=jnp.float32) for name in PROBES}
    xs = {name: normal(5, 128, 16) for name in PROBES}
    plan = jaxq.make_plan(dots, {name: Scheme(act=q) for name, q in PROBES.items()})(eye, xs)
    compiled = jax.jit(lambda plan, xs: jaxq.observe(dots, plan)(eye, xs)[1])
    decoded = jax.jit(lambda plan, xs: jaxq.qat(dots, plan)(eye, xs))

    def observe(plan, xs):
        # Whether it keeps strict types is for a test of its own to say.
        with jax.numpy_dtype_promotion("standard"):
            return compiled(plan, xs)

    return plan, observe, decoded


def the_same(x):
    return {name: x for name in PROBES}


def test_kmeans_activations_are_the_means_of_what_is_nearest():
    plan, observe, decoded = probe()
    x, other = normal(6, 128, 16), normal(7, 128, 16)
    for batch in (x, other):
        plan = observe(plan, the_same(batch))
    got = decoded(plan, the_same(x))
    assert assert_codebook(x, got["dynamic"], 16) < 2e-3
    assert_codebook(x, got["static"], 16)
    # A table for both batches: its centroids are the means of both, within a bin of the histogram.
    both = decoded(plan, the_same(other))["static"]
    together = np.concatenate([x, other]), np.concatenate([got["static"], both])
    assert assert_codebook(*together, 16) < 4e-3
    # Values beyond all that was seen go to the outermost centroids.
    far = decoded(plan, the_same(100 * x))["static"]
    assert far.max() == together[1].max() and far.min() == together[1].min()


# --- what converted weights take -------------------------------------------------------------------------------------

BITS = {"int8": 8, "int4": 4, "int4_group": 4, "int2": 2, "ternary": 2, "b158": 2, "binary": 1, "kmeans": 4, "nf4": 4}
BITS |= {"uint8": 8, "fixed8": 8, "fixed4": 4, "float8": 8, "mxint8": 8, "mxfp4": 4, "nvfp4": 4, "int16": 16}


@pytest.mark.parametrize("name", BITS)
def test_converted_bytes(name):
    q, count = case("weights").converted[name], WIDTH * WIDTH
    group = WEIGHTS[name].group or WIDTH
    blocks = 1 if WEIGHTS[name].per_tensor else count // group
    scale = {"mxint8": 1, "mxfp4": 1, "nvfp4": 1}.get(name, 4) * blocks
    extra = {"kmeans": 16 * 4, "uint8": 2 * scale, "nvfp4": scale + 4}.get(name, scale)
    assert count * BITS[name] // 8 < q.nbytes <= count * BITS[name] // 8 + extra
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    assert (q.shape, q.dtype) == ((WIDTH, WIDTH), jnp.float32)


@pytest.mark.parametrize("key", ["embedding", "scan", "joined"])
def test_packed_bytes_wherever_the_weight_is(key):
    tree = case(key).converted["table"] if key == "embedding" else case(key).converted
    leaves = case(key).params["table"] if key == "embedding" else case(key).params
    for name in set(tree) & set(BITS):
        count = sum(leaf.size for leaf in jax.tree.leaves(leaves[name]))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(tree[name]))
        codes = count * BITS[name] / 8
        assert codes < held <= codes + count / 64 * 4 * 5 + 3 * 64, name


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_packed_tables(name):
    table = case("embedding").converted["table"][name]
    got = served("embedding")[name]
    assert_bitwise(got, np.asarray(table.decode())[np.asarray(IDS)])
    if name in JUDGES:
        values, doubt = judged(name, case("embedding").params["table"][name], 1, group=WEIGHTS[name].group)
        assert (np.abs(values[np.asarray(IDS)] - got) <= 1e-6 * np.abs(values).max() + doubt[np.asarray(IDS)]).all()


@functools.cache
def out_of_bounds():
    """Return rows {mode: {name: rows}} for indices beyond the last, served and trained, the tables, and the indices."""
    names, modes = ("int8", "int4", "binary", "uint8", "nf4"), ("fill", "clip")
    ids = jnp.asarray([0, 8, 9, 100, -1, -9, -10], jnp.int32)

    def fn(params, ids):
        return {mode: {n: jnp.take(t, ids, axis=0, mode=mode) for n, t in params.items()} for mode in modes}

    params = weights(names, 9, WIDTH)

    def policy(site):
        return Scheme(weight=WEIGHTS[site.weight.origins[0]])

    converted = jaxq.convert(fn, policy)(params, ids)
    return (
        jax.jit(jaxq.quantize(fn, policy))(converted, ids),
        jax.jit(jaxq.qat(fn, policy))(params, ids),
        converted,
        ids,
    )


@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.parametrize("name", ["int8", "int4", "binary", "uint8", "nf4"])
def test_lookups_out_of_bounds(name, mode):
    served, trained, converted, ids = out_of_bounds()
    serve = served[mode][name]
    assert_bitwise(serve, trained[mode][name])
    assert_bitwise(serve, jnp.take(converted[name].decode(), ids, axis=0, mode=mode))
    assert np.isnan(serve).all(1).tolist() == [mode == "fill" and beyond for beyond in (0, 0, 1, 1, 0, 0, 1)]


# --- static calibration ----------------------------------------------------------------------------------------------


def batch(seed, rows=ROWS, scale=1.0):
    return tailed(normal(seed, rows, WIDTH, scale=scale))


BATCHES = [batch(300, scale=0.5), batch(301), batch(302, scale=1.5), batch(303, scale=0.8)]


def observed(batches):
    """Return the plan of `static` after some batches, all of the shape that is compiled already."""
    plan = case("static").made
    for x in batches:
        plan = case("static").observe(plan, case("static").params, x)[1]
    return plan


@functools.cache
def seen():
    return observed(BATCHES)


def knowledge(plan, name):
    """Return all that a plan knows of a site's activations, but how many batches it took."""
    (r,) = (r for r in plan.range(name) if r is not None)
    return r.lo, r.hi, r.histogram


AT_ONCE = ("minmax", "percentile", "mse", "kmeans")


@pytest.mark.parametrize("name", [*CALIBRATORS, "uint8", "int4", "kmeans", "float8"])
def test_ranges_depend_on_neither_order_nor_partition(name):
    assert_bitwise(knowledge(seen(), name), knowledge(observed(BATCHES[::-1]), name))
    rows = np.random.default_rng(0).permutation(np.concatenate(BATCHES))
    assert_bitwise(knowledge(seen(), name), knowledge(observed(jnp.asarray(x) for x in np.split(rows, 4)), name))
    if name in AT_ONCE:
        assert_bitwise(knowledge(seen(), name), knowledge(_at_once(), name))


@functools.cache
def _at_once():
    """Return a plan that has seen all batches as one; the other calibrators look at the same histogram."""
    params = {name: case("static").params[name] for name in AT_ONCE}
    everything = jnp.concatenate(BATCHES)
    plan = jaxq.make_plan(fan, by_act({name: STATIC[name] for name in AT_ONCE}))(params, everything)
    return jax.jit(jaxq.observe(fan, plan))(params, everything)[1]


def test_moving_averages_depend_on_the_order_of_batches():
    lo, hi = (0.0, 0.0)
    for number, x in enumerate(BATCHES):
        keep = 0.75 if number else 0.0
        lo, hi = keep * lo + (1 - keep) * float(x.min()), keep * hi + (1 - keep) * float(x.max())
    np.testing.assert_allclose(ends_of(seen(), "ema"), (lo, hi), rtol=1e-6)
    assert ends_of(observed(BATCHES[::-1]), "ema") != ends_of(seen(), "ema")


def test_a_plan_does_not_grow_with_the_batches():
    many = observed(batch(400 + n) for n in range(50))
    once = observed(BATCHES[:1])
    sizes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(plan)] for plan in (case("static").made, once, many)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert {dtype for _, dtype in sizes[0]} == {np.dtype(np.float32)}
    assert sum(math.prod(shape) for shape, _ in sizes[0]) < len(STATIC) * 4200
    for plan, count in ((once, 1), (many, 50)):
        for r in (plan.range("mse")[0], plan.range("kmeans")[0], plan.range("minmax")[0]):
            assert r.count == count and (r.histogram is None or r.histogram.counts.sum() == count * TAILED.size)


def test_ranges_are_those_of_all_values():
    values = np.sort(float64(jnp.concatenate(BATCHES)).ravel())
    width = 2 ** np.ceil(np.log2(np.abs(values).max())) / 2048
    ends = {name: ends_of(seen(), name) for name in STATIC}
    assert ends["minmax"] == ends["float8"] == ends["kmeans"] == (values[0], values[-1])
    np.testing.assert_allclose(ends["percentile"], np.percentile(values, (1, 99)), rtol=0, atol=width)
    mean, reach = values.mean(), 2.5 * values.std()
    np.testing.assert_allclose(ends["sigmas"], (mean - reach, mean + reach), rtol=0, atol=width)
    assert ends["entropy"][1] == -ends["entropy"][0] and 0.1 * values[-1] < ends["entropy"][1] < values[-1]


def test_octav_balances_clipping_and_rounding():
    values, s = float64(jnp.concatenate(BATCHES)).ravel(), 0.0
    size = np.abs(values)
    for _ in range(100):
        s = (size * (size > s)).mean() / (4.0**-8 / 3 * (size <= s).mean() + (size > s).mean())
    width = 2 ** np.ceil(np.log2(size.max())) / 2048
    expected = max(-s, values.min()), min(s, values.max())
    np.testing.assert_allclose(ends_of(seen(), "octav"), expected, rtol=0, atol=4 * width)


@pytest.mark.parametrize("name, bits", [("mse", 8), ("int4", 4)])
def test_least_error_ranges(name, bits):
    values, high = float64(jnp.concatenate(BATCHES)), 2 ** (bits - 1) - 1

    def error(reach):
        scale = reach / high
        return ((np.clip(np.round(values / scale), -high, high) * scale - values) ** 2).mean()

    lo, hi = ends_of(seen(), name)
    assert lo == -hi < 0
    best = min(error(np.abs(values).max() * part) for part in np.linspace(0.1, 1, 500))
    assert error(hi) <= 1.03 * best
    assert bits == 8 or error(hi) < 0.7 * error(np.abs(values).max())


def test_stacked_layers_have_a_range_each():
    scan = case("scan")
    x = 0.6 * np.asarray(scan.x, np.float32)
    states = jax.jit(scan.fn)(scan.params, x)
    static = {name: rule.act for name, rule in PROGRAMS["scan"][3].items() if rule.act and rule.act.static}
    assert {"int8", "uint8", "nf4"} == set(static)
    for name, quantizer in static.items():
        (r,) = (r for r in scan.plan.range(name) if r is not None)
        assert r.lo.shape == r.hi.shape == r.count.shape == (3,) and (r.count == 1).all()
        for layer, values in enumerate([x, *np.asarray(states[name][:-1])]):
            percent = (1, 99) if quantizer == STATIC["percentile"] else (0, 100)
            expected = np.percentile(float64(values), percent)
            width = 2 ** np.ceil(np.log2(np.abs(values).max())) / 2048 if quantizer.counts else 1e-6
            np.testing.assert_allclose(ends_of(scan.plan, name, layer), expected, rtol=0, atol=width)
        if quantizer.counts:
            assert r.histogram.counts.shape[0] == 3 and (r.histogram.counts.sum(1) == x.size).all()


def branching(params, x, steps, flag):
    """A while loop over one weight, and one of two branches."""

    def body(carry):
        step, h, trail = carry
        new = jnp.float32(1.2) * (h @ params["loop"])
        return step + 1, new, lax.dynamic_update_index_in_dim(trail, h, step, 0)

    trail = jnp.zeros((4, *x.shape), x.dtype)
    _, h, trail = lax.while_loop(lambda carry: carry[0] < steps, body, (jnp.int32(0), x, trail))
    taken = lax.cond(flag, lambda h: h @ params["yes"], lambda h: h @ params["no"], h)
    return {"trail": trail, "last": h, "taken": taken}


def test_observing_inside_loops_and_branches():
    params = weights(("loop", "yes", "no"), 16, 16, scale=0.3)
    quantizer = jaxq.int8(per_tensor=True, calibrator=jaxq.percentile(90.0))
    policy = {"loop": Scheme(jaxq.fixed(8, 6), quantizer), "*": Scheme(jaxq.binary(), STATIC["float8"])}
    x, steps = normal(1, ROWS, 16), jnp.int32(3)
    blank = jaxq.make_plan(branching, policy)(params, x, steps, jnp.bool_(True))
    observe = jax.jit(lambda plan, flag: jaxq.observe(branching, plan)(params, x, steps, flag))
    out, plan = observe(blank, jnp.bool_(True))
    (loop,) = (r for r in plan.range("loop") if r is not None)
    trail = float64(out["trail"][:3])
    assert loop.histogram.counts.sum() == trail.size
    width = 2 ** np.ceil(np.log2(np.abs(trail).max())) / 2048
    np.testing.assert_allclose((loop.lo, loop.hi), np.percentile(trail, (5, 95)), rtol=0, atol=width)
    assert plan.unobserved() == ["no"]
    assert ends_of(plan, "yes") == (out["last"].min(), out["last"].max())
    both = observe(plan, jnp.bool_(False))[1]
    assert not both.unobserved()
    assert_bitwise(knowledge(both, "yes"), knowledge(plan, "yes"))
    assert_bitwise(knowledge(both, "no"), knowledge(both, "yes"))
    serve, train = jax.jit(jaxq.quantize(branching, both)), jax.jit(jaxq.qat(branching, both))
    converted = jaxq.convert(branching, both)(params, x, steps, jnp.bool_(True))
    assert_bitwise(train(params, x, steps, jnp.bool_(False)), serve(converted, x, steps, jnp.bool_(False)))


def test_calibrating_compiles_nothing_after_the_first_batches(caplog):
    def f(params, x):
        return x @ params["w"]

    params, x = {"w": normal(0, 16, 4)}, normal(1, ROWS, 16)
    plan = jaxq.make_plan(f, jaxq.w8a8(static=True, calibrator=jaxq.octav()))(params, x)
    plan = jaxq.calibrate(f, plan, progress=False)(params, [x, x])
    with jax.log_compiles():
        jaxq.calibrate(f, plan, progress=False)(params, [x, x])
    assert not [record.message for record in caplog.records if record.message.startswith("Compiling")]


def test_the_whole_calibration_runs_inside_jit():
    """As a scan over all batches, the plan its carry; outputs too."""
    params, batches = weights(("ema", "percentile"), WIDTH, 6), jnp.stack([TAILED, -2 * TAILED[::-1], 0.5 * TAILED])
    policy = {name: Scheme(act=STATIC[name], out=STATIC["minmax"]) for name in params}
    plan = jaxq.make_plan(fan, policy)(params, TAILED)

    def step(plan, x):
        return jaxq.observe(fan, plan)(params, x)[1], None

    whole = jax.jit(lambda plan, batches: lax.scan(step, plan, batches)[0])(plan, batches)
    loop = jaxq.calibrate(fan, plan, progress=False)(params, list(batches))
    assert not whole.unobserved() and whole.decisions == loop.decisions
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(loop), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# --- dynamic fixed point that follows overflow -----------------------------------------------------------------------

RATE = 0.01


def test_overflow_keeps_strict_types():
    def f(params, x):
        return x @ params["w"]

    params, x = {"w": normal(0, 16, 4)}, normal(1, ROWS, 16)
    plan = jaxq.make_plan(f, Scheme(act=PROBES["power"]))(params, x)
    jax.eval_shape(lambda plan: jaxq.observe(f, plan)(params, x), plan)


def reach(plan):
    """Return how far the codes of a plan reach, 128 times the step between what they decode to."""
    ramps = [np.linspace(-end, end, 64 * 16, dtype=np.float32) for end in (2, 100)]
    ramp = jnp.asarray(np.concatenate(ramps).reshape(128, 16))
    levels = float64(np.unique(probe()[2](plan, the_same(ramp))["power"]))
    step = np.diff(levels).min()
    assert math.log2(step) == round(math.log2(step)) and levels[-1] == -levels[0] == 127 * step
    return 128 * step


def reaches(batches):
    """Return how far the codes reach after each of some batches."""
    plan, observe, _ = probe()
    found = []
    for x in batches:
        plan = observe(plan, the_same(x))
        found.append(reach(plan))
    return found


def test_overflow_serves_what_it_trained():
    def f(params, x):
        return x @ params["w"]

    params, x = {"w": normal(0, WIDTH, 4)}, np.float32(4) * TAILED
    plan = jaxq.make_plan(f, Scheme(jaxq.int8(), PROBES["power"]))(params, x)
    with jax.numpy_dtype_promotion("standard"):
        plan = jaxq.calibrate(f, plan, progress=False)(params, [TAILED, TAILED])
    assert jaxq.Plan.from_json(plan.to_json()) == plan
    converted = jaxq.convert(f, plan)(params, x)
    train, serve = jax.jit(jaxq.qat(f, plan)), jax.jit(jaxq.quantize(f, plan))
    assert_bitwise(train(params, x), serve(converted, x))
    assert np.isnan(serve(converted, x.at[3, 5].set(np.nan))[3]).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.3, 1.7])
def test_overflow_settles_where_half_would_overflow(scale):
    x = tailed(normal(8, 128, 16, scale=scale))
    found = reaches([x] * 8)
    assert found[0] == 2 ** np.ceil(np.log2(np.abs(x).max()))
    assert found[-1] == found[-2]
    assert (np.abs(x) > found[-1]).mean() <= RATE < (np.abs(x) > found[-1] / 2).mean()


def test_overflow_moves_one_power_of_two_at_a_time():
    x = normal(8, 128, 16)
    settled = reaches([x] * 5)
    found = reaches([x] * 5 + [8 * x] * 5 + [x] * 5)
    assert found[:5] == settled
    assert found[5:10] == [2 * settled[-1], 4 * settled[-1], 8 * settled[-1], 8 * settled[-1], 8 * settled[-1]]
    assert found[10:] == [4 * settled[-1], 2 * settled[-1], settled[-1], settled[-1], settled[-1]]


# --- gradients -------------------------------------------------------------------------------------------------------

HALF = jaxq.int8(per_tensor=True, calibrator=jaxq.minmax())
SLOPES = {
    "int8": Scheme(jaxq.int8(), jaxq.int8()),
    "static": Scheme(jaxq.int4(group=16), HALF),
    "fixed": Scheme(jaxq.fixed(4, 3), jaxq.fixed(8, 6)),
    "ternary": Scheme(jaxq.ternary(), jaxq.bfloat16()),
    "binary": Scheme(jaxq.binary(), jaxq.dynamic_fixed(8)),
    "float8": Scheme(jaxq.nf4(), jaxq.float8(per_tensor=True, calibrator=jaxq.minmax())),
    "act": Scheme(act=jaxq.uint8(per_tensor=True, calibrator=jaxq.minmax())),
    "weight": Scheme(weight=jaxq.uint8()),
}


@functools.cache
def slopes():
    """Return `(params, xs, cotangents, plan, converted, gradients)` of one dot for each scheme."""
    params, xs = weights(SLOPES, WIDTH, 6, scale=0.8), {n: normal(50 + i, ROWS, WIDTH) for i, n in enumerate(SLOPES)}
    cotangents = {n: normal(80 + i, ROWS, 6) for i, n in enumerate(SLOPES)}
    plan = jaxq.make_plan(dots, SLOPES)(params, xs)
    halves = jax.tree.map(lambda x: np.float32(0.5) * x, xs)
    plan = jaxq.calibrate(dots, plan, progress=False)(params, [halves])
    converted = jaxq.convert(dots, plan)(params, xs)

    def loss(params, xs):
        outs = jaxq.qat(dots, plan)(params, xs)
        return sum(jnp.vdot(outs[name], cotangents[name]) for name in outs)

    return params, xs, cotangents, plan, converted, jax.jit(jax.grad(loss, argnums=(0, 1)))(params, xs)


def imitated(name, x, plan):
    """Return the activations of `SLOPES` decoded, their doubt, and where the gradient passes, float64."""
    x = float64(x)
    if name == "weight":
        return x, 0 * x, np.ones(x.shape, bool)
    if name == "fixed":
        codes = np.round(x * 64)
        return *fixed_point(8, 6)(x, 1), (codes >= -128) & (codes <= 127)
    static = name in ("static", "float8", "act")
    ends = ends_of(plan, name) if static else None
    kinds = {"static": "int8", "act": "uint8", "ternary": "bfloat16", "binary": "dynamic_fixed"}
    values, doubt = judged(kinds.get(name, name), x, 1, ends)
    if not static:
        return values, doubt, np.ones(x.shape, bool)
    if name == "float8":
        return values, doubt, (x >= ends[0]) & (x <= ends[1])
    step = max(-ends[0], ends[1]) / 127 if name == "static" else (ends[1] - ends[0]) / 255
    low, high = (-127, 127) if name == "static" else np.round(ends[0] / step) + np.array([0, 255])
    codes = np.round(x / step)
    return values, doubt, (codes >= low) & (codes <= high)


@pytest.mark.parametrize("name", SLOPES)
def test_gradients_are_straight_through_with_decoded_operands(name):
    params, xs, cotangents, plan, converted, (by_weight, by_x) = slopes()
    w, x, c = float64(params[name]), xs[name], float64(cotangents[name])
    decoded = float64(converted[name].decode()) if isinstance(converted[name], jaxq.QArray) else w
    values, doubt, passes = imitated(name, x, plan)
    assert passes.all() == (name not in ("static", "fixed", "float8", "act"))
    inside = (np.round(w * 8) >= -8) & (np.round(w * 8) <= 7) if name == "fixed" else np.ones(w.shape, bool)
    assert inside.all() == (name != "fixed")
    for got, want, size in (
        (by_weight[name], values.T @ c * inside, np.abs(values.T) @ np.abs(c) * 1e-6 + 1.01 * doubt.T @ np.abs(c)),
        (by_x[name], c @ decoded.T * passes, np.abs(c) @ np.abs(decoded.T) * 1e-6),
    ):
        assert np.isfinite(got).all() and np.abs(got).max() > 0.1
        assert (np.abs(float64(got) - want) <= size).all()


@pytest.mark.parametrize("key", ["weights", "dynamic", "static"])
def test_every_format_has_a_gradient(key):
    """Abstractly, that every rule is there; what they give is tested above."""
    this = case(key)

    def loss(params, x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(jaxq.qat(this.fn, this.plan)(params, x)))

    shapes = jax.eval_shape(jax.grad(loss), this.params, this.x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, this.params)


@pytest.mark.parametrize("name", ["int8", "int4", "int4_group", "uint8", "binary", "kmeans", "nf4", "float8", "nvfp4"])
def test_no_gradient_by_a_converted_weight(name):
    q, scheme = case("weights").converted[name], Scheme(WEIGHTS[name], jaxq.int8())

    def loss(q, x):
        return jnp.sum(jaxq.quantize(dots, {name: scheme})({name: q}, {name: x})[name])

    with pytest.raises(TypeError, match="no gradient by a converted weight.*train float parameters"):
        jax.eval_shape(jax.grad(loss, allow_int=True), q, X)
    assert jax.eval_shape(jax.grad(loss, argnums=1), q, X).shape == X.shape


# --- one model, five formats -----------------------------------------------------------------------------------------


def network(params, x):
    h = jnp.tanh(x @ params["codebook"])
    h = h + jnp.tanh(h @ params["ints"])
    h = h + jnp.tanh(h @ params["point"])
    h = h + jnp.tanh(h @ params["signs"])
    return h @ params["plain"]


HYBRID = {
    "codebook": jaxq.weight_only(jaxq.kmeans(8)),
    "ints": jaxq.w8a8(static=True),
    "point": Scheme(jaxq.fixed(8, 6), jaxq.fixed(8, 5)),
    "plain": None,
    "sig*": Scheme(jaxq.binary(), jaxq.float8()),
}


@functools.cache
def hybrid():
    """Return `(plan, losses, gradients, trained parameters)` of a short training with five formats in force."""
    params, x = weights(("codebook", "ints", "plain", "point", "signs"), 16, 16, scale=0.25), normal(70, 32, 16)
    target = jnp.tanh(x @ normal(71, 16, 16, scale=0.25))
    plan = jaxq.calibrate(network, HYBRID, progress=False)(params, [x])

    def loss(params, x):
        return jnp.mean(jnp.square(network(params, x) - target))

    optimizer = optax.adam(0.01)
    step, update = jax.jit(jax.value_and_grad(jaxq.qat(loss, plan))), jax.jit(optimizer.update)
    state, losses, gradients = optimizer.init(params), [], []
    for _ in range(30):
        value, gradient = step(params, x)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, state = update(gradient, state)
            params = optax.apply_updates(params, updates)
        losses.append(float(value))
        gradients.append(gradient)
    return plan, losses, gradients, params, x


def test_a_hybrid_trains():
    _, losses, gradients, _, _ = hybrid()
    assert losses[-1] < 0.3 * losses[0]
    assert all(np.isfinite(leaf).all() and (leaf != 0).any() for g in gradients for leaf in jax.tree.leaves(g))


def test_a_hybrid_serves_what_it_trained():
    plan, _, _, params, x = hybrid()
    converted = jaxq.convert(network, plan)(params, x)
    formats = {name: leaf.format for name, leaf in converted.items() if isinstance(leaf, jaxq.QArray)}
    assert formats == {
        "codebook": jaxq.Codebook(8), "ints": jaxq.Int(8), "point": jaxq.Fixed(8, 6), "signs": jaxq.Binary()
    }  # fmt: skip
    assert converted["plain"] is params["plain"]
    train, serve = jax.jit(jaxq.qat(network, plan)), jax.jit(jaxq.quantize(network, plan))
    assert_bitwise(train(params, x), serve(converted, x))
    assert jaxq.Plan.from_json(plan.to_json()) == plan


def test_a_hybrid_plan_prints_every_site_with_its_format():
    plan = hybrid()[0]
    rows = {line.split()[0]: line for line in str(plan).splitlines()[2:7]}
    assert set(rows) == {"codebook", "ints", "point", "signs", "plain"}
    for name, words in {
        "codebook": ("codebook of 8 per tensor", "float"),
        "ints": ("int8 per channel", "int8 per tensor static (MinMax())"),
        "point": ("Q1.6 per tensor", "Q2.5 per tensor"),
        "signs": ("binary per channel", "float8_e4m3fn per channel"),
        "plain": ("float", "by policy"),
    }.items():
        assert all(word in rows[name] for word in words)
    assert "4 of 5 sites quantized, 1 in float, 40.0 % of the FLOPs in integers" in str(plan)


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSALS = {
    "static weight": (lambda: Scheme(weight=STATIC["minmax"]), "drop calibrator= from Scheme"),
    "static codebook weight": (lambda: Scheme(weight=STATIC["kmeans"]), "drop calibrator= from Scheme"),
    "unsigned symmetric weight": (lambda: Scheme(weight=jaxq.uint8(symmetric=True)), r"use jaxq\.uint8\(\)"),
    "float8 zero point": (lambda: jaxq.float8(symmetric=False), "drop symmetric=False"),
    "codebook zero point": (lambda: jaxq.kmeans(16, symmetric=False), "drop symmetric=False"),
    "binary zero point": (lambda: jaxq.binary(symmetric=False), "drop symmetric=False"),
    "ternary zero point": (lambda: jaxq.ternary(symmetric=False), "drop symmetric=False"),
    "mean_abs zero point": (lambda: jaxq.b158(symmetric=False), "drop symmetric=False"),
    "fit and calibrator": (
        lambda: jaxq.int8(per_tensor=True, fit=jaxq.mse(), calibrator=jaxq.minmax()), r"fit=.*calibrator=.*not both"
    ),
    "fitted float8": (lambda: jaxq.float8(fit=jaxq.mse()), "drop them"),
    "fitted codebook": (lambda: jaxq.kmeans(16, fit=jaxq.percentile(99.0)), "drop them"),
    "full-range float8": (lambda: jaxq.float8(narrow=False), "drop them"),
    "power-of-two ternary": (lambda: jaxq.ternary(power_of_two=True), "drop them"),
    "static fixed point": (
        lambda: Quantizer(jaxq.Fixed(8, 4), per_tensor=True, calibrator=jaxq.minmax()), "drop calibrator="
    ),
    "static binary": (lambda: jaxq.binary(per_tensor=True, calibrator=jaxq.minmax()), "drop calibrator="),
    "static ternary": (lambda: jaxq.ternary(per_tensor=True, calibrator=jaxq.ema()), "drop calibrator="),
    "mse of float8": (lambda: jaxq.float8(per_tensor=True, calibrator=jaxq.mse()), r"use jaxq\.minmax\(\)"),
    "octav of float8": (lambda: jaxq.float8(per_tensor=True, calibrator=jaxq.octav()), r"use jaxq\.minmax\(\)"),
    "ema of a codebook": (lambda: jaxq.kmeans(16, calibrator=jaxq.ema()), r"use calibrator=jaxq\.minmax\(\)"),
    "percentile of a codebook": (
        lambda: jaxq.kmeans(16, calibrator=jaxq.percentile()), r"use calibrator=jaxq\.minmax\(\)"
    ),
    "overflow without powers": (
        lambda: jaxq.int8(per_tensor=True, calibrator=jaxq.overflow_rate()), r"use jaxq\.dynamic_fixed"
    ),
    "overflow with zero point": (
        lambda: jaxq.dynamic_fixed(8, symmetric=False, calibrator=jaxq.overflow_rate()), r"use jaxq\.dynamic_fixed"
    ),
    "static per token": (lambda: jaxq.int8(calibrator=jaxq.minmax()), "add per_tensor=True"),
    "static group": (lambda: jaxq.int8(group=8, calibrator=jaxq.minmax()), "drop per_tensor= and calibrator="),
    "one signed bit": (lambda: Quantizer(jaxq.Int(1)), r"use jaxq\.binary\(\)"),
    "9 bits": (lambda: jaxq.Int(9), r"use Int\(8\), Int\(4\) or Int\(16\)"),
    "no bits": (lambda: jaxq.Int(0), r"use Int\(8\), Int\(4\) or Int\(16\)"),
    "12-bit dynamic fixed point": (lambda: jaxq.dynamic_fixed(12), r"use Int\(8\), Int\(4\) or Int\(16\)"),
    "one fixed bit": (lambda: jaxq.fixed(1, 0), "2 to 16 bits"),
    "32 fixed bits": (lambda: jaxq.fixed(32, 0), "2 to 16 bits"),
    "one centroid": (lambda: jaxq.kmeans(1), "2 to 256 centroids"),
    "257 centroids": (lambda: jaxq.kmeans(257), "2 to 256 centroids"),
    "MX without blocks": (lambda: Quantizer(jaxq.Int(8), scaling=jaxq.mxint8().scaling), "add group=32"),
    "all of a percentile": (lambda: jaxq.percentile(101.0), r"\(0, 100\]"),
    "no sigmas": (lambda: jaxq.sigmas(0.0), "positive number"),
    "all overflow": (lambda: jaxq.overflow_rate(1.0), r"\[0, 1\)"),
    "static weight-only": (lambda: jaxq.weight_only(STATIC["minmax"]), "drop calibrator="),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_to_do(name):
    make, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("weight", [jaxq.int4(group=8), jaxq.mxint8(8), jaxq.binary(group=8)])
def test_convolutions_in_integers_refuse_groups(weight):
    w, x = {"conv": normal(0, 3, 3, 8, 8)}, IMAGES

    def f(params, x):
        return conv(x, params["conv"])

    with pytest.raises(ValueError, match=r"'conv'.*no integer kernel.*use weight_only\(...\) there, or drop group="):
        jaxq.make_plan(f, {"conv": Scheme(weight, jaxq.int8())})(w, x)
    assert jaxq.make_plan(f, jaxq.weight_only(weight))(w, x)["conv"].scheme == Scheme(weight)


def test_groups_that_do_not_divide_are_refused_by_name():
    params, x = {"up": normal(0, 24, 4)}, normal(1, 2, 24)
    for quantizer in (jaxq.nf4(), jaxq.mxfp4(), jaxq.nvfp4(), jaxq.kmeans(4, group=16), jaxq.int4(group=16)):
        with pytest.raises(ValueError, match="site 'up'.*choose another group="):
            jaxq.make_plan(lambda p, x: x @ p["up"], jaxq.weight_only(quantizer))(params, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", WEIGHTS)
def test_convert_refuses_weights_that_are_not_finite(name, bad):
    params = weights(WEIGHTS, WIDTH, WIDTH)
    params[name] = params[name].at[3, 5].set(bad)
    with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity.*repair"):
        jaxq.convert(chain, PROGRAMS["weights"][3])(params, X)


@pytest.mark.parametrize("name, bad", [("percentile", np.nan), ("sigmas", -np.inf), ("kmeans", np.nan)])
def test_calibrate_refuses_values_that_are_not_finite(name, bad):
    def f(params, x):
        return x @ params["w"]

    params, x = {"w": normal(0, WIDTH, 6)}, TAILED.at[2, 3].set(bad)
    calibrate = jaxq.calibrate(f, {"w": Scheme(jaxq.int8(), STATIC[name])}, progress=False)
    with pytest.raises(ValueError, match="batch 1 brings NaN or infinity to site 'w'.*remove it"):
        calibrate(params, [TAILED, x])


@pytest.mark.parametrize("name", DYNAMIC)
def test_nan_comes_out_of_dynamic_activations(name):
    serve, converted, train, params = (getattr(case("dynamic"), n) for n in ("serve", "converted", "train", "params"))
    x = X.at[3, 5].set(np.nan)
    for y in (serve(converted, x)[name], train(params, x)[name]):
        assert np.isnan(y[3]).all()
        assert name in PER_TENSOR or np.isfinite(np.delete(y, 3, 0)).all()


@pytest.mark.parametrize("name", STATIC)
def test_nan_comes_out_of_static_activations(name):
    serve, converted, train, params = (getattr(case("static"), n) for n in ("serve", "converted", "train", "params"))
    x = TAILED.at[3, 5].set(np.nan)
    for y in (serve(converted, x)[name], train(params, x)[name]):
        assert np.isnan(y[3]).all()
