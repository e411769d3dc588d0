"""Sums, products with constants and with one another, maxima and comparisons, element by element.

A constant factor goes into the scale, its sign into the codes; a constant summand is rounded to the sum's own scale, or
to one of up to 2^16 finer steps. So a BatchNorm after a convolution *is* folded: a shift and an addition in int32.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.scales import (
    FAR,
    FRACTION,
    SMALLER,
    alongside,
    beside,
    check_whole,
    coarser,
    coded,
    constant,
    far_of,
    finite,
    is_full,
    power_above,
    refined,
    shifted,
    together,
    widened,
)
from jaxq.integer.values import INT8, INT32, ROOM, Coded, Constant, Plain, Refusal, Value, ones, span, wide
from jaxq.numbers.requantize import single_rounding
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn

# How much larger than a value a constant may be that is selected in its place and is to keep its own size.
NEARBY = 16.0
# Where numbers that stand for larger ones are, and where they begin, in what the values reach.
END, LIMIT = 1.5, 1.25
SELECT = "to hide positions, select jnp.where(mask, scores, -jnp.inf)"


def _plus(v: Coded, c: Constant) -> Coded:
    """v + c, in finer steps where thirty bits have room for them, so that the constant is hardly rounded.

    Where v is nothing beside the constant, as beside a mask's -1e9, the constant is selected instead.
    """
    is_far = outweighs(c, v)
    if is_far.any() and not is_far.all():
        near, mask = (Constant(np.where(which, 0.0, c.reals)) for which in (is_far, ~is_far))
        shape = lax.broadcast_shapes(v.codes.shape, is_far.shape)
        return selected(jnp.broadcast_to(jnp.asarray(is_far), shape), [_plus(v, near), mask])
    reals = finite(c)
    pair, unit, v = _paired(v.pair, operator.add, reals), v.unit, widened(v)
    if is_far.any():
        largest = float(np.max(np.abs(reals)))
        raise Refusal(f"adds {largest:.3g}, beside which the other values are nothing: {SELECT}")
    total = float(np.max(v.reach + np.abs(reals / v.scale)))
    if total > INT32[1]:
        v = coarser(v, power_above(float(np.max(v.reach * v.scale + np.abs(reals))) / ROOM))
    else:
        v = shifted(v, int(np.clip(math.floor(math.log2(ROOM / total)), 0, FRACTION)))
    steps = constant(c, v)
    result = wide(v.codes + steps.codes, v.scale, v.low + steps.low, v.high + steps.high)
    return _as_mask(dataclasses.replace(result, unit=unit), pair)


def _as_mask(v: Coded, pair: tuple[float, float] | None) -> Coded:
    """Return what a truth value was made into; one of its numbers stands for larger ones, if it is that large."""
    largest = 0.0 if pair is None else max(map(abs, pair))
    return dataclasses.replace(v, pair=pair, far=far_of(largest))


def outweighs(c: Constant, v: Coded) -> np.ndarray:
    """Tell which of a constant's numbers leave nothing of a value that they are added to."""
    return np.abs(c.reals) > FAR * max(1.0, v.real_reach)


def _paired(
    pair: tuple[float, float] | None, of: Callable[[float, float], float], reals: np.ndarray
) -> tuple[float, float] | None:
    """Return what a constant makes of the two numbers of a truth value, if it is one number."""
    if pair is None or reals.size != 1:
        return None
    number = float(reals.max())
    return of(pair[0], number), of(pair[1], number)


def scaled(v: Coded, factor: np.ndarray) -> Coded:
    """v * factor: the scale times |factor|, the codes times its sign."""
    scale = v.scale * np.where(factor == 0, 1.0, np.abs(factor))
    pair = _paired(v.pair, operator.mul, factor)
    unit = float(np.max(np.abs(factor), initial=0.0)) * v.unit if v.unit else None
    if np.all(factor > 0):
        return _as_mask(Coded(v.codes, scale, v.low, v.high, v.zero_point, unit=unit), pair)
    w = widened(v)
    sign = np.sign(np.broadcast_to(factor, (1,) * w.codes.ndim) if factor.ndim == 0 else factor).astype(np.int64)
    ends = np.minimum(w.low * sign, w.high * sign), np.maximum(w.low * sign, w.high * sign)
    signed = wide(w.codes * jnp.asarray(sign, jnp.int32), scale, *ends)
    return _as_mask(dataclasses.replace(signed, unit=unit), pair)


