"""A quantizer: a format, a granularity and where the range comes from.

`encode` is the only place where a real number becomes a code, and `affine_of` the only place where a range becomes a
scale. Both are written so that XLA has nothing to reassociate: a division by a constant is a multiplication by a
constant, ranges are exact reductions (min, max), no product is followed by a sum (which would be contracted to one
fused operation in one program and not in another).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.numbers import blocks
from jaxq.numbers.calibrators import Calibrator, Range
from jaxq.numbers.formats import Int
from jaxq.numbers.qarray import QArray

# Below this a scale's reciprocal would overflow float32, above it nothing is lost but codes of denormal numbers.
TINY = np.float32(2.0**-120)


class Affine(NamedTuple):
    """The map from codes to reals: `x ~ scale * (code - zero_point)`; zero_point is None when symmetric."""

    scale: jax.Array
    zero_point: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Stores arrays in `format`, with one scale per tensor, per index that is not contracted, or per group.

    per_tensor: one scale for all; otherwise one per index of every axis that is not contracted (output channels of a
    weight, tokens of an activation), and with `group` one per `group` consecutive indices of the last contracted axis.
    calibrator: None takes the range from the array itself on every call (dynamic); otherwise the range is a leaf of the
    plan, filled by `observe` / `calibrate` (static).

    >>> import jaxq
    >>> jaxq.int8(), jaxq.int4(group=128), jaxq.uint8(per_tensor=True)
    (int8 per channel, int4 per group of 128, uint8 asymmetric per tensor)
    """

    format: Int
    per_tensor: bool = False
    group: int | None = None
    symmetric: bool = True
    calibrator: Calibrator | None = None

    def __post_init__(self):
        if not isinstance(self.format, Int):
            raise TypeError(f"a quantizer's format is one of jaxq's, such as jaxq.Int(8), got {self.format!r}")
        if self.calibrator is not None and not isinstance(self.calibrator, Calibrator):
            raise TypeError(f"calibrator= takes jaxq.minmax() or jaxq.ema(decay), got {self.calibrator!r}")
        if self.group is not None and (self.per_tensor or self.static):
            raise ValueError("group= needs one dynamic scale per group: drop per_tensor= and calibrator=")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"group= is a positive number of indices, got {self.group!r}")
        if self.static and not self.per_tensor:
            raise ValueError("a calibrated (static) range is per tensor: add per_tensor=True, or drop calibrator=")

    @property
    def static(self) -> bool:
        """Whether the range is a leaf of the plan."""
        return self.calibrator is not None

    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest code in use."""
        return self.format.bounds(self.symmetric)

    def grid(self, shape: Sequence[int], contracted: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the scale for an operand of `shape` whose `contracted` axes are summed over."""
        if self.per_tensor:
            return (1,) * len(shape)
        return blocks.grid_shape(shape, contracted, self.group)

    def __call__(self, x: jax.Array, contracted: Sequence[int] | None = None) -> QArray:
        """Quantize an array by its own range: one scale per index of every axis outside `contracted`.

        The default contracts all axes but the last, as for a kernel `[inputs, outputs]`. Raises `ValueError` for NaN or
        infinity where the values are known, and `TypeError` for an array that is not floating point.
        """
        x = as_float(x)
        axes = range(x.ndim - 1) if contracted is None else [axis % x.ndim for axis in contracted]
        grid = self.grid(x.shape, tuple(axes))
        return encode(x, affine_for(self, x, grid), self)

    def __repr__(self) -> str:
        words = [str(self.format)]
        words += [] if self.symmetric else ["asymmetric"]
        grain = f"group of {self.group}" if self.group else "channel"
        words.append("per tensor" if self.per_tensor else f"per {grain}")
        words += [f"static ({self.calibrator!r})"] if self.static else []
        return " ".join(words)


