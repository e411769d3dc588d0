"""The verbs that run a function: `make_plan`, `observe`, `qat`, `quantize`.

Each wraps a function into one of the same signature. The wrapped function is compiled like `jax.jit` compiles (arrays
traced, other arguments static, closed-over arrays constant), once per function, plan and kind of call, so that calling
it outside `jit` does not analyse the program again. Inside `jit`, `grad`, `vmap`, `scan` it composes.
"""

import contextlib
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxq.decisions import resolve
from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.decisions.recipes import Uniform, w8a8
from jaxq.interpretation import importances, modules
from jaxq.interpretation.ahead import started
from jaxq.interpretation.arguments import Argnums, Layout, Static, take_apart
from jaxq.interpretation.program import Program, load
from jaxq.interpretation.rules import Observe
from jaxq.interpretation.weights import run_without, sort_leaves
from jaxq.numbers import calibrators
from jaxq.numbers.calibrators import Range
from jaxq.numbers.qarray import is_converted
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs import jaxpr

DEFAULT = w8a8()


class Spec(NamedTuple):
    """All that is static about a call: how its arguments are laid out, what to do, what was decided."""

    layout: Static
    watch: str  # "", "float" or "quantized": whether ranges are observed, and in which program
    policy: Static
    blank: frozenset[str]  # sites of the plan whose static ranges have seen no data
    noiseless: bool  # whether it trains without a key, which is an error where something is rounded stochastically


# --- running -------------------------------------------------------------------------------------------------------


def _run(fn: Callable, spec: Spec, ranges: Any, leaves: list, key: jax.Array | None, importance: Any):
    """Trace, resolve and interpret: return `((out, module changes), observations by site name)`."""
    layout: Layout = spec.layout.value
    decided = spec.policy.value
    policy = Plan(decided.decisions, ranges) if isinstance(decided, _Decided) else decided
    with _uncollected():
        program = load(fn, layout, leaves, policy, shown=False)
        if not spec.watch:
            whole = isinstance(policy, Plan)
            check_observed(program, spec.blank if whole else Plan(program.decisions, program.ranges).unobserved())
        if spec.noiseless:
            _check_key(program)
        signals = None if importance is None else importances.signals(program, layout, importance)
        result, seen = _interpret(program, layout, leaves, spec.watch, key, signals)
    names = {item.path: item.site.name for item in program.analysis.located}
    return result, {names[path]: value for path, value in seen.items()}


def _runner(fn: Callable) -> Callable:
    """Return the interpreter of `fn`, compiled; where the call is being traced into a program anyway, as it is."""
    compiled = jax.jit(functools.partial(_run, fn), static_argnums=0)

    def run(spec: Spec, ranges: Any, leaves: list, key: jax.Array | None, importance: Any):
        staged = any(jaxpr.is_staged(leaf) for leaf in leaves)
        call = functools.partial(_run, fn) if staged else compiled
        return call(spec, ranges, leaves, key, importance)

    return run


