"""The plan: the resolved decision for every site of a program, and what was measured to carry it out.

A `Plan` is a pytree. Its structure is what was decided (`Decision`s), its leaves are the static ranges of
activations and the parameters that are learned.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxq.decisions import integer_form, plan_json, table
from jaxq.decisions.decision import Decision, Ranges
from jaxq.numbers import calibrators
from jaxq.numbers.calibrators import Leaf
from jaxq.programs.floating import Floating
from jaxq.programs.sites import Site


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The decision for every matmul, convolution and embedding lookup of a program.

    ranges: for each decision, for each operand and then for a quantized output, the static `Range` (float32 arrays of
    shape `site.stack`), the learned `Parameters`, or None; floats: other operations of the program that have no integer
    form, None where nobody looked. Printing it gives the table. Accepted wherever a policy is.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["up"]), {"up": jnp.ones((8, 4))}
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, jnp.ones((2, 8)))
    >>> plan["up"].scheme.weight, jaxq.Plan.from_json(plan.to_json()) == plan
    (int8 per channel, True)
    """

    decisions: tuple[Decision, ...]
    ranges: Ranges
    floats: tuple[Floating, ...] | None = None

    def tree_flatten_with_keys(self):
        keys = [jax.tree_util.DictKey(d.site.name) for d in self.decisions]
        return list(zip(keys, self.ranges, strict=True)), (self.decisions, self.floats)

    def tree_flatten(self):
        return self.ranges, (self.decisions, self.floats)

    @classmethod
    def tree_unflatten(cls, structure, ranges):
        decisions, floats = structure
        return cls(decisions, tuple(ranges), floats)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, those left in float included."""
        return tuple(decision.site for decision in self.decisions)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all sites."""
        return tuple(decision.site.name for decision in self.decisions)

    def __getitem__(self, name: str) -> Decision:
        for decision in self.decisions:
            if decision.site.name == name:
                return decision
        raise KeyError(f"no site '{name}' in this plan; sites are: {', '.join(self.names)}")

    def range(self, name: str) -> tuple[Leaf | None, ...]:
        """Return the static ranges and learned parameters of a site's operands and, if quantized, of its output."""
        self[name]
        return self.ranges[self.names.index(name)]

    def merge(self, other: "Plan") -> "Plan":
        """Return the plan that one pass over the calibration data of both would have given: from several hosts, say.

        Raises `ValueError` where the plans decide differently, and for calibrators to which the order matters.
        """
        if self.decisions != other.decisions:
            raise ValueError("the plans were made for different programs or policies: merge parts of one calibration")
        pairs = zip(self.decisions, self.ranges, other.ranges, strict=True)
        return dataclasses.replace(self, ranges=tuple(_merged(decision, a, b) for decision, a, b in pairs))

    def check(self, *, quantized: bool = False, observed: bool = False, integer_only: bool = False) -> "Plan":
        """Return the plan, or raise `ValueError` naming every site that fails.

        quantized: every site that could have a scheme has one (those with an obstacle, such as derived weights and
        backward passes, aside); observed: every static range has seen data; integer_only: everything has an integer
        form, as far as can be told without weights, of which `jaxq.integer` has the last word. What has none is named,
        with its line, and the scope or the site that it is in.
        """
        problems = []
        if quantized:
            skipped = [d for d in self.decisions if d.scheme is None and not d.site.obstacle]
            problems += [f"  {d.site.name} stays float: {d.reason}" for d in skipped]
        if observed:
            problems += [f"  {name} has no observed range: run jaxq.calibrate" for name in self.unobserved()]
        if integer_only:
            sites = [(d.site, integer_form.problem(d)) for d in self.decisions if not d.site.obstacle]
            problems += [f"  site '{site.name}'{_at(site)} {problem}" for site, problem in sites if problem]
            problems += [f"  {floating} has no integer form" for floating in self.floats or ()]
            problems += ["  what else the program does was not looked at: use jaxq.make_plan"] * (self.floats is None)
        if problems:
            raise ValueError("the plan fails its check:\n" + "\n".join(problems))
        return self

    def unobserved(self) -> list[str]:
        """Return the sites whose static ranges have seen no data in any layer, or whose parameters have not in one.

        Traced ranges are not known.
        """
        names = []
        for decision, ranges in zip(self.decisions, self.ranges, strict=True):
            if any(r is not None and calibrators.is_blank(r) for r in ranges):
                names.append(decision.site.name)
        return names

    def to_json(self) -> str:
        """Return the plan as JSON text; `Plan.from_json` gives it back, equal."""
        return plan_json.dump(self.decisions, self.ranges, self.floats)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Read what `to_json` wrote; raise `ValueError` for anything else."""
        return Plan(*plan_json.load(text))

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Plan) or self.decisions != other.decisions:
            return False
        if str(jax.tree.structure(self.ranges)) != str(jax.tree.structure(other.ranges)):
            return False
        pairs = zip(jax.tree.leaves(self.ranges), jax.tree.leaves(other.ranges), strict=True)
        return all(np.array_equal(x, y) for x, y in pairs)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Plan({sum(d.scheme is not None for d in self.decisions)} of {len(self.decisions)} sites quantized)"

    def __str__(self) -> str:
        return table.render([_row(d) for d in self.decisions], _summary(self))


def _at(site: Site) -> str:
    return f" at {site.source}" if site.source else ""


def _merged(decision: Decision, a: tuple, b: tuple) -> tuple[Leaf | None, ...]:
    triples = zip(decision.ranged, a, b, strict=True)
    return tuple(x if x is None else calibrators.combine(q, x, y) for q, x, y in triples)


def _row(decision: Decision) -> table.Row:
    site, scheme = decision.site, decision.scheme
    weight = "float" if not (scheme and scheme.weight and site.weight) else repr(scheme.weight)
    acts = [decision.quantizer(n) for n, operand in enumerate(site.operands) if operand.role == "act"]
    act = " and ".join(dict.fromkeys(repr(q) for q in acts if q is not None)) or "float"
    out = repr(decision.out) if decision.out else "float"
    makers = list(dict.fromkeys(fed.site for fed in decision.fed if fed))
    notes = [decision.reason] if decision.reason else []
    notes += [f"takes the output of {' and '.join(makers)}"] if makers else []
    notes += [f"backward {scheme.grad!r}"] if scheme and scheme.grad else []
    notes += [f"has a custom derivative, without {' and '.join(decision.unheeded)}"] if decision.unheeded else []
    notes += site.norms if scheme else ()
    shape = "x".join(str(n) for n in (*site.stack, *site.weight.shape)) if site.weight else "-"
    return table.Row(site.name, site.op, shape, site.flops, weight, act, out, ", ".join(notes))


def _summary(plan: Plan) -> str:
    total = sum(d.site.flops for d in plan.decisions if not d.site.obstacle)
    integer = sum(d.site.flops for d in plan.decisions if d.is_integer)
    kept = [d for d in plan.decisions if d.scheme is None]
    share = f", {100 * integer / total:.1f} % of the FLOPs in integers" if total else ""
    return f"{len(plan.decisions) - len(kept)} of {len(plan.decisions)} sites quantized, {len(kept)} in float{share}"
