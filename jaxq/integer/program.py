"""`integer`: a calibrated plan carried out in integers from the quantized inputs to the last dequantize."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.integer import audit
from jaxq.integer.entry import enter, takers
from jaxq.integer.inputs import entry
from jaxq.integer.interpret import Integers, finished, known
from jaxq.integer.products import Job
from jaxq.integer.rows import Found
from jaxq.integer.values import Constant, Plain, Refusal, Refused, Value
from jaxq.interpretation.arguments import Argnums, Layout, Static, float_of, place, take_apart
from jaxq.interpretation.convert import convert
from jaxq.interpretation.program import Program, load
from jaxq.interpretation.transforms import check_observed
from jaxq.interpretation.weights import site_weights
from jaxq.numbers.qarray import QArray, is_converted
from jaxq.programs import jaxpr
from jaxq.programs.sites import Path


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A function with its weights inside, in integers: call it with what follows the weights.

    It composes with `jit` and `jax.export`, and compiles by itself, for every kind of call. params: those of the
    arguments that `argnums` names, converted; reaches: the largest number of each array that it was built with, zero
    where that is not known; forms: which equations were recognized as softmax or norms, in each kind of call.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: jnp.tanh(x @ p["w"])), {"w": jnp.eye(4)}, jnp.ones((2, 4))
    >>> plan = jaxq.calibrate(f, jaxq.w8a8(static=True), progress=False)(params, [x])
    >>> program = jaxq.integer(f, plan)(params, x)
    >>> jax.jit(program)(x[:1]).shape
    (1, 4)
    """

    fn: Callable
    plan: Plan
    params: tuple
    argnums: tuple[int, ...]
    reaches: tuple[float, ...] = ()
    forms: dict[Static, dict[Path, Found]] = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"IntegerProgram({len(self.plan.sites)} sites)"

    def __call__(self, *args, **kwargs) -> Any:
        """Run the program. Raises `ValueError` as `integer` does, for arguments that make it another program."""
        return self._compiled(*self._call(args, kwargs))

    def check(self, *args, **kwargs) -> "IntegerProgram":
        """Return the program, traced for these arguments or their shapes and proved to hold no float.

        Raises like `integer`, which has asked already for the arguments that it was given.
        """
        spec, data = self._call(args, kwargs)
        audit.check(jax.make_jaxpr(functools.partial(self._run, spec))(data))
        return self

    def _call(self, args: tuple, kwargs: dict) -> tuple[Static, list]:
        """Return what is static about a call, and its arrays."""
        layout, leaves = take_apart(tuple(place(self.params, args, self.argnums)), kwargs, self.argnums)
        return Static(layout), [leaf for leaf, weight in zip(leaves, layout.weights, strict=True) if weight is None]

    @functools.cached_property
    def _compiled(self) -> Callable:
        return jax.jit(self._run, static_argnums=0)

    def _run(self, spec: Static, data: list) -> Any:
        layout: Layout = spec.value
        parameters, arrays = iter(take_apart((self.params,), {}, 0)[1]), iter(data)
        leaves = [next(arrays if weight is None else parameters) for weight in layout.weights]
        program = load(self.fn, layout, leaves, self.plan, shown=False)
        check_observed(program, self.plan.unobserved())
        reaches = iter(self.reaches if len(self.reaches) == len(data) else [0.0] * len(data))
        ends = [next(reaches) if weight is None else 0.0 for weight in layout.weights]
        outs, fixed = _interpreted(program, layout, leaves, ends, self.forms.setdefault(spec, {}))
        out, _ = jax.tree.unflatten(program.out_structure, outs)
        _, changes = jax.tree.unflatten(program.out_structure, fixed)
        if not all(jax.tree.leaves(changes)):  # by the data; what is counted in every call is what it was when built
            raise ValueError("the call changes its module, which an integer program cannot: call module.eval() first")
        return out


