"""Everything that needs an NVIDIA GPU, in one run: do the kernels work there, are they right, and how fast are they?

For a machine with a GPU, a PyTorch with CUDA and gf_tvm with its ``tune`` and ``cuda`` extras. Steps:

- build:     bundle of the paper's seven cases, R2 and R4, float32 and float16, default schedules
- agreement: every kernel against the float64 reference, on two streams
- tvm:       the same schedules through TVM's own CUDA runtime, where that loads
- tune:      tracker, server and tuner as three processes on this machine
- rebuild:   the bundle again, from the tuned logs
- train:     a training step without synchronisation, under a CUDA graph, and with autocast
- table:     gf-tvm compare with cuDNN, and how many cases reach the goals

A step that fails does not end the run: its message is kept, and the exit code is 1. ``--steps`` chooses some.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _bench import Tracker, conditions, new_parser, say
from _gpu_train import train

import gf_tvm
from gf_cuda import GfCudaError, board, get_driver
from gf_tvm.comparison.gpu import require_cuda
from gf_tvm.core import verify
from gf_tvm.core.workload import Workload
from gf_tvm.errors import GfTvmError
from gf_tvm.machine.profiles import DeviceProfile, get_profile
from gf_tvm.runners.compare import print_comparison
from gf_tvm.shapes import Case, paper_cases, parse_dtypes, pick_cases, with_dtypes, workloads_of

KEY = "gpu-check"

#: What is to be reached at R4: times as fast as exact, where the limit allows it, and part of the limit.
GOAL_SPEEDUP, GOAL_LIMIT = 20.0, 0.7


@dataclass
class Check:
    """What the steps share. ``bundle`` and ``logs`` are there once their steps have run."""

    profile: DeviceProfile
    device: torch.device
    folder: Path
    cases: list[Case]
    minutes: float
    seconds: float
    logs: Path
    bundle: Path | None = None
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def workloads(self) -> list[Workload]:
        return [w for w in workloads_of(self.cases) if w.kernel in ("filter_input", "backward")]

    def library(self) -> Any:
        if self.bundle is None:
            raise GfTvmError("there is no bundle: the step 'build' did not run or failed")
        return gf_tvm.load(self.bundle)


def build(check: Check) -> dict[str, Any]:
    """Default schedules."""
    return _build(check, "default.gfb", [])


def rebuild(check: Check) -> dict[str, Any]:
    """The schedules of the tuning run."""
    return _build(check, "tuned.gfb", [check.logs])


def _build(check: Check, name: str, logs: list[Path]) -> dict[str, Any]:
    begun = time.monotonic()
    report = gf_tvm.build(check.workloads, check.profile, logs, check.folder / name)
    check.bundle = report.path
    kinds = [kernel.schedule for kernel in report.kernels]
    return {
        "seconds": time.monotonic() - begun,
        "kernels": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "reasons": sorted({kernel.reason for kernel in report.kernels if kernel.reason}),
        "bytes": report.path.stat().st_size,
    }


def agreement(check: Check) -> dict[str, Any]:
    """Errors in units of what rounding explains, at most 1; the same bits on a stream of its own."""
    library = check.library()
    found: dict[str, float] = {}
    side = torch.cuda.Stream(check.device)
    for workload in library.workloads:
        inputs = [tensor.to(check.device) for tensor in verify.random_inputs(workload, seed=0)]
        outputs = run(library, workload, inputs, check.device)
        found[workload.key] = verify.excess(outputs, verify.expected(workload, inputs))
        side.wait_stream(torch.cuda.current_stream(check.device))
        with torch.cuda.stream(side):
            again = run(library, workload, inputs, check.device)
        side.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True)):
            raise GfTvmError(f"{workload.key}: other results on another stream")
        del inputs, outputs, again
    wrong = [key for key, excess in found.items() if not excess <= 1]
    if wrong:
        raise GfTvmError(
            f"{len(wrong)} of {len(found)} kernels are wrong, the first is {wrong[0]}: {found[wrong[0]]:g}"
        )
    return {"kernels": len(found), "largest_error": max(found.values()), "errors": found}


def run(library: Any, workload: Workload, inputs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """A kernel's outputs, which were full of NaN before."""
    outputs = [tensor.to(device) for tensor in verify.poisoned_outputs(workload)]
    kernel = library.find(workload.kernel, workload.geometry, workload.dtype)
    kernel(*inputs, *outputs)
    return outputs


