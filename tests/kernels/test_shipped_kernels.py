"""The kernels that the shipped logs choose, built for their own shapes and checked like any other."""

from __future__ import annotations

import math

import pytest

from gf_tvm.bundle.runtime import start_runtime
from gf_tvm.codegen.compile import compile_module
from gf_tvm.core import verify
from gf_tvm.core.workload import Workload
from gf_tvm.machine.profiles import get_profile, runs_here
from gf_tvm.schedules import get_space
from gf_tvm.tuning.log import best_record, read_log, shipped_logs

#: Elements of the larger map. The paper's three large cases are left to benchmarks/cpu.py, which checks them, too.
LARGEST = 8_000_000


def shipped() -> list[str]:
    """Every third of the logs whose kernels can run here, so that all kinds take their turn."""
    folder = shipped_logs()
    assert folder is not None
    found = []
    for path in sorted(folder.glob("*/*.jsonl")):
        geometry = Workload.from_dict(read_log(path).identity.workload).geometry
        if max(math.prod(geometry.x_shape), math.prod(geometry.y_shape)) <= LARGEST:
            found.append(f"{path.parent.name}/{path.name}")
    return found[::3]


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_tuned_kernels_are_right(name: str) -> None:
    folder = shipped_logs()
    assert folder is not None
    log = read_log(folder / name)
    profile, workload = get_profile(log.identity.device), Workload.from_dict(log.identity.workload)
    record = best_record(log.records)
    assert record is not None
    assert record.config is not None
    module = compile_module(get_space(workload, profile).schedule(record.config), profile)
    if not runs_here(profile):
        return  # it came out of the compiler
    start_runtime()
    inputs, outputs = verify.random_inputs(workload, 11), verify.poisoned_outputs(workload)
    module["main"](*inputs, *outputs)
    assert verify.excess(outputs, verify.expected(workload, inputs)) <= 1
