"""What there is to do on boards: what waits for one, what was lost with which, and what came of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ..task import Candidate, Task
from .result import Result

#: Times that a job may be lost with a board before it is given up.
LOSSES = 4


@dataclass
class Job:
    """Something to do on a board: one candidate, the final comparison of several, or the reference kernel.

    Args:
        task: what the files were built for.
        files: libraries, by name; a candidate's or the reference kernel's is "candidate".
        candidate: None if it is a comparison or the reference kernel.
        seed: of the inputs.
        keep: the files are not ours to remove.
        reference: it is the reference kernel.
        lost_on: boards that were lost with it.
    """

    task: Task
    files: dict[str, Path]
    candidate: Candidate | None
    seed: int = 0
    keep: bool = False
    reference: bool = False
    lost_on: list[str] = field(default_factory=list)

    def remove_files(self) -> None:
        """Remove a candidate's library; those of a comparison belong to the caller."""
        if self.candidate is not None and not self.keep:
            for path in self.files.values():
                path.unlink(missing_ok=True)


class JobQueue:
    """Jobs from the moment on at which they are built.

    Attributes:
        waiting: for a board, in this order.
        done: candidates and what came of them; None for one that was given up.
        compared: what came of the final comparison; None while there is nothing.
    """

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self.done: deque[tuple[Candidate, Result | None]] = deque()
        self.compared: dict[str, Result] | None = None

    def next_for(self, board: str, others: Collection[str]) -> Job | None:
        """The first job that suits a board; None if there is none.

        A job that the board was lost with is left to the others. Where each of them was lost with it as well, or has
        the same name, it is the board's again: else it would wait for ever, and never be given up.

        Args:
            board: its name.
            others: names of the other boards that work or could work.
        """
        for job in self.waiting:
            if board not in job.lost_on or all(other in job.lost_on for other in others):
                return job
        return None

    def take(self, board: str, others: Collection[str]) -> Job | None:
        """The job of :meth:`next_for`, which waits no longer."""
        job = self.next_for(board, others)
        if job is not None:
            self.waiting.remove(job)
        return job

    def put_back(self, job: Job) -> None:
        """Do it again, before all others; the reference kernel is made anew when it is due."""
        if not job.reference:
            self.waiting.appendleft(job)

    def lost(self, job: Job, board: str) -> str:
        """A board was lost with a job: another one has to do it. Returns a line of text if it is given up."""
        if job.reference:
            return ""
        job.lost_on.append(board)
        if job.candidate is None or len(job.lost_on) < LOSSES:
            self.waiting.appendleft(job)
            return ""
        job.remove_files()
        self.done.append((job.candidate, None))
        return f"{job.candidate.id} is given up: lost with {', '.join(job.lost_on)}"

    def finish(self, job: Job, result: Result) -> None:
        """A candidate was measured."""
        assert job.candidate is not None
        job.remove_files()
        self.done.append((job.candidate, result))

    def clear(self) -> None:
        """Forget all jobs and what came of them, but for a comparison."""
        for job in self.waiting:
            job.remove_files()
        self.waiting.clear()
        self.done.clear()
