"""Composition with JAX's transformations, the newer higher-order primitives, and caching."""

import contextlib
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from inspection import assert_bitwise, cosine, products
from jaxq.programs import jaxpr
from jaxq.programs.analysis import analyze
from zoo import model

FLAGS = [f for f in ("jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3") if hasattr(jax.config, f)]


@contextlib.contextmanager
def flag(name):
    """Turn a JAX flag on, with empty caches around it."""
    jax.config.update(name, True)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update(name, False)
        jax.clear_caches()


def simple():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (8, 16)), "head": jax.random.normal(keys[1], (16, 4))}
    return (lambda p, x: jnp.tanh(x @ p["up"]) @ p["head"]), params, jax.random.normal(keys[2], (12, 8))


# --- the newer higher-order primitives ---


def kernels(name):
    """Make a function of (params, x) around one derivative-carrying construct, fresh for every flag."""
    if name == "remat":
        policy = jax.checkpoint_policies.dots_saveable
        inner = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["up"]), policy=policy)
    elif name == "custom_vjp":
        inner = jax.custom_vjp(lambda p, x: jnp.tanh(x @ p["up"]))
        inner.defvjp(
            lambda p, x: (jnp.tanh(x @ p["up"]), (p, x)),
            lambda saved, g: (
                {"up": 7 * jnp.ones_like(saved[0]["up"]), "head": jnp.zeros_like(saved[0]["head"])},
                0 * saved[1],
            ),
        )
    elif name == "custom_jvp":
        inner = jax.custom_jvp(lambda p, x: jnp.tanh(x @ p["up"]))
        inner.defjvp(lambda primals, tangents: (inner(*primals), 7 * (tangents[1] @ primals[0]["up"])))
    return lambda p, x: inner(p, x) @ p["head"]


CONSTRUCTS = {"jax_remat3": "remat", "jax_custom_vjp3": "custom_vjp", "jax_custom_jvp3": "custom_jvp"}
PAIRS = [("none", construct) for construct in CONSTRUCTS.values()] + [(name, CONSTRUCTS[name]) for name in FLAGS]


@pytest.mark.parametrize("name, construct", PAIRS)
def test_derivative_carrying_calls(name, construct):
    with flag(name) if name != "none" else contextlib.nullcontext():
        fn = kernels(construct)
        _, params, x = simple()
        plan = jaxq.make_plan(fn, jaxq.w8a8())(params, x)
        assert plan.names == ("up", "head")
        assert products(jaxq.quantize(fn, plan), params, x) == [("int8", "int8")] * 2
        converted = jaxq.convert(fn, plan)(params, x)
        assert_bitwise(jaxq.qat(fn, plan)(params, x), jaxq.quantize(fn, plan)(converted, x))
        exact = jax.grad(lambda p, x: fn(p, x).sum(), argnums=(0, 1))(params, x)
        near = jax.grad(lambda p, x: jaxq.qat(fn, plan)(p, x).sum(), argnums=(0, 1))(params, x)
        if construct == "custom_vjp":  # the user's own backward, to the letter
            np.testing.assert_array_equal(near[0]["up"], 7 * np.ones((8, 16)))
            np.testing.assert_array_equal(near[1], np.zeros((12, 8)))
        assert cosine(exact, near) > 0.99


def test_a_primitive_that_cannot_be_entered_is_an_error_that_names_it():
    def fn(p, x):
        solved = lax.custom_linear_solve(lambda v: p["m"] @ v, x[0], solve=lambda matvec, b: p["i"] @ b, symmetric=True)
        return solved @ p["w"]

    params = {"m": jnp.eye(4), "i": jnp.eye(4), "w": jnp.eye(4)}
    with pytest.raises(ValueError, match="cannot be entered"):
        jaxq.make_plan(fn, jaxq.w8a8())(params, jnp.ones((2, 4)))
    inside = [s.name for s in jaxq.make_plan(fn, None)(params, jnp.ones((2, 4))).sites if s.obstacle]
    plan = jaxq.make_plan(fn, {**{name: None for name in inside}, "*": jaxq.w8a8()})(params, jnp.ones((2, 4)))
    assert plan["w"].is_integer


def test_the_audit_counts_what_the_analysis_does_not_reach(monkeypatch):
    fn, params, x = simple()
    body, _ = jaxpr.trace(lambda x: lax.map(lambda row: fn(params, row[None])[0], x), x)
    monkeypatch.setattr(jaxpr, "subprogram", lambda eqn: None)
    with pytest.raises(jaxq.CoverageError, match="2 operations"):
        analyze(body, [None], ())


