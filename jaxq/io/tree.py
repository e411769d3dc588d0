"""Trees as JSON and named arrays: what `convert` returns, in a form that needs no code of the model to read.

Dicts, lists, tuples and None come back as they were. Every other node (a dataclass, a named tuple, an NNX module) is
written as its children by name and comes back as a dict, or as itself where `fill` is given the tree it was. Leaves are
arrays, `QArray`, `Stored`, `Dropped`, random keys and plain Python values; a leaf that is code (a function) leaves its
place only.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.decisions.plan import Plan
from jaxq.interpretation.arguments import take_apart
from jaxq.io.safetensors import DTYPES, RESERVED
from jaxq.numbers import spec
from jaxq.numbers.qarray import Dropped, Packing, QArray, Stored, is_converted

# Types of one byte or less that the container has no name for: they are written as bytes.
BYTES = {
    jnp.dtype(kind).name: jnp.dtype(kind)
    for kind in (
        jnp.int2,
        jnp.int4,
        jnp.uint2,
        jnp.uint4,
        jnp.float4_e2m1fn,
        jnp.float8_e3m4,
        jnp.float8_e4m3,
        jnp.float8_e4m3b11fnuz,
        jnp.float8_e4m3fnuz,
        jnp.float8_e5m2fnuz,
        jnp.float8_e8m0fnu,
    )
}
UNSIGNED = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8}
NAMED = BYTES | {dtype.name: dtype for dtype in DTYPES.values()}

ARRAYS = ("stored", "scale", "zero_point", "table", "outer")  # of a QArray
DYNAMIC = ("array", "key", "QArray", "Stored", "Dropped")  # leaves that programs are traced over
Json = dict[str, Any] | None


class Code:
    """Stands where a leaf was that is code: it is not in the file."""

    def __repr__(self) -> str:
        return "<code, not saved>"


# --- writing ----------------------------------------------------------------------------------------------------------


class Writing(NamedTuple):
    """What a tree is written to: arrays by name; and, still to come, the names that plans call the leaves by."""

    arrays: dict[str, Any]
    names: Iterator[str]


def plan_names(params: Any, plan: Plan) -> list[str]:
    """Return what a plan calls the leaves of parameters, which are one tree or a tuple of several arguments' trees."""
    homes = {site.weight.origins[0] for site in plan.sites if site.weight and site.weight.origins}
    names = _names((params,))
    return names if type(params) is not tuple or homes <= set(names) else _names(params)


def _names(args: tuple) -> list[str]:
    layout, _ = take_apart(args, {}, range(len(args)))
    return ["/".join(name) for name in layout.names]


def leaf_names(params: Any, plan: Plan) -> dict[str, Any]:
    """Return the leaves of parameters by the names that a plan calls them by; one name's second leaf as `name (2)`."""
    _, leaves = take_apart((params,), {}, 0)
    found: dict[str, Any] = {}
    for name, leaf in zip(plan_names(params, plan), leaves, strict=True):
        own, number = name, 1
        while own in found:
            number += 1
            own = f"{name} ({number})"
        found[own] = leaf
    return found


def describe(tree: Any, names: Sequence[str]) -> tuple[Json, dict[str, Any]]:
    """Return the JSON of a tree whose leaves plans call `names`, and its arrays by name.

    Raises `TypeError` for leaves and dict keys that cannot be written, naming them.
    """
    writing = Writing({}, iter(names))
    return _node(tree, "", writing), writing.arrays


def _node(node: Any, path: str, writing: Writing) -> Json:
    if node is None:
        return None
    if is_converted(node) or jax.tree_util.all_leaves([node]):
        own = _leaf(node, path, writing.arrays)
        named = own["type"] in DYNAMIC and not isinstance(node, np.generic)  # scalars of NumPy's are static
        return {**own, "leaf": next(writing.names)} if named else own
    children = [(_key(key), child) for key, child in _children(node)]
    parts = [(key, _node(child, f"{path}/{key}" if path else str(key), writing)) for key, child in children]
    if type(node) in (list, tuple):
        return {"type": type(node).__name__, "items": [part for _, part in parts]}
    return {"type": "dict" if type(node) is dict else "node", "items": [[key, part] for key, part in parts]}


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Return the children of a node with their keys, one level down."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return [(path[0], child) for path, child in pairs]


def _key(key: Any) -> str | int:
    """Return what a child is found by: a dict's own key, an attribute's name, a number."""
    if not isinstance(key, jax.tree_util.DictKey):
        return jax.tree_util.keystr((key,), simple=True)
    if type(key.key) not in (str, int):
        raise TypeError(f"the dict key {key.key!r} cannot be saved; use text or whole numbers as keys")
    return key.key


