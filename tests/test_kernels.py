"""Integer kernels are exact: int32 sums equal an int64 oracle bit for bit, whatever the layout, and decode to it.

Three levels. The oracle agrees with `lax` in float. Each kernel, given random codes, sums them exactly and reports the
right scale. Whole functions under `jaxq.quantize`, given numbers that the formats represent, give the float64 result.
Many cases share one compiled program, which is what takes the time.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxq
import oracle
from jaxq import lowering
from jaxq.programs import ops

# Two products and a conversion, each half a unit in the last place of float32.
ROUNDINGS = 2 * 2.0**-23
quick = functools.partial(settings, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)

# (bits, signed, with a zero point)
STORAGE = [(8, True, False), (8, True, True), (8, False, True), (8, False, False), (4, True, False), (4, False, True)]
STORAGE += [(2, True, False), (2, True, True), (5, True, True)]
PAIRS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 4), (5, 3), (6, 8)]


@pytest.fixture(autouse=True)
def strict_types():
    """Refuse implicit promotion of types inside the kernels."""
    with jax.numpy_dtype_promotion("strict"):
        yield


# --- making operands -----------------------------------------------------------------------------------------------


def some_codes(rng, shape, grid, kind):
    """Return a QArray with random codes over all its storage range; `codes - zero point` and scale at full size."""
    bits, signed, has_zero = kind
    low, high = oracle.bounds(bits, signed=signed, symmetric=False)
    codes = rng.integers(low, high, shape, endpoint=True)
    codes = np.where(rng.random(shape) < 0.2, rng.choice([low, high], shape), codes)
    zero = rng.integers(low, high, grid, endpoint=True) if has_zero else None
    scale = np.exp2(rng.uniform(-6, 6, grid)).astype(np.float32)
    q = jaxq.QArray(
        jnp.asarray(codes.astype(np.int8 if signed else np.uint8)),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero.astype(np.int8 if signed else np.uint8)),
        jaxq.Int(bits, signed),
        jnp.float32,
    )
    centred = codes.astype(np.int64) - (0 if zero is None else oracle.spread(zero, shape))
    return q, centred, oracle.spread(scale.astype(np.float64), shape)


def constant_codes(shape, code, zero=None, signed=True, scale=1.0):
    """Return a QArray all of whose codes are `code`."""
    codes = jnp.full(shape, code, jnp.int8 if signed else jnp.uint8)
    ones = (1,) * len(shape)
    zero = None if zero is None else jnp.full(ones, zero, codes.dtype)
    return jaxq.QArray(codes, jnp.full(ones, scale, jnp.float32), zero, jaxq.Int(8, signed), jnp.float32)


def real_numbers(rng, shape, grid, kind):
    """Return float64 numbers that the quantizer of `kind` represents: whole multiples of a power of two per block.

    kind: (bits, signed, symmetric). Every block reaches the ends of its range, so that its scale is that power of two.
    """
    bits, signed, symmetric = kind
    low, high = oracle.bounds(bits, signed=signed, symmetric=symmetric)
    out = np.zeros(shape)
    for index in np.ndindex(*grid):
        block = out[oracle.block(index, shape, grid)]
        codes = rng.integers(low, high, block.shape, endpoint=True)
        for flat, end in zip(rng.permutation(codes.size), [high] if symmetric else [low, high], strict=False):
            codes.flat[flat] = end
        zero = 0 if symmetric else rng.integers(low, high, endpoint=True)
        if not symmetric and codes.size == 1:  # any single number is represented, short ones in every float type
            codes[...] = zero + rng.integers(-3, 3, endpoint=True)
        block[...] = (codes - zero) * 2.0 ** rng.integers(-4, 4)
    return out


def read_op(f, *shapes):
    """Trace a function of one operation on float32 and return its record."""
    avals = [s if isinstance(s, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    closed = jax.make_jaxpr(f)(*avals)
    (eqn,) = closed.jaxpr.eqns
    return ops.read(eqn)


def check_kernels(op, cases, rest=()):
    """Assert that a kernel gives exactly the sums in int32 and, with its scale, `sums * scales` in the end.

    cases: (operands, sums, scales) each. A scale of zero stands for "no product went into this sum".
    """

    def run(operands, rest):
        return [(*lowering.KERNELS[type(op)](op, *pair, *rest), lowering.run(op, pair, rest)) for pair in operands]

    results = jax.jit(run)([operands for operands, _, _ in cases], rest)
    for (_, sums, scales), (acc, scale, out) in zip(cases, results, strict=True):
        assert acc.dtype == jnp.int32 and acc.shape == sums.shape
        np.testing.assert_array_equal(np.asarray(acc, np.int64), sums)
        scale = np.broadcast_to(np.asarray(scale, np.float64), sums.shape)
        assert np.isfinite(scale).all()
        np.testing.assert_allclose(np.where(scales == 0, 0, scale), scales, rtol=ROUNDINGS)
        assert out.dtype == op.out_dtype and out.shape == sums.shape
        np.testing.assert_allclose(np.asarray(out, np.float64), sums * scales, rtol=ROUNDINGS)


# --- dot_general -----------------------------------------------------------------------------------------------------


def place(sizes, axes):
    """Return the shape in which `sizes` stand at `axes`."""
    shape = [0] * len(axes)
    for n, axis in zip(sizes, axes, strict=True):
        shape[axis] = n
    return tuple(shape)


@st.composite
def dots(draw, least_contracted=0):
    """Draw (lhs shape, rhs shape, contract, batch) with the axes of each operand in any order."""
    sizes = st.sampled_from([1, 1, 2, 3, 4, 7])
    counts = [draw(st.integers(least, 2)) for least in (least_contracted, 0, 0, 0)]
    contracted, batch, left, right = (draw(st.lists(sizes, min_size=n, max_size=n)) for n in counts)
    sides = []
    for free in (left, right):
        axes = draw(st.permutations(range(len(contracted) + len(batch) + len(free))))
        shape = place([*contracted, *batch, *free], axes)
        sides.append((shape, tuple(axes[: counts[0]]), tuple(axes[counts[0] : counts[0] + counts[1]])))
    (a, *a_axes), (b, *b_axes) = sides
    return a, b, *zip(a_axes, b_axes, strict=True)


def some_grid(rng, shape, contracted):
    """Return a scale shape: per tensor, per index that is not contracted, or along some of those axes only."""
    mode = rng.integers(3)
    return tuple(
        1 if a in contracted or mode == 0 or (mode == 2 and rng.random() < 0.5) else n for a, n in enumerate(shape)
    )


def dot_case(rng, dims, kinds):
    """Return random operands of a dot, their sums, and the scale of each sum: the dot of scales without the summing."""
    a_shape, b_shape, contract, batch = dims
    a, ca, sa = some_codes(rng, a_shape, some_grid(rng, a_shape, contract[0]), kinds[0])
    b, cb, sb = some_codes(rng, b_shape, some_grid(rng, b_shape, contract[1]), kinds[1])
    for axis in contract[0]:
        sa = sa.take(range(min(1, sa.shape[axis])), axis)
    for axis in contract[1]:
        sb = sb.take(range(min(1, sb.shape[axis])), axis)
    scales = oracle.dot_general(sa, sb, contract, batch)
    return (a, b), oracle.dot_general(ca, cb, contract, batch), scales


def read_dot(dims):
    return read_op(lambda a, b: lax.dot_general(a, b, dims[2:]), *dims[:2])


@quick(max_examples=15)
@given(dots(), st.lists(st.tuples(*[st.sampled_from(STORAGE)] * 2), min_size=2, max_size=2), seeds)
def test_dot_is_exact(dims, kinds, seed):
    rng = np.random.default_rng(seed)
    check_kernels(read_dot(dims), [dot_case(rng, dims, pair) for pair in kinds])


@quick(max_examples=12)
@given(dots(least_contracted=1), st.tuples(*[st.sampled_from(STORAGE)] * 2), st.integers(0, 2), seeds)
def test_dot_in_groups(dims, kinds, side, seed):
    """Groups along the last contracted axis of one operand, or of both: each group is exact, their sum is float32."""
    rng = np.random.default_rng(seed)
    *shapes, contract, batch = dims
    shapes = [list(shape) for shape in shapes]
    groups, size = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    which = contract[side % 2].index(max(contract[side % 2]))
    grids = []
    for n in (0, 1):
        axis = contract[n][which]
        shapes[n][axis] = groups * size
        grid = list(some_grid(rng, shapes[n], contract[n]))
        grid[axis] = groups if side in (n, 2) else 1
        grids.append(tuple(grid))
    (a, ca, sa), (b, cb, sb) = (some_codes(rng, tuple(s), g, k) for s, g, k in zip(shapes, grids, kinds, strict=True))
    op = read_dot((*shapes, contract, batch))
    out = jax.jit(lambda a, b: lowering.run(op, (a, b), ()))(a, b)
    want = oracle.dot_general(ca * sa, cb * sb, contract, batch)
    sizes = oracle.dot_general(np.abs(ca * sa), np.abs(cb * sb), contract, batch)
    assert out.shape == want.shape and out.dtype == jnp.float32
    assert (np.abs(np.asarray(out, np.float64) - want) <= (groups + 2) * 2.0**-23 * sizes).all()


DOTS = {
    "row": ((1, 37), (37, 5), ((1,), (0,)), ((), ())),
    "row and column": ((1, 64), (64, 1), ((1,), (0,)), ((), ())),
    "outer": ((6, 1), (1, 5), ((1,), (0,)), ((), ())),
    "vectors": ((19,), (19,), ((0,), (0,)), ((), ())),
    "vector on the left": ((19,), (19, 4), ((0,), (0,)), ((), ())),
    "scalars": ((), (), ((), ()), ((), ())),
    "scalar times matrix": ((), (3, 4), ((), ()), ((), ())),
    "no rows": ((0, 4), (4, 3), ((1,), (0,)), ((), ())),
    "no columns": ((2, 4), (4, 0), ((1,), (0,)), ((), ())),
    "nothing to sum": ((2, 0), (0, 3), ((1,), (0,)), ((), ())),
    "no batch": ((0, 2, 4), (0, 4, 3), ((2,), (1,)), ((0,), (0,))),
    "transposed weight": ((3, 40), (9, 40), ((1,), (1,)), ((), ())),
    "weight on the left": ((40, 9), (3, 40), ((0,), (1,)), ((), ())),
    "heads": ((2, 5, 3, 4), (3, 4, 6), ((2, 3), (0, 1)), ((), ())),
    "heads crossed": ((2, 5, 3, 4), (4, 3, 6), ((3, 2), (0, 1)), ((), ())),
    "attention": ((2, 5, 3, 4), (2, 6, 3, 4), ((3,), (3,)), ((0, 2), (0, 2))),
    "batch axes crossed": ((2, 3, 4, 5), (3, 2, 4, 6), ((2,), (2,)), ((0, 1), (1, 0))),
    "large": ((130, 257), (257, 65), ((1,), (0,)), ((), ())),
}


@pytest.mark.parametrize("name", DOTS)
def test_dot_forms(name):
    rng = np.random.default_rng(0)
    kinds = [(STORAGE[left], STORAGE[right]) for left, right in PAIRS]
    check_kernels(read_dot(DOTS[name]), [dot_case(rng, DOTS[name], pair) for pair in kinds])


# The longest sums that `make_plan` accepts, K * max|a - za| * max|b - zb| < 2 ** 31, at the ends of the codes.
EXTREMES = {
    131071: [(-128, None, -128, None, True), (-128, None, 127, None, True), (127, None, 127, None, True)],
    65793: [(-128, 127, -128, None, True), (127, -128, -128, None, True), (-128, None, -128, 127, True)],
    33025: [
        (-128, 127, -128, 127, True),
        (-128, 127, 127, -128, True),
        (255, 0, 0, 255, False),
        (255, None, 255, None, False),
    ],
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k", EXTREMES)
def test_longest_sums_do_not_overflow(k, rows):
    cases = []
    for left, left_zero, right, right_zero, signed in EXTREMES[k]:
        a, b = constant_codes((rows, k), left, left_zero, signed), constant_codes((k, 2), right, right_zero, signed)
        want = k * (left - (left_zero or 0)) * (right - (right_zero or 0))
        assert abs(want) < 2**31
        cases.append(((a, b), np.full((rows, 2), want, np.int64), np.ones((rows, 2))))
    check_kernels(read_op(lambda a, b: a @ b, (rows, k), (k, 2)), cases)


def test_longest_sums_in_a_convolution():
    op = read_op(lambda a, b: lax.conv_general_dilated(a, b, (1,), [(0, 0)]), (1, 131071, 1), (2, 131071, 1))
    operands = constant_codes((1, 131071, 1), -128), constant_codes((2, 131071, 1), -128)
    check_kernels(op, [(operands, np.full((1, 2, 1), 131071 * 2**14, np.int64), np.ones((1, 2, 1)))])


def test_small_sums_of_many_large_terms():
    """What cancels in integers cancels: float32 sums of the same products would lose the last bits."""
    k, rng = 100_001, np.random.default_rng(0)
    lhs = rng.choice([-127, 127], (2, k))
    rhs = np.stack([rng.choice([-128, 127], k), -lhs[0]], 1)
    rhs[: k // 2, 1] *= -1
    (a, b) = constant_codes(lhs.shape, 0), constant_codes(rhs.shape, 0)
    a = jaxq.QArray(jnp.asarray(lhs, jnp.int8), a.scale, None, a.format, a.dtype)
    b = jaxq.QArray(jnp.asarray(rhs, jnp.int8), b.scale, None, b.format, b.dtype)
    sums = oracle.dot_general(lhs, rhs, ((1,), (0,)), ((), ()))
    assert sums[0, 1] == -(127**2)
    check_kernels(read_op(lambda a, b: a @ b, lhs.shape, rhs.shape), [((a, b), sums, np.ones(sums.shape))])


def dot_of_scales(left, right):
    """Return the decoded sum of 5000 products of the codes 100 and 90, and what it should be in float64."""
    a, b = constant_codes((2, 5000), 100, scale=left), constant_codes((5000, 3), 90, scale=right)
    op = read_op(lambda a, b: a @ b, (2, 5000), (5000, 3))
    out = jax.jit(lambda a, b: lowering.run(op, (a, b), ()))(a, b)
    return np.asarray(out, np.float64), 5000 * 100 * 90 * left * right


@pytest.mark.parametrize("left, right", [(2.0**-60, 2.0**-60), (2.0**100, 2.0**-100), (3e-38, 3.0), (1e30, 0.5)])
def test_scales_far_from_one(left, right):
    out, want = dot_of_scales(np.float64(np.float32(left)), np.float64(np.float32(right)))
    np.testing.assert_allclose(out, np.full(out.shape, want), rtol=ROUNDINGS)


def test_sums_that_float32_does_not_hold_are_infinite_not_nan():
    out, want = dot_of_scales(2.0**70, 2.0**70)
    assert want > 3.5e38 and (out == np.inf).all()


# --- conv_general_dilated --------------------------------------------------------------------------------------------


@st.composite
def convs(draw):
    """Draw (lhs shape, rhs shape, options of the oracle) with axes in any order."""
    rank = draw(st.integers(1, 3))
    many = functools.partial(st.lists, min_size=rank, max_size=rank)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
    kernel, sizes = draw(many(st.integers(1, 3))), draw(many(st.integers(1, 6 if rank < 3 else 4)))
    strides, lhs_dilation, rhs_dilation = (draw(many(st.sampled_from([1, 1, 2, 3]))) for _ in range(3))
    padding = draw(many(st.tuples(st.integers(-1, 3), st.integers(-1, 3))))
    for n, (low, high) in enumerate(padding):  # something must be left to convolve
        if (sizes[n] - 1) * lhs_dilation[n] + 1 + low + high < 1:
            padding[n] = (abs(low), abs(high))
    specs = tuple(tuple(draw(st.permutations(range(rank + 2)))) for _ in range(3))
    lhs = place([draw(st.integers(1, 3)), inputs * groups, *sizes], specs[0])
    rhs = place([outputs * groups, inputs, *kernel], specs[1])
    return lhs, rhs, (tuple(strides), tuple(padding), tuple(lhs_dilation), tuple(rhs_dilation), specs, groups)


def convolve(lhs, rhs, options):
    """Call `lax.conv_general_dilated` with the options of the oracle."""
    *numbers, specs, groups = options
    return lax.conv_general_dilated(lhs, rhs, *numbers, lax.ConvDimensionNumbers(*specs), feature_group_count=groups)


def conv_case(rng, dims, kinds, grains=(True, True)):
    """Return random operands of a convolution, their sums and scales. grains: per image, per output channel."""
    lhs, rhs, options = dims
    specs = options[4]
    lhs_grid = tuple(n if a == specs[0][0] and grains[0] else 1 for a, n in enumerate(lhs))
    rhs_grid = tuple(n if a == specs[1][0] and grains[1] else 1 for a, n in enumerate(rhs))
    a, ca, sa = some_codes(rng, lhs, lhs_grid, kinds[0])
    b, cb, sb = some_codes(rng, rhs, rhs_grid, kinds[1])
    sums = oracle.conv_general_dilated(ca, cb, *options)
    if not sums.size or not ca.size:
        return (a, b), sums, np.zeros(sums.shape)
    scales = np.zeros([sums.shape[axis] for axis in specs[2]])
    per_image = sa.transpose(specs[0]).reshape(lhs[specs[0][0]], -1)[:, 0]
    per_channel = sb.transpose(specs[1]).reshape(rhs[specs[1][0]], -1)[:, 0]
    scales[...] = np.outer(per_image, per_channel).reshape(*scales.shape[:2], *[1] * (scales.ndim - 2))
    return (a, b), sums, scales.transpose(np.argsort(specs[2]))


def read_conv(dims):
    return read_op(lambda a, b: convolve(a, b, dims[2]), *dims[:2])


@quick(max_examples=15)
@given(
    convs(),
    st.lists(st.tuples(*[st.sampled_from(STORAGE)] * 2), min_size=2, max_size=2),
    st.tuples(st.booleans(), st.booleans()),
    seeds,
)
def test_conv_is_exact(dims, kinds, grains, seed):
    rng = np.random.default_rng(seed)
    check_kernels(read_conv(dims), [conv_case(rng, dims, pair, grains) for pair in kinds])


NHWC, NCHW, CHWN = (0, 3, 1, 2), (0, 1, 2, 3), (3, 0, 1, 2)
HWIO, OIHW, IHWO = (3, 2, 0, 1), (0, 1, 2, 3), (3, 0, 1, 2)
LAST = (NHWC, HWIO, NHWC)
FIRST = (NCHW, OIHW, NCHW)
LINE = ((0, 2, 1), (2, 1, 0), (0, 2, 1))
BOX = ((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3))
SAME, VALID = ((1, 1), (1, 1)), ((0, 0), (0, 0))
ONE, TWO = (1, 1), (2, 2)
CONVS = {
    "NHWC": ((2, 6, 5, 3), (3, 3, 3, 4), (ONE, SAME, ONE, ONE, LAST, 1)),
    "more channels": ((2, 6, 5, 7), (3, 3, 7, 5), (ONE, SAME, ONE, ONE, LAST, 1)),
    "many channels": ((2, 4, 5, 33), (40, 33, 3, 2), (TWO, SAME, ONE, TWO, (NHWC, OIHW, NCHW), 1)),
    "NCHW": ((2, 3, 6, 5), (4, 3, 3, 3), (ONE, SAME, ONE, ONE, FIRST, 1)),
    "CHWN": ((3, 6, 5, 2), (3, 3, 3, 4), (ONE, SAME, ONE, ONE, (CHWN, IHWO, CHWN), 1)),
    "NHWC to NCHW": ((2, 6, 5, 3), (3, 3, 3, 4), (TWO, SAME, ONE, ONE, (NHWC, HWIO, NCHW), 1)),
    "strided, uneven padding": ((2, 7, 5, 3), (3, 3, 3, 4), (TWO, ((0, 1), (2, 0)), ONE, ONE, LAST, 1)),
    "negative padding": ((2, 7, 6, 3), (3, 3, 3, 4), (ONE, ((-1, 2), (0, -2)), ONE, ONE, LAST, 1)),
    "atrous": ((1, 9, 9, 2), (3, 3, 2, 2), (ONE, VALID, ONE, (2, 3), LAST, 1)),
    "transposed": ((2, 4, 4, 3), (3, 3, 3, 4), (ONE, ((1, 2), (2, 1)), TWO, ONE, LAST, 1)),
    "transposed, strided, atrous": ((2, 3, 4, 4), (4, 3, 3, 3), (TWO, SAME, (3, 2), TWO, FIRST, 1)),
    "depthwise": ((2, 6, 6, 8), (3, 3, 1, 8), (ONE, SAME, ONE, ONE, LAST, 8)),
    "depthwise, strided": ((2, 7, 7, 8), (3, 3, 1, 8), (TWO, ((0, 1), (1, 0)), ONE, ONE, LAST, 8)),
    "depthwise, atrous": ((2, 9, 9, 4), (3, 3, 1, 4), (ONE, VALID, ONE, TWO, LAST, 4)),
    "depthwise, transposed": ((2, 4, 4, 4), (3, 3, 1, 4), (ONE, ((2, 2), (2, 2)), TWO, ONE, LAST, 4)),
    "depthwise, twice the channels": ((2, 5, 5, 4), (3, 3, 1, 8), (ONE, SAME, ONE, ONE, LAST, 4)),
    "depthwise, NCHW": ((2, 8, 6, 6), (8, 1, 3, 3), (ONE, SAME, ONE, ONE, FIRST, 8)),
    "depthwise, negative padding": ((2, 7, 7, 4), (3, 3, 1, 4), (ONE, ((-1, 1), (0, -2)), ONE, ONE, LAST, 4)),
    "grouped": ((2, 5, 5, 8), (3, 3, 4, 6), (ONE, SAME, ONE, ONE, LAST, 2)),
    "grouped, NCHW, strided": ((2, 9, 6, 6), (6, 3, 3, 3), (TWO, SAME, ONE, ONE, FIRST, 3)),
    "pointwise": ((2, 5, 5, 17), (1, 1, 17, 9), (ONE, VALID, ONE, ONE, LAST, 1)),
    "pointwise, strided": ((2, 5, 5, 7), (1, 1, 7, 9), (TWO, VALID, ONE, ONE, LAST, 1)),
    "pointwise, padded": ((2, 5, 5, 7), (1, 1, 7, 9), (ONE, SAME, ONE, ONE, LAST, 1)),
    "one channel, one image": ((1, 5, 5, 1), (3, 3, 1, 1), (ONE, SAME, ONE, ONE, LAST, 1)),
    "window larger than the image": ((1, 2, 2, 1), (3, 3, 1, 2), (ONE, VALID, ONE, ONE, LAST, 1)),
    "window far larger than the image": ((1, 4, 1, 3), (2, 2, 3, 2), (ONE, VALID, ONE, (1, 3), LAST, 1)),
    "all padding": ((1, 1, 1, 1), (2, 2, 1, 1), (ONE, ((3, 3), (3, 3)), ONE, ONE, LAST, 1)),
    "no images": ((0, 5, 5, 3), (3, 3, 3, 4), (ONE, SAME, ONE, ONE, LAST, 1)),
    "no channels": ((2, 5, 5, 0), (3, 3, 0, 4), (ONE, SAME, ONE, ONE, LAST, 1)),
    "no outputs": ((2, 5, 5, 3), (3, 3, 3, 0), (ONE, SAME, ONE, ONE, LAST, 1)),
    "1-D": ((2, 9, 3), (3, 3, 4), ((2,), ((1, 0),), (1,), (1,), LINE, 1)),
    "1-D, causal": ((2, 9, 3), (3, 3, 4), ((1,), ((4, 0),), (1,), (2,), LINE, 1)),
    "1-D, depthwise": ((2, 9, 4), (4, 1, 4), ((1,), ((3, 0),), (1,), (1,), LINE, 4)),
    "3-D": ((1, 4, 5, 3, 2), (2, 3, 2, 2, 3), ((1, 2, 1), ((1, 0), (0, 2), (1, 1)), (1,) * 3, (1,) * 3, BOX, 1)),
    "3-D, depthwise": ((1, 4, 5, 3, 2), (2, 3, 2, 1, 2), ((1,) * 3, ((1, 0),) * 3, (1,) * 3, (1,) * 3, BOX, 2)),
    "0-D": ((3, 5), (4, 5), ((), (), (), (), ((0, 1), (0, 1), (0, 1)), 1)),
}


@pytest.mark.parametrize("name", CONVS)
def test_conv_forms(name):
    rng = np.random.default_rng(0)
    kinds = [(STORAGE[left], STORAGE[right]) for left, right in [(0, 0), (1, 4), (2, 1)]]
    check_kernels(read_conv(CONVS[name]), [conv_case(rng, CONVS[name], pair) for pair in kinds])


# --- ragged_dot ------------------------------------------------------------------------------------------------------

RUNS = {
    "even": [3, 3, 3],
    "empty runs": [0, 5, 0, 4, 0],
    "one run": [9],
    "all in the last": [0, 0, 9],
    "rows left over": [2, 0, 3],
    "only rows left over": [0, 0, 0],
    "one row each": [1] * 9,
}


def read_ragged(lhs, rhs):
    """Return the record of a ragged dot on operands of these shapes."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lhs, rhs)]
    closed = jax.make_jaxpr(lax.ragged_dot)(*shapes, jax.ShapeDtypeStruct((rhs[0],), jnp.int32))
    while not closed.jaxpr.eqns[-1].primitive.name.startswith("ragged_dot"):
        closed = closed.jaxpr.eqns[-1].params["jaxpr"]
    return ops.read(closed.jaxpr.eqns[-1])


