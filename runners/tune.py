"""gf-tvm tune: search for fast schedules, on this machine or on a farm of boards."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._building import check_logs
from ._cases import add_case_arguments, add_chain_argument, workloads_from
from ._output import ProgressBar, check_writable, format_table, write_json
from ._signals import interrupted_from_outside
from .farm._arguments import add_tracker_arguments, environment_tracker, tracker_address

if TYPE_CHECKING:
    from ..core.workload import Workload
    from ..tuning import Event, Summary
    from ..tuning.measuring.options import FarmOptions


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="search for fast schedules",
        description="Search for fast schedules for kernels of some convolutions, on this machine or, with --tracker, "
        "on a farm of boards. Every trial is logged; the same command continues where the last one ended, and "
        "Ctrl-C keeps all finished trials.",
    )
    add_case_arguments(parser)
    add_chain_argument(
        parser,
        "with --model: tune only the kernels that convolutions call one by one, for gf-tvm train --no-chain (default: "
        "also those of chains)",
    )
    parser.add_argument("--kernels", metavar="K,...", help="only these of the kernels that training calls")
    search = parser.add_argument_group("search")
    search.add_argument("--trials", type=int, default=64, metavar="T", help="total trials per kernel (default: 64)")
    search.add_argument("--minutes", type=float, metavar="M", help="end after this time, shared among the kernels")
    search.add_argument(
        "--early-stop", type=int, metavar="N", help="end with a kernel after N trials without an improvement"
    )
    search.add_argument(
        "--space",
        choices=("ours", "metaschedule"),
        default="ours",
        help="the schedules to choose from: gf_tvm's, or those of MetaSchedule's own rules (default: ours)",
    )
    search.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default: 0)")
    search.add_argument(
        "--seed-logs",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="other folders of logs, whose fastest schedules are tried first; may be given more than once",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of kernels on CPUs (default: as many as PyTorch takes, or the board has)",
    )
    parser.add_argument("--cold", action="store_true", help="measure with cold caches (default: warm)")
    farm = parser.add_argument_group("farm")
    add_tracker_arguments(farm, required=False)
    farm.add_argument("--boards", type=int, metavar="N", help="use at most N boards at once (default: all)")
    farm.add_argument(
        "--drift",
        type=float,
        default=0.2,
        metavar="X",
        help="set a board aside whose reference kernel is slower than usual by the fraction X; 0: never (default: 0.2)",
    )
    farm.add_argument(
        "--hot", type=float, default=80.0, metavar="C", help="let boards cool down from C degrees on (default: 80)"
    )
    farm.add_argument(
        "--patience",
        type=float,
        default=30.0,
        metavar="M",
        help="end after M minutes in which no board measured anything (default: 30)",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("tuning_logs"),
        metavar="DIR",
        help="folder of tuning logs; trials go to DIR/<device> (default: tuning_logs)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found as JSON")
    parser.add_argument(
        "--json-events", type=Path, metavar="FILE", help="also write what happens, when it happens, as lines of JSON"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for path in (args.json, args.json_events):
        if path is not None:
            check_writable(path)
    farm = _farm_options(args)
    check_logs(args.seed_logs)
    from ..tuning import tune

    workloads = _pick_kernels(workloads_from(args), args.kernels)
    display = _Display({workload.key: workload for workload in workloads})
    events = None if args.json_events is None else open(args.json_events, "a", encoding="utf-8")  # noqa: SIM115

    def show(event: Event) -> None:
        if events is not None:
            print(json.dumps({"time": time.time(), **asdict(event)}), file=events, flush=True)
        display.show(event)

    try:
        with interrupted_from_outside():
            summary = tune(
                workloads,
                args.device,
                logs=args.logs,
                trials=args.trials,
                minutes=args.minutes,
                early_stop=args.early_stop,
                space=args.space,
                threads=args.threads,
                cold=args.cold,
                seed=args.seed,
                seed_logs=args.seed_logs,
                farm=farm,
                progress=show,
            )
    except KeyboardInterrupt:
        display.close()
        print(f"all finished trials are kept in {args.logs}; the same command continues", file=sys.stderr)
        raise
    finally:
        display.close()
        if events is not None:
            events.close()
    if args.json is not None:
        write_json(args.json, summary.to_dict())
    _print(summary, workloads)
    return 0


def _farm_options(args: argparse.Namespace) -> FarmOptions | None:
    """The farm that the options name; None without a tracker. Raises FarmError."""
    # The environment may name a tracker for other commands' sake: this machine is still this machine.
    here = args.device in ("host", "cuda")
    if args.tracker is None or (here and args.tracker == environment_tracker()):
        return None
    from ..errors import FarmError
    from ..tuning.measuring.options import FarmOptions

    if args.key is None:
        raise FarmError("--tracker needs --key KEY, the kind of board; gf-tvm farm status lists the keys")
    if here:
        raise FarmError("--tracker needs --device, what the boards are, such as rpi4; gf-tvm devices lists them")
    return FarmOptions(
        tracker=tracker_address(args),
        key=args.key,
        boards=args.boards,
        hot_celsius=args.hot,
        drift=args.drift or None,
        patience_minutes=args.patience,
    )


def _pick_kernels(workloads: list[Workload], text: str | None) -> list[Workload]:
    """The workloads whose kernels ``text`` lists. Raises TuningError."""
    if text is None:
        return workloads
    from ..tuning import TuningError

    known = list(dict.fromkeys(workload.kernel for workload in workloads))
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise TuningError(f"no kernel {name!r} to tune for these convolutions; kernels: {', '.join(known)}")
    return [workload for workload in workloads if workload.kernel in names]


class _Display:
    """Shows events: a bar of trials for each workload, with the best so far and the time left for all."""

    def __init__(self, workloads: dict[str, Workload]) -> None:
        self._workloads = workloads
        self._bar: ProgressBar | None = None
        self._failed = 0

    def show(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "start":
            self.close()
            self._failed = 0
            label = f"[{event.index}/{event.count}] {_label(self._workloads[event.workload])}"
            self._bar = ProgressBar(event.trials, label, unit="trial", initial=min(event.trial, event.trials))
        if self._bar is None:
            return
        if event.kind == "note":
            self._bar.write(f"{self._bar.label}: {event.message}")
        elif event.kind == "done":
            self._bar.write(f"{self._bar.label}: {_outcome(event)}")
            self.close()
        else:
            self._failed += event.status not in ("", "ok")
            self._bar.update(min(event.trial, event.trials), self._note(event))

    def _note(self, event: Event) -> str:
        parts = [_outcome(event)]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if event.boards is not None:
            parts.append(f"{event.boards[0]} of {event.boards[1]} boards busy")
        if event.kind in ("build", "compare"):
            parts.append(event.message)
        if event.rate is not None:
            parts.append(f"{event.rate:.3g} trials/min")
        if event.left is not None and event.count > 1:
            parts.append(f"all done in {_duration(event.left)}")
        return ", ".join(parts)

    def close(self) -> None:
        """End the present bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _label(workload: Workload) -> str:
    geometry = workload.geometry
    size = f"{geometry.n}x{geometry.ci}x{geometry.h}x{geometry.w}"
    return f"{workload.kernel} {size} to {geometry.co} R{geometry.patch[0]}x{geometry.patch[1]}"


