"""Policies with names: one scheme for every site.

The numbers in the names are bits: `w8a8` stores weights and activations in 8 bits and multiplies integers.
"""

import dataclasses

from jaxq.decisions.scheme import After, Scheme
from jaxq.numbers.calibrators import Calibrator, MinMax
from jaxq.numbers.catalog import fixed, int8
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.sites import Site


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The policy that gives every site the same scheme.

    >>> import jaxq
    >>> jaxq.w8a8()
    Uniform(scheme=Scheme(weight=int8 per channel, act=int8 per channel))
    """

    scheme: Scheme

    def __call__(self, site: Site) -> Scheme:
        del site
        return self.scheme


def w8a8(static: bool = False, *, symmetric: bool = True, calibrator: Calibrator | None = None) -> Uniform:
    """int8 weights per channel, int8 activations: per token from the data, or `static` per tensor from calibration.

    symmetric: of the activations; weights always are. calibrator: how static ranges follow the data (default: min-max).

    >>> import jaxq
    >>> jaxq.w8a8(static=True, symmetric=False).scheme.act
    int8 asymmetric per tensor static (MinMax())
    """
    if calibrator is not None and not static:
        raise ValueError("w8a8(calibrator=) needs static=True: dynamic ranges are not calibrated")
    if static:
        act = int8(per_tensor=True, symmetric=symmetric, calibrator=calibrator or MinMax())
    else:
        act = int8(symmetric=symmetric)
    return Uniform(Scheme(weight=int8(), act=act))


def tflite(calibrator: Calibrator | None = None) -> Uniform:
    """The int8 rules of TensorFlow Lite: for `jaxq.integer`, or `jaxq.quantize`.

    Weights symmetric per channel, in [-127, 127]; activations with zero points, one scale for the tensor, from
    calibration; outputs of softmax and logistic functions in steps of 1/256 from zero, those of tanh in steps of 1/128,
    without calibration. Pools, moves and concatenations of codes of one grid keep that grid in an integer program, with
    nothing to be said. TensorFlow Lite 8-bit quantization specification.

    >>> import jaxq
    >>> jaxq.tflite().scheme.act
    int8 asymmetric per tensor static (MinMax())
    """
    act = int8(per_tensor=True, symmetric=False, calibrator=calibrator or MinMax())
    part = fixed(8, 8, signed=False)
    after = After("softmax", part), After("logistic", part), After("tanh", fixed(8, 7))
    return Uniform(Scheme(weight=int8(), act=act, after=after))


def weight_only(quantizer: Quantizer | None = None) -> Uniform:
    """Quantized weights (default int8 per channel), float activations: smaller, same arithmetic.

    >>> import jaxq
    >>> jaxq.weight_only(jaxq.int4(group=128))
    Uniform(scheme=Scheme(weight=int4 per group of 128))
    """
    return Uniform(Scheme(weight=int8() if quantizer is None else quantizer))
