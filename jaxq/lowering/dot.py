"""Integer `dot_general`: int8 x int8 -> int32, zero points and groups included."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.lowering import forms, nibbles
from jaxq.lowering.codes import signed
from jaxq.lowering.dequantize import dequantize, joint_scale
from jaxq.numbers.qarray import QArray
from jaxq.programs.ops import Dot


def integer_dot(op: Dot, lhs: QArray, rhs: QArray) -> tuple[jax.Array, jax.Array]:
    """Return int32 sums [*batch, *lhs free, *rhs free] and a float32 scale that broadcasts against them."""
    stored = (lhs, rhs)
    lhs, rhs = lhs.plain(), rhs.plain()
    if _is_grouped(op, lhs, 0) or _is_grouped(op, rhs, 1):
        return _grouped(op, lhs, rhs)
    (a, za), (b, zb) = signed(lhs), signed(rhs)
    side = nibbles.packed_side(op, stored)
    acc = _sums(op, a, b) if side is None else nibbles.sums(op, side, stored[side], (b, a)[side], _sums)
    acc = less_zero_points(op, acc, (a, za), (b, zb))
    ranks = (lhs.ndim, rhs.ndim)
    return acc, joint_scale(to_output(op, lhs.scale, 0, ranks), to_output(op, rhs.scale, 1, ranks), acc.shape)


def _sums(op: Dot, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the int32 product of codes."""
    return forms.sums(dataclasses.replace(op, precision=None), a, b)


def less_zero_points(op: Dot, acc: jax.Array, left, right) -> jax.Array:
    """Return sum (a - za)(b - zb) = sum ab - za sum b - zb sum a + K za zb, given sum ab."""
    (a, za), (b, zb) = left, right
    ranks = (a.ndim, b.ndim)
    terms = op.terms((a.shape, b.shape))
    if za is not None:
        acc = acc - to_output(op, za, 0, ranks) * to_output(op, _total(b, op.contract[1]), 1, ranks)
    if zb is not None:
        acc = acc - to_output(op, zb, 1, ranks) * to_output(op, _total(a, op.contract[0]), 0, ranks)
    if za is not None and zb is not None:
        acc = acc + terms * to_output(op, za, 0, ranks) * to_output(op, zb, 1, ranks)
    return acc


def _total(codes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(codes, axes, dtype=jnp.int32, keepdims=True)


def to_output(op: Dot, x: jax.Array, side: int, ranks: tuple[int, int]) -> jax.Array:
    """Return a per-operand array (ones on contracted axes) as [*batch, *lhs free, *rhs free] with ones elsewhere."""
    free = op.free(side, ranks[side])
    other = len(op.free(1 - side, ranks[1 - side]))
    moved = lax.transpose(x, (*op.batch[side], *free, *op.contract[side]))
    head = moved.shape[: len(op.batch[side])]
    own = moved.shape[len(head) : len(head) + len(free)]
    ones = (1,) * other
    return lax.reshape(moved, (*head, *own, *ones) if side == 0 else (*head, *ones, *own))


# --- groups along a contracted axis --------------------------------------------------------------------------------


def _is_grouped(op: Dot, q: QArray, side: int) -> bool:
    return any(q.scale.shape[axis] != 1 for axis in op.contract[side])


def _grouped(op: Dot, lhs: QArray, rhs: QArray) -> tuple[jax.Array, jax.Array]:
    """Sum each group in int32 and the scaled groups in float32: one product with the group as a batch axis.

    The scale that is returned is one, because groups have scales of their own.
    """
    which = _grouped_axis(op, lhs, rhs)
    count = max(lhs.scale.shape[op.contract[0][which]], rhs.scale.shape[op.contract[1][which]])
    a, b = _split(lhs, op.contract[0][which], count), _split(rhs, op.contract[1][which], count)
    acc, scale = integer_dot(_with_group(op), a, b)
    total = jnp.sum(dequantize(acc, scale), axis=0)
    return total, jnp.ones((1,) * total.ndim, jnp.float32)


def _grouped_axis(op: Dot, lhs: QArray, rhs: QArray) -> int:
    pairs = zip(*op.contract, strict=True)
    return next(n for n, (i, j) in enumerate(pairs) if lhs.scale.shape[i] != 1 or rhs.scale.shape[j] != 1)


def _split(q: QArray, axis: int, count: int) -> QArray:
    """Return `q` with `count` parts of `axis` as a new leading axis; a group may hold several."""

    def split(x: jax.Array) -> jax.Array:
        shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def each(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else split(jnp.repeat(x, count // x.shape[axis], axis))

    return QArray(split(q.codes), each(q.scale), each(q.zero_point), q.format, q.dtype)


def _with_group(op: Dot) -> Dot:
    def shift(axes):
        return tuple(axis + 1 for axis in axes)

    contract = (shift(op.contract[0]), shift(op.contract[1]))
    batch = ((0, *shift(op.batch[0])), (0, *shift(op.batch[1])))
    return Dot(contract, batch, op.precision, op.out_dtype, None)
