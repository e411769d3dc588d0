"""Bad input: a clear error that names the site and the fix, or the right result. Never NaN from finite input."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from zoo import model
from zoo.entry import normal, weight

SHAPE = jax.ShapeDtypeStruct
LARGEST = float(np.finfo(np.float32).max)
W4 = jaxq.Scheme(weight=jaxq.int4(), act=jaxq.int8())

# How to call every verb on (function, policy, params, x).
VERBS = {
    "make_plan": lambda f, policy, params, x: jaxq.make_plan(f, policy)(params, x),
    "observe": lambda f, policy, params, x: jaxq.observe(f, policy)(params, x),
    "calibrate": lambda f, policy, params, x: jaxq.calibrate(f, policy, progress=False)(params, [x]),
    "qat": lambda f, policy, params, x: jaxq.qat(f, policy)(params, x),
    "quantize": lambda f, policy, params, x: jaxq.quantize(f, policy)(params, x),
    "convert": lambda f, policy, params, x: jaxq.convert(f, policy)(params, x),
}
RUNS = ("qat", "quantize")

RECIPES = {
    "dynamic": jaxq.w8a8(),
    "dynamic_asymmetric": jaxq.w8a8(symmetric=False),
    "dynamic_per_tensor": jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(per_tensor=True)),
    "static": jaxq.w8a8(static=True),
    "static_asymmetric": jaxq.w8a8(static=True, symmetric=False),
    "weight_only": jaxq.weight_only(),
    "weight_only_asymmetric": jaxq.weight_only(jaxq.int8(symmetric=False)),
    "unsigned": jaxq.Scheme(weight=jaxq.uint8(), act=jaxq.uint8()),
    "int4_groups": jaxq.weight_only(jaxq.int4(group=4)),
}
INTEGER = [name for name in RECIPES if not name.startswith(("weight_only", "int4"))]


def net(params, x):
    """Three dense layers: stem, middle, last."""
    h = jnp.tanh(x @ params["stem"]["kernel"])
    return jnp.tanh(h @ params["middle"]["kernel"]) @ params["last"]["kernel"]


def dot(params, x):
    """One dense layer."""
    return x @ params["stem"]["kernel"]


def square(params, x):
    """One dense layer that contracts the last axis of its weight."""
    return jnp.einsum("bi,oi->bo", x, params["stem"]["kernel"])


def conv(params, x):
    """One convolution of [n, h, w, c] by [h, w, i, o]."""
    kernel = params["stem"]["kernel"]
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def lookup(params, tokens):
    """Rows of a table."""
    return jnp.take(params["table"]["embedding"], tokens, axis=0)


def ragged(params, x):
    """Rows by experts, all rows to the second of two."""
    sizes = jnp.array([0, x.shape[0]], jnp.int32)
    return jax.lax.ragged_dot(x, params["stem"]["kernel"], sizes)


@functools.cache
def net_params():
    return {
        "stem": {"kernel": weight(0, 12, 20)},
        "middle": {"kernel": weight(1, 20, 24)},
        "last": {"kernel": weight(2, 24, 8)},
    }


def net_data(rows=3):
    return normal(3, rows, 12)


def params_with(value, layer):
    """The weights of `net` with one element of one layer replaced."""
    params = {name: dict(leaves) for name, leaves in net_params().items()}
    params[layer]["kernel"] = params[layer]["kernel"].at[1, 2].set(value)
    return params


def ready(f, policy, params, *batches):
    """A plan that is calibrated if it has something to calibrate."""
    plan = jaxq.make_plan(f, policy)(params, batches[0])
    return jaxq.calibrate(f, plan, progress=False)(params, batches) if plan.unobserved() else plan


def refuses(call, *words, error=(TypeError, ValueError)):
    """Assert that a call raises, with a message in which every one of these expressions is found."""
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert re.search(word, str(caught.value)), f"no '{word}' in: {caught.value}"


def serve(f, plan, params, *args):
    """Convert, and run converted."""
    return programs(f, plan, params, *args)["quantize"](*args)


def programs(f, plan, params, *args):
    """The programs of training and of serving, compiled, the second on converted parameters."""
    converted = jaxq.convert(f, plan)(params, *args)
    return {
        "qat": functools.partial(jax.jit(jaxq.qat(f, plan)), params),
        "quantize": functools.partial(jax.jit(jaxq.quantize(f, plan)), converted),
    }


def both(f, plan, params, *args):
    """The outputs of training and of serving."""
    return {verb: run(*args) for verb, run in programs(f, plan, params, *args).items()}


# --- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_glob_that_matches_nothing_lists_the_sites(verb):
    policy = {"lsat": None, "*": jaxq.w8a8()}
    refuses(lambda: VERBS[verb](net, policy, net_params(), net_data()), "'lsat'", "stem", "middle", "last")


def test_a_glob_over_a_program_without_sites_matches_nothing():
    refuses(lambda: jaxq.quantize(lambda params, x: x, {"*": jaxq.w8a8()})(net_params(), net_data()), r"'\*'", "site")


def test_a_shadowed_glob_warns():
    with pytest.warns(UserWarning, match="last") as caught:
        plan = jaxq.make_plan(net, {"*": jaxq.w8a8(), "last": None})(net_params(), net_data())
    assert len(caught) == 1 and "*" in str(caught[0].message)
    assert plan["last"].scheme is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = jaxq.make_plan(net, {"last": None, "*": jaxq.w8a8()})(net_params(), net_data())
    assert plan["last"].scheme is None


@pytest.mark.parametrize("policy", [3, "int8", [jaxq.w8a8()], jaxq.int8()], ids=str)
@pytest.mark.parametrize("verb", ["make_plan", "qat", "quantize", "convert"])
def test_what_is_not_a_policy(verb, policy):
    refuses(lambda: VERBS[verb](net, policy, net_params(), net_data()), "policy|Scheme|weight_only", error=TypeError)


@pytest.mark.parametrize("value", [8, "int9", jnp.int8, jaxq.int8(), [None]], ids=str)
def test_what_is_not_a_policy_in_a_dict_names_the_site(value):
    policy = {"middle": value, "*": jaxq.w8a8()}
    refuses(lambda: jaxq.make_plan(net, policy)(net_params(), net_data()), "middle", "Scheme|policy", error=TypeError)


@pytest.mark.parametrize("answer", ["int8", 8, jaxq.int8()], ids=str)
def test_a_callable_policy_that_returns_something_else_names_the_site(answer):
    call = jaxq.make_plan(net, lambda site: answer if site.name == "middle" else None)
    refuses(lambda: call(net_params(), net_data()), "'middle'", "Scheme", error=TypeError)


def test_a_recipe_that_was_not_called():
    refuses(lambda: jaxq.make_plan(net, jaxq.w8a8)(net_params(), net_data()), "'stem'", "Scheme", error=TypeError)


def test_a_glob_that_is_not_a_string():
    refuses(lambda: jaxq.make_plan(net, {3: None})(net_params(), net_data()), "glob", "3", error=TypeError)


# --- formats ---------------------------------------------------------------------------------------------------------

WIDTHS = [9, 15, 17, 0, -8, 8.0, "8", None, True]


@pytest.mark.parametrize("bits", WIDTHS, ids=repr)
def test_unknown_bit_width(bits):
    refuses(lambda: jaxq.Int(bits), "bits", re.escape(repr(bits)), "1 to 8 or 16")


@pytest.mark.parametrize("bits", WIDTHS, ids=repr)
def test_unknown_bit_width_of_linear_quantize(bits):
    refuses(lambda: jaxq.linear_quantize(jnp.ones(4), bits), "bits", re.escape(repr(bits)), "1 to 8 or 16")


@pytest.mark.parametrize(
    "build",
    {
        "Quantizer(str)": lambda: jaxq.Quantizer("int8"),
        "Quantizer(dtype)": lambda: jaxq.Quantizer(jnp.int8),
        "Quantizer(bits)": lambda: jaxq.Quantizer(8),
        "Scheme(weight=str)": lambda: jaxq.Scheme(weight="int8"),
        "Scheme(act=dtype)": lambda: jaxq.Scheme(act=jnp.int8),
        "Scheme(weight=Int)": lambda: jaxq.Scheme(weight=jaxq.Int(8)),
        "weight_only(str)": lambda: jaxq.weight_only("int4"),
        "weight_only(bits)": lambda: jaxq.weight_only(4),
    }.items(),
    ids=lambda item: item[0],
)
def test_unknown_dtype(build):
    refuses(build[1], r"Int\(|int8\(\)")


@pytest.mark.parametrize("calibrator", ["ema", 0.9, jaxq.ema], ids=["name", "number", "maker"])
def test_unknown_calibrator(calibrator):
    refuses(lambda: jaxq.w8a8(static=True, calibrator=calibrator), "calibrator", r"minmax|ema|MinMax|EMA")


@pytest.mark.parametrize("group", [0, -4, 2.5, "128"], ids=repr)
def test_groups_are_positive_numbers(group):
    refuses(lambda: jaxq.int4(group=group), "group", re.escape(repr(group)))


@pytest.mark.parametrize("verb", VERBS)
def test_a_group_that_does_not_divide_names_the_site(verb):
    policy = {"middle": jaxq.weight_only(jaxq.int4(group=7)), "*": jaxq.w8a8()}
    refuses(lambda: VERBS[verb](net, policy, net_params(), net_data()), "'middle'", "7", "20", "group=")


# --- NaN and infinity ------------------------------------------------------------------------------------------------

NOT_FINITE = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("policy", [jaxq.w8a8(), jaxq.weight_only(), {"middle": None, "*": jaxq.w8a8()}], ids=str)
def test_convert_refuses_weights_that_are_not_finite(value, policy):
    refuses(lambda: jaxq.convert(net, policy)(params_with(value, "middle"), net_data()), "middle", "NaN|inf", ";|:")


def test_convert_refuses_stacked_weights_that_are_not_finite():
    entry = model("scan_xs")
    bad = jax.tree.map(lambda x: x, entry.params)
    bad["layers"]["down"]["kernel"] = bad["layers"]["down"]["kernel"].at[1, 0, 0].set(jnp.nan)
    refuses(lambda: jaxq.convert(entry.fn, jaxq.w8a8())(bad, *entry.args), "layers/down", "NaN|inf")


def test_convert_refuses_derived_weights_that_are_not_finite():
    # v / |v| of a channel of zeros: every leaf is finite, the weight is not.
    entry = model("weight_norm")
    bad = {name: dict(layer) for name, layer in entry.params.items()}
    bad["up"]["v"] = bad["up"]["v"].at[:, 0].set(0)
    refuses(lambda: jaxq.convert(entry.fn, jaxq.w8a8())(bad, *entry.args), r"\bup\b", "NaN|inf")


@pytest.mark.parametrize("value", NOT_FINITE)
def test_arrays_that_are_not_finite_are_not_quantized(value):
    x = jnp.array([[1.0, value], [0.0, 1.0]])
    refuses(lambda: jaxq.int8()(x), "NaN|inf")
    refuses(lambda: jaxq.linear_quantize(x, 8), "NaN|inf")


# XLA's CPU backend loses NaN in maxima over 4096 numbers and more, so both sides of that are tried.
SIZES = {"small": (3, 12, 20), "large": (64, 128, 20)}


def sized(size):
    """Parameters and data of `dot`: [k, n] and [m, k]."""
    m, k, n = SIZES[size]
    return {"stem": {"kernel": weight(0, k, n)}}, normal(1, m, k)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("calibrator", [jaxq.minmax(), jaxq.ema(0.9)], ids=repr)
def test_calibrate_refuses_data_that_is_not_finite(value, size, calibrator):
    params, x = sized(size)
    calibrate = jaxq.calibrate(dot, jaxq.w8a8(static=True, calibrator=calibrator), progress=False)
    batches = [x, x.at[1, 2].set(value), x]
    refuses(lambda: calibrate(params, batches), "'stem'", "batch 1", "NaN|inf", "remove|repair|weights")


def test_calibrate_names_the_first_site_that_nan_reaches():
    def f(params, x):
        return jnp.log(x @ params["stem"]["kernel"]) @ params["middle"]["kernel"]

    calibrate = jaxq.calibrate(f, jaxq.w8a8(static=True), progress=False)
    with pytest.raises(ValueError, match="'middle'") as caught:
        calibrate(net_params(), [net_data()])
    assert "'stem'" not in str(caught.value)


def test_calibrate_names_the_site_in_a_scan():
    entry = model("scan_xs")
    params = jax.tree.map(lambda x: x, entry.params)
    params["layers"]["up"]["bias"] = params["layers"]["up"]["bias"].at[2].set(jnp.nan)  # of three
    calibrate = jaxq.calibrate(entry.fn, jaxq.w8a8(static=True), progress=False)
    refuses(lambda: calibrate(params, [entry.args]), "layers/down", "NaN|inf")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "int4_groups"])
def test_nan_in_the_data_comes_out_as_nan(recipe, size):
    params, x = sized(size)
    plan = ready(dot, RECIPES[recipe], params, x)
    run = programs(dot, plan, params, x)["quantize"]
    clean, out = np.asarray(run(x)), np.asarray(run(x.at[1, 2].set(jnp.nan)))
    assert np.isfinite(clean).all()
    assert np.isnan(out[1]).all()
    if recipe in ("dynamic", "dynamic_asymmetric", "weight_only"):  # the other tokens are not concerned
        np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("transposed_conv", "dynamic"),
        ("dot_product_attention", "static"),
        ("scan_xs", "dynamic"),
        ("moe_ragged", "static"),
    ],
)
def test_nan_in_the_data_comes_out_wherever_it_does_in_float(name, recipe):
    entry = model(name)
    plan = ready(entry.fn, RECIPES[recipe], entry.params, *entry.args)
    x = entry.args[0]
    bad = x.at[(0,) * x.ndim].set(jnp.nan)
    expected = np.isnan(jax.jit(entry.fn)(entry.params, bad))
    assert expected.any()
    assert np.isnan(np.asarray(jax.jit(jaxq.quantize(entry.fn, plan))(entry.params, bad)))[expected].all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", ["dynamic", "static", "weight_only"])
def test_nan_in_the_weights_of_training_comes_out_as_nan(recipe, size):
    _, x = sized(size)
    params = {"stem": {"kernel": weight(0, x.shape[1], 40)}}
    plan = ready(dot, RECIPES[recipe], params, x)
    params["stem"]["kernel"] = params["stem"]["kernel"].at[1, 2].set(jnp.nan)
    assert np.isnan(jax.jit(jaxq.qat(dot, plan))(params, x)[:, 2]).all()


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], (), iter(())], ids=["list", "tuple", "iterator"])
@pytest.mark.parametrize("policy", [jaxq.w8a8(static=True), jaxq.w8a8()], ids=["static", "dynamic"])
def test_calibration_without_batches(batches, policy):
    refuses(lambda: jaxq.calibrate(net, policy, progress=False)(net_params(), batches), "no batches", "at least one")


@pytest.mark.parametrize("verb", RUNS)
def test_calibration_of_empty_batches_is_no_calibration(verb):
    plan = jaxq.calibrate(net, jaxq.w8a8(static=True), progress=False)(net_params(), [net_data(0), net_data(0)])
    assert plan.unobserved() == ["stem", "middle", "last"]
    refuses(lambda: VERBS[verb](net, plan, net_params(), net_data()), "stem", "middle", "last", "calibrate")


@pytest.mark.parametrize("verb", RUNS)
@pytest.mark.parametrize("jit", [False, True])
def test_a_static_plan_without_calibration(verb, jit):
    plan = jaxq.make_plan(net, jaxq.w8a8(static=True))(net_params(), net_data())

    def run(params, x):
        return VERBS[verb](net, plan, params, x)

    run = jax.jit(run) if jit else run
    refuses(lambda: run(net_params(), net_data()), "stem", "middle", "last", r"calibrate\(")


@pytest.mark.parametrize("verb", RUNS)
@pytest.mark.parametrize("jit", [False, True])
def test_a_static_policy_without_calibration(verb, jit):
    def run(params, x):
        return VERBS[verb](net, {"last": None, "*": jaxq.w8a8(static=True)}, params, x)

    run = jax.jit(run) if jit else run
    refuses(lambda: run(net_params(), net_data()), "stem", "middle", r"calibrate\(")


def test_a_branch_that_calibration_did_not_reach():
    entry = model("cond")
    x = jnp.abs(entry.args[0])
    plan = jaxq.calibrate(entry.fn, jaxq.w8a8(static=True), progress=False)(entry.params, [x])
    with pytest.raises(ValueError, match="negative") as caught:
        jaxq.quantize(entry.fn, plan)(entry.params, x)
    assert "positive" not in str(caught.value) and "head" not in str(caught.value)


# --- another model ---------------------------------------------------------------------------------------------------


def with_shape(layer, *shape):
    return {**net_params(), layer: {"kernel": weight(5, *shape)}}


@pytest.mark.parametrize("verb", VERBS)
def test_a_plan_of_another_model_names_the_site_that_differs(verb):
    plan = jaxq.make_plan(net, jaxq.w8a8())(net_params(), net_data())
    other = with_shape("last", 24, 9)
    refuses(lambda: VERBS[verb](net, plan, other, net_data()), r"'last'.*24, 9.*24, 8")


@pytest.mark.parametrize("verb", VERBS)
def test_a_plan_of_another_model_names_the_site_it_lacks(verb):
    def longer(params, x):
        return net(params, x) @ params["extra"]["kernel"]

    plan = jaxq.make_plan(net, jaxq.w8a8())(net_params(), net_data())
    refuses(lambda: VERBS[verb](longer, plan, with_shape("extra", 8, 4), net_data()), "'extra'", "stem", "make a plan")


@pytest.mark.parametrize("other", [square, conv], ids=["contracted axis", "op"])
def test_a_plan_of_another_operation(other):
    params, x = {"stem": {"kernel": weight(0, 12, 12)}}, net_data()
    plan = jaxq.make_plan(dot, jaxq.w8a8())(params, x)
    if other is conv:
        params, x = {"stem": {"kernel": weight(0, 1, 1, 12, 12)}}, normal(1, 2, 3, 3, 12)
    refuses(lambda: jaxq.quantize(other, plan)(params, x), "'stem'")


def test_a_plan_serves_other_batches_and_smaller_programs():
    def front(params, x):
        return jnp.tanh(x @ params["stem"]["kernel"])

    plan = jaxq.calibrate(net, jaxq.w8a8(static=True), progress=False)(net_params(), [net_data()])
    assert jaxq.quantize(net, plan)(net_params(), net_data(7)).shape == (7, 8)
    assert jaxq.quantize(front, plan)(net_params(), net_data(7)).shape == (7, 20)


def test_a_function_that_is_none():
    refuses(lambda: jaxq.qat(3), "function", "3", error=TypeError)
    refuses(lambda: jaxq.quantize(jaxq.w8a8().scheme), "function", "policy=", error=TypeError)


# --- converted parameters --------------------------------------------------------------------------------------------


def square_params():
    return {"stem": {"kernel": weight(0, 12, 12)}}


def test_converted_for_a_function_that_contracts_another_axis():
    converted = jaxq.convert(dot, jaxq.w8a8())(square_params(), net_data())
    refuses(lambda: jaxq.quantize(square, jaxq.w8a8())(converted, net_data()), "'stem'", "convert|plan")


def test_converted_for_a_function_that_does_not_multiply_by_it():
    def chain(params, x):
        return jnp.tanh(dot(params, x)) @ params["middle"]["kernel"]

    def elementwise(params, x):
        return dot(params, x) * jnp.sum(params["middle"]["kernel"])

    converted = jaxq.convert(chain, jaxq.w8a8())({k: net_params()[k] for k in ("stem", "middle")}, net_data())
    refuses(lambda: jaxq.quantize(elementwise, jaxq.w8a8())(converted, net_data()), "middle", "convert|site|plan")


def test_converted_for_a_function_that_joins_the_weights():
    def joined(params, x):
        return x @ jnp.concatenate([params["one"]["kernel"], params["two"]["kernel"]], axis=1)

    def apart(params, x):
        return x @ params["one"]["kernel"] + x @ params["two"]["kernel"]

    params = {"one": {"kernel": weight(0, 12, 12)}, "two": {"kernel": weight(1, 12, 12)}}
    for made_for, run_with in ((joined, apart), (apart, joined)):
        converted = jaxq.convert(made_for, jaxq.w8a8())(params, net_data())
        call = jaxq.quantize(run_with, jaxq.w8a8())
        refuses(lambda call=call, converted=converted: call(converted, net_data()), r"\bone\b", "convert")


@pytest.mark.parametrize(
    "other",
    [None, W4, jaxq.Scheme(weight=jaxq.int8(per_tensor=True), act=jaxq.int8()), RECIPES["unsigned"],
     jaxq.weight_only(jaxq.int8(group=4)), jaxq.weight_only(jaxq.int8(symmetric=False))],
    ids=["float", "int4", "per_tensor", "unsigned", "group", "asymmetric"],
)  # fmt: skip
def test_converted_with_another_plan(other):
    ours, theirs = {"middle": jaxq.w8a8(), "*": W4}, {"middle": other, "*": W4}
    for made_with, run_with in ((ours, theirs), (theirs, ours)):
        if made_with["middle"] is None:  # a float leaf is quantized on the way
            continue
        converted = jaxq.convert(net, made_with)(net_params(), net_data())
        call = jaxq.quantize(net, run_with)
        refuses(lambda call=call, converted=converted: call(converted, net_data()), "'middle'", "plan")


def test_a_leaf_that_was_left_float_is_quantized_on_the_way():
    part, whole = {"middle": None, "*": jaxq.w8a8()}, jaxq.w8a8()
    mixed = jax.jit(jaxq.quantize(net, whole))(jaxq.convert(net, part)(net_params(), net_data()), net_data())
    np.testing.assert_array_equal(mixed, serve(net, whole, net_params(), net_data()))


def test_converting_twice():
    once = jaxq.convert(net, jaxq.w8a8())(net_params(), net_data())
    refuses(lambda: jaxq.convert(net, jaxq.w8a8())(once, net_data()), "stem|middle|last", "float", error=TypeError)


def test_training_converted_parameters():
    once = jaxq.convert(net, jaxq.w8a8())(net_params(), net_data())
    refuses(lambda: jaxq.qat(net, jaxq.w8a8())(once, net_data()), "quantize", error=TypeError)
    refuses(lambda: jax.jit(jaxq.qat(net, jaxq.w8a8()))(once, net_data()), "quantize", error=TypeError)


def test_converted_arrays_in_another_argument():
    once = jaxq.convert(net, jaxq.w8a8())(net_params(), net_data())
    swapped = jaxq.quantize(lambda x, params: net(params, x), jaxq.w8a8())
    refuses(lambda: swapped(net_data(), once), "argnums")


def _gradients():
    def loss(params, x):
        return jnp.sum(jaxq.quantize(net, jaxq.w8a8())(params, x) ** 2)

    return {
        "grad": lambda params, x: jax.grad(loss)(params, x),
        "jit_grad": lambda params, x: jax.jit(jax.grad(loss))(params, x),
        "value_and_grad": lambda params, x: jax.value_and_grad(loss)(params, x),
        "allow_int": lambda params, x: jax.grad(loss, allow_int=True)(params, x),
        "vjp": lambda params, x: jax.vjp(lambda params: loss(params, x), params)[1](jnp.float32(1)),
    }


@pytest.mark.parametrize("kind", _gradients())
def test_a_gradient_by_converted_parameters(kind):
    once = jaxq.convert(net, jaxq.w8a8())(net_params(), net_data())
    refuses(lambda: _gradients()[kind](once, net_data()), "int8|QArray|converted")


def test_a_gradient_by_what_converted_parameters_left_in_float():
    policy = {"last": None, "*": jaxq.w8a8()}
    once = jaxq.convert(net, policy)(net_params(), net_data())

    def loss(kernel, x):
        return jnp.sum(jaxq.quantize(net, policy)({**once, "last": {"kernel": kernel}}, x))

    by_kernel, by_x = jax.grad(loss, (0, 1))(once["last"]["kernel"], net_data())
    assert np.isfinite(by_kernel).all() and np.abs(by_kernel).max() > 0
    assert np.isfinite(by_x).all() and np.abs(by_x).max() > 0


@pytest.mark.parametrize("verb", RUNS)
def test_the_argument_with_the_weights_is_missing(verb):
    run = {"qat": jaxq.qat, "quantize": jaxq.quantize}[verb]
    refuses(lambda: run(net)(params=net_params(), x=net_data()), "argument 0", "position", "argnums=", error=TypeError)
    refuses(lambda: run(net)(), "argnums=", error=TypeError)
    refuses(lambda: run(net, argnums=2)(net_params(), net_data()), "argument 2", "argnums=", error=TypeError)


@pytest.mark.parametrize("verb", [jaxq.make_plan, jaxq.observe, jaxq.convert], ids=lambda verb: verb.__name__)
def test_the_argument_with_the_weights_is_missing_for(verb):
    refuses(lambda: verb(net, jaxq.w8a8())(params=net_params(), x=net_data()), "argnums=", error=TypeError)


# --- overflow of int32 -----------------------------------------------------------------------------------------------

MOST = 131071  # 131071 * 128 * 128 < 2^31 <= 131072 * 128 * 128


def dot_shapes(terms):
    return {"stem": {"kernel": SHAPE((terms, 4), jnp.float32)}}, SHAPE((2, terms), jnp.float32)


def conv_shapes(features):
    return {"stem": {"kernel": SHAPE((3, 3, features, 4), jnp.float32)}}, SHAPE((1, 5, 5, features), jnp.float32)


@pytest.mark.parametrize("recipe", ["dynamic", "static", "dynamic_asymmetric"])
def test_sums_that_could_overflow_name_the_site(recipe):
    for f, shapes in ((dot, dot_shapes(MOST + 1)), (conv, conv_shapes(MOST // 9 + 1))):
        plan = jaxq.make_plan(f, RECIPES[recipe])
        refuses(
            lambda plan=plan, shapes=shapes: plan(*shapes), "'stem'", "int32", "131071|65793|66311", "None|bits|split"
        )


@pytest.mark.parametrize("recipe", ["dynamic", "static", "dynamic_per_tensor"])
def test_sums_that_fit(recipe):
    for f, shapes in ((dot, dot_shapes(MOST)), (conv, conv_shapes(MOST // 9))):
        assert jaxq.make_plan(f, RECIPES[recipe])(*shapes)["stem"].is_integer


@pytest.mark.parametrize("policy", [jaxq.weight_only(), {"stem": None}, W4], ids=str)
def test_sums_that_fit_after_the_fix(policy):
    assert jaxq.make_plan(dot, policy)(*dot_shapes(MOST + 1)).names == ("stem",)


def test_a_wider_range_overflows_sooner():
    # Codes less their zero point reach 255: 131071 * 255 * 127 >= 2^31, 60000 * 255 * 128 < 2^31.
    refuses(lambda: jaxq.make_plan(dot, RECIPES["dynamic_asymmetric"])(*dot_shapes(MOST)), "'stem'", "int32")
    assert jaxq.make_plan(dot, RECIPES["dynamic_asymmetric"])(*dot_shapes(60000))["stem"].is_integer


@pytest.mark.parametrize("verb", RUNS)
def test_sums_that_could_overflow_are_not_run(verb):
    params, x = dot_shapes(MOST + 1)
    refuses(lambda: jax.eval_shape(functools.partial(VERBS[verb], dot, jaxq.w8a8()), params, x), "'stem'", "int32")


def product(params, x, y):
    """A product of activations after a dense layer."""
    return dot(params, x).T @ y


@pytest.mark.parametrize("terms", [MOST, MOST + 1])
def test_a_plan_for_short_sums_does_not_serve_sums_that_overflow(terms):
    # A weightless product sums over what a plan does not fix: positions, or here rows.
    def data(rows):
        return SHAPE((rows, 12), jnp.float32), SHAPE((rows, 5), jnp.float32)

    params = {"stem": {"kernel": SHAPE((12, 4), jnp.float32)}}
    plan = jaxq.make_plan(product, jaxq.w8a8())(params, *data(16))
    (name,) = set(plan.names) - {"stem"}
    assert plan[name].is_integer
    run = functools.partial(jax.eval_shape, jaxq.quantize(product, plan), params)
    if terms > MOST:
        refuses(lambda: run(*data(terms)), name, "int32")
    else:
        assert run(*data(terms)).shape == (4, 5)


def test_the_longest_sum_is_right():
    params = {"stem": {"kernel": jnp.full((MOST, 2), -1.0).at[:, 1].set(1.0)}}
    x = jnp.ones((2, MOST))
    np.testing.assert_allclose(serve(dot, jaxq.w8a8(), params, x), [[-MOST, MOST]] * 2, rtol=1e-6)


# --- arrays of size zero ---------------------------------------------------------------------------------------------


def conv_params():
    return {"stem": {"kernel": weight(0, 3, 3, 4, 8)}}


EMPTY = {
    "dot": (dot, lambda: {"stem": net_params()["stem"]}, lambda n: net_data(n)),
    "conv": (conv, conv_params, lambda n: normal(0, n, 5, 5, 4)),
    "ragged": (ragged, lambda: {"stem": {"kernel": weight(0, 2, 12, 8)}}, lambda n: net_data(n)),
    "lookup": (lookup, lambda: {"table": {"embedding": weight(0, 12, 8)}}, lambda n: jnp.zeros(n, jnp.int32)),
}


@pytest.mark.parametrize("recipe", ["dynamic", "static_asymmetric", "weight_only"])
@pytest.mark.parametrize("name", EMPTY)
def test_a_batch_of_nothing(name, recipe):
    f, params, data = EMPTY[name]
    plan = ready(f, RECIPES[recipe], params(), data(2))
    expected = jax.eval_shape(f, params(), data(0))
    for out in both(f, plan, params(), data(0)).values():
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("recipe", ["dynamic", "dynamic_asymmetric", "dynamic_per_tensor", "weight_only", "unsigned"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=["no terms", "no outputs"])
def test_a_sum_of_nothing_is_zero(recipe, shape):
    params, x = {"stem": {"kernel": jnp.zeros(shape)}}, jnp.ones((2, shape[0]))
    np.testing.assert_array_equal(serve(dot, RECIPES[recipe], params, x), np.zeros((2, shape[1]), np.float32))


@pytest.mark.parametrize("name", ["dot", "conv"])
def test_the_gradient_of_nothing_is_zero(name):
    f, params, data = EMPTY[name]
    by_params = jax.grad(lambda params: jnp.sum(jaxq.qat(f, jaxq.w8a8())(params, data(0)) ** 2))(params())
    for leaf in jax.tree.leaves(by_params):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape, np.float32))


def test_an_empty_batch_changes_no_range():
    calibrate = jaxq.calibrate(net, jaxq.w8a8(static=True), progress=False)
    expected = calibrate(net_params(), [net_data()])
    with_empty = calibrate(net_params(), [net_data(0), net_data(), net_data(0)])
    for name in expected.names:
        for a, b in zip(expected.range(name), with_empty.range(name), strict=True):
            assert (a is None and b is None) or (float(a.lo), float(a.hi)) == (float(b.lo), float(b.hi))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_quantizing_an_empty_array(shape):
    q, scale, zero = jaxq.linear_quantize(jnp.zeros(shape), 8, symmetric=False)
    assert q.shape == shape and np.isfinite(scale).all() and np.isfinite(zero).all()
    assert jaxq.int8()(jnp.zeros(shape)).decode().shape == shape


# --- zeros -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_channels_and_tokens_of_zeros_are_exact(recipe):
    params = {"stem": {"kernel": weight(0, 12, 20).at[:, 3].set(0)}}
    x = net_data().at[1].set(0)
    plan = ready(dot, RECIPES[recipe], params, x)
    out = serve(dot, plan, params, x)
    np.testing.assert_array_equal(out[:, 3], np.zeros(3))
    np.testing.assert_array_equal(out[1], np.zeros(20))
    assert np.abs(out[0, :3]).min() > 0


@pytest.mark.parametrize("recipe", ["dynamic", "static_asymmetric", "weight_only", "unsigned"])
def test_channels_and_images_of_zeros_are_exact(recipe):
    params = {"stem": {"kernel": conv_params()["stem"]["kernel"].at[..., 3].set(0)}}
    x = normal(1, 3, 5, 5, 4).at[1].set(0)
    plan = ready(conv, RECIPES[recipe], params, x)
    out = serve(conv, plan, params, x)
    np.testing.assert_array_equal(out[..., 3], np.zeros((3, 5, 5)))
    np.testing.assert_array_equal(out[1], np.zeros((5, 5, 8)))


@pytest.mark.parametrize("recipe", ["dynamic", "weight_only_asymmetric", "unsigned"])
def test_rows_and_experts_of_zeros_are_exact(recipe):
    table = {"table": {"embedding": weight(0, 12, 8).at[5].set(0)}}
    np.testing.assert_array_equal(serve(lookup, RECIPES[recipe], table, jnp.array([4, 5]))[1], np.zeros(8))
    experts = {"stem": {"kernel": weight(0, 2, 12, 8).at[1].set(0)}}
    np.testing.assert_array_equal(serve(ragged, RECIPES[recipe], experts, net_data()), np.zeros((3, 8)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_and_data_of_zeros_only(recipe):
    params, x = {"stem": {"kernel": jnp.zeros((12, 20))}}, jnp.zeros((3, 12))
    plan = ready(dot, RECIPES[recipe], params, x)
    np.testing.assert_array_equal(serve(dot, plan, params, x), np.zeros((3, 20)))


# --- huge and subnormal ----------------------------------------------------------------------------------------------

EXTREMES = {
    "huge": [1e38, -1e38, 1e38, -1e38],
    "largest": [LARGEST, -LARGEST, LARGEST, 0.0],
    "subnormal": [1e-40, -1e-40, 1e-45, 0.0],
    "mixed": [1e38, 1e-45, -1.0, 0.0],
    "ordinary": [1.0, -0.5, 0.25, 0.0],
    "zeros": [0.0, 0.0, 0.0, 0.0],
}


def extremes(dtype=jnp.float32):
    """Every extreme as a row, values beyond the type's range saturated: [6, 4]."""
    top = float(jnp.finfo(dtype).max)
    return jnp.asarray(np.clip(np.array(list(EXTREMES.values())), -top, top), dtype)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(recipe, "float32") for recipe in RECIPES]
    + [(recipe, dtype) for recipe in ("static_asymmetric", "weight_only") for dtype in ("bfloat16", "float16")],
)
def test_finite_input_never_gives_nan(recipe, dtype):
    x, params = extremes(dtype), {"stem": {"kernel": extremes(dtype).T}}
    plan = ready(dot, RECIPES[recipe], params, x)
    # With float activations the sum itself is the float program's, where infinities may cancel.
    excused = np.isnan(dot(params, x)) if recipe not in INTEGER else np.zeros((6, 6), bool)
    out = serve(dot, plan, params, x)
    assert out.dtype == dtype
    assert not (np.isnan(out) & ~excused).any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_finite_input_never_gives_a_gradient_of_nan(recipe):
    x, params = extremes(), {"stem": {"kernel": extremes().T}}
    plan = ready(dot, RECIPES[recipe], params, x)
    factors = jnp.asarray(np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (6, 6)), jnp.float32)

    def gradients(f):
        return jax.tree.leaves(jax.grad(lambda params, x: jnp.sum(f(params, x) * factors), (0, 1))(params, x))

    for exact, near in zip(gradients(dot), gradients(jaxq.qat(dot, plan)), strict=True):
        assert not (np.isnan(near) & ~np.isnan(exact)).any()


