"""JSON from strangers: no constants beyond JSON, no duplicate keys, no more memory than the text deserves.

Parsed JSON takes many times the memory of its text (`[[],[],` is 64 bytes for every three), so the values are counted
before they are made, and deep nesting ends as an error of the parser.
"""

import json
import math
from typing import Any

# What a value takes in memory at most, apart from its text, and the memory that any text may take.
BYTES_PER_VALUE = 100
ALLOWANCE = 16 * 2**20


def parse(text: str, memory: int = 0) -> Any:
    """Return the value of a JSON text; raise `ValueError` for anything that is not plain, finite, unambiguous JSON.

    memory: bytes that the result may take beyond a fixed allowance.

    >>> parse('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    check_size(text, memory)
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unambiguous)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def check_size(text: str, memory: int) -> None:
    """Raise `ValueError` for a text that would take more memory than it may."""
    values = text.count(",") + text.count("[") + 2 * text.count("{")
    if values * BYTES_PER_VALUE > memory + ALLOWANCE:
        raise ValueError(f"the JSON holds {values} values, more than a file of this size can need")


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return fields
