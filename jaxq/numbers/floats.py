"""Small floating-point formats: 16, 8, 6 and 4 bits, rounded to nearest even or stochastically, and saturating.

A `Float` is a sign, `exponent_bits` and `mantissa_bits`; its codes are the bit patterns, ordered as the magnitudes they
stand for, so that rounding is one shift of the float32 significand, done in integers for every format at once. A cast
would be shorter, but it turns what overflows into NaN or infinity, and leaves two liberties to XLA's backends: to round
twice on the way (float32 to float16 to float8), and to take a cast and the cast back for the identity.

Sharp edges. Whatever is not NaN saturates, infinity too (SatFinite of OFP8). Formats of 4 and 6 bits have no NaN: there
it encodes as the largest number, and the scale must carry it. `encode` and `decode` keep subnormal numbers of every
format, but those of bfloat16 are subnormal in float32, where XLA's arithmetic may flush them to zero.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NATIVE = {
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
}


@dataclasses.dataclass(frozen=True)
class Float:
    """Floating-point codes: one sign bit, `exponent_bits`, `mantissa_bits`, with subnormal numbers.

    reserved: how many of the largest magnitudes are not finite numbers: `2 ** mantissa_bits` as in IEEE 754 (infinity
    and NaN), 1 (NaN only) or 0. Exponents are biased by `2 ** (exponent_bits - 1) - 1`. Codes are held in the dtype
    called `name` where there is one, otherwise as bit patterns in the low bits of uint8.
    Raises `ValueError` for a format that has neither a native dtype nor at most 8 bits, or no finite normal number.

    >>> E4M3.bits, E4M3.largest, E4M3.emax, str(E4M3)
    (8, 448.0, 8, 'float8_e4m3fn')
    """

    exponent_bits: int
    mantissa_bits: int
    reserved: int
    name: str
    signed = True
    integer = False

    def __post_init__(self):
        if not (2 <= self.exponent_bits <= 8 and 1 <= self.mantissa_bits <= 10):
            raise ValueError(f"{self.name}: 2 to 8 exponent bits and 1 to 10 mantissa bits, as float32 must hold it")
        if not 0 <= self.reserved <= 2**self.mantissa_bits:
            raise ValueError(f"{self.name}: reserved= is at most the {2**self.mantissa_bits} codes of one binade")
        if self.name not in _NATIVE and self.bits > 8:
            raise ValueError(f"{self.name} has no native dtype and {self.bits} bits; uint8 holds at most 8")

    @property
    def bits(self) -> int:
        """Bits of a code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is taken from the exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def top(self) -> int:
        """The code of the largest finite number."""
        return 2 ** (self.bits - 1) - 1 - self.reserved

    @property
    def emax(self) -> int:
        """The exponent of the largest binade: `floor(log2(largest))`."""
        return (self.top >> self.mantissa_bits) - self.bias

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(1 + self.top % 2**self.mantissa_bits / 2**self.mantissa_bits, self.emax)

    @property
    def storage(self) -> Any:
        """The dtype that codes are held in."""
        return _NATIVE.get(self.name, jnp.uint8)

    def __str__(self) -> str:
        return self.name


FLOAT16 = Float(5, 10, 2**10, "float16")
BFLOAT16 = Float(8, 7, 2**7, "bfloat16")
E4M3 = Float(4, 3, 1, "float8_e4m3fn")
E5M2 = Float(5, 2, 2**2, "float8_e5m2")
E3M2 = Float(3, 2, 0, "float6_e3m2fn")
E2M3 = Float(2, 3, 0, "float6_e2m3fn")
E2M1 = Float(2, 1, 0, "float4_e2m1fn")


