"""Labels for the leaves of a plan, by which optax trains each kind in its own way."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import matches
from jaxq.numbers.calibrators import Leaf
from jaxq.numbers.parameters import Learned, Parameters
from jaxq.numbers.quantizers import Quantizer


def labels(plan: Plan, learned: str | Mapping[str, str] = "learned", *, fixed: str = "fixed") -> Plan:
    """Return a plan of strings: for `optax.multi_transform`, which trains every label by a transformation of its own.

    learned: the label of what is learned (steps, centroids), or labels by globs on site names, the first match wins;
    fixed: that of the rest (measured ranges, counts of observations), whose gradient is zero and which a weight decay
    would change: `optax.set_to_zero()` keeps it. Raises `ValueError` for a plan that learns nothing, for a glob that
    matches no site with learned parameters, and for such a site that no glob matches.

    >>> import jax, jax.numpy as jnp, jaxq, optax
    >>> f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.ones((4, 2))}, jnp.ones((1, 4))
    >>> _, plan = jaxq.observe(f, jaxq.weight_only(jaxq.int4(calibrator=jaxq.learned())))(params, x)
    >>> kinds = {"learned": optax.adam(1e-4), "fixed": optax.set_to_zero(), "weights": optax.adamw(1e-3)}
    >>> optimizer = optax.multi_transform(kinds, (jaxq.labels(plan), {"w": "weights"}))
    >>> state = optimizer.init((plan, params))
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"labels are those of a plan's leaves, got {plan!r}: see jaxq.make_plan or jaxq.observe")
    pairs = list(zip(plan.names, plan.ranges, strict=True))
    found = [name for name, site in pairs if any(isinstance(leaf, Parameters) for leaf in site)]
    chosen = _chosen(found, learned, fixed)
    quantizers = {d.site.name: d.ranged for d in plan.decisions}

    def labelled(name: str, leaf: Leaf | None, quantizer: Quantizer | None) -> Any:
        if not isinstance(leaf, Parameters):
            return jax.tree.map(lambda _: fixed, leaf)
        value = jax.tree.map(lambda _: chosen[name], leaf.value)
        calibrator = None if quantizer is None else quantizer.calibrator
        if isinstance(calibrator, Learned) and calibrator.frozen:
            value = (chosen[name], fixed)  # centroids are trained, what values are assigned by stays
        return Parameters(value, fixed)

    ranges = tuple(
        tuple(labelled(name, *pair) for pair in zip(site, quantizers[name], strict=True)) for name, site in pairs
    )
    return dataclasses.replace(plan, ranges=ranges)


def _chosen(found: Sequence[str], learned: str | Mapping[str, str], fixed: str) -> dict[str, str]:
    """Return the label of each of the sites that learn."""
    if not found:
        raise ValueError("nothing is learned in this plan: give a quantizer calibrator=jaxq.learned()")
    if learned == fixed:
        raise ValueError(f"what is learned and what is fixed have one label, {fixed!r}: give them two")
    rules = {"*": learned} if isinstance(learned, str) else dict(learned)
    if idle := [glob for glob in rules if not any(matches(name, glob) for name in found)]:
        raise ValueError(f"no site with learned parameters matches {', '.join(idle)}; they are: {', '.join(found)}")
    chosen = {name: next((label for glob, label in rules.items() if matches(name, glob)), None) for name in found}
    if missed := [name for name, label in chosen.items() if label is None]:
        raise ValueError(f"no label for {', '.join(missed)}: add a glob, such as '*', after the others")
    return {name: label for name, label in chosen.items() if label is not None}
