"""The forms of every platform are exact, wherever they run, and each platform gets its own.

A form is a program of integers, so that those of a GPU and a TPU can be run on a CPU; there they are slow, not wrong.
Where the tests run on an accelerator, its own forms are run, and no others: their compilers refuse some.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import oracle
from jaxq.lowering import channels_last, cudnn, forms
from test_kernels import CONVS, DOTS, convs, quick, read_conv, read_dot, seeds

pytestmark = pytest.mark.shared

# Forms that only these shapes reach, or reach with several parts.
MORE_DOTS = {
    "weight [k, n] on the left": ((65, 9), (4, 65), ((0,), (1,)), ((), ())),
    "weight [k, n] on the left of two axes": ((40, 9), (2, 3, 40), ((0,), (2,)), ((), ())),
    "many rows": ((80, 65), (65, 72), ((1,), (0,)), ((), ())),
    "many rows, heads back": ((2, 40, 3, 5), (3, 5, 66), ((2, 3), (0, 1)), ((), ())),
    "many rows, scores": ((2, 67, 3, 8), (2, 65, 3, 8), ((3,), (3,)), ((0, 2), (0, 2))),
    "along the sum, of whole tiles": ((8, 64), (12, 64), ((1,), (1,)), ((), ())),
}
SAME, ONE, LAST = ((1, 1), (1, 1)), (1, 1), ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
LINE = ((0, 2, 1), (2, 1, 0), (0, 2, 1))
BOX, FIRST3 = ((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3)), ((0, 1, 2, 3, 4),) * 3
HERE = {"cpu": forms.EVERYWHERE, "gpu": (forms.GPU,)}.get(jax.default_backend(), (forms.TPU,))
MORE_CONVS = {
    "parts of channels": ((1, 4, 4, 230), (3, 3, 230, 5), (ONE, SAME, ONE, ONE, LAST, 1)),
    "parts of the window": ((1, 60, 50, 2), (40, 52, 2, 3), ((9, 7), ((2, 3), (4, 1)), ONE, ONE, LAST, 1)),
    "parts of both": ((1, 2100, 2), (1100, 2, 3), ((50,), ((7, 9),), (1,), (2,), LINE, 1)),
    "transposed by three": ((2, 5, 4, 3), (5, 2, 3, 4), (ONE, ((2, 3), (0, 1)), (3, 2), ONE, LAST, 1)),
    "transposed, window below the step": ((1, 4, 4, 3), (1, 2, 3, 2), (ONE, ((0, 2), (1, 0)), (3, 3), ONE, LAST, 1)),
    "transposed, negative padding": ((1, 5, 4, 3), (3, 3, 3, 2), (ONE, ((-2, -1), (1, -3)), (2, 2), ONE, LAST, 1)),
    "wide padding": ((2, 4, 5, 6), (3, 2, 6, 17), ((2, 1), ((4, 3), (0, 2)), ONE, (1, 2), LAST, 1)),
    "wide and negative padding": ((2, 4, 5, 6), (2, 2, 6, 17), (ONE, ((3, -1), (-2, 4)), ONE, ONE, LAST, 1)),
    "NWHC, apart": ((4, 2, 5, 6), (3, 6, 2, 17), (ONE, SAME, ONE, ONE, ((1, 3, 0, 2), (3, 1, 0, 2), (1, 3, 2, 0)), 1)),
    "lines first": ((2, 6, 9), (17, 6, 3), ((2,), ((5, 0),), (1,), (2,), ((0, 1, 2),) * 3, 1)),
    "volumes first": ((2, 6, 4, 5, 3), (17, 6, 2, 3, 2), ((2, 1, 1), ((1, 2),) * 3, (1,) * 3, (1, 1, 2), FIRST3, 1)),
    "volume below its window": (
        (1, 2, 3, 3, 6),
        (4, 1, 1, 6, 17),
        ((1,) * 3, ((0, 0),) * 3, (1,) * 3, (1,) * 3, BOX, 1),
    ),
    "tiles": ((2, 9, 8, 3), (4, 4, 3, 5), ((4, 4), ((1, -2), (0, 1)), ONE, ONE, LAST, 1)),
    "large tiles": ((1, 19, 9, 2), (9, 8, 2, 3), ((9, 8), ((0, 0), (0, 0)), ONE, ONE, LAST, 1)),
    "transposed, grouped": ((1, 4, 4, 6), (3, 3, 3, 4), (ONE, SAME, (2, 2), ONE, LAST, 2)),
}


def some_codes(rng, shape):
    """Return codes all over the range of int8, a fifth of them at its ends."""
    codes = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.2, rng.choice([-128, 127], shape), codes).astype(np.int8)


def check(op, shapes, sums, seed=0, platforms=(forms.GPU, forms.TPU)):
    """Assert that the forms of platforms sum random codes, and the largest ones, to what the oracle says."""
    platforms = [platform for platform in platforms if platform in HERE]
    rng = np.random.default_rng(seed)
    pairs = [tuple(some_codes(rng, s) for s in shapes), tuple(np.full(s, -128, np.int8) for s in shapes)]
    run = jax.jit(lambda pairs: [[forms.sums_on(p, op, *pair) for p in platforms] for pair in pairs])
    for pair, results in zip(pairs, run(pairs), strict=True):
        want = sums(*(x.astype(np.int64) for x in pair))
        for platform, got in zip(platforms, results, strict=True):
            assert got.dtype == jnp.int32, platform
            np.testing.assert_array_equal(np.asarray(got, np.int64), want, err_msg=platform)


@pytest.mark.parametrize("name", [*DOTS, *MORE_DOTS])
def test_dots_are_exact_in_every_form(name):
    *shapes, contract, batch = dims = {**DOTS, **MORE_DOTS}[name]
    platforms = forms.EVERYWHERE if name in MORE_DOTS else (forms.GPU,)
    check(read_dot(dims), shapes, lambda a, b: oracle.dot_general(a, b, contract, batch), platforms=platforms)


@pytest.mark.parametrize("name", [*CONVS, *MORE_CONVS])
def test_convolutions_are_exact_in_every_form(name):
    *shapes, options = dims = {**CONVS, **MORE_CONVS}[name]
    platforms = forms.EVERYWHERE if name in MORE_CONVS else (forms.GPU, forms.TPU)
    check(read_conv(dims), shapes, lambda a, b: oracle.conv_general_dilated(a, b, *options), platforms=platforms)


@quick(max_examples=15)
@given(convs(), seeds)
def test_random_convolutions_are_exact_in_every_form(dims, seed):
    *shapes, options = dims
    check(read_conv(dims), shapes, lambda a, b: oracle.conv_general_dilated(a, b, *options), seed)


def test_parts_of_a_convolution_are_exact_in_float32():
    """No part sums more than 1024 products of two codes, 2^24 in size; and there are as few parts as that allows."""
    most = 0
    for name, (lhs, rhs, options) in {**CONVS, **MORE_CONVS}.items():
        op = read_conv((lhs, rhs, options))
        if op.feature_groups > 1:
            continue
        parts = jax.eval_shape(lambda a, b, op=op: [p[1:] for p in cudnn.parts(op, a, b)], *map(codes_of, (lhs, rhs)))
        terms = [np.prod([kernel.shape[axis] for axis in op.rhs_spec[1:]]) for _, kernel in parts]
        assert sum(terms) == np.prod([rhs[axis] for axis in op.rhs_spec[1:]])
        assert max(terms) * 2**14 <= 2**24, name
        most = max(most, len(parts))
    assert most > 3


def codes_of(shape):
    return jax.ShapeDtypeStruct(shape, jnp.int8)


def test_each_platform_gets_its_own_form():
    """Exported for one platform, a program holds that platform's form only; for several, all of theirs."""
    op = read_conv(CONVS["NHWC"])
    a, b = (some_codes(np.random.default_rng(0), shape) for shape in CONVS["NHWC"][:2])

    def export(*platforms):
        return jax.export.export(jax.jit(functools.partial(forms.sums, op)), platforms=platforms)(a, b)

    def count(*platforms):
        text = export(*platforms).mlir_module()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert count("cpu") == (0, 1) and count("cuda") == (1, 0) and count("tpu") == (1, 0)
    assert min(count("cpu", "cuda", "tpu")) > 0
    got = export("cpu", "cuda", "tpu").call(a, b)
    np.testing.assert_array_equal(
        got, oracle.conv_general_dilated(*(x.astype(np.int64) for x in (a, b)), *CONVS["NHWC"][2])
    )


