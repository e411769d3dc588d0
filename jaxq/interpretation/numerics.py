"""The arithmetic of one site: quantize the operands, run the integer kernel, differentiate straight through.

The forward pass of training and of serving is the same function on the same codes. Its derivative treats every
quantizer as the identity where the rounded value is inside the range and as a constant outside (Jacob et al. 2018,
section 3), and multiplies *dequantized* operands, in every op: the exact gradient of the imitation in float. It is a
`custom_jvp`, so forward mode, reverse mode and second derivatives all work; between the passes operands are kept as
codes. Weights and ranges pass an optimization barrier, without which XLA folds constants into other roundings than it
uses for arguments.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxq import lowering
from jaxq.decisions.scheme import Backward
from jaxq.interpretation import backward
from jaxq.lowering import matrices
from jaxq.numbers import codebooks, codecs, estimators, learning
from jaxq.numbers.affine import Affine, encode, is_plain, raw_scale, settle
from jaxq.numbers.blocks import hide, spread, spread_axes
from jaxq.numbers.calibrators import Leaf, Range
from jaxq.numbers.estimators import EWGS
from jaxq.numbers.fits import DKM
from jaxq.numbers.formats import Codebook
from jaxq.numbers.parameters import Parameters
from jaxq.numbers.qarray import QArray
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.late import late
from jaxq.programs.ops import Dot, Embedding, Op


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do at a site, hashable: the operation, its operands' quantizers, and which operand is the weight.

    backward: how the products of the backward pass are quantized; None for float.
    """

    op: Op
    quantizers: tuple[Quantizer | None, ...]
    weight: int | None
    backward: Backward | None = None

    def role(self, number: int) -> str:
        """Return the role of an operand."""
        return "weight" if number == self.weight else "act"


def to_codes(task: Task, number: int, x: jax.Array, r: Leaf | None, key: jax.Array | None = None) -> QArray:
    """Quantize an operand by learned parameters, by its static range, or by its own where there is none.

    key: for a quantizer that rounds stochastically, which without one rounds to nearest.
    """
    quantizer, grid = task.quantizers[number], _grid(task, number, x)
    if isinstance(r, Parameters):
        return _turned(task, number, x, lambda x: learning.encode(quantizer, x, grid, r))
    if key is not None and quantizer.stochastic:
        return codecs.encode_stochastically(quantizer, x, grid, key, _fixed(quantizer, r, grid))
    return _turned(task, number, x, lambda x: codecs.encode(quantizer, x, grid, _fixed(quantizer, r, grid)))


def _turned(task: Task, number: int, x: jax.Array, encode: Callable[[jax.Array], QArray]) -> QArray:
    """Encode an operand with the axis that vectors run along at the end."""
    quantizer, axes = task.quantizers[number], task.op.contracted[number]
    return quantizer.turn(encode(quantizer.turn(x, axes)), axes)


def _grid(task: Task, number: int, x: jax.Array) -> tuple[int, ...]:
    return task.quantizers[number].grid(x.shape, task.op.contracted[number])


def _fixed(quantizer: Quantizer, r: Range | None, grid: tuple[int, ...]) -> Range | None:
    """Return a static range with ends of the scale's shape, constant to derivatives; None for a dynamic quantizer."""
    if not quantizer.static:
        return None
    assert r is not None, "a static quantizer comes with a range"
    r = jax.tree.map(lambda leaf: lax.stop_gradient(jnp.asarray(leaf)), r)
    return r._replace(lo=lax.reshape(r.lo, grid), hi=lax.reshape(r.hi, grid))


def weight_codes(task: Task, w: jax.Array, r: Leaf | None) -> QArray:
    """Return the codes of a weight operand: what `convert` stores."""
    return _settled(task, _raw_weight_codes(task, w, hide(r)))


