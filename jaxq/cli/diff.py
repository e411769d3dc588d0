"""`diff A B`: which leaves and which decisions of two files differ, and by how much. Exit code 1 if any does."""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.cli import contents
from jaxq.cli.command import Answer, Command
from jaxq.decisions import table
from jaxq.decisions.plan import Plan
from jaxq.numbers.qarray import QArray, is_converted

Difference = tuple[str, str]  # of what, and what


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("a", type=Path, metavar="A", help="a file, as for inspect")
    parser.add_argument("b", type=Path, metavar="B", help="another")


def run(options: argparse.Namespace) -> Answer:
    """Compare two files, leaf by leaf and site by site."""
    a, b = contents.read(options.a), contents.read(options.b)
    found = {
        "leaves": _compare(a.leaves, b.leaves, _leaf),
        "sites": _compare(_decisions(a.plan), _decisions(b.plan), _site),
        "about": _compare(a.about or {}, b.about or {}, _value),
    }
    rows = [(kind, name, what) for kind, differences in found.items() for name, what in differences]
    data = {kind: [{"name": name, "difference": what} for name, what in found[kind]] for kind in found}
    text = table.text([("in", "name", "difference"), *rows]) if rows else f"{options.a} and {options.b} hold the same"
    return Answer(text, data, int(bool(rows)))


def _compare(a: dict[str, Any], b: dict[str, Any], differ) -> list[Difference]:
    """Return what differs between two maps, in the order of names."""
    found: list[Difference] = []
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            found.append((name, "only in A" if name in a else "only in B"))
        elif what := differ(a[name], b[name]):
            found.append((name, what))
    return found


def _value(a: Any, b: Any) -> str:
    return "" if a == b else f"{a!r:.60} in A, {b!r:.60} in B"


def _leaf(a: Any, b: Any) -> str:
    """Return how two leaves differ; nothing for the same bits in the same format."""
    kinds = [contents.rows(contents.Contents("", {"": leaf}))[0][1:3] for leaf in (a, b)]
    if kinds[0] != kinds[1]:
        return " in A, ".join(f"{stored} {list(shape)}" for stored, shape in kinds) + " in B"
    if str(jax.tree.structure(a)) != str(jax.tree.structure(b)):
        return "other parts: zero points, packing or scales"
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    if all(_bits(x) == _bits(y) for x, y in pairs):
        return ""
    if isinstance(a, QArray) or not is_converted(a):
        distance = float(jnp.max(jnp.abs(_numbers(a) - _numbers(b))))
        return f"other values, by {distance:.3g} at most"
    return "other values"


def _bits(array: Any) -> bytes:
    plain = jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return np.asarray(plain).tobytes()


def _numbers(leaf: Any) -> jax.Array:
    if isinstance(leaf, QArray):
        return jax.tree.map(jnp.asarray, leaf).decode(jnp.float32)
    plain = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return jnp.asarray(plain).astype(jnp.float32)


def _decisions(plan: Plan | None) -> dict[str, Any]:
    """Return decisions and ranges by site."""
    if plan is None:
        return {}
    return {d.site.name: (d, ranges) for d, ranges in zip(plan.decisions, plan.ranges, strict=True)}


def _site(a: Any, b: Any) -> str:
    (one, ranges), (other, other_ranges) = a, b
    if one.scheme != other.scheme:
        return f"{one.scheme or 'float'} in A, {other.scheme or 'float'} in B"
    if one.site.signature != other.site.signature:
        return f"{one.site.signature} in A, {other.site.signature} in B"
    pairs = zip(jax.tree.leaves(ranges), jax.tree.leaves(other_ranges), strict=True)
    return "" if all(np.array_equal(x, y) for x, y in pairs) else "other ranges"


COMMAND = Command("diff", "compare two files, leaf by leaf and site by site", declare, run)
