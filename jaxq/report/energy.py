"""Energy of arithmetic and of memory, in pJ, at 45 nm and 0.9 V (Horowitz, ISSCC 2014, figure 1.1.9).

The table knows int8, int32, float16 and float32. What lies between is extrapolated: a product of integers costs as much
as its array of one-bit products, `0.2 pJ * a * b / 64` for `a` and `b` bits, and is added in int32; 16-bit floats of
every kind cost as float16; wider floats grow with the square of their bits in the multiplier, linearly in the adder.
It is a model to compare formats with, not a measurement of any device.
"""

from typing import NamedTuple

INT8_MULTIPLY, INT32_ADD = 0.2, 0.1
FLOAT16_MULTIPLY, FLOAT16_ADD = 1.1, 0.4
FLOAT32_MULTIPLY, FLOAT32_ADD = 3.7, 0.9
DRAM_BIT = 640 / 32
SRAM_BIT = 50 / 32  # of 1 MB


class Energy(NamedTuple):
    """pJ. compute: multiplications and additions; dram: weights, read once per run; sram: activations in and out."""

    compute: float
    dram: float
    sram: float

    @property
    def memory(self) -> float:
        """What moving data takes."""
        return self.dram + self.sram

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.memory


def integer_mac(a: float, b: float) -> float:
    """Return the energy of multiplying integers of `a` and `b` bits and adding the product in int32, in pJ.

    >>> round(integer_mac(8, 8), 4), round(integer_mac(4, 8), 4)
    (0.3, 0.2)
    """
    return INT8_MULTIPLY * a * b / 64 + INT32_ADD


def float_mac(bits: int) -> float:
    """Return the energy of multiplying and adding floats of this many bits, in pJ.

    >>> round(float_mac(32), 4), round(float_mac(16), 4)
    (4.6, 1.5)
    """
    if bits <= 16:
        return FLOAT16_MULTIPLY + FLOAT16_ADD
    return FLOAT32_MULTIPLY * (bits / 32) ** 2 + FLOAT32_ADD * bits / 32


def total(parts: list[Energy]) -> Energy:
    """Return the sum of all parts, kind by kind."""
    return Energy(*(sum(column) for column in zip(*parts, strict=True))) if parts else Energy(0.0, 0.0, 0.0)
