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


# --- programs: every one returns what its sites are given and what they give ------------------------------------------


def chain(params, x):
    """One dot after the other: {name: (activation, product)}."""
    outs = {}
    for name, w in params.items():
        outs[name] = (x, x @ w)
        x = jnp.tanh(outs[name][1])
    return outs


def fan(params, x):
    """A layer in float, its output, and one dot with that for each quantizer."""
    h = jnp.tanh(x @ params["stem"])
    return {name: h if name == "stem" else h @ w for name, w in params.items()}


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
IMAGES = normal(98, 2, 5, 5, 8)
IDS = jnp.asarray([[0, 3, 8], [7, 1, 2]], jnp.int32)
STEM = {"stem": normal(97, WIDTH, WIDTH, scale=0.15)}
ONLY = ("int8", "int4_group", "uint8", "binary", "b158", "fixed4", "kmeans", "nf4", "mxfp4")
CONV = ("int8", "int4", "uint8", "int2", "binary", "ternary", "fixed8", "kmeans", "float8")
TABLES = ("int8", "int4", "int4_group", "int2", "uint8", "binary", "ternary", "fixed8", "kmeans", "nf4", "float8")
STACK = ("int8", "int4", "int4_group", "uint8", "binary", "fixed8", "kmeans", "nf4")
JOINED = ("int8", "int4", "int4_group", "uint8", "binary", "b158", "fixed8", "nf4", "mxfp4")
ACTS = (STATIC["minmax"], jaxq.int8(), STATIC["percentile"], None, DYNAMIC["dynamic_fixed"], STATIC["float8"])


def by_weight(names, acts):
    """Give every weight quantizer one of `acts`, in turn."""
    return {name: Scheme(weight=WEIGHTS[name], act=acts[n % len(acts)]) for n, name in enumerate(names)}


def by_act(quantizers):
    return {"stem": None} | {name: Scheme(weight=jaxq.int8(), act=q) for name, q in quantizers.items()}