@pytest.mark.parametrize("name", RUNS)
def test_ragged_dot_is_exact(name):
    rng, sizes = np.random.default_rng(0), np.array(RUNS[name], np.int32)
    lhs, rhs = (9, 7), (len(sizes), 7, 5)
    grids = [
        ((9, 1), (len(sizes), 1, 5)),
        ((1, 1), (len(sizes), 1, 5)),
        ((9, 1), (1, 1, 1)),
        ((1, 1), (len(sizes), 1, 1)),
    ]
    cases = []
    for grid, kinds in zip(itertools.cycle(grids), PAIRS, strict=False):
        a, ca, sa = some_codes(rng, lhs, grid[0], STORAGE[kinds[0]])
        b, cb, sb = some_codes(rng, rhs, grid[1], STORAGE[kinds[1]])
        cases.append(((a, b), oracle.ragged_dot(ca, cb, sizes), oracle.ragged_dot(sa[:, :1], sb[:, :1], sizes)))
    check_kernels(read_ragged(lhs, rhs), cases, (jnp.asarray(sizes),))


# --- embedding -------------------------------------------------------------------------------------------------------

INDICES = np.array([[0, 5, -1, 3], [6, 2, 100, -100], [5, 5, -6, 7]])
MODES = [("clip", None), ("fill", None), ("fill", 7.0), ("fill", 0.0), ("fill", -np.inf), ("promise_in_bounds", None)]


