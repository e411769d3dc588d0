"""The ways in which a program can run inside an equation, whatever the JAX version calls them.

What cannot be seen is `Opaque`: the coverage audit counts what is inside and refuses to pass over it in silence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Body(NamedTuple):
    """A program with its constants: `outs = eqns(consts + args)`."""

    jaxpr: Any
    consts: tuple

    @property
    def invars(self) -> list:
        """Variables of constants, then of arguments."""
        return [*self.jaxpr.constvars, *self.jaxpr.invars]


class Inline(NamedTuple):
    """A call: its body runs once on the operands. sharding: set where its shardings were spelled out."""

    body: Body
    sharding: dict | None


class Loop(NamedTuple):
    """`lax.scan`: operands are constants, carries, then arrays scanned over their leading axis."""

    body: Body
    constants: int
    carries: int
    length: int
    reverse: bool
    unroll: int


class While(NamedTuple):
    """`lax.while_loop`: operands are the condition's constants, the body's constants, then the carries."""

    condition: Body
    body: Body
    condition_constants: int
    body_constants: int


class Branches(NamedTuple):
    """`lax.cond` / `lax.switch`: operand 0 is the index."""

    bodies: tuple[Body, ...]


class Remat(NamedTuple):
    """`jax.checkpoint`."""

    body: Body
    policy: Callable | None
    prevent_cse: bool


class CustomRule(NamedTuple):
    """A function with its user's own derivative, which is kept."""

    body: Body
    forward: bool  # a custom JVP; else a custom VJP


class Manual(NamedTuple):
    """`jax.shard_map`."""

    body: Body
    mesh: Any
    in_specs: tuple
    out_specs: tuple
    axis_names: frozenset
    check_vma: bool


class Opaque(NamedTuple):
    """An equation with programs inside that cannot be entered."""

    bodies: tuple[Body, ...]


Subprogram = Inline | Loop | While | Branches | Remat | CustomRule | Manual | Opaque
