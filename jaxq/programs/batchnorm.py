"""Which site a BatchNorm follows, and whether it folds: found by dataflow, in whatever framework it is written.

A BatchNorm in evaluation mode multiplies by the inverse deviation of *parameters*, in training mode by that of sums
over the batch. As long as nothing but multiplications and additions of parameters stands between it and a site, it is
one number per channel for that site's sums, which folds into scales and biases. A walk of its own over a program.
"""

import collections
import enum
import math
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Eqn
from jaxq.programs.sites import Path
from jaxq.programs.walk import Walk

FOLDS = "BatchNorm folds"
STAYS = "BatchNorm does not fold: "


class Kind(enum.Enum):
    """What a value is on the way to a BatchNorm."""

    PARAMETERS = enum.auto()  # computed from parameters
    OUTPUT = enum.auto()  # data that a site put out, or computed from such
    STATISTIC = enum.auto()  # sums of it over the batch, or computed from such


class Way(NamedTuple):
    """A value on the way from a site to a BatchNorm.

    site: whose output it is computed from, () for parameters; between: what was done to the output that no scale and
    bias can do, first of all; inverse: a deviation or its inverse has gone into it.
    """

    kind: Kind
    site: Path = ()
    between: str = ""
    inverse: bool = False


PARAMETERS = Way(Kind.PARAMETERS)
Notes = dict[Path, list[str]]


def notes(body: Body, is_parameter: Iterable[bool], sites: frozenset[Path]) -> dict[Path, tuple[str, ...]]:
    """Return for every site the BatchNorms that follow it, as words for its user, in program order.

    is_parameter: for each argument; sites: paths of the equations that put out.
    """
    found: Notes = collections.defaultdict(list)
    args = [PARAMETERS if own else None for own in is_parameter]
    _Walk(sites, found).through(body, args)
    return {site: tuple(dict.fromkeys(words)) for site, words in found.items()}


class _Walk(Walk):
    constant = PARAMETERS

    def __init__(self, sites: frozenset[Path], found: Notes):
        self.sites, self.found = sites, found

    def step(self, eqn: Eqn, ins: list, path: Path, around: Sequence[Eqn]) -> list:
        if path in self.sites:
            return [Way(Kind.OUTPUT, path)] * len(eqn.outvars)
        return super().step(eqn, ins, path, around) if any(ins) else [None] * len(eqn.outvars)

    def ordinary(self, eqn: Eqn, ins: list[Way | None], path: Path, around: Sequence[Eqn]) -> Way | None:
        """Return what an equation makes of its operands; take note where it scales an output by a deviation."""
        del path, around
        ways = [way for way in ins if way]
        data = [way for way in ways if way.kind is not Kind.PARAMETERS]
        outputs = [way for way in data if way.kind is Kind.OUTPUT]
        inverse = _is_root(eqn) or any(way.inverse for way in ways)
        if not all(way or isinstance(v, jaxpr.Literal) for way, v in zip(ins, eqn.invars, strict=True)):
            return _altered(eqn, outputs[0]) if outputs else None
        if not outputs:
            return (data or [PARAMETERS])[0]._replace(inverse=inverse)
        if inverse and eqn.primitive in jaxpr.SCALINGS:
            self.note(outputs[0], next(way for way in ways if way.inverse))
        return _output(eqn, ins, outputs)

    def note(self, output: Way, deviation: Way) -> None:
        """Take note of a BatchNorm: an output scaled by the inverse of a deviation."""
        of_batch = deviation.kind is Kind.STATISTIC
        why = "statistics of the batch" if of_batch else f"after {output.between}" if output.between else ""
        self.found[output.site].append(STAYS + why if why else FOLDS)


def _is_root(eqn: Eqn) -> bool:
    """Tell whether an equation takes roots of several numbers: of one for each channel, say."""
    return eqn.primitive in jaxpr.ROOTS and math.prod(eqn.outvars[0].aval.shape) != 1


def _output(eqn: Eqn, ins: list[Way | None], outputs: list[Way]) -> Way:
    """Return what becomes of a site's output: itself still, up to a scale and a bias, or something else."""
    if eqn.primitive is jaxpr.SUM and 0 in eqn.params["axes"] and len(eqn.params["axes"]) < eqn.invars[0].aval.ndim:
        return Way(Kind.STATISTIC, outputs[0].site)
    linear = eqn.primitive in jaxpr.LINEAR and len(outputs) == 1 and (ins[0] in outputs or eqn.primitive.name != "div")
    return outputs[0] if linear or eqn.primitive in jaxpr.MOVES else _altered(eqn, outputs[0])


def _altered(eqn: Eqn, output: Way) -> Way:
    """Return an output to which an operation did what no scale and bias can do, with that operation's line."""
    line = os.path.basename(jaxpr.source_line(eqn))  # empty within functions of JAX
    called = f"{eqn.primitive.name} at {line}" if line else eqn.primitive.name
    return output if output.between else output._replace(between=called)