def _leaf(leaf: Any, path: str, arrays: dict[str, Any]) -> Json:
    if isinstance(leaf, QArray):
        return _qarray(leaf, path, arrays)
    if isinstance(leaf, Stored):
        codes = {site: _qarray(q, f"{path}:{site}", arrays) for site, q in leaf.codes.items()}
        value = None if leaf.value is None else _array(leaf.value, path, arrays)
        return {"type": "Stored", "codes": codes, "value": value, "shape": list(leaf.shape), "dtype": _name(leaf.dtype)}
    if isinstance(leaf, Dropped):
        return {"type": "Dropped", "shape": list(leaf.shape), "dtype": _name(leaf.dtype)}
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return _array(leaf, path, arrays)
    if isinstance(leaf, float):
        return {"type": "float", "value": leaf.hex()}  # infinity too, which JSON has no number for
    if type(leaf) in (bool, int, str):
        return {"type": type(leaf).__name__, "value": leaf}
    if callable(leaf):
        return {"type": "code"}
    raise TypeError(f"'{path}' is {leaf!r:.80}, which cannot be saved: arrays, converted weights and plain values can")


def _qarray(q: QArray, path: str, arrays: dict[str, Any]) -> Json:
    present = [(name, getattr(q, name)) for name in ARRAYS if getattr(q, name) is not None]
    return {
        "type": "QArray",
        "format": spec.encode(q.format),
        "dtype": _name(q.dtype),
        "packing": q.packing and list(q.packing),
        **{name: _array(value, f"{path}.{name}", arrays) for name, value in present},
    }


def _array(value: Any, path: str, arrays: dict[str, Any]) -> Json:
    """Put an array among the others, under a name of its own, and return where it is and what it is."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"'{path}' is being traced: save outside jit")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _array(jax.random.key_data(value), path, arrays)
        return {"type": "key", "impl": str(jax.random.key_impl(value)), "data": data}
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise TypeError(f"'{path}' is spread over several processes: gather it before saving, or save with Orbax")
    name = path or "array"
    while name in arrays or name.startswith(RESERVED):
        name = "_" + name
    arrays[name] = _plain(value, path)
    return {"type": "array", "name": name, "dtype": _name(value.dtype), "shape": list(value.shape)}


def _name(dtype: Any) -> str:
    return np.dtype(dtype).name


def _plain(value: Any, path: str) -> Any:
    """Return an array as the container has a type for it: others of one byte (int4, MX exponents) as bytes."""
    dtype = np.dtype(value.dtype)
    if dtype in DTYPES.values():
        return value
    if dtype.name not in BYTES:
        raise TypeError(f"'{path}' is {dtype}, which cannot be saved; cast it")
    return np.asarray(value).view(np.uint8)


# --- reading ----------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What a tree is read from: the arrays not yet used; and the leaves so far, by the names that plans call them.

    A name that two leaves go by (`{"w": ..., "params": {"w": ...}}`) stands for None.
    """

    arrays: dict[str, np.ndarray]
    leaves: dict[str, Any]


