"""Frozen values (formats, quantizers, calibrators) as JSON: every field by name, every type from a closed list."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxq.numbers import formats, rounding

TYPES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        formats.Int,
        formats.Fixed,
        formats.Binary,
        formats.Ternary,
        formats.Levels,
        formats.Codebook,
        formats.Float,
        rounding.NearestEven,
        rounding.NearestAway,
        rounding.Floor,
        rounding.TowardZero,
        rounding.Saturate,
        rounding.Wrap,
    )
}


def encode(value: Any) -> Any:
    """Return a value as what JSON knows: dataclasses as objects with their type's name, tuples as lists."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any, types: Mapping[str, type] = TYPES) -> Any:
    """Return what `encode` was given; raise `KeyError` for a type that is not in the list."""
    if isinstance(value, list):
        return tuple(decode(item, types) for item in value)
    if isinstance(value, dict):
        fields = dict(value)
        return types[fields.pop("type")](**{name: decode(item, types) for name, item in fields.items()})
    return value
