"""`inspect FILE`: what is in it, how its numbers are stored, what was checked."""

import argparse
from pathlib import Path

from jaxq.cli import contents
from jaxq.cli.command import Answer, Command
from jaxq.cli.contents import Contents, Row
from jaxq.decisions import table

KINDS = {
    "model": "saved by jaxq; checksum, dtypes and shapes are right and agree with the plan",
    "export": "exported by jaxq; its checksum is right",
    "plan": "a plan as JSON",
    "compressed-tensors": "a compressed-tensors checkpoint; dtypes and shapes are right",
    "safetensors": "safetensors, not written by jaxq; dtypes and shapes are right",
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "file", type=Path, help="a model saved by jaxq (file or folder), an export, a plan, safetensors"
    )


def run(options: argparse.Namespace) -> Answer:
    """Return a file's contents as tables and as data."""
    found, size = contents.read(options.file), contents.disk_bytes(options.file)
    rows = contents.rows(found)
    data = {
        "file": str(options.file),
        "kind": found.kind,
        "bytes": size,
        "leaves": [row._asdict() for row in rows],
        "plan": contents.plan_data(found.plan),
        "about": found.about,
    }
    heading = f"{options.file}: {KINDS[found.kind]}; {size:,} bytes"
    return Answer("\n\n".join([heading, *_tables(found, rows)]), data)


def _tables(found: Contents, rows: list[Row]) -> list[str]:
    tables = (
        [] if not rows else [table.text([("leaf", "stored as", "shape", "bytes"), *map(_cells, rows)]), _total(rows)]
    )
    tables += [] if found.plan is None else [str(found.plan)]
    tables += [] if found.about is None else ["\n".join(f"{name}: {value}" for name, value in found.about.items())]
    return tables


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.name, row.stored_as, "x".join(map(str, row.shape)) or "-", f"{row.bytes:,}"


def _total(rows: list[Row]) -> str:
    held, floats = sum(row.bytes for row in rows), sum(row.float_bytes for row in rows)
    return f"{len(rows)} leaves, {held:,} bytes, {floats / max(held, 1):.2f} times smaller than in their float types"


COMMAND = Command("inspect", "show what a file holds, how it is stored, and whether it is whole", declare, run)
