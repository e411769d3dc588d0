"""Straight-through gradients of `jaxq.qat`, against the derivatives of a surrogate in float64.

The surrogate of a quantized operand x is `x + (Q(x) - x)` with the bracket frozen, and a constant where the rounded
value is out of range. So an operation's gradient is that of the float operation at the dequantized operands, masked;
and the surrogate of a whole loss can be evaluated nearby, which gives its second derivatives by finite differences.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
import oracle
from jaxq.lowering import matrices
from jaxq.programs import ops

pytestmark = pytest.mark.shared

CLOSE = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-6, jnp.float16: 2.0**-9}


@pytest.fixture(autouse=True)
def strict_types():
    """Refuse implicit promotion of types in the rules of differentiation."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def assert_close(got, want, dtype=jnp.float32):
    """Assert that two arrays agree, relative to the largest element."""
    assert got.dtype == dtype and got.shape == want.shape
    largest = np.abs(want).max(initial=0)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=CLOSE[dtype] * largest)


# --- the surrogate ---------------------------------------------------------------------------------------------------


def imitate(x, quantizer, contracted, ends=None):
    """Return Q(x) and where its gradient passes, float64. ends: a static range; otherwise that of x itself."""
    if quantizer is None:
        return x, np.ones(x.shape)
    form, symmetric = quantizer.format, quantizer.symmetric
    grid = [1 if quantizer.per_tensor or axis in contracted else n for axis, n in enumerate(x.shape)]
    if quantizer.group:
        grid[max(contracted)] = x.shape[max(contracted)] // quantizer.group
    lo, hi = (oracle.collapse(x, grid, reduce) for reduce in (np.minimum, np.maximum))
    if ends is not None:
        lo, hi = (np.full(grid, end) for end in ends)
    scale, zero = oracle.affine(lo, hi, form.bits, signed=form.signed, symmetric=symmetric)
    low, high = oracle.bounds(form.bits, signed=form.signed, symmetric=symmetric)
    scale, zero = oracle.spread(scale, x.shape), oracle.spread(zero, x.shape)
    reals = x / scale
    within = (reals > low - zero - 1) & (reals < high - zero + 1)
    assert not (oracle.is_near_tie(reals) & within).any() and not oracle.is_near_tie(zero).any(), "choose another seed"
    rounded = np.round(reals) + np.round(zero)
    inside = (rounded >= low) & (rounded <= high)
    if ends is None and (form.signed or not symmetric):
        inside[...] = True  # its own range clips no more than half a step
    return scale * (oracle.encode(x, scale, np.round(zero), low, high) - np.round(zero)), inside.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of one operation, and the same in NumPy: linear in each operand.

    run(w, x, rest), judge(x, w, rest); contracted: axes of x and of w. A lookup has no x. weightless: w is data too.
    """

    run: Callable
    judge: Callable
    shapes: tuple
    contracted: tuple
    scheme: jaxq.Scheme
    rest: Any = None
    weightless: bool = False
    seed: int = 0
    dtype: Any = jnp.float32

    @property
    def static(self):
        return self.scheme.act is not None and self.scheme.act.static

    def operands(self):
        """Return x and w in float64, rounded to the case's type."""
        rng = np.random.default_rng(self.seed)
        arrays = [None if shape is None else jnp.asarray(rng.normal(size=shape), self.dtype) for shape in self.shapes]
        return [None if a is None else np.asarray(a, np.float64) for a in arrays]

    def cast(self, a):
        return None if a is None else jnp.asarray(a, self.dtype)

    def qat(self):
        """Return the quantized function of (x, w)."""
        place = (lambda w: ({}, w)) if self.weightless else (lambda w: ({"w": w}, None))

        def f(params, x, other, rest):
            return self.run(other if self.weightless else params["w"], x, rest)

        x, w = (self.cast(a) for a in self.operands())
        plan = jaxq.make_plan(f, self.scheme)(place(w)[0], x, place(w)[1], self.rest).check(quantized=True)
        if self.static:  # calibrated on half of the data, so that the rest is clipped
            half = (x / 2, place(w / 2)[1], self.rest)
            plan = jaxq.calibrate(f, plan, progress=False)(place(w)[0], [half])
        return lambda x, w: jaxq.qat(f, plan)(place(w)[0], x, place(w)[1], self.rest)

    def surrogate(self):
        """Return Q(x), Q(w) and their masks."""
        x, w = self.operands()

        def ends(a):
            return (min(0, a.min() / 2), max(0, a.max() / 2)) if self.static else None

        act, weight = self.scheme.act, self.scheme.act if self.weightless else self.scheme.weight
        left = (None, None) if x is None else imitate(x, act, self.contracted[0], ends(x))
        right = imitate(w, weight, self.contracted[1], ends(w) if self.weightless else None)
        return left[0], right[0], left[1], right[1]

    def value(self, x, w):
        return self.judge(x, w, self.rest)

    def gradients(self, x, w, left, right, cotangent):
        """Return the masked gradients of `sum(cotangent * value)` at dequantized operands."""
        dx = None if x is None else left * oracle.pullback(lambda e: self.value(e, w), x, cotangent)
        return dx, right * oracle.pullback(lambda e: self.value(x, e), w, cotangent)


