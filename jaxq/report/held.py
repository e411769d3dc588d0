"""Bytes that weights really occupy, before and after conversion."""

from typing import Any

import jax
import numpy as np

from jaxq.interpretation.program import Program
from jaxq.numbers.qarray import Stored, is_converted
from jaxq.report.cost import Both


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree, converted or not."""
    leaves = jax.tree.leaves(tree, is_leaf=is_converted)
    return sum(leaf.nbytes for leaf in leaves if is_converted(leaf) or isinstance(leaf, (jax.Array, np.ndarray)))


def bytes_of_sites(program: Program, leaves: list, converted: list) -> dict[str, Both]:
    """Return what the weight of every site occupies. A leaf that several sites share counts at each of them."""
    triples = zip(program.weights, leaves, converted, strict=True)
    by_index = {i: (leaf, small) for i, leaf, small in triples if i is not None}
    sizes = {}
    for item in program.analysis.located:
        pairs = [by_index[i] for i in item.sources] if item.weight is not None else []
        plain = sum(leaf.nbytes for leaf, _ in pairs)
        sizes[item.site.name] = Both(plain, sum(_own(small, item.site.name) for _, small in pairs))
    return sizes


def _own(leaf: Any, name: str) -> int:
    """Return the bytes at a leaf that belong to a site: its own codes, and the float copy if one is kept."""
    if not isinstance(leaf, Stored):
        return leaf.nbytes
    codes = leaf.codes[name].nbytes if name in leaf.codes else 0
    return codes + (0 if leaf.value is None else leaf.value.nbytes)
