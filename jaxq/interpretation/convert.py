"""`convert`: weights quantized ahead of time, in the tree they came in.

Weights are captured where they are used, by interpreting the program once, so derived weights (a concatenation, weight
normalisation, merged adapters) convert like plain leaves. What the quantized program no longer reads is dropped; what
it reads both ways is kept both ways.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.decisions.policy import Policy
from jaxq.interpretation.ahead import ahead
from jaxq.interpretation.arguments import Argnums, Layout, shape_of, take_apart
from jaxq.interpretation.program import Program, load
from jaxq.interpretation.rules import Capture
from jaxq.interpretation.transforms import DEFAULT
from jaxq.interpretation.weights import to_leaf
from jaxq.numbers.calibrators import is_blank
from jaxq.numbers.parameters import Parameters
from jaxq.numbers.qarray import Dropped, QArray, Stored, is_converted
from jaxq.programs import jaxpr
from jaxq.programs.sites import Located

Captured = dict[str, tuple[Located, QArray]]  # by site


def convert(f: Callable, policy: Policy | Plan = DEFAULT, *, argnums: Argnums = 0) -> Callable[..., Any]:
    """Return a function `(params, *args) -> params` with quantized weights stored as `QArray`s.

    The tree stays: a weight that is one leaf becomes a `QArray` of the leaf's shape, a derived weight sits at its first
    source leaf (`Stored`), a leaf that is no longer read becomes `Dropped`. The arguments after the weights may be
    `ShapeDtypeStruct`s. Raises `ValueError` for NaN or infinity in the weights and `TypeError` for weights that were
    converted before.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> jaxq.convert(f, jaxq.w8a8())(params, jnp.ones((2, 4)))["w"]
    QArray(int8[4, 4], scale [1, 4], for float32)
    """

    def converted(*args, **kwargs) -> Any:
        layout, leaves = take_apart(args, kwargs, argnums)
        _check_weights(layout, leaves)
        program = load(f, layout, leaves, policy)
        _check_learned(program)
        captured = _capture(program, leaves)
        _check_scales(captured)
        read = _still_read(program, leaves, captured)
        by_index = {i: (leaf, r) for leaf, i, r in zip(leaves, layout.weights, read, strict=True) if i is not None}
        homes = {i: _store(i, leaf, r, captured, program) for i, (leaf, r) in by_index.items()}
        new = [leaf if i is None else homes[i] for leaf, i in zip(leaves, layout.weights, strict=True)]
        new_args = layout.unflatten(new)[0]
        return new_args[argnums] if isinstance(argnums, int) else tuple(new_args[n] for n in argnums)

    return converted


def _check_weights(layout: Layout, leaves: list) -> None:
    for n, leaf in enumerate(leaves):
        if is_converted(leaf):
            raise TypeError(f"'{layout.name(n)}' is converted already; convert takes float parameters")
        known = isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, jax.core.Tracer)
        if layout.weights[n] is None or not known:
            continue
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            raise ValueError(
                f"weight '{layout.name(n)}' holds NaN or infinity: there is no scale for it; repair it first"
            )


def _check_learned(program: Program) -> None:
    pairs = zip(program.decisions, program.ranges, strict=True)
    blank = [d.site.name for d, site in pairs if any(isinstance(r, Parameters) and is_blank(r) for r in site)]
    if blank:
        raise ValueError(
            f"learned parameters of these sites have seen no weights: {', '.join(blank)}; "
            "run jaxq.observe(f, plan)(params, ...) or jaxq.calibrate first, and convert with the plan it returns"
        )


def _check_scales(captured: Captured) -> None:
    for name, (item, codes) in captured.items():
        numbers = codes.table if codes.scale is None else codes.real_scale()
        if not isinstance(numbers, jax.core.Tracer) and not bool(jnp.isfinite(numbers).all()):
            origins = ", ".join(item.site.weight.origins)
            raise ValueError(
                f"the weight of site '{name}' (from {origins}) comes out as NaN or infinity; repair {origins}"
            )


def _capture(program: Program, leaves: list) -> Captured:
    """Return the codes of every convertible weight, computed from the parameter leaves alone."""
    observe, arrays = ahead(program, Capture(program.execute), leaves)
    codes = jax.jit(observe)(*arrays)
    return {item.site.name: (item, codes[path]) for path, item in program.active.items() if path in codes}


def _still_read(program: Program, leaves: list, captured: Captured) -> list[bool]:
    """Return which leaves the quantized program reads in float."""
    weights = {name: codes for name, (_, codes) in captured.items()}

    def run(*arrays):
        return program.run(program.execute, list(arrays), weights)[0]

    return jaxpr.prune(jaxpr.trace(run, *(shape_of(leaf) for leaf in leaves))[0])[1]


def _store(index: int, leaf: Any, read: bool, captured: Captured, program: Program) -> Any:
    """Return what stands at a parameter leaf after conversion."""
    here = {name: pair for name, pair in captured.items() if pair[0].sources[0] == index}
    part_of = any(index in item.sources for item, _ in captured.values())
    if not here:
        return Dropped(leaf.shape, leaf.dtype) if part_of and not read else leaf
    quantizers = {program.execute.task(item).quantizers[item.weight] for item, _ in here.values()}
    apart = len(here) > 1 and any(q.learned for q in quantizers)  # every site has parameters of its own
    single = None if read or apart or len(quantizers) > 1 else _one_array(leaf, list(here.values()))
    if single is not None:
        return single.packed(len(next(iter(here.values()))[0].site.stack))
    codes = {name: codes.packed(len(item.site.stack)) for name, (item, codes) in here.items()}
    return Stored(codes, leaf if read else None, leaf.shape, leaf.dtype)


def _one_array(leaf: Any, users: list[tuple[Located, QArray]]) -> QArray | None:
    """Return the one QArray that serves all users of a leaf, if their codes agree."""
    if any(item.leaf is None for item, _ in users):
        return None
    arrays = [to_leaf(codes, item) for item, codes in users]
    kinds = {(q.format, q.grid, q.zero_point is None, q.dtype) for q in arrays}
    if len(kinds) > 1 or arrays[0].shape != leaf.shape:
        return None
    return dataclasses.replace(arrays[0], dtype=leaf.dtype)
