"""The entry point: parse, run a command, print its answer. Exit codes: 0 fine, 1 a difference, 2 a bad file or call."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from jaxq.cli import diff, inspect, report
from jaxq.cli.command import Answer, Command
from jaxq.io.errors import FileError

COMMANDS: tuple[Command, ...] = (inspect.COMMAND, diff.COMMAND, report.COMMAND)


def main(words: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. A file that cannot be read is one line on stderr, never a traceback.

    >>> main(["inspect", "--json", "/nowhere"])
    {"error": "/nowhere: there is no such file; check the path"}
    2
    """
    options = parser().parse_args(words)
    try:
        answer = options.command.run(options)
    except FileError as error:
        if not options.json:
            print(error, file=sys.stderr)
            return 2
        answer = Answer("", {"error": str(error)}, 2)
    return _print(json.dumps(answer.data) if options.json else answer.text) or answer.code


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m jaxq", description="Look into quantized models on disk.", epilog=__doc__.partition(". ")[2]
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.summary, description=command.summary)
        command.declare(sub)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(command=command)
    return top


def _print(text: str) -> int:
    """Print, a file's control characters escaped; a reader that has gone (`| head`) is no error."""
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    try:
        print(plain, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