def _raw_weight_codes(task: Task, w: jax.Array, r: Leaf | None, key: jax.Array | None = None) -> QArray:
    """Return the codes of a weight operand, with a scale still to be settled where it is one reduction."""
    quantizer, w = task.quantizers[task.weight], hide(w)
    if not is_plain(quantizer):
        return to_codes(task, task.weight, w, r, key)
    raw = raw_scale(quantizer, w, _grid(task, task.weight, w))
    codes = encode(quantizer, w, Affine(settle(quantizer, raw), None), key if quantizer.stochastic else None)
    return QArray(codes, raw, None, quantizer.format, w.dtype)


def _settled(task: Task, q: QArray) -> QArray:
    """Return codes with their scale settled: the same operations on a scale just computed and on a stored one."""
    quantizer = task.quantizers[task.weight]
    return dataclasses.replace(q, scale=settle(quantizer, q.scale)) if is_plain(quantizer) else q


@functools.partial(jax.jit, static_argnums=0)
def run_site(task: Task, operands: tuple, ranges: tuple, rest: tuple, key: jax.Array | None = None) -> jax.Array:
    """Run one site. operands: arrays or, for a converted weight, a QArray; ranges: per operand or None.

    key: rounds stochastically what comes back through `task.backward`, and operands whose quantizers say so; chooses
    which values stay as they are.
    """
    ranges = hide(ranges)
    keys = _keys(key, len(operands))
    coded = tuple(_coded(task, n, x, ranges[n], keys[n]) for n, x in enumerate(operands))
    if key is not None and any(q is not None and q.drop for q in task.quantizers):
        own = _keys(key, len(operands), 1)
        parts = zip(operands, coded, ranges, own, strict=True)
        operands, coded, ranges = zip(*(_dropped(task, n, *part) for n, part in enumerate(parts)), strict=True)
    operands = tuple(map(_estimated, task.quantizers, operands, coded))
    if task.backward is not None and not any(isinstance(x, QArray) for x in operands):
        return _trained(task, operands, coded, ranges, rest, key)
    return _product(task, operands, coded, ranges, rest)


def _dropped(task: Task, number: int, x: Any, q: QArray | None, r: Leaf | None, key: jax.Array) -> tuple:
    """Return an operand, its codes and its range; where quantization is dropped at random, a float one with neither."""
    quantizer = task.quantizers[number]
    if q is None or isinstance(x, QArray) or not quantizer.drop:
        return x, q, r
    rounded = _imitation(quantizer, task.op.contracted[number], _estimated(quantizer, x, q), q, r)
    return lax.select(jax.random.bernoulli(key, quantizer.drop, x.shape), x, rounded), None, None


def _estimated(quantizer: Quantizer | None, x: Any, q: QArray | None) -> Any:
    """Return an operand whose gradient is what its quantizer's estimator makes of it."""
    if quantizer is None or quantizer.estimator is None or q is None or isinstance(x, QArray):
        return x
    error = jnp.zeros((), jnp.float32)
    if isinstance(quantizer.estimator, EWGS):
        low, high = quantizer.bounds()
        whole = lax.sub(lax.convert_element_type(x, jnp.float32), q.decode(jnp.float32))
        error = lax.stop_gradient(whole / (spread(q.scale, q.shape) * np.float32(high - low)))
    return estimators.shaped(quantizer.estimator, x, error)


def _keys(key: jax.Array | None, count: int, use: int = 0) -> list[jax.Array | None]:
    """Return a key for each operand and use, other than those that the backward pass splits the same key into."""
    return [None] * count if key is None else list(jax.random.split(jax.random.fold_in(key, 2**31 + use), count))


def _coded(task: Task, number: int, x, r: Leaf | None, key: jax.Array | None) -> QArray | None:
    """Return an operand's codes; None where it stays float."""
    if isinstance(x, QArray):
        settled = _settled(task, hide(x))
        return settled if isinstance(task.op, Dot | Embedding) else settled.plain()
    if task.quantizers[number] is None:
        return None
    x = lax.stop_gradient(x)
    if number == task.weight:
        return _settled(task, hide(_raw_weight_codes(task, x, r, key))).plain()
    return to_codes(task, number, x, r, key).plain()


