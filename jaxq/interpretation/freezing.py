"""Iterative freezing: weights whose codes oscillate too often stay at the code that they had on average.

A pure function of a state, the step's threshold and the weights, to be called after every update of theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.latent import codes_of_leaves
from jaxq.interpretation.transforms import DEFAULT, make_plan
from jaxq.numbers.fits import MSE
from jaxq.numbers.formats import Fixed, Int
from jaxq.numbers.qarray import QArray


class Oscillations(NamedTuple):
    """How the codes of a weight have moved, or a tuple for all that are quantized; float32 of a weight's shape.

    codes: at the last step; direction: the sign of the last move, 0 before any; frequency: the moving average of
    oscillations, moves against the last one; average: that of the codes; frozen: whether it stays.
    """

    codes: Any
    direction: Any
    frequency: Any
    average: Any
    frozen: Any


class Freezing(NamedTuple):
    """What `freezing` returns: a pair of pure functions."""

    init: Callable[..., Oscillations]
    update: Callable[..., tuple[Any, Oscillations]]


def freezing(f: Callable, policy: Policy | Plan = DEFAULT, *, momentum: float = 0.01, argnums: int = 0) -> Freezing:
    """Return `init(params, *args) -> state` and `update(state, threshold, params, *args) -> (params, state)`.

    A code oscillates where it moves against its last move; a moving average with `momentum` counts how often. A weight
    that does so more often than `threshold`, a number or a schedule's value at this step, is frozen: from then on it is
    the average of its codes, rounded, times its scale (Nagel et al. 2022, eq. 7 and algorithm 1). Call it after every
    step of the optimizer; with learned steps, with the plan of that step: `freezing(f, plan).update(...)`. Raises
    `ValueError` for weights that are derived from leaves, that have other codes at every site they are used at or are
    read in float too, for codes other than integers and fixed point, for scales that rounding would change (a mean, a
    percentile), so that what is frozen would shrink, and where nothing is quantized.

    >>> import jax.numpy as jnp, jaxq
    >>> f, x = (lambda p, x: x @ p["w"]), jnp.ones((1, 2))
    >>> freeze = jaxq.freezing(f, jaxq.weight_only(jaxq.int4()), momentum=0.5)
    >>> state = freeze.init({"w": jnp.array([[1.4], [7.0]])}, x)
    >>> for w in (1.6, 1.4, 1.6, 1.4):
    ...     params, state = freeze.update(state, 0.6, {"w": jnp.array([[w], [7.0]])}, x)
    >>> params["w"].tolist()
    [[2.0], [7.0]]
    """
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum= of a moving average is a number in (0, 1], got {momentum!r}")

    def init(*args, **kwargs) -> Oscillations:
        _check_sites(make_plan(f, policy, argnums=argnums)(*args, **kwargs))
        codes = [_wide(q) for q in _checked(codes_of_leaves(f, policy, argnums, args, kwargs)) if q is not None]
        none = tuple(jnp.zeros_like(c) for c in codes)
        return Oscillations(tuple(codes), none, none, tuple(codes), tuple(jnp.zeros(c.shape, bool) for c in codes))

    def update(state: Oscillations, threshold: Any, *args, **kwargs) -> tuple[Any, Oscillations]:
        codes = _checked(codes_of_leaves(f, policy, argnums, args, kwargs))
        leaves, tree = jax.tree.flatten(args[argnums])
        olds = iter([Oscillations(*parts) for parts in zip(*state, strict=True)])
        news = []
        for n, q in enumerate(codes):
            if q is not None:
                news.append(_moved(next(olds), q, threshold, momentum))
                leaves[n] = jnp.where(news[-1].frozen, _value(q, news[-1].codes), leaves[n]).astype(leaves[n].dtype)
        return jax.tree.unflatten(tree, leaves), Oscillations(*map(tuple, zip(*news, strict=True)))

    return Freezing(init, update)


def _check_sites(plan: Plan) -> None:
    """Raise for weights whose codes have no average, or whose scale is another one once they are rounded."""
    for decision in plan.decisions:
        site = decision.site.name
        q = decision.scheme.weight if decision.scheme and decision.site.weight else None
        if q is None:
            continue
        if not isinstance(q.format, (Int, Fixed)):
            raise ValueError(
                f"{site}: freezing averages integer codes, not those of {q.format}: leave this site out of the policy"
            )
        if not (q.fit is None or isinstance(q.fit, MSE)):
            raise ValueError(
                f"{site}: rounded weights have another scale by {q.fit!r}, so that frozen ones would shrink: freeze "
                "them with calibrator=jaxq.learned(), or without fit="
            )


def _checked(codes: Sequence[QArray | None]) -> Sequence[QArray | None]:
    if all(q is None for q in codes):
        raise ValueError(
            "no weight is quantized here, so nothing can be frozen: give their sites a scheme with weight="
        )
    return codes


def _moved(old: Oscillations, q: QArray, threshold: Any, momentum: float) -> Oscillations:
    """Return what is known of a weight after one more step; codes of frozen ones stay what they are."""
    codes = jnp.where(old.frozen, old.codes, _wide(q))
    move = jnp.sign(codes - old.codes)
    oscillates = (move != 0) & (move == -old.direction)
    frequency = momentum * oscillates + (1 - momentum) * old.frequency
    average = momentum * codes + (1 - momentum) * old.average
    frozen = old.frozen | (frequency > threshold)
    codes = jnp.where(frozen & ~old.frozen, lax.round(average, lax.RoundingMethod.TO_NEAREST_EVEN), codes)
    return Oscillations(codes, jnp.where(move != 0, move, old.direction), frequency, average, frozen)


def _wide(q: QArray) -> jax.Array:
    return lax.convert_element_type(q.codes, jnp.float32)


def _value(q: QArray, codes: jax.Array) -> jax.Array:
    """Return what other codes stand for with the scale and zero point of `q`: float32."""
    stored = lax.convert_element_type(codes, q.format.storage)
    return dataclasses.replace(q.plain(), stored=stored).decode(jnp.float32)