def emitted_for(dims):
    """Return the equations of a product, those of what it calls included."""
    body = jax.make_jaxpr(functools.partial(forms.sums, read_dot(dims)))(*map(codes_of, dims[:2])).jaxpr
    return [eqn.primitive.name for eqn in body.eqns], str(body)


def test_products_that_do_not_differ_are_not_a_choice():
    assert emitted_for(MORE_DOTS["along the sum, of whole tiles"])[0] == ["dot_general"]
    assert "platform_index" in emitted_for(DOTS["row and column"])[1]


def test_products_on_a_gpu_have_whole_tiles():
    """Its compiler counts products twice in tiles cut short; only vectors are exempt, which it takes for sums."""
    for name, dims in {**DOTS, **MORE_DOTS}.items():
        op = read_dot(dims)
        body = jax.make_jaxpr(functools.partial(forms.sums_on, forms.GPU, op))(*map(codes_of, dims[:2])).jaxpr
        (product,) = [eqn for eqn in body.eqns if eqn.primitive.name == "dot_general"] or [None]
        if product is None or 0 in (*dims[0], *dims[1]):
            continue
        (contract, batch), shapes = product.params["dimension_numbers"], [v.aval.shape for v in product.invars]
        rows = [np.prod(s) / np.prod([s[a] for a in (*c, *b)]) for s, c, b in zip(shapes, contract, batch, strict=True)]
        terms = np.prod([shapes[0][axis] for axis in contract[0]])
        assert 1 in rows or (terms % 32 == 0 and all(n % 4 == 0 for n in rows)), name