def convolution(*options):
    """Return a convolution in JAX and in the oracle, channels last."""
    *numbers, groups = options
    specs = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

    def run(w, x, rest):
        return lax.conv_general_dilated(x, w, *numbers, lax.ConvDimensionNumbers(*specs), feature_group_count=groups)

    return run, lambda x, w, rest: oracle.conv_general_dilated(x, w, *numbers, specs, groups)


def einsum(spec):
    return lambda w, x, rest: jnp.einsum(spec, x, w), lambda x, w, rest: np.einsum(spec, x, w)


ONE, INSIDE = (1, 1), ((1, 2, 3), (0, 1, 2))
STATIC = {"per_tensor": True, "calibrator": jaxq.minmax()}
DYNAMIC = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8())
ASYMMETRIC = jaxq.Scheme(weight=jaxq.int8(symmetric=False), act=jaxq.uint8())
COARSE = jaxq.Scheme(weight=jaxq.int4(), act=jaxq.int4(per_tensor=True))
WEIGHTS = jaxq.Scheme(weight=jaxq.int4(symmetric=False))
CLIPPED = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(**STATIC))
CLIPPED_ASYMMETRIC = jaxq.Scheme(weight=jaxq.int4(), act=jaxq.uint8(**STATIC))
POSITIVE = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.uint8(symmetric=True))

DENSE = (*einsum("mk,kn->mn"), ((3, 8), (8, 5)), ((1,), (0,)))
LEFT = (*einsum("mk,kn->nm"), ((3, 8), (8, 5)), ((1,), (0,)))
HEADS = (*einsum("blhk,hkd->bld"), ((2, 2, 2, 3), (2, 3, 4)), ((2, 3), (0, 1)))
ATTENTION = (*einsum("bqhd,bkhd->bhqk"), ((2, 3, 2, 4), (2, 2, 2, 4)), ((3,), (3,)))
CONV = (*convolution((1, 2), ((1, 0), (1, 1)), ONE, ONE, 1), ((2, 3, 4, 2), (2, 3, 2, 3)), INSIDE)
DEPTHWISE = (*convolution(ONE, ((1, 1), (1, 1)), ONE, ONE, 3), ((2, 3, 3, 3), (3, 2, 1, 3)), INSIDE)
GROUPED = (*convolution((2, 1), ((1, 1), (0, 2)), ONE, (1, 2), 2), ((1, 4, 4, 4), (2, 2, 2, 4)), INSIDE)
TRANSPOSED = (*convolution(ONE, ((2, 1), (1, 2)), (2, 2), ONE, 1), ((2, 2, 3, 2), (3, 2, 2, 2)), INSIDE)
RAGGED = (
    lambda w, x, rest: lax.ragged_dot(x, w, rest),
    lambda x, w, rest: oracle.ragged_dot(x, w, rest),
    ((7, 4), (3, 4, 2)),
    ((1,), (1,)),
)
LOOKUP = (
    lambda w, x, rest: w.at[rest].get(mode="clip"),
    lambda x, w, rest: oracle.take(w, rest, "clip"),
    (None, (6, 3)),
    ((), (1,)),
)
ROWS = np.array([2, 0, 3], np.int32)
INDICES = np.array([[0, 3, 3], [9, 2, 5]], np.int32)