def absolute(eqn: Eqn, x: Coded) -> Coded:
    """|x|."""
    del eqn
    w = widened(x)
    low = np.maximum(np.maximum(w.low, -w.high), 0)
    return wide(lax.abs(w.codes), w.scale, low, np.maximum(np.abs(w.low), np.abs(w.high)))


def add(eqn: Eqn, a, b) -> Coded:
    """Values of one scale, or together at one; what a mask adds, beside which a value is nothing, is selected."""
    del eqn
    if isinstance(a, Constant):
        a, b = b, a
    if isinstance(b, Constant):
        return _plus(a, b)
    for v, mask in ((a, b), (b, a)):
        if hides(mask, v):
            return _masked(v, mask, sum(mask.pair))
        if mask.unit and mask.unit > FAR * v.real_reach:
            raise Refusal(
                f"adds whole numbers times {mask.unit:.3g}, beside which the other values are nothing: give the "
                "program a mask of booleans"
            )
    a, b = together([a, b])
    return wide(a.codes + b.codes, a.scale, a.low + b.low, a.high + b.high)


def hides(mask: Coded | Constant, v: Coded) -> bool:
    """Tell whether a mask is zero or a number beside which a value is nothing."""
    if isinstance(mask, Constant):
        return bool(np.all((mask.reals == 0) | outweighs(mask, v)))
    return mask.pair is not None and 0.0 in mask.pair and max(map(abs, mask.pair)) > FAR * v.real_reach


def _masked(v: Coded, mask: Coded, number: float) -> Coded:
    """Return `v + mask`, the mask being zero or a number beside which v is nothing: the one or the other, selected."""
    beyond, half = (lax.gt if number > 0 else lax.lt), round(number / 2 / float(mask.scale.max()))
    codes = widened(mask).codes
    which = beyond(codes, jnp.broadcast_to(jnp.int32(half), codes.shape))
    shape = lax.broadcast_shapes(v.codes.shape, codes.shape)
    return selected(jnp.broadcast_to(which, shape), [v, Constant(np.asarray(number))])


def sub(eqn: Eqn, a, b) -> Coded:
    """a + (-b)."""
    return add(eqn, a, neg(eqn, b))


def neg(eqn: Eqn, a):
    """-a."""
    del eqn
    return Constant(-a.reals) if isinstance(a, Constant) else scaled(a, np.array(-1.0))


def mul(eqn: Eqn, a, b) -> Coded:
    """By a constant: its scale. Of two values: the product of 64 bits, shifted down to thirty.

    The program's own integers of 32 bits are not shifted: most of them are small, and nothing would be left.
    """
    del eqn
    if isinstance(a, Constant):
        a, b = b, a
    if isinstance(b, Constant):
        return scaled(a, finite(b))
    is_square, pair = a is b, _both(a.pair, b.pair)
    a, b = widened(a), widened(b)
    reach = float(a.reach.max()) * float(b.reach.max())
    down = max(0, math.ceil(math.log2(reach / ROOM)))
    if down and any(is_full(v) for v in (a, b)):
        raise Refusal(f"may drop the last bits of integers of 32 bits: {SMALLER}")
    codes = single_rounding(a.codes, b.codes, jnp.int32(31 - down)) if down else a.codes * b.codes
    codes = lax.optimization_barrier(codes)  # computed once, however many read it
    end = ones(math.ceil(reach / 2**down), codes.ndim, np.int64)
    return _as_mask(wide(codes, a.scale * b.scale * 2.0**down, 0 * end if is_square else -end, end), pair)


