"""What a file is, told by what is in it: a saved model, an export, a compressed-tensors checkpoint, a plan."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.io import checkpoint, safetensors, strict_json, tree
from jaxq.io.artifact import MARK, Artifact
from jaxq.io.compressed_reader import load_compressed_tensors
from jaxq.io.errors import FileError
from jaxq.numbers.qarray import Dropped, QArray, Stored


class Contents(NamedTuple):
    """What a file holds. kind: in words; leaves: by name; plan and about: where there are such."""

    kind: str
    leaves: dict[str, Any]
    plan: Plan | None = None
    about: dict[str, Any] | None = None


def read(path: Path) -> Contents:
    """Return the contents of a file or folder, checked; raise `FileError` for what is broken or unknown."""
    if path.is_dir():
        return _read_folder(path)
    data = safetensors.open_map(path)
    if data[:1].tobytes() == b"{":
        return Contents("plan", {}, _plan(path, data))
    if MARK in data[-(1 << 20) :].tobytes():
        return Contents("export", {}, about=Artifact.load(path).about)
    if "jaxq" in safetensors.read(path).metadata:
        return _model(path)
    return Contents("safetensors", dict(safetensors.read(path).arrays))


def _read_folder(path: Path) -> Contents:
    if (path / checkpoint.INDEX).exists() and not (path / "config.json").exists():
        return _model(path)
    if (path / "config.json").exists():
        return Contents("compressed-tensors", load_compressed_tensors(path))
    raise FileError(path, f"this folder holds no {checkpoint.INDEX} and no config.json; name a file in it")


def _model(path: Path) -> Contents:
    params, plan, _ = checkpoint.read(path)
    return Contents("model", tree.leaf_names(params, plan), plan)


def _plan(path: Path, data: np.ndarray) -> Plan:
    try:
        text = data.tobytes().decode()
        strict_json.parse(text, len(data))
        return Plan.from_json(text)
    except ValueError as error:
        raise FileError(path, f"{error}; write it again with plan.to_json()") from error


class Row(NamedTuple):
    """One leaf: its name, how its numbers are stored, its shape, the bytes it takes and would take in float."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    bytes: int
    float_bytes: int


def rows(contents: Contents) -> list[Row]:
    """Return the leaves of a file, one row each."""
    return [_row(name, leaf) for name, leaf in sorted(contents.leaves.items())]


def _row(name: str, leaf: Any) -> Row:
    shape = tuple(int(n) for n in leaf.shape)
    size = int(np.prod(shape, dtype=np.int64))
    if isinstance(leaf, QArray):
        granularity = f"{leaf.format}, {'table' if leaf.scale is None else 'scale'} {list(leaf.grid)}"
        return Row(name, granularity, shape, int(leaf.nbytes), size * np.dtype(leaf.dtype).itemsize)
    if isinstance(leaf, Stored):
        kinds = ", ".join(f"{q.format} for {site}" for site, q in leaf.codes.items())
        kept = "" if leaf.value is None else " and float"
        return Row(name, kinds + kept, shape, int(leaf.nbytes), size * np.dtype(leaf.dtype).itemsize)
    if isinstance(leaf, Dropped):
        return Row(name, "dropped", shape, 0, size * np.dtype(leaf.dtype).itemsize)
    stored = int(np.prod(shape, dtype=np.int64)) * getattr(leaf.dtype, "itemsize", 1)
    return Row(name, str(leaf.dtype), shape, stored, stored)


def disk_bytes(path: Path) -> int:
    """Return the size of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())


def plan_data(plan: Plan | None) -> Any:
    """Return a plan as data for JSON."""
    return None if plan is None else json.loads(plan.to_json())
