"""`calibrate`: static ranges from batches, with a progress bar. A loop over `observe`."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.arguments import Argnums, place
from jaxq.interpretation.transforms import DEFAULT, make_plan, observe


def calibrate(
    f: Callable, policy: Policy | Plan = DEFAULT, *, argnums: Argnums = 0, progress: bool = True
) -> Callable[..., Plan]:
    """Return a function `(weights, batches, **kwargs) -> plan` that observes every batch.

    A tuple in `batches` holds the other positional arguments in their order; anything else is the one argument.
    argnums: which arguments hold the weights; `weights` is a tuple where it is a sequence. `kwargs` go to `f`. Memory
    does not depend on the number of batches. progress: show a bar. Raises `ValueError` for no batches at all and for
    NaN or infinity at a site, naming it and the batch.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> batches = [jnp.ones((2, 4)), 2 * jnp.ones((2, 4))]
    >>> plan = jaxq.calibrate(f, jaxq.w8a8(static=True), progress=False)(params, batches)
    >>> float(plan.range("w")[0].hi), float(plan.range("w")[0].count)
    (2.0, 2.0)
    """

    def calibrated(params: Any, batches: Iterable[Any], **kwargs) -> Plan:
        plan: Any = policy
        number = -1
        for number, batch in enumerate(bar(batches, progress, "calibrate")):
            args = place(params, batch, argnums)
            if not isinstance(plan, Plan):
                plan = make_plan(f, plan, argnums=argnums)(*args, **kwargs)
            _, plan = observe(f, plan, argnums=argnums)(*args, **kwargs)
            _check_finite(plan, number)
        if number < 0:
            raise ValueError("calibration got no batches: pass an iterable with at least one")
        return plan

    return calibrated


def bar(batches: Iterable[Any], progress: bool, label: str) -> Iterable[Any]:
    """Return the batches, with a progress bar."""
    from tqdm.auto import tqdm

    return tqdm(batches, desc=label, unit="batch", disable=not progress)


def _check_finite(plan: Plan, number: int) -> None:
    leaves = jax.tree.leaves(plan)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or all(np.isfinite(leaf).all() for leaf in leaves):
        return
    for decision, ranges in zip(plan.decisions, plan.ranges, strict=True):
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ranges)):
            raise ValueError(
                f"batch {number} brings NaN or infinity to site '{decision.site.name}' ({decision.site.source}); "
                "remove it from the calibration data or from the weights upstream"
            )
