"""What a command is: its words on the command line, and a function from them to an answer."""

import argparse
from collections.abc import Callable
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