CASES = {
    "dot": Case(*DENSE, DYNAMIC),
    "dot, asymmetric": Case(*DENSE, ASYMMETRIC),
    "dot, 4 bits, per tensor": Case(*DENSE, COARSE),
    "dot, weights only": Case(*DENSE, WEIGHTS),
    "dot, weights in groups": Case(*DENSE, jaxq.Scheme(weight=jaxq.int4(group=4), act=jaxq.int8())),
    "dot, activations only": Case(*DENSE, jaxq.Scheme(act=jaxq.int8())),
    "dot, clipped": Case(*DENSE, CLIPPED),
    "dot, clipped, asymmetric": Case(*DENSE, CLIPPED_ASYMMETRIC),
    "dot, negative clipped": Case(*DENSE, POSITIVE),
    "dot, output turned": Case(*LEFT, DYNAMIC),
    "heads": Case(*HEADS, ASYMMETRIC),
    "conv": Case(*CONV, DYNAMIC),
    "conv, asymmetric": Case(*CONV, ASYMMETRIC),
    "conv, weights only": Case(*CONV, WEIGHTS),
    "conv, clipped, asymmetric": Case(*CONV, CLIPPED_ASYMMETRIC),
    "depthwise": Case(*DEPTHWISE, DYNAMIC),
    "depthwise, clipped, asymmetric": Case(*DEPTHWISE, CLIPPED_ASYMMETRIC),
    "grouped, atrous": Case(*GROUPED, DYNAMIC),
    "transposed": Case(*TRANSPOSED, ASYMMETRIC),
    "ragged dot": Case(*RAGGED, DYNAMIC, ROWS),
    "ragged dot, weights only": Case(*RAGGED, WEIGHTS, ROWS),
    "ragged dot, clipped, asymmetric": Case(*RAGGED, CLIPPED_ASYMMETRIC, ROWS),
    "lookup": Case(*LOOKUP, WEIGHTS, INDICES),
    "lookup, symmetric": Case(*LOOKUP, DYNAMIC, INDICES),
    "attention": Case(*ATTENTION, jaxq.Scheme(act=jaxq.int8()), weightless=True),
    "attention, clipped, asymmetric": Case(*ATTENTION, CLIPPED_ASYMMETRIC, weightless=True),
    "bfloat16": Case(*DENSE, ASYMMETRIC, dtype=jnp.bfloat16),
    "bfloat16, clipped": Case(*DENSE, CLIPPED, dtype=jnp.bfloat16),
    "bfloat16, depthwise": Case(*DEPTHWISE, DYNAMIC, dtype=jnp.bfloat16),
    "float16": Case(*DENSE, CLIPPED_ASYMMETRIC, dtype=jnp.float16),
}


def directions(case, out, seed=100):
    """Return random tangents of the operands and a cotangent of the output, float64, rounded to the case's type."""
    rng = np.random.default_rng(seed)
    shapes = [*case.shapes, out.shape]
    arrays = [None if s is None else case.cast(rng.normal(size=s)) for s in shapes]
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


@pytest.mark.parametrize("name", CASES)
def test_first_derivatives(name):
    """Value, reverse mode, forward mode and `linearize` are the surrogate's, and agree with one another."""
    case = CASES[name]
    quantized, (x, w, left, right) = case.qat(), case.surrogate()
    if "clipped" in name:
        assert 0 < left.mean() < 1
    value = case.value(x, w)
    tx, tw, cotangent = directions(case, value)

    @jax.jit
    def derivatives(operands, tangents, cotangent):
        def f(operands):
            return quantized(*operands)

        out, pull = jax.vjp(f, operands)
        linear_out, push = jax.linearize(f, operands)
        return out, pull(cotangent)[0], jax.jvp(f, (operands,), (tangents,)), (linear_out, push(tangents))

    arrays = [tuple(map(case.cast, pair)) for pair in (case.operands(), (tx, tw))]
    out, gradients, forward, linear = derivatives(*arrays, case.cast(cotangent))
    assert_close(out, value, case.dtype)
    for got, want in zip(gradients, case.gradients(x, w, left, right, cotangent), strict=True):
        assert got is None if want is None else assert_close(got, want, case.dtype) is None
    push = case.value(x, right * tw)
    push = push if x is None else push + case.value(left * tx, w)
    for primal, tangent in (forward, linear):
        np.testing.assert_array_equal(primal, out)
        assert_close(tangent, push, case.dtype)
    pulled = [np.sum(np.asarray(g, np.float64) * t) for g, t in zip(gradients, (tx, tw), strict=True) if t is not None]
    sizes = np.sum(np.abs(np.asarray(forward[1], np.float64) * cotangent))
    np.testing.assert_allclose(
        sum(pulled), np.sum(np.asarray(forward[1], np.float64) * cotangent), atol=CLOSE[case.dtype] * sizes
    )