@contextlib.contextmanager
def _uncollected():
    """Pause cyclic garbage collection: tracing makes many objects that live, and scanning them costs a third of it."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Decided(NamedTuple):
    """The static part of a plan."""

    decisions: tuple


def _interpret(program: Program, layout: Layout, leaves: list, watch: str, key: jax.Array | None, signals: Any):
    rule = Observe(program.execute, watch == "quantized") if watch else program.execute
    arrays, weights = sort_leaves(program, layout, leaves)
    if all(x is not None for x in arrays):
        out, seen = program.run(rule, arrays, weights, key, signals=signals)
        return out, started(program, arrays, seen, signals) if watch and not weights else seen
    return run_without(lambda full: program.run(rule, full, weights, signals=signals), arrays, leaves, layout)


_RUNNERS: dict[tuple[int, Any], Callable] = {}


def _cached_runner(fn: Callable) -> Callable:
    """Return one runner per function, for as long as the function lives; a bound method is its object and function."""
    owner, method = getattr(fn, "__self__", None), getattr(fn, "__func__", None)
    if owner is None or method is None:
        owner, method = fn, None
    key = (id(owner), method)
    if key not in _RUNNERS:
        try:
            alive = weakref.ref(owner, lambda _: _RUNNERS.pop(key, None))
        except TypeError:  # cannot be referred to weakly: compiled once per wrapper
            return _runner(fn)
        _RUNNERS[key] = _runner(_without_owner(alive, method))
    return _RUNNERS[key]


def _without_owner(alive: weakref.ref, method: Callable | None) -> Callable:
    """Return a function that does not keep its owner alive, so that the cache does not either."""

    def call(*args, **kwargs):
        owner = alive()
        return owner(*args, **kwargs) if method is None else method(owner, *args, **kwargs)

    return call


def _call(runner, policy, argnums, args, kwargs, *, watch="", trains=False, key=None, importance=None):
    layout, leaves = take_apart(args, kwargs, argnums)
    given = None if importance is None else importances.by_leaf(importance, layout, argnums)
    if isinstance(policy, Plan):
        ranges = policy.ranges if watch else _shown_if_blank(policy.ranges)
        static, blank = Static(_Decided(policy.decisions)), frozenset(policy.unobserved())
    else:
        static, ranges, blank = Static(policy), (), frozenset()
    (out, changed), seen = runner(
        Spec(Static(layout), watch, static, blank, trains and key is None), ranges, leaves, key, given
    )
    modules.write_back((args, kwargs), changed)
    return out, seen


def _check_key(program: Program) -> None:
    """Raise where a site would round stochastically, or drop quantization."""
    noisy = [d.site.name for d in program.decisions if any(q is not None and q.noisy for q in _trained_by(d))]
    if noisy:
        raise ValueError(
            f"these sites round stochastically, or drop quantization, by a key that is not there: {', '.join(noisy)}; "
            "train with jaxq.qat(f, policy, key=key), a new key for every step"
        )


def _shown_if_blank(ranges: tuple) -> tuple:
    """Return ranges that are NaN where nothing was observed and nobody can tell before the program runs."""
    return tuple(tuple(None if r is None else calibrators.shown_if_blank(r) for r in site) for site in ranges)


def _trained_by(decision: Decision) -> tuple[Quantizer | None, ...]:
    """Return the quantizers of a site, those of its backward products included."""
    backward = decision.scheme.backward if decision.scheme else None
    return (*decision.quantizers, *((backward.act, backward.weight) if backward else ()))


def check_observed(program: Program, blank: Collection[str]) -> None:
    """Raise where a site that will run has a static range among the `blank` ones."""
    active = [d for d in program.decisions if d.scheme is not None]
    needed = [name for d in active for name in (*(fed.site for fed in d.fed if fed), d.site.name)]
    unseen = [name for name in dict.fromkeys(needed) if name in blank]
    if unseen:
        maybe = {item.site.name for item in program.analysis.located if item.maybe} & set(unseen)
        passed = f" with batches that reach {', '.join(sorted(maybe))} (in a branch or a while loop)" if maybe else ""
        raise ValueError(
            f"static ranges of these sites have seen no data: {', '.join(unseen)}; "
            f"run jaxq.calibrate(f, plan)(params, batches) first{passed}, or use a dynamic scheme such as jaxq.w8a8()"
        )


# --- the verbs -----------------------------------------------------------------------------------------------------


def make_plan(f: Callable, policy: Policy | Plan = DEFAULT, *, argnums: Argnums = 0) -> Callable[..., Plan]:
    """Return a function that traces `f` on its arguments and returns the `Plan`: a decision for every site.

    The arguments may be `ShapeDtypeStruct`s. argnums: which positional arguments hold the weights. Raises `ValueError`
    for a glob that matches nothing, for a site that cannot be quantized as asked, and `CoverageError` for an operation
    that cannot be reached.

    >>> import jax.numpy as jnp, jaxq
    >>> def f(params, x):
    ...     return jnp.tanh(x @ params["up"]) @ params["head"]
    >>> params = {"up": jnp.ones((8, 16)), "head": jnp.ones((16, 4))}
    >>> plan = jaxq.make_plan(f, {"head": None, "*": jaxq.w8a8()})(params, jnp.ones((2, 8)))
    >>> [(d.site.name, d.reason) for d in plan.decisions]
    [('up', ''), ('head', 'by policy')]
    """

    def planned(*args, **kwargs) -> Plan:
        layout, leaves = take_apart(args, kwargs, argnums)
        program = load(f, layout, leaves, policy)
        plan = resolve.connected(program.decisions, program.ranges)
        return dataclasses.replace(plan, floats=program.analysis.floats)

    return planned


def qat(
    f: Callable | None = None,
    policy: Policy | Plan = DEFAULT,
    *,
    argnums: Argnums = 0,
    key: jax.Array | None = None,
) -> Callable:
    """Return `f` with quantization in force in the forward pass: same signature, differentiable straight through.

    The forward pass runs the integer kernels that `quantize` runs. The backward pass multiplies *dequantized* operands
    in float and lets gradients through where the rounded value was inside its range; with `Scheme(grad=)` it multiplies
    integers. policy: a policy or a `Plan`; also `@jaxq.qat(policy=...)`. key: rounds gradients stochastically, so that
    they are unbiased, and operands with `rounding=Stochastic()` or `drop=`, which have to have one; each site and
    iteration of a loop by its own, folded from it. Take a new one for every step. Arrays in the arguments are traced,
    everything else is static. Raises `ValueError` for a plan with unobserved static ranges (NaN comes
    of them where the plan is traced) or of another program, `TypeError` for converted parameters and what is no key.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> @jaxq.qat(policy=jaxq.w8a8())
    ... def loss(params, x):
    ...     return jnp.sum((x @ params["w"]) ** 2)
    >>> jax.grad(loss)({"w": jnp.eye(4)}, jnp.ones((2, 4)))["w"].shape
    (4, 4)
    """
    if key is not None and not _is_key(key):
        raise TypeError(f"key= is one key, such as jax.random.key(step), got {key!r}")
    if f is None:
        return functools.partial(qat, policy=policy, argnums=argnums, key=key)
    return _wrap(f, policy, argnums, trains=True, key=key)


def _is_key(key: Any) -> bool:
    """Tell whether it is one random key, typed or raw."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        return False
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == 0 if typed else key.dtype == np.uint32 and key.ndim == 1


