"""Functions that change the faster the nearer their argument is to zero: roots, logarithms, powers, one over a value.

Points at even distances do not follow them. Points that come 32 to each octave of the argument do, as near to zero as
the argument's steps go: where a code is among them is read from its first bits, as from those of a float.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.integer.scales import uniform, widened
from jaxq.integer.tables import evaluate
from jaxq.integer.values import Coded, Line, Refusal, ones, wide

# Bits of an octave's points, of a place between two of them, of a function's values.
POINTS, PLACE, BITS = 5, 11, 24
# At how many codes a function is asked; the part of its argument below which the last of its bits may be missing.
ASKED, SMALL = 2**13, 2.0**-12


def followed(line: Line, part: float) -> Coded:
    """Return a function of sums in lines between the points of octaves.

    Raises `Refusal` where they leave the function by more than a part of what it is or changes by within two octaves,
    and than it changes by within a step of its argument.
    """
    root, finest = widened(uniform(line.root)), float(line.root.scale.min())
    low, high = int(root.low.min()), int(root.high.max())
    side_of = functools.partial(_Side, line._replace(root=root), finest / float(root.scale.max()))
    sides = [side_of(sign, reach) for sign, reach in ((1, high), (-1, -low)) if reach > 0] or [side_of(1, 0)]
    scale = max(side.finest for side in sides) or 1.0
    tables = [np.rint(side.values / scale).astype(np.int64) for side in sides]
    for side, table in zip(sides, tables, strict=True):
        side.check(table, scale, part)
    codes = lax.optimization_barrier(root.codes)  # computed once, for all that read it
    if len(sides) > 1:  # one table after the other
        found = _looked_up(np.concatenate(tables), lax.abs(codes), jnp.where(codes < 0, np.int32(tables[0].size), 0))
    else:
        found = _looked_up(tables[0], lax.max(codes * sides[0].sign, 0), 0)
    ends = min(table.min() for table in tables), max(table.max() for table in tables)
    low_end, high_end = (ones(end, found.ndim, np.int64) for end in ends)
    return wide(found, ones(scale, found.ndim), low_end, high_end)


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    """A function on one side of zero. step: of its argument, before it was brought to one scale, in codes; sign: of its
    argument; reach: the largest code, without sign."""

    line: Line
    step: float
    sign: int
    reach: int

    def of(self, codes: np.ndarray, beyond: float = 0.0) -> np.ndarray:
        """Return what the function is at codes without sign, as far as its argument may go, and a part beyond."""
        reals = self.sign * float(self.line.root.scale.max()) * np.asarray(codes, np.float64)
        low, high = self.line.root.ends
        return evaluate(self.line, reals.clip(low - beyond * abs(low), high + beyond * abs(high)))

    @functools.cached_property
    def values(self) -> np.ndarray:
        """What the function is at every point, and at those around its ends."""
        points = _points(np.arange(int(_segment(np.array(self.reach))) + 2))
        return self.of(points, beyond=2.0 ** (1 - POINTS))

    @property
    def finest(self) -> float:
        """The scale in which values have 24 bits, and lines between two points rise by no more than 19."""
        rises = np.abs(np.diff(self.values[2 << POINTS :]))
        return max(float(np.abs(self.values).max()) / 2**BITS, float(rises.max(initial=0.0)) / 2 ** (30 - PLACE))

    def check(self, table: np.ndarray, scale: float, part: float) -> None:
        """Raise `Refusal` where lines between numbers leave the function."""
        spread = np.geomspace(1, max(self.reach, 1), ASKED).astype(np.int64)
        codes = np.unique(np.concatenate([np.arange(2**8), spread]).clip(max=self.reach))
        segment = _segment(codes)
        below, above = _points(segment), _points(segment + 1)
        rise = table[segment + 1] - table[segment]
        found = scale * (table[segment] + (codes - below) / (above - below) * rise)
        true, octaves = self.of(codes), np.abs(self.of(2 * codes) - self.of(codes / 2))
        steps = np.abs(self.of(codes + self.step / 2) - self.of(codes - self.step / 2))
        rounding = np.where(codes < SMALL * self.reach, scale, 0.0)
        if np.any(np.abs(found - true) > part * (np.abs(true) + octaves) + steps + rounding):
            raise Refusal(f"takes {self.line.name} of a 32-bit sum, which is too small where its argument is large")


def _segment(codes: np.ndarray) -> np.ndarray:
    """Return the number of the last point that is not beyond a code: `(s << 5) + (code >> s)`, six bits of it left."""
    shift = np.maximum(np.frexp(codes.astype(np.float64))[1] - POINTS - 1, 0)
    return (shift << POINTS) + (codes >> shift)


def _points(numbers: np.ndarray) -> np.ndarray:
    """Return the codes that points are at."""
    shift = np.maximum((numbers >> POINTS) - 1, 0)
    return (numbers - (shift << POINTS)) << shift


def _looked_up(table: np.ndarray, codes: jax.Array, first: jax.Array | int) -> jax.Array:
    """Return what is between two numbers of a table. codes: int32, without sign; first: where their numbers begin."""
    shift = lax.max(31 - POINTS - lax.clz(codes), 0)
    segment = (shift << POINTS) + (codes >> shift) + first
    part = codes & ((1 << shift) - 1)
    place = (part << lax.max(PLACE - shift, 0)) >> lax.max(shift - PLACE, 0)
    values, rises = (jnp.asarray(x, jnp.int32) for x in (table[:-1], np.diff(table)))
    rise = jnp.take(rises, segment, mode="clip") * place
    return jnp.take(values, segment, mode="clip") + ((rise + (1 << (PLACE - 1))) >> PLACE)