SECOND = ["dot", "dot, asymmetric", "dot, clipped", "depthwise", "ragged dot, clipped, asymmetric", "lookup"]
SECOND += ["attention, clipped, asymmetric", "conv, weights only"]


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name):
    """The Hessian of `sum(c y ** 2) / 2` along a direction, forward over reverse and reverse over reverse."""
    case = CASES[name]
    quantized, (x, w, left, right) = case.qat(), case.surrogate()
    tx, tw, c = directions(case, case.value(x, w))

    @jax.jit
    def products(operands, tangents, c):
        def gradient(operands):
            return jax.grad(lambda operands: jnp.sum(c * quantized(*operands) ** 2) / 2)(operands)

        def along(operands):
            pairs = zip(jax.tree.leaves(gradient(operands)), jax.tree.leaves(tangents), strict=True)
            return sum(jnp.sum(g * t) for g, t in pairs)

        forward = jax.jvp(gradient, (operands,), (tangents,))[1]
        # JAX itself has no reverse mode twice for a ragged dot.
        return (forward,) if "ragged" in name else (forward, jax.grad(along)(operands))

    def gradient(step):
        moved_x, moved_w = None if x is None else x + step * left * tx, w + step * right * tw
        return case.gradients(moved_x, moved_w, left, right, c * case.value(moved_x, moved_w))

    arrays = [tuple(map(case.cast, pair)) for pair in (case.operands(), (tx, tw))]
    for got in products(*arrays, case.cast(c)):
        for second, ahead, behind in zip(got, gradient(1e-4), gradient(-1e-4), strict=True):
            assert second is None if ahead is None else assert_close(second, (ahead - behind) / 2e-4) is None