@functools.partial(jax.jit, static_argnums=0)
def round_output(quantizer: Quantizer, y: jax.Array, r: Range | None) -> jax.Array:
    """Return a site's output as its quantizer has it, one scale for all of it: straight through towards `y`."""
    r = hide(r)
    if quantizer.estimator is not None:
        y = _estimated(quantizer, y, _output_codes(quantizer, lax.stop_gradient(y), r))
    return _rounded(quantizer, y, r)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(quantizer: Quantizer, y: jax.Array, r: Range | None) -> jax.Array:
    q = _output_codes(quantizer, y, r)
    # There is no code for NaN, which a lookup out of bounds is filled with.
    return lax.select(lax.ne(y, y), y, q.decode(y.dtype))


@_rounded.defjvp
def _rounded_jvp(quantizer, primals, tangents):
    y, r = primals
    q = _output_codes(quantizer, lax.stop_gradient(y), r)
    return _rounded(quantizer, y, r), _through(quantizer, (), y, q, r, tangents[0])


def _output_codes(quantizer: Quantizer, y: jax.Array, r: Range | None) -> QArray:
    grid = (1,) * y.ndim
    return codecs.encode(quantizer, y, grid, _fixed(quantizer, r, grid)).plain()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(task: Task, operands: tuple, coded: tuple, ranges: tuple, rest: tuple) -> jax.Array:
    """Run the operation on codes; `operands` are what they are codes of, which only the derivative looks at."""
    return _forward(task, operands, coded, rest)


def _forward(task: Task, operands: tuple, coded: tuple, rest: tuple) -> jax.Array:
    return lowering.run(task.op, [x if q is None else q for x, q in zip(operands, coded, strict=True)], rest)


def _product_jvp(task: Task, primals, tangents):
    operands, coded, ranges, rest = primals
    out = _product(task, *primals)
    terms = []
    for n, (x, dx, dr) in enumerate(zip(operands, tangents[0], tangents[2], strict=True)):
        if isinstance(x, QArray):
            _refuse_gradient(dx)
            continue
        side = (task.quantizers[n], task.op.contracted[n])
        steps = [] if isinstance(dx, SymbolicZero) else [_through(*side, x, coded[n], ranges[n], dx)]
        if isinstance(dr, Parameters) and not _is_still(dr.value):
            steps.append(learning.follow(task.quantizers[n], x, coded[n], ranges[n], _made(dr.value)))
        terms += [_moved(task, n, step, *primals) for step in steps]
    return out, functools.reduce(lax.add, terms) if terms else lax.full_like(out, 0)


def _moved(task: Task, number: int, step: jax.Array, *primals) -> jax.Array:
    """Return how the output moves with a step of one operand, the others decoded.

    Codes wait for the backward pass and are decoded there, once the gradient is there: a quarter of the memory of what
    is multiplied.
    """

    def product(step, operands, coded, ranges, rest):
        others = zip(operands, coded, ranges, strict=True)
        smooth = [step if n == number else _smooth(task, n, *other) for n, other in enumerate(others)]
        return _linear(task.op, *smooth, *rest)

    return late(product, step, *primals)


def _linear(op: Op, *operands) -> jax.Array:
    """Run the operation on tangents: what a lookup out of bounds is filled with is a constant, its tangent zero."""
    if isinstance(op, Dot):
        return matrices.product(op, *operands)
    return op.apply(*operands, fill_value=0) if isinstance(op, Embedding) else op.apply(*operands)


def _is_still(change: Any) -> bool:
    return all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(change, is_leaf=_is_zero))


