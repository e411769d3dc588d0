"""Any function of one int8 value as 256 codes: found by dataflow, built by running the user's own equations.

Element by element, equations of one value and scalars compose to a function of it (`composed`), however often the value
is used: `x * sigmoid(x)` is one function. It becomes a table when it is known on which grid its result is wanted. If
the value is wide, it is rounded to 256 steps first, over the range that the *result* needs: outside of it no code of
the result changes. So the range of a table's input is neither measured nor guessed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic
from jaxq.integer.scales import narrowed
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
# How many codes a table may be off between two steps of its argument: one by itself, one that is added to a line.
FEW, SOME = 4, 24
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


def _evaluate(line: Line, reals: np.ndarray) -> np.ndarray:
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


def looked_up(line: Line, affine: Affine, few: int = FEW) -> Coded:
    """Return a function's int8 codes on a grid: its argument's codes, looked up in a table, at most `few` codes off."""
    root, grid = _narrow_root(line, affine)
    every = np.arange(INT8[0], INT8[1] + 1)
    table = affine.codes_of(_evaluate(line, (grid.scale * (every - grid.zero_point)).clip(*line.root.ends)))
    if root is not line.root:
        _check_steps(line, affine, grid, table, few)
    index = lax.convert_element_type(root.codes, jnp.int32) - np.int32(INT8[0])
    codes = jnp.take(jnp.asarray(table, jnp.int8), index, mode="clip")
    used = table[grid.low - INT8[0] : grid.high - INT8[0] + 1] - affine.zero_point
    low, high = (ones(end, codes.ndim, np.int64) for end in (used.min(), used.max()))
    return Coded(codes, ones(affine.scale, codes.ndim), low, high, affine.zero_point)


def _narrow_root(line: Line, affine: Affine) -> tuple[Coded, Affine]:
    """Return the argument in int8 codes, and their grid."""
    root = line.root
    if root.is_narrow and root.scale.size == 1:
        zero = root.zero_point
        return root, Affine(float(root.scale.max()), zero, int(root.low.min()) + zero, int(root.high.max()) + zero)
    low, high = _changing(lambda x: affine.codes_of(_evaluate(line, x)), *root.ends)
    spare = max(0.0, 254 * float(root.scale.min()) - (high - low)) / 2  # steps are no finer than the argument's own
    low, high = low - spare, high + spare
    scale = (high - low) / 254  # one step less than there are, as the zero point is rounded
    grid = Affine(scale, INT8[0] - int(np.rint(low / scale)))
    return narrowed(root, grid), grid


def _check_steps(line: Line, affine: Affine, grid: Affine, table: np.ndarray, few: int) -> None:
    """Refuse a table that a function leaves between two steps of its argument, as a norm does near zero.

    Where a function jumps, as a sign does, no table follows it: that is at isolated points.
    """

    def codes(reals: np.ndarray) -> np.ndarray:
        return affine.codes_of(_evaluate(line, reals))

    ends = (grid.scale * (np.array(INT8) - grid.zero_point + np.array([-0.5, 0.5]))).clip(*line.root.ends)
    points = np.linspace(ends[0], ends[1], POINTS)
    steps = grid.codes_of(points) - INT8[0]
    off = np.abs(codes(points) - table[steps])
    bad = np.unique(steps[off > few])
    if bad.size and (bad.size > JUMPS or np.any(_largest(off, steps, bad) > few + _jumps(codes, points, steps, bad))):
        raise Refusal(
            f"takes {line.name} of a 32-bit sum, which changes too fast: 256 steps of the sum do not follow "
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


def _changing(codes: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> tuple[float, float]:
    """Return the part of a range outside of which codes do not change."""
    for _ in range(8):
        points = _points(low, high)
        seen = codes(points)
        differs = np.flatnonzero(seen != seen[0]), np.flatnonzero(seen != seen[-1])
        if not differs[0].size:
            return low, high
        ends = points[max(differs[0][0] - 1, 0)], points[min(differs[1][-1] + 1, points.size - 1)]
        if ends[1] - ends[0] > 0.5 * (high - low):
            return float(ends[0]), float(ends[1])
        low, high = (float(end) for end in ends)
    return low, high


def _points(low: float, high: float) -> np.ndarray:
    """Return where a range is looked at, in order: evenly, and ever closer to zero."""
    near = np.geomspace(1e-6, 1.0, POINTS // 16) * max(abs(low), abs(high))
    return np.unique(np.concatenate([np.linspace(low, high, POINTS), near, -near, [0.0]]).clip(low, high))


# --- functions that nobody has a grid for ----------------------------------------------------------------------------


def made(value: Mapped) -> Coded:
    """Return a function's codes on a grid of its own, where nobody who takes it has one.

    What is proved of a sum is much wider than what it holds, so that 256 steps over all that a function might be would
    be too coarse. A bounded function has a grid all the same; one that grows like a line on either side (GELU, SiLU,
    ELU) is that line, in int32, plus a bounded rest, which is the table.
    """
    line = value.line
    if (line.root.is_narrow and line.root.scale.size == 1) or _is_bounded(line):
        return _on_own_grid(line)
    left, right = _slopes(line)
    rest = line._replace(of=lambda x: line.of(x) - left * jnp.minimum(x, 0) - right * jnp.maximum(x, 0))
    if not _is_bounded(rest):
        raise Refusal(
            f"takes {line.name} of a 32-bit sum, for which no range is known, and which is neither bounded nor grows "
            "like a line: have a site of the plan take it as it is, or bound it"
        )
    zero = Constant(np.zeros(()))
    below = arithmetic.scaled(arithmetic.minimum(None, line.root, zero), np.array(left))
    above = arithmetic.scaled(arithmetic.maximum(None, line.root, zero), np.array(right))
    straight = arithmetic.add(None, below, above) if left and right else below if left else above
    return arithmetic.add(None, straight, _on_own_grid(rest, SOME, _far(line) * 2.0**-25))


def _on_own_grid(line: Line, few: int = FEW, finest: float = 0.0) -> Coded:
    """Return a function's codes in 255 steps of what it may be; finest: the steps below which it is float rounding."""
    low, high = _span(line)
    scale = max((high - low) / 255, finest) or 1.0
    return looked_up(line, Affine(scale, INT8[0] - int(np.rint(low / scale))), few)


def _is_bounded(line: Line) -> bool:
    """Tell whether a function reaches no more than twice as far over four times what its argument may be.

    What is left of float rounding, beside the argument, does not count.
    """
    (low, high), further = _span(line), _span(line, 4)
    noise = 1e-5 * _far(line)
    return further[1] - further[0] <= 2 * (high - low) + noise


def _span(line: Line, times: int = 1) -> tuple[float, float]:
    """Return the smallest and the largest value of a function, zero included."""
    low, high = line.root.ends
    values = _evaluate(line, _points(times * low, times * high))
    return min(float(values.min()), 0.0), max(float(values.max()), 0.0)


def _far(line: Line) -> float:
    """Return the largest size of a function's argument."""
    return max(map(abs, line.root.ends))


def _slopes(line: Line) -> tuple[float, float]:
    """Return how fast a function grows far to the left and far to the right."""
    far = _far(line)
    a, b, c, d = _evaluate(line, far * np.array([-2.0, -1.0, 1.0, 2.0]))
    return float((b - a) / far), float((d - c) / far)
