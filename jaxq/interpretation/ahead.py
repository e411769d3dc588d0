"""What can be observed ahead of the data: all that depends on the parameters alone, in branches that do not run too."""

from collections.abc import Callable
from typing import Any

import jax

from jaxq.interpretation.arguments import shape_of
from jaxq.interpretation.program import Program
from jaxq.interpretation.rules import Observe, Rule, Start
from jaxq.numbers.parameters import first
from jaxq.programs import jaxpr
from jaxq.programs.sites import Path


def ahead(program: Program, rule: Rule, leaves: list, signals: dict[Path, Any] | None = None) -> tuple[Callable, list]:
    """Return a function that computes what a rule observes, and the leaves it takes: no more than that needs."""

    def watch(*arrays):
        return program.run(rule, list(arrays), {}, signals=signals)[1]

    body, out = jaxpr.trace(watch, *(shape_of(leaf) for leaf in leaves))
    body, used = jaxpr.prune(body)
    arrays = [leaf for leaf, u in zip(leaves, used, strict=True) if u]
    return lambda *xs: jax.tree.unflatten(jax.tree.structure(out), jaxpr.evaluate(body, *xs)), arrays


def started(program: Program, leaves: list, seen: dict[Path, Any], signals: dict[Path, Any] | None) -> dict[Path, Any]:
    """Return observations with the learned parameters of those weights that the run has passed by started too."""
    rule = Start(Observe(program.execute, False))
    if not any(rule.starts(item) for item in program.active.values()):
        return seen
    start, arrays = ahead(program, rule, leaves, signals)
    items = program.active
    starts = {path: (items[path].weight, own) for path, own in start(*arrays).items()}
    return seen | {path: _with_start(seen[path], *pair) for path, pair in starts.items()}


def _with_start(seen: tuple, weight: int, start: Any) -> tuple:
    return (*seen[:weight], first(seen[weight], start), *seen[weight + 1 :])
