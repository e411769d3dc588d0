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

    Raises `ValueError` for a weight that is derived from several leaves, and like `convert`.
    """
    still = jax.tree.map(lambda x: lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tuple(args))
    converted = convert(f, policy, argnums=argnums)(*still, **kwargs)
    held = jax.tree.leaves_with_path(converted, is_leaf=lambda node: isinstance(node, (QArray, Stored)))
    derived = [jax.tree_util.keystr(path) for path, leaf in held if isinstance(leaf, Stored)]
    if derived:
        raise ValueError(f"the weights at {', '.join(derived)} are derived from leaves: leave their sites out")
    return [leaf if isinstance(leaf, QArray) else None for _, leaf in held]
