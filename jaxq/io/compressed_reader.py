"""Reading checkpoints in the format of compressed-tensors; what they hold is in `compressed_tensors`."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.io import agreement, safetensors, words
from jaxq.io.checkpoint import BROKEN, INDEX, to_device
from jaxq.io.compressed_tensors import FILE, read_json
from jaxq.io.errors import FileError
from jaxq.numbers.floats import E4M3
from jaxq.numbers.formats import Int
from jaxq.numbers.qarray import QArray

REPEATED_GROUP = re.compile(r"\)[*+?{]")


def load_compressed_tensors(folder: str | os.PathLike) -> dict[str, jax.Array | QArray]:
    """Return the arrays of a checkpoint by name, quantized weights as `QArray` [outputs, inputs].

    int8, float8 and packed codes of 4 and 8 bits are read, per tensor, channel or group. `q.transpose((1, 0))` is the
    kernel [inputs, outputs]. Raises `FileError` for files that are broken or hold other schemes, naming the module.

    >>> import tempfile, jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: x @ p["up"]), {"up": jnp.eye(8)}, jnp.ones((2, 8))
    >>> plan = jaxq.make_plan(f, jaxq.weight_only(jaxq.int4(group=4)))(params, x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxq.save_compressed_tensors(folder, jaxq.convert(f, plan)(params, x), plan)
    ...     jaxq.load_compressed_tensors(folder)
    {'up.weight': QArray(int4[8, 8], scale [8, 2], for float32)}
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        groups = list(read_json(path)["quantization_config"]["config_groups"].values())
        arrays = {}
        for name in _files(folder):
            arrays.update(safetensors.read(folder / name).arrays)
        modules = sorted({name.rpartition(".")[0] for name in arrays if name.endswith(".weight_scale")})
        weights = {f"{module}.weight": _weight(module, arrays, groups) for module in modules}
        return {name: to_device(array) for name, array in arrays.items()} | weights
    except FileError:
        raise
    except BROKEN as error:
        raise FileError(path, f"this is not a compressed-tensors checkpoint that jaxq reads: {error}") from error


def _files(folder: Path) -> list[str]:
    if not (folder / INDEX).exists():
        return [FILE]
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{name!r:.80} is not the name of a file in this folder")
    return names


def _weight(module: str, arrays: dict[str, np.ndarray], groups: list[dict]) -> QArray:
    """Take a module's weight out of the arrays."""
    parts = {}
    for name in ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"):
        if f"{module}.{name}" in arrays:
            parts[name] = arrays.pop(f"{module}.{name}")
    if "weight_g_idx" in parts:
        raise ValueError(f"'{module}' has reordered groups (actorder), which jaxq has no place for")
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    form, codes = _codes(module, parts, groups)
    if zero is not None and form != E4M3 and zero.dtype == np.int32:
        zero = words.unpack(np.ascontiguousarray(zero.T), form.bits, len(codes)).T
    scale = scale.reshape(1, 1) if scale.size == 1 else scale
    if scale.ndim != 2 or (zero is not None and zero.size != scale.size):
        raise ValueError(f"'{module}' has scales of shape {list(scale.shape)}")
    shifted = zero is not None and form != E4M3 and zero.any()  # symmetric weights may come with zeros
    zeros: Any = jnp.asarray(zero.reshape(scale.shape), form.storage) if shifted else None
    dtype = jnp.dtype(jnp.float32) if scale.dtype.itemsize > 2 else scale.dtype
    q = QArray(to_device(codes), jnp.asarray(scale, jnp.float32), zeros, form, dtype)
    agreement.check_array(q)
    return q.packed()


def _codes(module: str, parts: dict[str, np.ndarray], groups: list[dict]) -> tuple[Any, np.ndarray]:
    if "weight_packed" not in parts:
        codes = parts["weight"]
        form = {"int8": Int(8), "float8_e4m3fn": E4M3}.get(codes.dtype.name)
        if form is None or codes.ndim != 2:
            raise ValueError(
                f"'{module}' holds {codes.dtype}{list(codes.shape)}; int8 and float8_e4m3fn matrices are read"
            )
        return form, codes
    packed, shape = parts["weight_packed"], parts["weight_shape"].tolist()
    bits = {group["weights"]["num_bits"] for group in groups if _is_target(module, group, len(groups))}
    if len(bits) != 1 or not bits <= {4, 8} or packed.dtype != np.int32:
        raise ValueError(f"'{module}' is packed in {sorted(bits)} bits; 4 and 8 are read")
    form = Int(bits.pop())
    if len(shape) != 2 or packed.shape != (shape[0], -(-shape[1] * form.bits // 32)):
        raise ValueError(f"'{module}' has {list(packed.shape)} words for a weight of shape {shape}")
    return form, words.unpack(packed, form.bits, shape[1])


def _is_target(module: str, group: dict, groups: int) -> bool:
    """Tell whether a group is a module's: by name, by pattern, or as the only one there is."""
    targets = group["targets"]
    return groups == 1 or module in targets or any(t.startswith("re:") and _fits(t[3:], module) for t in targets)


def _fits(pattern: str, module: str) -> bool:
    """Match a pattern of a file's: one that repeats a group could take for ever, and is refused."""
    if REPEATED_GROUP.search(pattern):
        raise ValueError(f"the target 're:{pattern:.80}' repeats a group")
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise ValueError(f"the target 're:{pattern:.80}' is no pattern: {error}") from error