def _outcome(event: Event) -> str:
    if event.best is None:
        return "no result yet" if event.kind != "done" else "no trial ended well"
    text = f"best {_time(event.best)}"
    return text if event.default is None else f"{text}, default {_time(event.default)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _print(summary: Summary, workloads: list[Workload]) -> None:
    rows = []
    for workload, task in zip(workloads, summary.tasks, strict=True):
        best, default = task.seconds, task.default_seconds
        rows.append(
            (
                *(workload.kernel, workload.geometry.key, workload.dtype, task.trials, task.failed, task.stopped),
                *(seconds and f"{seconds * 1e3:.3g}" for seconds in (default, best)),
                f"{default / best:.2f}x" if default and best else None,
            )
        )
    headers = ("kernel", "convolution", "dtype", "trials", "failed", "stopped", "default\nms", "best\nms", "gain")
    print(format_table(headers, rows))
    measured = sum(task.measured for task in summary.tasks)
    if summary.farm is not None:
        _print_boards(summary.farm)
    elif summary.made.get("emulated"):
        print("this GPU is emulated: its times say nothing about a GPU")
    print(f"{Path(summary.logs) / summary.device}: {measured} new trials in {_duration(summary.seconds)} min")


def _print_boards(farm: dict[str, Any]) -> None:
    """What each board did, and what went wrong with it."""
    rows = []
    for name, board in sorted(farm["boards"].items()):
        troubles = ", ".join(f"{count}x {kind}" for kind, count in sorted(board["troubles"].items()))
        rows.append((name or "(tracker)", board["trials"], troubles or "none"))
    print(format_table(("board", "trials", "troubles"), rows))
    if farm.get("emulated"):
        print("these boards are emulated: their times say nothing about a board")
