"""A quantizer: a format, a granularity and where the range comes from.

It is plain data; what it does to an array is in `codecs`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.numbers import blocks, codecs
from jaxq.numbers.calibrators import Calibrator, MinMax, OverflowRate
from jaxq.numbers.estimators import EWGS, Estimator
from jaxq.numbers.fits import DKM, MSE, Entropy, Fit, MeanAbs, Octav
from jaxq.numbers.formats import Binary, Codebook, Fixed, Float, Format, Int, Integers, Levels, Ternary, vector_length
from jaxq.numbers.parameters import PACT, Learned
from jaxq.numbers.qarray import QArray
from jaxq.numbers.rounding import NearestEven, Stochastic
from jaxq.numbers.scaling import Microscale, Scaling


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Stores arrays in `format`, with one scale per tensor, per index that is not contracted, or per group.

    per_tensor: one scale for all; otherwise one per index of every axis that is not contracted (output channels of a
    weight, tokens of an activation), and with `group` one per `group` consecutive indices of the last contracted axis.
    symmetric: no zero point; narrow: without the most negative code, where symmetric (-127 to 127).
    calibrator: None takes the range from the array itself on every call (dynamic); otherwise the range is a leaf of the
    plan, filled by `observe` / `calibrate` (static). fit: how a dynamic range is chosen; None covers all values.
    power_of_two: scales are rounded up to powers of two, so that rescaling is a shift. scaling: how scales themselves
    are stored (see `scaling`). rounding: of integers, to nearest or `Stochastic()`; `Fixed` has one of its own.
    estimator: what the gradient of a rounding is in `qat`; None passes it straight through where nothing is clipped.
    drop: the share of values that `qat(key=)` leaves as they are, others at every step (QDrop; Wei et al. 2022, eq. 9).

    >>> import jaxq
    >>> jaxq.int8(), jaxq.int4(group=128), jaxq.uint8(per_tensor=True)
    (int8 per channel, int4 per group of 128, uint8 asymmetric per tensor)
    """

    format: Format
    per_tensor: bool = False
    group: int | None = None
    symmetric: bool = True
    calibrator: Calibrator | None = None
    fit: Fit | None = None
    narrow: bool = True
    power_of_two: bool = False
    scaling: Scaling | None = None
    rounding: NearestEven | Stochastic = NearestEven()
    estimator: Estimator | None = None
    drop: float = 0.0

    def __post_init__(self):
        if not isinstance(self.format, Format):
            raise TypeError(f"a quantizer's format is one of jaxq's, such as jaxq.Int(8), got {self.format!r}")
        if self.calibrator is not None and not isinstance(self.calibrator, Calibrator):
            raise TypeError(
                f"calibrator= takes jaxq.minmax(), jaxq.ema(decay), jaxq.mse() ..., got {self.calibrator!r}"
            )
        if self.fit is not None and not isinstance(self.fit, Fit):
            raise TypeError(f"fit= takes jaxq.mse(), jaxq.percentile(99.9), jaxq.mean_abs() ..., got {self.fit!r}")
        if self.group is not None and (self.per_tensor or (self.static and not self.learned)):
            raise ValueError("group= needs one dynamic scale per group: drop per_tensor= and calibrator=")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"group= is a positive number of indices, got {self.group!r}")
        if self.static and not self.learned and not self.per_tensor:
            raise ValueError("a calibrated (static) range is per tensor: add per_tensor=True, or drop calibrator=")
        self._check_codebook()
        self._check_format()
        self._check_calibrator()
        self._check_scaling()
        self._check_training()

    def _check_codebook(self) -> None:
        """Raise for what only codebooks, or only those of single numbers, can do."""
        form, vectors = self.format, vector_length(self.format) > 1
        if isinstance(self.fit, DKM) and not isinstance(form, Codebook):
            raise ValueError(f"dkm() is for codebooks: drop fit= for {form}")
        if isinstance(self.calibrator, Learned) and self.calibrator.frozen and not isinstance(form, Codebook):
            raise ValueError(f"frozen=True keeps values at their centroids, {form} has none: drop frozen=")
        if isinstance(self.calibrator, Learned) and self.calibrator.threshold is not None and form != Codebook(3):
            raise ValueError(f"threshold= is for a codebook of three, {form} is none: use jaxq.ttq(), or drop it")
        if vectors and not self.per_tensor:
            raise ValueError("a codebook of vectors is one for all: drop group= and per_tensor=False")
        if vectors and isinstance(self.calibrator, MinMax):
            raise ValueError("calibration counts numbers, not vectors: use calibrator=jaxq.learned()")

    def _check_format(self) -> None:
        """Raise for options that a format has no use for."""
        form, integer = self.format, isinstance(self.format, Int)
        if not integer and not self.symmetric:
            raise ValueError(f"only integers have zero points: drop symmetric=False for {form}")
        if not integer and (
            (self.fit is not None and not isinstance(self.fit, DKM)) or self.power_of_two or not self.narrow
        ):
            raise ValueError(f"fit=, power_of_two= and narrow= are options of integers: drop them for {form}")
        if not isinstance(self.rounding, (NearestEven, Stochastic)):
            raise TypeError(f"rounding= of integers is NearestEven() or Stochastic(), got {self.rounding!r}")
        if isinstance(self.rounding, Stochastic) and (not integer or self.scaling is not None):
            raise ValueError(f"rounding= is an option of integers: drop it for {form}, or see jaxq.Fixed")
        if isinstance(self.fit, MeanAbs) and not self.symmetric:
            raise ValueError("mean_abs() is a scale without a zero point: drop symmetric=False")
        if self.fit is not None and self.static:
            raise ValueError("a range is fitted to the array (fit=) or calibrated (calibrator=), not both")
        if integer and self.symmetric and form.bits == 1 and form.signed:
            raise ValueError("one signed bit has no symmetric codes in two's complement: use jaxq.binary()")
        if self.group is not None and (isinstance(form, Fixed) or (isinstance(form, Float) and form.bits > 8)):
            raise ValueError(f"{form} has no scales, so no groups of them: drop group=")

    def _check_scaling(self) -> None:
        """Raise for stored scales that a format cannot have."""
        if self.scaling is None:
            return
        small = isinstance(self.format, (Levels, Float)) and self.format.bits <= 8
        shared = isinstance(self.scaling, Microscale) and isinstance(self.format, Int) and self.format.signed
        if not small and not shared:
            raise ValueError(f"scales {self.scaling} go with small floats and levels, not with {self.format}")
        if self.group is None:
            raise ValueError("stored block scales need blocks: add group=32 (MX) or group=16 (NVFP4)")
        if self.fit is not None or self.power_of_two or not self.symmetric:
            raise ValueError(
                f"scales {self.scaling} follow a rule of their own: drop fit=, power_of_two= and symmetric="
            )

    def _check_training(self) -> None:
        """Raise for what is no estimator or no share, or an estimator that this format has no use for."""
        if self.estimator is not None and not isinstance(self.estimator, Estimator):
            raise TypeError(
                f"estimator= takes jaxq.EWGS(), jaxq.HardTanh() or jaxq.ApproxSign(), got {self.estimator!r}"
            )
        if isinstance(self.estimator, EWGS) and not isinstance(self.format, Int):
            raise ValueError(f"EWGS() scales by the rounding error of integers: drop estimator= for {self.format}")
        if self.estimator is not None and isinstance(self.fit, DKM):
            raise ValueError("dkm() has a gradient of its own: drop estimator=")
        if isinstance(self.drop, bool) or not isinstance(self.drop, (int, float)) or not 0 <= self.drop < 1:
            raise ValueError(f"drop= is a share of the values in [0, 1), got {self.drop!r}")

    def _check_calibrator(self) -> None:
        """Raise for a calibrator that a format has no use for."""
        if isinstance(self.format, (Fixed, Binary, Ternary)) and self.static:
            raise ValueError(f"{self.format} takes no range from data: drop calibrator=")
        if isinstance(self.calibrator, (MSE, Entropy, Octav, OverflowRate)) and not isinstance(self.format, Int):
            raise ValueError(f"{self.calibrator!r} calibrates integers; use jaxq.minmax() for {self.format}")
        if isinstance(self.fit or self.calibrator, Entropy) and self.format.bits > 8:
            raise ValueError(f"entropy() tells up to 8 bits apart, {self.format} has more: use jaxq.mse()")
        if isinstance(self.calibrator, OverflowRate) and not (self.power_of_two and self.symmetric):
            raise ValueError("overflow_rate() moves powers of two: use jaxq.dynamic_fixed(bits, calibrator=...)")
        if isinstance(self.format, Codebook) and self.static and not isinstance(self.calibrator, (MinMax, Learned)):
            raise ValueError(
                "a codebook is fitted to all that was seen: use calibrator=jaxq.minmax(), or jaxq.learned()"
            )
        if isinstance(self.calibrator, Learned) and self.calibrator.rule == PACT and not isinstance(self.format, Int):
            raise ValueError(
                f"rule='pact' learns where integers clip, {self.format} has centroids or levels: drop rule="
            )
        if self.learned and self.stochastic:
            raise ValueError("learned parameters round to nearest: drop rounding=Stochastic() or learned()")
        if self.learned and (not isinstance(self.format, (Codebook, Int, Levels)) or self.scaling is not None):
            raise ValueError(
                f"learned() trains centroids, steps and ranges of levels, {self.format} has none: drop calibrator="
            )

    @property
    def static(self) -> bool:
        """Whether the range is a leaf of the plan."""
        return self.calibrator is not None

    @property
    def stochastic(self) -> bool:
        """Whether training rounds by a key."""
        own = self.format.rounding if isinstance(self.format, Fixed) else self.rounding
        return isinstance(own, Stochastic)

    @property
    def noisy(self) -> bool:
        """Whether training needs a key: to round by, or to choose what stays as it is."""
        return self.stochastic or self.drop > 0

    @property
    def learned(self) -> bool:
        """Whether the leaf of the plan holds parameters that are trained, in the place of a range."""
        return isinstance(self.calibrator, Learned)

    @property
    def counts(self) -> bool:
        """Whether a static range comes with a histogram of the values."""
        if not self.static or self.learned:
            return False
        return self.calibrator.histogram or isinstance(self.format, Codebook)

    @property
    def integer(self) -> bool:
        """Whether products of these codes have integer kernels."""
        return self.format.integer

    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest code in use; only integers have them."""
        assert isinstance(self.format, Integers), f"{self.format} has no bounds"
        return self.format.bounds(self.symmetric and self.narrow)

    def reach(self) -> int:
        """Return the largest `|code - zero point|` that a product can meet."""
        assert isinstance(self.format, Integers), f"{self.format} has no integer products"
        return self.format.reach(self.symmetric)

    def turn(self, x: Any, contracted: Sequence[int]) -> Any:
        """Return an array, or its codes, with the axis that vectors run along, the last contracted one, at the end.

        It changes places with the last axis, so that turned once more all is as it was. Single numbers stay.
        """
        if vector_length(self.format) == 1:
            return x
        axis, last, order = tuple(contracted)[-1], x.ndim - 1, list(range(x.ndim))
        order[axis], order[last] = last, axis
        return x.transpose(tuple(order))

    def grid(self, shape: Sequence[int], contracted: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the scale for an operand of `shape` whose `contracted` axes are summed over.

        Raises `ValueError` where groups, or the vectors of a codebook, do not divide the last of these.
        """
        dim, axis = vector_length(self.format), tuple(contracted)[-1:]
        if dim > 1 and (not axis or shape[axis[0]] % dim):
            raise ValueError(
                f"vectors of {dim} do not divide the last of the axes {tuple(contracted)} of {tuple(shape)}"
            )
        if self.per_tensor:
            return (1,) * len(shape)
        return blocks.grid_shape(shape, contracted, self.group)

    def __call__(
        self, x: jax.Array, contracted: Sequence[int] | None = None, *, key: jax.Array | None = None
    ) -> QArray:
        """Quantize an array by its own range: one scale per index of every axis outside `contracted`.

        The default contracts all axes but the last, as for a kernel `[inputs, outputs]`, and the only axis of a vector.
        Codes of fewer than 8 bits come packed. key: round stochastically instead of to nearest. Raises `ValueError` for
        NaN or infinity where the values are known, and `TypeError` for an array that is not floating point.
        """
        x = as_float(x)
        axes = list(range(max(1, x.ndim - 1))) if contracted is None else [axis % x.ndim for axis in contracted]
        grid = self.grid(x.shape, tuple(axes))
        if key is not None:
            return codecs.encode_stochastically(self, x, grid, key).packed()
        return self.turn(codecs.encode(self, self.turn(x, axes), grid), axes).packed()

    def __repr__(self) -> str:
        words = [str(self.format)]
        words += [] if self.symmetric else ["asymmetric"]
        grain = f"group of {self.group}" if self.group else "channel"
        words.append("per tensor" if self.per_tensor else f"per {grain}")
        words += [f"static ({self.calibrator!r})"] if self.static else []
        words += [f"fit by {self.fit!r}"] if self.fit else []
        words += [] if self.narrow else ["full range"]
        words += ["power of two"] if self.power_of_two else []
        words += [str(self.scaling)] if self.scaling else []
        words += ["rounded stochastically"] if self.stochastic else []
        words += [repr(self.estimator)] if self.estimator else []
        words += [f"dropped with {self.drop:g}"] if self.drop else []
        return " ".join(words)


def as_float(x) -> jax.Array:
    """Return `x` as a floating-point array; refuse other types, and NaN or infinity where they can be seen."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"only floating-point arrays are quantized, got {x.dtype}; convert it with .astype(float)")
    if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
        raise ValueError("the array holds NaN or infinity: there is no scale for it; remove them first")
    return x
