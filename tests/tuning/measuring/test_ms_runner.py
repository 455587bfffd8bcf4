"""MetaSchedule's interface to a farm: two native boards, no emulation."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from farm_helpers import NativeBoard, TrackerProcess, native_farm, small_workload, treacherous_source

from gf_tvm.codegen.compile import compile_module, export
from gf_tvm.codegen.linker import find_linker
from gf_tvm.core.verify import argument_specs
from gf_tvm.errors import FarmError
from gf_tvm.machine.profiles import get_profile
from gf_tvm.tuning.measuring.options import FarmOptions, MeasureOptions
from gf_tvm.tuning.measuring.worker import Worker
from gf_tvm.tuning.task import ArgumentsTask, Candidate, WorkloadTask

pytest.importorskip("tvm.s_tir.meta_schedule")

# Only the one that hangs may exceed this, however busy the machine is.
OPTIONS = MeasureOptions(max_seconds=60.0, run_timeout=20.0)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrackerProcess, list[NativeBoard]]]:
    with native_farm(2, tmp_path_factory.mktemp("farm")) as found:
        yield found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that is right."""
    task = WorkloadTask(small_workload(), "host")
    path = tmp_path_factory.mktemp("library") / "good.so"
    export([compile_module(task.schedule(Candidate.of_config(task.space.default)), task.profile)], path, task.profile)
    return path


def treacherous(act: str, folder: Path) -> Path:
    """A kernel that does one of ACTS."""
    path = folder / f"{act}.so"
    command = [*find_linker(get_profile("host")), "-x", "c++", "-", "-shared", "-fPIC", "-o", str(path)]
    subprocess.run(command, input=treacherous_source(act), text=True, check=True)
    return path


def runner_input(path: Path, device: str = "llvm", dtype: str | None = None) -> Any:
    from tvm.s_tir import meta_schedule as ms

    specs = argument_specs(small_workload())
    types = [dtype or str(spec.dtype).removeprefix("torch.") for spec in specs]
    infos = [ms.arg_info.TensorInfo(name, spec.shape) for name, spec in zip(types, specs, strict=True)]
    return ms.runner.RunnerInput(str(path), device, infos)


def new_runner(farm: tuple[TrackerProcess, list[NativeBoard]], key: str = "here", **arguments: Any) -> Any:
    from gf_tvm.tuning.measuring.ms_runner import FarmRunner

    return FarmRunner(FarmOptions(farm[0].address, key), OPTIONS, **arguments)


def test_each_candidate_gets_its_result(
    farm: tuple[TrackerProcess, list[NativeBoard]], library: Path, tmp_path: Path
) -> None:
    from tvm.s_tir import meta_schedule as ms

    config = ms.runner.EvaluatorConfig(number=2, repeat=3, min_repeat_ms=1)
    inputs = [runner_input(library) for _ in range(8)]
    inputs[2] = runner_input(treacherous("crash", tmp_path))
    inputs[3] = runner_input(treacherous("timeout", tmp_path))
    inputs[4] = runner_input(tmp_path / "no such file.so")
    with contextlib.closing(new_runner(farm, evaluator_config=config)) as runner:
        futures = runner.run(inputs[:6])
        assert not all(future.done() for future in futures)
        futures += runner.run(inputs[6:])
        results = [future.result() for future in futures]
        assert all(future.done() for future in futures)
    for number, kind in ((2, "crash: "), (3, "timeout: "), (4, "build: no such file.so is not there")):
        assert results[number].run_secs is None
        assert str(results[number].error_msg).startswith(kind)
    for number in (0, 1, 5, 6, 7):
        assert results[number].error_msg is None
        assert len(results[number].run_secs) == 3
        assert 0 < max(float(seconds) for seconds in results[number].run_secs) < 20
    assert library.exists()  # it is MetaSchedule's to remove
    with pytest.raises(Exception, match="is closed"):
        runner.run([runner_input(library)])


def test_what_boards_cannot_take_is_refused(
    farm: tuple[TrackerProcess, list[NativeBoard]], library: Path, tmp_path: Path
) -> None:
    with pytest.raises(FarmError, match="no board with the key 'rpi5'; known keys: here"):
        new_runner(farm, key="rpi5")
    with contextlib.closing(new_runner(farm)) as runner:
        for given, complaint in (
            (runner_input(tmp_path / "candidate.tar"), "not candidate.tar"),
            (runner_input(library, device="cuda"), "not on devices of the type cuda"),
            (runner_input(library, dtype="bool"), "argument of the type bool"),
        ):
            with pytest.raises(Exception, match=complaint):
                runner.run([given])


def test_tvms_own_runner_can_use_the_boards(farm: tuple[TrackerProcess, list[NativeBoard]], library: Path) -> None:
    from tvm.s_tir import meta_schedule as ms

    rpc = ms.runner.RPCConfig(*farm[0].address, "here", session_timeout_sec=250)
    runner = ms.runner.RPCRunner(rpc, ms.runner.EvaluatorConfig(1, 2, 1))
    (result,) = [future.result() for future in runner.run([runner_input(library, device="cpu")])]
    assert result.error_msg is None
    assert len(result.run_secs) == 2


def test_builder_compiles_and_links_for_the_device() -> None:
    from gf_tvm.tuning.measuring import ms_runner

    task = WorkloadTask(small_workload(), "host")
    module = task.space.module(task.space.default)
    path = Path(ms_runner._export(ms_runner._build(module, None, None, "host"), "host"))
    assert callable(task.load(path))
    path.unlink()
    path.parent.rmdir()


def test_writing_beyond_integers_is_found() -> None:
    task = ArgumentsTask((("int8", (3, 5)), ("float16", (4,))))
    assert task.identity.key == "int8[3x5], float16[4]"
    worker = Worker(task)
    worker.prepare(0)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> None:
        a.fill_(127)

    worker._kernels["right"] = kernel
    worker.run("right")
    assert worker.check() == (0.0, "")
    worker._kernels["beyond"] = lambda a, b: a.as_strided((16,), (1,)).fill_(1)  # type: ignore[assignment]
    worker.run("beyond")
    assert "outside" in worker.check()[1]
