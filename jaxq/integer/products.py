"""Sites: int8 codes on the plan's grids, multiplied and summed in int32 by the kernels of the platform.

What a sum can be is proved from the weight itself: for each output channel, the sum over its codes of the largest and
the smallest product that each can make.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.decisions import integer_form
from jaxq.decisions.decision import Decision
from jaxq.integer import curves, embedding, inputs, quotients
from jaxq.integer.scales import narrowed
from jaxq.integer.values import HIDDEN, Affine, Coded, Constant, Entry, Mapped, Plain, Refusal, Rowed, Value, ones, wide
from jaxq.interpretation.numerics import Task, to_codes, weight_codes
from jaxq.lowering import SCALES, dot, forms
from jaxq.lowering.conv import sums_of_kernel
from jaxq.numbers import affine as numbers
from jaxq.numbers.calibrators import Leaf
from jaxq.numbers.qarray import QArray
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.ops import Conv, Dot, Embedding
from jaxq.programs.sites import Located, Path


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A site with all that the plan knows of it. ranges: of its operands, then of its output."""

    item: Located
    decision: Decision
    ranges: tuple[Leaf | None, ...]
    weight: QArray | None

    def layer(self, path: Path, n: int) -> "Job":
        """Return the job of one iteration of the loop at `path`, where the site has a weight for each."""
        if path not in self.item.stacked:
            return self
        site = dataclasses.replace(self.item.site, stack=self.item.site.stack[1:])
        item = dataclasses.replace(self.item, site=site, stacked=self.item.stacked - {path})
        own = functools.partial(jax.tree.map, lambda leaf: leaf[n])
        with jax.ensure_compile_time_eval():
            return dataclasses.replace(self, item=item, ranges=own(self.ranges), weight=own(self.weight))

    def run(self, operands: Sequence[Value]) -> Coded:
        """Return the site's sums, wide, or rounded to its output's grid where the plan has one."""
        if self.obstacle:
            raise Refusal(self.obstacle)
        if isinstance(self.item.op, Embedding):
            return embedding.lookup(self.item.op, self._codes(operands[0]), [_plain(x) for x in operands[1:]])
        op, (left, right) = self.item.op, (self.coded(n, x) for n, x in enumerate(operands[:2]))
        assert isinstance(op, Dot | Conv)
        acc = _sums(op, left, right, self.item.weight)
        return acc if self.decision.out is None else narrowed(acc, self.grid(2))

    @functools.cached_property
    def obstacle(self) -> str:
        """Why this site has no integer form, and what would make one; empty if it has."""
        return integer_form.problem(self.decision)

    def coded(self, number: int, x: Value) -> Coded:
        """Return an operand in int8 codes on its grid; a weight as it was converted."""
        if number == self.item.weight:
            return self._weight(x)
        if isinstance(x, Mapped):
            return curves.placed(x, self.grid(number))
        if isinstance(x, Entry):
            return inputs.placed(x, self.grid(number))
        if isinstance(x, Rowed):
            return quotients.placed(x, self.grid(number))
        if isinstance(x, Constant):  # in the first iteration of a loop
            return _known(x.held, self.item.site.operands[number].shape, self.grid(number))
        if not isinstance(x, Coded):
            raise Refusal("multiplies what is not a quantized value")
        if x.far < math.inf:
            raise Refusal(f"takes {HIDDEN}")
        codes = narrowed(x, self.grid(number))
        if isinstance(self.item.op, Dot) and self.item.op.batch[number] and not x.is_narrow:
            # Rounded where they are, and moved as codes: a copy in another order that also rounds has no vectors.
            codes = dataclasses.replace(codes, codes=lax.optimization_barrier(codes.codes))
        return codes

    def quantizer(self, number: int) -> Quantizer:
        """Return the quantizer of an operand, or of the output: number 2."""
        return self.decision.out if number == 2 else self.decision.quantizers[number]

    def grid(self, number: int) -> Affine:
        """Return the grid of an operand or of the output; unsigned codes move down by 128."""
        quantizer, (scale, zero) = self.quantizer(number), self.affine(number)
        if scale.size != 1:
            raise Refusal(f"takes operand {number} with more than one scale: use per_tensor=True")
        down = 128 if quantizer.format.storage == jnp.uint8 else 0
        low, high = quantizer.bounds()
        point = 0 if zero is None else int(np.asarray(zero).max())
        return Affine(float(np.asarray(scale, np.float64).max()), point - down, low - down, high - down)

    def affine(self, number: int) -> numbers.Affine:
        """Return the scale and the zero point of a grid, on the host, of one number each."""
        op, quantizer = self.item.op, self.quantizer(number)
        rank = len(self.item.site.operands[number].shape) if number < 2 else len(self.item.site.out_shape)
        task = Task(op, (quantizer,) * 2, self.item.weight)
        with jax.ensure_compile_time_eval():
            q = to_codes(task, min(number, 1), jnp.zeros((1,) * rank, jnp.float32), self.ranges[number])
            return numbers.Affine(q.real_scale(), q.zero_point)

    def _closed_over(self, x: Value) -> QArray:
        if not isinstance(x, Constant) or x.array is None:
            raise Refusal("multiplies by a weight that is not there: start from float parameters")
        operand = self.item.site.operands[self.item.weight]
        whole = jnp.broadcast_to(jnp.asarray(x.array, operand.dtype), operand.shape)
        task = Task(self.item.op, self.decision.quantizers, self.item.weight)
        return weight_codes(task, whole, self.ranges[self.item.weight])

    def _codes(self, x: Value) -> QArray:
        with jax.ensure_compile_time_eval():
            return (self.weight or self._closed_over(x)).plain()

    def _weight(self, x: Value) -> Coded:
        """Return a weight as it was converted, or as it would be: of a closed-over array."""
        q = self._codes(x)
        if any(q.scale.shape[axis] != 1 for axis in self.item.op.contracted[self.item.weight]):
            raise Refusal("has a weight with scales along the axis that is summed over: drop group=")
        codes = np.asarray(q.codes).astype(np.int64)
        return Coded(q.codes, np.asarray(q.scale, np.float64), codes, codes)