def tvm(check: Check) -> dict[str, Any]:
    """The default schedules of the R4 kernels, compiled and launched by TVM, against the reference and the launcher."""
    import tvm as compiler

    from gf_tvm.tuning.task import WorkloadTask

    if not compiler.cuda(0).exist:
        raise GfTvmError("TVM's CUDA runtime finds no GPU, or does not load (it needs libcudart.so.13 of CUDA 13)")
    target = compiler.target.Target(json.loads(check.profile.target)).with_host(compiler.target.Target("llvm"))
    library, found = check.library(), {}
    for workload in check.workloads:
        if workload.geometry.patch != (4, 4):
            continue
        task = WorkloadTask(workload, check.profile.name)
        module = compiler.compile(task.space.schedule(task.space.default).mod, target=target)
        inputs = [tensor.to(check.device) for tensor in verify.random_inputs(workload, seed=0)]
        outputs = [tensor.to(check.device) for tensor in verify.poisoned_outputs(workload)]
        torch.cuda.synchronize(check.device)
        module["main"](*(compiler.runtime.from_dlpack(tensor) for tensor in (*inputs, *outputs)))
        compiler.cuda(0).sync()
        launched = run(library, workload, inputs, check.device)
        differs = max((a.double() - b.double()).abs().max().item() for a, b in zip(outputs, launched, strict=True))
        found[workload.key] = {
            "error": verify.excess(outputs, verify.expected(workload, inputs)),
            "largest_difference_from_launcher": differs,
        }
    wrong = [key for key, value in found.items() if not value["error"] <= 1]
    if wrong:
        raise GfTvmError(f"through TVM's runtime {len(wrong)} of {len(found)} kernels are wrong, first {wrong[0]}")
    return {"kernels": len(found), "found": found}


def tune(check: Check) -> dict[str, Any]:
    """A tuning run through tracker and server on this machine."""
    command = [sys.executable, "-m", "gf_tvm.runners.cli"]
    device = ["--device", check.profile.name]
    summary = check.folder / "tuning.json"
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker())
        address = ["--tracker", f"{tracker.address[0]}:{tracker.address[1]}", "--key", KEY]
        log = stack.enter_context((check.folder / "server.log").open("w", encoding="utf-8"))
        serve = [*command, "farm", "serve", *address, *device, "--until-stdin-closes", "--allow-root"]
        server = subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=log, stderr=log)
        stack.callback(server.wait, 30)
        assert server.stdin is not None
        stack.callback(server.stdin.close)
        tracker.wait_for(1)
        source = shapes_file(check)
        what = ["--shapes", str(source), "--kernels", "filter_input,backward", "--trials", "100000"]
        limits = ["--minutes", str(check.minutes), "--logs", str(check.logs), "--json", str(summary)]
        done = subprocess.run([*command, "tune", *device, *address, *what, *limits], check=False)
    if done.returncode:
        raise GfTvmError(f"gf-tvm tune ended with exit code {done.returncode}; the server's words: {log.name}")
    found = json.loads(summary.read_text(encoding="utf-8"))
    idle = [task["workload"] for task in found["tasks"] if not task["measured"]]
    if len(idle) == len(found["tasks"]):
        raise GfTvmError(f"no trial was made in {check.minutes:g} minutes; the server's words: {log.name}")
    return {"minutes": check.minutes, "kernels_without_a_trial": idle, "summary": found}


def shapes_file(check: Check) -> Path:
    """The cases as a file for the command line."""
    path = check.folder / "shapes.json"
    entries = []
    for case in check.cases:
        fields = case.geometry.to_dict()
        patch = fields.pop("patch")
        name = f"{case.name} R{patch[0]}x{patch[1]} {case.dtype}"
        entries.append({**fields, "name": name, "dtype": case.dtype, "patches": [patch]})
    path.write_text(json.dumps({"cases": entries}), encoding="utf-8")
    return path


