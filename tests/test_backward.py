"""Backward products in low precision, against JAX's own gradients of numbers that codes represent exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from inspection import assert_bitwise, cosine, products
from zoo import model

pytestmark = pytest.mark.shared

BOTH = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(), grad=jaxq.int8())
SWITCHBACK = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(), grad=jaxq.Backward(act=jaxq.int8()))


def dot(numbers, w, x):
    return lax.dot_general(x, w, numbers)


def conv(w, x, strides=(1, 1), padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **options)


def transposed_conv(w, x):
    return conv(w, x, padding=[(1, 2), (2, 1)], lhs_dilation=(2, 2))


# f(weight, x) and the shapes of the two.
PRODUCTS = {
    "dot": (functools.partial(dot, (((1,), (0,)), ((), ()))), (12, 5), (7, 12)),
    "weight transposed": (functools.partial(dot, (((1,), (1,)), ((), ()))), (5, 12), (7, 12)),
    "batch axes": (functools.partial(dot, (((2,), (1,)), ((0,), (0,)))), (3, 12, 5), (3, 7, 12)),
    "two summed axes": (lambda w, x: jnp.einsum("bqhk,hkd->bqd", x, w), (4, 6, 5), (2, 3, 4, 6)),
    "conv": (conv, (3, 3, 4, 5), (2, 6, 6, 4)),
    "strided conv": (functools.partial(conv, strides=(2, 1)), (3, 2, 4, 5), (2, 7, 6, 4)),
    "dilated conv": (functools.partial(conv, rhs_dilation=(2, 1)), (3, 3, 4, 5), (2, 6, 6, 4)),
    "transposed conv": (
        transposed_conv,
        (3, 3, 4, 5),
        (2, 4, 4, 4),
    ),
    "grouped conv": (functools.partial(conv, feature_group_count=2), (3, 3, 2, 6), (2, 5, 5, 4)),
    "depthwise conv": (functools.partial(conv, feature_group_count=4), (3, 3, 1, 4), (2, 5, 5, 4)),
}


def whole(rng, shape):
    """Draw codes whose largest is 127 in every block that any granularity makes: their scale is one."""
    signs = rng.choice([-127.0, 127.0], shape)
    return jnp.asarray(np.where(rng.random(shape) < 0.6, signs, rng.integers(-127, 128, shape)), jnp.float32)


def drawn(name):
    """Return f, its weight and data, and a gradient by its output, all of them whole numbers."""
    f, weight, data = PRODUCTS[name]
    rng = np.random.default_rng(0)
    w, x = whole(rng, weight), whole(rng, data)
    return f, w, x, whole(rng, jax.eval_shape(f, w, x).shape)


def pulled(f, w, x, g):
    return jax.jit(lambda w, x, g: jax.vjp(f, w, x)[1](g))(w, x, g)


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_of_whole_numbers_are_exact(name):
    """Sums of so few products of 8-bit integers are exact in float32: JAX's own gradient is the judge."""
    f, w, x, g = drawn(name)
    quantized = jaxq.qat(f, BOTH)
    for got, want in zip(pulled(quantized, w, x, g), pulled(f, w, x, g), strict=True):
        np.testing.assert_array_equal(got, want)
    kinds = products(lambda w, x, g: jax.vjp(quantized, w, x)[1](g), w, x, g)
    assert ("float32", "float32") not in kinds


def test_a_wide_weight_gradient_is_the_one_of_float_backward_products():
    """SwitchBack: 8-bit products go on, the gradient by the weight is what it is without `grad=`."""
    rng = np.random.default_rng(0)
    w, x, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 32), (48, 64), (48, 32)))
    f = functools.partial(dot, (((1,), (0,)), ((), ())))
    plain = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8())
    got, want = (pulled(jaxq.qat(f, scheme), w, x, g) for scheme in (SWITCHBACK, plain))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert 0 < np.abs(got[1] - want[1]).max() <= 0.02 * np.abs(want[1]).max()
    kinds = products(lambda w, x, g: jax.vjp(jaxq.qat(f, SWITCHBACK), w, x)[1](g), w, x, g)
    assert sorted(kinds) == [("float32", "float32"), ("int8", "int8"), ("int8", "int8")]


@pytest.mark.parametrize("name", ["mlp"])
def test_models_have_the_gradients_of_float(name):
    entry = model(name)

    def loss(f):
        return lambda params: sum(jnp.mean(jnp.square(y)) for y in jax.tree.leaves(f(params, *entry.args)))

    exact = jax.jit(jax.grad(loss(entry.fn)))(entry.params)
    assert cosine(exact, jax.jit(jax.grad(loss(jaxq.qat(entry.fn, BOTH))))(entry.params)) >= 0.98


