"""From a policy to a plan, and from a plan to another program: what each site of a program gets.

`make` resolves a policy for the sites of one program. `fit` finds a plan's decision for each site of another one, which
may be larger in batch, a loss around the model, or a part of it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.decisions.decision import Decision, Fed, Ranges, blank_ranges
from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Choice, Policy, choose
from jaxq.decisions.scheme import Scheme
from jaxq.numbers import calibrators
from jaxq.numbers.calibrators import EMA, Leaf, MinMax
from jaxq.numbers.formats import Fixed, Float, Int
from jaxq.numbers.parameters import Parameters
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.sites import Feed, Operand, Site

INT32_MAX = 2**31 - 1

Feeds = Sequence[tuple[Feed | None, ...]]  # by site, by operand


def make(policy: Policy, sites: Sequence[Site], feeds: Feeds) -> Plan:
    """Resolve a policy for the sites of a program; ranges are unobserved. feeds: whose output every operand is."""
    choices = choose(policy, sites)
    decided = [_decide(site, choice) for site, choice in zip(sites, choices, strict=True)]
    outputs = {decision.site.name: decision.out for decision in decided if decision.out}
    decisions = tuple(_linked(decision, outputs, own) for decision, own in zip(decided, feeds, strict=True))
    for decision in decisions:
        if decision.scheme is not None:
            _check_sums(decision)
            _check_backward(decision)
            _check_grids(decision)
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
    known = {after.function: after.quantizer for after in scheme.after} if scheme else {}
    own = tuple(known.get(operand.after) if operand.role == "act" else None for operand in site.operands)
    return Decision(site, scheme, reason, own=own if any(own) else ())


def _applicable(site: Site, scheme: Scheme) -> tuple[Scheme | None, str]:
    """Return the part of a scheme that a site can use, and why the rest is not used."""
    has_weight = site.weight is not None
    has_act = any(operand.role == "act" for operand in site.operands)
    own = Scheme(scheme.weight if has_weight else None, scheme.act if has_act else None, scheme.out)
    if own.act is not None:
        own = dataclasses.replace(own, after=scheme.after)
    if own != Scheme() and len(site.operands) == 2:  # a lookup is differentiated without a product
        own = dataclasses.replace(own, grad=scheme.grad)
    if own != Scheme():
        return own, ""
    if scheme.weight is not None:
        return None, "no weight operand, and the scheme quantizes weights only"
    if scheme.act is not None:
        return None, "no activation operand, and the scheme quantizes activations only"
    return None, "by policy"


def _linked(decision: Decision, outputs: dict[str, Quantizer], feeds: tuple[Feed | None, ...]) -> Decision:
    """Return the decision with the quantizers of the sites that feed it in the place of its own for activations."""
    if decision.scheme is None or decision.scheme.act is None:
        return decision
    fed = tuple(
        Fed(feed.site, outputs[feed.site]) if feed and _carries(outputs.get(feed.site), feed) else None
        for feed in feeds
    )
    return dataclasses.replace(decision, fed=fed) if any(fed) else decision


def _carries(quantizer: Quantizer | None, feed: Feed) -> bool:
    """Tell whether values that were moved are still what their quantizer makes of them.

    A range that is measured anew needs every value, and zeros need a code.
    """
    if quantizer is None:
        return False
    form = quantizer.format
    remembered = quantizer.static or isinstance(form, Fixed) or (isinstance(form, Float) and form.bits > 8)
    return (remembered or feed.whole) and (isinstance(form, (Int, Fixed, Float)) or not feed.padded)


def _check_sums(decision: Decision) -> None:
    """Raise where int32 sums of products of codes could overflow: K * max|a| * max|b| must stay below 2^31."""
    site, quantizers = decision.site, decision.quantizers
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


def _check_backward(decision: Decision) -> None:
    """Raise where a site's backward products have no integer kernel, or sum more than fits in int32."""
    site, backward = decision.site, decision.scheme.backward
    if backward is None:
        return
    if site.op == "ragged_dot":
        raise ValueError(f"site '{site.name}': ragged_dot has no backward products in low precision; drop grad= there")
    if any(q is not None and not q.symmetric for q in decision.quantizers):
        raise ValueError(f"site '{site.name}': with grad= no operand has a zero point; drop symmetric=False upstream")
    for number, (operand, count) in enumerate(zip(site.operands, site.reuse, strict=True)):
        pair = backward.of(operand.role), decision.quantizer(1 - number)
        if not isinstance(count, int) or not all(q is not None and q.integer for q in pair):
            continue
        fits = INT32_MAX // (pair[0].reach() * pair[1].reach())
        if count > fits:
            raise ValueError(
                f"site '{site.name}': its gradient by the {operand.role} sums {count} products in int32, where {fits} "
                f"fit; keep it wide with grad=jaxq.Backward(...), or compute the gradient of fewer examples at a time"
            )