def as_float(x) -> jax.Array:
    """Return `x` as a floating-point array; refuse other types, and NaN or infinity where they can be seen."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"only floating-point arrays are quantized, got {x.dtype}; convert it with .astype(float)")
    if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
        raise ValueError("the array holds NaN or infinity: there is no scale for it; remove them first")
    return x


def range_of(x: jax.Array, grid: Sequence[int]) -> Range:
    """Return the exact range of every block of `x`, zero included. lo, hi: float32 of shape `grid`.

    NaN comes out as infinity: reductions may drop NaN (XLA's do, on a CPU, in large arrays), infinity they cannot.
    """
    lo = _float32(blocks.collapse(_nan_as(x, -np.inf), grid, lax.reduce_min))
    hi = _float32(blocks.collapse(_nan_as(x, np.inf), grid, lax.reduce_max))
    return Range(lax.min(lo, np.float32(0)), lax.max(hi, np.float32(0)), lax.full_like(lo, 1))


def observe(x: jax.Array) -> Range:
    """Return what one array shows of its values: its range, one observation; none if it is empty."""
    r = range_of(lax.stop_gradient(x), (1,) * x.ndim)
    count = jnp.float32(0 if 0 in x.shape else 1)
    return Range(lax.reshape(r.lo, ()), lax.reshape(r.hi, ()), count)


def _nan_as(x: jax.Array, value: float) -> jax.Array:
    return lax.select(lax.ne(x, x), lax.full_like(x, value), x)


def affine_of(quantizer: Quantizer, r: Range) -> Affine:
    """Return scale and zero point that cover the range `r`; an empty range gives a scale of one and codes of zero."""
    low, high = quantizer.bounds()
    if quantizer.symmetric:
        return Affine(_step(lax.max(-r.lo, r.hi) if low else r.hi, high), None)
    # Half of the width first: the whole may not fit in float32.
    half = lax.mul(r.hi, np.float32(0.5)) - lax.mul(r.lo, np.float32(0.5))
    scale = _step(half, 0.5 * (high - low))
    zero = lax.clamp(np.float32(low), _round(np.float32(low) - lax.div(r.lo, scale)), np.float32(high))
    return Affine(scale, lax.convert_element_type(zero, jnp.int32))


def affine_for(quantizer: Quantizer, x: jax.Array, grid: Sequence[int]) -> Affine:
    """Return the scale and zero point that cover every block of `x`; a symmetric one takes a single reduction."""
    if not quantizer.symmetric or not quantizer.format.signed:
        return affine_of(quantizer, range_of(x, grid))
    width = _float32(blocks.collapse(_nan_as(lax.abs(x), np.inf), grid, lax.reduce_max))
    return Affine(_step(lax.max(width, np.float32(0)), quantizer.bounds()[1]), None)


def raw_scale(quantizer: Quantizer, x: jax.Array, grid: Sequence[int]) -> jax.Array:
    """Return minus the width of every block, one reduction and nothing after it; `settle` makes it a scale.

    A scale is positive and a width is told by its sign, so that `settle` takes both: programs that compute a weight's
    scale and programs that are given it run the same operations on an array in memory, and round alike after it. NaN
    counts as infinity.
    """
    if 0 in x.shape:
        return jnp.zeros(grid, jnp.float32)
    return blocks.collapse(_nan_as(-lax.abs(_float32(x)), -np.inf), grid, lax.reduce_min)


def settle(quantizer: Quantizer, raw: jax.Array) -> jax.Array:
    """Return the scale that a `raw_scale` stands for, equal to `affine_for`'s; a scale stays what it is."""
    return lax.select(lax.gt(raw, np.float32(0)), raw, _step(lax.neg(raw), quantizer.bounds()[1]))


def _step(width: jax.Array, steps: float) -> jax.Array:
    """Return the scale for a range of `width`: one where it is empty, NaN where it is not finite."""
    scale = lax.max(lax.mul(width, np.float32(1 / steps)), TINY)
    scale = lax.select(lax.eq(width, np.float32(np.inf)), lax.full_like(scale, np.nan), scale)
    return lax.select(lax.eq(width, np.float32(0)), lax.full_like(scale, 1), scale)


def _float32(x: jax.Array) -> jax.Array:
    return lax.convert_element_type(x, jnp.float32)


def _round(x: jax.Array) -> jax.Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def rounded(x: jax.Array, affine: Affine, shape: Sequence[int]) -> jax.Array:
    """Return `round(x / scale) + zero_point` in float32, not yet clipped: what the clip mask of a gradient tests."""
    # A quarter of both, so that the reciprocal of the largest scale is a normal number too: exact, a power of two.
    # A division would be one where the scale is an array and a product with a reciprocal where it is a scalar.
    inverse = lax.div(np.float32(1), lax.mul(affine.scale, np.float32(0.25)))
    codes = _round(lax.mul(lax.mul(_float32(x), np.float32(0.25)), blocks.spread(inverse, shape)))
    if affine.zero_point is None:
        return codes
    return lax.add(codes, _float32(blocks.spread(affine.zero_point, shape)))


def encode(x: jax.Array, affine: Affine, quantizer: Quantizer) -> QArray:
    """Round to nearest even and saturate: `clip(round(x / scale) + zero_point)`."""
    low, high = quantizer.bounds()
    codes = lax.clamp(np.float32(low), rounded(x, affine, x.shape), np.float32(high))
    codes = lax.convert_element_type(codes, quantizer.format.storage)
    return QArray(codes, affine.scale, affine.zero_point, quantizer.format, x.dtype)


def int8(**options) -> Quantizer:
    """8-bit integers: symmetric, one scale per channel or token; `options` are the fields of `Quantizer`.

    >>> import jaxq
    >>> jaxq.int8(symmetric=False)
    int8 asymmetric per channel
    """
    return Quantizer(Int(8), **options)


def int4(**options) -> Quantizer:
    """4-bit integers in [-7, 7], one scale per channel, or per group along the contracted axis.

    >>> import jaxq
    >>> jaxq.int4(group=32)
    int4 per group of 32
    """
    return Quantizer(Int(4), **options)


def int2(**options) -> Quantizer:
    """2-bit integers in [-1, 1] (ternary), one scale per channel or group.

    >>> import jaxq
    >>> jaxq.int2()
    int2 per channel
    """
    return Quantizer(Int(2), **options)


def uint8(**options) -> Quantizer:
    """Unsigned 8-bit integers with a zero point, so that negative values keep codes too.

    >>> import jaxq
    >>> jaxq.uint8()
    uint8 asymmetric per channel
    """
    return Quantizer(Int(8, signed=False), **{"symmetric": False, **options})


def linear_quantize(
    x: jax.Array,
    bits: int = 8,
    *,
    symmetric: bool = True,
    signed: bool = True,
    axis: int | Sequence[int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `(q, scale, zero_point)` with `x ~ scale * (q - zero_point)`.

    axis: the axes that keep a scale per index (None: one scale for the whole array). q: [*x.shape] int8 or uint8;
    scale: float32 and zero_point: int32, of x's rank with ones on the shared axes. Jacob et al. 2018, equation 1.
    Raises `ValueError` for an unknown bit width and for NaN or infinity, `TypeError` for arrays that are not float.

    >>> import jax.numpy as jnp, jaxq
    >>> q, scale, zero = jaxq.linear_quantize(jnp.array([-1.0, 0.0, 0.5, 1.0]), 8)
    >>> q.tolist(), zero.tolist()
    ([-127, 0, 64, 127], [0])
    """
    quantizer = Quantizer(Int(bits, signed), symmetric=symmetric)
    x = as_float(x)
    kept = [] if axis is None else [a % x.ndim for a in ([axis] if isinstance(axis, int) else axis)]
    q = quantizer(x, contracted=[a for a in range(x.ndim) if a not in kept])
    zero = jnp.zeros(q.scale.shape, jnp.int32) if q.zero_point is None else q.zero_point
    return q.codes, q.scale, zero
