"""The tuning loop: propose, build, measure, log, learn, and at the end compare the best with each other."""

from __future__ import annotations

import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, LogError
from .log import SPACES, LogFolder, LogWriter, Record, best_record, trials_of
from .log import seeds as find_seeds
from .measuring.measurer import Measurer
from .measuring.options import MeasureOptions
from .measuring.result import Result
from .options import SearchOptions
from .search import ConfigSearch, MetaScheduleSearch, Search
from .task import Candidate, Config, Task, TuningError, WorkloadTask

if TYPE_CHECKING:
    from ..core.workload import Workload
    from ..machine.gpu import GpuInfo
    from ..machine.profiles import DeviceProfile
    from .measuring.options import FarmOptions

#: Of what ``gf-tvm tune --json`` writes; another number where a reader would misunderstand it.
SCHEMA = "gf_tvm.tune/1"

# An improvement by less is noise and does not put early stopping off.
_IMPROVEMENT = 0.01
# Seconds that the final comparison gets, however little time is left: without it the trials have no winner.
_LEAST_COMPARE = 60.0
# Configurations of other logs that are tried first, per workload.
_SEEDS = 8


@dataclass(frozen=True)
class Event:
    """Something to show while tuning.

    Args:
        kind: "start" (of a workload), "note" (see ``message``), "build" (a candidate was built), "trial" (one was
            measured), "compare" (a round of the final comparison), "done" (with a workload).
        workload: key.
        index, count: this is workload ``index`` (from 1) of ``count``.
        trial, trials: trials that the log has, and that were asked for.
        status: of a trial, see :data:`~gf_tvm.tuning.log.STATUSES`.
        seconds: of a trial: median time of one call.
        best, default: median time of one call of the best and of the default schedule so far; when "done", those
            of the final comparison.
        left: seconds until all workloads are done, estimated; None if unknown.
        rate: trials a minute of this run, all workloads together; None before the first.
        boards: with a farm: how many boards are at work, and how many there are.
        message: one line of text.
    """

    kind: str
    workload: str
    index: int
    count: int
    trial: int = 0
    trials: int = 0
    status: str = ""
    seconds: float | None = None
    best: float | None = None
    default: float | None = None
    left: float | None = None
    rate: float | None = None
    boards: tuple[int, int] | None = None
    message: str = ""


EventCallback = Callable[[Event], None]


@dataclass(frozen=True)
class TaskSummary:
    """What came of tuning one workload.

    Args:
        workload: key.
        log: the file.
        measured: trials made by this run.
        trials: trials in the log, of all runs, with this run's kind of space.
        failed: those that did not end well.
        stopped: "trials", "time", "early stop" or "exhausted" (nothing left to try).
        space, config: what won ("metaschedule" has a trace in place of a config); None if no trial ended well.
        seconds, default_seconds: median time of one call in the final comparison.
        confirmed: the winner went through the final comparison.
        trial_seconds: of each of ``trials``, in their order, the median time of one call; None where it failed.
    """

    workload: str
    log: str
    measured: int
    trials: int
    failed: int
    stopped: str
    space: str | None
    config: Config | None
    seconds: float | None
    default_seconds: float | None
    confirmed: bool
    trial_seconds: tuple[float | None, ...]


