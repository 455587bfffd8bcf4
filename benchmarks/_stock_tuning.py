"""MetaSchedule's own loop, ``tune_tir``, with its defaults: in a process of its own, without PyTorch.

The script reads a job as JSON from its input and writes what came of it as JSON to descriptor 3. One thing is left out
in stock's favour, unless the job says otherwise: MetaSchedule imports the intrinsics of every device that TVM knows, in
this process and anew in each builder of each batch, which took 45 to 75 s here, more than its builders' limit of 30 s.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from _usage import cpu_seconds

from gf_tvm.bundle.runtime import without_torch
from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import get_profile

with without_torch():
    import tvm
    from tvm.ir.utils import derived_object
    from tvm.s_tir import Schedule
    from tvm.s_tir import meta_schedule as ms

from gf_tvm.kernels import definition
from gf_tvm.schedules import get_space
from gf_tvm.tuning.metaschedule import INTRINSICS, OF_CPU

# Seconds for a build that imports everything first.
_PATIENCE = 300.0


def few_intrinsics(arch: str) -> None:
    """Leave the import of all intrinsics without effect, but for those of this CPU."""
    module = ModuleType(INTRINSICS)
    module.__path__ = [str(Path(import_module("tvm.s_tir").__file__ or "").parent / "tensor_intrin")]
    sys.modules[INTRINSICS] = module
    import_module(f"{INTRINSICS}.{OF_CPU[arch]}")


def build_at_once(module: Any, target: Any, _: Any) -> Any:
    """MetaSchedule's default function but for the import of the intrinsics. Pickled, so it imports what it needs."""
    from tvm.driver import build
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    return build(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target=target)


@derived_object
class Given(ms.search_strategy.PySearchStrategy):  # type: ignore[misc]
    """Proposes given modules, a batch at a time."""

    def __init__(self, modules: Iterator[Any], arguments: Any) -> None:
        super().__init__()
        self._modules, self._arguments = modules, arguments
        self._left, self._batch = 0, 0

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def pre_tuning(self, max_trials: int, num_trials_per_iter: int, *_: Any) -> None:
        self._left, self._batch = int(max_trials), int(num_trials_per_iter)

    def post_tuning(self) -> None:
        pass

    def generate_measure_candidates(self) -> list[Any] | None:
        count = min(self._left, self._batch)
        self._left -= count
        return [ms.MeasureCandidate(Schedule(next(self._modules)), self._arguments) for _ in range(count)] or None

    def notify_runner_results(self, *_: Any) -> None:
        pass

    def clone(self) -> Any:
        return Given(self._modules, self._arguments)


def main() -> None:
    job = json.load(sys.stdin)
    profile, workload = get_profile("host"), Workload.from_dict(job["workload"])
    target = tvm.target.Target({**json.loads(profile.target), "num-cores": job["threads"]})
    module = definition(workload)
    if job["imports"]:
        import_module(INTRINSICS)
        builder = ms.builder.LocalBuilder(timeout_sec=_PATIENCE)
    else:
        few_intrinsics(profile.arch)
        builder = ms.builder.LocalBuilder(f_build=build_at_once)
    options: dict[str, Any] = {"builder": builder}
    if job["candidates"] == "ours":
        space, rng = get_space(workload, profile), random.Random(job["seed"])
        configs = job.get("configs") or []
        modules = (space.module(configs[i] if i < len(configs) else space.sample(rng)) for i in range(1 << 30))
        options["strategy"] = Given(modules, ms.arg_info.ArgInfo.from_prim_func(module["main"]))
        options["space"] = ms.space_generator.ScheduleFn(lambda schedule: None)
    begin, busy = time.monotonic(), cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        database = ms.tune_tir(
            *(module, target, folder, job["trials"]),
            seed=job["seed"],
            num_tuning_cores=job["threads"],
            **options,
        )
        seconds, busy = time.monotonic() - begin, cpu_seconds() - busy
    records = [[float(value) for value in record.run_secs] for record in database.get_all_tuning_records()]
    found = [sum(values) / len(values) * 1e3 for values in records if values and max(values) < 1e9]
    answer = {"seconds": seconds, "cpu_seconds": busy, "trials": job["trials"], "ok": len(found), "ms": found}
    json.dump(answer, os.fdopen(3, "w"))


if __name__ == "__main__":
    main()