def integer(f: Callable, plan: Plan, *, argnums: Argnums = 0) -> Callable[..., IntegerProgram]:
    """Return a function `(params, *args) -> IntegerProgram`: `f` in integers between its inputs and its outputs.

    plan: static and calibrated, such as of `jaxq.w8a8(static=True)`; params: float, or those of `convert`; args may be
    `ShapeDtypeStruct`s. Float inputs are quantized where sites take them, and values outside of the calibrated range
    saturate; NaN enters as zero. What else takes an input, a residual sum or the state of a cell, has it in 24 bits, up
    to 16 times the largest number of the arrays in args. Between sites values are int32 at the scale of the sum that
    they are: a bias is added there, constant factors go into the scale, and a site that takes them rounds them to its
    int8 grid by a fixed-point multiplier, or a shift where all scales are powers of two. Functions of one value become
    tables. What is computed from parameters alone is computed ahead, in float. Raises `TypeError` for a policy, which
    knows no ranges, and `ValueError` that lists every operation without an integer form, with its site or its name, its
    line, the reason and what would make one: scales from the data, sites in float, sums that int32 may not hold.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> def f(params, x):
    ...     return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]
    >>> params = {"up": jnp.eye(4), "bias": jnp.ones((1, 4)), "down": jnp.ones((4, 1))}
    >>> x = jnp.array([[0.5, -1.0, -2.0, 3.0]])
    >>> plan = jaxq.calibrate(f, jaxq.w8a8(static=True), progress=False)(params, [x])
    >>> float(jaxq.integer(f, plan)(params, x)(x)[0, 0].round(1))
    5.5
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            "an integer program needs static ranges: plan = jaxq.calibrate(f, jaxq.w8a8(static=True))(params, "
            f"batches), then jaxq.integer(f, plan); got {plan!r}"
        )

    def built(*args, **kwargs) -> IntegerProgram:
        converted = any(is_converted(leaf) for leaf in take_apart(args, kwargs, argnums)[1])
        numbers = sorted(n % len(args) for n in ((argnums,) if isinstance(argnums, int) else argnums))
        params = tuple(args[n] for n in numbers)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
            raise TypeError("an integer program is built from known weights: build it outside of jit, and jit it then")
        params = params if converted else convert(f, plan, argnums=numbers)(*args, **kwargs)
        data = tuple(arg for n, arg in enumerate(args) if n not in numbers)
        program = IntegerProgram(f, plan, params, tuple(numbers))
        reaches = tuple(map(_reach, program._call(data, kwargs)[1]))
        return dataclasses.replace(program, reaches=reaches).check(*data, **kwargs)

    return built


def _reach(x: Any) -> float:
    """Return the largest finite number of a float array, without sign; zero where it is not known."""
    if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return 0.0
    reals = np.abs(np.asarray(x, np.float32))
    return float(np.max(reals, initial=0.0, where=np.isfinite(reals)))


def _jobs(program: Program, layout: Layout, leaves: list) -> dict[Path, Job]:
    """Return what the plan says of each site."""
    with jax.ensure_compile_time_eval():
        weights = site_weights(program, layout, leaves)
    quads = zip(program.analysis.located, program.decisions, program.all_ranges, strict=True)
    return {item.path: Job(item, d, r, weights.get(d.site.name)) for item, d, r in quads if not item.site.obstacle}


def _interpreted(
    program: Program, layout: Layout, leaves: list, reaches: list[float], forms: dict
) -> tuple[list, list[bool]]:
    """Return the outputs, and which of them do not depend on data. reaches: of each leaf, as in the program."""
    jobs = _jobs(program, layout, leaves)
    # What is codes is read by sites alone: nothing is decoded.
    arrays = [None if isinstance(leaf, QArray) else float_of(leaf) for leaf in leaves]
    problems: list[str] = []
    arguments = _arguments(program, layout, arrays, reaches, jobs)
    values = Integers(jobs, problems, forms).run(program.body, arguments)
    outs = [_left(value, v.aval, problems) for value, v in zip(values, program.body.jaxpr.outvars, strict=True)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"operations without an integer form, {len(problems)} in all:\n{lines}")
    return outs, [isinstance(value, Constant) for value in values]


def _arguments(
    program: Program, layout: Layout, arrays: list, reaches: list[float], jobs: dict[Path, Job]
) -> list[Value]:
    """Return the arguments of the program: parameters as constants, float inputs as codes where a site has a grid."""
    floats = [weight is None and jaxpr.is_float(x) for x, weight in zip(arrays, layout.weights, strict=True)]
    found = takers(program.body, [n if is_float else None for n, is_float in enumerate(floats)], jobs)

    def argument(n: int) -> Value:
        if layout.weights[n] is not None:
            return known(arrays[n])
        if not floats[n]:
            return Plain(arrays[n])
        # The grid of a site is too coarse for others, and no range for them where sites take parts alone.
        if n not in found or (found[n].others and (reaches[n] or not any(found[n].whole))):
            return entry(arrays[n], reaches[n])
        return enter(arrays[n], found[n])

    return [argument(n) for n in range(len(arrays))]


def _left(value: Value, aval: Any, problems: list[str]) -> Any:
    if isinstance(value, Refused):
        return None
    try:
        return finished(value, aval)
    except Refusal as refusal:
        problems.append(f"{refusal.where or 'an output'} {refusal}")
        return None
