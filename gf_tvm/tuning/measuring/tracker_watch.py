"""What the tracker says of a kind of boards: which there are, and which have stopped reporting to it."""

from __future__ import annotations

from ...errors import FarmError
from ...farm.protocol import TrackerConnection, TrackerLost
from ...farm.tracker import Board, boards_of, check_key
from ..task import TuningError
from .farm_run import FarmRun
from .messages import gpu_of

_SUMMARY_SECONDS = 5.0  # between two looks at the tracker's list
_ANSWER_SECONDS = 2.0


class TrackerWatch:
    """Asks the tracker for its list now and then.

    Args:
        run: says which tracker and which kind of boards; its notes say when the tracker goes or comes back.

    Attributes:
        listed: the boards that there were when the tracker last answered.
        gone: why the tracker did not answer when it was last asked; empty if it did.
    """

    def __init__(self, run: FarmRun) -> None:
        self._run = run
        self._farm = run.farm
        self._next = 0.0
        # By name and address of a board: what it last reported, and when that was first seen on this machine's clock.
        self._signs: dict[tuple[str, str], tuple[object, float]] = {}
        self.listed: list[Board] = []
        self.gone = ""

    def start(self, arch: str) -> None:
        """Ask for the first time.

        Args:
            arch: of the GPU with which boards are to measure; "" for none.

        Raises:
            FarmError: no tracker, no board with the key, or none that has the GPU: it would be refused in its turn,
                and the others waited for.
        """
        self.listed = check_key(self._farm.tracker, self._farm.key)
        reasons = []
        for board in self.listed:
            try:
                if arch and board.info:
                    gpu_of(board.name, board.info.get("gpu"), arch)
                return
            except TuningError as error:
                reasons.append(str(error))
        raise FarmError(f"no board with the key {self._farm.key!r} has a GPU of {arch}: {reasons[0]}")

    @property
    def emulated(self) -> bool:
        """Whether boards of the list are."""
        return any(board.info.get("emulated") for board in self.listed)

    def look(self, now: float) -> None:
        """Ask again, if it is time to; ``now`` on the monotonic clock."""
        if now < self._next:
            return
        self._next = now + _SUMMARY_SECONDS
        try:
            with TrackerConnection(self._farm.tracker, _ANSWER_SECONDS) as tracker:
                listed = boards_of(tracker.summary())
        except TrackerLost as lost:
            if not self.gone:
                self._run.notes.append(f"{lost}; boards that are at work go on")
                self._run.health.trouble("", "no board")
            self.gone = str(lost)
            self._signs.clear()
            return
        if self.gone:
            self._run.notes.append("the tracker is back")
            self.gone = ""
        self.listed = [board for board in listed if board.key == self._farm.key]
        signs = {}
        for board in self.listed:
            sign = board.info.get("updated")
            before = self._signs.get((board.name, board.address))
            signs[board.name, board.address] = before if before and before[0] == sign else (sign, now)
        self._signs = signs

    def last_sign(self, name: str) -> float | None:
        """When a board's server last reported, on the monotonic clock; None if that is not known."""
        signs = [seen for (known, _), (sign, seen) in self._signs.items() if known == name and sign is not None]
        return max(signs, default=None)
