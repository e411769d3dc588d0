"""A scheme: the quantizers of one site, by role."""

import dataclasses

from jaxq.numbers.fits import DKM
from jaxq.numbers.formats import Fixed, Float, Int, Levels, vector_length
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.outputs import FUNCTIONS


@dataclasses.dataclass(frozen=True)
class Backward:
    """Quantizers of the gradient that comes in from above, by what it is multiplied for: None keeps a product wide.

    act: for the gradient that goes on, to an activation; weight: for the gradient by the weight. With the latter wide,
    this is SwitchBack (Wortsman et al. 2023, section 2.2).

    >>> import jaxq
    >>> jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(), grad=jaxq.Backward(act=jaxq.int8()))
    Scheme(weight=int8 per channel, act=int8 per channel, grad=Backward(act=int8 per channel, weight=None))
    """

    act: Quantizer | None = None
    weight: Quantizer | None = None

    def __post_init__(self):
        for role, value in (("act", self.act), ("weight", self.weight)):
            if value is None:
                continue
            if not isinstance(value, Quantizer):
                raise TypeError(f"Backward({role}=) takes a quantizer such as jaxq.int8(), got {value!r}")
            if value.static or value.group or not value.symmetric or vector_length(value.format) > 1:
                raise ValueError(
                    f"gradients change at every step: Backward({role}=) takes a dynamic, symmetric quantizer without "
                    f"groups, such as jaxq.int8(), got {value!r}"
                )
            if not isinstance(value.format, (Int, Fixed, Float)) or value.scaling is not None:
                raise ValueError(
                    f"{value.format} has no unbiased rounding, which gradients need: use jaxq.int8() or jaxq.float8() "
                    f"in Backward({role}=)"
                )
            if value.fit is not None or value.estimator is not None or value.drop:
                raise ValueError(
                    f"a fit clips gradients, and they have no estimator and no drop: remove these from {value!r} in "
                    f"Backward({role}=)"
                )

    def of(self, role: str) -> Quantizer | None:
        """Return the quantizer for the gradient by an operand of a role, `weight` or `act`."""
        return self.weight if role == "weight" else self.act