# --- transformations ---


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_jit_and_checkpoint_change_nothing(wrap):
    fn, params, x = simple()
    quantized = jaxq.qat(fn, jaxq.w8a8())
    assert_bitwise(quantized(params, x), wrap(quantized)(params, x))
    inside = jaxq.qat(wrap(fn), jaxq.w8a8())
    assert_bitwise(quantized(params, x), inside(params, x))


def test_checkpointed_gradients_are_the_gradients():
    fn, params, x = simple()

    def grad(f):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x) ** 2)))(params, x)

    plain, saved = grad(jaxq.qat(fn)), grad(jax.checkpoint(jaxq.qat(fn)))
    np.testing.assert_allclose(plain["up"], saved["up"], rtol=1e-5, atol=1e-5)


def test_vmap_with_static_ranges_is_a_loop():
    fn, params, x = simple()
    plan = jaxq.calibrate(fn, jaxq.w8a8(static=True), progress=False)(params, [x])
    stack = jnp.stack([x, 2 * x, -x])
    quantized = jaxq.quantize(fn, plan)
    batched = jax.jit(jax.vmap(quantized, in_axes=(None, 0)))(params, stack)
    for got, one in zip(batched, stack, strict=True):
        assert_bitwise(got, quantized(params, one))


def test_scanned_is_unrolled():
    keys = jax.random.split(jax.random.key(3), 5)
    stack = {"w": jax.random.normal(keys[0], (4, 8, 8))}
    x = jax.random.normal(keys[1], (6, 8))

    def scanned(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for n in range(4):
            x = jnp.tanh(x @ p["w"][n])
        return x

    assert_bitwise(jaxq.qat(scanned)(stack, x), jaxq.qat(unrolled)(stack, x))
    static = jaxq.calibrate(scanned, jaxq.w8a8(static=True), progress=False)(stack, [x])
    loop = jaxq.calibrate(unrolled, jaxq.w8a8(static=True), progress=False)(stack, [x])
    assert static.range("w")[0].hi.shape == (4,)
    for n, ranges in enumerate(loop.ranges):
        np.testing.assert_array_equal(static.range("w")[0].hi[n], ranges[0].hi)
    assert_bitwise(jaxq.qat(scanned, static)(stack, x), jaxq.qat(unrolled, loop)(stack, x))


@pytest.mark.parametrize("name", ["scan_remat", "linen_resnet", "lstm"])
def test_export_serializes_and_serves_the_same(name):
    entry = model(name)
    plan = jaxq.make_plan(entry.fn, jaxq.w8a8())(entry.params, *entry.args)
    converted = jaxq.convert(entry.fn, plan)(entry.params, *entry.args)
    leaves, structure = jax.tree.flatten(converted)
    serve = jax.jit(lambda leaves, *args: jaxq.quantize(entry.fn, plan)(jax.tree.unflatten(structure, leaves), *args))
    blob = jax.export.export(serve)(leaves, *entry.args).serialize()
    again = jax.export.deserialize(bytearray(blob)).call(leaves, *entry.args)
    assert_bitwise(serve(leaves, *entry.args), again)


def test_export_with_a_symbolic_batch():
    fn, params, x = simple()
    plan = jaxq.calibrate(fn, jaxq.w8a8(static=True), progress=False)(params, [x])
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 8), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: jaxq.quantize(fn, plan)(params, x)))(shape)
    assert_bitwise(exported.call(x), jaxq.quantize(fn, plan)(params, x))


def test_sharded_is_unsharded():
    fn, params, x = simple()
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    assert_bitwise(jaxq.qat(fn)(params, placed), jaxq.qat(fn)(params, x))


def test_quantizing_twice_and_quantizing_a_gradient():
    fn, params, x = simple()
    once = jaxq.qat(fn)
    assert products(jaxq.qat(once), params, x) == [("int8", "int8")] * 2

    def gradient(p, x):
        return jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(p)

    plan = jaxq.make_plan(gradient, jaxq.w8a8())(params, x)
    backward = [d for d in plan.decisions if d.reason == "backward pass"]
    assert len(backward) >= 3 and len(plan.decisions) - len(backward) == 2


# --- arguments and caching ---


def test_static_arguments_are_static_by_themselves():
    def fn(p, x, train, *, mode="relu", scale=None):
        x = x @ p["up"]
        x = jax.nn.relu(x) if mode == "relu" else x
        return (2 * x if train else x) * (1.0 if scale is None else scale)

    _, params, x = simple()
    quantized = jaxq.quantize(fn)
    assert_bitwise(quantized(params, x, True), 2 * quantized(params, x, False))
    assert float(quantized(params, x, False, mode="none").min()) < 0
    assert quantized(params, x, False, scale=0.5).shape == (12, 16)