def gather(table, indices, axis, mode, fill):
    """Return the slices of a table at `indices` along `axis`, by a bare `lax.gather`."""
    offsets = [a for a in range(table.ndim + indices.ndim - 2) if not axis <= a < axis + indices.ndim - 1]
    numbers = lax.GatherDimensionNumbers(tuple(offsets), (axis,), (axis,))
    sizes = tuple(1 if a == axis else n for a, n in enumerate(table.shape))
    return lax.gather(table, indices, numbers, sizes, mode=mode, fill_value=fill)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_lookup_decodes_rows(axis):
    """Slices of the table, decoded; out of bounds the nearest one or the fill value, NaN where none is given."""
    rng = np.random.default_rng(0)
    shape = (3, 2)[:axis] + (6,) + (3, 2)[axis:]
    grid = tuple(n if a == axis else 1 for a, n in enumerate(shape))
    tables = [some_codes(rng, shape, g, kind) for kind in STORAGE for g in (grid, (1, 1, 1))]
    within = INDICES % 6
    outs = []
    for mode, fill in MODES:
        op = read_op(
            functools.partial(lambda t, i, mode, fill: gather(t, i, axis, mode, fill), mode=mode, fill=fill),
            shape,
            jax.ShapeDtypeStruct((*INDICES.shape, 1), jnp.int32),
        )
        outs.append(op)

    def run(tables, indices, inside):
        return [
            [lowering.run(op, (table,), (inside if "promise" in mode else indices,)) for table in tables]
            for op, (mode, _) in zip(outs, MODES, strict=True)
        ]

    results = jax.jit(run)([q for q, _, _ in tables], jnp.asarray(INDICES)[..., None], jnp.asarray(within)[..., None])
    for (mode, fill), got in zip(MODES, results, strict=True):
        for (_, centred, scale), out in zip(tables, got, strict=True):
            indices, rule = (within, "within") if "promise" in mode else (INDICES, mode)
            want = oracle.take(centred * scale, indices, rule, np.nan if fill is None else fill, axis)
            np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2.0**-23)


