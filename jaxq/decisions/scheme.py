"""A scheme: the quantizers of one site, by role."""

import dataclasses

from jaxq.numbers.quantizers import Quantizer


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Quantizers by role, never by side: `weight` and `act` for the operands. `Scheme()` is float.

    A weightless site (a product of two activations) uses `act` for both operands.

    >>> import jaxq
    >>> jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8())
    Scheme(weight=int8 per channel, act=int8 per channel)
    """

    weight: Quantizer | None = None
    act: Quantizer | None = None

    def __post_init__(self):
        for role, value in (("weight", self.weight), ("act", self.act)):
            if value is not None and not isinstance(value, Quantizer):
                raise TypeError(f"Scheme({role}=) takes a quantizer such as jaxq.int8(), got {value!r}")
        if self.weight is not None and self.weight.static:
            raise ValueError("a weight's range comes from the weight itself: drop calibrator= from Scheme(weight=)")
        if self.weight is not None and self.weight.symmetric and not self.weight.format.signed:
            raise ValueError(
                "unsigned symmetric codes clip every negative weight: use jaxq.uint8(), which has a zero point"
            )
        if self.act is not None and self.act.group is not None:
            raise ValueError("activations take one scale per tensor or per token: drop group= from Scheme(act=)")

    def of(self, role: str) -> Quantizer | None:
        """Return the quantizer of a role, `weight` or `act`."""
        return self.weight if role == "weight" else self.act

    def __repr__(self) -> str:
        parts = [f"{role}={value!r}" for role, value in (("weight", self.weight), ("act", self.act)) if value]
        return f"Scheme({', '.join(parts)})"
