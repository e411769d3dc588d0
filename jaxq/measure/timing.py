"""Times of programs side by side: blocks in turn, medians, so that a machine's drift meets all of them alike."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Call = Callable[[], Any]

# A block takes about this long, and at most so many calls.
BLOCK_SECONDS, MOST_CALLS = 0.02, 20


def seconds(calls: Sequence[Call], rounds: int = 5) -> list[float]:
    """Return the median time of each call, in seconds; every other round runs backwards.

    >>> fast, slow = seconds([lambda: None, lambda: time.sleep(0.005)])
    >>> fast < slow
    True
    """
    sizes = [_block_size(call) for call in calls]
    blocks: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for n in range(len(calls))[:: -1 if number % 2 else 1]:
            blocks[n].append(float(np.median([_once(calls[n]) for _ in range(sizes[n])])))
    return [float(np.median(times)) for times in blocks]


def _block_size(call: Call) -> int:
    """Warm a call up and return how many make a block."""
    _once(call)
    return max(1, min(MOST_CALLS, int(BLOCK_SECONDS / max(_once(call), 1e-6))))


def _once(call: Call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