@dataclass(frozen=True)
class Summary:
    """What came of a tuning run. ``seconds`` is its duration; ``farm`` tells what became of a farm's boards."""

    device: str
    logs: str
    seconds: float
    made: dict[str, Any]
    tasks: tuple[TaskSummary, ...]
    farm: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def tune(
    workloads: Iterable[Workload],
    device: str = "host",
    *,
    logs: str | os.PathLike[str] = "tuning_logs",
    trials: int = 64,
    minutes: float | None = None,
    early_stop: int | None = None,
    space: str = "ours",
    threads: int | None = None,
    cold: bool = False,
    seed: int = 0,
    seed_logs: Sequence[str | os.PathLike[str]] = (),
    farm: FarmOptions | None = None,
    progress: EventCallback | None = None,
) -> Summary:
    """Find fast schedules for workloads on this machine or on a farm of boards, and log every trial.

    A log that is already there is continued: its trials count, are not measured again, and teach the cost model.

    Args:
        workloads: what to tune, in this order.
        device: name of a device profile; without a farm one that this machine runs, "host" for its CPU and "cuda" for
            its GPU.
        logs: folder of logs; the trials go to ``logs/<device>/<workload key>.jsonl``.
        trials: trials per workload that the log shall have in the end.
        minutes: end after this time, divided evenly between the workloads that are left. The final comparison of a
            workload may take a minute longer; if it is not done then, the fastest trial stays unconfirmed.
        early_stop: end with a workload after so many trials without an improvement by 1 %.
        space: "ours" (:mod:`gf_tvm.schedules`) or "metaschedule" (its own rules on the same definition).
        threads: threads of the kernels; default: as many as PyTorch uses, or the device profile's for a farm. None for
            a GPU.
        cold: measure with the arguments out of the caches.
        seed: of the search.
        seed_logs: other folders of logs of this device; their fastest configurations are measured first.
        farm: where the boards are; None measures on this machine.
        progress: called with every :class:`Event`.

    Returns:
        What came of it. Ctrl-C raises KeyboardInterrupt as usual; every finished trial is in the log then.

    Raises:
        DeviceError: unknown device, or without a farm not this machine.
        FarmError: no tracker there, or no board with the key.
        LogError: a log that does not fit, is damaged, cannot be written, or is being written by another process.
        TuningError: a bad option, or a machine that cannot build (for GPUs: no NVRTC) or measure, or no board for too
            long.
    """
    from ..machine.cpu import usable_cores
    from ..machine.profiles import get_profile

    profile = get_profile(device)
    gpu = None
    if profile.gpu is not None:
        if threads is not None:
            raise TuningError(f"threads are those of kernels on CPUs; leave them out for {profile.name}, a GPU")
        if space != "ours":
            raise TuningError(f"space {space!r} is for CPUs; {profile.name} is a GPU, whose space is 'ours'")
        threads = 1
    if farm is None:
        gpu = _find_device(profile)
        import torch

        threads = torch.get_num_threads() if threads is None else threads
    elif threads is None:
        threads = profile.threads or 1
    workloads = list(dict.fromkeys(workloads))
    tasks = [WorkloadTask(workload, profile.name) for workload in workloads]
    options = MeasureOptions(threads=threads, builders=usable_cores(), cold=cold)
    if farm is None:
        measurer = Measurer(options, gpu)
    else:
        from .measuring.farm_measurer import FarmMeasurer
        from .measuring.reference import reference_task

        arch = "" if profile.gpu is None else profile.gpu.arch
        measurer = FarmMeasurer(options, farm, profile.description, reference_task(profile.name), arch)
    search = SearchOptions(trials, minutes, early_stop, space, seed, seed_logs)
    return tune_tasks(tasks, search, logs=logs, options=options, measurer=measurer, progress=progress)


def _find_device(profile: DeviceProfile) -> GpuInfo | None:
    """Whether this machine is, or has, the device; tells what its GPU is. Raises DeviceError."""
    from ..machine.profiles import missing_flags, runs_here

    # Of a board with a GPU only the GPU matters here: any machine can measure what its own GPU runs.
    if profile.gpu is not None:
        from ..machine.gpu import check_gpu

        try:
            return check_gpu(profile.gpu.arch)
        except DeviceError as error:
            reason = str(error)
    elif runs_here(profile):
        return None
    else:
        lacking = missing_flags(profile)
        reason = f"it lacks {', '.join(lacking)}" if lacking else f"it is not an {profile.arch} machine"
    raise DeviceError(
        f"device {profile.name!r} cannot be measured on this machine: {reason}; "
        "boards are measured through a tracker (--tracker HOST:PORT --key KEY)"
    )


