"""Where every value of a program comes from: the dataflow that tells weights from activations.

An abstract interpretation over `Value`s. A value is *pure* when it is computed from parameters and constants alone: a
pure operand of a matmul is a weight, wherever it stands and whatever was done to it. Paths of equation numbers, not
variables, name places: sub-programs are shared between call sites. Loops run to a fixpoint.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Branches, CustomRule, Eqn, Loop, Manual, Opaque, While
from jaxq.programs.moves import ZERO, moved
from jaxq.programs.sites import Leaf, Made, Path

NONE: frozenset = frozenset()


class Value(NamedTuple):
    """What is known of where a value comes from.

    sources: parameter leaves it is made of; pure: of nothing but parameters and constants; leaf: set while it is one
    leaf, merely moved; near: leaves of the nearest upstream weights; variant: loops in which it changes from one
    iteration to the next; product: downstream of a weightless product, no weight since; made: set while it is the
    output of one site, merely moved.
    """

    sources: frozenset[int] = NONE
    pure: bool = True
    leaf: Leaf | None = None
    near: frozenset[int] = NONE
    variant: frozenset[Path] = NONE
    product: bool = False
    made: Made | None = None


CONSTANT = Value()
ZEROS = Value(made=ZERO)
DATA = Value(pure=False)


def parameter(index: int, rank: int) -> Value:
    """Return the value of a parameter leaf."""
    return Value(frozenset([index]), True, Leaf(index, tuple(range(rank))))


def join(values: Iterable[Value]) -> Value:
    """Return what holds of something that may be any of `values`, or made of all of them."""
    values = list(dict.fromkeys(values))
    if len(values) < 2:
        return values[0] if values else CONSTANT
    return Value(
        frozenset().union(*(v.sources for v in values)),
        all(v.pure for v in values),
        None,
        frozenset().union(*(v.near for v in values)),
        frozenset().union(*(v.variant for v in values)),
        any(v.product for v in values),
    )


class Around(NamedTuple):
    """What encloses an equation: loops (path, length; None for a while), a shard_map, an opaque primitive,
    scopes, a backward pass, a branch, a function with a derivative of its own."""

    loops: tuple[tuple[Path, int | None], ...] = ()
    manual: bool = False
    opaque: str = ""
    scope: tuple[str, ...] = ()
    backward: bool = False
    branch: bool = False
    custom: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """An equation that multiplies matrices, convolves or looks up, with the provenance of its operands."""

    path: Path
    eqn: Eqn
    operands: tuple[Value, ...]
    around: Around


Visit = Callable[[Found], None]


def flow(
    body: Body, args: Iterable[Value], path: Path, around: Around, visit: Visit, constant: Value = CONSTANT
) -> list[Value]:
    """Return the values of a program's outputs; call `visit` for every site equation, in program order.

    constant: what the program's own (closed-over) arrays are.
    """
    env = dict(zip(body.invars, [*(constant for _ in body.consts), *args], strict=True))
    for number, eqn in enumerate(body.jaxpr.eqns):
        ins = [_literal(v) if isinstance(v, jaxpr.Literal) else env[v] for v in eqn.invars]
        outs = _step(eqn, ins, (*path, number), around, visit)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [CONSTANT if isinstance(v, jaxpr.Literal) else env[v] for v in body.jaxpr.outvars]


def _literal(literal: jaxpr.Literal) -> Value:
    return ZEROS if jaxpr.is_zero(literal) else CONSTANT


def _step(eqn: Eqn, ins: list[Value], path: Path, around: Around, visit: Visit) -> list[Value]:
    if jaxpr.is_site_primitive(eqn) or _is_lookup(eqn, ins):
        visit(Found(path, eqn, tuple(ins), around))
        return [_product(eqn, ins, path)] * len(eqn.outvars)
    sub = jaxpr.subprogram(eqn)
    if sub is None:
        return [_move(eqn, ins)] * len(eqn.outvars)
    scope, backward = jaxpr.scopes(eqn)
    inner = around._replace(scope=(*around.scope, *scope), backward=around.backward or backward)
    if isinstance(sub, Loop):
        return _loop(sub, ins, path, inner, visit)
    if isinstance(sub, While):
        return _while(sub, ins, path, inner, visit)
    if isinstance(sub, Branches):
        return _branches(sub, ins, path, inner, visit)
    if isinstance(sub, Opaque):
        return _opaque(eqn, sub, ins, path, inner, visit)
    if isinstance(sub, Manual):
        inner = inner._replace(manual=True)
        outs = flow(sub.body, [_part(v) for v in ins], (*path, 0), inner, visit)
        return [_part(v) for v in outs]
    inner = inner._replace(custom=inner.custom or isinstance(sub, CustomRule))
    return flow(sub.body, ins, (*path, 0), inner, visit)


def _part(value: Value) -> Value:
    """Return the value of a slice of an array, or of slices put together."""
    return value if value.made is None else value._replace(made=value.made._replace(whole=False))


def _is_lookup(eqn: Eqn, ins: list[Value]) -> bool:
    if eqn.primitive not in jaxpr.LOOKUPS or not jaxpr.is_float(eqn.invars[0].aval):
        return False
    by_data = any(not index.pure for index in ins[1:])
    return ins[0].pure and bool(ins[0].sources) and by_data and (eqn.primitive is jaxpr.GATHER or _takes_rows(eqn))


def _takes_rows(eqn: Eqn) -> bool:
    """Tell whether a `dynamic_slice` takes rows of a table, whole along some axis: elements that can share a scale."""
    pairs = list(zip(eqn.params["slice_sizes"], eqn.invars[0].aval.shape, strict=True))
    return any(size == n > 1 for size, n in pairs) and any(size != n for size, n in pairs)


def _product(eqn: Eqn, ins: list[Value], path: Path) -> Value:
    """Return the value of a site's output: its nearest weights are its own, or its operands' if it has none."""
    out = join(ins)._replace(leaf=None, made=None)
    if out.pure:
        return out
    out = out._replace(made=Made(path))
    weights = [v for v in ins if v.pure and v.sources]
    if weights:
        return out._replace(sources=NONE, near=frozenset().union(*(v.sources for v in weights)), product=False)
    return out._replace(sources=NONE, product=eqn.primitive not in jaxpr.LOOKUPS)


def _move(eqn: Eqn, ins: list[Value]) -> Value:
    """Return the value of an ordinary equation's outputs; what is read from a mutable reference is data."""
    if eqn.effects and not (eqn.primitive is jaxpr.READ and ins[0].leaf is not None):
        out = join(ins)
        return Value(NONE, False, None, out.near, out.variant, out.product)
    impure = [v for v in ins if not v.pure]
    out = _data(impure, ins) if impure else _derived(eqn, ins)
    made = moved(eqn, [v.made for v in ins])
    return out if out.made == made else out._replace(made=made)


