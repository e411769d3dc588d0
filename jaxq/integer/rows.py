"""Softmax and norms, however they are written: found by dataflow, recognized by running the user's own equations.

What goes back to one value by reductions along rows, and element by element from there, is run on rows of known
numbers (`origins`): what is a softmax, or its logarithm's sum, or a norm with some gain and bias, on all of them, is
that, and has integers of its own (`softmax`, `norms`). A LayerNorm in one pass, in two, or by a standard deviation are
one, and so is a norm of groups.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer import arithmetic, curves, softmax
from jaxq.integer.moves import reshaped
from jaxq.integer.norms import normalized
from jaxq.integer.origins import Cut, View, cuts
from jaxq.integer.tables import ELEMENTWISE
from jaxq.integer.values import Coded, Constant, Mapped, Refusal, Rowed
from jaxq.programs import jaxpr

# How close a function comes to a softmax, and to a norm over the size of its gain.
CLOSE, NEAR = 1e-4, 1e-3
DRAWS, OFFSETS = 3, 24
Shape = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax:
    """`softmax(slope x)`."""

    slope: float

    def carried_out(self, x: Coded, view: View, shape: Shape) -> Coded:
        return reshaped(softmax.softmax(reshaped(x, view.shape), self.slope, view.axes), shape)


@dataclasses.dataclass(frozen=True, eq=False)
class LogSumExp:
    """`log(sum(exp(x)))`, or, if shifted, `log(sum(exp(x - max(x))))`."""

    shifted: bool

    def carried_out(self, x: Coded, view: View, shape: Shape) -> Coded:
        return reshaped(softmax.log_sum_exp(reshaped(x, view.shape), view.axes, shifted=self.shifted), shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """`gain d / sqrt(mean(d^2) + epsilon) + bias`. gain, bias: of the result's rank, with ones where all are alike."""

    gain: np.ndarray
    bias: np.ndarray
    epsilon: float
    centered: bool

    def carried_out(self, x: Coded, view: View, shape: Shape) -> Coded:
        whole = normalized(reshaped(x, view.shape), view.axes, centered=self.centered, epsilon=self.epsilon)
        gained = arithmetic.scaled(reshaped(whole, shape), self.gain)
        return arithmetic.add(None, gained, Constant(self.bias)) if np.any(self.bias) else gained


Form = Softmax | LogSumExp | Norm


class Found(NamedTuple):
    """What completes a form. number: of the cut that it is a function of."""

    number: int
    form: Form


def may_complete(eqn: Any, operands: Sequence[Any]) -> bool:
    """Tell whether an equation is worth a look: operands without integers so far, or one that may have none itself."""
    if eqn.primitive not in ELEMENTWISE:  # which ends nothing, though powers of rows of one number are their softmax
        return False
    return eqn.primitive in (lax.log_p, lax.div_p) or any(isinstance(x, Mapped | Rowed) for x in operands)


def completed(eqn: Any, result: Rowed, known: Found | None) -> tuple[Found, Coded] | None:
    """Return what an equation completes, and its integers; None if nothing.

    known: what it was found to be before, which it is where shapes have symbols or nothing in them. Raises `Refusal`
    for a softmax or a norm of too many numbers.
    """
    shape = eqn.outvars[0].aval.shape
    if not jaxpr.is_float(eqn.outvars[0].aval):
        return None
    # The farthest first: a softmax of x rather than of x less its maximum.
    for number, cut in reversed([*enumerate(cuts(result))]):
        view = cut.view
        if view is None or math.prod(shape) != math.prod(view.each if eqn.primitive is lax.log_p else view.shape):
            continue
        try:
            root = curves.formed(cut.root)
        except Refusal:
            continue
        if all(isinstance(n, int) for n in root.shape) and root.codes.size:
            form = _recognized(cut, root, view, shape)
        else:
            counted = all(isinstance(view.shape[axis], int) for axis in view.axes)
            form = known.form if known is not None and known.number == number and counted else None
        if form is not None:
            return Found(number, form), form.carried_out(root, view, shape)
    return None


def _recognized(cut: Cut, root: Coded, view: View, shape: Shape) -> Form | None:
    """Return what a function of rows is; None for others."""
    probe = _Probe(cut, root, view, shape)
    if math.prod(shape) != math.prod(view.shape):
        sums = probe.log_sum_exp()
        # The largest of a row may be a number that stands for a larger one.
        is_told = sums is None or root.far == math.inf or (sums.shifted and root.ends[1] < root.far)
        return sums if is_told else None
    slope = probe.softmax()
    if slope is not None:
        # What hides a position is far below; far above, it would be all that counts.
        above = root.ends[1] if slope > 0 else -root.ends[0]
        return Softmax(slope) if above < root.far else None
    return probe.norm() if root.far == math.inf else None


