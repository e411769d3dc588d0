"""Scales shared by blocks of the last axis: MX (powers of two), NVFP4 (float8 under one float32) and NF4 levels.

A block of 16 to 64 numbers is stored as `x ~ scale * value(code)` with elements of `floats` or of a table of levels.
The largest magnitude of a block is found on bit patterns, whose order is that of the magnitudes and which no reduction
flushes or drops; a block that holds NaN or infinity gets the scale NaN, since the elements cannot carry it.

Sharp edges. E8M0 reaches down to 2^-127, which float32 holds only as a subnormal number that arithmetic may flush, so
scales stop at 2^-126. The MX rule takes the floor of the exponent: magnitudes above the largest element saturate (E2M1:
those in (6, 8) times the scale). A block scale of NVFP4 is never zero: where E4M3 underflows it is its smallest number.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import blocks
from jaxq.numbers.floats import E2M1, E4M3, decode, encode

_INFINITY = np.uint32(0x7F800000)
# The smallest E4M3 number times this is still a normal float32, and so is the reciprocal of the product.
_SMALLEST_TENSOR_SCALE = np.float32(2.0**-116)

# The 16 levels of NormalFloat4: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero. Dettmers et al. 2023
# (QLoRA), appendix E.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _largest_bits(x: jax.Array, grid: Sequence[int]) -> jax.Array:
    """Return the float32 bit pattern of the largest magnitude of every block: above `_INFINITY` if one is NaN."""
    bits = lax.bitcast_convert_type(lax.convert_element_type(x, jnp.float32), jnp.uint32)
    return blocks.collapse(bits & np.uint32(0x7FFFFFFF), grid, lax.reduce_max)


def _grid(x: jax.Array, block: int) -> tuple[int, ...]:
    return blocks.grid_shape(x.shape, (x.ndim - 1,), block)


def block_largest(x: jax.Array, block: int) -> jax.Array:
    """Return `max |x|` of every block of the last axis: [..., n / block] float32, NaN where a value is NaN or infinite.

    Raises `ValueError` if `block` does not divide the last axis.

    >>> import jax.numpy as jnp
    >>> block_largest(jnp.array([1.0, -3.0, 0.0, 0.0]), 2).tolist()
    [3.0, 0.0]
    """
    return _finite_or_nan(_largest_bits(x, _grid(x, block)))


def _finite_or_nan(bits: jax.Array) -> jax.Array:
    return jnp.where(bits < _INFINITY, lax.bitcast_convert_type(bits, jnp.float32), np.float32(np.nan))


def mx_scale(x: jax.Array, format_emax: int, block: int = 32) -> jax.Array:
    """Return `2^(floor(log2 max|x|) - format_emax)` of every block, at least 2^-126; one for a block of zeros.

    x: [..., n]; scale: [..., n / block] float32, a power of two, or NaN for a block with NaN or infinity.
    format_emax: `Float.emax` of the elements, 0 for MXINT8. Raises `ValueError` if `block` does not divide n.
    OCP MX v1.0, section 6.3.

    >>> import jax.numpy as jnp
    >>> mx_scale(jnp.array([0.1, -7.0, 0.0, 0.0]), 2, block=2).tolist()
    [1.0, 1.0]
    """
    bits = _largest_bits(x, _grid(x, block))
    field = lax.convert_element_type(bits >> 23, jnp.int32) - format_emax
    scale = lax.bitcast_convert_type(lax.clamp(np.int32(1), field, np.int32(254)) << 23, jnp.float32)
    scale = jnp.where(bits == 0, np.float32(1), scale)
    return jnp.where(bits < _INFINITY, scale, np.float32(np.nan))


def to_e8m0(scale: jax.Array) -> jax.Array:
    """Return the biased exponent of a power of two, `127 + log2(scale)`: uint8, 255 for NaN.

    scale: [*shape] float32, each a power of two from 2^-127 to 2^127 or NaN. OCP MX v1.0, section 5.4.1.

    >>> import jax.numpy as jnp
    >>> to_e8m0(jnp.array([1.0, 0.25, jnp.nan])).tolist()
    [127, 125, 255]
    """
    field = (lax.bitcast_convert_type(scale, jnp.uint32) >> 23) & np.uint32(0xFF)
    return lax.convert_element_type(field, jnp.uint8)


def from_e8m0(codes: jax.Array) -> jax.Array:
    """Return `2^(code - 127)`, NaN for 255: float32. Code 0 gives a subnormal number, which arithmetic may flush.

    >>> import jax.numpy as jnp
    >>> from_e8m0(jnp.array([127, 125, 255], jnp.uint8)).tolist()
    [1.0, 0.25, nan]
    """
    wide = lax.convert_element_type(codes, jnp.uint32)
    bits = jnp.where(wide == 0, np.uint32(1 << 22), wide << 23)
    return _finite_or_nan(bits)


def divide(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `x / scale` in float32, every scale spread over its block; exact for powers of two.

    x: [..., n]; scale: float32, each of its dimensions divides x's. Subnormal x or quotients may be taken for zero.

    >>> import jax.numpy as jnp
    >>> divide(jnp.array([1.0, -3.0, 1.0, 2.0]), jnp.array([2.0, 0.5])).tolist()
    [0.5, -1.5, 2.0, 4.0]
    """
    blocks.check_grid(x.shape, scale.shape)
    # Twice the reciprocal, which is a normal number for all scales from 2^-126 to 2^127; then half of the product.
    twice = blocks.spread(lax.div(np.float32(2), scale), x.shape)
    return lax.mul(lax.mul(lax.convert_element_type(x, jnp.float32), twice), np.float32(0.5))