def quantize(f: Callable | None = None, policy: Policy | Plan = DEFAULT, *, argnums: Argnums = 0) -> Callable:
    """Return `f` in low precision: same signature, takes float parameters or those of `convert`.

    Integer dots and convolutions wherever weights and activations are quantized; decoded weights where only they are.
    Straight-through towards float leaves (adapters on a quantized base); a gradient by a `QArray` raises. Rounds to
    nearest what training rounds stochastically. Raises
    `ValueError` for parameters converted with another plan or for another function.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> def f(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    >>> jax.jit(jaxq.quantize(f, plan))(jaxq.convert(f, plan)(params, x), x).shape
    (2, 4)
    """
    if f is None:
        return functools.partial(quantize, policy=policy, argnums=argnums)
    return _wrap(f, policy, argnums, trains=False)


def _wrap(f: Callable, policy: Policy | Plan, argnums: Argnums, *, trains: bool, key=None) -> Callable:
    if not callable(f) or isinstance(f, (Uniform, Quantizer)):
        raise TypeError(f"the first argument is the function to transform, got {f!r}; as a decorator use policy=...")
    policy = dict(policy) if isinstance(policy, Mapping) else policy  # changing the dict later changes nothing
    runner = _cached_runner(f)

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        if trains and any(is_converted(leaf) for leaf in jax.tree.leaves((args, kwargs), is_leaf=is_converted)):
            raise TypeError("jaxq.qat trains float parameters, and these are converted: use jaxq.quantize")
        return _call(runner, policy, argnums, args, kwargs, trains=trains, key=key)[0]

    return wrapped


def observe(
    f: Callable,
    policy: Policy | Plan = DEFAULT,
    *,
    argnums: Argnums = 0,
    quantized: bool = False,
    key: jax.Array | None = None,
    importance: Any = None,
) -> Callable[..., tuple[Any, Plan]]:
    """Return a function that returns `(f(*args), plan)`, the plan's static ranges updated by what was seen.

    quantized: run the quantized program instead of the float one, differentiable: moving averages during training.
    key: as for `qat`. Observed ranges are one per site, or one per layer where a scan runs over stacked weights.
    Branches that do not run show nothing of their activations; learned parameters of their weights start all the same.

    importance: for learned codebooks of weights, what the squared error of each value counts when their centroids are
    fitted, such as the mean squares of gradients (the Fisher information; Choi et al. 2017): a tree like the weights',
    at least zero; a tuple of trees where `argnums` is one. Raises `ValueError` for importance that fits no codebook, of
    centroids that were fitted before or of a weight that is not one of the parameters.

    >>> import jax.numpy as jnp, jaxq
    >>> def f(params, x):
    ...     return x @ params["w"]
    >>> params = {"w": jnp.eye(4)}
    >>> y, plan = jaxq.observe(f, jaxq.w8a8(static=True))(params, 3 * jnp.ones((2, 4)))
    >>> float(plan.range("w")[0].hi)
    3.0
    """
    runner = _cached_runner(f)

    def observed(*args, **kwargs) -> tuple[Any, Plan]:
        plan = policy if isinstance(policy, Plan) else make_plan(f, policy, argnums=argnums)(*args, **kwargs)
        if importance is not None:
            importances.check(plan)
        watch = "quantized" if quantized else "float"
        out, seen = _call(
            runner, plan, argnums, args, kwargs, watch=watch, trains=quantized, key=key, importance=importance
        )
        return out, updated(plan, seen)

    return observed


def updated(plan: Plan, seen: dict[str, tuple[Range | None, ...]]) -> Plan:
    """Return the plan with each static range moved by its calibrator."""
    ranges = []
    for decision, olds in zip(plan.decisions, plan.ranges, strict=True):
        news = seen.get(decision.site.name, (None,) * len(olds))
        triples = zip(decision.ranged, olds, news, strict=True)
        ranges.append(tuple(old if new is None else calibrators.update(q, old, new) for q, old, new in triples))
    return dataclasses.replace(plan, ranges=tuple(ranges))
