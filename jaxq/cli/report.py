"""`report FILE`: what a saved model's plan and weights tell: formats, bytes, costs, the error of its weights."""

import argparse
import json
from pathlib import Path

from jaxq.cli.command import Answer, Command
from jaxq.io.checkpoint import read
from jaxq.io.errors import FileError
from jaxq.report.saved import report_of


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", type=Path, help="a model saved by jaxq: a file or a folder")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="also write the report as one self-contained page")


def run(options: argparse.Namespace) -> Answer:
    """Return the report of a model as a table and as data; write the page if there is to be one."""
    _, plan, leaves = read(options.file)
    report = report_of(leaves, plan)
    if options.html is not None:
        try:
            report.to_html(options.html)
        except OSError as error:
            raise FileError(options.html, f"cannot be written ({error.strerror}); choose another path") from error
    return Answer(str(report), json.loads(report.to_json()))


COMMAND = Command("report", "show formats, bytes, costs and the error of the weights of a saved model", declare, run)
