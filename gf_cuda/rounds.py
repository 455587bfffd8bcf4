"""Rounds of measurements: several things in turn, each as often as its time allows. Standard library only."""

import random
from typing import Callable, Dict, List, Optional, Sequence

MIN_REPEATS = 5
MIN_REPEATS_SLOW = 3  # for what takes longer than SLOW_SECONDS a call
SLOW_SECONDS = 1.0


def repeats_for(seconds: float, cost: float, budget: float, repeats: int) -> int:
    """How many samples of a call to take: ``repeats`` at most, MIN_REPEATS (MIN_REPEATS_SLOW if it is slow) at least.

    Args:
        seconds: that a call takes.
        cost: seconds that a sample takes.
        budget: seconds for all samples.
    """
    least = MIN_REPEATS_SLOW if seconds > SLOW_SECONDS else MIN_REPEATS
    return max(least, min(repeats, int(budget / max(cost, 1e-6))))


def interleaved(
    repeats_of: Dict[str, int], sample: Callable[[str], float], progress: Optional[Callable[[float], None]] = None
) -> Dict[str, List[float]]:
    """Samples of several things, each as often as asked for, spread over the whole run.

    The order is shuffled in every round, with a fixed seed: in a fixed cyclic order each would always find the caches
    as the same other one left them.
    """
    samples: Dict[str, List[float]] = {name: [] for name in repeats_of}
    rounds, order, shuffler = max(repeats_of.values()), list(repeats_of), random.Random(0)
    for index in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            count = repeats_of[name]
            if (index + 1) * count // rounds > index * count // rounds:
                samples[name].append(sample(name))
        if progress is not None:
            progress((index + 1) / rounds)
    return samples


def quantile(values: Sequence[float], part: float) -> float:
    """Linear between the values, the smallest being part 0 and the largest part 1."""
    ordered = sorted(values)
    position = part * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