def test_the_forward_pass_is_what_serves():
    f, w, x, _ = drawn("conv")
    w, x = w + 0.3, x - 0.2
    trained = jax.jit(jaxq.qat(f, BOTH))(w, x)
    assert_bitwise(trained, jax.jit(jaxq.quantize(f, BOTH))(jaxq.convert(f, BOTH)(w, x), x))


# --- stochastic rounding ---------------------------------------------------------------------------------------------


def test_gradients_rounded_by_keys_are_unbiased():
    """The mean over keys is the gradient without rounding, within four standard errors."""
    rng = np.random.default_rng(0)
    f, w, x, _ = drawn("dot")
    g = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    run = jax.jit(jax.vmap(lambda key: jax.vjp(jaxq.qat(f, BOTH, key=key), w, x)[1](g)))
    many = run(jax.random.split(jax.random.key(0), 4000))
    for got, want in zip(many, pulled(f, w, x, g), strict=True):
        got = np.asarray(got, np.float64)
        error = got.std(0) / np.sqrt(len(got))
        assert (np.abs(got.mean(0) - want) <= 4 * error + 1e-5 * np.abs(want).max()).all()
        assert error.max() > 0
    nearest = pulled(jaxq.qat(f, BOTH), w, x, g)
    assert all(np.abs(got[0] - near).max() > 0 for got, near in zip(many, nearest, strict=True))