def table(check: Check) -> dict[str, Any]:
    """Against cuDNN; ``document`` is what gf-tvm compare --json writes."""
    last = [""]

    def progress(done: float, total: float, what: str) -> None:
        if what != last[0]:
            last[0] = what
            say(f"table {done / total:4.0%} {what}")

    result = gf_tvm.compare(check.cases, check.library(), check.profile.name, seconds=check.seconds, progress=progress)
    check.document = result.to_dict()
    goal = [row for row in result.rows if row.patch == (4, 4)]
    allowed = [row for row in goal if row.baseline_ms / row.roofline_ms >= GOAL_SPEEDUP]

    print_comparison(result)
    return {
        "rows": len(result.rows),
        "goal": {
            "r4_rows": len(goal),
            "of_which_the_limit_allows_the_speedup": len(allowed),
            "reach_the_speedup": sum(row.speedup >= GOAL_SPEEDUP for row in allowed),
            "reach_the_part_of_the_limit": sum(row.limit_fraction >= GOAL_LIMIT for row in goal),
        },
        "geometric_means": check.document["geometric_means"],
    }


def training(check: Check) -> dict[str, Any]:
    """See :func:`_gpu_train.train`."""
    return train(check.profile, check.device, check.folder)


STEPS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "build": build,
    "agreement": agreement,
    "tvm": tvm,
    "tune": tune,
    "rebuild": rebuild,
    "train": training,
    "table": table,
}


def perform(check: Check, steps: list[str]) -> dict[str, Any]:
    """What each step found, or why it failed."""
    found: dict[str, Any] = {}
    for name in steps:
        say(name)
        begun = time.monotonic()
        try:
            found[name] = {"ok": True, **STEPS[name](check)}
        except (GfTvmError, GfCudaError) as error:
            found[name] = {"ok": False, "error": str(error)}
        except Exception as error:  # what no one has seen yet: the other steps are worth their time all the same
            traceback.print_exc()
            found[name] = {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        found[name]["took_seconds"] = round(time.monotonic() - begun, 1)
        say(f"{name}: {'ok' if found[name]['ok'] else found[name]['error']}")
    return found


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--device", default="cuda", metavar="D", help="profile (default: cuda, the GPU that is here)")
    parser.add_argument("--steps", default=",".join(STEPS), metavar="S,...", help=f"(default: {','.join(STEPS)})")
    parser.add_argument(
        "--minutes", type=float, default=30.0, metavar="M", help="of tuning, all kernels together (default: 30)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of timing a case (default: 5)")
    parser.add_argument("--cases", metavar="LIST", help="only these of the paper's, as 4-7 (default: all)")
    parser.add_argument("--dtype", default="float32,float16", metavar="T,...", help="(default: float32,float16)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the tuned logs there (default: nowhere)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table's rows there, as compare --json")
    args = parser.parse_args()
    steps = [name.strip() for name in args.steps.split(",")]
    unknown = [name for name in steps if name not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; known: {', '.join(STEPS)}")
    try:
        profile = get_profile(args.device)
        require_cuda(profile)
        cases = with_dtypes(paper_cases([2, 4]), parse_dtypes(args.dtype))
        cases = cases if args.cases is None else pick_cases(cases, args.cases)
    except GfTvmError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    warnings.simplefilter("default", gf_tvm.FallbackWarning)
    with tempfile.TemporaryDirectory(prefix="gf_tvm-gpu-") as name:
        folder = Path(name)
        check = Check(profile, device, folder, cases, args.minutes, args.seconds, args.logs or folder / "logs")
        found = {
            "conditions": {**conditions(), "gpu": board.describe(get_driver().device(device.index))},
            "steps": perform(check, steps),
        }
    for path, value in ((args.json, found), (args.table, check.document)):
        if path is not None and value:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    for step, result in found["steps"].items():
        print(f"{step:10} {'ok' if result['ok'] else 'FAILED: ' + result['error']} ({result['took_seconds']} s)")
    return 0 if all(result["ok"] for result in found["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
