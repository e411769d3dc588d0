"""A decision: one site, its scheme, and the reason where it stays float."""

import dataclasses

from jaxq.decisions.scheme import Scheme
from jaxq.numbers import calibrators
from jaxq.numbers.calibrators import Range
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.sites import Site

Ranges = tuple[tuple[Range | None, ...], ...]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens at one site. scheme: None for float; reason: why it is float.

    >>> import jax.numpy as jnp, jaxq
    >>> plan = jaxq.make_plan(lambda p, x: x @ p["up"], None)({"up": jnp.ones((8, 4))}, jnp.ones((2, 8)))
    >>> plan["up"].scheme, plan["up"].reason
    (None, 'no rule matches')
    """

    site: Site
    scheme: Scheme | None
    reason: str = ""

    def quantizer(self, number: int) -> Quantizer | None:
        """Return the quantizer of an operand."""
        return self.scheme.of(self.site.operands[number].role) if self.scheme else None

    @property
    def quantizers(self) -> tuple[Quantizer | None, ...]:
        """The quantizer of every operand."""
        return tuple(self.quantizer(n) for n in range(len(self.site.operands)))

    @property
    def is_integer(self) -> bool:
        """Whether the products of this site are products of integers."""
        return len(self.quantizers) == 2 and all(q is not None and q.integer for q in self.quantizers)


def blank_ranges(decision: Decision) -> tuple[Range | None, ...]:
    """Return an unobserved range for every operand of a site that has a static quantizer."""
    stack = decision.site.stack
    return tuple(calibrators.unobserved(stack, q) if q is not None and q.static else None for q in decision.quantizers)