@pytest.mark.parametrize("name", [*CONVS, *MORE_CONVS])
def test_convolutions_on_a_cpu_are_those_of_its_vector_kernel(name):
    """Two spatial axes, channels last, no output larger than its image; but for a transposed, strided one."""
    dims = {**CONVS, **MORE_CONVS}[name]
    op, shapes = read_conv(dims), [codes_of(shape) for shape in dims[:2]]
    body = jax.make_jaxpr(functools.partial(forms.sums_on, forms.CPU, op))(*shapes).jaxpr
    for eqn in body.eqns:
        if eqn.primitive.name != "conv_general_dilated" or 0 in (*dims[0], *dims[1]) or op.lhs_spec == (0, 1):
            continue
        assert tuple(eqn.params["dimension_numbers"]) == channels_last.IMAGE or name == "transposed, strided, atrous"
        sizes = zip(eqn.outvars[0].aval.shape[1:3], eqn.invars[0].aval.shape[1:3], strict=True)
        assert all(out <= image for out, image in sizes) or name == "transposed, strided, atrous"


def test_every_form_is_reached():
    """On every platform that it names, by one of the shapes above."""
    reached = set()
    for platform in forms.EVERYWHERE:
        for dims in (*DOTS.values(), *MORE_DOTS.values()):
            reached.add((platform, forms.choose(platform, read_dot(dims), *map(codes_of, dims[:2])).name))
        for dims in (*CONVS.values(), *MORE_CONVS.values()):
            reached.add((platform, forms.choose(platform, read_conv(dims), *map(codes_of, dims[:2])).name))
    named = {(platform, form.name) for form in forms.FORMS for platform in form.platforms}
    assert reached == named


def test_table_prints():
    lines = forms.describe().splitlines()
    assert lines[0].split() == ["operation", "form", "platforms", "because"] and len(lines) == len(forms.FORMS) + 2
    assert any("cuDNN" in line for line in lines)
