"""`save` and `load`: converted parameters and their plan, as one file or a folder of files.

A file is a safetensors container whose metadata holds the tree and the plan as JSON. A folder holds such containers
with arrays only, and `model.safetensors.index.json` with the metadata and the shard of every array, as Hugging Face's
tools write and read it. A shard carries its checksum in its name, so that a new version never touches the files of the
old one: the index, put in place last, is what makes it the current one.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.io import agreement, safetensors, strict_json, tree
from jaxq.io.errors import FileError
from jaxq.io.replace import beside, publish
from jaxq.io.safetensors import Container

VERSION = "1"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}-([0-9a-f]{8})\.safetensors")
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, MemoryError)


def save(path: str | os.PathLike, qparams: Any, plan: Plan, *, shard_bytes: int | None = None) -> None:
    """Write parameters and their plan to `path`: safetensors and JSON, never pickle.

    shard_bytes: None writes one file; a number, a folder of files with at most that many bytes of arrays each (an array
    that is larger has a file of its own). What was at `path` stays whole until the new version is. Raises `FileError`
    where the system refuses, `ValueError` where parameters and plan do not belong together, and `TypeError` for leaves
    that cannot be written.

    >>> import pathlib, tempfile, jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, jnp.ones((2, 4)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "model.safetensors"
    ...     jaxq.save(path, jaxq.convert(f, plan)(params, jnp.ones((2, 4))), plan)
    ...     qparams, plan = jaxq.load(path)
    >>> qparams
    {'w': QArray(int8[4, 4], scale [1, 4], for float32)}
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"save(path, qparams, plan) takes the plan that jaxq.make_plan made, got {plan!r:.80}")
    container = contents(qparams, plan)
    path = Path(os.path.realpath(path))
    if shard_bytes is None:
        write_file(path, container)
    else:
        _save_folder(path, container.arrays, container.metadata, shard_bytes)


def contents(qparams: Any, plan: Plan) -> Container:
    """Return what a file of parameters and their plan holds; raise `ValueError` where they do not belong together."""
    description, arrays = tree.describe(qparams, tree.plan_names(qparams, plan))
    agreement.check(plan, *tree.build(description, arrays))
    return Container(arrays, {"jaxq": VERSION, "tree": _dump(description), "plan": plan.to_json()}, None)


def write_file(path: Path, container: Container) -> None:
    """Write a container to one file; what was there before stays whole until it is."""
    with beside(path) as file:
        safetensors.write(file, container.arrays, container.metadata)
        publish(file, path)


def load(path: str | os.PathLike, *, like: Any = None) -> tuple[Any, Plan]:
    """Return `(qparams, plan)` from what `save` wrote, bit for bit; no code of the model is needed.

    like: a tree of arrays, shapes or converted weights whose types (modules, dataclasses) the result takes; without it
    such nodes are dicts. On a CPU, arrays of a page or more stay in the file's memory map and are read when they are
    used, so do not write over the file in place (`save` does not). Raises `FileError` for anything that is not whole,
    consistent and finite.

    >>> import pathlib, tempfile, jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    >>> plan = jaxq.make_plan(f, jaxq.weight_only(jaxq.nf4(group=4)))(params, jnp.ones((2, 4)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxq.save(folder, jaxq.convert(f, plan)(params, jnp.ones((2, 4))), plan, shard_bytes=2**30)
    ...     qparams, same = jaxq.load(folder)
    >>> same == plan, str(qparams["w"].format)
    (True, 'nf4')
    """
    path = Path(path)
    params, plan, _ = read(path)
    try:
        if like is not None:
            params = tree.fill(like, params)
        elif any(isinstance(leaf, tree.Code) for leaf in jax.tree.leaves(params)):
            raise ValueError("it was saved with leaves that are code; load it with like= the tree it was")
        return jax.tree.map(to_device, params), plan
    except ValueError as error:
        raise FileError(path, str(error)) from error