class _Probe:
    """Runs a function on rows of normal numbers around an offset, from one step of its argument to all it may be."""

    def __init__(self, cut: Cut, root: Coded, view: View, shape: Shape):
        self.cut, self.shape, self.view, self.result = cut, root.shape, view.shape, shape
        self.axes, self.each = view.axes, view.each
        self.step = float(root.scale.min())
        self.far = max(*map(abs, root.ends), self.step)
        self.count = math.prod(self.each)
        self.rng = np.random.default_rng(0)

    def of(self, x: np.ndarray) -> np.ndarray:
        """Return the function's values, in the shape of rows, or with one number for each."""
        with jax.ensure_compile_time_eval():
            y = np.asarray(self.cut.of(jnp.asarray(x, jnp.float32).reshape(self.shape)), np.float64)
        return y.reshape(self.view if y.size == x.size else self.each)

    def draw(self, low: float, high: float) -> np.ndarray:
        """Return rows whose sizes are evenly spread between two, on a scale of logarithms."""
        sizes = np.geomspace(low, high, self.count) if self.count > 1 else np.sqrt([low * high])
        rows = self.rng.normal(size=self.view) + 0.5 * self.rng.normal(size=self.each)
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
        if self.view == self.each:  # rows of one number
            return 1.0
        dx = x - x.mean(self.axes, keepdims=True)
        z = np.log(np.maximum(y, 1e-30))
        dz = np.where(y > 1e-20, z - z.mean(self.axes, keepdims=True), 0)
        slope = float((dx * dz).sum() / max((dx * dx).sum(), 1e-300))
        return slope or None

    def _softmax(self, x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(self.axes, keepdims=True))
        return powers / powers.sum(self.axes, keepdims=True)

    def log_sum_exp(self) -> LogSumExp | None:
        """Return the logarithm of a sum of powers, shifted by the largest number or not; None where it is neither."""
        fits, near = [LogSumExp(False), LogSumExp(True)], self.draw(1.0, 1.0)
        offsets = np.geomspace(0.05, max(self.far, 0.1), OFFSETS)
        around = [near + sign * offset for offset in offsets for sign in (-1, 1)]
        for x in (near, self.draw(0.01, 10.0), *self.draws(20), *around):
            y, top = self.of(x), x.max(self.axes, keepdims=True)
            above = np.log(np.exp(x - top).sum(self.axes, keepdims=True))
            reached, allowed = np.isfinite(y), CLOSE + 1e-6 * np.abs(x).max(self.axes, keepdims=True)

            def fits_row(form: LogSumExp, y=y, above=above, top=top, reached=reached, allowed=allowed) -> bool:
                wanted = above if form.shifted else above + top
                return bool(np.all(~reached | (np.abs(np.where(reached, y, 0) - wanted) <= allowed)))

            fits = [form for form in fits if fits_row(form)]
        return fits[0] if fits else None

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
                epsilon = self._epsilon(gain, bias, centered)
                gain, bias = (self._of_result(c, np.abs(gain).max()) for c in (gain, bias))
                return None if epsilon is None else Norm(gain, bias, epsilon, centered)
        return None

    def _of_result(self, c: np.ndarray, size: float) -> np.ndarray:
        """Return numbers for each of the result's, with ones for the axes along which they are alike."""
        return _alike(np.broadcast_to(c, self.view).reshape(self.result), size)

    def _epsilon(self, gain: np.ndarray, bias: np.ndarray, centered: bool) -> float | None:
        """Return the epsilon that the smallest rows of a norm show, if it is the function on all rows."""
        seen = []
        for x in self.draws(40):
            unit, y = gain * self._unit(x, centered), self.of(x) - bias
            below = (unit * unit).sum(self.axes, keepdims=True)
            share = (unit * y).sum(self.axes, keepdims=True) / np.where(below > 0, below, 1)
            shown = (share > 0.1) & (share < 1 - NEAR / 10)
            seen.extend((self._square(x, centered) * (1 / np.where(shown, share, 1) ** 2 - 1))[shown])
        epsilon = float(np.median(seen)) if seen else 0.0
        for x in self.draws(40):
            if not self._near(self.of(x), gain * self._unit(x, centered, epsilon) + bias, gain):
                return None
        return epsilon

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
