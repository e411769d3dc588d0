"""The arguments of a call, taken apart: arrays are traced, everything else is static.

`jax.Array` and `numpy.ndarray` leaves (and `ShapeDtypeStruct`, and what `convert` puts in their place) are dynamic;
Python numbers, strings, functions and None are compared by `==`, so `train=True` needs no `static_argnums`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxq.numbers.qarray import Dropped, QArray, Stored, is_converted

Argnums = int | Sequence[int]


class Static:
    """A value compared by `==` and hashable whatever it is, for use as a static argument of `jit`."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Static) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or bool(self.value == other.value)

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is static of a call's arguments.

    statics: per leaf, None where it is dynamic; weights: per dynamic leaf its index among the parameter leaves, or
    None; names: the parameter leaves' tree paths.
    """

    structure: Any
    statics: tuple[Static | None, ...]
    weights: tuple[int | None, ...]
    names: tuple[tuple[str, ...], ...]

    def unflatten(self, dynamic: Sequence[Any]) -> tuple[tuple, dict]:
        """Return `(args, kwargs)` with the dynamic leaves put in."""
        arrays = iter(dynamic)
        leaves = [next(arrays) if s is None else s.value for s in self.statics]
        return jax.tree.unflatten(self.structure, leaves)

    def name(self, dynamic: int) -> str:
        """Return a dynamic leaf's tree path, for messages."""
        weight = self.weights[dynamic]
        return f"argument leaf {dynamic}" if weight is None else "/".join(self.names[weight]) or "weights"


def take_apart(args: tuple, kwargs: dict, argnums: Argnums) -> tuple[Layout, list]:
    """Return the static layout of a call and its dynamic leaves.

    Raises `TypeError` where the argument that should hold the weights is missing.
    """
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    numbers = [n + len(args) if n < 0 else n for n in numbers]
    if any(not 0 <= n < len(args) for n in numbers):
        raise TypeError(
            f"the weights are argument {max(numbers)}, but the call has {len(args)} positional arguments; "
            "pass the weights by position, or say which argument holds them with argnums="
        )
    flat, structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_converted)
    variables = _variable_depths((args, kwargs))
    statics: list[Static | None] = []
    weights: list[int | None] = []
    names: list[tuple[str, ...]] = []
    dynamic = []
    for path, leaf in flat:
        if not _is_dynamic(leaf):
            statics.append(Static(leaf))
            continue
        statics.append(None)
        dynamic.append(leaf)
        is_weight = path[0].idx == 0 and path[1].idx in numbers
        weights.append(len(names) if is_weight else None)
        if is_weight:
            names.append(_name(path[2:], variables.get(path)))
    return Layout(structure, tuple(statics), tuple(weights), tuple(names)), dynamic


def place(weights: Any, batch: Any, argnums: Argnums) -> list:
    """Return the positional arguments of a call: those of a batch, with the weights at their places among them.

    A tuple holds several arguments, anything else is the one there is; weights are a tuple where `argnums` is one.
    """
    args = list(batch) if type(batch) is tuple else [batch]
    pairs = [(argnums, weights)] if isinstance(argnums, int) else list(zip(argnums, weights, strict=True))
    count = len(args) + len(pairs)
    for number, tree in sorted(pairs, key=lambda pair: pair[0] % count):
        args.insert(number % count, tree)
    return args


def _is_dynamic(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) or is_converted(leaf) or _is_ref(leaf)


def _is_ref(leaf: Any) -> bool:
    return type(leaf).__name__ in ("Ref", "ArrayRef", "MutableArray") and hasattr(leaf, "aval")


def _name(path: tuple, drop: int | None) -> tuple[str, ...]:
    """Return a leaf's path without the collection `params` and without the inside of a framework's variable."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in (path[: len(path) - drop] if drop else path)]
    return tuple(keys[1:] if len(keys) > 1 and keys[0] == "params" else keys)


def _variable_depths(tree: Any) -> dict[tuple, int]:
    """Return, for each leaf inside an NNX variable, how many keys of its path are the variable's own."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return {}

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    depths = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda n: is_variable(n) or is_converted(n)):
        if is_variable(node):
            for inner, _ in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_converted):
                depths[(*path, *inner)] = len(inner)
    return depths


# --- converted leaves ------------------------------------------------------------------------------------------------


def shape_of(leaf: Any) -> Any:
    """Return what a dynamic leaf is traced as: converted leaves as the float array they stand for."""
    if is_converted(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def float_of(leaf: Any) -> jax.Array | None:
    """Return a leaf as a float array; None where it was dropped."""
    if isinstance(leaf, QArray):
        return leaf.decode()
    if isinstance(leaf, Stored):
        return leaf.value
    return None if isinstance(leaf, Dropped) else leaf