def read(path: Path) -> tuple[Any, Plan, dict[str, Any]]:
    """Return the tree, its arrays NumPy's, the plan, and the leaves by the names that the plan calls them by.

    Raises `FileError` unless they are whole and agree.
    """
    container = read_container(path)
    try:
        version = container.metadata.get("jaxq")
        if version != VERSION:
            raise ValueError(f"it is not of jaxq's format {VERSION} but {version!r:.40}")
        if container.checksum is None:
            raise ValueError("it carries no checksum")
        budget = sum(array.nbytes for array in container.arrays.values())
        built = tree.build(strict_json.parse(container.metadata["tree"], budget), container.arrays)
        strict_json.parse(container.metadata["plan"], budget)
        plan = Plan.from_json(container.metadata["plan"])
        agreement.check(plan, *built)
    except BROKEN as error:
        reason = str(error) or type(error).__name__
        raise FileError(path, f"this is not an intact jaxq model: {reason}; save it again with jaxq.save") from error
    return built[0], plan, built[1]


def to_device(leaf: Any) -> Any:
    """Return an array as JAX's, in place where it can be; of 64 bits only where JAX has them."""
    if not isinstance(leaf, np.ndarray) or jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return leaf
    return jax.device_put(np.require(leaf, requirements=["ALIGNED"]))


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


# --- folders ----------------------------------------------------------------------------------------------------------


def read_container(path: Path) -> Container:
    """Return the arrays and texts of a file, or of a folder with an index."""
    return _read_folder(path) if path.is_dir() else safetensors.read(path)


def _save_folder(folder: Path, arrays: dict[str, Any], metadata: dict[str, str], shard_bytes: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made a folder ({error.strerror}); choose another path") from error
    before = {entry.name for entry in folder.iterdir()}
    shards = _split(arrays, shard_bytes)
    written: list[str] = []
    try:
        for number, names in enumerate(shards):
            label = f"model-{number + 1:05}-of-{len(shards):05}"
            written.append(_save_shard(folder, label, {name: arrays[name] for name in names}))
        where = {name: file for names, file in zip(shards, written, strict=True) for name in names}
        _save_index(folder / INDEX, {"metadata": metadata, "weight_map": where})
    except BaseException:
        _remove(folder, lambda name: name in written and name not in before)
        raise
    _remove(folder, lambda name: SHARD.fullmatch(name) is not None and name not in written)


def _split(arrays: dict[str, Any], limit: int) -> list[list[str]]:
    """Return the names of the arrays of each shard, in order."""
    if limit < 1:
        raise ValueError(f"shard_bytes= is a number of bytes, got {limit}")
    shards: list[list[str]] = [[]]
    taken = 0
    for name, array in arrays.items():
        size = array.size * np.dtype(array.dtype).itemsize
        if shards[-1] and taken + size > limit:
            shards.append([])
            taken = 0
        shards[-1].append(name)
        taken += size
    return shards


def _save_shard(folder: Path, label: str, arrays: dict[str, Any]) -> str:
    with beside(folder / label) as file:
        name = f"{label}-{safetensors.write(file, arrays, {'format': 'jaxq'}):08x}.safetensors"
        publish(file, folder / name)
    return name


def _save_index(path: Path, index: dict[str, Any]) -> None:
    with beside(path) as file:
        file.write(_dump({**index, "crc32": _checksum(index)}).encode())
        publish(file, path)


def _checksum(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _remove(folder: Path, chosen: Callable[[str], bool]) -> None:
    for entry in list(folder.iterdir()):
        if chosen(entry.name):
            entry.unlink(missing_ok=True)


def _read_folder(folder: Path) -> Container:
    path = folder / INDEX
    try:
        data = safetensors.open_map(path)
        index = strict_json.parse(data.tobytes().decode(), len(data))
        if index.pop("crc32") != _checksum(index):
            raise ValueError("its checksum is wrong: bits were lost or flipped")
        arrays = {}
        for file in sorted(set(index["weight_map"].values())):
            arrays.update(_read_shard(folder, file))
        if {name: file for name, (_, file) in arrays.items()} != index["weight_map"]:
            raise ValueError("its shards hold other arrays than it lists")
        return Container({name: array for name, (array, _) in arrays.items()}, dict(index["metadata"]), 0)
    except FileError:
        raise
    except BROKEN as error:
        raise FileError(path, f"this is not an intact index: {error}; save the model again") from error


def _read_shard(folder: Path, name: str) -> dict[str, tuple[np.ndarray, str]]:
    match = SHARD.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r:.80} is not the name of a shard in this folder")
    container = safetensors.read(folder / name)
    if container.checksum is None or f"{container.checksum:08x}" != match[1]:
        raise FileError(folder / name, "this is another file than the index was written for; save the model again")
    return {array: (values, name) for array, values in container.arrays.items()}