@dataclasses.dataclass(frozen=True)
class After:
    """The quantizer of operands that are outputs of a function whose range is known: `softmax`, `tanh`, `logistic`.

    >>> import jaxq
    >>> jaxq.After("tanh", jaxq.fixed(8, 7))
    After(function='tanh', quantizer=Q0.7 per tensor)
    """

    function: str
    quantizer: Quantizer

    def __post_init__(self):
        if self.function not in FUNCTIONS:
            raise ValueError(f"After() knows {', '.join(FUNCTIONS)}, got {self.function!r}")
        if not isinstance(self.quantizer, Quantizer):
            raise TypeError(f"After() takes a quantizer such as jaxq.fixed(8, 7), got {self.quantizer!r}")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Quantizers by role, never by side: `weight`, `act` for the operands, `out` for the result. `Scheme()` is float.

    A weightless site (a product of two activations) uses `act` for both operands. What a site puts out is rounded to
    `out`, one scale for the tensor; where another site takes it as it is, the two share that quantizer. `grad` is how
    the products of the backward pass are quantized in `qat`: a quantizer for both of them, or a `Backward`. `after`
    has quantizers that take the place of `act` for outputs of some functions, as `make_plan` finds them (`After`).

    >>> import jaxq
    >>> jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8())
    Scheme(weight=int8 per channel, act=int8 per channel)
    """

    weight: Quantizer | None = None
    act: Quantizer | None = None
    out: Quantizer | None = None
    grad: Quantizer | Backward | None = None
    after: tuple[After, ...] = ()

    def __post_init__(self):
        if not isinstance(self.after, tuple) or not all(isinstance(a, After) for a in self.after):
            raise TypeError(f"Scheme(after=) takes a tuple of jaxq.After(function, quantizer), got {self.after!r}")
        if self.after and self.act is None:
            raise ValueError("Scheme(after=) takes the place of act=, which is missing")
        for role, value in self._roles():
            if value is not None and not isinstance(value, Quantizer):
                raise TypeError(f"Scheme({role}=) takes a quantizer such as jaxq.int8(), got {value!r}")
        if self.weight is not None and self.weight.static and not self.weight.learned:
            raise ValueError("a weight's range comes from the weight itself: drop calibrator= from Scheme(weight=)")
        if self.weight is not None and self.weight.symmetric and not self.weight.format.signed:
            raise ValueError(
                "unsigned symmetric codes clip every negative weight: use jaxq.uint8(), which has a zero point"
            )
        if self.weight is not None and isinstance(self.weight.format, Levels) and min(self.weight.format.values) >= 0:
            raise ValueError(
                f"{self.weight.format} has no negative levels, so that every negative weight would be zero: add "
                "signed=True to Scheme(weight=)"
            )
        self._check_acts()
        if self.out is not None:
            self._check_out(self.out)
        if self.grad is not None:
            self._check_grad()

    def _check_acts(self) -> None:
        """Raise for quantizers of activations and outputs that only weights can have."""
        for role, value in (("act", self.act), ("out", self.out)):
            if value is not None and vector_length(value.format) > 1:
                raise ValueError(f"codebooks of vectors are for weights: drop dim= from Scheme({role}=)")
        if self.act is not None and isinstance(self.act.fit, DKM):
            raise ValueError("dkm() trains weights: drop fit= from Scheme(act=)")
        if self.act is not None and self.act.learned and not self.act.per_tensor:
            raise ValueError("learned parameters of activations are per tensor: add per_tensor=True to Scheme(act=)")

    def _roles(self) -> tuple[tuple[str, Quantizer | None], ...]:
        return ("weight", self.weight), ("act", self.act), ("out", self.out)

    def _check_out(self, out: Quantizer) -> None:
        """Raise for what, applied to its own result, gives another one: consumers round again what is rounded."""
        if not out.per_tensor:
            raise ValueError(
                "an output has one scale, which all that read it can share: use Scheme(out=) per_tensor=True"
            )
        if out.noisy:
            raise ValueError(
                "outputs are rounded again where they are read, all of them and to nearest: remove Stochastic() and "
                "drop= from out="
            )
        if out.learned:
            raise ValueError("outputs have ranges, not learned parameters: use jaxq.minmax() in Scheme(out=)")
        if out.fit is not None or (not out.static and not out.symmetric):
            raise ValueError(
                "fit= and zero points of an output need a range that stays: add calibrator= to Scheme(out=), such as "
                "jaxq.minmax() or jaxq.mse(), and drop fit="
            )

    def _check_grad(self) -> None:
        """Raise where the operands' codes cannot be multiplied with a gradient's."""
        if not isinstance(self.grad, (Quantizer, Backward)):
            raise TypeError(f"Scheme(grad=) takes a quantizer or a jaxq.Backward, got {self.grad!r}")
        assert self.backward is not None  # and it is one that gradients can have
        for role, value in (("weight", self.weight), ("act", self.act)):
            if value is not None and (value.learned or isinstance(value.fit, DKM)):
                raise ValueError(
                    f"quantized gradients reach neither learned parameters nor soft assignments: drop grad=, or "
                    f"learned() or dkm() of {role}="
                )
            if value is not None and (not value.symmetric or value.group is not None):
                raise ValueError(
                    f"with Scheme(grad=) the codes of operands are multiplied with those of gradients, which takes one "
                    f"scale and no zero point along what is summed: drop group= and symmetric=False from {role}="
                )

    @property
    def backward(self) -> Backward | None:
        """How the backward products are quantized; a quantizer alone is for both of them."""
        return Backward(self.grad, self.grad) if isinstance(self.grad, Quantizer) else self.grad

    def of(self, role: str) -> Quantizer | None:
        """Return the quantizer of an operand's role, `weight` or `act`."""
        return self.weight if role == "weight" else self.act

    def __repr__(self) -> str:
        rest = ("grad", self.grad), ("after", self.after)
        parts = [f"{role}={value!r}" for role, value in (*self._roles(), *rest) if value]
        return f"Scheme({', '.join(parts)})"
