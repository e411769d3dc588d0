"""Products with codes as they are stored, two to a byte, are exact, and taken where they pay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
import oracle
from inspection import products
from jaxq import lowering
from jaxq.lowering import nibbles
from jaxq.numbers import packing
from jaxq.numbers.qarray import Packing
from test_kernels import constant_codes, read_dot, read_op, some_codes

pytestmark = pytest.mark.shared

INT8, INT4, INT4_WITH_ZERO = (8, True, False), (4, True, False), (4, True, True)
FORMS = {
    "one row": ((1, 70), (70, 10), ((1,), (0,)), ((), ())),
    "few rows, odd sizes": ((5, 69), (69, 11), ((1,), (0,)), ((), ())),
    "[n, k]": ((3, 70), (10, 70), ((1,), (1,)), ((), ())),
    "on the left": ((70, 10), (2, 70), ((0,), (1,)), ((), ())),
    "heads": ((1, 2, 8), (8, 3, 4), ((2,), (0,)), ((), ())),
    "heads back": ((1, 2, 3, 4), (3, 4, 8), ((2, 3), (0, 1)), ((), ())),
    "experts": ((3, 2, 8), (3, 8, 6), ((2,), (1,)), ((0,), (0,))),
}


def packed(q, axis):
    where = Packing(axis - q.ndim, q.shape[axis])
    return dataclasses.replace(q, stored=packing.pack(q.stored, q.format, axis), packing=where)


@pytest.mark.parametrize("kind", [INT4, INT4_WITH_ZERO], ids=["symmetric", "with zero points"])
@pytest.mark.parametrize("name", FORMS)
def test_halves_of_bytes_are_exact(name, kind):
    """Packed along every axis of the weight."""
    rng = np.random.default_rng(0)
    *shapes, contract, batch = dims = FORMS[name]
    op, side = read_dot(dims), 0 if name == "on the left" else 1
    kinds = [INT8, INT8]
    kinds[side] = kind
    grid = tuple(1 if a in contract[side] else n for a, n in enumerate(shapes[side]))
    grids = [(1,) * len(shapes[0]), (1,) * len(shapes[1])]
    grids[side] = grid
    made = [some_codes(rng, s, g, k) for s, g, k in zip(shapes, grids, kinds, strict=True)]
    want = oracle.dot_general(made[0][1], made[1][1], contract, batch)
    operands = [q for q, _, _ in made]
    variants = [
        tuple(packed(q, axis) if n == side else q for n, q in enumerate(operands)) for axis in range(len(shapes[side]))
    ]
    taken = [nibbles.packed_side(op, pair) for pair in variants]
    assert taken == [None if axis in batch[side] else side for axis in range(len(shapes[side]))]
    for acc, _ in jax.jit(lambda pairs: [lowering.KERNELS[type(op)](op, *pair) for pair in pairs])(variants):
        assert acc.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(acc, np.int64), want)


def test_longest_sums_of_halves_do_not_overflow():
    """Sixteen times the sum must fit: where it does not, codes are unpacked."""
    four = jaxq.Int(4)
    for k, halves in ((131071, True), (131072, False)):
        a = constant_codes((1, k), -128)
        b = dataclasses.replace(constant_codes((k, 2), -8), format=four)
        op = read_op(lambda a, b: a @ b, (1, k), (k, 2))
        pair = (a, packed(b, 0))
        assert (nibbles.packed_side(op, pair) == 1) is halves
        acc, _ = jax.jit(lambda pair, op=op: lowering.KERNELS[type(op)](op, *pair))(pair)
        np.testing.assert_array_equal(acc, np.full((1, 2), k * 8 * 128))


@pytest.mark.parametrize("rows, count", [(1, 2), (16, 2), (17, 1)])
def test_few_rows_take_two_products(rows, count):
    params, x = {"w": jax.random.normal(jax.random.key(0), (64, 32))}, jnp.ones((rows, 64))
    scheme = jaxq.Scheme(weight=jaxq.int4(), act=jaxq.int8())
    f = lambda p, x: x @ p["w"]  # noqa: E731
    converted = jaxq.convert(f, scheme)(params, x)
    assert converted["w"].nbytes == 64 * 32 / 2 + 4 * 32
    assert products(jaxq.quantize(f, scheme), converted, x) == [("int8", "int8")] * count
    served = jax.jit(jaxq.quantize(f, scheme))(converted, x)
    np.testing.assert_array_equal(served, jax.jit(jaxq.qat(f, scheme))(params, x))
