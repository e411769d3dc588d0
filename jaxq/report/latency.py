"""Latency of programs side by side: a busy machine slows all alike."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

LEAST, MOST = 3, 50  # calls of each


def median_seconds(calls: Sequence[Callable], seconds: float = 1.0) -> list[float]:
    """Return the median time of each call in seconds, taking turns until `seconds` have passed; compiled first.

    >>> quick, slow = median_seconds([lambda: None, lambda: time.sleep(0.01)], seconds=0.05)
    >>> quick < slow
    True
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
    begun = time.perf_counter()
    while len(times[0]) < LEAST or (len(times[0]) < MOST and time.perf_counter() - begun < seconds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) for taken in times]
