"""Frozen values (formats, quantizers, calibrators) as JSON: every field by name, every type from a closed list."""

import dataclasses
import functools
import types
import typing
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
        rounding.Stochastic,
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


def check_types(value: Any) -> None:
    """Raise `TypeError` unless every field of a dataclass, and of those inside it, has the type it is declared with."""
    cls: Any = type(value)
    for name, hint in _hints(cls).items():
        if not _is(getattr(value, name), hint):
            raise TypeError(f"{type(value).__name__}.{name} is {getattr(value, name)!r:.80}, which is no {hint}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    declared = typing.get_type_hints(cls)
    return {field.name: declared[field.name] for field in dataclasses.fields(cls)}


def _is(value: Any, hint: Any) -> bool:
    """Tell whether a value has a declared type; numbers may be whole where fractions are declared."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, option) for option in options)
    if origin is tuple:
        return type(value) is tuple and all(_is(item, options[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    if type(value) is not hint and not (hint is type(None) and value is None):
        return False
    if dataclasses.is_dataclass(value):
        check_types(value)
    return True