@pytest.mark.parametrize("scheme", [DYNAMIC, ASYMMETRIC, WEIGHTS], ids=["w8a8", "asymmetric", "weights only"])
def test_hessian_of_a_network(scheme):
    """The whole matrix, of two layers with a tanh between, by all weights and the input."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4, 2), "x": (2, 3)}
    point = {name: np.asarray(np.float32(rng.normal(size=shape)), np.float64) for name, shape in shapes.items()}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]

    def unpack(v, np_):
        parts = np_.split(v, [sizes[0], sizes[0] + sizes[1]])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - 1) ** 2)

    def quantized(v):
        parts = unpack(v, jnp)
        return jaxq.qat(loss, scheme)({"a": parts["a"], "b": parts["b"]}, parts["x"])

    # What quantizing adds at this point, then frozen.
    a, b = (imitate(point[name], scheme.weight, (0,))[0] for name in ("a", "b"))
    x = imitate(point["x"], scheme.act, (1,))[0]
    hidden = np.tanh(x @ a)
    added = imitate(hidden, scheme.act, (1,))[0] - hidden

    def surrogate(step):
        d = unpack(step, np)
        h = np.tanh((x + d["x"]) @ (a + d["a"])) + added
        return np.mean((h @ (b + d["b"]) - 1) ** 2)

    v = jnp.asarray(np.concatenate([part.ravel() for part in point.values()]), jnp.float32)
    matrix = oracle.hessian(surrogate, np.zeros(v.size))
    for mode in (jax.hessian, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
        got = np.asarray(jax.jit(mode(quantized))(v), np.float64)
        np.testing.assert_allclose(got, matrix, atol=2e-5 * np.abs(matrix).max())


# --- where the gradient stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, seen, x, passes",
    [
        (jaxq.int8(**STATIC), [-127, 127], [127.4, 127.6, -127.4, -127.6, 126.0, 0.0], [1, 0, 1, 0, 1, 1]),
        (jaxq.uint8(**STATIC), [-28, 227], [227.4, 227.6, -28.4, -28.6, 226.0, 0.0], [1, 0, 1, 0, 1, 1]),
        (jaxq.int8(symmetric=False, **STATIC), [-128, 127], [127.4, 127.6, -128.4, -128.6, 0.0], [1, 0, 1, 0, 1]),
        (jaxq.int4(**STATIC), [0, 7], [7.4, 7.6, -7.4, -7.6, 1.0], [1, 0, 1, 0, 1]),
        (jaxq.uint8(symmetric=True), None, [255.0, -0.4, -0.6, 100.3], [1, 1, 0, 1]),
        (jaxq.int8(), None, [100.1, -100.1, 100.1, 3.0, -77.7], [1, 1, 1, 1, 1]),
        (jaxq.uint8(), None, [100.1, -33.3, 100.1, -33.3, 0.0], [1, 1, 1, 1, 1]),
    ],
    ids=["int8", "uint8", "int8 asymmetric", "int4", "uint8 symmetric", "own range", "own range, asymmetric"],
)
def test_the_mask_tests_the_rounded_value(act, seen, x, passes):
    """A scale of one: what rounds into the range passes, though it is out of it; the ends of an own range always do."""
    x = jnp.asarray([x], jnp.float32)
    params = {"w": jnp.ones((x.shape[1], 1), jnp.float32)}

    def f(params, x):
        return x @ params["w"]

    scheme = jaxq.Scheme(weight=jaxq.int8(), act=act)
    plan = jaxq.make_plan(f, scheme)(params, x)
    if seen is not None:
        plan = jaxq.calibrate(f, plan, progress=False)(params, [jnp.asarray([seen + [0] * (x.size - 2)], jnp.float32)])
    gradient = jax.grad(lambda x: jaxq.qat(f, plan)(params, x)[0, 0])(x)
    np.testing.assert_allclose(np.asarray(gradient)[0], passes, rtol=1e-6)


@pytest.mark.parametrize("weight", [jaxq.b158(), jaxq.ternary(), jaxq.binary()], ids=["b1.58", "TWN", "XNOR"])
def test_ternary_and_binary_weights_have_gradients_beyond_their_codes(weight):
    """As in the papers: `w + stop_gradient(w^ - w)`, whose derivative is one, however large a weight is."""
    w = jnp.array([[0.1], [-0.2], [10.0], [-10.0]])
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    gradient = jax.grad(lambda w: jaxq.qat(lambda w, x: x @ w, jaxq.weight_only(weight))(w, x).sum())(w)
    np.testing.assert_array_equal(gradient, x.T)


def test_weights_in_a_dead_channel_have_gradients():
    """A channel of zeros learns: its scale is one, its gradient that of the float program."""
    params = {"w": jnp.zeros((3, 2), jnp.float32).at[:, 0].set(1.0)}
    x = jnp.asarray([[127.0, -3.0, 5.0]], jnp.float32)
    got = jax.grad(lambda params: jnp.sum(jaxq.qat(lambda p, x: x @ p["w"], jaxq.w8a8())(params, x)))(params)
    np.testing.assert_allclose(got["w"], np.repeat(np.asarray(x).T, 2, 1), rtol=1e-6)


@pytest.mark.parametrize("options", [dict(mode="fill"), dict(mode="fill", fill_value=3.0), dict(mode="clip")], ids=str)
def test_derivatives_of_rows_out_of_bounds(options):
    """As in JAX: a filled row is a constant, with a tangent of zero; a clipped one belongs to the nearest."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    indices = jnp.asarray([1, 4, 99, 1])

    def f(params, indices):
        return params["table"].at[indices].get(**options)

    def derivatives(f):
        out, pull = jax.vjp(lambda p: f(p, indices), {"table": table})
        push = jax.jvp(lambda p: f(p, indices), ({"table": table},), ({"table": jnp.ones_like(table)},))[1]
        return out, pull(jnp.ones_like(out))[0]["table"], push

    inside = np.array([1, 0, 0, 1]) if options.get("mode") == "fill" else np.ones(4)
    counts = np.zeros(4)
    np.add.at(counts, np.clip(np.asarray(indices), 0, 3), inside)
    out, gradient, push = derivatives(jaxq.qat(f, jaxq.weight_only()))
    np.testing.assert_array_equal(np.isnan(out)[:, 0], options == dict(mode="fill") and inside == 0)
    np.testing.assert_allclose(gradient, np.repeat(counts[:, None], 3, 1))
    np.testing.assert_allclose(push, np.repeat(inside[:, None], 3, 1))