def _derived(eqn: Eqn, ins: list[Value]) -> Value:
    """Return the value of what is computed from parameters and constants alone."""
    out = join(ins)
    if out.leaf is None or eqn.primitive in jaxpr.SAME_VALUE:
        return out
    if eqn.primitive is jaxpr.TRANSPOSE:
        order = eqn.params["permutation"]
        return out._replace(leaf=Leaf(out.leaf.index, tuple(out.leaf.permutation[axis] for axis in order)))
    return out._replace(leaf=None)


def _data(impure: list[Value], ins: list[Value]) -> Value:
    """Return the value of what is computed from data: weights that went in by the way leave no trace but `variant`."""
    first = impure[0]
    if len(ins) == 1:
        return first
    if all(v is first or v.variant <= first.variant for v in ins) and all(v is first or v == first for v in impure):
        return first
    near = frozenset().union(*(v.near for v in impure))
    variant = frozenset().union(*(v.variant for v in ins))
    return Value(NONE, False, None, near, variant, any(v.product for v in impure))


def _carried(body: Body, first: int, inits: list[Value]) -> list[bool]:
    """Tell which carries come out of the body as they went in: those do not vary."""
    invars = body.invars[len(body.consts) + first :]
    return [invars[i] is body.jaxpr.outvars[i] for i in range(len(inits))]


