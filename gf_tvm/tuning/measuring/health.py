"""What a run knows of each board: what went wrong there, how warm it is, and whether it has become slower."""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from ..task import TuningError
from .answers import Greeting
from .messages import gpu_of
from .options import FarmOptions

#: What can go wrong that is not the candidate's doing. ``board lost``: its server or the connection ended, or it
#: stopped answering; ``timeout``: a step took longer than it may; ``no board``: the tracker had none to give, or is
#: not there; ``throttled``: hot, or a lower clock; ``drift``: another speed than before, or than its like; ``refused``:
#: other versions than the host's; ``broken``: no memory, a full disk; ``bad answer``: it says what makes no sense.
TROUBLES = ("board lost", "timeout", "no board", "throttled", "drift", "refused", "broken", "bad answer")

#: Troubles in a row after which a board is put aside.
STRIKES = 3

# A board that was hot is cool again so many degrees below the limit.
_COOLER = 10


@dataclass
class BoardHealth:
    """One board, by its name: it outlives the board's sessions.

    Args:
        trials: candidates measured.
        strikes: troubles since the last good trial.
        aside_until: gets no work until then, on the monotonic clock.
        hot_since: it has been cooling down since then; None if it is not.
        first_reference: seconds of its first run of the reference kernel.
        troubles: how often each of :data:`TROUBLES` has happened.
    """

    trials: int = 0
    strikes: int = 0
    aside_until: float = 0.0
    hot_since: float | None = None
    first_reference: float | None = None
    troubles: Counter[str] = field(default_factory=Counter)

    def cooling_seconds(self) -> float:
        """For how long it has been cooling down."""
        return 0.0 if self.hot_since is None else time.monotonic() - self.hot_since


class FarmHealth:
    """All boards of a run. Troubles where no board is known are those of the name "".

    Args:
        farm: has the limits.
    """

    def __init__(self, farm: FarmOptions) -> None:
        self._farm = farm
        self.boards: dict[str, BoardHealth] = {}

    def of(self, name: str) -> BoardHealth:
        """What is known of a board."""
        return self.boards.setdefault(name, BoardHealth())

    def trouble(self, name: str, kind: str) -> None:
        """One more trouble with a board; ``kind`` is one of :data:`TROUBLES`."""
        assert kind in TROUBLES
        self.of(name).troubles[kind] += 1

    def report(self) -> dict[str, Any]:
        """By board: trials and troubles, as plain values."""
        return {
            name: {"trials": health.trials, "troubles": dict(health.troubles)} for name, health in self.boards.items()
        }

    # ------------------------------------------------------------------------------------------------------------ heat

    def is_hot(self, sensors: Mapping[str, Any]) -> bool:
        """Whether what was measured meanwhile does not count."""
        celsius = _celsius(sensors)
        return bool(sensors.get("throttled")) or (celsius is not None and celsius >= self._farm.hot_celsius)

    def is_cool(self, sensors: Mapping[str, Any]) -> bool:
        """Whether a board that was hot can go on."""
        celsius = _celsius(sensors)
        return not sensors.get("throttled") and (celsius is None or celsius < self._farm.hot_celsius - _COOLER)

    # ----------------------------------------------------------------------------------------------------------- speed

    def drift(self, name: str, seconds: float) -> float | None:
        """Compare a board's speed with what it was and with the others'.

        Args:
            name: of the board.
            seconds: that its reference kernel has taken now.

        Returns:
            By how much that is longer than usual (0.3: 30 %), if it is more than the farm's ``drift``; else None.
        """
        health = self.of(name)
        if health.first_reference is None:
            health.first_reference = seconds
        others = [h.first_reference for n, h in self.boards.items() if n != name and h.first_reference is not None]
        usual = min([health.first_reference, *([statistics.median(others)] if others else [])])
        limit = self._farm.drift
        return seconds / usual - 1 if limit is not None and seconds > (1 + limit) * usual else None


@functools.cache
def _version(package: str) -> str:
    return metadata.version(package)  # which reads a file each time


def other_versions(versions: Mapping[str, str | None]) -> str:
    """Why a board with these packages cannot be used; empty if it can."""
    for package in ("gf-tvm", "apache-tvm"):
        here, there = _version(package), versions.get(package)
        if here != there:
            return f"it has {package} {there}, this machine has {here}; run gf-tvm farm deploy again"
    return ""


def why_unfit(board: Greeting, emulated: bool, arch: str) -> str:
    """Why a board with the right versions cannot be used in a run; empty if it can.

    Args:
        board: its answer to "hello".
        emulated: whether the run's boards are.
        arch: of the GPU that is needed; "" for none.
    """
    if board.emulated != emulated:
        return "emulated boards and real ones cannot share a log"
    if board.threads > board.cores:
        return f"it has {board.cores} cores for {board.threads} threads; use --threads {board.cores}"
    try:
        if arch:
            gpu_of(board.name, board.gpu, arch)
    except TuningError as error:
        return str(error)
    return ""


def state_of(sensors: Mapping[str, Any]) -> str:
    """What the sensors say, for people."""
    parts = [*(sensors.get("throttled") or ())]
    if (celsius := _celsius(sensors)) is not None:
        parts.append(f"at {celsius:.0f} °C")
    return ", ".join(parts)


def _celsius(sensors: Mapping[str, Any]) -> float | None:
    """Of the hotter one of CPU and GPU, which share a heat sink; None if neither is known."""
    known = [sensors[name] for name in ("celsius", "gpu_celsius") if sensors.get(name) is not None]
    return max(known, default=None)