# --- whole functions -------------------------------------------------------------------------------------------------

STATIC = {"per_tensor": True, "calibrator": jaxq.minmax()}
SCHEMES = {
    "w8a8": (jaxq.int8(), jaxq.int8()),
    "per tensor": (jaxq.int8(per_tensor=True), jaxq.int8(per_tensor=True)),
    "asymmetric": (jaxq.int8(symmetric=False), jaxq.int8(symmetric=False)),
    "unsigned": (jaxq.uint8(), jaxq.uint8(per_tensor=True)),
    "w4a4": (jaxq.int4(), jaxq.int4(symmetric=False)),
    "w2a8": (jaxq.int2(), jaxq.int8(symmetric=False)),
    "static": (jaxq.int8(), jaxq.int8(**STATIC)),
    "static, asymmetric": (jaxq.int8(symmetric=False), jaxq.uint8(**STATIC)),
}
FEW = ["w8a8", "asymmetric", "static, asymmetric"]
MORE = ["w8a8", "unsigned", "w4a4", "static, asymmetric"]


def scheme_of(name):
    return jaxq.Scheme(*SCHEMES[name])


def quantized(f, policy, params, *args):
    """Return what `f` gives when quantized, on converted weights; every site must be quantized."""
    plan = jaxq.make_plan(f, policy)(params, *args).check(quantized=True)
    if plan.unobserved():
        plan = jaxq.calibrate(f, plan, progress=False)(params, [args])
    return jax.jit(jaxq.quantize(f, plan))(jaxq.convert(f, plan)(params, *args), *args)


