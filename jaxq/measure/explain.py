"""`explain`: compile a program in float and as planned, and say per site what was emitted and what it costs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.arguments import Argnums, take_apart
from jaxq.interpretation.convert import convert
from jaxq.interpretation.program import Program, load
from jaxq.interpretation.transforms import DEFAULT, quantize
from jaxq.lowering import forms, nibbles
from jaxq.measure import alone
from jaxq.measure.cost import Cost, costs
from jaxq.measure.explanation import Explanation, Line
from jaxq.numbers.qarray import is_converted
from jaxq.programs.ops import Dot
from jaxq.programs.sites import Located


def explain(
    f: Callable, plan: Plan | Policy = DEFAULT, *, argnums: Argnums = 0, device: Any | None = None
) -> Callable[..., Explanation]:
    """Return a function `(params, *args) -> Explanation`: what every site became, and what it costs beside float.

    The whole program is compiled in float and as planned, weights converted; each matrix product and convolution is
    also compiled by itself, on data of its shapes, quantizing its activations included. Times are measured, in
    alternating blocks. device: one that is not there, of a topology from `jax.experimental.topologies`; then times are
    its compiler's estimates. A site alone is not quite the site in its program, where XLA fuses it with its neighbours.
    Raises `TypeError` for converted parameters and `ValueError` for static ranges that have seen no data.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["up"]), {"up": jnp.ones((64, 32))}
    >>> explanation = jaxq.explain(f, {"up": jaxq.w8a8()})(params, jnp.ones((1, 64)))
    >>> str(explanation).splitlines()[2].split()[:3]
    ['up', 'dot_general', 'two']
    """

    def explained(*args, **kwargs) -> Explanation:
        program = loaded(f, plan, argnums, args, kwargs)
        decided = Plan(program.decisions, program.ranges)
        where = device or jax.devices()[0]
        whole = _whole(f, decided, argnums, (args, kwargs), device)
        pairs = list(zip(program.analysis.located, program.decisions, strict=True))
        known = by_kind(pairs, device)
        lines = tuple(_line(item, decision, known, platform_of(where)) for item, decision in pairs)
        return Explanation(f"{where.device_kind} ({where.platform})", device is None, lines, *whole)

    return explained


def loaded(f: Callable, plan: Plan | Policy, argnums: Argnums, args: tuple, kwargs: dict) -> Program:
    """Trace a call on float parameters and give every site its decision."""
    layout, leaves = take_apart(args, kwargs, argnums)
    if any(is_converted(leaf) for leaf in leaves):
        raise TypeError("float and quantized programs are compared: pass the float parameters, not converted ones")
    return load(f, layout, leaves, plan)


def platform_of(device: Any) -> str:
    """Return the name of a device's platform in the table of forms."""
    return {"cuda": forms.GPU, "gpu": forms.GPU, "cpu": forms.CPU}.get(device.platform, forms.TPU)


def by_kind(pairs: Sequence[tuple[Located, Decision]], device: Any | None = None) -> dict[Any, list[Cost]]:
    """Return the costs of every kind of quantized product, float first; equal ones are compiled once."""
    found: dict[Any, list[Cost]] = {}
    for item, decision in pairs:
        kind = alone.kind_of(item, decision)
        if decision.scheme is not None and alone.is_product(item) and kind not in found:
            found[kind] = costs(alone.programs(item, decision), device)
    return found


def _line(item: Located, decision: Decision, known: dict[Any, list[Cost]], platform: str) -> Line:
    site = item.site
    float_cost, cost = known.get(alone.kind_of(item, decision), (None, None))
    return Line(site.name, site.op, form_of(item, decision, platform), site.flops, float_cost, cost, decision.reason)


def form_of(item: Located, decision: Decision, platform: str) -> str:
    """Return what is emitted for a site on a platform."""
    if decision.scheme is None:
        return "float"
    if not alone.is_product(item):
        return "integers" if decision.is_integer else "decoded rows"
    if not decision.is_integer:
        return "decoded, then float"
    operands = alone.coded(item, decision)
    pairs = zip(item.op.contracted, operands, strict=True)
    if isinstance(item.op, Dot) and any(q.grid[axis] != 1 for axes, q in pairs for axis in axes):
        return "a product for each group"
    if platform != forms.GPU and isinstance(item.op, Dot) and nibbles.packed_side(item.op, operands) is not None:
        return "halves of bytes"
    return forms.choose(platform, item.op, *operands).name


def _whole(f: Callable, plan: Plan, argnums: Argnums, call: tuple[tuple, dict], device: Any | None) -> list[Cost]:
    """Return the costs of the program in float and as planned."""
    args, kwargs = call
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    converted = convert(f, plan, argnums=argnums)(*args, **kwargs)
    own = list(args)
    for number, value in zip(numbers, [converted] if isinstance(argnums, int) else converted, strict=True):
        own[number] = value
    served = _on_leaves(quantize(f, plan, argnums=argnums), tuple(own), kwargs, argnums)
    return costs([_on_leaves(quantize(f, None, argnums=argnums), args, kwargs, argnums), served], device)


def _on_leaves(f: Callable, args: tuple, kwargs: dict, argnums: Argnums) -> tuple[Callable, list]:
    """Return a call as a function of its arrays, and the arrays."""
    layout, leaves = take_apart(args, kwargs, argnums)

    def run(arrays: list):
        own_args, own_kwargs = layout.unflatten(arrays)
        return f(*own_args, **own_kwargs)

    return run, leaves
