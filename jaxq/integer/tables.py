"""Any function of one value as a table of codes: found by dataflow, built by running the user's own equations.

Element by element, equations of one value and scalars compose to a function of it (`composed`), however often the value
is used: `x * sigmoid(x)` is one function. It becomes a table when it is known on which grid its result is wanted: of
256 codes, if the value is int8; of up to 4096 steps, if it is a sum, over the range that the *result* needs: outside of
it no code of the result changes. So the range of a table's input is neither measured nor guessed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic
from jaxq.integer.scales import rescaled
from jaxq.integer.values import INT8, Affine, Coded, Constant, Line, Mapped, Plain, Refusal, Value, line_of, ones
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn

ELEMENTWISE = frozenset(
    {lax.add_p, lax.sub_p, lax.mul_p, lax.div_p, lax.neg_p, lax.max_p, lax.min_p, lax.clamp_p, lax.select_n_p}
    | {lax.abs_p, lax.sign_p, lax.floor_p, lax.ceil_p, lax.round_p, lax.square_p, lax.integer_pow_p, lax.pow_p}
    | {lax.exp_p, lax.exp2_p, lax.expm1_p, lax.log_p, lax.log1p_p, lax.sqrt_p, lax.rsqrt_p, lax.cbrt_p}
    | {lax.tanh_p, lax.logistic_p, lax.erf_p, lax.erfc_p, lax.erf_inv_p, lax.sin_p, lax.cos_p, lax.tan_p}
    | {lax.sinh_p, lax.cosh_p, lax.asin_p, lax.acos_p, lax.atan_p, lax.asinh_p, lax.acosh_p, lax.atanh_p, lax.atan2_p}
    | {lax.eq_p, lax.ne_p, lax.lt_p, lax.le_p, lax.gt_p, lax.ge_p, lax.and_p, lax.or_p, lax.not_p, lax.is_finite_p}
    | {lax.rem_p, lax.convert_element_type_p}
)

# How many points a range is looked at in, to find where a function of it changes.
POINTS = 2**14
# How many steps of a sum a table has, and how many codes it may be off between two of them.
STEPS, FEW = 4096, 4
# In how many of its steps a function may jump.
JUMPS = 32
NORMS = "A softmax or a norm of rows needs no table, where it is written out as one"


def composed(eqn: Eqn, operands: Sequence[Value]) -> Line | None:
    """Return an equation's result as a function of one value; None if it is not one."""
    lines = [line_of(x) for x in operands if isinstance(x, Coded | Mapped | Plain)]
    constants = [x for x in operands if isinstance(x, Constant)]
    if eqn.primitive not in ELEMENTWISE or len(lines) + len(constants) < len(operands):
        return None
    if not lines or None in lines or any(line.root is not lines[0].root for line in lines):
        return None
    if any(c.array is None or c.reals.size != 1 for c in constants):
        return None
    arithmetic.check_real(eqn)

    def of(x: jax.Array) -> jax.Array:
        args = [_scalars(o, x) if isinstance(o, Constant) else line_of(o).of(x) for o in operands]
        return run(eqn, args)

    return Line(lines[0].root, once(of), eqn.primitive.name)


def run(eqn: Eqn, args: Sequence[jax.Array]) -> jax.Array:
    """Return what an equation makes of real numbers: whatever floats a program has, float32 stands for them here."""
    if eqn.primitive is lax.convert_element_type_p and jaxpr.is_float(args[0]) and jaxpr.is_float(eqn.outvars[0].aval):
        return args[0]
    types = [jnp.float32 if jaxpr.is_float(v.aval) else v.aval.dtype for v in eqn.invars]
    return jaxpr.rebind(eqn, *(a.astype(dtype) for a, dtype in zip(args, types, strict=True)))[0]