def mxint8_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `clip(round(64 x / scale), -127, 127)`, ties to even: int8 codes with `x ~ scale * 2^-6 * code`.

    x: [..., n]; scale: [..., n / block] from `mx_scale(x, 0)`; codes: [..., n]. OCP MX v1.0, section 5.3.4.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, -1.5, 0.0, 1.999])
    >>> mxint8_codes(x, mx_scale(x, 0, block=4)).tolist()
    [64, -96, 0, 127]
    """
    steps = lax.round(lax.mul(divide(x, scale), np.float32(64)), lax.RoundingMethod.TO_NEAREST_EVEN)
    return lax.convert_element_type(lax.clamp(np.float32(-127), steps, np.float32(127)), jnp.int8)


def nvfp4_scales(x: jax.Array, block: int = 16, largest: float = E2M1.largest) -> tuple[jax.Array, jax.Array]:
    """Return NVFP4's block scales `e4m3(max|block| / (6 t))` and tensor scale `t = max|x| / (448 * 6)`.

    x: [..., n]; block scales: [..., n / block] E4M3 codes, at least its smallest number 2^-9, so that no element is
    divided by zero; t: float32 of x's rank with all dimensions one, 1 for an array of zeros and at least 2^-116. With
    NaN or infinity in x, t is NaN. Raises `ValueError` if `block` does not divide n. NVIDIA, NVFP4 pretraining, 2025.

    >>> import jax.numpy as jnp
    >>> codes, tensor = nvfp4_scales(jnp.array([[2688.0, 1.0, 3.0, 0.0]]), block=2)
    >>> codes.tolist(), tensor.tolist()
    ([[448.0, 0.5]], [[1.0]])
    """
    bits = _largest_bits(x, _grid(x, block))
    whole = _finite_or_nan(blocks.collapse(bits, (1,) * x.ndim, lax.reduce_max))
    tensor = lax.max(lax.mul(whole, np.float32(1 / (E4M3.largest * largest))), _SMALLEST_TENSOR_SCALE)
    tensor = jnp.where(whole == 0, np.float32(1), tensor)
    inverse = lax.div(np.float32(1), lax.mul(tensor, np.float32(largest)))
    ratio = lax.mul(_finite_or_nan(bits), inverse)
    return encode(E4M3, lax.max(ratio, np.float32(2.0**-9))), tensor


def nvfp4_scale(codes: jax.Array, tensor: jax.Array) -> jax.Array:
    """Return the scale that E2M1 elements are multiplied by, block times tensor scale: [..., n / block] float32.

    >>> import jax.numpy as jnp
    >>> nvfp4_scale(*nvfp4_scales(jnp.array([[2688.0, 1.0, 3.0, 0.0]]), block=2)).tolist()
    [[448.0, 0.5]]
    """
    return lax.mul(decode(E4M3, codes), tensor)


def nearest_level(x: jax.Array, levels: Sequence[float]) -> jax.Array:
    """Return the index of the level nearest to `x`, ties to the lower one: `#{i : x > (l_i + l_{i+1}) / 2}`.

    x: [*shape]; levels: 2 to 256 increasing numbers, known when tracing, taken in float32; codes: [*shape] uint8. NaN
    gives 0: the scale must carry it. One comparison per level and element. Raises `ValueError` for unordered levels.

    >>> import jax.numpy as jnp
    >>> nearest_level(jnp.array([-0.9, 0.04, 0.2, 3.0]), NF4_LEVELS).tolist()
    [0, 8, 9, 15]
    """
    table = np.asarray(levels, np.float32).astype(np.float64)
    if not 2 <= table.size <= 256 or np.any(np.diff(table) <= 0):
        raise ValueError(f"levels are 2 to 256 increasing float32 numbers, got {table.size}: {list(levels)[:4]}...")
    exact = (table[:-1] + table[1:]) / 2
    middle = exact.astype(np.float32)
    # Rounded down, so that for every float32 x: x > middle exactly if x > the midpoint itself.
    middle = np.where(middle > exact, np.nextafter(middle, np.float32(-np.inf)), middle)
    wide = lax.convert_element_type(x, jnp.float32)
    codes = lax.full(x.shape, 0, jnp.uint8)
    for threshold in middle:
        codes = codes + lax.convert_element_type(wide > threshold, jnp.uint8)
    return codes


def level_values(codes: jax.Array, levels: Sequence[float]) -> jax.Array:
    """Return `levels[codes]`: [*shape] float32; a code beyond the last level gives the last level.

    >>> import jax.numpy as jnp
    >>> level_values(jnp.array([0, 7, 15], jnp.uint8), NF4_LEVELS).tolist()
    [-1.0, 0.0, 1.0]
    """
    return jnp.take(jnp.asarray(levels, jnp.float32), lax.convert_element_type(codes, jnp.int32), mode="clip")
