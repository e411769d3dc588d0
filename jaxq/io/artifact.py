"""`Artifact`: an exported program as one file, and its weights inside it or in a second file beside it.

A program is what `jax.export` serializes, followed by a line of JSON about it: the versions that can read it, its
platforms, its arguments. `jax.export.deserialize` starts at the beginning and does not see the line. Weights beside it
are in the file that `jaxq.save` writes, of the same name and `.safetensors`, and the program's first argument is the
dict of that file's arrays: any reader of safetensors can give it them.
"""

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.export

from jaxq.io import checkpoint, safetensors, strict_json
from jaxq.io.errors import FileError
from jaxq.io.replace import beside, publish
from jaxq.io.safetensors import Container

VERSION = 1
MARK = b"\njaxq export "
GUARANTEE = "read by JAX releases of the six months after its own, and by those of the three weeks before"
WEIGHTS = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported program. data: what `jax.export.deserialize` takes; about: versions, platforms and arguments;
    weights: what is to be beside it, None where it is inside.

    >>> import jax, jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}, jnp.ones((2, 4))
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    >>> artifact = jaxq.export(f, plan, jaxq.convert(f, plan)(params, x), x, platforms=("cpu",))
    >>> jax.export.deserialize(artifact.data).call(jnp.ones((7, 4))).shape
    (7, 4)
    """

    data: bytes = dataclasses.field(repr=False)
    about: dict[str, Any]
    weights: Container | None = dataclasses.field(default=None, repr=False)

    def save(self, path: str | os.PathLike) -> None:
        """Write the program to one file, and weights that are not inside it beside it: to `path` + `.safetensors`.

        What was there before stays whole until the new files are. Raises `FileError` where the system refuses.
        """
        path = Path(os.path.realpath(path))
        with beside(path) as file:
            file.write(self.data)
            if self.weights is not None:
                checkpoint.write_file(_weights_path(path), self.weights)
            publish(file, path)

    @staticmethod
    def load(path: str | os.PathLike) -> "Artifact":
        """Read what `save` wrote, checksums and all; raise `FileError` for anything else. Nothing is run.

        The file of weights beside it may be another model's of the same arrays: it is what runs.
        """
        path = Path(os.path.realpath(path))
        data = safetensors.open_map(path).tobytes()
        program, mark, line = data.rpartition(MARK)
        try:
            about = strict_json.parse(line.decode())
            stated = about.pop("crc32")
            if not mark or about["jaxq_export"] != VERSION or stated != _checksum(program, about):
                raise ValueError("its last line or its checksum is not that of an export")
            weights = about.get("weights")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(path, f"this is not an intact jaxq export: {error}; export the model again") from error
        return Artifact(data, about, None if weights is None else _read_weights(_weights_path(path), weights))

    def call(self, *args: Any) -> Any:
        """Run the program, as any process with JAX can, with its weights if they are beside it."""
        weights = () if self.weights is None else (self.weights.arrays,)
        return jax.export.deserialize(bytearray(self.data)).call(*weights, *args)


def described(exported: jax.export.Exported, weights: Container | None) -> Artifact:
    """Return an exported program with what there is to say about it; weights: those that are its first argument."""
    try:
        program = bytes(exported.serialize())
    except ImportError as error:
        raise ImportError("exporting needs flatbuffers: pip install 'jaxq[export]'") from error
    taken = 0 if weights is None else len(weights.arrays)
    about = {
        "jaxq_export": VERSION,
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "window": GUARANTEE,
        "platforms": list(exported.platforms),
        "weights": None if weights is None else _types(weights),
        "inputs": [aval.str_short() for aval in exported.in_avals[taken:]],
        "outputs": [aval.str_short() for aval in exported.out_avals],
    }
    line = json.dumps({**about, "crc32": _checksum(program, about)})
    return Artifact(program + MARK + line.encode(), about, weights)


def _types(weights: Container) -> dict[str, str]:
    """Return what a program asks of its weights: dtype and shape by name."""
    pairs = sorted(weights.arrays.items())
    return {name: f"{array.dtype}[{','.join(map(str, array.shape))}]" for name, array in pairs}


def _weights_path(path: Path) -> Path:
    """Return where the weights of a program are that has them beside it."""
    return path.with_name(path.name + WEIGHTS)


def _read_weights(path: Path, types: dict[str, str]) -> Container:
    weights = checkpoint.read_container(path)
    if weights.checksum is None or _types(weights) != types:
        raise FileError(path, "these are not the weights of the program beside it; export the model again")
    return weights


def _checksum(program: bytes, about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about).encode(), zlib.crc32(program))