def build(description: Any, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """Return the tree that `describe` described, and its leaves by name: NumPy arrays that lie where they were read.

    Every array is used once. Raises `ValueError`, `KeyError` or `TypeError` for anything that does not fit.
    """
    reading = Reading(dict(arrays), {})
    tree = _build(description, reading)
    if reading.arrays:
        raise ValueError(f"array '{next(iter(reading.arrays))}' belongs to no leaf")
    return tree, reading.leaves


def _build(node: Any, rest: Reading) -> Any:
    if node is None:
        return None
    fields = dict(node)
    name = fields.pop("leaf", None)
    value = READERS[fields.pop("type")](rest, **fields)
    if name is not None:
        if type(name) is not str:
            raise ValueError(f"the leaf name {name!r:.80} is not a text")
        rest.leaves[name] = None if name in rest.leaves else value
    return value


def _read_dict(rest: Reading, items: list) -> dict:
    pairs = [(key, _build(child, rest)) for key, child in items]
    if not all(type(key) in (str, int) for key, _ in pairs) or len(dict(pairs)) != len(pairs):
        raise ValueError("a dict has improper keys, or one twice")
    return dict(pairs)


def _read_array(rest: Reading, name: str, dtype: str, shape: list) -> np.ndarray:
    array, wanted = rest.arrays.pop(name), NAMED[dtype]
    if array.dtype == np.uint8 and dtype in BYTES:
        array = _viewed(array, wanted)
    if array.dtype != wanted or list(array.shape) != shape:
        raise ValueError(f"array '{name}' is {array.dtype}{list(array.shape)} and should be {dtype}{shape}")
    return array


def _viewed(array: Any, wanted: np.dtype) -> Any:
    """Return the numbers that bytes stand for, one each: of an array, or of one that is being traced."""
    if isinstance(array, np.ndarray):
        return array.view(wanted)
    info = jnp.iinfo if jnp.issubdtype(wanted, jnp.integer) else jnp.finfo
    bits = lax.convert_element_type(array, UNSIGNED[info(wanted).bits])
    return lax.bitcast_convert_type(bits, wanted)


def _read_key(rest: Reading, impl: str, data: Json) -> jax.Array:
    return jax.random.wrap_key_data(jnp.array(_build(data, rest)), impl=impl)


def _read_qarray(rest: Reading, format: Json, dtype: str, packing: Any, **parts: Json) -> QArray:
    if not set(parts) <= set(ARRAYS) or "stored" not in parts:
        raise ValueError("a quantized array has parts of other names")
    found = {name: _build(parts[name], rest) if name in parts else None for name in ARRAYS}
    where = None if packing is None else Packing(*packing)
    return QArray(format=spec.decode(format), dtype=_float_type(dtype), packing=where, **found)


def _read_stored(rest: Reading, codes: dict, value: Json, shape: list, dtype: str) -> Stored:
    return Stored({site: _build(q, rest) for site, q in codes.items()}, _build(value, rest), *_kind(shape, dtype))


def _kind(shape: list, dtype: str) -> tuple[tuple[int, ...], np.dtype]:
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r:.80} is no shape")
    return tuple(shape), _float_type(dtype)


def _float_type(name: str) -> np.dtype:
    dtype = NAMED[name]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{dtype} is not a floating-point type")
    return dtype


def _value(kind: type) -> Callable:
    def read(rest: Reading, value: Any) -> Any:
        del rest
        if type(value) is not kind:
            raise ValueError(f"{value!r:.80} is not of type {kind.__name__}")
        return value

    return read


READERS: dict[str, Callable[..., Any]] = {
    "dict": _read_dict,
    "node": _read_dict,
    "list": lambda rest, items: [_build(child, rest) for child in items],
    "tuple": lambda rest, items: tuple(_build(child, rest) for child in items),
    "array": _read_array,
    "key": _read_key,
    "QArray": _read_qarray,
    "Stored": _read_stored,
    "Dropped": lambda rest, shape, dtype: Dropped(*_kind(shape, dtype)),
    "float": lambda rest, value: float.fromhex(value),
    "bool": _value(bool),
    "int": _value(int),
    "str": _value(str),
    "code": lambda rest: Code(),
}


def fill(like: Any, loaded: Any) -> Any:
    """Return `loaded` in the types of the tree `like`, whose leaves may be arrays, shapes or converted weights.

    Raises `ValueError` where the trees differ, or the shape or the dtype of a leaf.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_converted)
    leaves = [_matched(_find(loaded, path), leaf, path) for path, leaf in flat]
    extra = len(jax.tree.leaves(loaded, is_leaf=is_converted)) - len(leaves)
    if extra:
        raise ValueError(f"the file holds {extra} leaves more than like=")
    return jax.tree.unflatten(structure, leaves)


def _find(node: Any, path: tuple) -> Any:
    for depth, key in enumerate(path):
        step = key.idx if isinstance(node, (list, tuple)) and isinstance(key, jax.tree_util.SequenceKey) else _key(key)
        found = step in node if isinstance(node, dict) else isinstance(step, int) and step < len(node)
        if not found:
            raise ValueError(
                f"the file holds no '{jax.tree_util.keystr(path[: depth + 1], simple=True, separator='/')}'"
            )
        node = node[step]
    return node


def _matched(leaf: Any, like: Any, path: tuple) -> Any:
    """Return a leaf; from `like` where it is code."""
    if isinstance(leaf, Code):
        return like
    kinds = _kind_of(leaf), _kind_of(like)
    # `eval_shape` makes arrays without axes of plain numbers.
    if kinds[0] != kinds[1] and not (kinds[0] is None and kinds[1] is not None and kinds[1][0] == ()):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"'{name}' is {kinds[0] or leaf!r} in the file and {kinds[1] or like!r} in like=")
    return leaf


def _kind_of(leaf: Any) -> tuple[tuple[int, ...], Any] | None:
    """Return shape and dtype, None for what is no array."""
    arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, arrays) or is_converted(leaf) else None
