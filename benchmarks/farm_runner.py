"""The same candidates through TVM's own RPCRunner and through ours, on the same four virtual Pis: trials a minute.

The boards are emulated and share this machine's cores, so no time of a kernel means anything here, and trials a minute
only mean something in comparison. RPCRunner has its defaults; a second run with as many workers as there are boards
shows how much of the difference is parallelism.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _bench import SMALL, Tracker, conditions, keep, new_parser, say, show, spread
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.runner import rpc_runner as steps

from gf_tvm.core.verify import argument_specs
from gf_tvm.farm.virtual import VirtualPi, prepare_root
from gf_tvm.machine.cpu import usable_cores
from gf_tvm.tuning.measuring.measurer import Measurer
from gf_tvm.tuning.measuring.ms_runner import FarmRunner
from gf_tvm.tuning.measuring.options import FarmOptions, MeasureOptions
from gf_tvm.tuning.task import Candidate, WorkloadTask

KEY = "rpi4"
#: Of the kernels: four boards share the cores of this machine.
THREADS = 1


def build(count: int, folder: Path) -> list[Path]:
    """So many different candidates, linked for the board."""
    task = WorkloadTask(SMALL, "rpi4")
    rng = random.Random(0)
    found = {candidate.id: candidate for candidate in (Candidate.of_config(task.space.sample(rng)) for _ in range(999))}
    paths = []
    with Measurer(MeasureOptions(builders=usable_cores())) as measurer:
        for _, path, failure in measurer.build(task, list(found.values())[:count]):
            if path is None:
                raise RuntimeError(f"a candidate does not build: {failure}")
            paths.append(path.rename(folder / path.name))
    return paths


def inputs(paths: list[Path]) -> list[Any]:
    """What MetaSchedule gives its runners."""
    specs = argument_specs(SMALL)
    infos = [ms.arg_info.TensorInfo(str(spec.dtype).removeprefix("torch."), list(spec.shape)) for spec in specs]
    return [ms.runner.RunnerInput(str(path), "cpu", infos) for path in paths]


def measure(runner: Any, paths: list[Path]) -> float:
    """Trials a minute; those that fail do not count."""
    begun = time.monotonic()
    results = [future.result() for future in runner.run(inputs(paths))]
    took = time.monotonic() - begun
    failures = Counter(str(result.error_msg).strip().splitlines()[-1] for result in results if not result.run_secs)
    for line, count in failures.items():
        say(f"{count} failed: {line}")
    return 60 * (len(results) - failures.total()) / took


def parts(rpc: Any, config: Any, paths: list[Path]) -> dict[str, float]:
    """Seconds (medians) that the steps of one trial take in RPCRunner, one trial at a time and nothing beside it."""
    taken: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        taken.setdefault(name, []).append(time.monotonic() - begun)

    for given in inputs(paths):
        path, types = str(given.artifact_path), tuple(info.as_json() for info in given.args_info)
        name = Path(path).name
        with timed("connect"):
            session = steps.default_create_session(rpc)
        device = session.device("cpu", 0)
        with timed("upload and load"):
            module = steps.default_upload_module(session, path, name)
        with timed("fill arguments"):
            arguments = steps.default_alloc_argument(session, device, types, 1)
        with timed("run"):
            steps.default_run_evaluator(session, module, device, config, arguments)
        with timed("clean up"):
            steps.default_cleanup(session, name)
            del arguments, module, device, session
    return {name: round(statistics.median(values), 3) for name, values in taken.items()}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--candidates", type=int, default=24, help="(default: 24)")
    parser.add_argument("--boards", type=int, default=4, help="virtual Pis (default: 4)")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions (default: 2)")
    args = parser.parse_args()
    where = conditions()
    config = ms.runner.EvaluatorConfig()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = build(args.candidates, folder)
        root = prepare_root()
        tracker = stack.enter_context(Tracker())
        for number in range(args.boards):
            name = f"virtual-{number + 1}"
            board = VirtualPi(root, name, tracker.address, KEY, folder, TVM_NUM_THREADS=str(THREADS))
            stack.enter_context(board)
        tracker.wait_for(args.boards)
        rpc = ms.runner.RPCConfig(*tracker.address, KEY)
        farm = FarmOptions(tracker.address, KEY)
        seconds = parts(rpc, config, paths[:8])

        def stock(workers: int | None) -> float:
            runner = ms.runner.RPCRunner(rpc, config, max_workers=workers)
            measure(runner, paths[: workers or 1])  # starts its processes
            rate = measure(runner, paths)
            runner.pool.shutdown()
            return rate

        def ours() -> float:
            runner = FarmRunner(farm, MeasureOptions(threads=THREADS), config, say)
            with contextlib.closing(runner):
                measure(runner, paths[: 2 * args.boards])  # connects to all boards
                return measure(runner, paths)

        kinds = {
            "RPCRunner": lambda: stock(None),
            f"RPCRunner, max_workers={args.boards}": lambda: stock(args.boards),
            "FarmRunner": ours,
        }
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(args.rounds):
            for name, run in kinds.items():
                rates[name].append(run())
                say(f"round {number + 1}, {name}: {rates[name][-1]:.1f} trials a minute")
    figures = {name: spread(values) for name, values in rates.items()}
    first = next(iter(figures.values()))["median"]
    found = {
        "what": "trials a minute of the same candidates on the same emulated boards; only ratios mean something",
        "conditions": where,
        "boards": args.boards,
        "candidates": args.candidates,
        "workload": SMALL.key,
        "threads": THREADS,
        "evaluator": config._asdict(),
        "rpc_runner_seconds": seconds,
        "runners": {name: {**figure, "ratio": round(figure["median"] / first, 2)} for name, figure in figures.items()},
    }
    rows = [[name, show(figure), f"{figure['median'] / first:.2f}"] for name, figure in figures.items()]
    keep(found, ["runner", "trials a minute: median (range)", "of RPCRunner's"], rows, args.json)
    print(f"{args.boards} emulated boards on one machine: only the ratios mean something")
    print("of one trial in RPCRunner: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
