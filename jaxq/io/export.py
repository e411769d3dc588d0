"""`export`: the quantized program with its weights as StableHLO, which runs where jaxq is not installed.

The artifact is what `jax.export` serializes, followed by a line of JSON about it: the versions that can read it, its
platforms, its arguments. `jax.export.deserialize` starts at the beginning and does not see the line. Weights enter
behind a barrier, so that a compiler rounds with them as it does with arguments.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.interpretation.arguments import Argnums, place
from jaxq.interpretation.transforms import quantize
from jaxq.io import safetensors, strict_json
from jaxq.io.errors import FileError
from jaxq.io.replace import beside, publish
from jaxq.numbers.blocks import hide

VERSION = 1
MARK = b"\njaxq export "
GUARANTEE = "read by JAX releases of the six months after its own, and by those of the three weeks before"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported program. data: what `jax.export.deserialize` takes; about: versions, platforms and arguments.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}, jnp.ones((2, 4))
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    >>> artifact = jaxq.export(f, plan, jaxq.convert(f, plan)(params, x), x, platforms=("cpu",))
    >>> jax.export.deserialize(artifact.data).call(jnp.ones((7, 4))).shape
    (7, 4)
    """

    data: bytes = dataclasses.field(repr=False)
    about: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Write the artifact to one file; what was there before stays whole until it is. Raises `FileError`."""
        path = Path(os.path.realpath(path))
        with beside(path) as file:
            file.write(self.data)
            publish(file, path)

    @staticmethod
    def load(path: str | os.PathLike) -> "Artifact":
        """Read what `save` wrote, checksum and all; raise `FileError` for anything else. Nothing is run."""
        data = safetensors.open_map(Path(path)).tobytes()
        program, mark, line = data.rpartition(MARK)
        try:
            about = strict_json.parse(line.decode())
            stated = about.pop("crc32")
            if not mark or about["jaxq_export"] != VERSION or stated != _checksum(program, about):
                raise ValueError("its last line or its checksum is not that of an export")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(path, f"this is not an intact jaxq export: {error}; export the model again") from error
        return Artifact(data, about)

    def call(self, *args: Any) -> Any:
        """Run the program, as any process with JAX can."""
        return jax.export.deserialize(bytearray(self.data)).call(*args)


def export(
    f: Callable,
    plan: Plan,
    qparams: Any,
    *args: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    argnums: Argnums = 0,
    verify: Any = None,
) -> Artifact:
    """Return `quantize(f, plan)` with its weights inside, as StableHLO for all `platforms`.

    args: what follows the weights. The leading axis of the first array is the batch: it is symbolic, in all arrays that
    have it; a `ShapeDtypeStruct` is taken as it is, symbolic axes or not. Arguments without arrays (`train=False`) are
    fixed, and left out of the exported signature. argnums: which arguments the weights are, as for `convert`. verify:
    arguments to run the artifact on, a tuple or the one there is: it must give on the CPU what `quantize` gives, bit
    for bit, or `ValueError` is raised. Raises `ValueError` for programs that change state, and JAX's errors for those
    that depend on the size of the batch.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}, jnp.ones((2, 4))
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    >>> artifact = jaxq.export(f, plan, jaxq.convert(f, plan)(params, x), x, verify=x)
    >>> artifact.about["platforms"], artifact.about["inputs"]
    (['cpu', 'cuda', 'tpu'], ['float32[batch,4]'])
    """
    run = quantize(f, plan, argnums=argnums)
    shapes = _symbolic(args)
    dynamic = [n for n, arg in enumerate(args) if any(_is_array(leaf) for leaf in jax.tree.leaves(arg))]

    def serve(*arrays):
        whole = list(shapes)
        for n, array in zip(dynamic, arrays, strict=True):
            whole[n] = array
        return _pure(run, _hidden(qparams), whole, argnums)

    exported = jax.export.export(jax.jit(serve), platforms=tuple(platforms))(*(shapes[n] for n in dynamic))
    artifact = _described(exported)
    if verify is not None:
        _verify(artifact, run, qparams, verify if type(verify) is tuple else (verify,), argnums, dynamic)
    return artifact


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _symbolic(args: tuple) -> tuple:
    """Return the arguments as shapes, with a symbolic batch wherever the first array's leading axis is."""
    arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, (jax.Array, np.ndarray)) and leaf.ndim]
    (batch,) = jax.export.symbolic_shape("batch")

    def shape(leaf: Any) -> Any:
        if not _is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        batched = leaf.ndim > 0 and leaf.shape[0] == arrays[0].shape[0]
        return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]) if batched else leaf.shape, leaf.dtype)

    return jax.tree.map(shape, args)


def _hidden(params: Any) -> Any:
    """Return parameters that XLA takes for arguments: constants it folds, and rounds differently."""

    def veil(leaf: Any) -> Any:
        plain = isinstance(leaf, (jax.Array, np.ndarray)) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return hide(jnp.asarray(leaf)) if plain else leaf

    return jax.tree.map(veil, params)


def _pure(run: Callable, params: Any, args: list, argnums: Argnums) -> Any:
    """Run, and raise where the call changed its parameters: an exported program has no state."""
    before = jax.tree.leaves(params)
    out = run(*place(params, tuple(args), argnums))
    if any(old is not new for old, new in zip(before, jax.tree.leaves(params), strict=True)):
        raise ValueError("the call changes its module, which an exported program cannot: call module.eval() first")
    return out


def _described(exported: jax.export.Exported) -> Artifact:
    try:
        program = bytes(exported.serialize())
    except ImportError as error:
        raise ImportError("exporting needs flatbuffers: pip install 'jaxq[export]'") from error
    about = {
        "jaxq_export": VERSION,
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "window": GUARANTEE,
        "platforms": list(exported.platforms),
        "inputs": [aval.str_short() for aval in exported.in_avals],
        "outputs": [aval.str_short() for aval in exported.out_avals],
    }
    line = json.dumps({**about, "crc32": _checksum(program, about)})
    return Artifact(program + MARK + line.encode(), about)


def _checksum(program: bytes, about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about).encode(), zlib.crc32(program))


def _verify(artifact: Artifact, run: Callable, qparams: Any, inputs: tuple, argnums: Argnums, dynamic: list) -> None:
    """Raise `ValueError` unless the artifact gives what `quantize` gives, bit for bit, on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        want = run(*place(qparams, inputs, argnums))
        got = artifact.call(*(inputs[n] for n in dynamic))
    for number, pair in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        a, b = (np.asarray(x) for x in pair)
        if a.dtype != b.dtype or a.tobytes() != b.tobytes():
            where = "" if a.shape != b.shape else f": {int((a != b).sum())} of {a.size} numbers differ"
            raise ValueError(f"output {number} of the exported program is not that of jaxq.quantize{where}")
