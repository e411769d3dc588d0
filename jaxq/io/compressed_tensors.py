"""Checkpoints in the format of compressed-tensors, which vLLM and llm-compressor read and write.

A folder with `config.json`, whose `quantization_config` says which modules are quantized how, and safetensors. A module
`m` has `m.weight` [outputs, inputs] as int8 (`int-quantized`) or float8 (`float-quantized`), or `m.weight_packed` in
int32 words with `m.weight_shape` (`pack-quantized`); and `m.weight_scale` [outputs, groups], `m.weight_zero_point`
where codes are asymmetric, and `m.input_scale` where activations are calibrated. A kernel of more axes ([features,
heads, head features], say) is the matrix of all its outputs by all its inputs, as readers' layers hold it. Modules go
by the names of jaxq's sites, with dots: renaming them to what a model of the reader calls them is up to the caller.
Reading is in `compressed_reader`.
https://github.com/vllm-project/compressed-tensors
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.decision import Decision
from jaxq.decisions.plan import Plan
from jaxq.io import safetensors, strict_json, tree, words
from jaxq.io.checkpoint import INDEX
from jaxq.io.errors import FileError
from jaxq.io.replace import beside, publish
from jaxq.numbers import affine
from jaxq.numbers.calibrators import Range
from jaxq.numbers.floats import E4M3
from jaxq.numbers.formats import Int
from jaxq.numbers.qarray import Dropped, QArray, Stored
from jaxq.numbers.quantizers import Quantizer
from jaxq.programs.sites import Site

FILE = "model.safetensors"


def save_compressed_tensors(folder: str | os.PathLike, qparams: Any, plan: Plan) -> None:
    """Write converted parameters to `folder` for readers of compressed-tensors; other keys of its config.json stay.

    Weights of matrix products, int8, int4 (any groups) or float8, become modules; other leaves are written as they are,
    under their path. Raises `ValueError` for weights that the format has no place for, naming the site, and `FileError`
    where the system refuses.

    >>> import tempfile, jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: x @ p["up"]), {"up": jnp.eye(8)}, jnp.ones((2, 8))
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxq.save_compressed_tensors(folder, jaxq.convert(f, plan)(params, x), plan)
    ...     loaded = jaxq.load_compressed_tensors(folder)
    >>> loaded
    {'up.weight': QArray(int8[8, 8], scale [8, 1], for float32)}
    """
    leaves = tree.leaf_names(qparams, plan)
    arrays, schemes = {}, {}
    homes = set()
    for decision in plan.decisions:
        weight = decision.site.weight
        home = weight.origins[0] if weight and weight.origins else None
        if home in homes or not isinstance(leaves.get(home), (QArray, Stored)):
            continue
        homes.add(home)
        module = decision.site.name.replace("/", ".")
        parts, schemes[module] = _module(decision, plan, leaves[home])
        arrays.update({f"{module}.{name}": part for name, part in parts.items()})
    plain = {name.replace("/", "."): leaf for name, leaf in leaves.items() if name not in homes}
    arrays.update({name: leaf for name, leaf in plain.items() if not isinstance(leaf, Dropped)})
    _write(Path(os.path.realpath(folder)), arrays, _config(schemes, plan))


def _module(decision: Decision, plan: Plan, leaf: Any) -> tuple[dict[str, Any], dict]:
    """Return the arrays and the scheme of one site's module."""
    site = decision.site
    if not isinstance(leaf, QArray) or not _is_linear(site):
        raise ValueError(
            f"site '{site.name}' is {site.op} with a weight of shape {list(leaf.shape)}: compressed-tensors holds "
            "weights of matrix products without a batch, each of one leaf; leave it in float by the policy"
        )
    if decision.out is not None:
        raise ValueError(f"site '{site.name}' rounds its output (Scheme(out=)), which compressed-tensors cannot say")
    number = 1 - site.operands.index(site.weight)
    act = decision.quantizers[number]
    kind = _format(leaf, act, site.name)
    q, inputs = leaf.plain(), _inputs(decision, leaf)
    codes, scale = _matrix(q.stored, leaf.shape, inputs), _matrix(q.scale, leaf.shape, inputs)
    zero = None if q.zero_point is None else _matrix(q.zero_point, leaf.shape, inputs)
    parts = _packed(codes, zero, leaf.format.bits) if kind == "pack-quantized" else {"weight": codes}
    strategy = "tensor" if scale.size == 1 < len(codes) else "channel" if scale.shape[1] == 1 else "group"
    parts["weight_scale"] = scale.reshape(1) if strategy == "tensor" else scale
    if act is not None and act.static:
        feed = decision.feed(number)
        seen = plan.range(feed.site)[-1] if feed else plan.range(site.name)[number]
        assert isinstance(seen, Range), "integers and float8 have ranges, not learned parameters"
        parts["input_scale"] = _input_scale(act, seen, site.name)
    group = codes.shape[1] // scale.shape[1] if strategy == "group" else None
    weights = _arguments(leaf.format, strategy, zero is None, group)
    arguments = None if act is None else _act_arguments(act)
    return parts, {"format": kind, "weights": weights, "input_activations": arguments}


def _is_linear(site: Site) -> bool:
    """Tell whether a site is a matrix product whose outputs are all pairs of what its operands keep: no batch."""
    kept = [n for o in site.operands for axis, n in enumerate(o.shape) if axis not in o.contracted]
    return site.op == "dot_general" and math.prod(kept) == math.prod(site.out_shape)