def represented(rng, shape, contracted, quantizer, dtype=jnp.float32):
    """Return numbers that a quantizer represents on an operand, as float64 and as an array of `dtype`."""
    form = quantizer.format
    grid = tuple(1 if quantizer.per_tensor or a in contracted else n for a, n in enumerate(shape))
    x = real_numbers(rng, shape, grid, (form.bits, form.signed, quantizer.symmetric))
    np.testing.assert_array_equal(np.asarray(jnp.asarray(x, dtype), np.float64), x)
    return x, jnp.asarray(x, dtype)


# The scales have been rounded too.
TOLERANCE = {jnp.float32: 4 * ROUNDINGS, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-10}


def assert_near(got, want, dtype=jnp.float32):
    """Assert that results are right to the last bits, zeros exactly."""
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=TOLERANCE[dtype])


# spec, lhs, rhs, contracted axes of each
PRODUCTS = {
    "dense": ("mk,kn->mn", (4, 20), (20, 6), (1,), (0,)),
    "row": ("mk,kn->mn", (1, 33), (33, 6), (1,), (0,)),
    "tied": ("bmk,nk->bmn", (2, 4, 20), (6, 20), (2,), (1,)),
    "heads": ("bld,dhk->blhk", (2, 3, 8), (8, 2, 5), (2,), (0,)),
    "heads back": ("blhk,hkd->bld", (2, 3, 2, 5), (2, 5, 8), (2, 3), (0, 1)),
    "experts": ("gmk,gkn->gmn", (3, 4, 6), (3, 6, 5), (2,), (1,)),
    "vector": ("k,kn->n", (20,), (20, 6), (0,), (0,)),
    "column": ("mk,kn->mn", (5, 1), (1, 3), (1,), (0,)),
}


