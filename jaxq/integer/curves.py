"""Functions that nobody has a grid for, in fifteen bits: a gate that is multiplied, a GELU that is added.

Of an int8 value a function is a table of its 256 values; of a sum, lines between 257 of them, as in the tables of
TensorFlow Lite for 16 bits, over the range in which it changes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic, octaves
from jaxq.integer.scales import narrowed, rescaled
from jaxq.integer.tables import POINTS, changing, check, evaluate, looked_up, points_of
from jaxq.integer.values import INT8, Affine, Coded, Constant, Line, Mapped, Refusal, ones, wide

# Bits of a function's values, and of what lies between two of its points; bits of its argument's farthest point.
BITS, FARTHEST = 15, 29
SEGMENTS = 256
# How many steps of its values a function that does not change may change by.
COARSE = 8
# How many of 255 steps lines may be off between two points: a function by itself, and one that is added to a line.
FEW, SOME = 1, 6
# The part of a function that points by octaves may leave it by: to be taken first, and to be taken at all.
CLOSE, NEAR = 2.0**-10, 2.0**-8


def made(value: Mapped) -> Coded:
    """Return a function's codes on a grid of its own, where nobody who takes it has one.

    Points by octaves are as near to small values as to large ones, evenly spaced ones where the function is fast far
    from zero. Raises `Refusal` where neither follow it.
    """
    line = value.line
    if line.root.is_narrow and line.root.scale.size == 1:
        return _alone(line)
    return _first(_octaves(CLOSE), _evenly, _octaves(NEAR), told=1)(line)


def formed(x: Any) -> Any:
    """Return a value that is more than a function yet to be made."""
    return made(x) if isinstance(x, Mapped) else x


def placed(value: Mapped, grid: Affine) -> Coded:
    """Return a function's int8 codes on the grid of who takes it. Raises `Refusal` where nothing follows it."""
    return narrowed(_first(lambda line: looked_up(line, grid), _octaves(NEAR), told=0)(value.line), grid)


def _octaves(part: float) -> Callable[[Line], Coded]:
    return lambda line: octaves.followed(line, part)


def _first(*ways: Callable[[Line], Coded], told: int) -> Callable[[Line], Coded]:
    """Return what makes a function's codes by the first of several ways that can. told: the number of that which says
    why none can."""

    def tried(line: Line) -> Coded:
        reasons: list[Refusal] = []
        for way in ways:
            try:
                return way(line)
            except Refusal as why:
                reasons.append(why)
        raise reasons[told]

    return tried


def _evenly(line: Line) -> Coded:
    """Return a function's codes by a table of evenly spaced points.

    What is proved of a sum is much wider than what it holds, so that steps over all that a function might be would be
    too coarse. A bounded function has a grid all the same; one that grows like a line on either side (GELU, SiLU, ELU)
    is that line, in int32, plus a bounded rest, which is the table.
    """
    if (line.root.is_narrow and line.root.scale.size == 1) or _is_bounded(line):
        return _alone(line)
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
    return arithmetic.add(None, straight, _alone(rest, SOME, _far(line) * 2.0**-25))


def _alone(line: Line, few: int = FEW, finest: float = 0.0) -> Coded:
    """Return a function's codes in 2^15 steps of what it may be; finest: the steps below which it is float rounding."""
    low, high = _span(line)
    scale = max((high - low) / 2**BITS, finest) or 1.0
    root = line.root
    return _of_codes(line, scale) if root.is_narrow and root.scale.size == 1 else _of_sums(line, scale, few)


def _of_codes(line: Line, scale: float) -> Coded:
    """Return a function of int8 codes: 256 of its values."""
    root, every = line.root, np.arange(INT8[0], INT8[1] + 1)
    own, zero = float(root.scale.max()), root.zero_point
    values = _steps(line, scale, (own * (every - zero)).clip(*root.ends))
    codes = _taken(values, lax.convert_element_type(root.codes, jnp.int32) - np.int32(INT8[0]))
    used = values[int(root.low.min()) + zero - INT8[0] : int(root.high.max()) + zero - INT8[0] + 1]
    return _between(codes, scale, used)


def _of_sums(line: Line, scale: float, few: int) -> Coded:
    """Return a function of int32 sums: straight lines between 257 of its values, in the range in which it changes."""
    low, high = changing(lambda x: np.rint(evaluate(line, x) / (scale * COARSE)), *line.root.ends)
    farthest = max(abs(low), abs(high), 1e-30)
    count = int(np.clip((high - low) / farthest * 2.0 ** (FARTHEST - BITS), 1, SEGMENTS))
    unit = max((high - low) / (count << BITS), farthest / 2**FARTHEST, float(line.root.scale.min()) / 2**BITS)
    first = math.floor(low / (unit * 2**BITS)) << BITS
    count = max(math.ceil(high / (unit * 2**BITS)) - (first >> BITS), 1)
    nodes = (unit * (first + (np.arange(count + 1) << BITS))).clip(*line.root.ends)
    values = _steps(line, scale, nodes)
    _check_lines(line, nodes, values, scale, few)
    place = rescaled(line.root, ones(unit, line.root.codes.ndim)).codes
    # Computed once: XLA would do it again for each of the three that read it.
    place = lax.clamp(np.int32(first), place, np.int32(first + (count << BITS))) - np.int32(first)
    place = lax.optimization_barrier(place)
    segment = lax.min(place >> BITS, np.int32(count - 1))
    rise = _taken(np.diff(values), segment) * (place - (segment << BITS))
    codes = lax.optimization_barrier(_taken(values, segment) + ((rise + (1 << (BITS - 1))) >> BITS))
    return _between(codes, scale, values)


def _between(codes: jax.Array, scale: float, values: np.ndarray) -> Coded:
    """Return codes that are some of these values, or between two of them."""
    low, high = (ones(end, codes.ndim, np.int64) for end in (values.min(), values.max()))
    return wide(codes, ones(scale, codes.ndim), low, high)


def _check_lines(line: Line, nodes: np.ndarray, values: np.ndarray, scale: float, few: int) -> None:
    """Refuse lines that the function leaves between two points, in steps of which it has 255."""
    if nodes[0] == nodes[-1]:
        return
    unit = scale * 2**BITS / 255
    points = np.linspace(nodes[0], nodes[-1], POINTS)
    segments = np.searchsorted(nodes, points, side="right").clip(1, len(nodes) - 1)
    found = np.interp(points, nodes, values) * (scale / unit)
    check(line, lambda x: evaluate(line, x) / unit, points, found, segments, few)


def _steps(line: Line, scale: float, reals: np.ndarray) -> np.ndarray:
    return np.rint(evaluate(line, reals) / scale).astype(np.int64)


def _taken(table: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table, jnp.int32), index, mode="clip")


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
    values = evaluate(line, points_of(times * low, times * high))
    return min(float(values.min()), 0.0), max(float(values.max()), 0.0)


def _far(line: Line) -> float:
    """Return the largest size of a function's argument."""
    return max(map(abs, line.root.ends))


def _slopes(line: Line) -> tuple[float, float]:
    """Return how fast a function grows far to the left and far to the right, where its argument may be."""
    far, (low, high) = _far(line), line.root.ends
    return (_slope(line, -far) if low < 0 else 0.0), (_slope(line, far) if high > 0 else 0.0)


def _slope(line: Line, far: float) -> float:
    """Return how fast a function grows from one place to twice as far."""
    a, b = evaluate(line, far * np.array([1.0, 2.0]))
    return float((b - a) / far)