def _made(change: Any) -> Any:
    """Return a change with arrays for symbolic zeros."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x, change, is_leaf=_is_zero)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _refuse_gradient(tangent: QArray) -> None:
    moving = [leaf for leaf in (tangent.scale, tangent.table, tangent.outer) if leaf is not None]
    if not all(isinstance(leaf, SymbolicZero) for leaf in moving):
        raise TypeError(
            "there is no gradient by a converted weight (a QArray): differentiate by the float leaves, for example "
            "adapters, or train float parameters with jaxq.qat"
        )


_product.defjvp(_product_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained(task: Task, operands: tuple, coded: tuple, ranges: tuple, rest: tuple, key) -> jax.Array:
    """Run the operation as `_product` does; the products of its backward pass are quantized too."""
    del key
    return _forward(task, operands, coded, rest)


def _trained_forward(task: Task, *primals):
    return _trained(task, *primals), primals


def _trained_backward(task: Task, saved: tuple, g: jax.Array):
    operands, coded, ranges, _, key = saved
    keys = (None, None) if key is None else jax.random.split(key)
    pulled = (_pulled(task, n, g, operands, coded, ranges, keys[n]) for n in range(2))
    return tuple(pulled), None, None, None, None


_trained.defvjp(_trained_forward, _trained_backward)


def _pulled(task: Task, number: int, g: jax.Array, operands: tuple, coded: tuple, ranges: tuple, key) -> jax.Array:
    """Return the gradient by one operand: a product with the other one's codes, in float where it is kept wide."""
    x, other = operands[number], operands[1 - number] if coded[1 - number] is None else coded[1 - number]
    quantizer = task.backward.of(task.role(number))
    dx = backward.gradient(task.op, number, backward.Rounding(quantizer, key), g, other, x.shape)
    dx = lax.convert_element_type(dx, x.dtype)
    dx = jax.sharding.reshard(dx, jax.typeof(x).sharding) if any(spread_axes(x)) or any(spread_axes(dx)) else dx
    return _through(task.quantizers[number], task.op.contracted[number], x, coded[number], ranges[number], dx)


def _smooth(task: Task, number: int, x, q: QArray | None, r: Leaf | None) -> jax.Array:
    """Return an operand as the derivative sees it: dequantized, itself differentiable straight through."""
    if q is None:
        return x
    if isinstance(x, QArray):
        return q.decode()
    return _imitation(task.quantizers[number], task.op.contracted[number], x, q, r)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _imitation(quantizer: Quantizer, axes: tuple[int, ...], x: jax.Array, q: QArray, r: Leaf | None) -> jax.Array:
    """Return `decode(q)`, where q is the codes of x: straight through towards x, and towards learned parameters."""
    return q.decode(x.dtype)


@_imitation.defjvp
def _imitation_jvp(quantizer, axes, primals, tangents):
    x, q, r = primals
    step = _through(quantizer, axes, x, q, r, tangents[0])
    if isinstance(r, Parameters):
        step = lax.add(step, learning.follow(quantizer, x, q, r, tangents[2].value))
    return _imitation(quantizer, axes, *primals), step


def _through(
    quantizer: Quantizer, axes: tuple[int, ...], x: jax.Array, q: QArray | None, r: Leaf | None, dx: jax.Array
) -> jax.Array:
    """Return the straight-through tangent: `dx` where the rounded code is in range, zero where it was clipped.

    With `dkm()` it is that of soft assignments. axes: those that are contracted.
    """
    if q is None:
        return dx
    x = lax.stop_gradient(x)
    if isinstance(quantizer.fit, DKM):
        assert isinstance(quantizer.format, Codebook), "other formats have no soft assignments"
        parts = quantizer.turn(x, axes), lax.stop_gradient(q.table), quantizer.turn(dx, axes)
        return quantizer.turn(codebooks.follow_softly(quantizer.format, quantizer.fit, *parts), axes)
    if isinstance(r, Parameters):
        return learning.passed(quantizer, x, q, dx)
    inside = codecs.inside(quantizer, x, q, _fixed(quantizer, r, q.grid))
    return dx if inside is None else lax.select(inside, dx, lax.full_like(dx, 0))
