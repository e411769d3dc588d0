"""The table that a plan prints: one row per site, aligned, in plain text."""

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    site: str
    op: str
    weight_shape: str
    flops: int
    weight: str
    act: str
    out: str
    note: str


HEADER = ("site", "op", "weight", "MFLOPs", "weights", "activations", "outputs", "note")


def render(rows: list[Row], summary: str) -> str:
    """Return rows under a header, then the summary line; outputs are a column where one is quantized."""
    plain = all(r.out == "float" for r in rows)
    full = [HEADER, *((*r[:3], f"{r.flops / 1e6:.3g}", *r[4:]) for r in rows)]
    cells = [
        [cell for name, cell in zip(HEADER, row, strict=True) if not (plain and name == "outputs")] for row in full
    ]
    return "\n".join([*aligned(cells), "", summary])


def text(cells: Sequence[Sequence[str]]) -> str:
    """Return rows as text of equal columns, a rule under the first.

    >>> print(text([("a", "b"), ("long", "c")]))
    a     b
    -------
    long  c
    """
    return "\n".join(aligned(cells))


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of equal columns, a rule under the first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
