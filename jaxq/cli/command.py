"""What a command is: its words on the command line, and a function from them to an answer."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What a command has to say, as text and as data for JSON, and its exit code."""

    text: str
    data: dict[str, Any]
    code: int = 0


class Command(NamedTuple):
    """A command. declare: adds its arguments to a parser; run: raises `FileError` for files that are not fit."""

    name: str
    summary: str
    declare: Callable[[argparse.ArgumentParser], Any]
    run: Callable[[argparse.Namespace], Answer]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text, a line under the first.

    >>> print(columns([("a", "b"), ("long", "c")]))
    a     b
    -------
    long  c
    """
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
