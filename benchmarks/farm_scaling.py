"""Trials a minute with 1, 2, 4 and 8 boards: does the tuner keep them all busy?

The boards are stand-ins whose trials take a known time (--seconds) and no computing, so any number of them fits on one
machine. Everything else is real: tracker, servers, sessions, uploads, and the loop that `gf-tvm tune --tracker` runs.
The library is built before; what the builder could deliver is measured by itself and stands beside the result.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _bench import SMALL, Tracker, conditions, keep, new_parser, say, show, spread
from _stand_in import KEY

from gf_tvm.machine.cpu import usable_cores
from gf_tvm.tuning.measuring.farm_measurer import FarmMeasurer
from gf_tvm.tuning.measuring.measurer import Builders, Measurer
from gf_tvm.tuning.measuring.options import FarmOptions, MeasureOptions
from gf_tvm.tuning.measuring.process import TICK, CandidateFailed
from gf_tvm.tuning.task import Candidate, Task, WorkloadTask

COUNTS = (1, 2, 4, 8)
TASK = WorkloadTask(SMALL, "rpi4")


class CopyingBuilders(Builders):
    """Answers every request to build at once, with a copy of the same library."""

    def __init__(self, library: Path, folder: Path) -> None:
        super().__init__(0, folder)
        self._library = library
        self._answers: deque[Hashable] = deque()

    def submit(
        self,
        key: Hashable,
        task: Task,
        request: Callable[..., Any],
        timeout: float,
        first: bool = False,
        /,
        **arguments: Any,
    ) -> None:
        shutil.copyfile(self._library, arguments["path"])
        self._answers.append(key)

    @property
    def pending(self) -> int:
        return len(self._answers)

    @property
    def seconds_left(self) -> float:
        return 0.0 if self._answers else TICK

    def collect(self) -> list[tuple[Hashable, Any, CandidateFailed | None]]:
        found = [(key, None, None) for key in self._answers]
        self._answers.clear()
        return list(found)

    def drop(self) -> None:
        self._answers.clear()


class Farm(FarmMeasurer):
    """The tuner's measurer without its builders."""

    def __init__(self, options: MeasureOptions, farm: FarmOptions, library: Path) -> None:
        super().__init__(options, farm, "stand-in")
        self._library = library

    def __enter__(self) -> Farm:
        super().__enter__()
        self._builders = CopyingBuilders(self._library, self._scratch.folder)
        return self

    def trials(self, least: int, of_each: int = 0) -> tuple[int, float]:
        """Measure until there are ``least`` trials, and ``of_each`` of every board. Returns how many, and seconds."""
        proposed = done = 0
        before = self.trials_by_board

        def source(room: int) -> Sequence[Candidate]:
            nonlocal proposed
            counts = [trials - before.get(name, 0) for name, trials in self.trials_by_board.items()]
            complete = len(counts) >= len(self._tracker.listed) and min(counts, default=0) >= of_each
            count = room if not complete else max(0, min(room, least - proposed))
            proposed += count
            return [Candidate("ours", f"{proposed}-{number}", {}) for number in range(count)]

        begun = time.monotonic()
        for _, result in self.measure(TASK, source, lambda: None, lambda: False, _note):
            if result is None or result.status != "ok":
                raise RuntimeError(f"a stand-in failed: {result}")
            done += 1
        return done, time.monotonic() - begun


def _note(kind: str, line: str) -> None:
    if kind == "note":
        say(line)


@contextlib.contextmanager
def stand_ins(count: int, seconds: float) -> Iterator[Tracker]:
    """A tracker and so many stand-ins."""
    with Tracker() as tracker, contextlib.ExitStack() as stack:
        for number in range(count):
            address = f"{tracker.address[0]}:{tracker.address[1]}"
            command = [sys.executable, str(Path(__file__).with_name("_stand_in.py")), address, f"stand-in-{number + 1}"]
            process = subprocess.Popen([*command, str(seconds)], stdin=subprocess.PIPE)
            stack.callback(process.wait)
            assert process.stdin is not None
            stack.callback(process.stdin.close)
        tracker.wait_for(count)
        yield tracker


