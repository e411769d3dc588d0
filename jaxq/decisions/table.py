"""The table that a plan prints: one row per site, aligned, in plain text."""

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    site: str
    op: str
    weight_shape: str
    flops: int
    weight: str
    act: str
    note: str


HEADER = ("site", "op", "weight", "MFLOPs", "weights", "activations", "note")


def render(rows: list[Row], summary: str) -> str:
    """Return rows under a header, then the summary line."""
    cells = [HEADER, *((r.site, r.op, r.weight_shape, f"{r.flops / 1e6:.3g}", r.weight, r.act, r.note) for r in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", summary])
