"""Quantized outputs: what a site puts out, who shares its quantizer, and what the plan keeps of it.

Operands are small whole numbers, so that float products are exact and float64 NumPy can judge every bit.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from inspection import arrays, assert_bitwise, products
from jaxq import Plan, Scheme
from zoo import NAMES, model

pytestmark = pytest.mark.shared

MINMAX = {"per_tensor": True, "calibrator": jaxq.minmax()}
STATIC = jaxq.int8(**MINMAX)
W8 = jaxq.int8()


def whole(seed, *shape, most=7):
    return jnp.asarray(np.random.default_rng(seed).integers(-most, most + 1, shape), jnp.float32)


def calibrated(f, policy, params, *batches):
    return jaxq.calibrate(f, policy, progress=False)(params, batches)


def linear(params, x):
    return {name: x @ w for name, w in params.items()}


# --- the rounding ----------------------------------------------------------------------------------------------------

FORMATS = {
    "int8": (STATIC, lambda lo, hi: (max(-lo, hi) / 127, 0, -127, 127)),
    "int4": (jaxq.int4(**MINMAX), lambda lo, hi: (max(-lo, hi) / 7, 0, -7, 7)),
    "uint8": (jaxq.uint8(**MINMAX), lambda lo, hi: ((hi - lo) / 255, np.round(-lo * 255 / (hi - lo)), 0, 255)),
    "dynamic": (jaxq.int8(per_tensor=True), lambda lo, hi: (max(-lo, hi) / 127, 0, -127, 127)),
    "fixed": (jaxq.fixed(6, -2), lambda lo, hi: (4.0, 0, -32, 31)),
    "power": (
        jaxq.dynamic_fixed(8),
        lambda lo, hi: (2.0 ** np.ceil(np.log2(max(-lo, hi) / 127)), 0, -127, 127),
    ),
}
X = whole(0, 8, 24)


@functools.cache
def rounded():
    """Return `(params, plan, outputs, gradients)` of one product for each format; the plan has seen twice half of X."""
    params = {name: whole(n + 1, 24, 10, most=4) for n, name in enumerate(FORMATS)}
    policy = {name: Scheme(out=quantizer) for name, (quantizer, _) in FORMATS.items()}
    plan = calibrated(linear, policy, params, X[:4] / 2, X[:4] / 2)

    def run(params, x):
        outs = jaxq.qat(linear, plan)(params, x)
        return sum(jnp.sum(y * jnp.square(y)) for y in outs.values()), outs

    (_, outs), gradients = jax.jit(jax.value_and_grad(run, has_aux=True, argnums=(0, 1)))(params, X)
    return params, plan, outs, gradients


def exact(params, name, x):
    return np.asarray(x, np.float64) @ np.asarray(params[name], np.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_is_rounded_to_its_format(name):
    params, _, outs, (by_weight, _) = rounded()
    quantizer, affine = FORMATS[name]
    y = exact(params, name, X)
    seen = exact(params, name, X[:4] / 2) if quantizer.static else y
    scale, zero, low, high = affine(seen.min(), seen.max())
    steps = y / scale + zero
    codes = np.clip(np.round(steps), low, high)
    # Powers of two divide exactly, ties and all.
    clear = (np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-4) | (np.frexp(scale)[0] == 0.5)
    assert clear.mean() > 0.8
    np.testing.assert_allclose(np.asarray(outs[name])[clear], (scale * (codes - zero))[clear], rtol=1e-6)
    # Straight through where the rounded value has a code; the cotangent is 3 y^2 of what was put out.
    passes = (np.round(steps) >= low) & (np.round(steps) <= high)
    assert passes.all() == (name in ("dynamic", "power"))
    cotangent = 3 * np.float64(outs[name]) ** 2 * passes
    np.testing.assert_allclose(by_weight[name], np.asarray(X, np.float64).T @ cotangent, rtol=1e-4, atol=1e-2)


def test_gradients_reach_through_all_outputs():
    params, _, outs, (_, by_x) = rounded()
    assert np.isfinite(by_x).all() and np.abs(by_x).min() > 0
    assert all(np.isfinite(leaf).all() for leaf in arrays(outs))
    # Forward mode and second derivatives exist too.
    jax.eval_shape(jax.hessian(lambda x: jnp.sum(jaxq.qat(linear, rounded()[1])(params, x)["int8"])), X[0])


def test_what_is_observed_is_the_float_output():
    params, plan, _, _ = rounded()
    for name, (quantizer, _) in FORMATS.items():
        operands, out = plan.range(name)[:2], plan.range(name)[2]
        assert operands == (None, None) and (out is None) != quantizer.static
        if quantizer.static:
            y = exact(params, name, X[:4] / 2)
            assert [float(v) for v in out[:3]] == [y.min(), y.max(), 2]
    # Also while the quantized program runs, whose output is rounded; and that is what qat gives.
    (outs, moved) = jax.jit(jaxq.observe(linear, plan, quantized=True))(params, 4 * X)
    assert_bitwise(outs, jax.jit(jaxq.qat(linear, plan))(params, 4 * X))
    assert float(moved.range("int4")[2].hi) == exact(params, "int4", 4 * X).max()
    first, seen = jaxq.observe(linear, {"int8": Scheme(out=STATIC), "*": None}, quantized=True)(params, X)
    assert float(seen.range("int8")[2].hi) == exact(params, "int8", X).max()
    assert len(np.unique(first["int8"])) <= 255 and np.abs(first["int8"] - exact(params, "int8", X)).max() < 2


def test_nan_stays_nan_and_calibration_refuses_it():
    params, plan, _, _ = rounded()
    outs = jax.jit(jaxq.qat(linear, plan))(params, X.at[2, 3].set(np.nan))
    assert all(np.isnan(y[2]).all() for y in outs.values())
    with pytest.raises(ValueError, match="batch 0 brings NaN or infinity to site 'int4'"):
        calibrated(linear, plan, params, X.at[2, 3].set(np.nan))


def test_rows_out_of_bounds_are_still_filled():
    table = {"rows": whole(1, 6, 4)}

    def f(params, i):
        return jnp.take(params["rows"], i, axis=0)

    plan = calibrated(f, Scheme(weight=W8, out=STATIC), table, jnp.arange(6))
    converted = jaxq.convert(f, plan)(table, jnp.arange(6))
    out = np.asarray(jax.jit(jaxq.quantize(f, plan))(converted, jnp.array([0, 9])))
    assert np.isnan(out[1]).all() and np.abs(out[0] - table["rows"][0]).max() < 0.1
    assert_bitwise(out, jax.jit(jaxq.qat(f, plan))(table, jnp.array([0, 9])))


# --- who shares it ---------------------------------------------------------------------------------------------------

# What the next site takes, of an output [8, 16].
SHARED = {
    "as it is": lambda y: y,
    "reshape": lambda y: y.reshape(4, 2, 16),
    "transpose": lambda y: y.reshape(2, 4, 16).swapaxes(0, 1),
    "cast": lambda y: y.astype(jnp.bfloat16).astype(jnp.float32),
    "slice": lambda y: y[2:7],
    "step": lambda y: y[::2],
    "dynamic slice": lambda y: lax.dynamic_slice(y, (2, 0), (3, 16)),
    "broadcast": lambda y: jnp.broadcast_to(y[None], (3, 8, 16)),
    "pad": lambda y: jnp.pad(y, ((1, 2), (0, 0))),
    "reverse": lambda y: y[::-1],
    "relu": jax.nn.relu,
    "mask": lambda y: jnp.where(y[:, :1] > 3.0, y, 0.0),
    "joined": lambda y: jnp.concatenate([y, jnp.zeros((2, 16)), y[3:]]),
    "maximum": lambda y: jnp.maximum(0.0, y),
    "max-pool": lambda y: lax.reduce_window(y, -jnp.inf, lax.max, (2, 1), (2, 1), "VALID"),
    "largest": lambda y: y.reshape(4, 2, 16).max(1),
    "stop_gradient": lax.stop_gradient,
    "checkpoint": jax.checkpoint(lambda y: jax.nn.relu(y)[1:]),
    "all of them": lambda y: jnp.pad(jax.nn.relu(y).reshape(4, 2, 16)[:, 1], ((1, 1), (0, 0))),
}
CHANGED = {
    "tanh": jnp.tanh,
    "bias": lambda y: y + 1,
    "twice": lambda y: y * 2,
    "sum": lambda y: y + y,
    "pad with ones": lambda y: jnp.pad(y, ((1, 2), (0, 0)), constant_values=1.0),
    "maximum of one": lambda y: jnp.maximum(1.0, y),
    "minimum": lambda y: jnp.minimum(y, 6.0),
    "mean": lambda y: y.reshape(4, 2, 16).mean(1),
    "whole numbers": lambda y: y.astype(jnp.int32).astype(jnp.float32),
    "joined with ones": lambda y: jnp.concatenate([y, jnp.ones_like(y)]),
    "power of zero": lambda y: jnp.maximum(y, jnp.exp(jnp.zeros((8, 16)))),
    "one of two": lambda y: lax.cond(y[0, 0] > 0, lambda: y, lambda: -y),
}
WAYS = {**SHARED, **CHANGED}
ROUGH = jaxq.int2(per_tensor=True)  # the consumer's own, and easily told


def ways(params, x):
    y = x @ params["up"]
    return y, {name: (way(y), way(y) @ params[name]) for name, way in WAYS.items()}


@functools.cache
def shared():
    params = {name: whole(n, 16, 4, most=3) for n, name in enumerate(WAYS)} | {"up": whole(50, 12, 16)}
    x = whole(51, 8, 12)
    policy = {"up": Scheme(W8, out=STATIC), "*": Scheme(W8, ROUGH)}
    plan = calibrated(ways, policy, params, x)
    trained = jax.jit(jaxq.qat(ways, plan))(params, x)
    return params, x, plan, trained


@pytest.mark.parametrize("name", WAYS)
def test_a_producers_out_wins_over_a_consumers_act(name):
    params, _, plan, (y, outs) = shared()
    decision = plan[name]
    assert decision.quantizers[0] == (STATIC if name in SHARED else ROUGH)
    moved, product = np.asarray(outs[name][0], np.float64), np.asarray(outs[name][1], np.float64)
    scale = np.abs(np.asarray(y, np.float64)).max() / 127
    codes = np.round(moved / scale)
    weight = np.asarray(jaxq.int8()(params[name]).decode(), np.float64)
    if name in SHARED:  # the same codes, so the product is exact: no second rounding
        np.testing.assert_allclose(codes * scale, moved, rtol=4e-3)
        np.testing.assert_allclose(product, codes * scale @ weight, rtol=1e-5, atol=1e-4)
    else:
        assert np.abs(product - moved @ weight).max() > 0.005 * np.abs(product).max()


def test_train_equals_serve_with_shared_outputs():
    params, x, plan, trained = shared()
    converted = jaxq.convert(ways, plan)(params, x)
    assert_bitwise(trained, jax.jit(jaxq.quantize(ways, plan))(converted, x))
    assert products(jaxq.quantize(ways, plan), converted, x).count(("int8", "int8")) == len(WAYS)


def test_the_table_says_whose_output_it_is():
    plan = shared()[2]
    rows = {line[:16].strip(): line for line in str(plan).splitlines()[2:-2]}
    assert rows["relu"].endswith("takes the output of up") and "int8 per tensor static (MinMax())" in rows["relu"]
    assert "output" not in rows["tanh"] and "int2 per tensor" in rows["tanh"]
    assert "outputs" in str(plan).splitlines()[0]


def test_a_dynamic_output_is_shared_only_as_a_whole():
    """A slice would find a range of its own, a relu another one."""
    params, x, _, _ = shared()
    policy = {"up": Scheme(W8, out=jaxq.int8(per_tensor=True)), "*": Scheme(W8, ROUGH)}
    plan = jaxq.make_plan(ways, policy)(params, x)
    takes = {name for name in WAYS if plan[name].fed}
    assert takes == {"as it is", "reshape", "transpose", "cast", "broadcast", "pad", "reverse", "stop_gradient"}
    signs = {"up": Scheme(W8, out=jaxq.ternary(per_tensor=True)), "*": Scheme(W8, ROUGH)}
    assert not jaxq.make_plan(ways, signs)(params, x)["pad"].fed
    # Fixed point has no range.
    point = {"up": Scheme(W8, out=jaxq.fixed(8, 0)), "*": Scheme(W8, ROUGH)}
    assert {name for name in WAYS if jaxq.make_plan(ways, point)(params, x)[name].fed} == set(SHARED)


def test_both_operands_of_a_weightless_product_may_be_outputs():
    def f(params, x):
        q, k = x @ params["q"]["w"], x @ params["k"]["w"]
        return q @ k.T

    params, x = {"q": {"w": whole(0, 6, 5)}, "k": {"w": whole(1, 6, 5)}}, whole(2, 7, 6)
    policy = {"q": Scheme(W8, W8, STATIC), "k": Scheme(W8, W8, jaxq.uint8(**MINMAX)), "*": Scheme(act=W8)}
    plan = calibrated(f, policy, params, x)
    (name,) = set(plan.names) - {"q", "k"}
    assert plan[name].quantizers == (STATIC, jaxq.uint8(**MINMAX)) and plan.range(name) == (None, None)
    assert str(plan).splitlines()[-3].endswith("takes the output of q and k")
    converted = jaxq.convert(f, plan)(params, x)
    assert_bitwise(jax.jit(jaxq.qat(f, plan))(params, x), jax.jit(jaxq.quantize(f, plan))(converted, x))


def test_float_activations_stay_float():
    params, x, _, _ = shared()
    plan = jaxq.make_plan(ways, {"up": Scheme(W8, out=STATIC), "*": jaxq.weight_only()})(params, x)
    assert not any(decision.fed for decision in plan.decisions)


# --- loops -----------------------------------------------------------------------------------------------------------


def layers(params, x):
    def layer(h, p):
        return jnp.tanh(jax.nn.relu(h @ p["up"]["w"]) @ p["down"]["w"] @ params["last"]["w"]), None

    return lax.scan(layer, x @ params["stem"]["w"], params["stack"])[0]


def unrolled(params, x):
    h = x @ params["stem"]["w"]
    for n in range(3):
        p = jax.tree.map(lambda w, n=n: w[n], params["stack"])
        h = jnp.tanh(jax.nn.relu(h @ p["up"]["w"]) @ p["down"]["w"] @ params["last"]["w"])
    return h


def test_layers_have_an_output_range_each_and_share_it():
    stack = {"up": {"w": whole(0, 3, 6, 8) / 8}, "down": {"w": whole(1, 3, 8, 6) / 8}}
    params = {"stack": stack, "stem": {"w": whole(2, 5, 6) / 8}, "last": {"w": whole(3, 6, 6) / 8}}
    x = whole(4, 7, 5)
    policy = Scheme(W8, jaxq.int8(per_tensor=True), STATIC)
    plan = calibrated(layers, policy, params, x)
    takes = {d.site.name: [fed and fed.site for fed in d.fed] for d in plan.decisions}
    # What one shared weight takes from stacked ones has a range in every layer, and its own has but one.
    assert takes == {"stem": [], "stack/up": [], "stack/down": ["stack/up", None], "last": []}
    assert plan.range("stack/up")[2].hi.shape == (3,) and plan.range("stem")[2].hi.shape == ()
    highs, h = [], np.asarray(x @ params["stem"]["w"], np.float64)
    for n in range(3):
        up, down = (np.float64(stack[k]["w"][n]) for k in ("up", "down"))
        highs.append((h @ up).max())
        h = np.tanh(np.maximum(h @ up, 0) @ down @ np.float64(params["last"]["w"]))
    np.testing.assert_allclose(plan.range("stack/up")[2].hi, highs, rtol=1e-5)
    converted = jaxq.convert(layers, plan)(params, x)
    assert_bitwise(jax.jit(jaxq.qat(layers, plan))(params, x), jax.jit(jaxq.quantize(layers, plan))(converted, x))


def test_one_output_feeds_every_layer():
    def f(params, x):
        y = x @ params["stem"]["w"]
        return lax.scan(lambda total, w: (total + y @ w, None), jnp.zeros((7, 4)), params["stack"]["w"])[0]

    def g(params, x):
        y = x @ params["stem"]["w"]
        return sum(y @ params["stack"]["w"][n] for n in range(3))

    params, x = {"stem": {"w": whole(0, 5, 6)}, "stack": {"w": whole(1, 3, 6, 4)}}, whole(2, 7, 5)
    policy = {"stem": Scheme(W8, W8, STATIC), "stack*": Scheme(W8, ROUGH)}
    plan = calibrated(f, policy, params, x)
    assert plan["stack"].fed[0].site == "stem" and plan.range("stack") == (None, None)
    flat = calibrated(g, policy, params, x)
    assert all(d.fed for d in flat.decisions[1:])
    trained = jax.jit(jaxq.qat(f, plan))(params, x)
    np.testing.assert_allclose(trained, jax.jit(jaxq.qat(g, flat))(params, x), rtol=1e-5)
    assert_bitwise(trained, jax.jit(jaxq.quantize(f, plan))(jaxq.convert(f, plan)(params, x), x))


def test_a_carried_output_of_the_last_step_is_not_this_steps():
    def f(params, x):
        def step(h, _):
            return h @ params["w"] / 8, None

        def other(h, _):
            return h @ params["w"], h @ params["v"]

        return lax.scan(step, x, None, length=2)[0], lax.scan(other, x, None, length=2)[1]

    params, x = {"w": whole(0, 6, 6), "v": whole(1, 6, 6)}, whole(2, 4, 6)
    plan = jaxq.make_plan(f, Scheme(W8, ROUGH, STATIC))(params, x)
    assert not any(d.fed for d in plan.decisions)


# --- the plan --------------------------------------------------------------------------------------------------------


def pair(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


@functools.cache
def paired():
    params, x = {"up": whole(0, 6, 8), "down": whole(1, 8, 3)}, whole(2, 16, 6)
    return (
        params,
        x,
        {"up": Scheme(W8, W8, jaxq.int8(per_tensor=True, calibrator=jaxq.percentile(99))), "*": jaxq.w8a8()},
    )


def test_plans_with_outputs_survive_json():
    params, x, policy = paired()
    plan = calibrated(pair, policy, params, x)
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    data["decisions"][0]["scheme"]["out"] = None
    data["ranges"][0] = data["ranges"][0][:2]
    with pytest.raises(ValueError, match="output of a site that puts out nothing of the kind"):
        Plan.from_json(json.dumps(data))


def test_json_from_before_there_were_outputs_still_loads():
    params, x, _ = paired()
    plan = calibrated(pair, jaxq.w8a8(static=True), params, x)
    data = json.loads(plan.to_json())
    for decision in data["decisions"]:
        del decision["fed"], decision["scheme"]["out"]
    assert Plan.from_json(json.dumps(data)) == plan


def test_plans_with_outputs_merge():
    params, x, policy = paired()
    halves = [calibrated(pair, policy, params, part) for part in (x[:8], x[8:])]
    together = calibrated(pair, policy, params, x[:8], x[8:])
    assert halves[0].merge(halves[1]) == halves[1].merge(halves[0]) == together


def test_unobserved_outputs_are_refused_by_name():
    params, x, policy = paired()
    plan = jaxq.make_plan(pair, policy)(params, x)
    assert plan.unobserved() == ["up"]
    with pytest.raises(ValueError, match="seen no data: up;"):
        jaxq.qat(pair, plan)(params, x)
    with pytest.raises(ValueError, match="up has no observed range"):
        plan.check(observed=True)

    def half(params, h):
        return h @ params["down"]

    with pytest.raises(ValueError, match="seen no data: up;"):
        jaxq.qat(half, plan)({"down": params["down"]}, jnp.ones((2, 8)))


def test_a_plan_serves_part_of_its_program():
    """Where the producer is elsewhere, the consumer keeps the range that the plan has of it."""
    params, x, policy = paired()
    plan = calibrated(pair, policy, params, x)

    def half(params, h):
        return h @ params["down"]

    def upper(params, x):
        return x @ params["up"]

    h = jax.jit(jaxq.qat(upper, plan))(params, x)
    assert_bitwise(jax.jit(jaxq.qat(half, plan))(params, jax.nn.relu(h)), jax.jit(jaxq.qat(pair, plan))(params, x))


def test_overflow_rate_moves_the_point_of_an_output():
    """Courbariaux's rule, one step for a batch: twice as large where more than the rate overflows."""
    params, x, _ = paired()
    rule = jaxq.dynamic_fixed(8, calibrator=jaxq.overflow_rate(0.01))
    plan = jaxq.make_plan(pair, {"up": Scheme(out=rule), "*": None})(params, x)
    reach = []
    for batch in (x, x, 8 * x, 8 * x, 8 * x, x):
        _, plan = jaxq.observe(pair, plan, quantized=True)(params, batch)
        reach.append(float(plan.range("up")[2].hi) * 128 / 127)
    top = np.abs(np.float64(x @ params["up"])).max()
    assert reach[0] == 2.0 ** np.ceil(np.log2(top))
    assert reach[2:5] == [2 * reach[1], 4 * reach[1], 8 * reach[1]] and reach[5] == reach[4] / 2


