"""How one number is stored: a finite set of codes and the affine map from codes to reals.

A `Format` is frozen and knows nothing of arrays' layout: `bounds` are the smallest and the largest code, `storage` the
dtype codes live in. Sharp edge: symmetric integers do not use their most negative code, so that `-x` has a code
whenever `x` has one and the product of two codes never reaches `2 ** (2 * bits - 2)`.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Int:
    """Integer codes of `bits` bits, two's complement if `signed`.

    Raises `ValueError` for a bit width that has no integer kernel (anything but 2 to 8).

    >>> Int(8).bounds(symmetric=True), Int(4).bounds(), Int(8, signed=False).bounds()
    ((-127, 127), (-8, 7), (0, 255))
    """

    bits: int
    signed: bool = True

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"integer formats have 2 to 8 bits, got {self.bits!r}; use Int(8) or Int(4)")

    def bounds(self, symmetric: bool = False) -> tuple[int, int]:
        """Return the smallest and the largest code; `symmetric` leaves out the most negative one."""
        if not self.signed:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if symmetric else (-top - 1, top)

    @property
    def storage(self):
        """The dtype that codes are held in."""
        return jnp.int8 if self.signed else jnp.uint8

    def reach(self, symmetric: bool) -> int:
        """Return the largest `|code - zero point|` that a product can meet, for the proof that int32 sums fit."""
        return 2 ** (self.bits - 1) if self.signed and symmetric else 2**self.bits - 1

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"
