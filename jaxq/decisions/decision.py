"""A decision: one site, its scheme, and the reason where it stays float."""

import dataclasses
import functools

from jaxq.decisions.scheme import Scheme
from jaxq.numbers import calibrators, learning
from jaxq.numbers.calibrators import Leaf
from jaxq.numbers.fits import DKM
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.sites import Site

Ranges = tuple[tuple[Leaf | None, ...], ...]


@dataclasses.dataclass(frozen=True)
class Fed:
    """The site whose output an operand is, and the quantizer of that output: the operand has none of its own.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["up"] @ p["down"]), {"up": jnp.eye(4), "down": jnp.eye(4)}
    >>> scheme = jaxq.Scheme(jaxq.int8(), jaxq.int8(), out=jaxq.int8(per_tensor=True))
    >>> jaxq.make_plan(f, scheme)(params, jnp.ones((2, 4)))["down"].fed
    (Fed(site='up', quantizer=int8 per tensor), None)
    """

    site: str
    quantizer: Quantizer


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens at one site. scheme: None for float; reason: why it is float; fed: for each operand the site whose
    quantized output it is, if it is one (empty where none is); own: for each operand the quantizer that it has for
    being the output of a function (`Scheme.after`), if it has one.

    >>> import jax.numpy as jnp, jaxq
    >>> plan = jaxq.make_plan(lambda p, x: x @ p["up"], None)({"up": jnp.ones((8, 4))}, jnp.ones((2, 8)))
    >>> plan["up"].scheme, plan["up"].reason
    (None, 'no rule matches')
    """

    site: Site
    scheme: Scheme | None
    reason: str = ""
    fed: tuple[Fed | None, ...] = ()
    own: tuple[Quantizer | None, ...] = ()

    def feed(self, number: int) -> Fed | None:
        """Return the site whose quantized output an operand is."""
        return self.fed[number] if self.fed else None

    def quantizer(self, number: int) -> Quantizer | None:
        """Return the quantizer of an operand."""
        feed = self.feed(number)
        if feed is not None:
            return feed.quantizer
        if self.own and self.own[number] is not None:
            return self.own[number]
        return self.scheme.of(self.site.operands[number].role) if self.scheme else None

    @functools.cached_property
    def quantizers(self) -> tuple[Quantizer | None, ...]:
        """The quantizer of every operand."""
        return tuple(self.quantizer(n) for n in range(len(self.site.operands)))

    @property
    def out(self) -> Quantizer | None:
        """The quantizer of the output."""
        return self.scheme.out if self.scheme else None

    @property
    def ranged(self) -> tuple[Quantizer | None, ...]:
        """The static quantizers whose ranges this site keeps, None elsewhere: every operand's, then the output's."""
        own = [None if self.feed(n) else q for n, q in enumerate(self.quantizers)]
        return tuple(q if q is not None and q.static else None for q in (*own, *([self.out] if self.out else [])))

    @property
    def unheeded(self) -> tuple[str, ...]:
        """What of the scheme has no say in gradients, where a function has a derivative of its own."""
        if self.scheme is None or not self.site.custom:
            return ()
        own = [q for q in (*self.quantizers, self.out) if q is not None]
        parts = {
            "learned()": any(q.learned for q in own),
            "estimator=": any(q.estimator is not None for q in own),
            "dkm()": any(isinstance(q.fit, DKM) for q in own),
            "grad=": self.scheme.grad is not None,
        }
        return tuple(name for name, asked in parts.items() if asked)

    @property
    def is_integer(self) -> bool:
        """Whether the products of this site are products of integers."""
        return len(self.quantizers) == 2 and all(q is not None and q.integer for q in self.quantizers)


def blank_ranges(decision: Decision) -> tuple[Leaf | None, ...]:
    """Return what is known before anything was observed, for every static quantizer of `Decision.ranged`."""
    return tuple(None if q is None else _blank(decision.site, n, q) for n, q in enumerate(decision.ranged))


def _blank(site: Site, number: int, quantizer: Quantizer) -> Leaf:
    if not quantizer.learned:
        return calibrators.unobserved(site.stack, quantizer)
    shape, contracted = site.operands[number].shape, site.operands[number].contracted
    return learning.unobserved(site.stack, quantizer, shape, quantizer.grid(shape, contracted))