def _known(reals: Any, shape: tuple[int, ...], grid: Affine) -> Coded:
    """Return the codes of numbers that are known."""
    codes = np.broadcast_to(grid.codes_of(np.asarray(reals)), shape)
    low, high = (ones(end - grid.zero_point, codes.ndim, np.int64) for end in (codes.min(), codes.max()))
    return Coded(jnp.asarray(codes, jnp.int8), ones(grid.scale, codes.ndim), low, high, grid.zero_point)


def _plain(x: Value) -> jax.Array:
    """Return an index."""
    if isinstance(x, Constant):
        return jnp.asarray(x.held)
    if not isinstance(x, Plain):
        raise Refusal("looks up by what is no integer of the program")
    return x.array


def _sums(op: Dot | Conv, left: Coded, right: Coded, weight: int | None) -> Coded:
    """Return `sum (left - zero)(right - zero)` in int32, with its scale and its bounds."""
    pair = (left, right)
    ranks = (left.codes.ndim, right.codes.ndim)
    acc = forms.sums(dataclasses.replace(op, precision=None), left.codes, right.codes)
    scale = to_output(op, left.scale, 0, ranks) * to_output(op, right.scale, 1, ranks)
    if weight is None:
        terms = op.terms((left.codes.shape, right.codes.shape))
        ends = np.stack([a * b for a in (left.low, left.high) for b in (right.low, right.high)])
        low, high = (ones(terms * pick(ends, initial=0), acc.ndim, np.int64) for pick in (np.min, np.max))
        return wide(_less_zero_points(op, acc, left, right), scale, low, high)
    w, x = pair[weight], pair[1 - weight]
    if x.zero_point:
        acc = acc - _correction(op, pair, weight, acc.shape)
    products, axes = np.stack([w.low * int(end) for end in (x.low.min(), x.high.max(), 0)]), op.contracted[weight]
    bounds = (pick(products, axis=0).sum(axes, keepdims=True) for pick in (np.min, np.max))
    low, high = (to_output(op, end, weight, ranks) for end in bounds)
    return wide(acc, _of_zeros_as_others(scale, low, high), low, high)


def _of_zeros_as_others(scale: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return scales of which those of channels that are zero, which may be anything, are as small as the others'."""
    empty = np.broadcast_to((low == 0) & (high == 0), np.broadcast_shapes(low.shape, scale.shape))
    if not empty.any() or empty.all():
        return scale
    whole = np.broadcast_to(scale, empty.shape)
    return np.where(empty, whole[~empty].min(), whole)


def _correction(op: Dot | Conv, pair: tuple[Coded, Coded], weight: int, out: tuple[int, ...]) -> jax.Array:
    """Return what the zero point of an activation adds to the sums: a constant, as it is multiplied by weights alone.

    It is computed where the image is: what a convolution pads is the code zero, and adds nothing.
    """
    x, side = pair[1 - weight], 1 - weight
    with jax.ensure_compile_time_eval():
        if isinstance(op, Conv) and weight == 1:
            return np.int32(x.zero_point) * sums_of_kernel(op, x.codes.shape, pair[1].codes, out)
        free = set(op.free(side, x.codes.ndim)) if isinstance(op, Dot) else _free_of(op)
        operands = [pair[0].codes, pair[1].codes]
        operands[side] = jnp.ones([1 if axis in free else n for axis, n in enumerate(x.codes.shape)], jnp.int8)
        return np.int32(x.zero_point) * op.apply(*operands, out_dtype=jnp.int32)


def _free_of(op: Conv) -> set[int]:
    """Return the axis of kernels along which all sums of zero points are alike; groups are of several."""
    return set() if op.batch_groups > 1 or op.feature_groups > 1 else {op.rhs_spec[0]}


def _less_zero_points(op: Dot | Conv, acc: jax.Array, left: Coded, right: Coded) -> jax.Array:
    if not (left.zero_point or right.zero_point):
        return acc
    if isinstance(op, Conv):
        raise Refusal("convolves two values with zero points: use symmetric quantizers")
    pair = ((v.codes, jnp.full((1,) * v.codes.ndim, v.zero_point, jnp.int32)) for v in (left, right))
    return dot.less_zero_points(op, acc, *pair)


def to_output(op: Dot | Conv, s: np.ndarray, side: int, ranks: tuple[int, int]) -> np.ndarray:
    """Return an array of an operand's scales, one on its contracted axes, as it broadcasts against the output."""
    with jax.ensure_compile_time_eval():
        where = SCALES[type(op)](op, jnp.arange(s.size, dtype=jnp.int32).reshape(s.shape), side, ranks)
    return s.reshape(-1)[np.asarray(where)]