@pytest.mark.parametrize("scheme", MORE)
def test_products_of_represented_numbers(scheme):
    """Every product with the weight on the right, and again with it on the left."""
    weight, act = SCHEMES[scheme]
    rng, xs, ws = np.random.default_rng(0), {}, {}
    for name, (_, lhs, rhs, ca, cb) in PRODUCTS.items():
        xs[name], ws[name] = represented(rng, lhs, ca, act), represented(rng, rhs, cb, weight)

    def f(params, xs):
        right = {name: jnp.einsum(spec, xs[name], params[name]) for name, (spec, *_) in PRODUCTS.items()}
        left = {name: jnp.einsum(turned(spec), params[name], xs[name]) for name, (spec, *_) in PRODUCTS.items()}
        return right, left

    def turned(spec):
        terms, out = spec.split("->")
        return ",".join(reversed(terms.split(","))) + "->" + out

    results = quantized(f, scheme_of(scheme), *({n: x for n, (_, x) in tree.items()} for tree in (ws, xs)))
    for got in results:
        for name, (spec, *_) in PRODUCTS.items():
            assert_near(got[name], np.einsum(spec, xs[name][0], ws[name][0]))


def test_output_types_are_the_originals():
    """The result is rounded once, from the exact sum to the type that the program asked for."""
    rng, types = np.random.default_rng(0), (jnp.float32, jnp.bfloat16, jnp.float16)
    cases = list(itertools.product(types, (None, jnp.float32)))
    pairs = [[represented(rng, s, c, jaxq.int8(), t) for s, c in (((3, 50), (1,)), ((50, 4), (0,)))] for t, _ in cases]

    def f(params, xs):
        numbers = (((1,), (0,)), ((), ()))
        return [
            lax.dot_general(x, w, numbers, preferred_element_type=asked)
            for (_, asked), x, w in zip(cases, xs, params, strict=True)
        ]

    xs, ws = ([pair[n][1] / 256 for pair in pairs] for n in (0, 1))
    for (dtype, asked), got, ((x, _), (w, _)) in zip(cases, quantized(f, jaxq.w8a8(), ws, xs), pairs, strict=True):
        assert_near(got, (x / 256) @ (w / 256), asked or dtype)


ATTENTION = ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bmk,bkn->bmn", "k,k->"]


@pytest.mark.parametrize("scheme", ["w8a8", "asymmetric", "unsigned", "static, asymmetric"])
def test_products_of_activations(scheme):
    act, rng, pairs = SCHEMES[scheme][1], np.random.default_rng(0), []
    lengths = dict(b=2, q=3, k=5, h=2, d=7, m=4, n=3)
    for spec in ATTENTION:
        terms, out = spec.split("->")
        pairs.append(
            [
                represented(rng, tuple(lengths[c] for c in term), [a for a, c in enumerate(term) if c not in out], act)
                for term in terms.split(",")
            ]
        )

    def f(params, pairs):
        return [jnp.einsum(spec, *pair) for spec, pair in zip(ATTENTION, pairs, strict=True)]

    got = quantized(f, jaxq.Scheme(act=act), {}, [[x for _, x in pair] for pair in pairs])
    for spec, pair, out in zip(ATTENTION, pairs, got, strict=True):
        assert_near(out, np.einsum(spec, *(x for x, _ in pair)))