def encode(format: Float, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Round to the nearest number of `format`, ties to even, and saturate: `|decode(encode(x))| <= format.largest`.

    With a key, round up with the probability of what is cut off: unbiased where nothing saturates (Gupta et al.
    2015).

    x: [*shape] float32, bfloat16 or float16; codes: [*shape] in `format.storage`. The sign of zero is kept. NaN gives
    NaN if the format has one. Raises `TypeError` for other dtypes. IEEE 754; OCP OFP8 and MX v1.0, section 5.3.

    >>> import jax.numpy as jnp
    >>> encode(E2M1, jnp.array([0.25, -1.75, 100.0])).tolist(), encode(E4M3, jnp.array([0.3, 1e9])).tolist()
    ([0, 12, 7], [0.3125, 448.0])
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"{format} encodes float32, bfloat16 or float16 arrays, got {x.dtype}; convert it first")
    bits = lax.bitcast_convert_type(lax.convert_element_type(x, jnp.float32), jnp.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    codes = lax.min(_rounded(format, magnitude, key), np.uint32(format.top))
    if format.reserved:
        codes = jnp.where(magnitude > np.uint32(0x7F800000), np.uint32(2 ** (format.bits - 1) - 1), codes)
    codes = codes | ((bits >> 31) << (format.bits - 1))
    codes = lax.convert_element_type(codes, jnp.uint16 if format.bits > 8 else jnp.uint8)
    return codes if format.storage == jnp.uint8 else lax.bitcast_convert_type(codes, format.storage)


def _rounded(format: Float, magnitude: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return the code next to a float32 bit pattern without sign, as if the exponent had no upper end.

    With `|x| = significand * 2 ** (exponent - 150)` and `lowest` the exponent of the smallest normal number, the code
    is `round(significand / 2 ** shift) + (max(exponent, lowest) - lowest) * 2 ** mantissa_bits`; a carry out of the
    significand is a carry into the exponent.
    """
    lowest = np.uint32(128 - format.bias)
    exponent = lax.max(magnitude >> 23, np.uint32(1))
    significand = magnitude - ((exponent - 1) << 23)
    shift = 23 - format.mantissa_bits + lowest - lax.min(exponent, lowest)
    if key is None:
        # At 25 the whole significand is less than half of a step: all further shifts are alike.
        shift = lax.min(shift, np.uint32(25))
        below_half = (np.uint32(1) << (shift - 1)) - 1
        odd = (significand >> shift) & 1
        steps = (significand + below_half + odd) >> shift
    else:
        significand = significand >> lax.min(lax.max(shift, np.uint32(31)) - 31, np.uint32(24))
        shift = lax.min(shift, np.uint32(31))
        steps = (significand + (jax.random.bits(key, magnitude.shape, jnp.uint32) >> (32 - shift))) >> shift
    return steps + ((lax.max(exponent, lowest) - lowest) << format.mantissa_bits)


def decode(format: Float, codes: jax.Array) -> jax.Array:
    """Return the exact float32 values of codes: `(-1)^s 2^(max(e, 1) - bias - m) (f + 2^m [e > 0])`.

    codes: [*shape] in `format.storage`, of which the bits above `format.bits` are ignored; values: [*shape] float32.
    Raises `TypeError` for codes of another dtype.

    >>> import jax.numpy as jnp
    >>> decode(E2M1, jnp.arange(16, dtype=jnp.uint8)[1:8]).tolist()
    [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if codes.dtype != format.storage:
        raise TypeError(f"codes of {format} are held in {np.dtype(format.storage)}, got {codes.dtype}")
    if format.storage != jnp.uint8:
        return lax.convert_element_type(codes, jnp.float32)
    wide = lax.convert_element_type(codes, jnp.uint32)
    fields = (wide >> format.mantissa_bits) & (2**format.exponent_bits - 1)
    fraction = wide & (2**format.mantissa_bits - 1)
    normal = lax.min(fields, np.uint32(1))
    steps = lax.convert_element_type(fraction | (normal << format.mantissa_bits), jnp.float32)
    exponent = lax.max(fields, np.uint32(1)) + np.uint32(127 - format.bias - format.mantissa_bits)
    sign = ((wide >> (format.bits - 1)) & 1) << 31
    return lax.mul(steps, lax.bitcast_convert_type(sign | (exponent << 23), jnp.float32))
