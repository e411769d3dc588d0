"""The proof that converted weights are whole, and what a plan says they are: array by array, before anything runs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.numbers import packing
from jaxq.numbers.blocks import check_grid
from jaxq.numbers.formats import Codebook, vector_length
from jaxq.numbers.qarray import Dropped, QArray, Stored, is_converted
from jaxq.numbers.scaling import Nested


def check(plan: Plan, params: Any, names: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless parameters are those of the plan's program, converted as it says.

    names: the leaves by the names that the plan's sites call them by, None where two go by one. A leaf may be float
    where the plan would quantize it: then it is quantized at every call.
    """
    for leaf in jax.tree.leaves(params, is_leaf=is_converted):
        for q in _codes(leaf):
            check_array(q)
    weights = [(d, d.site.weight.origins[0]) for d in plan.decisions if d.site.weight and d.site.weight.origins]
    for decision, home in weights:
        if home not in names:
            raise ValueError(
                f"the plan's site '{decision.site.name}' multiplies by '{home}', and there is no such parameter: the "
                "plan is of another model"
            )
    coded = [(d, home) for d, home in weights if d.quantizers[d.site.operands.index(d.site.weight)] is not None]
    for decision, home in coded:
        if names[home] is not None:
            _check_leaf(decision, home, names[home])
    for name in names.keys() - {home for _, home in coded}:
        if isinstance(names[name], (QArray, Stored)):
            raise ValueError(
                f"'{name}' is converted, but no site of the plan quantizes it: the plan is of another model"
            )


def _codes(leaf: Any) -> list[QArray]:
    if isinstance(leaf, Stored):
        return list(leaf.codes.values())
    return [leaf] if isinstance(leaf, QArray) else []


def check_array(q: QArray) -> None:
    """Raise `ValueError` unless the parts of a quantized array have the dtypes and shapes that its format calls for."""
    coded = isinstance(q.format, Codebook)
    storage = q.format.storage if q.packing is None else jnp.uint8
    problems = {
        f"codes of {q.format} are {jnp.dtype(storage)}, not {q.stored.dtype}": q.stored.dtype != storage,
        "the packing is not one of the format": q.packing is not None and not _packs(q),
        f"{q.format} comes with {'a table' if coded else 'a scale'} and nothing else": (q.scale is None) != coded
        or (q.table is None) == coded
        or (coded and (q.zero_point is not None or q.outer is not None)),
    }
    _raise_first(q, problems)
    for part in (q.scale, q.table, q.outer):
        if part is not None and part.dtype.name != "uint8" and not np.isfinite(np.asarray(part, np.float32)).all():
            raise ValueError(f"in an array of {q.format}, a scale or a table holds NaN or infinity")
    _check_numbers(q)
    check_grid(q.shape, q.grid)


def _packs(q: QArray) -> bool:
    axis, length = q.packing
    if type(axis) is not int or type(length) is not int or not -q.ndim <= axis < 0:
        return False
    whole = packing.packs(q.format) and length % vector_length(q.format) == 0
    return whole and q.stored.shape[axis] == packing.packed_length(length, q.format)


def _check_numbers(q: QArray) -> None:
    """Check what codes are decoded with: one dtype for each kind of scale."""
    if isinstance(q.format, Codebook):
        shape = (*q.table.shape[:-1], q.format.entries)
        return _raise_first(q, {"the table is not float32 of the codebook's size": not _is(q.table, shape, "float32")})
    scale = {True: "float8_e4m3fn", False: "float32"}[q.outer is not None]
    kinds = (scale, "uint8") if q.outer is None else (scale,)
    zero = q.zero_point
    problems = {
        f"scales are {' or '.join(kinds)}, not {q.scale.dtype}": q.scale.dtype.name not in kinds,
        "zero points are of the codes' type and the scale's shape": zero is not None
        and not _is(zero, q.scale.shape, jnp.dtype(q.format.storage).name),
        "the outer scale is float32": q.outer is not None and q.outer.dtype != jnp.float32,
    }
    _raise_first(q, problems)
    if isinstance(q.scaling, Nested):
        check_grid(q.scale.shape, q.outer.shape)


def _is(array: Any, shape: tuple[int, ...], dtype: str) -> bool:
    return array.shape == shape and array.dtype.name == dtype


def _raise_first(q: QArray, problems: Mapping[str, bool]) -> None:
    for problem, present in problems.items():
        if present:
            raise ValueError(f"in an array of {q.format}, {problem}")


def _check_leaf(decision: Decision, name: str, leaf: Any) -> None:
    """Raise unless a leaf holds the codes that its site's quantizer makes."""
    site = decision.site
    if isinstance(leaf, Dropped) or (isinstance(leaf, Stored) and leaf.value is None and site.name not in leaf.codes):
        raise ValueError(f"'{name}' holds no codes for site '{site.name}': it was converted with another plan")
    q = leaf.codes.get(site.name) if isinstance(leaf, Stored) else leaf
    if not isinstance(q, QArray):
        return
    number = site.operands.index(site.weight)
    quantizer, operand = decision.quantizers[number], site.operands[number]
    grid = (*site.stack, *quantizer.grid(operand.shape, operand.contracted))
    # A leaf may be the operand with its axes in another order.
    wanted, found = (
        sorted(zip(*pair, strict=True)) for pair in (((*site.stack, *operand.shape), grid), (q.shape, q.grid))
    )
    same = q.format == quantizer.format and (q.zero_point is None) == quantizer.symmetric
    if not same or q.scaling != quantizer.scaling or wanted != found:
        raise ValueError(
            f"'{name}' holds {q!r}, and the plan says {quantizer!r} for site '{site.name}' of shape "
            f"{list(operand.shape)}: it was converted with another plan"
        )
