"""Whole programs in integers: the integers of NumPy int64, no float inside, no silence about what is missing."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import integers
import jaxq
from inspection import arrays, assert_bitwise, traced
from jaxq.integer.audit import check, floats
from jaxq.integer.interpret import RULES
from jaxq.integer.moves import MOVES
from jaxq.integer.picks import SEVERAL
from jaxq.integer.tables import ELEMENTWISE
from jaxq.integer.values import wide
from jaxq.programs.floating import FORMS
from random_nets import POLICIES, STATIC, Draw, Judge, Net, Step, drawn, grid
from zoo import model

pytestmark = pytest.mark.shared

SYMMETRIC, ASYMMETRIC = POLICIES[:2]


def calibrated(f, params, *batches, policy=ASYMMETRIC):
    return jaxq.calibrate(f, policy, progress=False)(params, batches)


def assert_integer(program, *args):
    """Assert that a program has no float between its inputs' codes and its outputs'."""
    found = [eqn.primitive.name for eqn in floats(traced(program, *args))]
    assert found == []


def judged(net, policy):
    """Assert that a net in integers is what int64 NumPy says, on data that saturates its ranges."""
    plan = calibrated(net, net.params, net.x, policy=policy)
    qparams = jaxq.convert(net, plan)(net.params, net.x)
    x = net.x * 1.5
    program = jaxq.integer(net, plan)(qparams, x)
    np.testing.assert_array_equal(program(x), Judge(net, plan, qparams)(x))
    assert_integer(program, x)


# --- the integers ----------------------------------------------------------------------------------------------------


def mlp(draw):
    draw.shape = (12,)
    return [draw.dense(16), draw.channels(), Step("relu"), draw.dense(16), *draw.after(), draw.dense(4)]


def lenet(draw):
    draw.shape = (12, 12, 1)
    steps = []
    for outputs in (6, 8):
        steps += [draw.conv(outputs, keep=True), draw.channels(), Step("relu"), Step("max_pool")]
        draw.shape = (draw.shape[0] // 2, draw.shape[1] // 2, outputs)
    draw.shape = (int(np.prod(draw.shape)),)
    return [*steps, Step("flatten"), draw.dense(16), draw.channels(), Step("relu"), draw.dense(10)]


def mobilenet(draw):
    """Two inverted residuals: wider, depthwise, narrower again, with BatchNorm and ReLU6, around a shortcut."""
    draw.shape = (8, 8, 3)
    steps = [draw.conv(4, keep=True), draw.norm(), Step("relu6")]
    for _ in range(2):
        wide = [draw.conv(12, keep=True), draw.norm(), Step("relu6")]
        deep = [draw.conv(12, keep=True, groups=12), draw.norm(), Step("relu6")]
        steps.append(Step("residual", "", [*wide, *deep, draw.conv(4, keep=True), draw.norm()]))
    draw.shape = (4,)
    return [*steps, Step("mean"), draw.dense(5)]


def resnet18(draw):
    """A stem and four stages of two blocks, the first of each of twice the width and half the size; BatchNorms."""
    draw.shape = (8, 8, 3)
    steps = [draw.conv(4, keep=True, size=3), draw.norm(), Step("relu")]
    for stage in range(4):
        for block in range(2):
            start, width, stride = draw.shape, 4 + 2 * stage, 2 if stage and not block else 1
            first = [draw.conv(width, keep=True, groups=1, size=3, stride=stride), draw.norm(), Step("relu")]
            long = [*first, draw.conv(width, keep=True, groups=1, size=3), draw.norm()]
            if draw.shape == start:
                steps.append(Step("residual", "", long))
            else:
                draw.shape = start
                short = [draw.conv(width, keep=True, groups=1, size=1, stride=stride), draw.norm()]
                steps.append(Step("projected", "", (long, short)))
            steps.append(Step("relu"))
    draw.shape = draw.shape[2:]
    return [*steps, Step("mean"), draw.dense(5)]


def unet(draw):
    """Two levels down and up again, each beside what was at its size before; a number for each pixel."""
    draw.shape = (8, 8, 3)

    def convs(width):
        return [draw.conv(width, keep=True, groups=1, size=3), draw.channels(), Step("relu")]

    def level(width, below):
        before = convs(width)
        h, w, _ = draw.shape
        draw.shape = (h // 2, w // 2, width)
        inner = [Step("max_pool"), *below(), Step("upsample")]
        draw.shape = (h, w, width + draw.shape[2])
        return [*before, Step("concat", "", inner), *convs(width)]

    return [*level(4, lambda: level(6, lambda: convs(8))), draw.conv(2, keep=True, groups=1, size=1)]


def built(steps, seed):
    draw = Draw(seed)
    listed = steps(draw)
    shapes = {mlp: (12,), lenet: (12, 12, 1), mobilenet: (8, 8, 3), resnet18: (8, 8, 3), unet: (8, 8, 3)}
    return Net(listed, draw.params, jnp.asarray(draw.rng.normal(size=(3, *shapes[steps])), jnp.float32))


CASES = {
    "mlp": (lambda: built(mlp, 0), POLICIES[5]),
    "lenet": (lambda: built(lenet, 1), POLICIES[3]),
    "mobilenet": (lambda: built(mobilenet, 2), POLICIES[2]),
    "concat": (lambda: drawn(10), POLICIES[4]),
    "resnet18": (lambda: built(resnet18, 3), POLICIES[1]),
    "unet": (lambda: built(unet, 4), POLICIES[1]),
}


@pytest.mark.parametrize("name", CASES)
def test_programs_give_the_integers_of_numpy(name):
    net, policy = CASES[name]
    judged(net(), policy)


@pytest.mark.long
def test_random_programs_give_the_integers_of_numpy():
    for seed in range(200):
        judged(drawn(seed), POLICIES[seed % len(POLICIES)])


def test_a_residual_net_of_flax_has_no_float_inside():
    net = model("linen_resnet")
    plan = calibrated(net.fn, net.params, net.args)
    program = jaxq.integer(net.fn, plan)(net.params, *net.args)
    assert_integer(program, *net.args)
    out = jax.jit(program)(*net.args)
    # As far from float as the same plan is with float between its sites.
    exact = net.fn(net.params, *net.args)
    other = jax.jit(jaxq.quantize(net.fn, plan))(net.params, *net.args)
    assert np.abs(out - exact).max() <= 1.5 * np.abs(other - exact).max()
    # One program for every batch, exported for every platform.
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 8, 8, 3), jnp.float32)
    exported = jax.export.export(jax.jit(program), platforms=("cpu", "cuda", "tpu"))(shape)
    assert_bitwise(exported.call(net.args[0][:2]), out[:2])


ZOO = [
    "mlp",
    "lhs_weight",
    "nnx_mlp",
    "linen_vmap",
    "nnx_vmap",
    "lora",
    "weight_norm",
    "bfloat16_mlp",
    "einsum3",
    "jit_helper",
    "linen_cnn_eval",
    "nnx_cnn",
    "depthwise_separable",
    "grouped_conv",
    "transposed_conv",
    "dilated_conv",
    "conv1d",
    "conv3d",
    "nchw_conv",
    "remat",
    "custom_jvp",
    "custom_vjp",
]


@pytest.mark.long
@pytest.mark.parametrize("name", ZOO)
def test_models_of_every_kind_have_no_float_inside(name):
    net = model(name)
    plan = calibrated(net.fn, net.params, net.args)
    program = jaxq.integer(net.fn, plan)(net.params, *net.args)
    assert_integer(program, *net.args)
    exact, other = net.fn(net.params, *net.args), jax.jit(jaxq.quantize(net.fn, plan))(net.params, *net.args)
    for a, b, c in zip(*map(arrays, (program(*net.args), exact, other)), strict=True):
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        assert np.abs(a - b).max() <= 2 * np.abs(c - b).max()


# --- what follows a sum is exact --------------------------------------------------------------------------------------


def after_sums(params, x):
    """Operations on sums that no grid of int8 comes after."""
    y = x @ params["w"] + params["b"]
    image = y.reshape(-1, 2, 2, 2)
    return {
        "sums": y,
        "leaky": jax.nn.leaky_relu(y),
        "clip": jnp.clip(y, -0.3, 0.7),
        "max": jnp.max(y, axis=-1),
        "min": -jnp.min(y, axis=0),
        "mean": jnp.mean(y, axis=-1),
        "joined": jnp.concatenate([y[:, :3], jnp.ones((x.shape[0], 1)), 2 - y[:, 3:]], axis=1),
        "stacked": jnp.stack([jnp.split(y, [3], axis=1)[1], y[:, :5] * params["b"][:, :5]], 1),
        "tiled": jnp.tile(y * params["b"], (1, 2)),
        "padded": jnp.pad(y, ((0, 0), (1, 2)), constant_values=0.5) + jnp.arange(11.0)[None],
        "chosen": jnp.where(y > y.T[:1, :1], 2.0, -0.25),
        "product": y * y[::-1],
        "square": jnp.mean(jnp.square(y) + y**2, axis=-1) / 2,
        "where": jnp.where(y > y.T[:1, :1], y, 0.25),
        "pool": lax.reduce_window(image, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4,
    }


def test_what_follows_a_sum_is_exact_but_for_thirty_bits():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), "b": jnp.linspace(-1.0, 1.0, 8)[None]}
    x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    program = jaxq.integer(after_sums, calibrated(after_sums, params, x))(params, x)
    outs = {name: np.asarray(y, np.float64) for name, y in program(x).items()}
    assert_integer(program, x)
    y, b = outs["sums"], np.linspace(-1.0, 1.0, 8)
    around = np.pad(y.reshape(-1, 2, 2, 2), ((0, 0), (0, 1), (0, 1), (0, 0)))
    wanted = {
        "leaky": np.where(y >= 0, y, 0.01 * y),
        "clip": np.clip(y, -0.3, 0.7),
        "max": y.max(-1),
        "min": -y.min(0),
        "mean": y.mean(-1),
        "joined": np.concatenate([y[:, :3], np.ones((8, 1)), 2 - y[:, 3:]], 1),
        "stacked": np.stack([y[:, 3:], y[:, :5] * b[:5]], 1),
        "tiled": np.tile(y * b, (1, 2)),
        "padded": np.pad(y, ((0, 0), (1, 2)), constant_values=0.5) + np.arange(11),
        "chosen": np.where(y > y[0, 0], 2, -0.25),
        "product": y * y[::-1],
        "square": (y * y).mean(-1),
        "where": np.where(y > y[0, 0], y, 0.25),
        "pool": (around[:, :2, :2] + around[:, :2, 1:] + around[:, 1:, :2] + around[:, 1:, 1:]) / 4,
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(outs[name], value, atol=3e-4, err_msg=name)  # a step of the sums


def test_questions_about_sums_are_answered_in_integers():
    def f(params, x):
        y = x @ params["w"]
        return y, jnp.argmax(y, axis=-1), y >= 0.5, y < -0.25, (y > 1.0).astype(jnp.int32).sum(-1), y >= -0.5

    w, x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 8)), jnp.float32), jnp.eye(6)
    program = jaxq.integer(f, calibrated(f, {"w": w}, x))({"w": w}, x)
    assert_integer(program, x)
    y, which, *answers = (np.asarray(out) for out in program(x))
    np.testing.assert_array_equal(which, y.argmax(-1))
    for answer, wanted in zip(answers, [y >= 0.5, y < -0.25, (y > 1).sum(-1), y >= -0.5], strict=True):
        np.testing.assert_array_equal(answer, wanted)


# --- tables ----------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "gelu": jax.nn.gelu,
    "exact_gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "hard_swish": jax.nn.hard_swish,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "folded": lambda x: 0.3 * jnp.abs(x),
    "exp": lambda x: jnp.exp(jnp.minimum(x, 1.0)),
    "own": lambda x: jnp.where(x > 0, jnp.sin(jnp.minimum(x, 1.5)), 0.1 * x**2),
}
LINES = ("gelu", "exact_gelu", "silu", "hard_swish", "tanh", "elu", "folded")


def test_functions_of_a_sum_become_tables():
    def f(params, x):
        h = x @ params["w"] + params["b"]
        return h, {name: g(h) @ params[name] for name, g in FUNCTIONS.items()}

    rng = np.random.default_rng(2)
    params = {name: jnp.eye(16) for name in FUNCTIONS}
    params |= {"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), "b": jnp.linspace(-0.5, 0.5, 16)[None]}
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    plan = calibrated(f, params, x)
    program = jaxq.integer(f, plan)(params, x)
    assert_integer(program, x)
    h, outs = program(x)
    for name, g in FUNCTIONS.items():
        want = np.asarray(g(h), np.float64)
        # Half a step of the result, and half a step of the argument times the slope.
        step = (want.max() - want.min()) / 255
        argument = (float(h.max()) + 8) / 4094
        slope = {"exp": np.e, "own": 2.0}.get(name, 1.2)
        assert np.abs(np.asarray(outs[name]) - want).max() <= 0.51 * (step + slope * argument), name


def test_functions_that_no_site_takes_are_a_line_and_a_table():
    def f(params, x):
        h = x @ params["w"]
        return h, {name: jnp.mean(g(h), axis=-1, keepdims=True) + h for name, g in FUNCTIONS.items() if name in LINES}

    w, x = (jnp.asarray(np.random.default_rng(seed).normal(size=(8, 8)), jnp.float32) for seed in (4, 5))
    program = jaxq.integer(f, calibrated(f, {"w": w}, x))({"w": w}, x)
    assert_integer(program, x)
    h, outs = program(x)
    for name, y in outs.items():
        # Lines between 257 points; I-BERT's polynomial is 1.9e-2 off GELU.
        np.testing.assert_allclose(y, jnp.mean(FUNCTIONS[name](h), -1, keepdims=True) + h, atol=2e-3, err_msg=name)


def test_a_table_of_int8_is_the_function_on_all_256_values():
    static = jaxq.int8(symmetric=False, **STATIC)
    scheme = jaxq.Scheme(jaxq.int8(), static, out=static)

    def f(params, x):
        return jax.nn.silu(x @ params["up"]) @ params["down"]

    rng = np.random.default_rng(3)
    shapes = {"up": (8, 32), "down": (32, 4)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    plan = calibrated(f, params, x, policy={"up": scheme, "down": ASYMMETRIC})
    weights = {name: q.plain() for name, q in jaxq.convert(f, plan)(params, x).items()}
    codes = {name: (np.asarray(q.codes, np.int64), np.asarray(q.scale, np.float64)) for name, q in weights.items()}
    enters, leaves = (grid(static, plan.range("up")[n]) for n in (0, 2))
    takes = grid(plan["down"].quantizers[0], plan.range("down")[0])
    v = integers.narrowed(integers.dense(integers.entered(np.asarray(x), enters), *codes["up"], enters), leaves)
    v = integers.table(v, leaves, lambda reals: np.asarray(jax.nn.silu(reals)), takes)
    out = integers.left(integers.dense(v, *codes["down"], takes))
    np.testing.assert_array_equal(jaxq.integer(f, plan)(params, x)(x), out)


# --- inputs ----------------------------------------------------------------------------------------------------------


def linear(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"])


LINEAR = {"w": jnp.eye(4), "b": jnp.full((1, 4), 0.5)}


def test_inputs_saturate_and_nan_enters_as_zero():
    x = jnp.array([[1.0, -1.0, 0.5, 0.25]])
    program = jaxq.integer(linear, calibrated(linear, LINEAR, x))(LINEAR, x)
    far = jnp.array([[1e30, -jnp.inf, 3.0, jnp.nan]])
    assert_bitwise(program(far), program(jnp.array([[2.0, -2.0, 2.0, 0.0]])))
    np.testing.assert_allclose(program(far), [[1.5, 0.0, 1.5, 0.5]], atol=0.01)
    with pytest.raises(TypeError, match="no derivative.*train with jaxq.qat"):
        jax.grad(lambda x: program(x).sum())(x)
    assert repr(program) == "IntegerProgram(1 sites)"


def test_an_input_enters_on_a_grid_that_covers_all_its_sites():
    def f(params, x):
        return x[:, :2] @ params["w"][:2] + x @ params["v"]

    params, x = {"w": jnp.eye(4), "v": jnp.eye(4)}, jnp.array([[0.5, -3.0, 8.0, -1.0]])
    program = jaxq.integer(f, calibrated(f, params, x))(params, x)
    assert_integer(program, x)
    np.testing.assert_allclose(program(x), f(params, x), atol=0.05)


def test_pixels_enter_as_they_are():
    def f(params, pixels):
        return linear(params, (pixels.astype(jnp.float32) / 255.0 - 0.5) / 0.25)

    x = jnp.arange(0, 256, 8, dtype=jnp.uint8).reshape(8, 4)
    program = jaxq.integer(f, calibrated(f, LINEAR, x))(LINEAR, x)
    assert_integer(program, x)
    np.testing.assert_allclose(program(x), f(LINEAR, x), atol=4 / 255 * 0.51)


INTEGERS = {
    "half": lambda i: i.astype(jnp.float32) - 0.5,
    "least": lambda i: jnp.minimum(i.astype(jnp.float32), 2.5),
    "sum": lambda i: i.astype(jnp.float32).sum() + 0.25,
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_that_become_real_numbers_have_fractions_or_are_refused(name):
    def f(params, i):
        del params
        return INTEGERS[name](i)

    for dtype in (jnp.uint16, jnp.int16, jnp.int32):
        i = jnp.arange(4, dtype=dtype)
        plan = calibrated(f, LINEAR, i)
        if dtype == jnp.int32:
            with pytest.raises(ValueError, match=r"integers of 32 bits: give the program int16 or less"):
                jaxq.integer(f, plan)(LINEAR, i)
        else:
            np.testing.assert_array_equal(jaxq.integer(f, plan)(LINEAR, i)(i), f(LINEAR, i))


def test_zero_limits_codes_that_do_not_reach_it():
    def f(params, x):
        h = jnp.exp(jnp.clip(x @ params["w"], -1, 1)).reshape(-1, 2, 2).max(-1)  # above 0.36
        return jnp.minimum(h, 0), jnp.maximum(-h, 0), jnp.maximum(h, 0) - h

    static = jaxq.int8(**STATIC)
    x = jnp.array([[0.5, -1.0, -2.0, -3.0]])
    plan = calibrated(f, LINEAR, x, policy=jaxq.Scheme(jaxq.int8(), static, out=static))
    for out in jaxq.integer(f, plan)(LINEAR, x)(x):
        np.testing.assert_array_equal(out, 0)


def test_an_image_of_weights_takes_kernels_with_zero_points():
    def f(params, kernel):
        return lax.conv_general_dilated(params["w"], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    rng = np.random.default_rng(8)
    params, kernel = (
        {"w": jnp.asarray(rng.normal(size=(2, 6, 6, 3)), jnp.float32)},
        jnp.asarray(rng.random((3, 3, 3, 4))),
    )
    program = jaxq.integer(f, calibrated(f, params, kernel))(params, kernel)
    np.testing.assert_allclose(program(kernel), f(params, kernel), atol=0.1)


# --- refusals --------------------------------------------------------------------------------------------------------


def multiplied(params, x):
    return jnp.cumprod(x @ params["w"], 0)


def curved(params, x):
    return jnp.log(x) @ params["w"]


def logarithm(params, x):
    return jnp.log(x @ params["w"]) @ params["b"].T


def looped(params, x):
    return lax.while_loop(lambda c: c[0, 0] < 9, lambda c: 2 * c, x @ params["w"])


def truncated(params, x):
    return (x @ params["w"]).astype(jnp.int32)


def counted(params, x):
    return (jnp.tanh(x @ params["w"]) > 0.5).astype(jnp.int32).sum(-1)


def unbounded(params, x):
    return jnp.mean((x @ params["w"]) ** 3, axis=-1)


REFUSED = [
    (multiplied, ASYMMETRIC, "cumprod has no integer form"),
    (curved, ASYMMETRIC, "takes log, which is (nan|-inf) at"),
    (logarithm, ASYMMETRIC, "site 'b' at .*clip it first"),
    (looped, ASYMMETRIC, "while at .*known number of steps"),
    (truncated, ASYMMETRIC, "convert_element_type at .*leave it to the caller"),
    (counted, ASYMMETRIC, "convert_element_type at .*leave it to the caller"),
    (
        lambda p, x: jnp.round(jnp.tanh(x @ p["w"])).astype(int).sum(-1),
        ASYMMETRIC,
        "convert_element_type at .*leave it",
    ),
    (lambda p, x: jnp.pad(x @ p["w"], 1, constant_values=-jnp.inf), ASYMMETRIC, "pad .*not finite"),
    (lambda p, x: jnp.pad(x @ p["w"], 1, constant_values=1e9), ASYMMETRIC, r"pad .*puts in 1e\+09, beside which"),
    (lambda p, x: jnp.where(x > 0.5, x @ p["w"], -1e9), ASYMMETRIC, "an output is a number that is far from all"),
    (lambda p, x: jnp.where(x > 0.5, x @ p["w"], -1e9).sum(-1), ASYMMETRIC, "reduce_sum at .*takes a number .* far"),
    (lambda p, x: jnp.append(x @ p["w"], 1e9 + jnp.zeros((1, 4)), 0), ASYMMETRIC, r"concatenate .*puts in 1e\+09"),
    (lambda p, x: jnp.maximum(x @ p["w"], jnp.nan), ASYMMETRIC, "max at .*is NaN"),
    (unbounded, ASYMMETRIC, "reduce_sum at .*takes integer_pow.*neither bounded nor"),
    (linear, jaxq.w8a8(), r"site 'w' at .*test_integer.py:\d+.*operand 0 on a grid that is not fixed .*calibrate it"),
    (linear, None, "site 'w' at .*stays float in the plan .no rule matches."),
    (linear, jaxq.weight_only(), "site 'w' at .*operand 0 in float"),
    (linear, jaxq.Scheme(jaxq.int8(group=2), jaxq.int8(**STATIC)), "site 'w' at .*drop group="),
    (linear, jaxq.Scheme(jaxq.uint8(), jaxq.int8(**STATIC)), "site 'w' at .*zero points"),
    (linear, jaxq.Scheme(jaxq.int8(), jaxq.fixed(8, 4, overflow=jaxq.Wrap())), "site 'w' at .*saturated"),
]


@pytest.mark.parametrize(("f", "policy", "message"), REFUSED)
def test_what_has_no_integer_form_is_named(f, policy, message):
    x = jnp.ones((2, 4))
    plan = calibrated(f, LINEAR, x, policy=policy)
    with pytest.raises(ValueError, match=message):
        jaxq.integer(f, plan)(LINEAR, x)


FAST = {
    "sine": lambda h: jnp.sin(3 * h),
    "sine_of_a_site": lambda h: jnp.sin(3 * h) @ jnp.eye(4),
    "sawtooth": lambda h: h % 1.0,
    "tangent": jnp.tan,
}
WIDE, DATA = {"w": jnp.asarray(np.random.default_rng(6).normal(size=(512, 4)), jnp.float32)}, jnp.ones((2, 512))


@pytest.mark.parametrize("name", FAST)
def test_functions_that_change_within_a_step_of_a_table_are_refused(name):
    def f(params, x):
        return FAST[name](x @ params["w"])

    plan = calibrated(f, WIDE, DATA)
    with pytest.raises(ValueError, match=r"takes \w+.* A softmax or a norm of rows needs no table"):
        jaxq.integer(f, plan)(WIDE, DATA)


def test_what_is_float_rounding_beside_a_line_does_not_count():
    def f(params, x):
        h = x @ params["w"]
        return h, jax.nn.gelu(100 * h) / 100

    x = jnp.asarray(np.random.default_rng(9).normal(size=(8, 512)), jnp.float32)
    h, out = jaxq.integer(f, calibrated(f, WIDE, x))(WIDE, x)(x)
    np.testing.assert_allclose(out, jax.nn.relu(h), atol=3e-3)


@pytest.mark.parametrize("g", [jnp.tanh, jax.nn.gelu, lambda h: jnp.exp(-jnp.square(1e9 * h))])
def test_functions_of_nothing_but_zeros_are_known(g):
    def f(params, x):
        h = g(x @ params["w"])
        return h, h @ jnp.eye(4) + 1

    zeros, x = {"w": jnp.zeros((4, 4))}, jnp.ones((2, 4))
    plan = calibrated(f, zeros, x)
    for out, want in zip(jaxq.integer(f, plan)(zeros, x)(x), f(zeros, x), strict=True):
        np.testing.assert_allclose(out, want, atol=0.01)


def test_a_narrow_peak_is_followed_where_it_changes():
    def f(params, x):
        return jnp.exp(-jnp.square(10 * (x @ params["w"])))

    x = jnp.asarray(np.random.default_rng(9).normal(size=(64, 512)), jnp.float32)
    plan = calibrated(f, WIDE, x)
    sums = jaxq.integer(lambda params, x: x @ params["w"], plan)(WIDE, x)(x)
    np.testing.assert_allclose(jaxq.integer(f, plan)(WIDE, x)(x), jnp.exp(-jnp.square(10 * sums)), atol=1e-3)


def test_a_table_is_asked_only_for_what_its_argument_may_be():
    def f(params, x):
        return jnp.sqrt(jax.nn.relu(x @ params["w"]).max(-1))

    grid8 = jaxq.int8(**STATIC)
    x = jnp.array([[0.5, -1.0, 2.0, -3.0], [1.0, 3.0, -2.0, 0.25]])
    program = jaxq.integer(f, calibrated(f, LINEAR, x, policy=jaxq.Scheme(jaxq.int8(), grid8, out=grid8)))(LINEAR, x)
    np.testing.assert_allclose(program(x), f(LINEAR, x), atol=0.02)


def test_functions_that_jump_are_tables_all_the_same():
    def f(params, x):
        h = x @ params["w"]
        return h, jnp.sign(h) @ jnp.eye(4), jnp.floor(4 * jnp.tanh(h)) @ jnp.eye(4)

    x = jnp.asarray(np.random.default_rng(7).normal(size=(64, 512)), jnp.float32)
    h, *outs = jaxq.integer(f, calibrated(f, WIDE, x))(WIDE, x)(x)
    for out, g in zip(outs, (jnp.sign, lambda h: jnp.floor(4 * jnp.tanh(h))), strict=True):
        # But for what is half a step of the argument beside a jump.
        assert np.mean(np.abs(out - g(h)) > 0.05) < 0.02


def test_what_a_chain_of_functions_takes_twice_is_computed_once():
    def f(params, x):
        y = x @ params["w"]
        for _ in range(24):
            y = y + 0.1 * jnp.sin(y)
        return y @ jnp.eye(4)

    x = DATA[:, :4]
    program = jaxq.integer(f, calibrated(f, LINEAR, x))(LINEAR, x)
    np.testing.assert_allclose(program(x), f(LINEAR, x), atol=0.05)


def test_plans_without_ranges_are_refused():
    x = jnp.ones((2, 4))
    with pytest.raises(TypeError, match=r"needs static ranges: plan = jaxq.calibrate"):
        jaxq.integer(linear, ASYMMETRIC)
    with pytest.raises(ValueError, match=r"seen no data: w; run jaxq.calibrate"):
        jaxq.integer(linear, jaxq.make_plan(linear, ASYMMETRIC)(LINEAR, x))(LINEAR, x)


def test_programs_are_built_outside_of_jit():
    x = jnp.ones((2, 4))
    plan = calibrated(linear, LINEAR, x)
    with pytest.raises(TypeError, match="build it outside of jit"):
        jax.jit(lambda params, x: jaxq.integer(linear, plan)(params, x)(x))(LINEAR, x)


def test_weights_that_are_codes_are_not_put_out():
    x = jnp.ones((2, 4))
    plan = calibrated(linear, LINEAR, x)
    qparams = jaxq.convert(linear, plan)(LINEAR, x)
    with pytest.raises(
        ValueError, match="an output reads a weight of which .* codes alone: take it from the parameters"
    ):
        jaxq.integer(lambda params, x: (linear(params, x), params["w"]), plan)(qparams, x)


def test_all_problems_are_listed_at_once():
    def f(params, x):
        y = x @ params["w"]
        return jnp.cumprod(y), jnp.prod(y), y.astype(jnp.int32) + 1

    plan = calibrated(f, LINEAR, jnp.ones((2, 4)))
    with pytest.raises(ValueError) as error:
        jaxq.integer(f, plan)(LINEAR, jnp.ones((2, 4)))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("3 in all:") and [re.split(r"\W+", line)[1] for line in lines[1:]] == [
        "cumprod",
        "reduce_prod",
        "convert_element_type",
    ]


# --- the rules of TensorFlow Lite ------------------------------------------------------------------------------------


def attentive(p, x):
    """Attention of one head, and two dense layers, after a tanh and a logistic function."""
    h = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x @ p["query"], x @ p["key"])) @ (x @ p["value"])
    return jax.nn.sigmoid(jnp.tanh(h) @ p["up"]).reshape(x.shape[0], -1) @ p["down"]


def attentive_params():
    rng = np.random.default_rng(5)
    shapes = {name: (8, 8) for name in ("query", "key", "value", "up")} | {"down": (48, 4)}
    return {name: jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32) for name, s in shapes.items()}


def test_scales_of_functions_are_those_of_tensorflow_lite():
    params, x = attentive_params(), jnp.asarray(np.random.default_rng(6).normal(size=(3, 6, 8)), jnp.float32)
    plan = calibrated(attentive, params, x, policy=jaxq.tflite())
    after = {site.name: [operand.after for operand in site.operands] for site in plan.sites}
    (pv,) = (name for name, functions in after.items() if "softmax" in functions)
    assert after["up"] == ["tanh", ""] and after["down"] == ["logistic", ""]
    # Scale, zero point and codes: 1/256 from -128, 1/128 around zero, weights without -128.
    fixed = {pv: (1 / 256, -128, -128, 127), "down": (1 / 256, -128, -128, 127), "up": (1 / 128, 0, -128, 127)}
    for name, wanted in fixed.items():
        number = next(n for n, function in enumerate(after[name]) if function)
        assert tuple(grid(plan[name].quantizers[number], None)) == wanted
    assert plan["up"].scheme.weight.bounds() == (-127, 127) and not plan["query"].scheme.act.symmetric
    other = next(q for q, function in zip(plan[pv].quantizers, after[pv], strict=True) if not function)
    assert other == plan["query"].scheme.act
    assert jaxq.Plan.from_json(plan.to_json()) == plan

    qparams, program = jaxq.convert(attentive, plan)(params, x), jaxq.integer(attentive, plan)(params, x)
    imitated, exact = jaxq.quantize(attentive, plan)(qparams, x), attentive(params, x)
    assert_bitwise(jaxq.qat(attentive, plan)(params, x), imitated)
    assert np.abs(program(x) - imitated).max() < 0.01 * np.abs(exact).max()
    assert np.abs(imitated - exact).max() < 0.03 * np.abs(exact).max()
    assert_integer(program, x)
    revised = jaxq.revise(plan, {"up": jaxq.w8a8(static=True)})
    assert revised["up"].quantizers[0] == jaxq.w8a8(static=True).scheme.act and revised["down"] == plan["down"]


def test_functions_of_a_known_range_are_named():
    with pytest.raises(ValueError, match="softmax, tanh, logistic, got 'gelu'"):
        jaxq.After("gelu", jaxq.int8())
    with pytest.raises(TypeError, match=r"jaxq.fixed\(8, 7\), got 8"):
        jaxq.After("tanh", 8)
    with pytest.raises(TypeError, match=r"a tuple of jaxq.After"):
        jaxq.Scheme(jaxq.int8(), jaxq.int8(), after={"tanh": jaxq.int8()})
    with pytest.raises(ValueError, match="takes the place of act="):
        jaxq.Scheme(jaxq.int8(), after=(jaxq.After("tanh", jaxq.fixed(8, 7)),))


def unformed(params, x):
    h = jnp.cumprod(x @ params["w"], -1) + jnp.cumprod(params["w"], -1)[:1]  # of which the second is computed ahead
    h = lax.while_loop(lambda h: h[0, 0] > 0, jnp.negative, h)
    with jax.named_scope("block"):
        h = lax.fori_loop(0, 2, lambda i, h: lax.cumlogsumexp(h, 1), h)
    return h @ params["b"].T


def test_plans_tell_what_has_no_integer_form():
    plan = jaxq.make_plan(unformed, {"b": None, "*": jaxq.w8a8()})(LINEAR, jnp.ones((2, 4)))
    with pytest.raises(ValueError) as caught:
        plan.check(integer_only=True)
    line = r" at test_integer.py:\d+:\d+ \(unformed.*"
    wanted = [
        "the plan fails its check:",
        f"site 'w'{line}not fixed .*calibrate it",
        f"site 'b'{line}stays float in the plan .by policy.",
        f"cumprod{line}has no integer form",
        f"while{line}has no integer form",
        f"cumlogsumexp{line}in block has no integer form",
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(wanted) and all(map(re.search, wanted, lines)), lines
    assert jaxq.Plan.from_json(plan.to_json()).floats == plan.floats
    text = json.loads(plan.to_json())
    del text["floats"]  # as in a file of before
    with pytest.raises(ValueError, match="not looked at: use jaxq.make_plan"):
        jaxq.Plan.from_json(json.dumps(text)).check(integer_only=True)
    f, static = (lambda p, x: jax.nn.gelu(x @ p["w"])), jaxq.w8a8(static=True)
    jaxq.make_plan(f, static)(LINEAR, jnp.ones((2, 4))).check(integer_only=True)


def test_forms_are_known_by_the_names_of_the_rules():
    assert {p.name for p in (*RULES, *MOVES, *ELEMENTWISE, *SEVERAL, lax.split_p)} == FORMS


def test_an_audit_finds_floats():
    with pytest.raises(RuntimeError, match=r"2 operations of this integer program are float.*\n  tanh at"):
        check(jax.make_jaxpr(lambda x: jax.jit(jnp.tanh)(x) > 0)(jnp.ones(2)))


def test_arguments_that_are_no_arrays_are_static():
    def f(params, x, twice, *, half):
        return linear(params, x) * (2 if twice else 1) / (2 if half else 1)

    x = jnp.array([[1.0, -1.0, 0.5, 0.25]])
    plan = jaxq.calibrate(f, ASYMMETRIC, progress=False)(LINEAR, [(x, True)], half=False)
    program = jaxq.integer(f, plan)(LINEAR, x, True, half=False)
    assert_bitwise(program(x, True, half=False), 2 * program(x, False, half=False))
    assert_bitwise(program(x, True, half=True), program(x, False, half=False))


def test_codes_that_int32_may_not_hold_are_refused():
    with pytest.raises(ValueError, match="may reach 2147483649, which int32 does not hold"):
        wide(jnp.zeros((1,), jnp.int32), np.ones(1), np.array([-(2**31) - 1]), np.array([0]))