def _both(a: tuple[float, float] | None, b: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the two numbers that a product of two truth values is one of, where both may be zero."""
    if a is None or b is None or not (a[0] == b[0] == 0.0):
        return None
    return 0.0, a[1] * b[1]


def square(eqn: Eqn, x: Coded) -> Coded:
    """x * x."""
    return mul(eqn, x, x)


def div(eqn: Eqn, a, b) -> Coded:
    """By a constant; by a value it is `quotients.quotient`."""
    if not np.all(b.reals):
        raise Refusal("divides by zero")
    return mul(eqn, a, Constant(1 / b.reals))


# --- order -----------------------------------------------------------------------------------------------------------


def _limit(v: Coded, c: Constant) -> tuple[Coded, np.ndarray]:
    """Return a value and the codes, int64, of a constant at its scale, saturated (infinity included)."""
    if np.isnan(c.reals).any():
        raise Refusal("has a constant that is NaN, for which there is no code")
    if v.is_narrow and (np.any(c.reals) or not INT8[0] <= v.zero_point <= INT8[1]):
        v = refined(v)
    check_whole(v, c.reals)
    steps = np.rint(np.broadcast_to(c.reals / v.scale, np.broadcast_shapes(c.reals.shape, v.scale.shape)))
    return v, np.clip(steps, *INT32).astype(np.int64)


def _clamped(pick: Callable, bound: Callable) -> Callable:
    """max and min: with a constant a clamp of codes, of two values one of their codes."""

    def rule(eqn: Eqn, a, b) -> Coded:
        del eqn
        if isinstance(a, Constant):
            a, b = b, a
        if isinstance(b, Constant):
            v, steps = _limit(a, b)
            codes = pick(v.codes, jnp.asarray(steps + v.zero_point, v.codes.dtype))
            return Coded(codes, v.scale, bound(v.low, steps), bound(v.high, steps), v.zero_point)
        a, b = together([a, b])
        return wide(pick(a.codes, b.codes), a.scale, bound(a.low, b.low), bound(a.high, b.high))

    return rule


maximum, minimum = _clamped(jnp.maximum, np.maximum), _clamped(jnp.minimum, np.minimum)


def clamp(eqn: Eqn, low, x, high) -> Coded:
    """min(max(x, low), high)."""
    return minimum(eqn, maximum(eqn, x, low), high)


def compare(eqn: Eqn, a, b) -> Plain | Constant:
    """Codes of one scale; a constant is rounded to the step that gives the same answer for every code."""
    if a is b:  # which asks whether it is NaN
        return Constant(np.asarray(eqn.primitive in (lax.eq_p, lax.le_p, lax.ge_p)))
    if isinstance(a, Constant):
        v, c, rounding = b, a, _ROUNDED[_TURNED[eqn.primitive]]
    elif isinstance(b, Constant):
        v, c, rounding = a, b, _ROUNDED[eqn.primitive]
    else:
        return Plain(jaxpr.rebind(eqn, *(v.codes for v in alongside([a, b])))[0])
    if np.isnan(c.reals).any():
        raise Refusal("compares with NaN, for which there is no code: use jnp.isnan")
    v = widened(v)
    steps = rounding(np.broadcast_to(c.reals / v.scale, np.broadcast_shapes(c.reals.shape, v.scale.shape)))
    threshold = jnp.broadcast_to(jnp.asarray(np.clip(steps, *INT32), jnp.int32), v.codes.shape)
    pair = (threshold, v.codes) if isinstance(a, Constant) else (v.codes, threshold)
    return Plain(jaxpr.rebind(eqn, *pair)[0])


def _exactly(steps: np.ndarray) -> np.ndarray:
    """Return whole steps as they are; what lies between two of them equals no code, and is put where none is."""
    return np.where(steps == np.rint(steps), steps, INT32[0])


# code >= c is code >= ceil(c), code > c is code > floor(c).
_ROUNDED: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
    lax.ge_p: np.ceil,
    lax.lt_p: np.ceil,
    lax.gt_p: np.floor,
    lax.le_p: np.floor,
    lax.eq_p: _exactly,
    lax.ne_p: _exactly,
}
_TURNED = {
    lax.ge_p: lax.le_p,
    lax.le_p: lax.ge_p,
    lax.gt_p: lax.lt_p,
    lax.lt_p: lax.gt_p,
    lax.eq_p: lax.eq_p,
    lax.ne_p: lax.ne_p,
}


def select(eqn: Eqn, which, *cases) -> Coded:
    """One of several values, brought to one scale; where it is known which, that one."""
    if isinstance(which, Constant) and which.reals.size == 1:
        chosen = cases[int(which.reals.max())]
        if isinstance(chosen, Coded):
            return chosen
    if isinstance(which, Constant):
        which = Plain(jnp.broadcast_to(jnp.asarray(which.array), eqn.invars[0].aval.shape))
    if not isinstance(which, Plain):
        raise Refusal("selects by what is not a truth value")
    data = [c for c in cases if isinstance(c, Coded)]
    if not data:
        return _constants(eqn, which, cases)
    return selected(which.array, cases)


def selected(which: jax.Array, cases: Sequence) -> Coded:
    """Return one of several values, of which constants are brought near if they are far."""
    data = [c for c in cases if isinstance(c, Coded)]
    near, far = _nearer(cases, max(c.real_reach for c in data))
    coded = together([refined(c) for c in data], beside(data, [c for c in near if isinstance(c, Constant)]))
    like, rest = coded[0], iter(coded)
    full = [constant(c, like) if isinstance(c, Constant) else next(rest) for c in near]
    shape = which.shape or like.codes.shape
    parts = [jnp.broadcast_to(c.codes, shape) for c in full]
    low, high = (ones(end, like.codes.ndim, np.int64) for end in span(full))
    chosen = wide(lax.select_n(which, *parts), like.scale, low, high)
    return dataclasses.replace(chosen, far=far)


def _nearer(cases: Sequence, reach: float) -> tuple[list, float]:
    """Return cases without constants so far from the values that they are none: those are brought near.

    Such numbers, infinity among them, hide a position from a softmax or a maximum: all that counts is that they are
    beyond the values. What is beyond the second result stands for them.
    """
    is_far = [isinstance(c, Constant) and is_beyond(c, reach) for c in cases]
    if not any(is_far):
        return list(cases), math.inf
    near = [Constant(_to_end(c.reals, reach)) if far else c for c, far in zip(cases, is_far, strict=True)]
    return near, LIMIT * reach


def is_beyond(c: Constant, reach: float) -> bool:
    """Tell whether a constant is so far from values that reach so far that it is none: some of its numbers are."""
    return not np.all(np.abs(c.reals) <= NEARBY * reach)


def _to_end(reals: np.ndarray, reach: float) -> np.ndarray:
    if np.isnan(reals).any():
        raise Refusal("has a constant that is NaN, for which there is no code")
    if np.any((np.abs(reals) > reach) & (np.abs(reals) <= NEARBY * LIMIT * reach)):
        raise Refusal("selects constants of which some hide a position and some are just large: use one that hides")
    return np.where(np.abs(reals) > reach, np.sign(reals) * END * reach, reals)


def _constants(eqn: Eqn, which: Plain, cases) -> Coded:
    """One of two constants: the first, and what the second has more where the truth value is one."""
    if len(cases) != 2:
        raise Refusal("selects one of several constants: select one of two at a time")
    first, second = (finite(c) for c in cases)
    if first.size + second.size > 2 and np.any(first) and np.any(second):  # no mask, but numbers and what hides some
        nearer = min(cases, key=lambda c: float(np.max(np.abs(c.reals), initial=0.0)))
        aval = eqn.outvars[0].aval
        return selected(which.array, [coded(c, aval) if c is nearer else c for c in cases])
    chosen = _plus(scaled(identity(eqn, which), second - first), Constant(first))
    largest = max(float(np.max(np.abs(c), initial=0.0)) for c in (first, second))
    return dataclasses.replace(chosen, far=far_of(largest))


def identity(eqn: Eqn, x):
    """A change of type: of numbers that stand for themselves to codes of scale one, of codes to nothing else."""
    check_real(eqn)
    if isinstance(x, Coded):
        return Coded(x.codes, x.scale, x.low, x.high, x.zero_point, pair=x.pair, unit=x.unit)
    dtype, array = x.array.dtype, x.array
    low, high = (0, 1) if dtype == jnp.bool_ else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if high > INT32[1]:
        raise Refusal(f"turns {dtype} into real numbers: int32 does not hold them")
    codes = lax.convert_element_type(array, jnp.int32)
    v = wide(codes, ones(1.0, codes.ndim), ones(low, codes.ndim, np.int64), ones(high, codes.ndim, np.int64))
    v = shifted(v, min(FRACTION, 30 - high.bit_length())) if high < 2**16 else v
    return dataclasses.replace(v, pair=(0.0, 1.0)) if dtype == jnp.bool_ else dataclasses.replace(v, unit=1.0)


def check_real(eqn: Eqn) -> None:
    """Refuse a change of type from what codes or a table stand for to integers."""
    if eqn.primitive is lax.convert_element_type_p and not jaxpr.is_float(eqn.outvars[0].aval):
        raise Refusal(
            "turns a real number, or a truth value of a table, into an integer, which depends on how it is rounded: "
            "leave it to the caller"
        )


COMPARISONS = frozenset(_ROUNDED)
RULES: dict[Any, Callable[..., Value]] = {
    lax.add_p: add,
    lax.sub_p: sub,
    lax.neg_p: neg,
    lax.abs_p: absolute,
    lax.mul_p: mul,
    lax.div_p: div,
    lax.square_p: square,
    lax.max_p: maximum,
    lax.min_p: minimum,
    lax.clamp_p: clamp,
    **dict.fromkeys(_ROUNDED, compare),
    lax.select_n_p: select,
    lax.convert_element_type_p: identity,
}
