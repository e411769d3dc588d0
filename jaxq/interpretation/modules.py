"""Objects that a call changes (NNX): what changed inside the trace is written back to the caller's objects.

NNX modules, rngs and variables are pytrees, so the traced function works on copies. After it has run, the leaves of the
copies are compared with what went in; those that differ become outputs, as `nnx.jit` does. What cannot be carried out
of a compiled program is an error. Flax is looked up, never imported.
"""

import sys
from typing import Any

import jax

from jaxq.interpretation.arguments import Layout
from jaxq.numbers.qarray import is_converted


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")


def _is_object(node: Any) -> bool:
    return isinstance(node, (_nnx().Pytree, _nnx().Variable))


def _stop(node: Any) -> bool:
    return _is_object(node) or is_converted(node)


def _is_end(node: Any) -> bool:
    return isinstance(node, _nnx().Variable) or is_converted(node)


def holds_module(tree: Any) -> bool:
    """Tell whether a tree holds an object whose state a call could change."""
    return _nnx() is not None and any(_is_object(node) for node in jax.tree.leaves(tree, is_leaf=_stop))


def changes(layout: Layout, before: list, tree: Any) -> dict[int, Any]:
    """Return the dynamic leaves of objects that a call replaced, by their number among all leaves.

    Raises `ValueError` where an object gained or lost state, or where something that is no array changed: neither can
    be carried out of a compiled program.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_converted)
    if structure != layout.structure:
        raise ValueError(
            "the call changed the structure of an nnx.Module (a variable or attribute was added, removed or replaced), "
            "which cannot leave a compiled program; create the variables before the call, or use nnx.split and "
            "nnx.merge and return the new state"
        )
    inside = _inside(tree)
    arrays = iter(before)
    changed = {}
    for number, (leaf, static) in enumerate(zip(leaves, layout.statics, strict=True)):
        old = next(arrays) if static is None else static.value
        if leaf is old or not inside[number]:
            continue
        if static is not None:
            raise ValueError(
                f"the call changed {old!r}, a Python value inside an nnx object, to {leaf!r}, which cannot leave a "
                "compiled program; hold it as an array, such as nnx.Variable(jnp.array(...))"
            )
        changed[number] = leaf
    return changed


def _inside(tree: Any) -> list[bool]:
    """Return for each leaf whether it belongs to an object."""
    flags: list[bool] = []
    for node in jax.tree.leaves(tree, is_leaf=_stop):
        flags += [_is_object(node)] * len(jax.tree.leaves(node, is_leaf=is_converted))
    return flags


def write_back(tree: Any, changed: dict[int, Any]) -> None:
    """Put changed leaves into the variables of the caller's objects.

    Raises `ValueError` for state that is not in a variable, or that one variable would have to take twice.
    """
    if not changed:
        return
    written: set[int] = set()
    position = 0
    for node in jax.tree.leaves(tree, is_leaf=_is_end):
        leaves, structure = jax.tree.flatten(node, is_leaf=is_converted)
        new = [changed.get(position + n, leaf) for n, leaf in enumerate(leaves)]
        position += len(leaves)
        if all(a is b for a, b in zip(leaves, new, strict=True)):
            continue
        if not _is_end(node) or id(node) in written:
            raise ValueError(
                "the call changed an array that is not in an nnx.Variable, or a variable that stands twice in its "
                "arguments; hold it in one nnx.Variable, or use nnx.split and nnx.merge and return the new state"
            )
        written.add(id(node))
        node.set_value(jax.tree.unflatten(structure, new).get_value())