def tune_tasks(
    tasks: Sequence[Task],
    search: SearchOptions,
    *,
    logs: str | os.PathLike[str],
    options: MeasureOptions,
    measurer: Measurer | None = None,
    progress: EventCallback | None = None,
) -> Summary:
    """:func:`tune` for any tasks of one device.

    Args:
        tasks: what to tune, in this order.
        search: how much to search, where, and when to stop.
        logs: folder of logs.
        options: how to measure.
        measurer: what measures; default: this machine.
        progress: called with every :class:`Event`.

    Returns:
        What came of it; see :func:`tune`.

    Raises:
        FarmError, LogError, TuningError: as :func:`tune`.
    """
    search.check(options.threads)
    if not tasks:
        raise TuningError("nothing to tune: no workloads were given")
    started = time.monotonic()
    device = tasks[0].identity.device
    compiler = _cuda_compiler() if tasks[0].gpu else {}
    with LogFolder(logs, device) as folder, measurer or Measurer(options) as measurer:
        made = {**provenance(), **compiler, **measurer.made}
        # All logs are looked at before the first trial: one that does not fit is found now and not in an hour.
        found = [folder.peek(task.identity, made) for task in tasks]
        missing = [max(0, search.trials - len(trials_of(log.records if log else [], search.space))) for log in found]
        end = None if search.minutes is None else started + 60 * search.minutes
        say = progress or (lambda event: None)
        state = _RunState(measurer, search, say, missing, end)
        summaries = []
        for index, task in enumerate(tasks):
            with folder.open(task.identity, made) as log:
                # The time that is left belongs in equal parts to the workloads that have trials to make.
                waiting = 1 + sum(bool(n) for n in missing[index + 1 :])
                now = time.monotonic()
                summaries.append(TaskRun(state, task, log, index, end and now + (end - now) / waiting).run())
        report = measurer.report
    return Summary(device, str(Path(logs)), time.monotonic() - started, made, tuple(summaries), report)


def _cuda_compiler() -> dict[str, Any]:
    """With what this machine compiles for GPUs, for the header of a log. Raises TuningError if it cannot."""
    from gf_cuda import NoCompilerError, nvrtc

    try:
        return {"cuda": ".".join(map(str, nvrtc.version()))}
    except NoCompilerError as error:
        raise TuningError(f"this machine cannot compile for GPUs: {error}") from None