@pytest.mark.parametrize("weight", [jaxq.int4, jaxq.int8, jaxq.int2, jaxq.uint8])
def test_weights_in_groups(weight):
    """Groups along the last contracted axis: heads [2, 20], in groups within each head."""
    rng, act, groups = np.random.default_rng(0), jaxq.int8(symmetric=False), {"1": 1, "2": 2, "5": 5, "20": 20}
    form = weight().format
    kind = (form.bits, form.signed, weight().symmetric)
    ws = {name: real_numbers(rng, (2, 20, 6), (1, 20 // size, 6), kind) for name, size in groups.items()}
    x, jx = represented(rng, (3, 4, 2, 20), (2, 3), act)

    def f(params, x):
        return {name: jnp.einsum("blhk,hkd->bld", x, params[name]["w"]) for name in groups}

    params = {name: {"w": jnp.asarray(w, jnp.float32)} for name, w in ws.items()}
    for acts in (act, None):
        policy = {name: jaxq.Scheme(weight=weight(group=size), act=acts) for name, size in groups.items()}
        got = quantized(f, policy, params, jx)
        for name, w in ws.items():
            want, sizes = (np.einsum("blhk,hkd->bld", *pair) for pair in ((x, w), (np.abs(x), np.abs(w))))
            assert (np.abs(np.asarray(got[name], np.float64) - want) <= 50 * 2.0**-23 * sizes).all()


def test_a_first_layer_of_unsigned_codes():
    """Three channels, and so many images and one: what a GPU's library pads, and where its sums were once wrong."""
    weight, act = SCHEMES["static, asymmetric"]
    rng, options = np.random.default_rng(0), (ONE, SAME, ONE, ONE, LAST, 1)
    w = represented(rng, (3, 3, 3, 16), (0, 1, 2), weight)
    for images in (1, 8):
        x = represented(rng, (images, 32, 32, 3), (0, 1, 2, 3), act)
        got = quantized(lambda w, x: convolve(x, w, options), scheme_of("static, asymmetric"), w[1], x[1])
        assert_near(got, oracle.conv_general_dilated(x[0], w[0], *options))


SOME_CONVS = [
    "CHWN",
    "NHWC to NCHW",
    "negative padding",
    "transposed, strided, atrous",
    "depthwise, twice the channels",
]
SOME_CONVS += ["grouped, NCHW, strided", "one channel, one image", "1-D, depthwise", "3-D", "0-D"]


@pytest.mark.parametrize("scheme", ["w8a8", "static, asymmetric"])
def test_convs_of_represented_numbers(scheme):
    weight, act = SCHEMES[scheme]
    rng, xs, ws = np.random.default_rng(0), {}, {}
    for name in SOME_CONVS:
        lhs, rhs, options = CONVS[name]
        xs[name] = represented(rng, lhs, options[4][0][1:], act)
        ws[name] = represented(rng, rhs, options[4][1][1:], weight)

    def f(params, xs):
        return {name: convolve(xs[name], params[name], CONVS[name][2]) for name in SOME_CONVS}

    got = quantized(f, scheme_of(scheme), *({n: x for n, (_, x) in tree.items()} for tree in (ws, xs)))
    for name in SOME_CONVS:
        assert_near(got[name], oracle.conv_general_dilated(xs[name][0], ws[name][0], *CONVS[name][2]))


def test_groups_of_nothing():
    """No terms, so no groups: sums of nothing."""
    scheme = jaxq.Scheme(weight=jaxq.int4(group=2), act=jaxq.int8())
    x, w = jnp.zeros((2, 0), jnp.float32), jnp.zeros((0, 3), jnp.float32)
    y = jaxq.quantize(lambda params, x: x @ params["w"], scheme)({"w": w}, x)
    np.testing.assert_array_equal(y, np.zeros((2, 3)))


@pytest.mark.parametrize("scheme", FEW)
def test_ragged_dots_of_represented_numbers(scheme):
    weight, act = SCHEMES[scheme]
    rng, xs, ws = np.random.default_rng(0), {}, {}
    for name, sizes in RUNS.items():
        xs[name], ws[name] = represented(rng, (9, 7), (1,), act), represented(rng, (len(sizes), 7, 5), (1,), weight)

    def f(params, xs, sizes):
        return {name: lax.ragged_dot(xs[name], params[name], sizes[name]) for name in RUNS}

    sizes = {name: jnp.asarray(sizes, jnp.int32) for name, sizes in RUNS.items()}
    got = quantized(f, scheme_of(scheme), *({n: x for n, (_, x) in tree.items()} for tree in (ws, xs)), sizes)
    for name in RUNS:
        assert_near(got[name], oracle.ragged_dot(xs[name][0], ws[name][0], RUNS[name]))


def at(**options):
    return lambda table, i: table.at[i].get(**options)


LOOKUPS = {
    "index": (lambda t, i: t[i], "within", INDICES % 6),
    "from the end": (lambda t, i: t[i], "wrap", INDICES % 6 - 6),
    "clip": (at(mode="clip", wrap_negative_indices=False), "clip", INDICES),
    "fill": (at(mode="fill", wrap_negative_indices=False), "fill", INDICES),
    "drop": (at(mode="drop", wrap_negative_indices=False), "fill", INDICES),
    "promise": (at(mode="promise_in_bounds"), "within", INDICES % 6),
    "sorted": (at(indices_are_sorted=True, unique_indices=True), "within", np.arange(1, 5)),
    "take": (lambda t, i: jnp.take(t, i, axis=0), "fill", np.array([0, 6, 3, 1000])),
    "take, wrapped": (lambda t, i: jnp.take(t, i, axis=0, mode="wrap"), "wrap", INDICES),
    "one": (lambda t, i: t[i], "within", np.array(4)),
    "none": (lambda t, i: t[i], "within", np.zeros((0, 3), np.int32)),
    "vmapped": (lambda t, i: jax.vmap(lambda j: t[j])(i), "within", INDICES % 6),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("weight", [jaxq.int8, jaxq.uint8, jaxq.int2])
def test_lookups_of_represented_numbers(weight, dtype):
    rng = np.random.default_rng(0)
    tables = {name: represented(rng, (6, 5), (1,), weight(), dtype) for name in LOOKUPS}

    def f(params, indices):
        return {name: look(params[name], indices[name]) for name, (look, _, _) in LOOKUPS.items()}

    indices = {name: jnp.asarray(i, jnp.int32) for name, (_, _, i) in LOOKUPS.items()}
    got = quantized(f, jaxq.Scheme(weight=weight()), {name: table for name, (_, table) in tables.items()}, indices)
    for name, (_, mode, i) in LOOKUPS.items():
        assert_near(got[name], oracle.take(tables[name][0], i, mode), dtype)


def test_lookups_by_two_indices():
    rng, weight = np.random.default_rng(0), jaxq.int8()
    pairs, columns = represented(rng, (4, 3, 5), (2,), weight), represented(rng, (4, 3, 5), (0, 2), weight)
    i, j = rng.integers(0, 4, (2, 6)), rng.integers(0, 3, (2, 6))

    def f(p, i, j):
        return p["pairs"][i, j], p["columns"][:, j]

    params = {"pairs": pairs[1], "columns": columns[1]}
    got = quantized(f, jaxq.Scheme(weight=weight), params, jnp.asarray(i), jnp.asarray(j))
    assert_near(got[0], pairs[0][i, j])
    assert_near(got[1], columns[0][:, j])


@pytest.mark.parametrize("weight", [jaxq.int8(), jaxq.int8(per_tensor=True), jaxq.uint8(per_tensor=True)], ids=str)
def test_lookups_along_an_axis(weight):
    """`take_along_axis`: the axes that are not indexed are batch axes of the gather."""
    rng = np.random.default_rng(0)
    table, jt = represented(rng, (4, 6), (), weight)
    i = rng.integers(0, 6, (4, 9))
    scheme = jaxq.Scheme(weight=weight)
    got = quantized(lambda p, i: jnp.take_along_axis(p["t"], i, axis=1), scheme, {"t": jt}, jnp.asarray(i))
    assert_near(got, np.take_along_axis(table, i, 1))


SLICES = {
    "row": (lambda t, i: t[i], lambda t, i: t[min(i, 5)]),
    "rows": (lambda t, i: lax.dynamic_slice(t, (i, 0), (2, 5)), lambda t, i: t[min(i, 4) :][:2]),
    "row in a loop": (
        lambda t, i: lax.fori_loop(0, 3, lambda _, y: y + t[i], jnp.zeros(5, jnp.float32)),
        lambda t, i: 3 * t[min(i, 5)],
    ),
}


@pytest.mark.parametrize("weight", [jaxq.int8, jaxq.uint8, jaxq.int4])
def test_slices_at_data_are_lookups(weight):
    """`dynamic_slice` of a table at an index that is data, moved inside where it is out of bounds."""
    table, jt = represented(np.random.default_rng(0), (6, 5), (1,), weight())

    def f(params, i):
        return {name: look(params[name], i) for name, (look, _) in SLICES.items()}

    params = {name: jt for name in SLICES}
    plan = jaxq.make_plan(f, jaxq.Scheme(weight=weight()))(params, jnp.int32(0))
    assert {(d.site.name, d.site.op) for d in plan.decisions} == {(name, "embedding") for name in SLICES}
    converted = jaxq.convert(f, plan)(params, jnp.int32(0))
    assert all(isinstance(leaf, jaxq.QArray) for leaf in converted.values())
    serve = jax.jit(jaxq.quantize(f, plan))
    for index in (0, 4, 100):
        got = serve(converted, jnp.int32(index))
        for name, (_, judge) in SLICES.items():
            assert_near(got[name], judge(table, index))


def test_slices_of_a_batch_share_rows_too():
    """`vmap` makes a gather that indexes every axis, of which rows are still taken whole."""
    table, jt = represented(np.random.default_rng(0), (6, 5), (1,), jaxq.int8())

    def f(params, i):
        return lax.dynamic_slice(params["t"], (i, 0), (1, 5))[0]

    plan = jaxq.make_plan(f, jaxq.weight_only())({"t": jt}, jnp.int32(0))
    many, i = jax.vmap(f, (None, 0)), jnp.array([0, 4, 100])
    converted = jaxq.convert(many, plan)({"t": jt}, i)
    assert converted["t"].scale.shape == (6, 1)
    assert_near(jax.jit(jaxq.quantize(many, plan))(converted, i), table[[0, 4, 5]])


def test_slices_that_share_no_row_are_not_lookups():
    """Elements have no row whose scale they could share, and a counter picks weights, not data."""

    def f(params, x, i):
        picked = lax.fori_loop(0, 2, lambda n, y: y @ params["layers"][n], x)
        return params["vector"][i] * picked + params["pairs"][i, i]

    params = {"vector": jnp.ones(4), "pairs": jnp.ones((4, 4)), "layers": jnp.ones((2, 3, 3))}
    plan = jaxq.make_plan(f, jaxq.w8a8())(params, jnp.ones((2, 3)), jnp.int32(1))
    assert [(d.site.name, d.site.op) for d in plan.decisions] == [("layers", "dot_general")]


EMPTY = {"rows": ((0, 4), (4, 3)), "columns": ((2, 4), (4, 0)), "terms": ((2, 0), (0, 3)), "all": ((0, 0), (0, 0))}


def multiply_all(params, xs):
    return {name: xs[name] @ params[name] for name in xs}


@pytest.mark.parametrize("scheme", ["w8a8", "asymmetric", "unsigned"])
def test_empty_products_are_zeros(scheme):
    """Of no rows, no columns, or nothing to sum."""
    xs, ws = ({name: jnp.zeros(pair[n], jnp.float32) for name, pair in EMPTY.items()} for n in (0, 1))
    for name, out in quantized(multiply_all, scheme_of(scheme), ws, xs).items():
        assert out.shape == (EMPTY[name][0][0], EMPTY[name][1][1]) and not np.asarray(out).any()


def test_an_empty_batch_of_a_static_program():
    ws = {name: jnp.ones(shape, jnp.float32) for name, (_, shape) in EMPTY.items() if name in ("rows", "columns")}
    seen = {name: jnp.ones((2, 4), jnp.float32) for name in ws}
    plan = jaxq.calibrate(multiply_all, scheme_of("static, asymmetric"), progress=False)(ws, [seen])
    empty = {name: jnp.ones(EMPTY[name][0], jnp.float32) for name in ws}
    got = jax.jit(jaxq.quantize(multiply_all, plan))(ws, empty)
    assert got["rows"].shape == (0, 3) and got["columns"].shape == (2, 0)


def test_an_empty_batch_tells_a_static_range_nothing():
    ws, xs = {"terms": jnp.zeros((0, 3), jnp.float32)}, {"terms": jnp.zeros((2, 0), jnp.float32)}
    plan = jaxq.calibrate(multiply_all, scheme_of("static"), progress=False)(ws, [xs])
    with pytest.raises(ValueError, match="terms"):
        jaxq.quantize(multiply_all, plan)(ws, xs)


def test_dead_channels_are_exact_zeros():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(16, 5)), rng.normal(size=(4, 16))
    w[:, 2], x[1] = 0, 0

    def f(params, x):
        return {name: x @ params[name]["w"] for name in SCHEMES}

    params = {name: {"w": jnp.asarray(w, jnp.float32)} for name in SCHEMES}
    got = quantized(f, {name: scheme_of(name) for name in SCHEMES}, params, jnp.asarray(x, jnp.float32))
    for out in got.values():
        assert not np.asarray(out)[:, 2].any() and not np.asarray(out)[1].any() and np.isfinite(out).all()
        assert np.asarray(out)[0, 0] != 0


# --- the oracle itself -----------------------------------------------------------------------------------------------


def whole_numbers(rng, shape):
    return rng.integers(-9, 9, shape).astype(np.float32)


@quick(max_examples=10)
@given(dots(), convs(), seeds)
def test_oracle_agrees_with_lax(dot, conv, seed):
    """On whole numbers small enough for float32 the float program and the oracle are equal."""
    rng = np.random.default_rng(seed)
    a, b = whole_numbers(rng, dot[0]), whole_numbers(rng, dot[1])
    np.testing.assert_array_equal(lax.dot_general(a, b, dot[2:]), oracle.dot_general(a, b, *dot[2:]))
    a, b = whole_numbers(rng, conv[0]), whole_numbers(rng, conv[1])
    np.testing.assert_array_equal(convolve(a, b, conv[2]), oracle.conv_general_dilated(a, b, *conv[2]))


def test_oracle_agrees_with_lax_on_every_form():
    rng = np.random.default_rng(0)
    # XLA:CPU of JAX 0.10 reads beyond the image in a float depthwise convolution with negative padding.
    forms = [form for name, form in CONVS.items() if name != "depthwise, negative padding"]
    convs = [(whole_numbers(rng, lhs), whole_numbers(rng, rhs)) for lhs, rhs, _ in forms]
    options = [options for _, _, options in forms]
    got = jax.jit(lambda pairs: [convolve(*pair, o) for pair, o in zip(pairs, options, strict=True)])(convs)
    for out, pair, o in zip(got, convs, options, strict=True):
        np.testing.assert_array_equal(out, oracle.conv_general_dilated(*pair, *o))
    runs = [(whole_numbers(rng, (9, 7)), whole_numbers(rng, (len(n), 7, 5)), np.array(n)) for n in RUNS.values()]
    for out, run in zip(jax.jit(lambda cases: [lax.ragged_dot(*case) for case in cases])(runs), runs, strict=True):
        np.testing.assert_array_equal(out, oracle.ragged_dot(*run))
    table, looks = whole_numbers(rng, (6, 5)), list(LOOKUPS.values())
    got = jax.jit(lambda t: [look(t, jnp.asarray(i)) for look, _, i in looks])(table)
    for out, (_, mode, indices) in zip(got, looks, strict=True):
        np.testing.assert_array_equal(out, oracle.take(table, indices, mode))


def test_oracle_counts():
    """The parts that `lax` has no twin of, on numbers that can be checked by eye."""
    assert math.isclose(oracle.hessian(lambda v: v[0] ** 2 * v[1], np.array([2.0, 3.0]))[0, 1], 4.0, rel_tol=1e-6)
    assert oracle.encode(np.array([0.5, 1.5, 2.5, -9.0, 9.0]), 1.0, 1, -3, 4).tolist() == [1, 3, 3, -3, 4]
    assert oracle.pullback(lambda v: 3 * v, np.zeros(2), np.array([1.0, 2.0])).tolist() == [3.0, 6.0]
    assert oracle.spread(np.array([1, 2]), (4,)).tolist() == [1, 1, 2, 2]
    assert oracle.collapse(np.array([3.0, -1, 5, 2]), (2,), np.minimum).tolist() == [-1, 0]
