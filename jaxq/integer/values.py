"""What flows through an integer program: codes with a scale that is known while the program is traced.

A real number is `scale * (codes - zero_point)`. Codes are *narrow* (int8) where a plan or a table says so and *wide*
(int32, zero point zero) everywhere else: sums keep their own scale until somebody wants int8. Scales are float64 NumPy
arrays, never part of the program; multiplying by a constant multiplies them and costs nothing. Beside them goes what is
proved of the codes, `low <= codes - zero_point <= high`, from which every later step proves that int32 holds it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

INT8, INT32 = (-128, 127), (-(2**31), 2**31 - 1)
# Bits of the sums that different scales are brought together for: their codes stay within +-2^30.
ROOM = 2.0**30
HIDDEN = (
    "a number that is far from all others, as those that hide a position: only a softmax (not its logarithm), the "
    "largest of an axis and what moves it take it, of scores selected by jnp.where, to which nothing else is added"
)


class Refusal(ValueError):
    """There is no integer form of an operation on these values; the message says why, and what would make one.

    where: the operation, if it is not the one that is being looked at.
    """

    where: str = ""


class Affine(NamedTuple):
    """A grid of int8 codes, one for the tensor: `real = scale * (code - zero_point)`, codes in [low, high]."""

    scale: float
    zero_point: int
    low: int = INT8[0]
    high: int = INT8[1]

    def codes_of(self, reals: np.ndarray) -> np.ndarray:
        """Return the codes of real numbers, int64: rounded to nearest even, saturated."""
        steps = np.rint(np.asarray(reals, np.float64) / self.scale) + self.zero_point
        return np.clip(steps, self.low, self.high).astype(np.int64)


class Line(NamedTuple):
    """Where a value comes from, if it is a function of one other value, element by element: `value = of(root)`.

    of: takes and gives arrays of real numbers; it runs the user's own equations. name: of the last of them.
    """

    root: "Coded"
    of: Callable[[jax.Array], jax.Array]
    name: str = "function"


class By(NamedTuple):
    """How a value was computed: by an equation, from these values."""

    eqn: Any
    operands: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """Codes of real numbers. codes: int8, or int32 with zero point 0; scale, low, high: [...] of the codes' rank, with
    ones where all are alike; line: what it is a function of, by default of nothing but itself; by: how it was computed;
    far: real numbers of this size and above stand for larger ones, as those that hide a position from a softmax;
    pair: of what a truth value was made into, the number for false and that for true; unit: of what whole numbers of
    the program were made into, that for one."""

    codes: jax.Array
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    zero_point: int = 0
    line: Line | None = None
    by: By | None = None
    far: float = math.inf
    pair: tuple[float, float] | None = None
    unit: float | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.codes.shape

    @property
    def is_narrow(self) -> bool:
        return self.codes.dtype == jnp.int8

    @property
    def reach(self) -> np.ndarray:
        """The largest `|codes - zero_point|` that is possible."""
        return np.maximum(np.maximum(-self.low, self.high), 1)

    @property
    def real_reach(self) -> float:
        """The largest size of a real number that is possible."""
        return float(np.max(self.reach * self.scale))

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest real number that is possible."""
        return float(np.min(self.low * self.scale)), float(np.max(self.high * self.scale))


@dataclasses.dataclass(frozen=True, eq=False)
class Mapped:
    """A function of a value, element by element, that becomes a table once it is known on which grid it is wanted."""

    line: Line
    by: By | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.line.root.shape


@dataclasses.dataclass(frozen=True, eq=False)
class Rowed:
    """What has no integers so far: part of a softmax or a norm, or `why` is raised."""

    by: By
    why: Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """`factor array + offset`, of a float input that no site takes as it is: no range is known for it so far.

    factor, offset: of the array's rank or without axes, with ones where all are alike; coded: the same in codes, where
    the arrays that the program was built with showed a range.
    """

    array: jax.Array
    factor: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(()))
    offset: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(()))
    coded: Any = None

    @property
    def is_changed(self) -> bool:
        return bool(np.any(self.factor != 1) or np.any(self.offset))


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """Integers and booleans of the program itself, which stand for themselves; line: as in `Coded`."""

    array: jax.Array
    line: Line | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """What is computed from parameters alone: an array on the host, with ones for axes along which all are alike.

    array: None where converted parameters no longer hold it.
    """

    array: Any

    @property
    def reals(self) -> np.ndarray:
        """The numbers, float64."""
        return np.asarray(self.held).astype(np.float64)

    @property
    def held(self) -> Any:
        """The array. Raises `Refusal` where there are codes only."""
        if self.array is None:
            raise Refusal(
                "reads a weight of which an integer program holds codes alone: take it from the parameters outside, or "
                "keep its site float"
            )
        return self.array


class Refused(NamedTuple):
    """The result of an operation that has no integer form; whatever follows from it is not looked at."""


Value = Coded | Mapped | Rowed | Entry | Plain | Constant | Refused


def ones(x: Any, ndim: int, dtype: Any = np.float64) -> np.ndarray:
    """Return one number as an array of ones' shape."""
    return np.full((1,) * ndim, x, dtype)


def span(values: Sequence[Coded]) -> tuple[int, int]:
    """Return the bounds of values of one scale, zero points taken off."""
    return min(int(v.low.min()) for v in values), max(int(v.high.max()) for v in values)


def wide(codes: jax.Array, scale: np.ndarray, low: np.ndarray, high: np.ndarray, line: Line | None = None) -> Coded:
    """Return int32 codes; refuse them where their bounds do not prove that int32 holds them."""
    low, high = np.asarray(low, np.int64), np.asarray(high, np.int64)
    if low.size and (low.min() < INT32[0] or high.max() > INT32[1]):
        raise Refusal(f"may reach {max(-int(low.min()), int(high.max()))}, which int32 does not hold")
    return Coded(codes, scale, low, high, 0, line)


def line_of(value: Value) -> Line | None:
    """Return what a value is a function of: codes of themselves, if of nothing else."""
    if isinstance(value, Coded) and value.line is None:
        return Line(value, lambda x: x)
    return value.line if isinstance(value, Coded | Mapped | Plain) else None


def there(x: Value) -> Value:
    """Return a value; raise why there are no integers of it."""
    if isinstance(x, Rowed):
        raise x.why
    return x


def as_array(x: Value, aval: Any) -> jax.Array:
    """Return an array as the program has it."""
    if isinstance(x, Plain):
        return x.array
    assert isinstance(x, Constant)
    if is_extended(x.held):
        return x.held
    return jnp.broadcast_to(jnp.asarray(x.held, aval.dtype), aval.shape)


def is_extended(array: Any) -> bool:
    """Tell whether an array is of a type that NumPy has not, such as random keys."""
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.extended)
