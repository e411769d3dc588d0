"""Corners of integer programs, against the float program and its imitation: scalars, masks, loops, inputs in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq.integer.quotients import divided

pytestmark = pytest.mark.shared
STATIC = jaxq.w8a8(static=True)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


W, X = {"w": drawn(8, 6)}, drawn(5, 8)
MEAN = jnp.linspace(-1, 1, 8)[None]
MASK = jnp.ones((5, 6), jnp.int32)


def dense(p, x):
    return x @ p["w"]


def planned(f, params, args, policy=STATIC):
    return jaxq.calibrate(f, policy, progress=False)(params, [args])


def compared(f, params, *args, policy=STATIC):
    """Yield what integers, their imitation and float give, in float64."""
    plan = planned(f, params, args, policy)
    imitation = jaxq.quantize(f, plan)(jaxq.convert(f, plan)(params, *args), *args)
    outs = jaxq.integer(f, plan)(params, *args)(*args), imitation, f(params, *args)
    for found in zip(*map(jax.tree.leaves, outs), strict=True):
        yield [np.asarray(x, np.float64) for x in found]


def between(y):
    return jnp.clip(y, y.min(), y.max()).sum(0)


# The program, its weights and its input; how far integers may be from their imitation, as a part of the largest number.
PROGRAMS = {
    "a sum added to an array": (lambda p, x: (jnp.ones((4, 3)) + dense(p, x).sum()).sum(0), W, X, 1e-6),
    "a truth value of a sum": (lambda p, x: (jnp.ones((4, 3)) * (dense(p, x).sum() > 0)).sum(0), W, X, 0),
    "clipped to its own ends": (lambda p, x: between(dense(p, x)), W, X, 1e-6),
    "an output that is known": (lambda p, x: (dense(p, x), jnp.ones((5, 6))), W, X, 1e-6),
    "the largest of a row": (lambda p, x: dense(p, x) >= dense(p, x).max(-1, keepdims=True), W, X, 0),
    "a softmax of zeros": (lambda p, x: jax.nn.softmax(dense(p, x)), {"w": jnp.zeros((8, 6))}, X, 1e-3),
    "one over a function": (lambda p, x: 1 / (1 + jax.nn.relu(dense(p, x))), W, X, 2e-3),
    "a sum over time": (
        lambda p, x: lax.scan(lambda c, a: (c + a, None), jnp.zeros((1, 4)), x @ p["w"])[0],
        {"w": drawn(3, 4, seed=4)},
        drawn(2, 1, 3, seed=5),
        1e-6,
    ),
    "known numbers over time": (
        lambda p, x: lax.scan(
            lambda c, i: (c, (i[0], i[1].reshape(1, 3))),
            0,
            (x @ p["w"], jnp.arange(7)[:, None] * jnp.ones((1, 3), jnp.int32)),
        ),
        {"w": drawn(5, 4)},
        drawn(7, 3, 5),
        1e-6,
    ),
    "an input less a mean": (lambda p, x: ((x - MEAN) / (2 + MEAN)) @ p["w"], W, X, 1e-6),
    "an input by parameters": (lambda p, x: ((1 - x * p["g"]) / 3) @ p["w"], {**W, "g": drawn(1, 8)}, X, 1e-6),
    "an input far from zero": (lambda p, x: (x - 1000) @ p["w"], W, X + 1000, 0.01),
    "an input moved": (lambda p, x: (2 * x - 1).T.reshape(5, 8) @ p["w"], W, X, 1e-6),
    "an input for two sites": (lambda p, x: (3 * x) @ p["w"] + -x @ p["w"], W, X, 1e-6),
    "an input put out": (lambda p, x: (dense(p, x / 2), x), W, X, 1e-6),
    "an input over time": (
        lambda p, x: lax.scan(
            lambda c, a: (jnp.tanh(c @ p["v"] + a @ p["w"]), None), jnp.zeros((1, 6)), (x - 1)[:, None]
        ),
        {**W, "v": drawn(6, 6) / 3},
        X,
        0.02,
    ),
    "an input through layers": (
        lambda p, x: lax.scan(lambda c, w: (c + (x - 1) @ w, None), jnp.zeros((5, 6)), p["s"])[0],
        {"s": drawn(3, 8, 6)},
        X,
        1e-6,
    ),
    "one of two branches": (
        lambda p, x: lax.cond(dense(p, x)[0, 0] <= 0, lambda h: h @ p["v"], lambda h: -h, dense(p, x)),
        {**W, "v": drawn(6, 6)},
        X,
        1e-6,
    ),
    "one of many branches": (
        lambda p, x: lax.switch(
            jnp.argmax(x[0]), [jnp.tanh, jnp.abs, lambda h: h / 3, jnp.zeros_like, lambda h: h @ p["v"]], dense(p, x)
        ),
        {**W, "v": drawn(6, 6)},
        X,
        1e-3,
    ),
    "a branch of numbers": (
        lambda p, x: lax.cond(dense(p, x)[0, 0] > 0, lambda: (0, jnp.ones((2, 1))), lambda: (1, jnp.zeros((2, 1)))),
        W,
        X,
        1e-6,
    ),
    "a branch that is known": (lambda p, x: lax.switch(1, [jnp.exp, jnp.abs], dense(p, x)), W, X, 1e-6),
    "branches over time": (
        lambda p, x: lax.scan(
            lambda c, a: (lax.cond(a.sum() > 0, lambda: c / 2 + a, lambda: -c / 2), None), jnp.zeros(6), dense(p, x)
        )[0],
        W,
        X,
        0.03,
    ),
    "parts of an input": (
        lambda p, x: x[:, :8] @ p["w"] + x[:, 8:],
        W,
        jnp.concatenate([X, 100 * drawn(5, 6)], 1),
        1e-6,
    ),
    "a norm of an input": (lambda p, x: dense(p, jax.nn.standardize(x)), W, X, 1e-6),
    "an input added to": (lambda p, x: 2 * x[:, :6] + dense(p, 2 * x), W, X, 1e-6),
    "a function of an input": (lambda p, x: dense(p, jax.nn.gelu(x)), W, X, 0.01),
    "an input beside a state": (
        lambda p, x: lax.scan(
            lambda c, a: (jnp.tanh(jnp.concatenate([a, c], 1) @ p["v"]), None), jnp.zeros((1, 6)), x[:, None]
        ),
        {"v": drawn(14, 6) / 3},
        X,
        0.02,
    ),
    "an input as a state": (
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w) + c, None), x, p["s"])[0],
        {"s": drawn(3, 8, 8) / 3},
        X,
        0.01,
    ),
    "an input in a branch": (lambda p, x: lax.cond(dense(p, x)[0, 0] > 0, lambda: x, lambda: 2 * x), W, X, 1e-6),
    "a softmax of one number": (lambda p, x: jax.nn.softmax(dense(p, x)[:, :1]) + dense(p, x), W, X, 1e-3),
    "a product of masks": (
        lambda p, x: jax.nn.softmax(dense(p, x) + (1 - (x[:, :6] > 0) * (x[:, 2:] > -1).astype(jnp.float32)) * -1e9),
        W,
        X,
        1e-3,
    ),
    "numbers or a mask": (
        lambda p, x: jax.nn.softmax(jnp.where(dense(p, x) > 0, MEAN[:, 1:7] * jnp.ones((5, 1)), -1e9)) + dense(p, x),
        W,
        X,
        1e-3,
    ),
    "a softmax's logarithm of what is clipped": (
        lambda p, x: jax.nn.log_softmax(jnp.maximum(x @ jnp.eye(8) + p["b"], -9.0)),
        {"b": jnp.full((1, 8), -10.0)},
        X,
        1e-3,
    ),
    "none of some channels": (
        lambda p, x: [jnp.cumsum(h, 1) + jnp.sort(h) + jax.nn.relu(h) for h in [dense(p, x)[:, :0]]] + [dense(p, x)],
        W,
        X,
        1e-6,
    ),
    "in order": (lambda p, x: jnp.sort(dense(p, x)), W, X, 1e-6),
    "in the order of others": (lambda p, x: lax.sort((x @ p["w"], x[:, :6]), num_keys=1)[0], W, X, 1e-6),
    "the largest of all": (lambda p, x: lax.top_k(jax.nn.relu(dense(p, x)), 3)[0], W, X, 1e-6),
    "the median": (lambda p, x: jnp.median(dense(p, x), axis=-1), W, X, 1e-6),
    "a softmax's logarithm of little": (lambda p, x: jax.nn.log_softmax(dense(p, x) / 100), W, X, 1e-3),
    "running sums": (lambda p, x: (jnp.cumsum(dense(p, x), 0), lax.cumsum(dense(p, x), 1, reverse=True)), W, X, 1e-6),
    "the largest so far": (lambda p, x: (lax.cummax(dense(p, x)), lax.cummin(dense(p, x), 1)), W, X, 1e-6),
    "rows at indices": (lambda p, x: dense(p, x)[jnp.array([3, 1, -1])], W, X, 1e-6),
    "a row at an index": (lambda p, x: dense(p, x)[jnp.argmax(dense(p, x)[:, 0])], W, X, 1e-6),
    "a parameter at an index": (
        lambda p, x: dense(p, x) + jnp.linspace(-3, 3, 6)[jnp.argmax(dense(p, x), -1)][:, None],
        W,
        X,
        1e-6,
    ),
    "zeros beyond an end": (
        lambda p, x: dense(p, x).at[3 * jnp.argmax(dense(p, x), -1)].get(mode="fill", fill_value=0),
        W,
        X,
        1e-6,
    ),
    "an image of larger pixels": (
        lambda p, x: jax.image.resize(dense(p, x), (10, 18), "nearest"),
        W,
        X,
        1e-6,
    ),
    "a cache": (
        lambda p, x: lax.dynamic_update_slice(jnp.zeros((16, 6)), dense(p, x), (jnp.argmax(x[0]), 0)),
        W,
        X,
        1e-6,
    ),
    "put in": (lambda p, x: dense(p, x).at[jnp.array([1, 2]), 3].set(0.5).at[:, 0].set(0), W, X, 1e-6),
    "put into zeros": (lambda p, x: jnp.zeros((6, 5)).at[jnp.argmax(x, -1) % 6].set(dense(p, x).T[:5]), W, X, 1e-6),
    "a square that is none": (lambda p, x: jnp.sqrt((lambda h: h * h)(dense(p, x)) + 4.0), W, X, 2e-3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_near_its_imitation(name):
    f, params, x, tolerance = PROGRAMS[name]
    for integers, imitation, real in compared(f, params, x):
        size = np.abs(real).max(initial=0)
        np.testing.assert_allclose(integers, imitation, rtol=0, atol=tolerance * size)
        np.testing.assert_allclose(integers, real, rtol=0, atol=0.03 * size)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("function", [jax.nn.silu, jax.nn.softplus, jax.nn.mish])
def test_functions_with_a_bend_at_zero_have_a_point_there(function, seed):
    ((integers, imitation, _),) = compared(lambda p, x: function(x @ p["w"]), {"w": drawn(8, 6, seed=seed)}, X)
    assert np.abs(integers - imitation).max() < 1e-3


NEAR_ZERO = {
    "a root": lambda h: jnp.sqrt(jnp.abs(h)),
    "a root with a sign": lambda h: jnp.sign(h) * jnp.sqrt(jnp.abs(h) + 1e-4),
    "a cubic root": jnp.cbrt,
    "a logarithm": lambda h: jnp.log(jnp.abs(h) + 1e-3),
    "a logarithm of one more": lambda h: jnp.log1p(jnp.abs(h)),
    "the law of telephones": lambda h: jnp.sign(h) * jnp.log1p(255 * jnp.abs(h)),
    "a power": lambda h: jnp.abs(h) ** 0.75,
    "one over": lambda h: 1 / (0.01 + jnp.abs(h)),
    "one over a root": lambda h: lax.rsqrt(1e-3 + (h * h).mean(-1)),
    "a deviation": lambda h: h.std(-1),
    "a length": lambda h: jnp.linalg.norm(h, axis=-1),
    "over a deviation": lambda h: h[:, ::-1] / (0.1 + h.std(-1, keepdims=True)),
    "a response over its neighbours'": lambda h: h / (1 + (h * h).mean(-1, keepdims=True)) ** 0.75,
    "one value over another": lambda h: h[:, ::-1] / (1 + jnp.abs(h)),
    "a number over a value": lambda h: 2 / (1 + jnp.abs(h).sum(-1)),
    "over a function": lambda h: h[:, ::-1] / (1 + jnp.exp(h)),
}


@pytest.mark.parametrize("scale", [1e-3, 30])
@pytest.mark.parametrize("name", NEAR_ZERO)
def test_functions_that_change_fast_near_zero_are_followed(name, scale):
    """Within a part of what they are, however small the argument; the matrix has outputs of many sizes."""

    def f(p, x):
        h = dense(p, x)
        return h, NEAR_ZERO[name](h)

    params = {"w": drawn(8, 6) * scale * jnp.asarray([[1e-3, 0.01, 0.1, 1, 3, 0]])}
    program = jaxq.integer(f, planned(f, params, (X,)))(params, X)
    h, found = (np.asarray(y, np.float64) for y in program(X))
    wanted = np.asarray(NEAR_ZERO[name](jnp.asarray(h, jnp.float32)), np.float64)
    np.testing.assert_allclose(found, wanted, rtol=1 / 64, atol=2e-3 * np.abs(wanted).max())


QUOTIENTS = {
    "shares": lambda h: jax.nn.relu(h) / jax.nn.relu(h).sum(-1, keepdims=True),
    "of the largest": lambda h: h / jnp.abs(h).max(-1, keepdims=True),
    "of others": lambda h: (h[:, :3] / (h[:, 3:] + 5)).T.reshape(5, 3),
    "moved": lambda h: (h / jnp.abs(h).sum(-1, keepdims=True)).reshape(5, 2, 3).transpose(0, 2, 1).reshape(5, 6),
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_a_site_takes_one_value_over_another(name):
    def f(p, x):
        ratio = QUOTIENTS[name](dense(p, x))
        return ratio @ p["v"][: ratio.shape[1]]

    params = {"w": drawn(8, 6) + 0.1, "v": drawn(6, 4)}
    ((integers, imitation, real),) = compared(f, params, X)
    assert np.abs(integers - imitation).max() < 0.02 * np.abs(real).max()
    assert np.abs(integers - real).max() < 0.05 * np.abs(real).max()


def test_quotients_are_near_and_saturate():
    draw = np.random.default_rng(0)
    a, b = ((draw.choice([-1, 1], 20_000) * 2.0 ** draw.uniform(0, 31, 20_000)).clip(-(2**31), 2**31 - 1) for _ in "ab")
    a, b = (x.astype(np.int64) for x in (a, b))
    b[:100] = 0
    for ratio in (1.0, 0.37, 1e-5, 1e6, 3e-9):
        found = np.asarray(divided(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32), ratio), np.float64)
        true = np.where(b == 0, np.inf * np.sign(a), ratio * a / np.where(b == 0, 1, b))
        fits = np.abs(true) < 2**27
        assert np.all(np.abs(found - true)[fits] <= 0.5 + 2**-12 * np.abs(true[fits]))
        assert np.all((found * np.sign(true))[~fits] >= 2**27)


def test_inputs_without_a_range_are_asked_for_one_and_saturate_far_beyond_it():
    """A state comes as an argument and goes as a result, as in a cell that runs a step at a time."""

    def step(p, x, c):
        c = 0.9 * c + jnp.tanh(x @ p["w"])
        return c, c @ p["v"]

    params, c = {"w": drawn(8, 6), "v": drawn(6, 4)}, jnp.tanh(drawn(5, 6))
    plan = planned(step, params, (X, c))
    program = jaxq.integer(step, plan)(params, X, c)
    for start in (c, 9 * c, 0 * c):
        found, wanted = program(X, start)[0], step(params, X, start)[0]
        assert np.abs(found - wanted).max() < 0.05
    far = jnp.full((5, 6), 1e6)
    assert np.array_equal(program(X, far)[0], program(X, jnp.inf * far)[0]) and program(X, far)[0].min() > 9
    for unknown in (jnp.zeros((5, 6)), jax.ShapeDtypeStruct((5, 6), jnp.float32)):
        with pytest.raises(ValueError, match="build the program with arrays that show one"):
            jaxq.integer(step, plan)(params, X, unknown)


def test_a_loop_whose_state_starts_as_another_value_is_no_tanh():
    """What `jaxq.tflite` fixes the range of: the first state is no output of tanh, and would saturate."""

    def f(p, x, start):
        h = lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), start * (x @ p["w"]), None, length=1)[0]
        return h @ p["v"]

    params = {"w": drawn(6, 6), "v": drawn(6, 4)}
    for start in (0.0, 5.0):
        ((integers, _, real),) = compared(lambda p, x, s=start: f(p, x, s), params, drawn(5, 6), policy=jaxq.tflite())
        assert np.abs(integers - real).max() < 0.1 * max(1e-9, np.abs(real).max())


LARGE = (-1e4, -1e6, -1e9, float(np.finfo(np.float32).min))


def attention(p, x, bias):
    y = x @ p["w"]
    scores = jnp.einsum("bqd,bkd->bqk", y, y) / 2.4 + bias
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), y)


@pytest.mark.parametrize("number", LARGE)
@pytest.mark.parametrize("kind", ["one minus", "selected", "subtracted"])
def test_masks_that_are_added_hide_as_selected_ones_do(kind, number):
    """Of the forms that transformers have; scores beside a number of any size keep their precision."""
    biases = {
        "one minus": lambda m: (1.0 - m.astype(jnp.float32)[:, None, :]) * number,
        "selected": lambda m: jnp.where(m, 0.0, number)[:, None, :],
        "subtracted": lambda m: -((~m)[:, None, :] * -number),
    }
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    ((integers, imitation, real),) = compared(lambda p, x, m: attention(p, x, biases[kind](m)), W, drawn(3, 5, 8), mask)
    assert np.abs(integers - imitation).max() < 0.01 * np.abs(real).max()
    ((integers, _, real),) = compared(lambda p, x, m: (dense(p, x) + biases[kind](m)[0]).argmax(-1), W, X, MASK > 0)
    np.testing.assert_array_equal(integers, real)


def shut(m):
    return (1 - m.astype(jnp.float32)) * -1e9


REFUSED = {
    "one over what may be zero": (
        lambda p, x, m: dense(p, x)[:, 0] / jnp.abs(dense(p, x)).sum(-1),
        X,
        "div at .* divides by what may be zero, or near to it: bound it from below",
    ),
    "one over what may be next to nothing": (
        lambda p, x, m: 1 / (1e-9 + jnp.abs(dense(p, x))),
        X,
        "changes too fast for a table",
    ),
    "what hides, over another": (
        lambda p, x, m: (jnp.where(m > 0, dense(p, x), -jnp.inf) / dense(p, x)) @ p["w"][:6],
        X,
        "far from all others",
    ),
    "an input's power": (lambda p, x, m: dense(p, x) + jnp.exp(9 * x).sum(), X, "takes exp, which is inf at"),
    "an input times zero": (lambda p, x, m: dense(p, x * jnp.arange(8)[None]), X, "takes an input times zero"),
    "an input under a constant": (lambda p, x, m: dense(p, 1 / x), X, "takes div, which is inf at 0"),
    "whole numbers": (lambda p, x, m: dense(p, x) * m.astype(jnp.float32), X, "give the program int16 or less"),
    "what hides, as an output": (
        lambda p, x, m: dense(p, x) + jnp.where(m > 0, 0.0, -1e9),
        X,
        "only a softmax",
    ),
    "a mask beside numbers": (
        lambda p, x, m: jax.nn.softmax(jnp.where(m > 0, dense(p, x), -1e9) + dense(p, x)),
        X,
        "add at .* takes a number that is far from all others",
    ),
    "a mask, or what is larger": (
        lambda p, x, m: jax.nn.softmax(jnp.where(m > 0, jnp.where(m > 1, dense(p, x), -1e9), -40.0)),
        X,
        "select_n takes a number that is far from all others",
    ),
    "a branch that hides": (
        lambda p, x, m: lax.cond(m[0, 0] > 0, lambda h: jnp.where(h > 0, h, -jnp.inf), lambda h: h, dense(p, x)),
        X,
        "cond at .* takes a number that is far from all others",
    ),
    "masks that are one": (
        lambda p, x, m: jax.nn.softmax(dense(p, x) + (shut(m > 0) + shut(m > 1))),
        X,
        "add at .* takes a number that is far from all others",
    ),
    "a mask and a slope": (
        lambda p, x, m: jax.nn.softmax(dense(p, x) + (shut(m > 0) - 0.3 * MEAN[:, :6])),
        X,
        "sub at .* takes a number that is far from all others",
    ),
    "a mask of whole numbers": (
        lambda p, x, m: jax.nn.softmax(dense(p, x) + (1.0 - m.astype(jnp.int8).astype(jnp.float32)) * -1e9),
        X,
        "adds whole numbers times 1e.09, .*: give the program a mask of booleans",
    ),
    "a mask of numbers at indices": (
        lambda p, x, m: jax.nn.softmax(dense(p, x) + jnp.array([-1e9, 0.0])[m]),
        X,
        "add at .* takes a number that is far from all others",
    ),
    "a mask that is put in": (
        lambda p, x, m: jax.nn.softmax(dense(p, x).at[:, 0].set(-1e9)),
        X,
        "scatter at .* takes a number that is far from all others",
    ),
    "a mask that is put in at an index": (
        lambda p, x, m: jax.nn.softmax(lax.dynamic_update_slice(dense(p, x), jnp.full((5, 2), -1e9), (0, 0))),
        X,
        "dynamic_update_slice at .* takes a number that is far from all others",
    ),
    "the logarithm of a sum that is floored": (
        lambda p, x, m: jnp.log(jnp.exp(dense(p, x)).sum(-1) + 1e-4),
        X - 9 * jnp.sign(W["w"][:, 0])[None],
        "reduce_sum at .* takes exp",
    ),
    "the logarithm of hidden powers": (
        lambda p, x, m: jnp.log(jnp.exp(jnp.where(m > 0, dense(p, x), -1e4)).sum(-1)),
        X,
        "exp at .* takes a number that is far from all others",
    ),
    "filled in": (
        lambda p, x, m: jnp.take(dense(p, x), m[:, 0], axis=0, mode="fill", fill_value=3.0),
        X,
        r"fills in 3.0 where an index is out of bounds",
    ),
    "no number": (lambda p, x, m: dense(p, x) > jnp.nan, X, "compares with NaN.*jnp.isnan"),
    "holes": (
        lambda p, x, m: lax.reduce_window(
            dense(p, x), -jnp.inf, lax.max, (2, 1), (1, 1), ((0, 0),) * 2, base_dilation=(3, 1)
        ),
        X,
        "between the points of a dilated image",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name):
    f, x, message = REFUSED[name]
    plan = planned(f, W, (x, MASK))
    with pytest.raises(ValueError, match=message):
        jaxq.integer(f, plan)(W, x, MASK)
