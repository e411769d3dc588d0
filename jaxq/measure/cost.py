"""The cost of one compiled program: operations, bytes, and its time, measured or estimated."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxq.measure import timing


class Cost(NamedTuple):
    """What a program takes. bytes: arguments, results and scratch; seconds: None where nobody knows."""

    bytes: int
    seconds: float | None


def costs(programs: Sequence[tuple[Callable, list]], device: Any | None) -> list[Cost]:
    """Return the cost of functions of one list of arrays: measured here, or compiled for an absent `device`."""
    compiled = [_compile(f, leaves, device) for f, leaves in programs]
    if device is None:
        calls = [lambda c=c, xs=leaves: c(xs) for c, (_, leaves) in zip(compiled, programs, strict=True)]
        times: list[float | None] = list(timing.seconds(calls))
    else:
        times = [_estimate(c) for c in compiled]
    return [Cost(_bytes(c), t) for c, t in zip(compiled, times, strict=True)]


def _compile(f: Callable, leaves: list, device: Any | None) -> Any:
    if device is None:
        return jax.jit(f).lower(leaves).compile()
    there = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaves)
    return jax.jit(f, in_shardings=there, out_shardings=there).lower(shapes).compile()


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def _estimate(compiled: Any) -> float | None:
    """Return the compiler's estimate: a sum over the parts of a program, a second less for each that is unknown."""
    total = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
    return total - math.floor(total) or None
