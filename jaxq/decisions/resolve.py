"""From a policy to a plan, and from a plan to another program: what each site of a program gets.

`make` resolves a policy for the sites of one program. `fit` finds a plan's decision for each site of another one, which
may be larger in batch, a loss around the model, or a part of it.
"""

import dataclasses
from collections.abc import Sequence

from jaxq.decisions.decision import Decision, blank_ranges
from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Choice, Policy, choose
from jaxq.decisions.scheme import Scheme
from jaxq.numbers.calibrators import Range
from jaxq.programs.sites import Operand, Site

INT32_MAX = 2**31 - 1


def make(policy: Policy, sites: Sequence[Site]) -> Plan:
    """Resolve a policy for the sites of a program; ranges are unobserved."""
    choices = choose(policy, sites)
    decisions = tuple(_decide(site, choice) for site, choice in zip(sites, choices, strict=True))
    wanted = [site.name for site, choice in zip(sites, choices, strict=True) if choice.scheme and _is_pure(site)]
    if wanted and not any(decision.scheme for decision in decisions):
        raise ValueError(
            f"nothing would be quantized: {', '.join(wanted)} multiply parameters and closed-over constants only; pass "
            "the data as an argument, or, where the weights are closed over, say so with argnums=()"
        )
    return Plan(decisions, tuple(blank_ranges(decision) for decision in decisions))


def _is_pure(site: Site) -> bool:
    return site.obstacle.startswith(("weights only", "constants only"))


def _decide(site: Site, choice: Choice) -> Decision:
    if site.obstacle.startswith("inside ") and choice.scheme is not None:
        raise ValueError(
            f"site '{site.name}' ({site.op} at {site.source}) is {site.obstacle} and would stay float; "
            f'leave it out by name: {{"{site.name}": None, ...}}'
        )
    if site.obstacle:
        return Decision(site, None, site.obstacle)
    if choice.scheme is None:
        return Decision(site, None, "by policy" if choice.ruled else "no rule matches")
    scheme, reason = _applicable(site, choice.scheme)
    if scheme is not None:
        _check_sums(site, scheme)
        _check_grids(site, scheme)
    return Decision(site, scheme, reason)


def _applicable(site: Site, scheme: Scheme) -> tuple[Scheme | None, str]:
    """Return the part of a scheme that a site can use, and why the rest is not used."""
    has_weight = site.weight is not None
    has_act = any(operand.role == "act" for operand in site.operands)
    if not has_weight and scheme.act is None:
        return None, "no weight operand, and the scheme quantizes weights only"
    if not has_act and scheme.weight is None:
        return None, "no activation operand, and the scheme quantizes activations only"
    if scheme.weight is None and scheme.act is None:
        return None, "by policy"
    return Scheme(scheme.weight if has_weight else None, scheme.act if has_act else None), ""


def _check_sums(site: Site, scheme: Scheme) -> None:
    """Raise where int32 sums of products of codes could overflow: K * max|a| * max|b| must stay below 2^31."""
    quantizers = [scheme.of(operand.role) for operand in site.operands]
    if len(quantizers) != 2 or not all(q is not None and q.integer for q in quantizers):
        return
    reach = 1
    for q in quantizers:
        reach *= q.reach()
    if site.terms * reach > INT32_MAX:
        raise ValueError(
            f"site '{site.name}' sums {site.terms} products of {quantizers[0].format} and {quantizers[1].format} codes "
            f"in int32, where {INT32_MAX // reach} fit; leave it in float with {{'{site.name}': None}}, "
            "use fewer bits, or split the contraction"
        )