@pytest.mark.parametrize("verb", [jaxq.qat, jaxq.quantize])
def test_calling_twice_traces_once(verb):
    _, params, x = simple()
    traces = []

    def fn(p, x):
        traces.append(1)
        return x @ p["up"]

    wrapped = verb(fn, jaxq.w8a8())
    wrapped(params, x)
    first = len(traces)
    wrapped(params, x)
    verb(fn, jaxq.w8a8())(params, x)
    assert len(traces) == first == 1


def test_the_cache_does_not_keep_functions_alive():
    from jaxq.interpretation import transforms

    gc.collect()
    before = len(transforms._RUNNERS)
    fn, params, x = simple()
    wrapped = jaxq.quantize(fn)
    wrapped(params, x)
    assert len(transforms._RUNNERS) == before + 1
    del fn, wrapped
    gc.collect()
    assert len(transforms._RUNNERS) == before


def test_plans_serve_other_batch_sizes_and_the_loss():
    fn, params, x = simple()
    plan = jaxq.calibrate(fn, jaxq.w8a8(static=True), progress=False)(params, [x])
    assert jaxq.quantize(fn, plan)(params, x[:3]).shape == (3, 4)
    loss = jaxq.qat(lambda p, x, y: jnp.mean((fn(p, x) - y) ** 2), plan)
    assert np.isfinite(loss(params, x, jnp.zeros((12, 4))))


def test_adapters_train_on_a_quantized_base():
    fn, params, x = simple()
    plan = jaxq.make_plan(fn, jaxq.w8a8())(params, x)
    base = jaxq.convert(fn, plan)(params, x)

    def adapted(scale, base, x):
        return jnp.sum(scale * jaxq.quantize(fn, plan)(base, scale * x))

    assert float(jnp.abs(jax.grad(adapted)(jnp.float32(1.5), base, x))) > 0