PROGRAMS = {
    "weights": (chain, lambda: weights(WEIGHTS, WIDTH, WIDTH), X, by_weight(WEIGHTS, [jaxq.int8()])),
    "weights_only": (chain, lambda: weights(ONLY, WIDTH, WIDTH), X, by_weight(ONLY, [None])),
    "dynamic": (fan, lambda: STEM | weights(DYNAMIC, WIDTH, 6), X, by_act(DYNAMIC)),
    "static": (fan, lambda: STEM | weights(STATIC, WIDTH, 6), X, by_act(STATIC)),
    "conv": (convs, lambda: weights(CONV, 3, 3, 8, 8), IMAGES, by_weight(CONV, ACTS)),
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
        decision = plan[name]
        scheme = rule.scheme if isinstance(rule, jaxq.Uniform) else rule
        wanted = [] if scheme is None else [q for q in (scheme.weight, scheme.act) if q is not None]
        assert [q for q in (decision.scheme.weight, decision.scheme.act) if q] == wanted if wanted else not decision.scheme
        assert all(repr(q) in table[name] for q in wanted)
    assert set(plan.names) == set(policy)


@pytest.mark.parametrize("key", PROGRAMS)
def test_plans_survive_json(key):
    for plan in (case(key).made, case(key).plan):
        read = jaxq.Plan.from_json(plan.to_json())
        assert read == plan
        assert_bitwise(jax.tree.leaves(read) + [X], jax.tree.leaves(plan) + [X])
    assert (case(key).made == case(key).plan) == (not jax.tree.leaves(case(key).plan))


# --- quantizers in float64: decoded values, and by how much float32 may differ where it rounds the other way ----------


def integers(x, scale, zero, low, high):
    reals = x / scale
    step = np.broadcast_to(scale, x.shape)
    doubt = np.where(oracle.is_near_tie(reals) & (reals > low - zero - 1) & (reals < high - zero + 1), step, 0)
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
    "dynamic_fixed": power_of_two,
    "nf4": normal_float,
    "float8": small_float(E4M3, lambda x, axis: absmax(x, axis) / 448, 448),
    "bfloat16": bfloat,
    "mxint8": mx_int8,
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


@pytest.mark.parametrize("name", set(WEIGHTS) & set(JUDGES))
def test_weights_decode_to_what_their_format_says(name):
    w = case("weights").params[name]
    values, doubt = judged(name, w, 0, group=WEIGHTS[name].group)
    got = float64(case("weights").converted[name].decode())
    assert (np.abs(got - values) <= 1e-6 * np.abs(values).max() + 1.01 * doubt).all()
    assert (doubt > 0).mean() < 0.01


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
    whole = np.abs(w).max(0) / 127
    scales = whole * np.linspace(0.3, 1.2, 400)[:, None]
    tried = [((np.clip(np.round(w / s), -127, 127) * s - w) ** 2).sum(0) for s in scales]
    assert (((got - w) ** 2).sum(0) <= 1.02 * np.min(tried, 0)).all()


def test_percentile_weights_keep_the_central_part():
    w, q = float64(case("weights").params["int4_percentile"]), case("weights").converted["int4_percentile"]
    reach = np.maximum(-np.percentile(w, 0.5, axis=0), np.percentile(w, 99.5, axis=0))
    bins = 2 ** np.ceil(np.log2(np.abs(w).max(0))) / 2048
    assert (np.abs(7 * float64(q.scale)[0] - reach) <= bins).all()
    assert np.abs(q.codes).max() == 7 and (np.abs(w).max(0) > 7.5 * float64(q.scale)[0]).all()


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
    exact = {"fixed8": fixed_point(8, 6), "fixed4": fixed_point(4, 3)}.get(name)
    values, doubt = exact(float64(h), 1) if exact else judged(name, h, 1)
    assert_product(got, values, float64(case("dynamic").converted[name].decode()), doubt)


@pytest.mark.parametrize("name", [name for name in STATIC if name not in ("kmeans", "overflow_rate")])
def test_static_activations(name):
    plan, h, got = case("static").plan, served("static")["stem"], served("static")[name]
    ends = ends_of(plan, name)
    assert (float64(h) < ends[0]).any() or (float64(h) > ends[1]).any(), "nothing saturates"
    values, doubt = judged(name if name in JUDGES else "int8", h, 1, ends)
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
    observe = jax.jit(lambda plan, xs: jaxq.observe(dots, plan)(eye, xs)[1])
    decoded = jax.jit(lambda plan, xs: jaxq.qat(dots, plan)(eye, xs))
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
BITS |= {"uint8": 8, "fixed8": 8, "fixed4": 8, "float8": 8, "mxint8": 8, "mxfp4": 4, "nvfp4": 4, "int16": 16}


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
    """Return rows of packed tables for indices beyond the last: {mode: {name: rows}}, and the decoded tables."""
    names, modes = ("int8", "int4", "int2", "binary", "kmeans", "uint8", "float8"), ("fill", "clip", "wrap")
    ids = jnp.asarray([0, 8, 9, 100, -1, -9, -10], jnp.int32)

    def fn(params, ids):
        return {mode: {n: jnp.take(t, ids, axis=0, mode=mode) for n, t in params.items()} for mode in modes}

    params = weights(names, 9, WIDTH)

    def policy(site):
        return Scheme(weight=WEIGHTS[site.weight.origins[0]])

    converted = jaxq.convert(fn, policy)(params, ids)
    exact = jax.jit(fn)({name: q.decode() for name, q in converted.items()}, ids)
    return jax.jit(jaxq.quantize(fn, policy))(converted, ids), jax.jit(jaxq.qat(fn, policy))(params, ids), exact


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
@pytest.mark.parametrize("name", ["int8", "int4", "int2", "binary", "kmeans", "uint8", "float8"])
def test_lookups_out_of_bounds(name, mode):
    serve, train, exact = (rows[mode][name] for rows in out_of_bounds())
    assert_bitwise(serve, train)
    assert_bitwise(serve, exact)
    assert np.isnan(serve).any() == (mode == "fill")
