"""What `explain` returns: what was emitted for every site and what it costs, as data that prints."""

import dataclasses
from typing import NamedTuple

from jaxq.decisions import table
from jaxq.measure.cost import Cost

HEADER = ("site", "op", "emitted", "MFLOPs", "float KiB", "KiB", "float us", "us", "speed", "note")


class Line(NamedTuple):
    """One site. form: what is emitted for it; float_cost, cost: by itself, None where it has no program of its own."""

    site: str
    op: str
    form: str
    flops: int
    float_cost: Cost | None
    cost: Cost | None
    note: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a plan comes to on a device. `float_cost` and `cost` are of the whole program; times are seconds.

    measured: whether times were measured on the device, or estimated by its compiler, which may know none.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params = (lambda p, x: x @ p["up"]), {"up": jnp.ones((8, 4))}
    >>> explanation = jaxq.explain(f, jaxq.w8a8())(params, jnp.ones((2, 8)))
    >>> explanation.lines[0].form, explanation.lines[0].flops, explanation.measured
    ('dot', 128, True)
    """

    device: str
    measured: bool
    lines: tuple[Line, ...]
    float_cost: Cost
    cost: Cost

    def __str__(self) -> str:
        whole = Line("(whole program)", "", "", sum(line.flops for line in self.lines), self.float_cost, self.cost, "")
        how = "measured on" if self.measured else "estimated by the compiler for"
        return "\n".join([*table.aligned([HEADER, *map(_cells, (*self.lines, whole))]), "", f"{how} {self.device}"])


def _cells(line: Line) -> tuple[str, ...]:
    costs = (line.float_cost, line.cost)
    sizes = tuple(f"{cost.bytes / 1024:.1f}" if cost else "-" for cost in costs)
    times = tuple(f"{1e6 * cost.seconds:.1f}" if cost and cost.seconds else "-" for cost in costs)
    speed = speed_up(*costs)
    return (
        line.site,
        line.op,
        line.form,
        f"{line.flops / 1e6:.3g}",
        *sizes,
        *times,
        f"{speed:.2f}" if speed else "-",
        line.note,
    )


def speed_up(float_cost: Cost | None, cost: Cost | None) -> float | None:
    """Return how many times as fast as float, where both times are known."""
    if float_cost is None or cost is None or not float_cost.seconds or not cost.seconds:
        return None
    return float_cost.seconds / cost.seconds
