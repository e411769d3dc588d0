"""Quantizers with names, and linear quantization of one array.

The options of a constructor are the fields of `Quantizer`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.numbers import floats
from jaxq.numbers.apot import levels as apot_levels
from jaxq.numbers.calibrators import Calibrator
from jaxq.numbers.fits import MeanAbs
from jaxq.numbers.formats import Binary, Codebook, Fixed, Int, Levels, Ternary
from jaxq.numbers.microscaling import NF4_LEVELS
from jaxq.numbers.parameters import Learned
from jaxq.numbers.quantizers import Quantizer, as_float
from jaxq.numbers.scaling import Microscale, Nested


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


def int16(**options: Any) -> Quantizer:
    """16-bit integers, symmetric; products are computed on decoded values, there being no kernel for them.

    >>> import jaxq
    >>> jaxq.int16(per_tensor=True)
    int16 per tensor
    """
    return Quantizer(Int(16), **options)


def binary(**options: Any) -> Quantizer:
    """One bit: the sign, with the mean absolute value as scale (Rastegari et al. 2016, section 3.1).

    >>> import jaxq
    >>> jaxq.binary()
    binary per channel
    """
    return Quantizer(Binary(), **options)


def ternary(threshold: float = 0.7, **options: Any) -> Quantizer:
    """-1, 0 and +1 beyond `threshold` mean absolute values (TWN; Li et al. 2016). `b158` is the other ternary rule.

    >>> import jaxq
    >>> jaxq.ternary()
    ternary per channel
    """
    return Quantizer(Ternary(threshold), **options)


def b158(**options: Any) -> Quantizer:
    """Ternary weights of BitNet b1.58: rounded multiples of the tensor's mean absolute value (Ma et al. 2024).

    >>> import jaxq
    >>> jaxq.b158()
    int2 per tensor fit by MeanAbs()
    """
    return Quantizer(Int(2), **{"per_tensor": True, "fit": MeanAbs(), **options})


def fixed(bits: int, frac_bits: int, *, signed: bool = True, **how: Any) -> Quantizer:
    """Fixed point: `bits` in all, `frac_bits` of them behind the point, one sign bit; no range. `how`: see `Fixed`.

    >>> import jaxq
    >>> jaxq.fixed(8, 1)  # 1 sign, 6 integer and 1 fractional bits
    Q6.1 per tensor
    """
    return Quantizer(Fixed(bits, frac_bits, signed, **how), per_tensor=True)


def dynamic_fixed(bits: int = 8, *, calibrator: Calibrator | None = None, **options: Any) -> Quantizer:
    """Fixed point whose split follows the data: the scale of each tensor is the least power of two that covers it.

    With `calibrator=jaxq.overflow_rate(...)` it follows the rule of Courbariaux et al. 2014 during training.

    >>> import jaxq
    >>> jaxq.dynamic_fixed(8)
    int8 per tensor power of two
    """
    return Quantizer(Int(bits), **{"per_tensor": True, "power_of_two": True, "calibrator": calibrator, **options})


def kmeans(size: int, dim: int = 1, **options: Any) -> Quantizer:
    """A codebook of `size` centroids, fitted to the array: per tensor unless `group=` or `per_tensor=False` says so.

    dim: for weights, centroids are vectors of so many values that are next to each other along the last contracted axis
    (product quantization): `log2(size) / dim` bits for each.

    >>> import jaxq
    >>> jaxq.kmeans(16), jaxq.kmeans(256, dim=4)
    (codebook of 16 per tensor, codebook of 256 vectors of 4 per tensor)
    """
    return Quantizer(Codebook(size, dim), **{"per_tensor": options.get("group") is None, **options})


def ttq(threshold: float = 0.05, **options: Any) -> Quantizer:
    """Ternary weights of two learned numbers, zero below `threshold` times the largest value (TTQ; Zhu et al. 2017).

    Both are leaves of the plan, one pair per tensor unless `per_tensor=False` says so. There are no integer kernels:
    the two numbers differ.

    >>> import jaxq
    >>> jaxq.ttq()
    codebook of 3 per tensor static (Learned(threshold=0.05))
    """
    return Quantizer(Codebook(3), **{"per_tensor": True, "calibrator": Learned(threshold=threshold), **options})


def apot(bits: int, *, signed: bool = True, **options: Any) -> Quantizer:
    """Sums of powers of two as levels, over a learned range (APoT; Li et al. 2020): 2 to 7 bits, unsigned ones to 6.

    signed=False is for activations that are not negative. The paper normalizes weights first, `(w - mean) / std`: write
    that into the model, derived weights are quantized as they are derived.

    >>> import jaxq
    >>> jaxq.apot(4), len(jaxq.apot(4).format.values)
    (apot4 per channel static (Learned()), 15)
    """
    return Quantizer(apot_levels(bits, signed=signed), **{"calibrator": Learned(), **options})


def float16() -> Quantizer:
    """IEEE half precision, without a scale; what is too large saturates.

    >>> import jaxq
    >>> jaxq.float16()
    float16 per tensor
    """
    return Quantizer(floats.FLOAT16, per_tensor=True)


def bfloat16() -> Quantizer:
    """The upper half of float32, without a scale.

    >>> import jaxq
    >>> jaxq.bfloat16()
    bfloat16 per tensor
    """
    return Quantizer(floats.BFLOAT16, per_tensor=True)


def float8(**options: Any) -> Quantizer:
    """8-bit floating point, e4m3, scaled so that the largest value is the largest number (Micikevicius et al. 2022).

    >>> import jaxq
    >>> jaxq.float8()
    float8_e4m3fn per channel
    """
    return Quantizer(floats.E4M3, **options)


def float8_e5m2(**options: Any) -> Quantizer:
    """8-bit floating point with more range than precision, e5m2: for gradients.

    >>> import jaxq
    >>> jaxq.float8_e5m2(per_tensor=True)
    float8_e5m2 per tensor
    """
    return Quantizer(floats.E5M2, **options)


def nf4(group: int = 64) -> Quantizer:
    """4-bit levels at the quantiles of a Gaussian, scaled by a group's largest value (QLoRA; Dettmers et al. 2023).

    >>> import jaxq
    >>> jaxq.nf4()
    nf4 per group of 64
    """
    return Quantizer(Levels(NF4_LEVELS, "nf4"), group=group)


def mxfp8(group: int = 32) -> Quantizer:
    """8-bit floats (e4m3) under one power of two for each block of 32 (OCP Microscaling v1.0).

    >>> import jaxq
    >>> jaxq.mxfp8()
    float8_e4m3fn per group of 32 microscaled
    """
    return Quantizer(floats.E4M3, group=group, scaling=Microscale())


def mxfp6(group: int = 32) -> Quantizer:
    """6-bit floats (e2m3) under one power of two for each block of 32 (OCP Microscaling v1.0).

    >>> import jaxq
    >>> jaxq.mxfp6()
    float6_e2m3fn per group of 32 microscaled
    """
    return Quantizer(floats.E2M3, group=group, scaling=Microscale())


def mxfp4(group: int = 32) -> Quantizer:
    """4-bit floats (e2m1) under one power of two for each block of 32 (OCP Microscaling v1.0).

    >>> import jaxq
    >>> jaxq.mxfp4()
    float4_e2m1fn per group of 32 microscaled
    """
    return Quantizer(floats.E2M1, group=group, scaling=Microscale())


def mxint8(group: int = 32) -> Quantizer:
    """8-bit integers under one power of two for each block of 32 (OCP Microscaling v1.0).

    >>> import jaxq
    >>> jaxq.mxint8()
    int8 per group of 32 microscaled
    """
    return Quantizer(Int(8), group=group, scaling=Microscale())


def nvfp4(group: int = 16) -> Quantizer:
    """4-bit floats (e2m1), a float8 scale for each block of 16 and a float32 one for the tensor (NVFP4).

    >>> import jaxq
    >>> jaxq.nvfp4()
    float4_e2m1fn per group of 16 with float8 scales
    """
    return Quantizer(floats.E2M1, group=group, scaling=Nested())


def linear_quantize(
    x: jax.Array,
    bits: int = 8,
    *,
    symmetric: bool = True,
    signed: bool = True,
    narrow: bool = True,
    axis: int | Sequence[int] | None = None,
    group: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `(q, scale, zero_point)` with `x ~ scale * (q - zero_point)`.

    axis: the axes that keep a scale per index (None: one scale for the whole array); with `group`, the one axis that
    has a scale for every `group` consecutive indices, all other axes having one per index. narrow: without the most
    negative code, where symmetric. q: [*x.shape] int8, uint8 or, for 16 bits, int16, uint16; scale: float32 and
    zero_point: int32 (so that `q - zero_point` does not wrap), of x's rank with ones on the shared axes. One symmetric
    signed bit is the sign, -1 or 1. Jacob et al. 2018, equation 1. Raises `ValueError` for an unknown bit width, NaN or
    infinity, and where a group does not divide its axis; `TypeError` for arrays that are not float.

    >>> import jax.numpy as jnp, jaxq
    >>> q, scale, zero = jaxq.linear_quantize(jnp.array([-1.0, 0.0, 0.5, 1.0]), 8)
    >>> q.tolist(), zero.tolist()
    ([-127, 0, 64, 127], [0])
    """
    x = as_float(x)
    kept = [] if axis is None else [a % x.ndim for a in ([axis] if isinstance(axis, int) else axis)]
    if group is not None and len(kept) != 1:
        raise ValueError(f"group={group} needs axis=, one axis to run along, got {axis!r}")
    contracted = kept if group is not None else [a for a in range(x.ndim) if a not in kept]
    integers = Int(bits, signed)
    if bits == 1 and symmetric and signed:
        quantizer = binary(group=group)
    else:
        quantizer = Quantizer(integers, group=group, symmetric=symmetric, narrow=narrow)
    q = quantizer(x, contracted=contracted).plain()
    zero = jnp.zeros(q.scale.shape, jnp.int32) if q.zero_point is None else q.zero_point.astype(jnp.int32)
    return q.codes, q.scale, zero
