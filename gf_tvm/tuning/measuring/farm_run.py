"""What is common to all boards of one run on a farm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .board_link import BoardLink
from .health import FarmHealth
from .jobs import JobQueue
from .options import FarmOptions, MeasureOptions
from .reference import ReferenceKernel

_MOST_NOTES = 1000


@dataclass
class FarmRun:
    """What the sessions of a run share.

    Args:
        options: how to measure.
        farm: how boards are treated.
        arch: of the boards' GPUs, if they are to measure with them.
        reference: the reference kernel; None does without.
        emulated: whether the boards are.
        best: seconds of the fastest candidate so far.
        notes: lines of text about what happened; of many that nobody takes, the newest.
        boards: the links of all sessions.
    """

    options: MeasureOptions
    farm: FarmOptions
    arch: str = ""
    reference: ReferenceKernel | None = None
    emulated: bool = False
    best: Callable[[], float | None] = lambda: None
    jobs: JobQueue = field(default_factory=JobQueue)
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_NOTES))
    boards: Sequence[BoardLink] = ()

    def __post_init__(self) -> None:
        self.health = FarmHealth(self.farm)

    @property
    def watched(self) -> ReferenceKernel | None:
        """The reference kernel, if boards are watched for drift: the times of emulated ones say nothing."""
        return self.reference if self.farm.drift is not None and not self.emulated else None

    @property
    def connected(self) -> int:
        """Boards that work or could work."""
        return sum(board.connected for board in self.boards)

    def others(self, board: BoardLink) -> list[str]:
        """Names of the boards that work or could work, but for one; "" is one that has not told its name yet."""
        return [other.name for other in self.boards if other is not board and other.connected]