REFUSED = {
    "per token": (lambda: Scheme(out=jaxq.int8()), "use Scheme.out=. per_tensor=True"),
    "groups": (lambda: Scheme(out=jaxq.int8(group=8)), "use Scheme.out=. per_tensor=True"),
    "MX": (lambda: Scheme(out=jaxq.mxfp8()), "use Scheme.out=. per_tensor=True"),
    "fit": (lambda: Scheme(out=jaxq.int8(per_tensor=True, fit=jaxq.mse())), "add calibrator= to Scheme.out=."),
    "zero point": (lambda: Scheme(out=jaxq.uint8(per_tensor=True)), "add calibrator= to Scheme.out=."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_an_output_says_what_to_do(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_an_output_is_a_quantizer():
    with pytest.raises(TypeError, match=r"Scheme\(out=\) takes a quantizer"):
        Scheme(out=8)


# --- the laws --------------------------------------------------------------------------------------------------------

QUICK = ("mlp", "cond", "shard_map")
ALL = Scheme(W8, jaxq.int8(per_tensor=True, calibrator=jaxq.minmax()), STATIC)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
def test_train_equals_serve_over_the_zoo(name):
    entry = model(name)
    batches = [entry.args]
    if name == "cond":
        batches = [entry.args, tuple(-x for x in entry.args)]
    if name == "switch":
        batches = [tuple(jnp.asarray(n, x.dtype) if x.ndim == 0 else x for x in entry.args) for n in range(3)]
    plan = jaxq.calibrate(entry.fn, ALL, progress=False)(entry.params, batches).check(observed=True)
    assert Plan.from_json(plan.to_json()) == plan
    trained = jax.jit(jaxq.qat(entry.fn, plan))(entry.params, *entry.args)
    converted = jaxq.convert(entry.fn, plan)(entry.params, *entry.args)
    assert_bitwise(trained, jax.jit(jaxq.quantize(entry.fn, plan))(converted, *entry.args))
    for a, b in zip(arrays(entry.fn(entry.params, *entry.args)), arrays(trained), strict=True):
        assert np.abs(a.astype(np.float64) - b).max() <= 0.1 * max(np.abs(a.astype(np.float64)).max(), 1e-6)


def test_a_plan_of_a_part_has_no_feeds_from_elsewhere():
    out = jaxq.int8(per_tensor=True, calibrator=jaxq.minmax())
    policy = {"up": Scheme(W8, jaxq.int8(), out), "*": Scheme(W8, jaxq.int8())}
    params, x = {"up": jnp.eye(4), "down": jnp.eye(4)}, jnp.ones((2, 4))
    plan = jaxq.calibrate(lambda p, x: x @ p["up"] @ p["down"], policy, progress=False)(params, [x])
    part = jaxq.make_plan(lambda p, h: h @ p["down"], plan)(params, x)
    assert part.names == ("down",) and not part["down"].fed and Plan.from_json(part.to_json()) == part
    np.testing.assert_array_equal(jaxq.qat(lambda p, h: h @ p["down"], part)(params, x), np.ones((2, 4)))
