"""Products of operands that come in groups on either side, and on both: against int64 sums of codes encoded here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
import oracle
from inspection import assert_bitwise, products
from jaxq import Scheme

pytestmark = pytest.mark.shared

DEPTH = 48

# Group of the activations, group of the weight; None is one scale per token or channel.
PAIRS = {"act": (8, None), "equal": (8, 8), "finer act": (4, 24), "finer weight": (16, 8), "one each": (1, 1)}


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.integers(-3, 3, shape)), jnp.float32)


def blocks(x, axis, group):
    """Return `x` with the blocks that share a scale along axis + 1."""
    count = 1 if group is None else x.shape[axis] // group
    return np.asarray(x, np.float64).reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])


def decoded(x, axis, group):
    """Return the int8 symmetric imitation of `x`, and how far float32 may be off it where it rounds the other way."""
    x, parts = np.asarray(x), blocks(x, axis, group)
    scale = np.abs(parts).max(axis + 1, keepdims=True) / 127
    doubt = np.where(oracle.is_near_tie(parts / scale), scale, 0)
    return (np.round(parts / scale) * scale).reshape(x.shape), np.broadcast_to(doubt, parts.shape).reshape(x.shape)


def dots(params, xs):
    """A dot with the weight on the right, on the left, and of two activations."""
    return {
        "right": xs["right"] @ params["right"],
        "left": jnp.einsum("ok,bk->bo", params["left"], xs["left"]),
        "two": jnp.einsum("hqk,hvk->hqv", xs["query"], xs["key"]),
        "deep": jnp.einsum("bik,iko->bo", xs["deep"], params["deep"]),
    }


@functools.cache
def data():
    params = {"right": normal(0, DEPTH, 5), "left": normal(1, 5, DEPTH), "deep": normal(2, 3, DEPTH, 5)}
    xs = {"right": normal(3, 7, DEPTH), "left": normal(4, 7, DEPTH), "deep": normal(5, 4, 3, DEPTH)}
    return params, xs | {"query": normal(6, 2, 4, DEPTH), "key": normal(7, 2, 3, DEPTH)}


@functools.cache
def case(name):
    """Return `(plan, trained, served, gradients)` for one pair of groups."""
    act, weight = PAIRS[name]
    plan = jaxq.make_plan(dots, Scheme(jaxq.int8(group=weight), jaxq.int8(group=act)))(*data())
    converted = jaxq.convert(dots, plan)(*data())

    def run(params, xs):
        outs = jaxq.qat(dots, plan)(params, xs)
        return sum(jnp.sum(jnp.sin(y)) for y in outs.values()), outs

    (_, trained), gradients = jax.jit(jax.value_and_grad(run, has_aux=True, argnums=(0, 1)))(*data())
    return plan, trained, jax.jit(jaxq.quantize(dots, plan))(converted, data()[1]), gradients


def operands(name):
    """Return what every product multiplies, decoded, and the doubt: {site: (einsum, (a, doubt), (b, doubt))}."""
    (act, weight), (params, xs) = PAIRS[name], data()
    return {
        "right": ("bk,ko->bo", decoded(xs["right"], 1, act), decoded(params["right"], 0, weight)),
        "left": ("bk,ok->bo", decoded(xs["left"], 1, act), decoded(params["left"], 1, weight)),
        "two": ("hqk,hvk->hqv", decoded(xs["query"], 2, act), decoded(xs["key"], 2, act)),
    }


@pytest.mark.parametrize("name", PAIRS)
def test_products_of_groups(name):
    _, trained, served, _ = case(name)
    assert_bitwise(trained, served)
    for site, (spec, (a, da), (b, db)) in operands(name).items():
        size = np.einsum(spec, np.abs(a), np.abs(b))
        room = 1e-6 * size + 1.01 * (np.einsum(spec, da, np.abs(b)) + np.einsum(spec, np.abs(a), db))
        assert (np.abs(np.float64(served[site]) - np.einsum(spec, a, b)) <= room).all()
        assert (room < 1e-2 * size.max()).mean() > 0.8


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_multiply_decoded_groups(name):
    _, trained, _, (by_weight, by_x) = case(name)
    (_, (a, da), (b, db)) = operands(name)["right"]
    c = np.cos(np.float64(trained["right"]))
    assert (np.abs(by_weight["right"] - a.T @ c) <= 1e-4 + da.T @ np.abs(c)).all()
    assert (np.abs(by_x["right"] - c @ b.T) <= 1e-4 + np.abs(c) @ db.T).all()
    for leaf in jax.tree.leaves((by_weight, by_x)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_groups_run_along_the_last_of_several_contracted_axes():
    _, _, served, _ = case("equal")
    params, xs = data()
    a, b = decoded(xs["deep"].transpose(0, 2, 1), 1, 8)[0], decoded(params["deep"].transpose(1, 0, 2), 0, 8)[0]

    def one_scale(x, axis, shared):
        """A scale is shared by all of the other contracted axis."""
        parts = blocks(x, axis, 8)
        scale = np.abs(parts).max((axis + 1, shared), keepdims=True) / 127
        return (np.round(parts / scale) * scale).reshape(x.shape)

    a = one_scale(np.asarray(xs["deep"]).transpose(0, 2, 1), 1, 3)
    b = one_scale(np.asarray(params["deep"]).transpose(1, 0, 2), 0, 2)
    np.testing.assert_allclose(served["deep"], np.einsum("bki,kio->bo", a, b), rtol=5e-3, atol=0.05)


def test_groups_are_summed_in_integers():
    plan = case("finer act")[0]
    assert all(decision.is_integer for decision in plan.decisions)
    converted = jaxq.convert(dots, plan)(*data())
    assert products(jaxq.quantize(dots, plan), converted, data()[1]) == [("int8", "int8")] * 4


# --- block formats ---------------------------------------------------------------------------------------------------

FORMATS = {
    "mxint8": (jaxq.mxint8(16), jaxq.mxint8(8)),
    "mxfp8": (jaxq.mxfp8(16), jaxq.mxfp8(16)),
    "mxfp4": (jaxq.mxfp4(16), jaxq.mxfp8(24)),
    "nvfp4": (jaxq.nvfp4(), jaxq.nvfp4()),
    "mixed": (jaxq.mxfp4(16), jaxq.int8()),
    "asymmetric": (jaxq.int8(group=8, symmetric=False), jaxq.uint8(group=24)),
    "int4": (jaxq.int4(group=16), jaxq.int4(group=16)),
    "fitted": (jaxq.int4(group=16, fit=jaxq.mse()), jaxq.int4(group=16)),
}


def fan(params, x):
    return {name: x @ w for name, w in params.items()}


@functools.cache
def fanned():
    params, x = {name: normal(n, DEPTH, 6) for n, name in enumerate(FORMATS)}, normal(50, 5, DEPTH)
    plan = jaxq.make_plan(fan, {name: Scheme(weight, act) for name, (act, weight) in FORMATS.items()})(params, x)
    converted = jaxq.convert(fan, plan)(params, x)
    trained = jax.jit(jaxq.qat(fan, plan))(params, x)
    return params, x, plan, converted, trained, jax.jit(jaxq.quantize(fan, plan))(converted, x)


@pytest.mark.parametrize("name", FORMATS)
def test_block_formats_on_both_sides(name):
    """What is multiplied is what each quantizer makes of an array; those are tested by themselves."""
    _, x, plan, converted, trained, served = fanned()
    assert_bitwise(trained[name], served[name])
    a = np.float64(jax.jit(lambda x: FORMATS[name][0](x, (1,)).decode())(x))
    b = np.float64(converted[name].decode())
    np.testing.assert_allclose(served[name], a @ b, atol=2e-6 * (np.abs(a) @ np.abs(b)).max())
    assert plan[name].is_integer == (name in ("mxint8", "asymmetric", "int4", "fitted"))


def test_block_formats_have_gradients():
    params, x, plan, converted, _, _ = fanned()
    seeds = {name: normal(n, 5, 6) for n, name in enumerate(FORMATS)}

    def loss(params, x):
        return sum(jnp.vdot(y, seeds[name]) for name, y in jaxq.qat(fan, plan)(params, x).items())

    by_weight, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    through = [np.float64(seeds[name]) @ np.float64(converted[name].decode()).T for name in FORMATS if name != "fitted"]
    clipped = by_x - sum(through)
    assert np.abs(clipped).max() <= 1.01 * np.abs(seeds["fitted"] @ converted["fitted"].decode().T).max()
    for name in set(FORMATS) - {"fitted"}:
        a = np.float64(FORMATS[name][0](x, (1,)).decode())
        np.testing.assert_allclose(by_weight[name], a.T @ np.float64(seeds[name]), rtol=1e-4, atol=1e-3)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_groups_that_do_not_nest_are_refused_by_name():
    params, x = {"up": normal(0, DEPTH, 4)}, normal(1, 2, DEPTH)
    with pytest.raises(
        ValueError, match="'up' multiplies groups of 16 by groups of 24, which do not nest; make one group= a multiple"
    ):
        jaxq.make_plan(fan, Scheme(jaxq.int8(group=16), jaxq.int8(group=24)))(params, x)
    with pytest.raises(ValueError, match="site 'up': groups of 32 do not divide.*choose another group="):
        jaxq.make_plan(fan, Scheme(jaxq.int8(), jaxq.mxfp8()))(params, x)
    # Decoded operands are multiplied whole.
    assert jaxq.make_plan(fan, Scheme(jaxq.mxfp8(16), jaxq.int8(group=24)))(params, x)["up"].scheme


@pytest.mark.parametrize("act", [jaxq.int8(group=8), jaxq.mxint8(8), jaxq.mxfp8(8)])
def test_convolutions_and_ragged_dots_refuse_groups_of_activations(act):
    def image(params, x):
        return lax.conv(x, params["conv"], (1, 1), "SAME")

    def experts(params, x, sizes):
        return lax.ragged_dot(x, params["experts"], sizes)

    message = "site '{}': .* one scale per {} or tensor; drop group= from Scheme.act=. there"
    with pytest.raises(ValueError, match=message.format("conv", "image")):
        jaxq.make_plan(image, Scheme(jaxq.int8(), act))({"conv": normal(0, 4, 8, 3, 3)}, normal(1, 2, 8, 5, 5))
    with pytest.raises(ValueError, match=message.format("experts", "token")):
        jaxq.make_plan(experts, Scheme(act=act))({"experts": normal(0, 2, 8, 3)}, normal(1, 4, 8), jnp.array([1, 3]))