def _check_grids(decision: Decision) -> None:
    """Raise where groups do not divide the contracted axis, or where the operation cannot sum them."""
    site = decision.site
    for operand, quantizer in zip(site.operands, decision.quantizers, strict=True):
        if quantizer is None:
            continue
        try:
            quantizer.grid(operand.shape, operand.contracted)
        except ValueError as error:
            raise ValueError(f"site '{site.name}': {error}; choose another group= or dim=") from None
        if quantizer.group and site.op in ("conv_general_dilated", "ragged_dot"):
            _check_ungrouped(decision, operand.role)
    _check_nested(decision)


def _check_ungrouped(decision: Decision, role: str) -> None:
    """Raise for groups at an operation whose sums are not cut into groups."""
    site = decision.site
    if role == "act":
        part = "image" if site.op == "conv_general_dilated" else "token"
        raise ValueError(
            f"site '{site.name}': {site.op} takes activations with one scale per {part} or tensor; "
            "drop group= from Scheme(act=) there"
        )
    if decision.is_integer:
        raise ValueError(
            f"site '{site.name}': {site.op} has no integer kernel for weights in groups; "
            "use weight_only(...) there, or drop group="
        )


def _check_nested(decision: Decision) -> None:
    """Raise where both operands come in groups and a group of one does not hold whole groups of the other."""
    groups = sorted(q.group for q in decision.quantizers if q is not None and q.group)
    if decision.is_integer and len(groups) == 2 and groups[1] % groups[0]:
        raise ValueError(
            f"site '{decision.site.name}' multiplies groups of {groups[0]} by groups of {groups[1]}, which do not "
            "nest; make one group= a multiple of the other"
        )


# --- a plan with other decisions -------------------------------------------------------------------------------------


def revise(plan: Plan, changes: Policy) -> Plan:
    """Return a plan with other decisions where `changes`, a policy, says something; the other sites stay as they are.

    A dict of globs or names leaves alone what it does not match. Ranges are kept, also at a changed site whose ranges
    follow the data in the same way; the others are unobserved, which `calibrate` mends. Raises like `make_plan`.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["up"] @ p["head"]), {"up": jnp.eye(4), "head": jnp.eye(4)}
    >>> plan = jaxq.calibrate(f, jaxq.w8a8(static=True), progress=False)(params, [jnp.ones((2, 4))])
    >>> plan = jaxq.revise(plan, {"head": None})
    >>> plan["head"].reason, float(plan.range("up")[0].hi)
    ('by policy', 1.0)
    """
    choices = choose(changes, plan.sites)
    changed = [_changed(d, choice) if choice.ruled else d for d, choice in zip(plan.decisions, choices, strict=True)]
    outputs = {decision.site.name: decision.out for decision in changed}
    decisions = tuple(_relinked(decision, outputs) for decision in changed)
    pairs = zip(plan.decisions, decisions, plan.ranges, strict=True)
    ranges = tuple(_kept_ranges(*three) for three in pairs)
    return dataclasses.replace(plan, decisions=decisions, ranges=ranges)


def _changed(old: Decision, choice: Choice) -> Decision:
    new = _decide(old.site, choice)
    if new.scheme is None:
        return new
    if new.out is not None and new.out != old.out:
        raise ValueError(
            f"site '{old.site.name}': a plan does not know who reads an output that it has not quantized so far; "
            "make a new plan for another Scheme(out=)"
        )
    new = dataclasses.replace(new, fed=old.fed if new.scheme.act is not None else ())
    _check_sums(new)
    _check_backward(new)
    _check_grids(new)
    return new


def _relinked(decision: Decision, outputs: dict[str, Quantizer | None]) -> Decision:
    """Return the decision without the feeds from outputs that are no longer quantized."""
    fed = tuple(feed if feed and outputs.get(feed.site) == feed.quantizer else None for feed in decision.fed)
    return dataclasses.replace(decision, fed=fed if any(fed) else ())