def _inputs(decision: Decision, leaf: QArray) -> tuple[int, ...]:
    """Return the axes of a leaf that are summed over: those of the operand, or the other one of a transposed matrix."""
    site = decision.site
    axes = tuple(sorted(site.weight.contracted))
    quantizer = decision.quantizers[site.operands.index(site.weight)]
    operand = site.weight.shape, quantizer.grid(site.weight.shape, site.weight.contracted)
    straight, turned = (leaf.shape, leaf.grid) == operand, (leaf.shape[::-1], leaf.grid[::-1]) == operand
    if leaf.ndim == 2 and straight and turned:
        raise ValueError(
            f"the weight of site '{site.name}' is square with one scale, so that its inputs cannot be told from its "
            "outputs: use a scale per channel"
        )
    if straight and all(leaf.grid[axis] == 1 for axis in axes[:-1]):
        return axes
    if leaf.ndim == 2 and turned:
        return (1 - axes[0],)
    raise ValueError(
        f"site '{site.name}' takes its weight of shape {list(leaf.shape)} with axes moved, or in groups along another "
        "axis than the last that is summed over, which compressed-tensors cannot say; leave it in float by the policy"
    )


def _matrix(part: Any, shape: tuple[int, ...], inputs: Sequence[int]) -> np.ndarray:
    """Return an array by element or block of `shape` as [outputs, inputs]: [1, ...] where outputs share a block,
    [..., 1] where inputs do."""
    part = np.asarray(part)
    sides = [axis for axis in range(len(shape)) if axis not in inputs], list(inputs)
    wide = list(part.shape)
    for side in sides:
        if any(part.shape[axis] != 1 for axis in side):
            for axis in side if side is sides[0] else side[:-1]:
                wide[axis] = shape[axis]
    rows, columns = (math.prod(wide[axis] for axis in side) for side in sides)
    return np.broadcast_to(part, wide).transpose(*sides[0], *sides[1]).reshape(rows, columns)


def _format(leaf: QArray, act: Quantizer | None, name: str) -> str:
    """Return the name of the layout for a weight and its activations, or raise."""
    form = leaf.format
    plain = act is None or (act.format == form and act.group is None and act.scaling is None)
    if leaf.scaling is None and plain:
        if form == E4M3 and 1 in leaf.grid:
            return "float-quantized"
        if form == Int(8) and act is not None and leaf.zero_point is None and 1 in leaf.grid and act.symmetric:
            return "int-quantized"
        if form in (Int(4), Int(8)) and act is None:
            return "pack-quantized"
    raise ValueError(
        f"site '{name}' multiplies {form} weights by {act!r} activations, which is none of the schemes that are "
        "written: jaxq.w8a8(), weight_only(int4(group=128)), weight_only(int8()), float8 weights with or without float8"
    )


def _packed(codes: np.ndarray, zero: np.ndarray | None, bits: int) -> dict[str, np.ndarray]:
    parts = {"weight_packed": words.pack(codes, bits), "weight_shape": np.array(codes.shape, np.int64)}
    if zero is not None:  # packed along the outputs
        parts["weight_zero_point"] = np.ascontiguousarray(words.pack(zero.T.astype(np.int8), bits).T)
    return parts


def _input_scale(act: Quantizer, seen: Range, name: str) -> np.ndarray:
    if seen.lo.ndim:
        raise ValueError(f"site '{name}' has a range per layer of a scan: unroll it, or use dynamic activations")
    r = jax.tree.map(jnp.asarray, seen)
    if act.format == E4M3:
        return np.asarray(affine.step(jnp.maximum(-r.lo, r.hi), E4M3.largest)).reshape(1)
    return np.asarray(affine.affine_of(act, r).scale).reshape(1)


def _arguments(form: Any, strategy: str, symmetric: bool, group: int | None, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": "float" if form == E4M3 else "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
        "block_structure": None,
        "actorder": None,
    }


def _act_arguments(act: Quantizer) -> dict[str, Any]:
    return _arguments(act.format, "tensor" if act.per_tensor else "token", act.symmetric, None, not act.static)


def _config(schemes: dict[str, dict], plan: Plan) -> dict[str, Any]:
    """Return the quantization_config: one group of modules for each scheme."""
    if not schemes:
        raise ValueError("nothing is quantized, so there is nothing for compressed-tensors to describe")
    groups: dict[str, list[str]] = {}
    for module, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme), []).append(module)
    ignored = [site.name.replace("/", ".") for site in plan.sites if site.op == "dot_general" and site.weight]
    names = {json.loads(scheme)["format"] for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{number}": {
                **json.loads(scheme),
                "targets": ["Linear"] if len(groups) == 1 else modules,
                "output_activations": None,
            }
            for number, (scheme, modules) in enumerate(groups.items())
        },
        "ignore": [name for name in ignored if name not in schemes],
    }


def _write(folder: Path, arrays: Mapping[str, Any], quantization: dict[str, Any]) -> None:
    if (folder / INDEX).exists():
        raise FileError(folder / INDEX, "lists other files, which readers would take; choose another folder")
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made a folder ({error.strerror}); choose another path") from error
    with beside(folder / FILE) as weights, beside(path) as text:
        safetensors.write_plain(weights, arrays, {"format": "pt"})
        text.write(json.dumps({**config, "quantization_config": quantization}, indent=2).encode() + b"\n")
        publish(weights, folder / FILE)
        publish(text, path)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raise `FileError` for anything but plain JSON."""
    data = safetensors.open_map(path)
    try:
        return strict_json.parse(data.tobytes().decode(), len(data))
    except ValueError as error:
        raise FileError(path, f"this is not JSON: {error}") from error