def _check_grids(site: Site, scheme: Scheme) -> None:
    """Raise where groups do not divide the contracted axis, or where the op has no integer kernel for groups."""
    for operand in site.operands:
        quantizer = scheme.of(operand.role)
        if quantizer is None:
            continue
        try:
            quantizer.grid(operand.shape, operand.contracted)
        except ValueError as error:
            raise ValueError(f"site '{site.name}': {error}; choose another group=") from None
        if (
            quantizer.group
            and quantizer.integer
            and scheme.act is not None
            and scheme.act.integer
            and site.op in ("conv_general_dilated", "ragged_dot")
        ):
            raise ValueError(
                f"site '{site.name}': {site.op} has no integer kernel for weights in groups; "
                "use weight_only(...) there, or drop group="
            )


# --- a plan on another program ---------------------------------------------------------------------------------------


def fit(plan: Plan, sites: Sequence[Site]) -> tuple[tuple[Decision, ...], tuple[tuple[Range | None, ...], ...]]:
    """Return the plan's decision and ranges for each site of a program; raise `ValueError` naming sites that differ."""
    index = _Index(plan)
    numbers = [index.find(site) for site in sites]
    missing = [site for site, n in zip(sites, numbers, strict=True) if n is None and not site.obstacle]
    pairs = [(plan.decisions[n], site, n) for site, n in zip(sites, numbers, strict=True) if n is not None]
    changed = [(d.site, site) for d, site, _ in pairs if not site.obstacle and d.site.signature != site.signature]
    lost = [site for d, site, _ in pairs if d.scheme and site.obstacle and site.obstacle != "backward pass"]
    if missing or changed or lost:
        raise ValueError(_misfit(plan, missing, changed, lost))
    fitted = [_fitted(plan, site, n) for site, n in zip(sites, numbers, strict=True)]
    return tuple(decision for decision, _ in fitted), tuple(ranges for _, ranges in fitted)


class _Index:
    """Where a plan keeps each site: by name, else by what the weight is made of, if only one site is made of that."""

    def __init__(self, plan: Plan):
        known = [(n, d.site) for n, d in enumerate(plan.decisions) if not d.site.obstacle]
        self.names = {site.name: n for n, site in known}
        self.kin: dict[tuple[str, ...], list[int]] = {}
        for n, site in known:
            if site.weight is not None:
                self.kin.setdefault(site.weight.origins, []).append(n)

    def find(self, site: Site) -> int | None:
        """Return the number of a site's decision, or None."""
        if site.name in self.names or site.weight is None or not site.weight.origins:
            return self.names.get(site.name)
        kin = self.kin.get(site.weight.origins, [])
        return kin[0] if len(kin) == 1 else None


def _fitted(plan: Plan, site: Site, number: int | None) -> tuple[Decision, tuple[Range | None, ...]]:
    if number is None or site.obstacle:
        return Decision(site, None, site.obstacle), (None,) * len(site.operands)
    decision, ranges = plan.decisions[number], plan.ranges[number]
    if decision.scheme is not None:
        _check_sums(site, decision.scheme)
    roles, theirs = [o.role for o in site.operands], [o.role for o in decision.site.operands]
    ranges = ranges if roles == theirs else ranges[::-1]  # the weight may stand on the other side
    return dataclasses.replace(decision, site=site), ranges


def _misfit(plan: Plan, missing: list[Site], changed: list[tuple[Site, Site]], lost: list[Site]) -> str:
    lines = ["the plan was made for another program:"]
    lines += [f"  site '{site.name}' ({site.op}) is not in the plan" for site in missing]
    lines += [f"  site '{b.name}' is {_describe(b)} here and {_describe(a)} in the plan" for a, b in changed]
    lines += [f"  site '{site.name}' is quantized in the plan and cannot be here: {site.obstacle}" for site in lost]
    lines.append(f"sites of the plan are: {', '.join(plan.names) or '(none)'}; make a plan for this program")
    return "\n".join(lines)


def _describe(site: Site) -> str:
    weight: Operand | None = site.weight
    stack = f" stacked {list(site.stack)}" if site.stack else ""
    return f"{site.op}{f' with weight {list(weight.shape)}' if weight else ''}{stack}"