def measure(count: int, seconds: float, each: int, library: Path) -> float:
    """Trials a minute with so many boards, from the moment on at which all are at work."""
    with stand_ins(count, seconds) as tracker:
        farm = FarmOptions(tracker.address, KEY, drift=None)
        with Farm(MeasureOptions(builders=usable_cores()), farm, library) as measurer:
            measurer.trials(0, of_each=1)
            done, took = measurer.trials(each * count)
            return 60 * done / took


def build(count: int, library: Path) -> float:
    """Real candidates a minute that this machine builds for rpi4 with all its cores; leaves one at ``library``."""
    import random

    rng = random.Random(0)
    cores = usable_cores()
    found = {candidate.id: candidate for candidate in (Candidate.of_config(TASK.space.sample(rng)) for _ in range(999))}
    candidates = list(found.values())[: cores + count]
    with Measurer(MeasureOptions(builders=cores)) as measurer:
        for part in (candidates[:cores], candidates[cores:]):  # the first ones start the processes
            begun = time.monotonic()
            for _, path, failure in measurer.build(TASK, part):
                if path is None:
                    raise RuntimeError(f"a candidate does not build: {failure}")
                shutil.move(path, library)
        return 60 * (len(candidates) - cores) / (time.monotonic() - begun)


def draw(rates: dict[int, dict[str, Any]], seconds: float, path: Path) -> None:
    """The measured rates beside those of boards that never wait."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    counts = list(rates)
    axes.plot(counts, [60 / seconds * count for count in counts], color="0.7", label="never waiting")
    medians = [rates[count]["median"] for count in counts]
    errors = [
        [rates[n]["median"] - rates[n]["low"] for n in counts],
        [rates[n]["high"] - rates[n]["median"] for n in counts],
    ]
    axes.errorbar(counts, medians, yerr=errors, marker="o", color="#0072B2", label="measured")
    axes.set_xlabel(f"boards whose trials take {seconds:g} s")
    axes.set_ylabel("trials a minute")
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a trial takes (default: 1)")
    parser.add_argument("--each", type=int, default=15, help="trials of each board (default: 15)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a picture")
    args = parser.parse_args()
    where = conditions()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        builder = build(16, library)
        say(f"the builder delivers {builder:.1f} a minute")
        rates: dict[int, list[float]] = {count: [] for count in COUNTS}
        for number in range(args.rounds):
            for count in COUNTS:
                rates[count].append(measure(count, args.seconds, args.each, library))
                say(f"round {number + 1}, boards: {count}, trials a minute: {rates[count][-1]:.1f}")
    figures = {count: spread(values) for count, values in rates.items()}
    one = figures[1]["median"]
    found = {
        "what": "trials a minute of FarmMeasurer.measure() with stand-in boards; building taken out",
        "conditions": where,
        "seconds_per_trial": args.seconds,
        "trials_of_each_board": args.each,
        "builder": {
            "a_minute": round(builder, 1),
            "candidates": 16,
            "processes": usable_cores(),
            "workload": SMALL.key,
        },
        "boards": {
            str(count): {**figures[count], "of_linear": round(figures[count]["median"] / (count * one), 3)}
            for count in COUNTS
        },
    }
    rows = [
        [n, show(figures[n]), f"{figures[n]['median'] / one:.2f}", f"{figures[n]['median'] / one / n:.3f}"]
        for n in COUNTS
    ]
    keep(found, ["boards", "trials a minute: median (range)", "of one board's", "of linear"], rows, args.json)
    print(f"a trial takes {args.seconds:g} s; the builder, not included, delivers {builder:.1f} candidates a minute")
    if args.plot is not None:
        draw(figures, args.seconds, args.plot)


if __name__ == "__main__":
    main()
