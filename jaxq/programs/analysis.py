"""From a traced program to its sites: names, roles, what stands in the way, and proof that none was missed.

Names come from where the weight comes from (see `provenance`), so that one plan serves every variant of a model and all
frameworks agree. The audit at the end compares the equations visited with all that exist in any parameter.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

from jaxq.programs import batchnorm, jaxpr, ops, outputs
from jaxq.programs.floating import Floating, floating
from jaxq.programs.jaxpr import Body
from jaxq.programs.provenance import CONSTANT, DATA, NONE, Around, Found, Value, flow, parameter
from jaxq.programs.sites import Feed, Located, Operand, Path, Site

Names = tuple[tuple[str, ...], ...]
Feeds = tuple[Feed | None, ...]


class CoverageError(RuntimeError):
    """An operation of the program that jaxq could not reach, and therefore cannot account for.

    >>> import jaxq
    >>> issubclass(jaxq.CoverageError, RuntimeError)
    True
    """


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The sites of a program in program order; floats: what else has no integer form, if that was looked for."""

    located: tuple[Located, ...]
    floats: tuple[Floating, ...] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites as plans keep them."""
        return tuple(item.site for item in self.located)


def analyze(body: Body, leaves: Sequence[int | None], names: Names, shown: bool = True) -> Analysis:
    """Find every site of a program.

    leaves: for each argument the index of the parameter leaf it is, or None for data; names: the leaves' tree paths;
    shown: look up what only plans keep, which is slow: source lines, BatchNorms, what has no integer form.
    Raises `CoverageError` naming each matmul or convolution that was not reached.
    """
    found: list[Found] = []
    invars = body.jaxpr.invars
    args = [DATA if i is None else parameter(i, v.aval.ndim) for v, i in zip(invars, leaves, strict=True)]
    # A function of parameters alone has closed over its data; otherwise what is closed over is taken for weights.
    constant = DATA if all(value.pure for value in args) else CONSTANT
    flow(body, args, (), Around(), found.append, constant)
    _audit(body, found)
    located = _locate(found, names)
    if not shown:
        return Analysis(located)
    sites = frozenset(item.path for item in located)
    return Analysis(_shown(body, leaves, located, found), floating(body, (i is None for i in leaves), sites))


def _shown(body: Body, leaves: Sequence[int | None], located: tuple[Located, ...], found: list[Found]) -> tuple:
    """Return sites with what only plans keep: their lines, the BatchNorms that follow, the functions before."""
    paths = frozenset(item.path for item in located)
    norms, before = batchnorm.notes(body, (i is not None for i in leaves), paths), outputs.outputs(body, paths)
    shown = []
    for item, equation in zip(located, found, strict=True):
        source = os.path.basename(jaxpr.source_line(equation.eqn))
        functions = before.get(item.path, ())  # nothing is known within a while loop
        blank = ("",) * (len(item.site.operands) - len(functions))
        pairs = zip(item.site.operands, (*functions, *blank), strict=False)
        operands = tuple(dataclasses.replace(operand, after=function) for operand, function in pairs)
        site = dataclasses.replace(item.site, source=source, norms=norms.get(item.path, ()), operands=operands)
        shown.append(dataclasses.replace(item, site=site))
    return tuple(shown)


def _audit(body: Body, found: list[Found]) -> None:
    """Raise if some equation of the program that multiplies or convolves was not visited."""
    seen = {id(item.eqn) for item in found}
    missed = [e for e in jaxpr.all_equations(body) if jaxpr.is_site_primitive(e) and id(e) not in seen]
    if missed:
        lines = "\n".join(f"  {e.primitive.name} at {jaxpr.source_line(e)}" for e in missed)
        raise CoverageError(
            f"{len(missed)} operations of this program were not reached and would stay float in silence:\n{lines}\n"
            "Please report the primitive that holds them; until then, trace a function without them."
        )


# --- obstacles -----------------------------------------------------------------------------------------------------


def _weight_of(item: Found, operands: int) -> int | None:
    pure = [n for n, value in enumerate(item.operands[:operands]) if value.pure]
    return pure[0] if len(pure) == 1 else None


def _obstacle(item: Found, op: ops.Op, backward: bool) -> str:
    if item.around.opaque:
        return f"inside {item.around.opaque}, which cannot be entered"
    if backward:
        return "backward pass"
    avals = [v.aval for v in item.eqn.invars[: op.operands]]
    if not all(jaxpr.is_float(aval) for aval in (*avals, item.eqn.outvars[0].aval)):
        return f"operands are {', '.join(str(aval.dtype) for aval in avals)}"
    if op.operands == 2 and all(value.pure for value in item.operands[:2]):
        return "weights only: part of a derived weight" if _sources(item, 2) else "constants only"
    if isinstance(op, ops.Conv) and op.batch_groups != 1:
        return "batch groups: the form of a gradient"
    if isinstance(op, ops.RaggedDot) and not op.is_rows_by_experts:
        return "ragged form without an integer kernel"
    return ""


def _sources(item: Found, operands: int) -> frozenset[int]:
    return frozenset().union(*(value.sources for value in item.operands[:operands]))


# --- names ---------------------------------------------------------------------------------------------------------


def _parents(sources: frozenset[int], names: Names) -> tuple[str, ...]:
    """Return a weight's path without the leaf's own name: common prefix, then what differs joined by `+`."""
    if len(sources) == 1:
        (only,) = sources
        return names[only][:-1] or names[only]
    return _joined([names[i][:-1] or names[i] for i in sorted(sources)])


def _full(sources: frozenset[int], names: Names) -> tuple[str, ...]:
    return _joined([names[i] for i in sorted(sources)])


def _joined(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    prefix = tuple(os.path.commonprefix(paths))
    rest = sorted({"/".join(path[len(prefix) :]) for path in paths} - {""})
    return (*prefix, "+".join(rest)) if rest else prefix


def _clean(scope: tuple[str, ...]) -> tuple[str, ...]:
    """Drop what is not a name in a scope: einsum specs, method names, lambdas."""
    return tuple(s for s in scope if not set(s) & set("<>,-.() "))


def _roots(items: list[tuple[Found, frozenset[int], tuple[str, ...]]], names: Names) -> set[str]:
    """Return the scopes that name a root module, which parameter paths do not: `Encoder` in `Encoder/layer_0`."""
    exact: set[str] = set()
    vetoed: set[str] = set()
    for _, sources, scope in items:
        path = _parents(sources, names) if sources and all(len(names[i]) > 1 for i in sources) else ()
        if path and scope:
            (vetoed if scope[0] == path[0] else exact if scope[1:] == path else set()).add(scope[0])
    return exact - vetoed


class _Namer:
    """Gives every site its name; a weight used again, or a name already taken, gets `#1`, `#2`."""

    def __init__(self, names: Names, roots: set[str], clashes: set[tuple[str, ...]]):
        self.names, self.roots, self.clashes = names, roots, clashes
        self.taken: collections.Counter[str] = collections.Counter()
        self.used: set[str] = set()
        self.anonymous: collections.Counter[str] = collections.Counter()

    def name(self, item: Found, op: ops.Op, sources: frozenset[int], scope: tuple[str, ...]) -> str:
        base = self.base(item, op, sources, scope) or self.nameless(op)
        name = base
        while name in self.used:
            self.taken[base] += 1
            name = f"{base}#{self.taken[base]}"
        self.used.add(name)
        return name

    def base(self, item: Found, op: ops.Op, sources: frozenset[int], scope: tuple[str, ...]) -> str:
        if sources:
            short = _parents(sources, self.names)
            return "/".join(_full(sources, self.names) if short in self.clashes else short)
        weightless = op.operands == 2 and not any(v.pure for v in item.operands[:2])
        scope = scope[1:] if scope and scope[0] in self.roots else scope
        if not weightless:
            return "/".join(scope)
        near = frozenset().union(*(v.near for v in item.operands[:2]))
        place = scope or self.prefix(near)
        kind = "pv" if any(v.product for v in item.operands[:2]) else "qk"
        return "/".join((*place, kind)) if place or near else ""

    def prefix(self, near: frozenset[int]) -> tuple[str, ...]:
        return tuple(os.path.commonprefix([self.names[i][:-1] for i in sorted(near)])) if near else ()

    def nameless(self, op: ops.Op) -> str:
        kind = {"dot_general": "dot", "conv_general_dilated": "conv"}.get(op.name, op.name)
        number = self.anonymous[kind]
        self.anonymous[kind] += 1
        return f"{kind}{number}"


# --- sites ---------------------------------------------------------------------------------------------------------


class _Parsed(NamedTuple):
    """A found equation, read: op, weight operand and what it is made of, scope, what stands in the way."""

    item: Found
    op: ops.Op
    weight: int | None
    sources: frozenset[int]
    scope: tuple[str, ...]
    why: str


def _parse(item: Found) -> _Parsed:
    op = ops.read(item.eqn)
    scope, backward = jaxpr.scopes(item.eqn)
    why = _obstacle(item, op, backward or item.around.backward)
    weight = _weight_of(item, op.operands)
    pure = all(value.pure for value in item.operands[: op.operands])
    sources = _sources(item, op.operands) if pure else NONE if weight is None else item.operands[weight].sources
    return _Parsed(item, op, weight, sources, _clean((*item.around.scope, *scope)), why)


def _locate(found: list[Found], names: Names) -> tuple[Located, ...]:
    parsed = [_parse(item) for item in found]
    roots = _roots([(p.item, p.sources, p.scope) for p in parsed if not p.why], names)
    namer = _Namer(names, roots, _clashes([p.sources for p in parsed if not p.why], names))
    stacks = _stacks([(p.item, p.weight) for p in parsed])
    # Sites first, so that no derived weight's inner product takes the name of the site it serves.
    order = sorted(range(len(parsed)), key=lambda n: bool(parsed[n].why))
    named = {n: namer.name(parsed[n].item, parsed[n].op, parsed[n].sources, parsed[n].scope) for n in order}
    makers = {p.item.path: _Maker(named[n], _loops(p.item, stacks[n])) for n, p in enumerate(parsed)}
    feeds = [_feeds(p, stacks[n], makers) for n, p in enumerate(parsed)]
    return tuple(_located(p, named[n], (stacks[n], feeds[n]), names) for n, p in enumerate(parsed))


class _Maker(NamedTuple):
    """A site as what it puts out is told by: its name, and the scans that iterate over its weight, outermost first."""

    name: str
    loops: tuple[Path, ...]


def _loops(item: Found, stacked: frozenset[Path]) -> tuple[Path, ...]:
    return tuple(path for path, _ in item.around.loops if path in stacked)


def _feeds(parsed: _Parsed, stacked: frozenset[Path], makers: dict[Path, _Maker]) -> Feeds:
    """Return whose output every operand is, where the layers that its maker has a range for are the site's own."""
    loops, feeds = _loops(parsed.item, stacked), []
    for value in parsed.item.operands[: parsed.op.operands]:
        maker = makers.get(value.made.path) if value.made else None
        fits = maker is not None and loops[: len(maker.loops)] == maker.loops
        feeds.append(Feed(maker.name, value.made.whole, value.made.padded) if fits else None)
    return tuple(feeds)