def test_a_weight_used_twice_gets_both_gradients():
    """A tied table: looked up, and multiplied by."""
    rng = np.random.default_rng(0)
    w, c, indices = np.float64(np.float32(rng.normal(size=(6, 4)))), rng.normal(size=(3, 6)), np.array([5, 0, 5])

    def loss(params, indices):
        return jnp.sum(jnp.asarray(c, jnp.float32) * (params["w"][indices] @ params["w"].T))

    got = jax.grad(jaxq.qat(loss, DYNAMIC))({"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(indices))["w"]
    table = imitate(w, jaxq.int8(), (1,))[0]  # per row, as looked up and as multiplied by
    rows = imitate(table[indices], jaxq.int8(), (1,))[0]
    want = c.T @ rows
    np.add.at(want, indices, c @ table)
    assert_close(got, want)


def test_wide_sums_of_short_operands():
    """bfloat16 operands, float32 result: gradients have the operands' types."""
    case = Case(*DENSE, DYNAMIC, dtype=jnp.bfloat16)
    (x, w), (qx, qw, left, right) = map(case.cast, case.operands()), case.surrogate()
    cotangent = np.float64(np.float32(np.random.default_rng(5).normal(size=(3, 5))))

    def f(params, x):
        return jnp.dot(x, params["w"], preferred_element_type=jnp.float32)

    out, pull = jax.vjp(lambda x, w: jaxq.qat(f, DYNAMIC)({"w": w}, x), x, w)
    assert_close(out, qx @ qw)
    wanted = case.gradients(qx, qw, left, right, cotangent)
    for got, want in zip(pull(jnp.asarray(cotangent, jnp.float32)), wanted, strict=True):
        assert_close(got, want, jnp.bfloat16)


def test_nothing_flows_into_measured_ranges():
    """A gradient by the plan exists, and is zero."""
    case = CASES["dot, clipped"]
    x, w = map(case.cast, case.operands())

    def f(params, x):
        return x @ params["w"]

    plan = jaxq.calibrate(f, CLIPPED, progress=False)({"w": w}, [x / 2])
    gradient = jax.grad(lambda plan: jnp.sum(jaxq.qat(f, plan)({"w": w}, x) ** 2))(plan)
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 3 and not any(np.asarray(leaf).any() for leaf in leaves)


def test_converted_weights_are_constants_and_adapters_learn():
    """`quantize` is straight through towards float leaves; codes have no gradient, and asking for it is an error."""
    rng = np.random.default_rng(3)
    w, down, up, x = (np.float64(np.float32(rng.normal(size=s))) for s in ((6, 5), (6, 2), (2, 5), (3, 6)))
    policy = {"base": DYNAMIC, "*": None}

    def f(params, x):
        adapter = params["adapter"]
        return x @ params["base"]["w"] + x @ adapter["down"]["a"] @ adapter["up"]["b"]

    cast = {"base": {"w": w}, "adapter": {"down": {"a": down}, "up": {"b": up}}}
    params, jx = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), cast), jnp.asarray(x, jnp.float32)
    served = jaxq.convert(f, policy)(params, jx)

    def loss(adapter, x):
        return jnp.sum(jaxq.quantize(f, policy)({**served, "adapter": adapter}, x) ** 2) / 2

    gradients, dx = jax.grad(loss, (0, 1))(served["adapter"], jx)
    qx, qw = imitate(x, jaxq.int8(), (1,))[0], imitate(w, jaxq.int8(), (0,))[0]
    y = qx @ qw + x @ down @ up
    assert_close(gradients["down"]["a"], x.T @ y @ up.T)
    assert_close(gradients["up"]["b"], (x @ down).T @ y)
    assert_close(dx, y @ qw.T + y @ up.T @ down.T)
    with pytest.raises(TypeError):
        jax.grad(lambda params: jnp.sum(jaxq.quantize(f, policy)(params, jx)))(served)


