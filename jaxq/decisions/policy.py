"""From a policy to a scheme for every site, and everything that can be wrong with a policy.

A policy is a callable `Site -> Scheme or None`. Sugar: a Scheme stands for itself everywhere, None for float
everywhere, a dict of globs for its first match.
"""

import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxq.decisions.scheme import Scheme
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.sites import Site

Policy = Callable[[Site], Scheme | None] | Mapping[str, Any] | Scheme | None


class Choice(NamedTuple):
    """What a policy says of one site: a scheme, or None, and whether some rule said so."""

    scheme: Scheme | None
    ruled: bool


def choose(policy: Policy, sites: Sequence[Site]) -> list[Choice]:
    """Return what `policy` says of each site.

    Raises `ValueError` for a glob that matches no site (listing the sites), `TypeError` for what is not a policy. Warns
    of a glob whose sites all match an earlier one.
    """
    if isinstance(policy, Mapping):
        return _by_glob(policy, sites)
    return [Choice(_ask(policy, site), policy is not None) for site in sites]


def _ask(policy: Policy, site: Site, where: str = "the policy") -> Scheme | None:
    """Return what a policy other than a dict says of one site; `where` names it in messages."""
    if policy is None or isinstance(policy, Scheme):
        return policy
    if isinstance(policy, Quantizer):
        raise TypeError(
            f"{where} for site '{site.name}' is a quantizer, {policy!r}, which does not say of what: "
            "use jaxq.weight_only(...) or jaxq.Scheme(weight=..., act=...)"
        )
    if not callable(policy) or isinstance(policy, type):
        raise TypeError(
            f"{where} for site '{site.name}' is {policy!r}; a policy is a Scheme, a recipe such as jaxq.w8a8(), None, "
            "a callable, or a dict of globs"
        )
    scheme = policy(site)
    if scheme is not None and not isinstance(scheme, Scheme):
        raise TypeError(f"{where} returned {scheme!r} for site '{site.name}'; return a jaxq.Scheme or None")
    return scheme


def _by_glob(rules: Mapping[str, Any], sites: Sequence[Site]) -> list[Choice]:
    rulings: dict[str, list[int]] = {}
    firsts: list[str | None] = [None] * len(sites)
    for pattern in rules:
        if not isinstance(pattern, str):
            raise TypeError(f"a policy's keys are globs on site names, got {pattern!r}")
        rulings[pattern] = [n for n, site in enumerate(sites) if matches(site.name, pattern)]
        for n in rulings[pattern]:
            firsts[n] = firsts[n] or pattern
    _check_globs(rulings, firsts, sites)
    return [
        Choice(_ask(rules[p], site, f"the policy's value for '{p}'"), True) if p else Choice(None, False)
        for p, site in zip(firsts, sites, strict=True)
    ]


def matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)  # a name may look like a glob: `layers[0]`


def _check_globs(rulings: dict[str, list[int]], firsts: list[str | None], sites: Sequence[Site]) -> None:
    names = ", ".join(site.name for site in sites) or "(none)"
    for pattern, hits in rulings.items():
        if not hits:
            raise ValueError(f"policy pattern '{pattern}' matches no site; sites are: {names}")
        if hits and not any(firsts[n] == pattern for n in hits):
            owners = sorted({str(firsts[n]) for n in hits})
            warnings.warn(
                f"policy pattern '{pattern}' decides nothing: its sites match {', '.join(owners)} first", stacklevel=2
            )
