"""Times of calls on this machine's CPU, by its clock; for GPUs see :mod:`gf_cuda.timing`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gf_cuda import rounds

Quartiles = tuple[float, float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, lower and upper quartile; how many calls were timed; the fastest of them."""

    median: float
    quartiles: Quartiles
    repeats: int
    best: float | None = None


def measure(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    seconds: float,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, Timing]:
    """Time several calls interleaved, so that they meet the same clocks, neighbours and caches.

    Every call gets an equal part of ``seconds``; one that is slower gets fewer repeats, spread over the whole run.
    The order is shuffled in every round (with a fixed seed): in a fixed cyclic order each call would always find the
    caches and threads as the same other call left them.

    Args:
        calls: what to time; results are dropped between the timings.
        repeats: calls of each at most, see :func:`gf_cuda.rounds.repeats_for`.
        seconds: for all calls together.
        progress: told the part of the rounds that is done, after each.
    """
    repeats_of = {}
    for name, call in calls.items():
        elapsed = _seconds(call)  # also the warm-up: oneDNN compiles its primitives at the first call
        if elapsed < rounds.SLOW_SECONDS:
            elapsed = min(elapsed, *(_seconds(call) for _ in range(2)))
        repeats_of[name] = rounds.repeats_for(elapsed, elapsed, seconds / len(calls), repeats)
    samples = rounds.interleaved(repeats_of, lambda name: _seconds(calls[name]), progress)
    return {name: timing_of(values) for name, values in samples.items()}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # freed outside of the timing
    return elapsed


def timing_of(seconds: Sequence[float]) -> Timing:
    """Of at least two calls."""
    milliseconds = [1e3 * value for value in seconds]
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, (lower, upper), len(milliseconds), min(milliseconds))