@pytest.mark.parametrize("recipe", ["dynamic", "static", "dynamic_asymmetric", "static_asymmetric"])
def test_finite_input_never_gives_nan_in_a_convolution(recipe):
    kernel = extremes().T.reshape(2, 2, 1, 6)
    x = jnp.tile(extremes().reshape(6, 2, 2, 1), (1, 2, 2, 1))
    plan = ready(conv, RECIPES[recipe], {"stem": {"kernel": kernel}}, x)
    assert not np.isnan(serve(conv, plan, {"stem": {"kernel": kernel}}, x)).any()


@pytest.mark.parametrize(
    "quantizer",
    [jaxq.int8(), jaxq.int8(symmetric=False), jaxq.uint8(), jaxq.int4(), jaxq.int4(symmetric=False), jaxq.int2(),
     jaxq.int8(per_tensor=True, symmetric=False)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
def test_what_is_finite_decodes_to_what_is_finite(quantizer, dtype):
    x = extremes(dtype).T
    decoded = np.asarray(quantizer(x).decode(), np.float64)
    assert np.isfinite(decoded).all()
    low, high = quantizer.bounds()
    wide = np.asarray(x, np.float64)
    span = np.max(wide, 0, initial=0) - np.min(wide, 0, initial=0)
    step = span / (high - low) if not quantizer.symmetric else np.abs(wide).max(0) / high
    step = np.full_like(step, step.max()) if quantizer.per_tensor else step
    # Half a step, or where the zero point was rounded one whole; and the rounding of the type itself.
    slack = 2 * float(jnp.finfo(dtype).eps) * np.abs(wide).max(0) + 2.0**-119
    assert (np.abs(decoded - wide) <= step[None] + slack[None]).all()


def test_huge_times_small_is_right():
    params, x = {"stem": {"kernel": weight(0, 12, 20) * 1e-30}}, net_data() * 1e36
    exact = np.asarray(x, np.float64) @ np.asarray(params["stem"]["kernel"], np.float64)
    for out in both(dot, jaxq.w8a8(), params, x).values():
        assert np.abs(out - exact).max() < 0.02 * np.abs(exact).max()


# --- not float -------------------------------------------------------------------------------------------------------


def mixed(params, x, i, c):
    """A float product, an integer one, one of int8, a complex one; and a lookup of integers, which is no product."""
    small = i.astype(jnp.int8)
    eight = jax.lax.dot_general(small, small, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    rows = jnp.take(params["ids"]["embedding"], i[0] % 5, axis=0)
    return dot(params, x), i @ params["counts"]["kernel"], eight, c @ c.T, rows


@functools.cache
def mixed_args():
    rng = np.random.default_rng(0)
    ints = jnp.asarray(rng.integers(0, 100, (3, 12)), jnp.int32)
    complexes = jnp.asarray(rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4)), jnp.complex64)
    params = {
        "stem": {"kernel": weight(0, 12, 20)},
        "counts": {"kernel": jnp.asarray(rng.integers(0, 9, (12, 4)), jnp.int32)},
        "ids": {"embedding": jnp.asarray(rng.integers(0, 9, (5, 4)), jnp.int32)},
    }
    return params, net_data(), ints, complexes


@pytest.mark.parametrize("recipe", ["dynamic", "weight_only"])
def test_operands_that_are_not_float_stay_what_they_are_and_are_listed(recipe):
    plan = jaxq.make_plan(mixed, RECIPES[recipe])(*mixed_args())
    kept = [decision for decision in plan.decisions if decision.scheme is None]
    assert [decision.site.name for decision in plan.decisions if decision.scheme is not None] == ["stem"]
    products = [decision for decision in kept if decision.site.op == "dot_general"]
    assert len(products) == 3
    for dtype in ("int32", "int8", "complex64"):
        assert sum(re.search(rf"\b{dtype}\b", d.reason) is not None for d in products) == 1
    for decision in kept:
        assert decision.site.name in str(plan)
    exact = jax.jit(mixed)(*mixed_args())
    for outs in both(mixed, plan, *mixed_args()).values():
        for a, b in zip(exact[1:], outs[1:], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert np.abs(exact[0] - outs[0]).max() > 0


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool", "complex64"])
def test_arrays_that_are_not_float_are_not_quantized(dtype):
    x = jnp.ones((3, 4), dtype)
    refuses(lambda: jaxq.int8()(x), dtype, "float", error=TypeError)
    refuses(lambda: jaxq.linear_quantize(x, 8), dtype, "float", error=TypeError)


LEARNED = jaxq.Quantizer(jaxq.Int(4), per_tensor=True, calibrator=jaxq.learned())


@pytest.mark.parametrize(
    "policy", [jaxq.w8a8(static=True), jaxq.Scheme(weight=LEARNED, act=LEARNED)], ids=["ranges", "steps"]
)
def test_ranges_that_saw_nothing_show_in_a_compiled_program(policy):
    """Nobody can tell while a plan is traced, so no error: NaN, not numbers, until the plan has seen something."""

    def f(params, x):
        return x @ params["w"]

    params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
    plan = jaxq.make_plan(f, policy)(params, x)
    for program in (jaxq.qat, jaxq.quantize):
        assert np.isnan(jax.jit(lambda plan, program=program: program(f, plan)(params, x))(plan)).all()
    y, seen = jax.jit(lambda plan: jaxq.observe(f, plan, quantized=True)(params, x))(plan)
    np.testing.assert_array_equal(jax.jit(lambda plan: jaxq.qat(f, plan)(params, x))(seen), y)
    np.testing.assert_allclose(y, x, rtol=0.1)