def once(of: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Return a function that remembers its last value: what a chain takes twice at each step is computed once."""
    last: list[Any] = [None, None]

    def remembered(x: jax.Array) -> jax.Array:
        if last[0] is not x:
            last[:] = x, of(x)
        return last[1]

    return remembered


def _scalars(c: Constant, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(np.asarray(c.array).reshape(())), like.shape)


def evaluate(line: Line, reals: np.ndarray) -> np.ndarray:
    """Return a function's values, float64. NaN is an error: there is no code for it."""
    with jax.ensure_compile_time_eval():
        values = np.asarray(line.of(jnp.asarray(reals, jnp.float32)))
    if values.dtype == bool:
        raise Refusal("leaves a truth value of a table, which only a selection can take")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        at, value = next((x, y) for x, y in zip(reals.flat, values.flat, strict=True) if not np.isfinite(y))
        raise Refusal(
            f"takes {line.name}, which is {value} at {at:.3g}: its operand may be that, clip it first. {NORMS}"
        )
    return values


def looked_up(line: Line, affine: Affine) -> Coded:
    """Return a function's int8 codes on a grid: its argument's steps, looked up in a table, at most a few codes off."""
    root = line.root
    whole = root.is_narrow and root.scale.size == 1
    place, reals = _codes(root) if whole else _steps(line, affine)
    table = affine.codes_of(evaluate(line, reals.clip(*root.ends)))
    if not whole:
        _check_steps(line, affine, reals, table)
    codes = jnp.take(jnp.asarray(table, jnp.int8), place, mode="clip")
    used = table - affine.zero_point
    low, high = (ones(end, codes.ndim, np.int64) for end in (used.min(), used.max()))
    return Coded(codes, ones(affine.scale, codes.ndim), low, high, affine.zero_point)


def _codes(root: Coded) -> tuple[jax.Array, np.ndarray]:
    """Return int8 codes as places in a table, and the numbers that they stand for."""
    every = np.arange(INT8[0], INT8[1] + 1) - root.zero_point
    place = lax.convert_element_type(root.codes, jnp.int32) - np.int32(INT8[0])
    return place, float(root.scale.max()) * every


def _steps(line: Line, affine: Affine) -> tuple[jax.Array, np.ndarray]:
    """Return sums as places in a table, over the range outside of which no code changes, and what is at the places."""
    root = line.root
    low, high = changing(lambda x: affine.codes_of(evaluate(line, x)), *root.ends)
    farthest = max(abs(low), abs(high), 1e-30)
    # No finer than the sum's own steps, and so that int32 holds them.
    unit = max((high - low) / (STEPS - 1), float(root.scale.min()), farthest / 2**29)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    place = rescaled(root, ones(unit, root.codes.ndim)).codes
    place = lax.clamp(np.int32(first), place, np.int32(last)) - np.int32(first)
    return place, unit * np.arange(first, last + 1)


def _check_steps(line: Line, affine: Affine, reals: np.ndarray, table: np.ndarray) -> None:
    """Refuse a table that a function leaves between two steps of its argument."""
    half = (reals[1] - reals[0]) / 2 if reals.size > 1 else 0.0
    low, high = (float(end) for end in np.clip([reals[0] - half, reals[-1] + half], *line.root.ends))
    points = np.linspace(low, high, POINTS)
    steps = np.searchsorted(reals + half, points).clip(max=reals.size - 1)
    check(line, lambda x: affine.codes_of(evaluate(line, x)), points, table[steps], steps, FEW)


def check(line: Line, of: Callable, points: np.ndarray, found: np.ndarray, steps: np.ndarray, few: int) -> None:
    """Refuse what a function leaves by more than a few, as a norm does near zero.

    of: the function, in steps of its result; found: what stands for it at the points; steps: of the argument, in which
    the points are. Where a function jumps, as a sign does, nothing follows it: that is at isolated points. It does not
    jump by more than it has been seen to change, as it does at a pole.
    """
    seen = of(points)
    off = np.abs(seen - found)
    bad = np.unique(steps[off > few])
    if not bad.size:
        return
    jumps = _jumps(of, points, steps, bad) if bad.size <= JUMPS else np.zeros(bad.size)
    if np.any(_largest(off, steps, bad) > few + np.where(jumps > np.ptp(seen), 0.0, jumps)):
        raise Refusal(
            f"takes {line.name} of a 32-bit sum, which changes too fast for a table: its steps do not follow "
            f"it. Clip the sum to the range that matters, or round it to int8 with out= in its site's Scheme. {NORMS}"
        )


def _largest(off: np.ndarray, steps: np.ndarray, bad: np.ndarray) -> np.ndarray:
    return np.array([off[steps == step].max() for step in bad])


def _jumps(codes: Callable[[np.ndarray], np.ndarray], points: np.ndarray, steps: np.ndarray, bad: np.ndarray) -> Any:
    """Return the jump within each of some steps, in codes: what is left of the change when the step is halved often."""
    at = np.array([np.flatnonzero(steps == step)[[0, -1]] for step in bad])
    low, high = points[np.maximum(at[:, 0] - 1, 0)], points[np.minimum(at[:, 1] + 1, POINTS - 1)]
    for _ in range(24):
        middle = (low + high) / 2
        a, b, c = codes(np.stack([low, middle, high]))
        left = np.abs(b - a) >= np.abs(c - b)
        low, high = np.where(left, low, middle), np.where(left, middle, high)
    a, b = codes(np.stack([low, high]))
    return np.abs(b - a)


def changing(codes: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> tuple[float, float]:
    """Return the part of a range outside of which codes do not change."""
    for _ in range(8):
        points = points_of(low, high)
        seen = codes(points)
        differs = np.flatnonzero(seen != seen[0]), np.flatnonzero(seen != seen[-1])
        if not differs[0].size:
            return low, high
        ends = points[max(differs[0][0] - 1, 0)], points[min(differs[1][-1] + 1, points.size - 1)]
        if ends[1] - ends[0] > 0.5 * (high - low):
            return float(ends[0]), float(ends[1])
        low, high = (float(end) for end in ends)
    return low, high


def points_of(low: float, high: float) -> np.ndarray:
    """Return where a range is looked at, in order: evenly, and ever closer to zero."""
    near = np.geomspace(1e-6, 1.0, POINTS // 16) * max(abs(low), abs(high))
    return np.unique(np.concatenate([np.linspace(low, high, POINTS), near, -near, [0.0]]).clip(low, high))
