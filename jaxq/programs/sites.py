"""Sites: the operations of a program that could be quantized, as data that prints and serializes.

A `Site` is what policies see and plans keep. A `Located` is a site in one traced program: where it is, what its
operation is, how its weight is reached. The first is shared between programs, the second is not.
"""

import dataclasses
import math
from typing import NamedTuple

from jaxq.programs.ops import Op

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a site. role: `weight` or `act`; origins: the parameter leaves a weight is made of; after: the
    function that it is the output of, merely moved: `softmax`, `tanh`, `logistic`, where `make_plan` looked for it.

    >>> import jax.numpy as jnp, jaxq
    >>> plan = jaxq.make_plan(lambda p, x: x @ p["up"], None)({"up": jnp.ones((8, 4))}, jnp.ones((2, 8)))
    >>> plan.sites[0].weight
    Operand(role='weight', shape=(8, 4), dtype='float32', contracted=(0,), origins=('up',), after='')
    """

    role: str
    shape: tuple[int, ...]
    dtype: str
    contracted: tuple[int, ...]
    origins: tuple[str, ...] = ()
    after: str = ""


@dataclasses.dataclass(frozen=True)
class Site:
    """One operation of a program that could be quantized.

    name: stable, from the weight's path; op: `dot_general`, `conv_general_dilated`, `ragged_dot` or `embedding`;
    stack: lengths of the scans in which the site has a weight per iteration, outermost first; terms: products summed
    into one output element; reuse: for each operand, the products that one of its elements takes part in; flops: of
    one execution; obstacle: why it cannot be quantized, or empty; norms: the BatchNorms that follow, and whether they
    fold, where the plan was made by `make_plan`; custom: whether it is in a function with a derivative of its own, by
    whose rule the float program is differentiated.

    >>> import jax.numpy as jnp, jaxq
    >>> plan = jaxq.make_plan(lambda p, x: x @ p["up"], None)({"up": jnp.ones((8, 4))}, jnp.ones((2, 8)))
    >>> [(site.name, site.op, site.flops) for site in plan.sites]
    [('up', 'dot_general', 128)]
    """

    name: str
    op: str
    operands: tuple[Operand, ...]
    out_shape: tuple[int, ...]
    out_dtype: str
    terms: int
    stack: tuple[int, ...] = ()
    scope: str = ""
    source: str = ""
    obstacle: str = ""
    reuse: tuple[int, ...] = ()
    norms: tuple[str, ...] = ()
    custom: bool = False

    @property
    def weight(self) -> Operand | None:
        """The operand that is a weight, if one is."""
        return next((operand for operand in self.operands if operand.role == "weight"), None)

    @property
    def signature(self) -> tuple:
        """What must agree for a plan to fit: the op, and the weight's shape and contracted axes. Never batch sizes."""
        weight = self.weight
        return (self.op, self.stack, weight and (weight.shape, weight.contracted))

    @property
    def flops(self) -> int:
        """Multiplications and additions of all executions in one pass over the stack."""
        return 2 * self.terms * math.prod(self.out_shape) * math.prod(self.stack)


class Leaf(NamedTuple):
    """A parameter leaf seen through moves only: `operand = transpose(leaf, permutation)`, scanned axes sliced off."""

    index: int  # type: ignore[assignment]
    permutation: tuple[int, ...]


class Made(NamedTuple):
    """The output of one site, merely moved since. path: the site's; whole: no value was left out on the way; padded:
    zeros were put in."""

    path: Path
    whole: bool = True
    padded: bool = False


class Feed(NamedTuple):
    """Which site's output an operand is, merely moved; whole, padded: as in `Made`."""

    site: str
    whole: bool
    padded: bool


@dataclasses.dataclass(frozen=True)
class Located:
    """A site in one program. weight: index of its weight operand; leaf: the parameter leaf the weight is, if it is one;
    sources: all leaves it is made of; stacked: paths of the scans that iterate over it; convertible: whether its codes
    can be computed ahead of time; feeds: for each operand the site whose output it is, if it is one; maybe: whether a
    run of the program may pass it by, as it is in a branch or a while loop."""

    site: Site
    path: Path
    op: Op
    weight: int | None
    leaf: Leaf | None
    sources: tuple[int, ...]
    stacked: frozenset[Path]
    convertible: bool
    feeds: tuple[Feed | None, ...] = ()
    maybe: bool = False