def test_layers_and_iterations_have_noise_of_their_own():
    """Equal layers with equal data would have equal gradients, were their noise the same."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16)), jnp.float32)
    g = jnp.asarray(np.random.default_rng(2).normal(size=(8, 16)), jnp.float32)

    def unrolled(params, x):
        return sum((x @ params[name]) for name in ("a", "b"))

    def scanned(params, x):
        return lax.scan(jax.checkpoint(lambda y, w: (y + x @ w, None)), jnp.zeros_like(g), params)[0]

    def pull(f, params, key):
        return jax.jit(lambda params, key: jax.vjp(lambda p: jaxq.qat(f, BOTH, key=key)(p, x), params)[1](g)[0])(
            params, key
        )

    two = pull(unrolled, {"a": w, "b": w}, jax.random.key(0))
    assert np.abs(two["a"] - two["b"]).max() > 0
    stack = jnp.stack([w, w])
    first, again, other = (pull(scanned, stack, jax.random.key(n)) for n in (0, 0, 1))
    assert np.abs(first[0] - first[1]).max() > 0
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


# --- plans and refusals ----------------------------------------------------------------------------------------------


def test_plans_say_and_keep_it():
    f, w, x, _ = drawn("dot")
    plan = jaxq.make_plan(f, {"*": SWITCHBACK})(w, x)
    assert repr(SWITCHBACK.grad) in str(plan)
    assert jaxq.Plan.from_json(plan.to_json()) == plan


STATIC = jaxq.int8(per_tensor=True, calibrator=jaxq.minmax())


@pytest.mark.parametrize("grad", [jaxq.int8(group=4), jaxq.uint8(), STATIC])
def test_gradients_have_dynamic_symmetric_scales(grad):
    with pytest.raises(ValueError, match="dynamic, symmetric"):
        jaxq.Scheme(weight=jaxq.int8(), grad=grad)


@pytest.mark.parametrize("grad", [jaxq.kmeans(4), jaxq.binary(), jaxq.ternary()])
def test_gradients_have_formats_with_unbiased_rounding(grad):
    with pytest.raises(ValueError, match="has no unbiased rounding"):
        jaxq.Scheme(weight=jaxq.int8(), grad=grad)


@pytest.mark.parametrize("grad", [jaxq.b158(), jaxq.int4(fit=jaxq.mse()), jaxq.int8(estimator=jaxq.EWGS())])
def test_gradients_are_not_clipped(grad):
    with pytest.raises(ValueError, match="a fit clips gradients"):
        jaxq.Scheme(weight=jaxq.int8(), grad=grad)


def test_gradients_to_be_rounded_stochastically_need_a_key():
    scheme = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(), grad=jaxq.int8(rounding=jaxq.Stochastic()))
    with pytest.raises(ValueError, match="by a key that is not there: up"):
        jaxq.qat(lambda params, x: x @ params["up"], scheme)({"up": jnp.eye(4)}, jnp.ones((2, 4)))


@pytest.mark.parametrize("grad", [jaxq.float8(), jaxq.float8_e5m2()], ids=["e4m3", "e5m2"])
def test_gradients_in_floats_are_unbiased(grad):
    """The mean over many keys is the gradient that is not rounded, to within four standard errors of every number."""
    x, w = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(16, 8), (8, 5)]))

    def gradient(grad, key=None):
        scheme = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(), grad=grad)
        return jax.grad(lambda w: jnp.sum(jaxq.qat(lambda w, x: jnp.tanh(x @ w), scheme, key=key)(w, x) ** 2))(w)

    drawn = jax.jit(jax.vmap(lambda key: gradient(grad, key)))(jax.random.split(jax.random.key(2), 4000))
    drawn = np.asarray(drawn, np.float64)
    assert (drawn.std(0) > 0).all()
    errors = (drawn.mean(0) - gradient(jaxq.Backward())) / (drawn.std(0) / np.sqrt(len(drawn)))
    assert np.abs(errors).max() < 4


@pytest.mark.parametrize("operand", [{"weight": jaxq.int8(group=4)}, {"act": jaxq.uint8()}])
def test_operands_have_one_scale_along_a_sum(operand):
    with pytest.raises(ValueError, match="drop group= and symmetric=False from " + next(iter(operand))):
        jaxq.Scheme(**operand, grad=jaxq.int8())


def test_what_is_no_gradient_quantizer():
    with pytest.raises(TypeError, match="grad="):
        jaxq.Scheme(weight=jaxq.int8(), grad="int8")
    with pytest.raises(TypeError, match="act="):
        jaxq.Backward(act=8)


def test_sums_over_too_many_examples_are_refused_by_name():
    shapes = {"up": jax.ShapeDtypeStruct((4, 8), jnp.float32)}, jax.ShapeDtypeStruct((200_000, 4), jnp.float32)

    def f(params, x):
        return x @ params["up"]

    with pytest.raises(ValueError, match="site 'up': its gradient by the weight sums 200000 products"):
        jaxq.make_plan(f, BOTH)(*shapes)
    assert jaxq.make_plan(f, SWITCHBACK)(*shapes)["up"].scheme == SWITCHBACK


def test_ragged_products_are_refused_by_name():
    entry = model("moe_ragged")
    with pytest.raises(ValueError, match="ragged_dot has no backward products"):
        jaxq.make_plan(entry.fn, BOTH)(entry.params, *entry.args)


def test_operands_with_zero_points_from_upstream_are_refused_by_name():
    out = jaxq.uint8(per_tensor=True, calibrator=jaxq.minmax())
    params, x = {"a": jnp.eye(4), "b": jnp.eye(4)}, jnp.ones((2, 4))
    policy = {"a": jaxq.Scheme(weight=jaxq.int8(), out=out), "b": BOTH}
    with pytest.raises(ValueError, match="site 'b': with grad= no operand has a zero point"):
        jaxq.make_plan(lambda p, x: (x @ p["a"]) @ p["b"], policy)(params, x)


def test_a_plan_serves_more_examples_than_it_could_be_trained_on():
    f = functools.partial(dot, (((1,), (0,)), ((), ())))
    w, few, many = jnp.eye(4), jnp.ones((8, 4)), jnp.ones((150_000, 4))
    plan = jaxq.make_plan(f, BOTH)(w, few)
    assert jax.eval_shape(jaxq.quantize(f, plan), w, many).shape == (150_000, 4)
    with pytest.raises(ValueError, match="a gradient sums 150000 products"):
        jax.eval_shape(jax.grad(lambda w: jaxq.qat(f, plan)(w, many).sum()), w)


def test_float_activations_of_another_type_and_unsigned_ones_in_groups():
    f = functools.partial(conv, feature_group_count=2)
    w, x = jnp.ones((3, 3, 2, 4), jnp.bfloat16), jnp.ones((2, 5, 5, 4), jnp.bfloat16)
    unsigned = jaxq.Quantizer(jaxq.Int(8, signed=False), per_tensor=True)
    for scheme in (
        jaxq.Scheme(weight=jaxq.int8(), grad=jaxq.int8()),
        jaxq.Scheme(weight=jaxq.int8(), act=unsigned, grad=jaxq.int8()),
    ):
        got, want = (pulled(g, w, x, jnp.ones((2, 5, 5, 4), jnp.bfloat16)) for g in (jaxq.qat(f, scheme), f))
        for near, exact in zip(got, want, strict=True):
            assert near.dtype == exact.dtype
            np.testing.assert_allclose(np.float32(near), np.float32(exact), rtol=0.03)


def test_weightless_products_of_a_weight_only_scheme_stay_float():
    scheme = jaxq.Scheme(weight=jaxq.int8(), grad=jaxq.int8())
    plan = jaxq.make_plan(lambda p, x: (x @ p["w"]) @ x.T, scheme)({"w": jnp.eye(4)}, jnp.ones((2, 4)))
    assert [d.scheme is None for d in plan.decisions] == [False, True]