def provenance() -> dict[str, Any]:
    """With what this process builds, as the header of a log tells it; the measurer adds where it measures."""
    from tvm.target import codegen

    from .._version import __version__

    return {
        "gf_tvm": __version__,
        "tvm": metadata.version("apache-tvm"),
        "tvm_ffi": metadata.version("apache-tvm-ffi"),
        "llvm": int(codegen.llvm_version_major()),
        "python": platform.python_version(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass
class _RunState:
    """What all workloads of a run share, and how far it is."""

    measurer: Measurer
    search: SearchOptions
    progress: EventCallback
    missing: list[int]  # trials to make, of each workload
    end: float | None  # on the monotonic clock
    spent: float = 0.0
    measured: int = 0

    @property
    def seconds_per_trial(self) -> float:
        """Building, measuring and proposing together; a guess before the first."""
        return self.spent / self.measured if self.measured else 2.0


class TaskRun:
    """Tuning of one workload, from what its log has to a confirmed winner."""

    def __init__(self, state: _RunState, task: Task, log: LogWriter, index: int, end: float | None) -> None:
        self.state = state
        self.options = state.search
        self.task = task
        self.log = log
        self.index = index
        self.end = end  # of this workload, on the monotonic clock
        self.trials = trials_of(log.records, self.options.space)
        self.measured = 0
        self.default = Candidate.of_config(task.space.default)  # of ours; a search of MetaSchedule's has none
        self.search: Search | None = None

    def run(self) -> TaskSummary:
        """Make the trials that are missing, then compare the best."""
        self._say("start")
        if self.log.recovered:
            self._say("note", message=f"{self.log.path}: its last line was cut off in writing and is dropped")
        if self.trials:
            self._say("note", message=f"continued: {len(self.trials)} trials are known")
        stopped = self._reason_to_stop() or self._search_and_measure()
        if stopped == "exhausted":
            self._say("note", message=f"the space is exhausted after {len(self.trials)} trials")
        self.state.missing[self.index] = 0
        self.confirm()
        self._say("done")
        return self._summary(stopped)

    # ----------------------------------------------------------------------------------------------------- when to stop

    def _reason_to_stop(self) -> str:
        if len(self.trials) >= self.options.trials:
            return "trials"
        if self.end is not None and self._time_left() <= 0:
            return "time"
        if self.options.early_stop is not None and self._trials_since_improvement() >= self.options.early_stop:
            return "early stop"
        return ""

    def _time_left(self) -> float:
        """Seconds for further trials: what is left but for the final comparison."""
        if self.end is None:
            return math.inf
        final = self.state.seconds_per_trial * (self.state.measurer.options.final + 1)
        return self.end - time.monotonic() - final

    def _batch_size(self) -> int:
        affordable = self._time_left() / self.state.seconds_per_trial
        # A small one first: there is something to show soon, and the time that a trial takes is known.
        batch = self.options.batch_size
        if not self.trials:
            batch = min(batch, 2 * self.state.measurer.parallel)
        return max(1, int(min(batch, self.options.trials - len(self.trials), affordable)))

    def _trials_since_improvement(self) -> int:
        best, since = math.inf, 0
        for record in self.trials:
            since += 1
            if record.seconds is not None and record.seconds < best * (1 - _IMPROVEMENT):
                best, since = record.seconds, 0
        return since

    # ---------------------------------------------------------------------------------------------------------- trials

    def _get_search(self) -> Search:
        """The search, made when it turns out to be needed: it has to replay what the log knows."""
        if self.search is None:
            state = self.state
            # Another seed in each run, so that a continued search does not propose what the first one has.
            seed = zlib.crc32(f"{self.options.seed} {self.task.identity.key} {len(self.log.records)}".encode())
            if self.options.space == "ours":
                self.search = ConfigSearch(self.task, seed)
            else:
                threads = state.measurer.options.threads
                self.search = MetaScheduleSearch(self.task, threads, seed, self.options.batch_size)
            if self.options.seed_logs:
                configs, reasons = find_seeds(self.task.identity, self.task.space, self.options.seed_logs, _SEEDS)
                self.search.suggest(configs)
                for reason in reasons:
                    self._say("note", message=reason)
            try:
                self.search.resume(self.trials)
            except ValueError as error:
                raise LogError(f"{self.log.path}: cannot be continued: {error}") from None
        return self.search

    def _search_and_measure(self) -> str:
        """Measure what the search proposes until there is a reason to stop, which is returned."""
        state = self.state
        out: dict[str, Candidate] = {}  # proposed and not yet measured
        measured: list[tuple[Candidate, Result]] = []  # and not yet learned
        given_up = 0
        exhausted = False

        def source(count: int) -> list[Candidate]:
            nonlocal exhausted
            count = min(count, self._batch_size(), self.options.trials - len(self.trials) - len(out))
            if count < 1 or self._reason_to_stop():
                return []
            search = self._get_search()
            self._learn(search, measured)
            candidates = search.propose(count)
            exhausted = not candidates
            out.update((candidate.id, candidate) for candidate in candidates)
            return candidates

        begun = time.monotonic()

        def over() -> bool:
            return self._time_left() <= 0

        def say(kind: str, line: str) -> None:
            self._say(kind, message=line)

        results = state.measurer.measure(self.task, source, self._best_seconds, over, say)
        try:
            for candidate, result in results:
                del out[candidate.id]
                now = time.monotonic()
                state.spent += now - begun
                begun = now
                if result is None:
                    given_up += 1
                    continue
                state.measured += 1
                measured.append((candidate, result))
                self._log_trial(candidate, result)
        finally:
            results.close()
        if given_up:
            self._say("note", message=f"{given_up} candidates were given up: boards were lost with them")
        return self._reason_to_stop() or ("exhausted" if exhausted else "boards")

    def _learn(self, search: Search, measured: list[tuple[Candidate, Result]]) -> None:
        """Give the search what was measured since it was asked last."""
        complaint = search.complaint
        if measured:
            candidates, results = zip(*measured, strict=True)
            measured.clear()
            search.learn(candidates, results)
        if search.complaint != complaint:
            self._say("note", message=search.complaint)

    def _log_trial(self, candidate: Candidate, result: Result) -> None:
        if candidate.id == self.default.id and result.status in ("build", "run"):
            # The schedule that runs untuned: if even that does not, the machine cannot build or load at all.
            raise TuningError(f"{self.task.identity.key}: its default schedule fails {result.message}")
        record = _record("trial", candidate, result)
        self.log.append(record)
        self.trials.append(record)
        self.measured += 1
        self.state.missing[self.index] = max(0, self.options.trials - len(self.trials))
        self._say("trial", status=result.status, seconds=result.seconds, message=result.message)

    # -------------------------------------------------------------------------------------------- the final comparison

    def confirm(self) -> None:
        """Check the fastest trials on other inputs and measure them and the default in turns; log who wins."""
        kinds = [record.kind for record in reversed(self.log.records)]
        if "trial" not in kinds or ("winner" in kinds and kinds.index("winner") < kinds.index("trial")):
            return
        deadline = math.inf if self.end is None else max(self.end, time.monotonic() + _LEAST_COMPARE)
        while entries := self._finalists():
            results = self._compare(entries, deadline)
            if results is None:
                self._say("note", message="the fastest trial is not confirmed; the same command compares the best")
                return
            for name, candidate in entries.items():
                if results[name].status != "ok":
                    self.log.append(_record("rejected", candidate, results[name]))
                    self._say("note", message=f"{candidate.id} is rejected: {results[name].message}")
            self.trials = trials_of(self.log.records, self.options.space)
            good = {name: result.seconds for name, result in results.items() if result.seconds is not None}
            if good:
                winner = min(good, key=lambda name: good[name])
                default = good.get(_name(self.default))
                self.log.append(replace(_record("winner", entries[winner], results[winner]), default_seconds=default))
                return

    def _finalists(self) -> dict[str, Candidate]:
        """The fastest trials that were not rejected, of all spaces, and the default if it ran."""
        good = [r for space in SPACES for r in trials_of(self.log.records, space) if r.seconds is not None]
        good.sort(key=lambda record: record.seconds or math.inf)
        count = self.state.measurer.options.final
        chosen = [r for i, r in enumerate(good) if i < count or r.id == self.default.id]
        return {_name(candidate): candidate for candidate in map(Candidate.of_record, chosen)}

    def _compare(self, entries: dict[str, Candidate], deadline: float) -> dict[str, Result] | None:
        """Build and compare; None if there was no time. ``deadline`` is on the monotonic clock."""

        def over() -> bool:
            return time.monotonic() > deadline

        def say(kind: str, line: str) -> None:
            self._say(kind, message=line)

        measurer = self.state.measurer
        libraries: dict[str, Path] = {}
        results: dict[str, Result] = {}
        try:
            for candidate, library, failure in measurer.build(self.task, list(entries.values())):
                if library is not None:
                    libraries[_name(candidate)] = library
                elif failure is not None:
                    results[_name(candidate)] = failure
                if over():
                    return None
            # Inputs that no trial has seen; trials use seed 0.
            compared = measurer.compare(self.task, libraries, len(self.log.records), over, say)
        finally:
            for library in libraries.values():
                measurer.discard(library)
        return None if compared is None else {**results, **compared}

    # -------------------------------------------------------------------------------------------------------- reporting

    def _best_seconds(self) -> float | None:
        return min((record.seconds for record in self.trials if record.seconds is not None), default=None)

    def _default_seconds(self) -> float | None:
        return next((r.seconds for r in self.log.records if r.kind == "trial" and r.id == self.default.id), None)

    def _say(self, kind: str, status: str = "", seconds: float | None = None, message: str = "") -> None:
        state = self.state
        wanted = self.options.trials
        best, default = self._best_seconds(), self._default_seconds()
        if kind == "done" and (record := best_record(self.log.records)) is not None and record.confirmed:
            best, default = record.seconds, record.default_seconds
        left = sum(state.missing) * state.seconds_per_trial
        state.progress(
            Event(
                *(kind, self.task.identity.key, self.index + 1, len(state.missing), len(self.trials), wanted),
                *(status, seconds, best, default),
                left=left if state.end is None else max(0.0, min(left, state.end - time.monotonic())),
                rate=60 * state.measured / state.spent if state.measured else None,
                boards=state.measurer.boards,
                message=message,
            )
        )

    def _summary(self, stopped: str) -> TaskSummary:
        best = best_record(self.log.records)
        return TaskSummary(
            workload=self.task.identity.key,
            log=str(self.log.path),
            measured=self.measured,
            trials=len(self.trials),
            failed=sum(record.status != "ok" for record in self.trials),
            stopped=stopped,
            space=best.space if best else None,
            config=best.config if best else None,
            seconds=best.seconds if best else None,
            default_seconds=best.default_seconds if best else None,
            confirmed=best.confirmed if best else False,
            trial_seconds=tuple(record.seconds for record in self.trials),
        )


def _name(candidate: Candidate) -> str:
    """Tells candidates of all spaces apart."""
    return f"{candidate.space} {candidate.id}"


def _record(kind: str, candidate: Candidate, result: Result) -> Record:
    return Record(
        *(kind, candidate.space, candidate.id, result.status, candidate.config, candidate.trace),
        *(result.seconds, result.runs, result.excess, result.message),
        board=result.board,
    )
