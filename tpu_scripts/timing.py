"""Timing of calls side by side, for machines whose speed drifts.

Two calls timed one after the other are compared across whatever else the machine did meanwhile. Here every call gets a
block in turn, round after round, in one process, and two calls are compared within a round. The result is the median
over the rounds, so trust the ratios more than the milliseconds.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Call = Callable[[], Any]
Blocks = Mapping[str, list[float]]


class Ratio(NamedTuple):
    """The median of the ratios of block pairs, and their quartiles."""

    median: float
    low: float
    high: float


def seconds(call: Call) -> float:
    """Time one call, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleave(
    calls: Mapping[str, Call], *, rounds: int, block: int = 10, before: Call = lambda: None, warm_up: int = 2
) -> Blocks:
    """Time every call in alternating blocks; return per name the median seconds of each of its blocks, [rounds].

    Every other round runs backwards, so that none always follows the same neighbour. `before` runs untimed ahead of
    every timed call.
    """
    for call in calls.values():
        for _ in range(warm_up):
            jax.block_until_ready(call())
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            blocks[name].append(_block(calls[name], block, before))
    return blocks


def _block(call: Call, size: int, before: Call) -> float:
    times = []
    for _ in range(size):
        before()
        times.append(seconds(call))
    return statistics.median(times)


def ratio(blocks: Blocks, over: str, under: str) -> Ratio:
    """Compare two calls round by round: median of `over / under`, with quartiles."""
    pairs = [a / b for a, b in zip(blocks[over], blocks[under], strict=True)]
    if len(pairs) == 1:
        return Ratio(pairs[0], pairs[0], pairs[0])
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(median, low, high)


def milliseconds(blocks: Blocks, name: str) -> float:
    """Return the median over the blocks of one call."""
    return 1e3 * statistics.median(blocks[name])
