"""The safetensors container: named arrays and text, in a layout that can be used from a memory map.

A file is the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape, begin and end) and the
arrays' bytes, without gaps. Files written here go two steps further, within the format: an array of a page or more
starts at a multiple of 64 bytes, filled up by small arrays named `__padding_N__`, so that JAX takes it from the map
without copying; and the last array is the CRC-32 of all bytes before it, header included. Reading trusts nothing.
https://github.com/huggingface/safetensors, section Format.
"""

import itertools
import json
import math
import mmap
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxq.io import strict_json
from jaxq.io.errors import FileError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER_LIMIT = 100_000_000  # of the format
ALIGNMENT = 64  # of the arrays that XLA takes without copying
PAGE = 4096
MAX_RANK = 32
PADDING = "__padding_{}__"
CHECKSUM = "__crc32__"
RESERVED = ("__padding_", CHECKSUM, "__metadata__")


class Container(NamedTuple):
    """What a file holds: arrays that lie in its memory map, texts, and its CRC-32, None if it carries none."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]
    checksum: int | None


# --- writing ----------------------------------------------------------------------------------------------------------


def write(file: BinaryIO, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> int:
    """Write arrays of the dtypes in `DTYPES` and texts; return the CRC-32. One array at a time is on the host.

    Raises `ValueError` for a header beyond the format's limit of 100 MB.
    """
    entries = list(_layout(arrays))
    checksum = 0
    header = _header([*entries, (CHECKSUM, np.zeros(4, np.uint8))], metadata)
    for part in itertools.chain([header], _contents(entries)):
        file.write(part)
        checksum = zlib.crc32(part, checksum)
    file.write(checksum.to_bytes(4, "little"))
    return checksum


def write_plain(file: BinaryIO, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write arrays and texts and nothing else, for readers that know every array's name."""
    entries = list(arrays.items())
    for part in itertools.chain([_header(entries, metadata)], _contents(entries)):
        file.write(part)


def _contents(entries: list[tuple[str, Any]]) -> Iterator[Any]:
    for _, array in entries:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _header(entries: list[tuple[str, Any]], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in entries:
        begin, end = end, end + _size(array)
        shape = [int(n) for n in array.shape]
        fields[name] = {"dtype": NAMES[np.dtype(array.dtype)], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"the header takes {len(text)} bytes, the format allows {HEADER_LIMIT}; save smaller parts")
    return len(text).to_bytes(8, "little") + text


def _size(array: Any) -> int:
    return array.size * np.dtype(array.dtype).itemsize


def _layout(arrays: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield arrays in the order of the file, those of a page or more first, with the padding they need."""
    large = [pair for pair in arrays.items() if _size(pair[1]) >= PAGE]
    small = [pair for pair in arrays.items() if _size(pair[1]) < PAGE]
    small.sort(key=lambda pair: -np.dtype(pair[1].dtype).itemsize)  # so that each is aligned to its own type
    for number, (name, array) in enumerate(large):
        yield name, array
        gap = -_size(array) % ALIGNMENT
        if gap:
            yield PADDING.format(number), np.zeros(gap, np.uint8)
    yield from small


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Container:
    """Map a file and return what it holds, after checking all that can be checked. Nothing is copied.

    The map is private: writing to an array does not reach the file. Raises `FileError` for a file that breaks the
    format or does not match its checksum.
    """
    data = open_map(path)
    try:
        entries, metadata, start = _read_header(data)
        arrays = {name: _array(name, entry, data[start:]) for name, entry in entries.items()}
        _check_coverage(entries, len(data) - start)
        checksum = _check_sum(arrays, data)
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(path, f"this is not an intact safetensors file: {error}; write or copy it again") from error
    return Container({name: a for name, a in arrays.items() if not name.startswith(RESERVED)}, metadata, checksum)


def open_map(path: Path) -> np.ndarray:
    """Return the bytes of a file as a private memory map: uint8 [size]."""
    if not path.exists():
        raise FileError(path, "there is no such file; check the path")
    if not path.is_file():
        raise FileError(path, "this is not a regular file; check the path")
    try:
        with open(path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except (OSError, ValueError) as error:
        raise FileError(path, f"cannot be read ({error}); check its size and permissions") from error


def _read_header(data: np.ndarray) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the entries by name, the metadata and where the arrays start."""
    if len(data) < 10:
        raise ValueError(f"it has {len(data)} bytes")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(HEADER_LIMIT, len(data) - 8):
        raise ValueError(f"its header claims {length} bytes, in a file of {len(data)}")
    fields = strict_json.parse(data[8 : 8 + length].tobytes().decode(), len(data))
    if not isinstance(fields, dict):
        raise ValueError("its header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not a map of texts")
    return fields, metadata, 8 + length


def _array(name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    """Return one array of the map: its size must be that of its dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"array '{name}' has other fields than dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_RANK:
        raise ValueError(f"array '{name}' has no proper shape and offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"array '{name}' has the unknown dtype {entry['dtype']!r:.40}")
    dtype, (begin, end) = DTYPES[entry["dtype"]], offsets
    if not begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"array '{name}' of {entry['dtype']} does not fill its {end - begin} bytes, or leaves the file"
        )
    raw = data[begin:end]
    if dtype == np.bool_ and (raw > 1).any():
        raise ValueError(f"array '{name}' holds booleans other than 0 and 1")
    return raw.view(dtype).reshape(shape)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_coverage(entries: Mapping[str, Any], size: int) -> None:
    """Raise unless the arrays fill the file without gaps and overlaps."""
    end = 0
    for begin, next_end in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
        if begin != end:
            raise ValueError(f"its arrays overlap or leave a gap at byte {begin}")
        end = next_end
    if end != size:
        raise ValueError(f"its arrays take {end} bytes, and it has {size} of them")


def _check_sum(arrays: Mapping[str, np.ndarray], data: np.ndarray) -> int | None:
    """Return the checksum of a file that carries one; raise unless it is right."""
    stated = arrays.get(CHECKSUM)
    if stated is None:
        return None
    checksum = zlib.crc32(data[:-4].data)
    if stated.tobytes() != checksum.to_bytes(4, "little") or data[-4:].tobytes() != stated.tobytes():
        raise ValueError("its checksum is wrong: bits were lost or flipped")
    return checksum
