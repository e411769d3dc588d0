"""Softmax and norms, however they are written: found by dataflow, recognized by running the user's own equations.

What is computed from a value by reductions over the same axes, and element by element from there, is a function of its
rows. It is run on rows of known numbers: what is a softmax, or a norm with some gain and bias, on all of them, is that,
and has integers of its own (`softmax`, `norms`). A LayerNorm in one pass, in two, or by a standard deviation are one.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic
from jaxq.integer.moves import MOVES
from jaxq.integer.norms import normalized
from jaxq.integer.softmax import softmax
from jaxq.integer.tables import ELEMENTWISE, once, run
from jaxq.integer.values import Coded, Constant, Mapped, Rowed, Rows, Value, as_array, line_of
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn

REDUCTIONS = frozenset({lax.reduce_sum_p, lax.reduce_max_p, lax.reduce_min_p})
# How close a function comes to a softmax, and to a norm over the size of its gain.
CLOSE, NEAR = 1e-4, 1e-3
DRAWS = 3


def composed(eqn: Eqn, operands: Sequence[Value]) -> Rows | None:
    """Return an equation's result as a function of the rows of one value; None if it is not one."""
    data = [x for x in operands if isinstance(x, Coded | Mapped | Rowed)]
    constants = [x for x in operands if isinstance(x, Constant)]
    if len(data) + len(constants) < len(operands) or any(c.array is None for c in constants):
        return None
    reduces = eqn.primitive in REDUCTIONS
    if not (reduces or (any(x.rows for x in data) and eqn.primitive in ELEMENTWISE | MOVES)):
        return None
    parts = [x.rows or _alone(x) for x in data]
    found = next((rows for rows in parts if rows.axes), parts[0])
    parts = [_alone(found.root) if x is found.root else rows for x, rows in zip(data, parts, strict=True)]
    if any(rows.root is not found.root for rows in parts):
        return None
    axes = frozenset().union(*(rows.axes for rows in parts))
    if reduces and eqn.invars[0].aval.shape == found.root.codes.shape:
        axes |= set(eqn.params["axes"])

    def of(x: jax.Array) -> jax.Array:
        rest = iter(parts)
        pairs = zip(operands, eqn.invars, strict=True)
        args = [as_array(o, v.aval) if isinstance(o, Constant) else next(rest).of(x) for o, v in pairs]
        return run(eqn, args)

    return Rows(found.root, axes, once(of))


def _alone(x: Value) -> Rows:
    """Return a value as a function, element by element, of what it comes from."""
    line = line_of(x)
    assert line is not None
    return Rows(line.root, frozenset(), line.of)


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax:
    """`softmax(slope x)`."""

    slope: float

    def carried_out(self, rows: Rows) -> Coded:
        return softmax(rows.root, self.slope, sorted(rows.axes))


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """`gain d / sqrt(mean(d^2) + epsilon) + bias`. gain, bias: of the rows' rank, with ones where all are alike."""

    gain: np.ndarray
    bias: np.ndarray
    epsilon: float
    centered: bool

    def carried_out(self, rows: Rows) -> Coded:
        whole = normalized(rows.root, sorted(rows.axes), centered=self.centered, epsilon=self.epsilon)
        gained = arithmetic.scaled(whole, self.gain)
        return arithmetic.add(None, gained, Constant(self.bias)) if np.any(self.bias) else gained


def completes(rows: Rows, eqn: Eqn, operands: Sequence[Value]) -> bool:
    """Tell whether an equation without integers of its own gives rows as long as those it is a function of."""
    aval = eqn.outvars[0].aval
    waits = any(isinstance(x, Mapped | Rowed) for x in operands)
    return waits and aval.shape == rows.root.codes.shape and jaxpr.is_float(aval)


def is_symbolic(rows: Rows) -> bool:
    """Tell whether the shape is not known in numbers, so that no rows can be drawn."""
    return not all(isinstance(n, int) for n in rows.root.codes.shape)


def is_counted(rows: Rows) -> bool:
    """Tell whether it is known in numbers how long the rows are."""
    return all(isinstance(rows.root.codes.shape[axis], int) for axis in rows.axes)


def recognized(rows: Rows) -> Softmax | Norm | None:
    """Return what a function of rows is; None for others, and where the shape is not known in numbers."""
    if is_symbolic(rows) or not rows.root.codes.size:
        return None
    probe = _Probe(rows)
    slope = probe.softmax()
    if slope is not None:
        # What hides a position is far below; far above, it would be all that counts.
        above = rows.root.ends[1] if slope > 0 else -rows.root.ends[0]
        return Softmax(slope) if above < rows.root.far else None
    return probe.norm() if rows.root.far == math.inf else None


