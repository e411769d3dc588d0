"""How much each value of a weight matters: a tree beside the parameters, on its way to the sites that fit codebooks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.interpretation.arguments import Argnums, Layout, take_apart
from jaxq.interpretation.program import Program
from jaxq.interpretation.weights import with_stack
from jaxq.numbers.formats import Codebook
from jaxq.numbers.parameters import Parameters
from jaxq.programs.sites import Located, Path


def check(plan: Plan) -> None:
    """Raise `ValueError` unless a plan has learned codebooks of weights, none of them fitted."""
    wanted = [(d, r) for d, r in zip(plan.decisions, plan.ranges, strict=True) if _weight(d) is not None]
    if not wanted:
        raise ValueError(
            "importance= is for learned codebooks of weights, and this plan has none: use "
            "jaxq.kmeans(16, calibrator=jaxq.learned()) in Scheme(weight=), or drop importance="
        )
    fitted = [d.site.name for d, ranges in wanted if _is_fitted(ranges[_weight(d)])]
    if fitted:
        raise ValueError(
            f"the centroids of these sites were fitted before: {', '.join(fitted)}; give importance= at the first "
            "observation, to a plan of jaxq.make_plan"
        )


def _weight(decision: Decision) -> int | None:
    """Return which operand is a weight with a learned codebook."""
    for number, (operand, quantizer) in enumerate(zip(decision.site.operands, decision.quantizers, strict=True)):
        if operand.role == "weight" and quantizer is not None and quantizer.learned:
            return number if isinstance(quantizer.format, Codebook) else None
    return None


def _is_fitted(parameters: Any) -> bool:
    assert isinstance(parameters, Parameters), "a learned quantizer comes with parameters"
    return not isinstance(parameters.count, jax.core.Tracer) and bool(np.any(np.asarray(parameters.count) > 0))


def by_leaf(tree: Any, layout: Layout, argnums: Argnums) -> dict[int, jax.Array]:
    """Return the importance of each parameter leaf, by its index; raise `ValueError` for what fits no parameter."""
    trees = (tree,) if isinstance(argnums, int) else tuple(tree)
    own, leaves = take_apart(trees, {}, range(len(trees)))
    found = {}
    for name, leaf in zip(own.names, leaves, strict=True):
        if name not in layout.names:
            known = ", ".join("/".join(names) for names in layout.names)
            raise ValueError(f"importance= holds '{'/'.join(name)}', which is no parameter; parameters are: {known}")
        found[layout.names.index(name)] = leaf
        _check_values("/".join(name), leaf)
    return found


def _check_values(name: str, leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer):
        return
    values = np.asarray(leaf, np.float32)
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError(f"the importance of '{name}' is negative, infinite or NaN: square the gradients, and average")


def signals(program: Program, layout: Layout, importance: dict[int, jax.Array]) -> dict[Path, jax.Array | None]:
    """Return the importance of every active site's weight as its operand, scanned axes in front; None for the others.

    Raises `ValueError` where a learned codebook is of a weight whose importance is not known.
    """
    decisions = program.execute.decisions
    return {
        path: None if _weight(decisions[path]) is None else _signal(item, layout, importance)
        for path, item in program.active.items()
    }


def _signal(item: Located, layout: Layout, importance: dict[int, jax.Array]) -> jax.Array:
    name = item.site.name
    if item.leaf is None:
        raise ValueError(
            f"the weight of site '{name}' is computed from parameters, whose importance says nothing of it; "
            "observe without importance=, or give that site another scheme"
        )
    number = item.sources[0]
    if number not in importance:
        raise ValueError(f"importance= holds nothing for '{'/'.join(layout.names[number])}', the weight of '{name}'")
    moved = lax.transpose(jnp.asarray(importance[number], jnp.float32), with_stack(item, item.leaf.permutation))
    want = (*item.site.stack, *item.site.operands[item.weight].shape)
    if moved.shape != want:
        raise ValueError(f"the importance of '{name}' has another shape than its weight: {moved.shape}, not {want}")
    return moved
