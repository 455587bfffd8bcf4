"""One board of a farm as the tuner sees it: a session, what it works on, and what happens when something goes wrong.

Behind each session is a :mod:`~gf_tvm.tuning.measuring.link` process of this machine. A session asks it for one thing
at a time and never waits: the measurer tells it when there is an answer. What goes wrong is either the candidate's
doing, and its result, or one of :data:`~gf_tvm.tuning.measuring.health.TROUBLES`: then another board gets the job.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .answers import BadAnswer, answer_of, greeting_of, name_and_versions, reading_of, results_of, seconds_of
from .board_link import HELD, BoardLink, State
from .farm_run import FarmRun
from .health import STRIKES, BoardHealth, other_versions, state_of, why_unfit
from .jobs import Job
from .link import Link
from .measuring_process import COMPARE_SECONDS, PREPARE_SECONDS
from .messages import Operation, task_values
from .process import CandidateFailed, Ended
from .result import Result

_REQUEST_SECONDS = 30.0  # waiting for the tracker to give a board
_CONNECT_SECONDS = 20.0
_HELLO_SECONDS = 60.0
_UPLOAD_SECONDS = 60.0
_SENSE_SECONDS = 90.0
_SILENT_SECONDS = 30.0  # servers report every 5 seconds
_REST_SECONDS = 15.0
_RETRIES = (0.5, 2.0, 5.0, 15.0)
# Trials on a board between two runs of the reference kernel.
_REFERENCE_TRIALS = 24


class BoardSession(BoardLink):
    """A session with one board, and after that with another.

    Args:
        number: of the session.
        run: what all sessions share.

    Attributes:
        job: what it works on.
        retry_at: when to ask the tracker (again), on the monotonic clock, while it is closed.
        reference_due: trials until the reference kernel is due.
        refused: why this run cannot use the board at all; empty if it can.
    """

    def __init__(self, number: int, run: FarmRun) -> None:
        super().__init__(number)
        self.job: Job | None = None
        self.retry_at = 0.0
        self.reference_due = 0
        self.refused = ""
        self._reason = ""  # why it was put aside
        self._run = run
        self._attempts = 0
        self._greeted = False
        self._remaining: list[tuple[str, Path]] = []
        self._uploaded: dict[str, str] = {}
        # Of uploaded files, by their names there; not sent to servers of before they were known.
        self._checksums: dict[str, str] = {}
        self._sends_checksums = False
        self._prepared: tuple[str, int] | None = None
        self._prepare_seconds = 0.0
        self._sent = 0
        self._sending = ""
        # Where an answer leads, by the state in which it is waited for. Connecting and uploading are the link's own
        # doing, all else the board's; starting has no answer.
        self._transitions: dict[State, Callable[[Any], None]] = {
            State.CONNECTING: self._after_connecting,
            State.GREETING: self._after_greeting,
            State.PREPARING: self._after_preparing,
            State.UPLOADING: self._after_uploading,
            State.RUNNING: self._after_running,
            State.RESTING: self._after_resting,
        }

    @property
    def health(self) -> BoardHealth:
        """What this run knows of the board."""
        return self._run.health.of(self.name)

    @property
    def status(self) -> str:
        """What it does or waits for, for people."""
        if self.state is State.CLOSED:
            return "a board that was lost" if self._attempts else "a board"
        if self.state is State.ASIDE:
            return f"{self.label} (put aside: {self._reason})" if self._reason else f"{self.label} (put aside)"
        return f"{self.label} ({self.state.value})"

    # --------------------------------------------------------------------------------------------- opening and closing

    def open(self, folder: Path) -> None:
        """Ask the tracker for a board; ``folder`` is for the link process's output."""
        if self.start_process(folder):
            self._connect()

    def abandon(self) -> None:
        """Forget the job. The session is closed, since its answer would come too late."""
        if self.job is not None:
            self.job.remove_files()
            self.job = None
            self.hang_up()

    def _connect(self) -> None:
        self.refused, self._reason = "", ""
        farm = self._run.farm
        self.ask(
            *(State.CONNECTING, _REQUEST_SECONDS + _CONNECT_SECONDS, Link.connect),
            tracker=farm.tracker,
            key=farm.key,
            timeout=_REQUEST_SECONDS,
        )

    # --------------------------------------------------------------------------------------------------------- answers

    def take_answer(self) -> None:
        """Go on with what the link has answered, or should have by now. Raises TuningError for this machine's fault."""
        process = self.process
        assert process is not None
        try:
            if self.state is State.STARTING:
                process.start()
                self._connect()
                return
            value = process.receive()
        except CandidateFailed as failure:
            self._request_failed(failure)
            return
        except Ended as ended:
            self.lose("board lost", str(ended))
            return
        self.heard = time.monotonic()
        try:
            if self.state not in (State.CONNECTING, State.UPLOADING):
                answer = answer_of(value)
                if answer.kind != "done":
                    self.name = self.name or answer.name
                    self._cannot_work("broken" if answer.kind == "broken" else "board lost", answer.value)
                    return
                value = answer.value
            # Each of these reads the whole answer before it does anything about it.
            self._transitions[self.state](value)
        except BadAnswer as bad:
            self._cannot_work("bad answer", f"bad answer: {bad}")

    def _request_failed(self, failure: CandidateFailed) -> None:
        if self.state is State.GREETING and "no function" in str(failure):
            # Held like others that are refused: the tracker would only give it again.
            self._refuse("it runs another server than gf-tvm farm serve")
        elif failure.status == "timeout":
            self.lose("timeout", f"{self.state.value} took too long")
        else:
            kind = "no board" if self.state is State.CONNECTING and "tracker" in str(failure) else "board lost"
            self.lose(kind, str(failure))

    def _after_connecting(self, address: str | None) -> None:
        run = self._run
        if address is None:
            self.state = State.CLOSED
            self.retry_at = time.monotonic() + _RETRIES[0]
            if not run.connected:
                run.health.trouble("", "no board")
                run.notes.append(f"no board with the key {run.farm.key!r} is free; still waiting")
            return
        self.address, self._greeted = address, False
        self.call(State.GREETING, _HELLO_SECONDS, Operation.HELLO, options=asdict(run.options))

    def _after_greeting(self, info: Any) -> None:
        self.name, versions = name_and_versions(info)
        self._attempts, self.reference_due, self._prepared = 0, 0, None
        complaint = other_versions(versions)
        if not complaint:  # else the rest may be told in another way
            greeting = greeting_of(info)
            complaint = why_unfit(greeting, self._run.emulated, self._run.arch)
            self._sends_checksums = greeting.checksums
        self._greeted = True
        if complaint:
            self._refuse(complaint)
        elif time.monotonic() < self.health.aside_until:
            self.state = State.ASIDE
        else:
            self.state = State.FREE

    def _after_preparing(self, seconds: Any) -> None:
        self._prepare_seconds = seconds_of(seconds, PREPARE_SECONDS)
        self._upload_next()

    def _after_uploading(self, checksum: str) -> None:
        self._checksums[self._sending] = checksum
        self._upload_next()

    def _after_resting(self, told: Any) -> None:
        run, health = self._run, self.health
        sensors = reading_of(told)
        if run.health.is_cool(sensors):
            health.hot_since = None
            self.state = State.FREE
            run.notes.append(f"{self.label} has cooled down")
        elif health.cooling_seconds() > 60 * run.farm.cool_minutes:
            health.hot_since = None
            self._put_aside(run.farm.aside_seconds, f"it did not cool down: {state_of(sensors)}")
        else:
            self._rest()

    def _rest(self) -> None:
        self.call(State.RESTING, _REST_SECONDS + _SENSE_SECONDS, Operation.REST, seconds=_REST_SECONDS)

    def _after_running(self, told: Any) -> None:
        job = self.job
        assert job is not None
        health = self.health
        sensors, results = results_of(told, None if job.candidate is not None or job.reference else job.files)
        self.job = None
        if self._run.health.is_hot(sensors):
            self._cool_down(job, sensors)
            return
        health.strikes = 0
        if job.reference:
            self._judge_speed(results[""])
            return
        self.reference_due -= 1
        self.state = State.FREE
        names = ("mhz", "celsius", "governor", *(("gpu_mhz", "gpu_celsius") if self._run.arch else ()))
        board = {"name": self.name, **{name: sensors.get(name) for name in names}}
        results = {name: replace(result, board=board) for name, result in results.items()}
        if job.candidate is None:
            self._run.jobs.compared = results
            return
        health.trials += 1
        self._run.jobs.finish(job, results[""])

    def _cool_down(self, job: Job, sensors: dict[str, Any]) -> None:
        """Repeat the trial, here or elsewhere, and let the board cool down."""
        run, health = self._run, self.health
        run.health.trouble(self.name, "throttled")
        health.strikes += 1
        run.jobs.put_back(job)
        if health.strikes >= STRIKES:
            self._put_aside(run.farm.aside_seconds, f"throttled {health.strikes} times: {state_of(sensors)}")
            return
        health.hot_since = time.monotonic()
        run.notes.append(f"{self.label} is {state_of(sensors)}; it cools down and the trial is repeated")
        self._rest()

    def _judge_speed(self, result: Result) -> None:
        """The reference kernel has run: is the board as fast as ever?"""
        run = self._run
        self.reference_due = _REFERENCE_TRIALS
        self.state = State.FREE
        if result.seconds is None:
            self._cannot_work("broken", f"the reference kernel fails there: {result.message}")
            return
        drift = run.health.drift(self.name, result.seconds)
        if drift is not None:
            run.health.trouble(self.name, "drift")
            reason = f"its reference kernel takes {100 * drift:.0f} % longer than usual"
            self._put_aside(run.farm.aside_seconds, reason)

    # ------------------------------------------------------------------------------------------------------------ work

    def give_work(self) -> None:
        """Give a free board the next job: the reference kernel if it is due, else the first that suits it."""
        reference = self._run.watched
        if reference is not None and self.reference_due <= 0:
            if reference.library is not None:  # else it is not built yet
                self._begin(Job(reference.task, {"candidate": reference.library}, None, reference=True))
            return
        job = self._run.jobs.take(self.name, self._run.others(self))
        if job is not None:
            self._begin(job)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`give_work` would find something."""
        reference = self._run.watched
        if reference is not None and self.reference_due <= 0:
            return reference.library is not None
        return self._run.jobs.next_for(self.name, self._run.others(self)) is not None

    def _begin(self, job: Job) -> None:
        self.job = job
        self._remaining = list(job.files.items())
        self._uploaded, self._checksums = {}, {}
        wanted = (job.task.identity.key, job.seed)
        # The reference kernel's small inputs are made when it runs, in a process of its own.
        if self._prepared == wanted or job.reference:
            self._upload_next()
            return
        self._prepared = wanted
        self.call(State.PREPARING, PREPARE_SECONDS, Operation.PREPARE, task=task_values(job.task), seed=job.seed)

    def _upload_next(self) -> None:
        """Upload the next file of the job; when there is none, run it."""
        job = self.job
        assert job is not None
        if not self._remaining:
            self._run_job(job)
            return
        name, path = self._remaining.pop(0)
        self._sent += 1
        self._sending = f"{self._sent}{job.task.suffix}"  # never a name twice: loaders know libraries by name
        self._uploaded[name] = self._sending
        self.ask(State.UPLOADING, _UPLOAD_SECONDS, Link.upload, path=path, name=self._sending)

    def _run_job(self, job: Job) -> None:
        options, task = self._run.options, task_values(job.task)
        # The board itself ends a candidate that takes too long and says so; this is for a board that does not.
        checked = {"checksums": self._checksums} if self._sends_checksums else {}
        once = 2 * self._prepare_seconds + 4 * options.run_timeout + 4 * options.max_seconds + COMPARE_SECONDS
        if job.candidate is None and not job.reference:
            rounds = options.rounds * len(job.files) * (options.run_timeout + 2 * options.max_seconds)
            timeout = len(job.files) * once + rounds
            self.call(
                State.RUNNING, timeout, Operation.COMPARE, task=task, files=self._uploaded, seed=job.seed, **checked
            )
        else:
            self.call(
                *(State.RUNNING, once, Operation.RUN),
                task=task,
                file=self._uploaded["candidate"],
                best=None if job.candidate is None else self._run.best(),
                reference=job.reference,
                **checked,
            )

    # -------------------------------------------------------------------------------------------------------- troubles

    def watch(self, last_sign: float | None) -> None:
        """Find out about a board that stopped in the midst of something, or while it has nothing to do.

        Args:
            last_sign: when its server last reported to the tracker; None if that is not known.
        """
        silent = 0.0 if last_sign is None else time.monotonic() - max(last_sign, self.heard)
        if self.state in HELD and self.state is not State.GREETING and silent > _SILENT_SECONDS:
            self.lose("board lost", f"it has not reported to the tracker for {_SILENT_SECONDS:.0f} s")
        elif self.state is State.ASIDE and self.process is not None:
            health = self.health
            if time.monotonic() >= health.aside_until:
                health.strikes = 0
                self.reference_due = 0
                self._run.notes.append(f"{self.label} is tried again")
                if self._greeted:
                    self.state = State.FREE
                else:  # a new session, if it is the session that could not answer
                    self.hang_up()
                    self.retry_at = time.monotonic()
        elif self.state is State.FREE and self.process is not None and self.process.connection.poll(0):
            self.lose("board lost", "its session ended")

    def lose(self, kind: str, reason: str) -> None:
        """The session is gone: close it, and ask the tracker again, later each time."""
        run, name, label = self._run, self.name, self.label
        run.health.trouble(name, kind)
        run.notes.append(f"{label}: {kind}: {reason}")
        self._give_back_job()
        self.hang_up()
        self.retry_at = time.monotonic() + _RETRIES[min(self._attempts, len(_RETRIES) - 1)]
        self._attempts += 1
        if name:
            health = run.health.of(name)
            health.strikes += 1
            if health.strikes >= STRIKES:
                health.aside_until = time.monotonic() + run.farm.aside_seconds
                run.notes.append(
                    f"{label} is put aside for {run.farm.aside_seconds:.0f} s: lost {health.strikes} times"
                )

    def _cannot_work(self, kind: str, reason: str) -> None:
        """The board answers, but cannot work."""
        self.name = self.label  # its address, until it has told its name
        self._run.health.trouble(self.name, kind)
        self._give_back_job()
        self._put_aside(self._run.farm.aside_seconds, reason)

    def _give_back_job(self) -> None:
        """The job of a board that is lost goes to another one."""
        job, self.job = self.job, None
        if job is not None and (given_up := self._run.jobs.lost(job, self.label)):
            self._run.notes.append(given_up)

    def _refuse(self, reason: str) -> None:
        """This run cannot use the board."""
        self.name = self.label
        self._run.health.trouble(self.name, "refused")
        self.refused = reason
        self._put_aside(math.inf, reason)

    def _put_aside(self, seconds: float, reason: str) -> None:
        """Hold the board without work: the tracker would only give it again."""
        self.health.aside_until = time.monotonic() + seconds
        self.state = State.ASIDE
        self._prepared, self._reason = None, reason
        length = f"for {seconds:.0f} s" if math.isfinite(seconds) else "for this run"
        self._run.notes.append(f"{self.label} is put aside {length}: {reason}")