class _Probe:
    """Runs a function on rows of normal numbers around an offset, from one step of its argument to all it may be."""

    def __init__(self, rows: Rows):
        self.rows, self.axes = rows, tuple(sorted(rows.axes))
        self.step = float(rows.root.scale.min())
        self.far = max(*map(abs, rows.root.ends), self.step)
        self.each = tuple(1 if axis in rows.axes else n for axis, n in enumerate(rows.root.codes.shape))
        self.count = math.prod(self.each)
        self.rng = np.random.default_rng(0)

    def of(self, x: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.asarray(self.rows.of(jnp.asarray(x, jnp.float32))).astype(np.float64)

    def draw(self, low: float, high: float) -> np.ndarray:
        """Return rows whose sizes are evenly spread between two, on a scale of logarithms."""
        sizes = np.geomspace(low, high, self.count) if self.count > 1 else np.sqrt([low * high])
        rows = self.rng.normal(size=self.rows.root.codes.shape) + 0.5 * self.rng.normal(size=self.each)
        return (rows * self.rng.permutation(sizes).reshape(self.each)).astype(np.float32).astype(np.float64)

    def draws(self, count: int) -> Iterator[np.ndarray]:
        """Yield at least so many rows, from one step of the argument to all it may be."""
        ends = np.geomspace(self.step, self.far, math.ceil(count / self.count) + 1)
        for low, high in zip(ends, ends[1:], strict=False):
            yield self.draw(low, high)

    # --- softmax

    def softmax(self) -> float | None:
        """Return the slope of a softmax; None where it is not one."""
        slope = None
        for size in np.geomspace(0.01, 10, 4):  # of the slope's inverse, which is not known at first
            x = self.draw(size, size) / abs(slope or 1.0)
            slope = slope or self._slope(x, self.of(x))
            if slope is None or not np.isfinite(slope) or not self._is_softmax(slope, x):
                return None
        # All that the argument may be, and rows that are far from zero as a whole.
        near = self.draw(1.0, 1.0) / abs(slope)
        offset = [near + share * self.far for share in (-1.0, -0.01, 0.01, 1.0)]
        return slope if all(self._is_softmax(slope, x) for x in (*self.draws(20), *offset)) else None

    def _is_softmax(self, slope: float, x: np.ndarray) -> bool:
        """Tell whether it is one on some rows, as far as float32 tells, but for rows for which floats do not reach."""
        x = x.astype(np.float32).astype(np.float64)
        y = self.of(x)
        reached = np.isfinite(y).all(self.axes, keepdims=True)
        allowed = CLOSE + 1e-6 * np.abs(slope * x).max(self.axes, keepdims=True)
        return bool(np.all(~reached | (np.abs(np.where(reached, y, 0) - self._softmax(slope * x)) <= allowed)))

    def _slope(self, x: np.ndarray, y: np.ndarray) -> float | None:
        """Return how fast the logarithm grows, by least squares, where a row says so."""
        if not np.isfinite(y).all() or y.min() < 0:
            return None
        dx = x - x.mean(self.axes, keepdims=True)
        z = np.log(np.maximum(y, 1e-30))
        dz = np.where(y > 1e-20, z - z.mean(self.axes, keepdims=True), 0)
        slope = float((dx * dz).sum() / max((dx * dx).sum(), 1e-300))
        return slope or None

    def _softmax(self, x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(self.axes, keepdims=True))
        return powers / powers.sum(self.axes, keepdims=True)

    # --- norms

    def norm(self) -> Norm | None:
        """Return a norm's parts; None where it is not one."""
        high = 1e3 * self.far  # beside which no epsilon counts
        draws = [self.draw(high, high) for _ in range(DRAWS)]
        pairs = [(self.of(x), self.of(-x)) for x in draws]
        if not all(np.isfinite(y).all() for pair in pairs for y in pair):
            return None
        odd = [(a - b) / 2 for a, b in pairs]
        bias = np.mean([(a + b) / 2 for a, b in pairs], axis=0)
        for centered in (True, False):
            units = [self._unit(x, centered) for x in draws]
            weight = sum(u * u for u in units)
            if not weight.all():
                continue
            gain = sum(u * y for u, y in zip(units, odd, strict=True)) / weight
            gain, bias = (_alike(c, np.abs(gain).max()) for c in (gain, bias))
            if all(self._near(a, gain * u + bias, gain) for u, (a, _) in zip(units, pairs, strict=True)):
                return self._with_epsilon(gain, bias, centered)
        return None

    def _with_epsilon(self, gain: np.ndarray, bias: np.ndarray, centered: bool) -> Norm | None:
        """Return the norm with what its smallest rows show of an epsilon, if it is the function on all rows."""
        seen = []
        for x in self.draws(40):
            unit, y = gain * self._unit(x, centered), self.of(x) - bias
            below = (unit * unit).sum(self.axes, keepdims=True)
            share = (unit * y).sum(self.axes, keepdims=True) / np.where(below > 0, below, 1)
            shown = (share > 0.1) & (share < 1 - NEAR / 10)
            seen.extend((self._square(x, centered) * (1 / np.where(shown, share, 1) ** 2 - 1))[shown])
        epsilon = float(np.median(seen)) if seen else 0.0
        found = Norm(gain, bias, epsilon, centered)
        for x in self.draws(40):
            if not self._near(self.of(x), gain * self._unit(x, centered, epsilon) + bias, gain):
                return None
        return found

    def _deviation(self, x: np.ndarray, centered: bool) -> np.ndarray:
        return x - x.mean(self.axes, keepdims=True) if centered else x

    def _square(self, x: np.ndarray, centered: bool) -> np.ndarray:
        return (self._deviation(x, centered) ** 2).mean(self.axes, keepdims=True)

    def _unit(self, x: np.ndarray, centered: bool, epsilon: float = 0.0) -> np.ndarray:
        square = self._square(x, centered) + epsilon
        return self._deviation(x, centered) / np.sqrt(np.where(square > 0, square, 1))

    def _near(self, y: np.ndarray, other: np.ndarray, gain: np.ndarray) -> bool:
        return bool(np.isfinite(y).all() and np.abs(y - other).max() <= NEAR * np.abs(gain).max())


def _alike(c: np.ndarray, size: float) -> np.ndarray:
    """Return numbers with ones for the axes along which they are alike, and zero and one, as far as float32 tells."""
    for axis in range(c.ndim):
        if np.ptp(c, axis).max() <= 1e-5 * size:
            c = c.mean(axis, keepdims=True)
    return np.where(np.abs(c) <= 1e-6 * size, 0.0, np.where(np.abs(c - 1) <= 1e-6, 1.0, c))
