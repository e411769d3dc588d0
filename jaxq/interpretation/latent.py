"""The float weights of a model next to their codes: what rules of training that look at both are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.convert import convert
from jaxq.numbers.qarray import QArray, Stored


def codes_of_leaves(
    f: Callable, policy: Policy | Plan, argnums: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[QArray | None]:
    """Return the codes of every leaf of the weights, constant to derivatives; None for what stays float.

    Raises `ValueError` for a leaf that is not codes and nothing else: one that weights are derived from, that has other
    codes at every site, or that is read in float too; and like `convert`.
    """
    still = jax.tree.map(lambda x: lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tuple(args))
    converted = convert(f, policy, argnums=argnums)(*still, **kwargs)
    held = jax.tree.leaves_with_path(converted, is_leaf=lambda node: isinstance(node, (QArray, Stored)))
    problems = [_problem(jax.tree_util.keystr(path), leaf) for path, leaf in held if isinstance(leaf, Stored)]
    if problems:
        raise ValueError("\n".join(problems))
    return [leaf if isinstance(leaf, QArray) else None for _, leaf in held]


def _problem(path: str, leaf: Stored) -> str:
    """Return why a leaf is not codes and nothing else."""
    sites = ", ".join(leaf.codes)
    if len(leaf.codes) > 1:
        return (
            f"the weight at {path} has codes of its own at each of the sites {sites}: give all of them one quantizer "
            "that is per_tensor=True and not learned, or leave them out"
        )
    if leaf.value is not None:
        return f"the weight at {path} is read in float too, beside site {sites}: leave that site out"
    return f"the weight of site {sites} is derived from leaves, {path} among them: leave that site out"