def _clashes(all_sources: list[frozenset[int]], names: Names) -> set[tuple[str, ...]]:
    """Return the short names that two different weights would share: those keep their leaf's name."""
    users: dict[tuple[str, ...], set[frozenset[int]]] = collections.defaultdict(set)
    for sources in all_sources:
        if sources:
            users[_parents(sources, names)].add(sources)
    return {short for short, weights in users.items() if len(weights) > 1}


def _stacks(items: list[tuple[Found, int | None]]) -> list[frozenset[Path]]:
    """Return for each site the scans that iterate over it: its weight's, or its neighbours' where it has none."""
    varying: set[Path] = set()
    for item, weight in items:
        if weight is not None:
            varying |= item.operands[weight].variant
    stacks = []
    for item, weight in items:
        loops = {path for path, length in item.around.loops if length is not None}
        stacks.append(frozenset(loops & (varying if weight is None else item.operands[weight].variant)))
    return stacks


def _located(parsed: _Parsed, name: str, placed: tuple[frozenset[Path], Feeds], names: Names) -> Located:
    item, op, weight, _, scope, why = parsed
    stacked, feeds = placed
    value = Value() if weight is None else item.operands[weight]
    operands = tuple(_operand(item, op, n, n == weight, names) for n in range(op.operands))
    out = item.eqn.outvars[0].aval
    shapes = [operand.shape for operand in operands]
    site = Site(
        name=name,
        op=op.name,
        operands=operands,
        out_shape=tuple(out.shape),
        out_dtype=_dtype_name(out.dtype),
        terms=op.terms(shapes),
        reuse=op.reuse(shapes, tuple(out.shape)),
        stack=tuple(length for path, length in item.around.loops if path in stacked),
        scope="/".join(scope),
        obstacle=why,
        custom=item.around.custom,
    )
    in_while = any(path in value.variant for path, length in item.around.loops if length is None)
    convertible = weight is not None and not in_while and not item.around.manual
    maybe = item.around.branch or any(length is None for _, length in item.around.loops)
    sources = tuple(sorted(value.sources))
    return Located(site, item.path, op, weight, value.leaf, sources, stacked, convertible, feeds, maybe)


def _operand(item: Found, op: ops.Op, number: int, is_weight: bool, names: Names) -> Operand:
    aval = item.eqn.invars[number].aval
    origins = tuple("/".join(names[i]) for i in sorted(item.operands[number].sources)) if is_weight else ()
    shape = tuple(int(n) if isinstance(n, int) else n for n in aval.shape)
    return Operand("weight" if is_weight else "act", shape, _dtype_name(aval.dtype), op.contracted[number], origins)


_dtype_name = functools.cache(str)