def test_gradients_of_examples_are_those_of_the_batch():
    """Per-example gradients under `vmap`, with a static range, add up to the gradient of the batch."""
    case = CASES["dot, clipped, asymmetric"]
    quantized = case.qat()
    x, w = map(case.cast, case.operands())

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum(quantized(x, w) ** 2))(w)

    each = jax.jit(jax.vmap(gradient, (0, None)))(x[:, None], w)
    assert_close(jnp.sum(each, 0), np.asarray(jax.jit(gradient)(x, w), np.float64))


def test_observing_is_differentiable():
    """The gradient of the quantized program that `observe` runs is that of `qat` with the plan's ranges."""
    case = CASES["dot, clipped"]
    x, w = map(case.cast, case.operands())

    def f(params, x):
        return jnp.sum((x @ params["w"]) ** 2)

    plan = jaxq.calibrate(f, CLIPPED, progress=False)({"w": w}, [x / 2])
    got, moved = jax.grad(lambda p: jaxq.observe(f, plan, quantized=True)(p, x), has_aux=True)({"w": w})
    qx, qw, _, right = case.surrogate()
    assert_close(got["w"], right * (qx.T @ (2 * qx @ qw)))
    assert float(moved.range("w")[0].count) == 2 and float(moved.range("w")[0].hi) == float(x.max())


PRODUCTS = {
    "a dense layer": ("btd,df->btf", (2, 5, 6), (6, 3)),
    "heads": ("btd,dhk->bthk", (2, 5, 6), (6, 2, 3)),
    "heads back": ("bthk,hkd->btd", (2, 5, 2, 3), (2, 3, 6)),
    "experts": ("ebd,edf->ebf", (3, 4, 5), (3, 5, 2)),
    "scores": ("bqhk,bshk->bhqs", (2, 5, 3, 4), (2, 6, 3, 4)),
    "summed axes in another order": ("btkh,hkd->btd", (2, 5, 3, 2), (2, 3, 6)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_matrices_are_products_of_all_axes(name):
    """And so are their derivatives; of whole numbers, so that the order of sums does not matter."""
    spec, *shapes = PRODUCTS[name]
    a, b = (jnp.round(4 * jax.random.normal(jax.random.key(n), shape)) for n, shape in enumerate(shapes))
    body = jax.make_jaxpr(functools.partial(jnp.einsum, spec))(a, b).jaxpr
    (eqn,) = [eqn for eqn in body.eqns if eqn.primitive.name == "dot_general"]
    op = ops.read(eqn)
    pair = (a, b) if eqn.invars[0] is body.invars[0] else (b, a)
    out = op.apply(*pair)
    g = jnp.round(4 * jax.random.normal(jax.random.key(2), out.shape))
    for got, want in zip(
        jax.tree.leaves((matrices.product(op, *pair), jax.vjp(functools.partial(matrices.product, op), *pair)[1](g))),
        jax.tree.leaves((out, jax.vjp(op.apply, *pair)[1](g))),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_codes_wait_for_the_backward_pass():
    """And no decoded copies: what is kept in float is what the program had anyway."""
    w, x = (jax.random.normal(jax.random.key(n), (24, 24)) for n in range(2))
    scheme = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8())
    kept = jax.tree.leaves(jax.vjp(jax.jit(jaxq.qat(lambda w, x: x @ w, scheme)), w, x)[1])
    kept = [np.asarray(leaf) for leaf in kept if leaf.shape == w.shape]
    assert sum(leaf.dtype == np.int8 for leaf in kept) == 2
    assert all(np.array_equal(leaf, w) or np.array_equal(leaf, x) for leaf in kept if leaf.dtype != np.int8)