def _fixpoint(run: Callable[[list[Value]], list[Value]], inits: list[Value], still: list[bool], path: Path):
    def entering(now: list[Value]) -> list[Value]:
        return [v if s else v._replace(leaf=None, variant=v.variant | {path}) for v, s in zip(now, still, strict=True)]

    now = list(inits)
    while True:
        outs = run(entering(now))
        later = [a if s else join([a, b]) for a, b, s in zip(now, outs, still, strict=False)]
        if later == now:
            return entering(now)
        now = later


def _leave(value: Value, path: Path) -> Value:
    return value._replace(variant=value.variant - {path})


def _ignore(found: Found) -> None:
    del found


def _loop(loop: Loop, ins: list[Value], path: Path, around: Around, visit: Visit) -> list[Value]:
    constants, rest = ins[: loop.constants], ins[loop.constants :]
    inits, xs = rest[: loop.carries], [_slice(v, path) for v in rest[loop.carries :]]
    inner = around._replace(loops=(*around.loops, (path, loop.length)))

    def run(carries: list[Value], each: Visit = _ignore) -> list[Value]:
        return flow(loop.body, [*constants, *carries, *xs], (*path, 0), inner, each)

    still = _carried(loop.body, loop.constants, inits)
    carries = _fixpoint(run, inits, still, path)
    outs = run(carries, visit)
    finals = [join([_leave(a, path), _leave(b, path)]) for a, b in zip(carries, outs, strict=False)]
    return finals + [_part(_leave(v, path)._replace(leaf=None)) for v in outs[loop.carries :]]


def _slice(value: Value, path: Path) -> Value:
    """Return the value of one iteration's slice of a scanned array."""
    leaf = value.leaf
    if leaf is not None:
        order = leaf.permutation
        leaf = Leaf(leaf.index, tuple(a - 1 for a in order[1:])) if order and order[0] == 0 else None
    return _part(value._replace(leaf=leaf, variant=value.variant | {path}))


def _while(loop: While, ins: list[Value], path: Path, around: Around, visit: Visit) -> list[Value]:
    a, b = loop.condition_constants, loop.condition_constants + loop.body_constants
    tests, constants, inits = ins[:a], ins[a:b], ins[b:]
    inner = around._replace(loops=(*around.loops, (path, None)))

    def run(carries: list[Value], each: Visit = _ignore) -> list[Value]:
        return flow(loop.body, [*constants, *carries], (*path, 1), inner, each)

    still = _carried(loop.body, loop.body_constants, inits)
    carries = _fixpoint(run, inits, still, path)
    (goes_on,) = flow(loop.condition, [*tests, *carries], (*path, 0), inner, visit)
    outs = run(carries, visit)
    finals = [join([_leave(x, path), _leave(y, path)]) for x, y in zip(carries, outs, strict=True)]
    return finals if goes_on.pure else [v if s else v._replace(pure=False) for v, s in zip(finals, still, strict=True)]


def _branches(sub: Branches, ins: list[Value], path: Path, around: Around, visit: Visit) -> list[Value]:
    inner = around._replace(branch=True)
    outs = [flow(body, ins[1:], (*path, n), inner, visit) for n, body in enumerate(sub.bodies)]
    joined = [join(values) for values in zip(*outs, strict=True)]
    return joined if ins[0].pure else [v._replace(pure=False, leaf=None) for v in joined]


def _opaque(eqn: Eqn, sub: Opaque, ins: list[Value], path: Path, around: Around, visit: Visit) -> list[Value]:
    inner = around._replace(opaque=eqn.primitive.name)
    for n, body in enumerate(sub.bodies):
        args = [DATA] * (len(body.invars) - len(body.consts))
        flow(body, args, (*path, n), inner, visit)
    return [join(ins)._replace(leaf=None, made=None)] * len(eqn.outvars)