def test_gradients_by_plan_leaves_exist_and_are_zero():
    fn, params, x = simple()
    plan = jaxq.calibrate(fn, jaxq.w8a8(static=True), progress=False)(params, [x])
    gradient = jax.grad(lambda plan: jnp.sum(jaxq.qat(fn, plan)(params, x)))(plan)
    assert isinstance(gradient, jaxq.Plan)
    assert all(leaf.dtype == jnp.float32 and not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_moving_averages_during_training():
    fn, params, x = simple()
    plan = jaxq.make_plan(fn, jaxq.w8a8(static=True, calibrator=jaxq.ema(0.9)))(params, x)

    def loss(params, plan, x):
        out, plan = jaxq.observe(fn, plan, quantized=True)(params, x)
        return jnp.mean(out**2), plan

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for factor in (1.0, 2.0):
        (_, plan), gradients = step(params, plan, factor * x)
    hi = float(jnp.maximum(x.max(), 0))
    np.testing.assert_allclose(plan.range("up")[0].hi, 0.9 * hi + 0.1 * 2 * hi, rtol=1e-6)
    assert float(jnp.abs(gradients["up"]).max()) > 0


# --- what a fresh reader found ---


def test_closed_over_data_is_data():
    fn, params, x = simple()
    plan = jaxq.make_plan(lambda p: fn(p, x))(params)
    assert plan.names == ("up", "head") and all(d.is_integer for d in plan.decisions)
    assert_bitwise(jaxq.qat(lambda p: fn(p, x))(params), jaxq.qat(fn)(params, x))


def test_a_model_that_would_stay_float_altogether_is_an_error():
    fn, params, x = simple()

    def loss(p, y):
        return jnp.mean((fn(p, x) - y) ** 2)

    with pytest.raises(ValueError, match="nothing would be quantized: up, head"):
        jaxq.make_plan(loss)(params, jnp.zeros((12, 4)))
    plan = jaxq.make_plan(fn)(params, x)
    with pytest.raises(ValueError, match="'up' is quantized in the plan and cannot be here"):
        jaxq.qat(loss, plan)(params, jnp.zeros((12, 4)))


def test_what_is_read_from_a_reference_is_data():
    _, params, x = simple()

    def fn(p, x):
        box = jax.new_ref(jnp.zeros_like(x))
        box[...] = x
        return box[...] @ p["up"]

    assert products(jaxq.qat(fn), params, x) == [("int8", "int8")]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_backward_products_stay_float_however_the_model_is_wrapped(wrap):
    fn, params, x = simple()
    plan = jaxq.make_plan(lambda p, x: jax.grad(lambda p: wrap(fn)(p, x).sum())(p))(params, x)
    assert {d.site.name for d in plan.decisions if d.scheme is not None} <= {"up", "head"}
    assert sum(d.reason == "backward pass" for d in plan.decisions) >= 3


def test_ranges_of_a_loop_condition_see_every_iteration():
    def fn(p, x):
        return lax.while_loop(lambda c: jnp.abs(c[0] @ p["w"]).max() > 30, lambda c: (c[0] * 0.5, c[1] + 1), (x, 0))[1]

    params, x = {"w": jnp.eye(8)}, 100 * simple()[2]
    plan = jaxq.calibrate(fn, jaxq.w8a8(static=True), progress=False)(params, [x])
    assert float(plan.range("w")[0].hi) == float(x.max())
    assert int(jaxq.quantize(fn, plan)(params, x)) == int(fn(params, x))


def test_nan_in_parameters_shows_with_static_ranges():
    _, params, x = simple()

    def fn(p, x):
        return (x + p["bias"][None]) @ p["up"]

    params = {**params, "bias": jnp.zeros(8)}
    plan = jaxq.calibrate(fn, jaxq.w8a8(static=True), progress=False)(params, [x])
    assert np.isnan(jaxq.qat(fn, plan)({**params, "bias": jnp.full(8, jnp.nan)}, x)).all()
    assert np.isfinite(jaxq.qat(fn, plan)(params, x)).all()


def test_calibrating_with_the_weights_in_another_place():
    plan = jaxq.calibrate(lambda x, p: x @ p, jaxq.w8a8(static=True), argnums=1, progress=False)(
        jnp.eye(8), [3 * jnp.eye(8)]
    )
    assert float(plan.ranges[0][0].hi) == 3.0


@pytest.mark.parametrize("argnums", [(0, 2), (2, 0), (-1, 0)])
def test_calibrating_with_weights_in_two_places(argnums):
    def f(up, x, down):
        return (x @ up) @ down

    weights = {0: 2 * jnp.eye(8), 2: jnp.ones((8, 4)), -1: jnp.ones((8, 4))}
    static = jaxq.w8a8(static=True)
    plan = jaxq.calibrate(f, static, argnums=argnums, progress=False)(
        tuple(weights[n] for n in argnums), [3 * jnp.eye(8)]
    )
    assert [float(ranges[0].hi) for ranges in plan.ranges] == [3.0, 6.0]


def test_calibrating_a_function_that_holds_its_weights():
    w = jnp.eye(8)
    plan = jaxq.calibrate(lambda x: x @ w, jaxq.w8a8(static=True), argnums=(), progress=False)((), [3 * jnp.eye(8)])
    assert float(plan.ranges[0][0].hi) == 3.0


def test_changing_a_policy_later_changes_nothing():
    fn, params, x = simple()
    policy = {"*": jaxq.w8a8()}
    quantized = jaxq.quantize(fn, policy)
    policy["*"] = None
    assert products(quantized, params, x) == [("int8", "int8")] * 2


def test_layers_that_some_iterations_skip_can_be_static():
    keys = jax.random.split(jax.random.key(0), 2)
    params, x = {"w": jax.random.normal(keys[0], (2, 8, 8))}, jax.random.normal(keys[1], (4, 8))

    def fn(p, x):
        def step(c, scanned):
            n, w = scanned
            return lax.cond(n % 2 == 0, lambda c: c, lambda c: jnp.tanh(c @ w), c), None

        return lax.scan(step, x, (jnp.arange(2), p["w"]))[0]

    plan = jaxq.calibrate(fn, jaxq.w8a8(static=True), progress=False)(params, [x])
    assert plan.range("w")[0].count.tolist() == [0.0, 1.0]
    np.testing.assert_allclose(jaxq.quantize(fn, plan)(params, x), fn(params, x), atol=0.1)


def test_a_plan_serves_a_part_of_its_program_and_either_operand_order():
    _, params, x = simple()
    weights = {"enc": {"wq": params["up"], "wk": 2 * params["up"]}}
    both = jaxq.calibrate(lambda p, x: x @ p["enc"]["wq"] + x @ p["enc"]["wk"], jaxq.w8a8(static=True), progress=False)
    plan = both(weights, [x])
    assert plan.names == ("enc/wq", "enc/wk")
    assert jaxq.quantize(lambda p, x: x @ p["enc"]["wq"], plan)(weights, x).shape == (12, 16)

    def swapped(p, x):
        return lax.dot_general(p["enc"]["wq"], x, (((0,), (1,)), ((), ())))

    assert_bitwise(
        jaxq.quantize(swapped, plan)(weights, x), jaxq.quantize(lambda p, x: x @ p["enc"]["wq"], plan)(weights, x).T
    )


def test_export_with_a_symbolic_batch_and_dynamic_ranges():
    fn, params, x = simple()
    plan = jaxq.make_plan(fn)(params, x)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 8), jnp.float32)
    converted = jaxq.convert(fn, plan)(params, x)
    exported = jax.export.export(jax.jit(jaxq.quantize(fn, plan)))(converted, shape)
    assert_bitwise(exported.call(converted, x), jaxq.quantize(fn, plan)(converted, x))
