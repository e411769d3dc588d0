"""Converted weights on their way to their sites, and the proof that nothing dropped is read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxq.interpretation.arguments import Layout, float_of, shape_of
from jaxq.interpretation.program import Program
from jaxq.numbers.qarray import QArray, Stored, is_converted
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs import jaxpr
from jaxq.programs.sites import Located


def sort_leaves(program: Program, layout: Layout, leaves: list) -> tuple[list, dict[str, QArray]]:
    """Return the leaves as float arrays, None where dropped, and the converted weight of each site.

    Raises `ValueError` where converted leaves do not belong to the program and its plan.
    """
    if not any(is_converted(leaf) for leaf in leaves):
        return leaves, {}
    return [float_of(leaf) for leaf in leaves], site_weights(program, layout, leaves)


def site_weights(program: Program, layout: Layout, leaves: list) -> dict[str, QArray]:
    """Return the converted weight of each site. Raises like `sort_leaves`."""
    by_index = {i: leaf for leaf, i in zip(leaves, layout.weights, strict=True) if i is not None}
    weights: dict[str, QArray] = {}
    for item, decision in zip(program.analysis.located, program.decisions, strict=True):
        if item.weight is None or not item.sources:
            continue
        codes = _codes_for(item, [by_index[i] for i in item.sources])
        _check_weight(item, codes, decision.quantizer(item.weight), by_index[item.sources[0]])
        if codes is not None:
            weights[decision.site.name] = codes
    _check_strays(program, layout, leaves, weights)
    return weights


def _codes_for(item: Located, sources: list) -> QArray | None:
    first = sources[0]
    if isinstance(first, QArray) and item.leaf is not None:
        return to_operand(first, item)
    return first.codes.get(item.site.name) if isinstance(first, Stored) else None


def expected_grid(item: Located, quantizer: Quantizer) -> tuple[int, ...]:
    """Return the shape of a site's weight scale, scanned axes in front."""
    operand = item.site.operands[item.weight]
    return (*item.site.stack, *quantizer.grid(operand.shape, operand.contracted))


def to_operand(leaf: QArray, item: Located) -> QArray:
    """Return a leaf's codes as its site's operand, scanned axes in front."""
    operand = leaf.transpose(with_stack(item, item.leaf.permutation))
    return dataclasses.replace(operand, dtype=np.dtype(item.site.operands[item.weight].dtype))


def to_leaf(operand: QArray, item: Located) -> QArray:
    """Return an operand's codes in the layout of the leaf it was moved from."""
    inverse = sorted(range(len(item.leaf.permutation)), key=item.leaf.permutation.__getitem__)
    return operand.transpose(with_stack(item, tuple(inverse)))


def with_stack(item: Located, permutation: tuple[int, ...]) -> tuple[int, ...]:
    """Return an operand's permutation with the scanned axes in front, where they stay."""
    depth = len(item.site.stack)
    return (*range(depth), *(axis + depth for axis in permutation))


def _check_weight(item: Located, codes: QArray | None, quantizer: Quantizer | None, leaf: Any) -> None:
    name = item.site.name
    if codes is None and is_converted(leaf) and float_of(leaf) is None:
        raise ValueError(
            f"converted parameters hold no codes for site '{name}': they were converted for another function; "
            "run jaxq.convert with this function and plan"
        )
    if codes is None:
        return
    if quantizer is None:
        raise ValueError(
            f"site '{name}' is float in this plan, but its weight was converted to {codes.format}; "
            "use the plan that the parameters were converted with"
        )
    same = codes.format == quantizer.format and (codes.zero_point is None) == quantizer.symmetric
    same = same and codes.scaling == quantizer.scaling
    if not same or codes.grid != expected_grid(item, quantizer):
        raise ValueError(
            f"the weight of site '{name}' was converted to {codes.format}, but the plan says {quantizer!r}; "
            "use the plan that the parameters were converted with"
        )


def _check_strays(program: Program, layout: Layout, leaves: list, weights: dict[str, QArray]) -> None:
    """Raise where parameters hold codes that no site of this program reads."""
    names = {item.site.name for item in program.analysis.located}
    used = {i for item in program.analysis.located if item.site.name in weights for i in item.sources}
    for leaf, i in zip(leaves, layout.weights, strict=True):
        if i is None and is_converted(leaf):
            raise ValueError("an argument that does not hold the weights was converted; see argnums=")
        stray = [name for name in leaf.codes if name not in names] if isinstance(leaf, Stored) else []
        if stray or (isinstance(leaf, QArray) and i not in used):
            raise ValueError(
                f"parameter '{'/'.join(layout.names[i])}' was converted, but no site of this program multiplies by it"
                f"{' as ' + ', '.join(stray) if stray else ''}; sites are: {', '.join(sorted(names)) or '(none)'}"
            )


def run_without(run: Callable, arrays: list, leaves: list, layout: Layout):
    """Run with stand-ins for leaves that were dropped; raise `ValueError` naming any whose value would be read."""
    missing = [n for n, x in enumerate(arrays) if x is None]

    def with_stand_ins(*stand_ins):
        full = list(arrays)
        for n, x in zip(missing, stand_ins, strict=True):
            full[n] = x
        return run(full)

    shapes = [shape_of(leaves[n]) for n in missing]
    body, out = jaxpr.trace(with_stand_ins, *shapes)
    body, read = jaxpr.prune(body)
    if any(read):
        names = ", ".join(layout.name(n) for n, r in zip(missing, read, strict=True) if r)
        raise ValueError(
            f"the program reads {names} in float, but converted parameters no longer hold it; "
            "run jaxq.convert with this function and plan"
        )
    return jax.tree.unflatten(jax.tree.structure(out), jaxpr.evaluate(body))
