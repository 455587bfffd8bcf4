"""Trials a minute of tuning on this machine, where their time goes, and the same for stock MetaSchedule.

Three runs one after another on the same cores, for the same workload and number of trials:

* ours: what `gf-tvm tune` does, with a clock around each step;
* stock, its rules: `meta_schedule.tune_tir` with its defaults on our plain definition;
* stock, our candidates: the same loop, builder, runner and cost model, given the very modules that ours measured.

Stock compares no result with a reference; ours checks each candidate, which is part of its time. Starting the processes
is part of the time as well; importing TVM in the first one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _bench import conditions, keep, new_parser, say
from _timed_tuning import run_ours

from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.machine.cpu import usable_cores

RUNS = ("ours", "stock", "stock-ours")


def run_stock(
    workload: Workload, trials: int, threads: int, seed: int, configs: Any = None, imports: bool = False
) -> dict[str, Any]:
    """Tune with ``tune_tir``; with ``configs``, these points of our space."""
    job = {
        "workload": workload.to_dict(),
        "trials": trials,
        "threads": threads,
        "seed": seed,
        "candidates": "theirs" if configs is None else "ours",
        "configs": configs,
        "imports": imports,
    }
    read, write = os.pipe()
    script = Path(__file__).with_name("_stock_tuning.py")
    # Its kernels get the threads that ours have; without this TVM takes half of the cores.
    environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", _START, str(write), str(script)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[write], env=environment, text=True
    ) as process:
        os.close(write)
        assert process.stdin is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        with os.fdopen(read) as answer:
            text = answer.read()
    if not text:
        raise SystemExit(f"stock MetaSchedule ended with {process.returncode}")
    found: dict[str, Any] = json.loads(text)
    return {**found, "trials_per_minute": 60 * trials / found["seconds"], "best_ms": min(found["ms"], default=None)}


#: Gives the script its answer's pipe as descriptor 3.
_START = (
    "import os, sys, runpy; os.dup2(int(sys.argv[1]), 3); sys.path.insert(0, os.path.dirname(sys.argv[2])); "
    "runpy.run_path(sys.argv[2], run_name='__main__')"
)


def main() -> None:
    parser = new_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default=",".join(RUNS), help=f"some of {','.join(RUNS)}")
    parser.add_argument("--stock-imports", action="store_true", help="leave stock's import of all intrinsics as it is")
    parser.add_argument("--shape", default="8,64,64,28,28,3,2", help="n,ci,co,h,w,kernel,patch")
    arguments = parser.parse_args()
    n, ci, co, h, w, kernel, patch = map(int, arguments.shape.split(","))
    geometry = Geometry(n, ci, co, h, w, (kernel, kernel), (patch, patch), padding=(kernel // 2, kernel // 2))
    workload = Workload("backward", geometry)
    wanted = arguments.runs.split(",")
    found: dict[str, Any] = {"conditions": conditions(), "workload": workload.key, "runs": {}}
    limits, imports = (arguments.trials, arguments.threads), arguments.stock_imports
    if "ours" in wanted or "stock-ours" in wanted:
        say("ours")
        with tempfile.TemporaryDirectory() as logs:
            found["runs"]["ours"] = run_ours(workload, *limits, Path(logs), arguments.seed)
    if "stock-ours" in wanted:
        say("stock, our candidates")
        configs = found["runs"]["ours"]["configs"]
        found["runs"]["stock-ours"] = run_stock(workload, *limits, arguments.seed, configs, imports)
    if "stock" in wanted:
        say("stock, its rules")
        found["runs"]["stock"] = run_stock(workload, *limits, arguments.seed, None, imports)
    rows = [
        [
            *(name, run["trials"], f"{run['seconds']:.1f}", f"{run['cpu_seconds']:.1f}"),
            *(f"{run['trials_per_minute']:.0f}", f"{run['best_ms']:.3f}"),
        ]
        for name, run in found["runs"].items()
    ]
    if "ours" in found["runs"]:
        run = found["runs"]["ours"]
        print("One trial, in ms of the loop's time (two builders' time counts half):")
        for name, seconds in run["split"].items():
            print(f"  {1e3 * seconds / run['trials']:8.1f}  {name}")
        rest = run["seconds"] - sum(run["split"].values())
        print(f"  {1e3 * rest / run['trials']:8.1f}  the rest (builders waiting for each other, log)")
    keep(found, ["run", "trials", "seconds", "CPU seconds", "trials/min", "best ms"], rows, arguments.json)


if __name__ == "__main__":
    main()