def _kept_ranges(old: Decision, new: Decision, ranges: tuple) -> tuple[Leaf | None, ...]:
    if old == new:
        return ranges
    # The output's range comes last, and there is none that was not there before.
    quads = zip(old.ranged, new.ranged, ranges, blank_ranges(new), strict=False)
    return tuple(
        calibrators.with_table(b, r) if r is not None and _see_alike(a, b) else blank for a, b, r, blank in quads
    )


def _see_alike(a: Quantizer | None, b: Quantizer | None) -> bool:
    """Tell whether two quantizers would have the same range from the same data."""
    if a is None or b is None or a.calibrator != b.calibrator:
        return False
    return a == b or (isinstance(b.calibrator, (MinMax, EMA)) and a.counts == b.counts)


# --- a plan on another program ---------------------------------------------------------------------------------------


def fit(plan: Plan, sites: Sequence[Site]) -> tuple[tuple[Decision, ...], Ranges]:
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


def _fitted(plan: Plan, site: Site, number: int | None) -> tuple[Decision, tuple[Leaf | None, ...]]:
    if number is None or site.obstacle:
        return Decision(site, None, site.obstacle), (None,) * len(site.operands)
    decision, ranges = plan.decisions[number], plan.ranges[number]
    roles, theirs = [o.role for o in site.operands], [o.role for o in decision.site.operands]
    if roles != theirs:  # the weight may stand on the other side
        ranges = (*ranges[: len(roles)][::-1], *ranges[len(roles) :])
        decision = dataclasses.replace(decision, fed=decision.fed[::-1], own=decision.own[::-1])
    ranges = _reranked(decision.site, site, ranges)
    decision = dataclasses.replace(decision, site=site)
    if decision.scheme is not None:
        _check_sums(decision)
    return decision, ranges


def _reranked(old: Site, new: Site, ranges: tuple[Leaf | None, ...]) -> tuple[Leaf | None, ...]:
    """Return learned parameters of activations, one for all, in the rank that the activations have here."""
    depth = len(old.stack)

    def fit(r: Leaf | None, theirs: Operand, own: Operand) -> Leaf | None:
        if not isinstance(r, Parameters) or own.role != "act" or len(theirs.shape) == len(own.shape):
            return r
        ones, rest = (1,) * len(own.shape), depth + len(theirs.shape)
        value = jax.tree.map(lambda v: jnp.reshape(v, (*v.shape[:depth], *ones, *v.shape[rest:])), r.value)
        return r._replace(value=value)

    turned = old.operands[0].role != new.operands[0].role
    theirs = old.operands[::-1] if turned else old.operands
    inputs = zip(ranges[: len(theirs)], theirs, new.operands, strict=True)
    return (*(fit(*three) for three in inputs), *ranges[len(new.operands) :])


def connected(decisions: Sequence[Decision], ranges: Ranges) -> Plan:
    """Return decisions as a plan of their own, without feeds from sites that are not among them."""
    outputs = {decision.site.name: decision.out for decision in decisions}
    whole = tuple(_relinked(decision, outputs) for decision in decisions)
    return Plan(whole, tuple(_kept_ranges(*three) for three in zip(decisions, whole, ranges, strict=True)))


def supplied(plan: Plan, decisions: Sequence[Decision]) -> Ranges:
    """Return for each decision, for each operand that is another site's output, the static range of that output.

    It has the shape of the operand's own stack, of which the maker's is the outer part.
    """
    outs = {d.site.name: ranges[-1] for d, ranges in zip(plan.decisions, plan.ranges, strict=True) if d.out}

    def of(decision: Decision, fed: Fed | None) -> Leaf | None:
        r = outs.get(fed.site) if fed else None
        return r and _stretched(r, decision.site.stack)

    return tuple(tuple(of(decision, fed) for fed in decision.fed) for decision in decisions)


def _stretched(r: Leaf, stack: tuple[int, ...]) -> Leaf:
    """Return a range of a stack that goes on: the same for all inner layers."""
    depth = jnp.ndim(r.count)

    def stretch(leaf):
        outer, own = jnp.shape(leaf)[:depth], jnp.shape(leaf)[depth:]
        full = jnp.reshape(leaf, (*outer, *(1 for _ in stack[depth:]), *own))
        return jnp.broadcast_to(full, (*stack, *own))

    return jax.tree.map(stretch, r) if len(stack) > depth else r


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
