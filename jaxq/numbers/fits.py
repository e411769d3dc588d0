"""How much of a distribution a range keeps, as frozen values: by least error, by percentile, by a statistic.

As `fit=` of a quantizer a rule looks at the array itself, as `calibrator=` at a histogram of all that was seen; `keep`
returns the ends of the range, lo <= 0 <= hi.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax

from jaxq.numbers import clipping
from jaxq.numbers.histogram import Histogram

if TYPE_CHECKING:
    from jaxq.numbers.quantizers import Quantizer


@dataclasses.dataclass(frozen=True)
class Percentile:
    """Range = the central `percent` of all values; the rest saturates (McKinstry et al. 2019).

    >>> import jaxq
    >>> jaxq.percentile(99.9)
    Percentile(percent=99.9)
    """

    percent: float = 99.99
    histogram = True

    def __post_init__(self):
        object.__setattr__(self, "percent", float(self.percent))
        if not 0 < self.percent <= 100:
            raise ValueError(f"a percentile keeps a part in (0, 100], got {self.percent!r}")

    def keep(self, quantizer: Quantizer, h: Histogram) -> tuple[jax.Array, jax.Array]:
        """Return the range kept of a histogram."""
        del quantizer
        return clipping.percentile(h, self.percent)


@dataclasses.dataclass(frozen=True)
class MSE:
    """Range = the one whose codes have the least squared error (Sung et al. 2015).

    >>> import jaxq
    >>> jaxq.int4(fit=jaxq.mse())
    int4 per channel fit by MSE()
    """

    histogram = True

    def keep(self, quantizer: Quantizer, h: Histogram) -> tuple[jax.Array, jax.Array]:
        """Return the range kept of a histogram."""
        low, high = quantizer.bounds()
        return clipping.mse(h, low, high, quantizer.symmetric)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """Range = the one whose codes lose the least information (Kullback-Leibler; Migacz 2017, TensorRT).

    >>> import jaxq
    >>> jaxq.entropy()
    Entropy()
    """

    histogram = True

    def keep(self, quantizer: Quantizer, h: Histogram) -> tuple[jax.Array, jax.Array]:
        """Return the range kept of a histogram."""
        return clipping.entropy(h, quantizer.bounds()[1] + 1)


@dataclasses.dataclass(frozen=True)
class Octav:
    """Range = the fixed point that balances clipping and rounding noise (Sakr et al. 2022; equal to ACIQ's tables).

    >>> import jaxq
    >>> jaxq.octav()
    Octav()
    """

    histogram = True

    def keep(self, quantizer: Quantizer, h: Histogram) -> tuple[jax.Array, jax.Array]:
        """Return the range kept of a histogram."""
        return clipping.octav(h, quantizer.format.bits, quantizer.format.signed or not quantizer.symmetric)


@dataclasses.dataclass(frozen=True)
class Sigmas:
    """Range = mean plus and minus `k` standard deviations.

    >>> import jaxq
    >>> jaxq.sigmas(3)
    Sigmas(k=3.0)
    """

    k: float = 3.0
    histogram = True

    def __post_init__(self):
        object.__setattr__(self, "k", float(self.k))
        if not self.k > 0:
            raise ValueError(f"a range is a positive number of standard deviations wide, got {self.k!r}")

    def keep(self, quantizer: Quantizer, h: Histogram) -> tuple[jax.Array, jax.Array]:
        """Return the range kept of a histogram."""
        del quantizer
        return clipping.sigmas(h, self.k)


@dataclasses.dataclass(frozen=True)
class MeanAbs:
    """Scale = the mean absolute value, whatever the codes: of ternary weights, BitNet b1.58 (Ma et al. 2024).

    Only for `fit=`: it is a scale, not a range. The gradient passes where values are clipped too, as in the authors'
    `w + stop_gradient(w^ - w)`: what is large is meant to be.

    >>> import jaxq
    >>> jaxq.int2(per_tensor=True, fit=jaxq.mean_abs())
    int2 per tensor fit by MeanAbs()
    """

    histogram = False


@dataclasses.dataclass(frozen=True)
class DKM:
    """Centroids = the best ones, differentiated as differentiable k-means (Cho et al. 2022): see `dkm`.

    >>> import jaxq
    >>> jaxq.kmeans(16, fit=jaxq.dkm(0.01))
    codebook of 16 per tensor fit by DKM(temperature=0.01, iterations=3)
    """

    temperature: float
    iterations: int = 3
    histogram = False

    def __post_init__(self):
        object.__setattr__(self, "temperature", float(self.temperature))
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"a temperature is a number of variances, at least 0, got {self.temperature!r}")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(f"iterations= is a number of steps, at least 0, got {self.iterations!r}")


Keeping = Percentile | MSE | Entropy | Octav | Sigmas
Fit = Percentile | MSE | Entropy | Octav | Sigmas | MeanAbs | DKM


def mse() -> MSE:
    """Keep the range of least squared error.

    >>> import jaxq
    >>> jaxq.int8(per_tensor=True, calibrator=jaxq.mse())
    int8 per tensor static (MSE())
    """
    return MSE()


def mean_abs() -> MeanAbs:
    """Take the mean absolute value for the scale.

    >>> import jaxq
    >>> jaxq.mean_abs()
    MeanAbs()
    """
    return MeanAbs()


def percentile(percent: float = 99.99) -> Percentile:
    """Keep the central `percent` of all values.

    >>> import jaxq
    >>> jaxq.int8(per_tensor=True, calibrator=jaxq.percentile(99.9))
    int8 per tensor static (Percentile(percent=99.9))
    """
    return Percentile(percent)


def entropy() -> Entropy:
    """Keep the range of least lost information.

    >>> import jaxq
    >>> jaxq.entropy()
    Entropy()
    """
    return Entropy()


def octav() -> Octav:
    """Keep the range that balances clipping and rounding noise.

    >>> import jaxq
    >>> jaxq.octav()
    Octav()
    """
    return Octav()


def sigmas(k: float = 3.0) -> Sigmas:
    """Keep what is within `k` standard deviations of the mean.

    >>> import jaxq
    >>> jaxq.sigmas(4.0)
    Sigmas(k=4.0)
    """
    return Sigmas(k)


def dkm(temperature: float, iterations: int = 3) -> DKM:
    """Train weights under a codebook by the gradient of differentiable k-means (DKM; Cho et al. 2022, algorithm 1).

    The forward pass is hard at any temperature, every weight at the nearest centroid, so that what is served is what
    was trained. The derivative is that of soft values: `A c` with the attention `A = softmax_j(-(w - c_j)^2 / t)`, and
    centroids that follow the weights through `iterations` of `c_j = sum_i A_ij w_i / sum_i A_ij`. temperature: t in
    units of the variance of what shares a codebook; 0.01 is about the squared error of 16 centroids of a Gaussian. At 0
    it is k-means: a weight's gradient is the mean over its cluster. Memory in training: a number for each weight and
    centroid.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.array([[1.0], [2.0], [9.0]])}
    >>> policy = jaxq.weight_only(jaxq.kmeans(2, fit=jaxq.dkm(0.0)))
    >>> jax.grad(lambda p: jaxq.qat(f, policy)(p, jnp.array([[1.0, 3.0, 5.0]])).sum())(params)["w"].tolist()
    [[2.0], [2.0], [5.0]]
    """
    return DKM(temperature, iterations)
