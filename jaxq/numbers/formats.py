"""How one number is stored: a finite set of codes and the map from codes to reals.

A format is frozen and knows nothing of arrays' layout: `storage` is the dtype that codes are computed in, `bits` what
one takes in memory, `integer` whether there are integer kernels for them. Sharp edge: symmetric integers do not use
their most negative code, so that `-x` has a code whenever `x` has one and the product of two codes never reaches
`2 ** (2 * bits - 2)`.
"""

import dataclasses

import jax.numpy as jnp

from jaxq.numbers import floats
from jaxq.numbers.floats import Float as Float
from jaxq.numbers.rounding import NearestEven, Overflow, Rounding, Saturate


@dataclasses.dataclass(frozen=True)
class Int:
    """Integer codes of `bits` bits, two's complement if `signed`.

    Raises `ValueError` for a bit width other than 1 to 8 and 16. Codes of more than 8 bits have no integer kernel: they
    are decoded next to the product.

    >>> Int(8).bounds(symmetric=True), Int(4).bounds(), Int(8, signed=False).bounds()
    ((-127, 127), (-8, 7), (0, 255))
    """

    bits: int
    signed: bool = True

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits not in (*range(1, 9), 16):
            raise ValueError(
                f"integer formats have 1 to 8 or 16 bits, got {self.bits!r}; use Int(8), Int(4) or Int(16)"
            )

    def bounds(self, symmetric: bool = False) -> tuple[int, int]:
        """Return the smallest and the largest code; `symmetric` leaves out the most negative one."""
        if not self.signed:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if symmetric else (-top - 1, top)

    @property
    def storage(self):
        """The dtype that codes are held in."""
        wide = self.bits > 8
        return (jnp.int16 if wide else jnp.int8) if self.signed else (jnp.uint16 if wide else jnp.uint8)

    @property
    def integer(self) -> bool:
        """Whether there are integer kernels for these codes."""
        return self.bits <= 8

    def reach(self, symmetric: bool) -> int:
        """Return the largest `|code - zero point|` that a product can meet, for the proof that int32 sums fit."""
        return 2 ** (self.bits - 1) if self.signed and symmetric else 2**self.bits - 1

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Fixed point: codes of `bits` bits with the constant scale `2 ** -frac_bits`, no range, no zero point.

    A signed number has a sign bit, `bits - 1 - frac_bits` integer bits and `frac_bits` fractional ones; either may be
    negative, or more than there are bits. rounding and overflow: what happens between and beyond the codes.

    >>> Fixed(8, 1), Fixed(8, 1).scale, Fixed(8, 1).bounds()
    (Fixed(Q6.1), 0.5, (-128, 127))
    """

    bits: int
    frac_bits: int
    signed: bool = True
    rounding: Rounding = NearestEven()
    overflow: Overflow = Saturate()

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise ValueError(f"fixed-point formats have 2 to 16 bits, got {self.bits!r}")
        if isinstance(self.frac_bits, bool) or not isinstance(self.frac_bits, int) or abs(self.frac_bits) > 100:
            raise ValueError(f"frac_bits= is a number of bits from -100 to 100, got {self.frac_bits!r}")

    def bounds(self, symmetric: bool = False) -> tuple[int, int]:
        """Return the smallest and the largest code: all of them, whatever `symmetric` says."""
        del symmetric
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)

    @property
    def scale(self) -> float:
        """The step between neighbours."""
        return 2.0**-self.frac_bits

    @property
    def storage(self):
        """The dtype that codes are held in."""
        return Int(8 if self.bits <= 8 else 16, self.signed).storage

    @property
    def integer(self) -> bool:
        """Whether there are integer kernels for these codes."""
        return self.bits <= 8

    def reach(self, symmetric: bool) -> int:
        """Return the largest absolute code."""
        del symmetric
        return max(-self.bounds()[0], self.bounds()[1])

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}Q{self.bits - self.frac_bits - self.signed}.{self.frac_bits}"

    def __repr__(self) -> str:
        return f"Fixed({self})"


@dataclasses.dataclass(frozen=True)
class Binary:
    """The codes -1 and +1, one bit each: the sign, where zero counts as positive. There is no zero.

    >>> Binary().bits, Binary().bounds()
    (1, (-1, 1))
    """

    bits = 1
    signed = True
    integer = True
    storage = jnp.int8

    def bounds(self, symmetric: bool = False) -> tuple[int, int]:
        """Return the two codes."""
        del symmetric
        return -1, 1

    def reach(self, symmetric: bool) -> int:
        """Return the largest absolute code."""
        del symmetric
        return 1

    def __str__(self) -> str:
        return "binary"


@dataclasses.dataclass(frozen=True)
class Ternary:
    """The codes -1, 0 and +1, two bits each: +-1 beyond `threshold` times the mean absolute value (Li et al. 2016).

    The scale is the mean absolute value of what is not zero: the best for that threshold. 0.7 is the paper's threshold,
    0.767 the optimum of a Gaussian.

    >>> Ternary(), Ternary().bits
    (Ternary(threshold=0.7), 2)
    """

    threshold: float = 0.7

    def __post_init__(self):
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"a threshold is a number of mean absolute values, at least 0, got {self.threshold!r}")

    bits = 2
    signed = True
    integer = True
    storage = jnp.int8

    def bounds(self, symmetric: bool = False) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        del symmetric
        return -1, 1

    def reach(self, symmetric: bool) -> int:
        """Return the largest absolute code."""
        del symmetric
        return 1

    def __str__(self) -> str:
        return "ternary"


@dataclasses.dataclass(frozen=True)
class Levels:
    """Codes are indices of `values`, a constant sorted table with the largest absolute value 1; the scale is the range.

    >>> Levels((-1.0, 0.0, 1.0), "ternary levels").bits
    2
    """

    values: tuple[float, ...]
    name: str = "levels"
    signed = True
    integer = False
    storage = jnp.uint8

    def __post_init__(self):
        ordered = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        if not 2 <= len(self.values) <= 256 or not ordered or max(map(abs, self.values)) != 1:
            raise ValueError(f"levels are 2 to 256 ascending numbers with the largest at 1 or -1, got {self.values!r}")

    @property
    def bits(self) -> int:
        """The bits of an index."""
        return (len(self.values) - 1).bit_length()

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Codes are indices of a table of `size` centroids that is fitted to the array (k-means; Han et al. 2016).

    With `dim`, a centroid is a vector and stands for so many consecutive values (product quantization with one codebook
    for all parts; Stock et al. 2020): the code of a value is `dim` times its vector's index plus its place in there, so
    that it is an index of the flattened table. At rest only the index of each vector is held.

    >>> Codebook(16).bits, Codebook(256, dim=4)
    (4, Codebook(size=256, dim=4))
    """

    size: int
    dim: int = 1
    signed = True
    integer = False

    def __post_init__(self):
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 2 <= self.size <= 256:
            raise ValueError(f"a codebook has 2 to 256 centroids (1 to 8 bits), got {self.size!r}")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 1 <= self.dim <= 256:
            raise ValueError(f"a centroid stands for 1 to 256 consecutive values, got dim={self.dim!r}")

    @property
    def bits(self) -> int:
        """The bits of an index: of a value, or of a vector of them."""
        return (self.size - 1).bit_length()

    @property
    def entries(self) -> int:
        """How many numbers the table holds."""
        return self.size * self.dim

    @property
    def storage(self):
        """The dtype that codes are held in."""
        return jnp.uint8 if self.entries <= 256 else jnp.uint16

    def __str__(self) -> str:
        return f"codebook of {self.size}" if self.dim == 1 else f"codebook of {self.size} vectors of {self.dim}"


Format = Int | Fixed | Binary | Ternary | Levels | Codebook | floats.Float

# Codes that are integers with a scale and perhaps a zero point, in the order of the reals.
Integers = Int | Fixed | Binary | Ternary


def vector_length(form: Format) -> int:
    """Return how many values share one index: one, but for codebooks of vectors.

    >>> vector_length(Codebook(256, dim=4)), vector_length(Int(8))
    (4, 1)
    """
    return form.dim if isinstance(form, Codebook) else 1


def bits_each(form: Format) -> float:
    """Return the bits that one value takes at rest: a part of an index where several share it.

    >>> bits_each(Codebook(256, dim=4)), bits_each(Codebook(16, dim=8)), bits_each(Int(8))
    (2, 0.5, 8)
    """
    bits, dim = form.bits, vector_length(form)
    return bits / dim if bits % dim else bits // dim
