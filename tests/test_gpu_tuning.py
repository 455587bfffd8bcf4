"""Measuring and tuning for GPUs, on a driver that runs CUDA C on the CPU: every way to fail, and none of the speed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import emulated_cuda
import pytest
from gpu_toy_task import GpuToyTask, program
from toy_task import N

from gf_cuda import CompileError, DriverError, ProgramError, compile_source
from gf_tvm.tuning.gpu_worker import GpuWorker
from gf_tvm.tuning.measure import Measurer
from gf_tvm.tuning.runner import Options, Result
from gf_tvm.tuning.task import Candidate
from gf_tvm.tuning.worker import Worker, service

OPTIONS = Options(repeats=2, min_seconds=0.0005, max_seconds=0.1, run_timeout=20.0, final=2, rounds=2)


@pytest.fixture
def gpu() -> Iterator[emulated_cuda.Emulated]:
    """This process, and those that it starts, have a GPU."""
    with emulated_cuda.environment() as found:
        yield found


def candidate(act: str, number: int = 0) -> Candidate:
    return Candidate.of_config({"act": act, "number": number})


def built(act: str, folder: Path) -> Path:
    """The file of a candidate."""
    path = folder / f"{act}.zip"
    GpuToyTask((act,)).export({"act": act}, path)
    return path


def prepared(seed: int = 0) -> GpuWorker:
    worker = service(GpuToyTask())
    assert isinstance(worker, GpuWorker)
    worker.prepare(seed)
    return worker


def checked(act: str, folder: Path) -> tuple[float, str]:
    worker = prepared()
    worker.load("it", built(act, folder))
    worker.run("it")
    return worker.check()


# ---------------------------------------------------------------------------------------------------------- the worker


def test_a_right_kernel_is_right_and_is_timed(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    worker = prepared()
    worker.load("it", built("none", tmp_path))
    for seed in (0, 5):
        worker.prepare(seed)
        worker.run("it")
        excess, complaint = worker.check()
        assert excess <= 1
        assert not complaint
    for cold in (False, True):
        gpu.forget_calls()
        runs = worker.time("it", repeats=3, min_seconds=0.005, max_seconds=60.0, cold=cold)
        calls = gpu.calls()
        assert len(runs) == 3
        assert all(0 < seconds < 0.1 for seconds in runs)
        # What is timed lies between two events, and each is waited for before it is read.
        assert calls.count("cuEventElapsedTime") == 2 * calls.count("cuEventSynchronize")
        launches = calls.count("cuLaunchKernel") / 2  # two launches a call
        assert launches == calls.count("cuEventSynchronize") if cold else launches > calls.count("cuEventSynchronize")
        assert calls.count("cuMemsetD8Async") >= calls.count("cuEventSynchronize")  # the caches are flushed before
    assert not {"cuMemcpyHtoD_v2", "cuMemAlloc_v2", "cuCtxSynchronize"} & set(calls)
    # Timing has changed nothing.
    assert worker.check()[0] <= 1
    assert worker.time("it", repeats=3, min_seconds=0.0005, max_seconds=1.0, cutoff=1e-9)[1:] == []


@pytest.mark.parametrize(
    ("act", "complaint"),
    [
        ("wrong", "its error is"),
        ("leaves a hole", "its error is inf"),
        ("reads scratch memory", "its error is inf"),
        ("writes its input", "wrote to its inputs"),
        ("writes outside", "wrote outside its outputs"),
        ("writes beyond scratch memory", "wrote outside its scratch memory"),
    ],
)
def test_a_wrong_kernel_is_found(gpu: emulated_cuda.Emulated, tmp_path: Path, act: str, complaint: str) -> None:
    excess, found = checked(act, tmp_path)
    assert excess > 1
    assert complaint in found


def test_what_lay_on_the_device_before_does_not_help(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    """Outputs and scratch memory are poisoned before each run, so nothing of a right kernel's remains."""
    worker = prepared()
    for name, act in (("right", "none"), ("hole", "leaves a hole"), ("scratch", "reads scratch memory")):
        worker.load(name, built(act, tmp_path))
        worker.run("right")
        assert worker.check()[0] <= 1
        worker.run(name)
        assert (worker.check()[0] == math.inf) == (name != "right")


def test_inputs_are_uploaded_once_and_memory_is_given_back(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    worker = prepared()
    gpu.forget_calls()
    worker.prepare(0)
    assert gpu.calls() == []
    used, handles = gpu.memory_used(), gpu.handles()
    for seed in (1, 2):
        worker.prepare(seed)
    assert gpu.memory_used() == used
    for _ in range(2):
        worker.load("it", built("none", tmp_path))
        worker.run("it")
        worker.unload("it")
    assert gpu.handles() == handles


def test_a_program_for_other_tensors_is_refused(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    values = program().to_dict()
    values["arguments"][2]["shape"] = [N, 2 * N]
    source = 'extern "C" __global__ void product(float*, float*, float*) {}'
    other = type(program()).from_dict(values)
    other.save(str(tmp_path / "it.zip"), source, compile_source(source, "sm_53")[0], "cubin")
    with pytest.raises(ProgramError, match=r"float32\[16x32\]; toy has .*float32\[16x16\]"):
        prepared().load("it", tmp_path / "it.zip")


def test_a_driver_that_does_not_know_the_code_compiles_the_source(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    """As on a Jetson Nano, whose driver is of CUDA 10.2, while the code was made by the compiler of CUDA 11.8."""
    gpu.fault("cuModuleLoadDataEx:1:200")
    assert checked("none", tmp_path)[0] <= 1
    # What is wrong with a candidate itself is not tried again.
    gpu.fault("cuModuleLoadDataEx:1:2")
    gpu.forget_calls()
    with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        prepared().load("it", built("none", tmp_path))
    assert gpu.calls().count("cuModuleLoadDataEx") == 1


def test_workers_of_cpus_stay_what_they_are() -> None:
    from toy_task import ToyTask

    assert type(service(ToyTask())) is Worker
    assert not ToyTask().gpu
    assert (ToyTask().suffix, GpuToyTask().suffix) == (".so", ".zip")


def test_compilers_errors(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    with pytest.raises(CompileError):
        built("does not compile", tmp_path)


# ----------------------------------------------------------------------------------------------- builders and a runner


def test_every_failure_is_a_result_and_the_next_candidate_is_measured(gpu: emulated_cuda.Emulated) -> None:
    acts = ["none", "does not compile", "too many threads", "crash", "wrong", "hang", "none"]
    task = GpuToyTask(tuple(acts))
    candidates = [candidate(act, number) for number, act in enumerate(acts)]
    results: dict[str, Result] = {}
    gpu.forget_calls()
    with Measurer(replace(OPTIONS, run_timeout=3.0)) as measurer:
        files = {}
        for one, path, failure in measurer.build(task, candidates):
            files[one.id] = path
            if failure is not None:
                results[one.id] = failure
        for one in candidates:
            path = files[one.id]
            if path is not None:
                results[one.id] = measurer.run(task, path)
    found = [results[one.id] for one in candidates]
    assert [result.status for result in found] == ["ok", "build", "run", "crash", "wrong", "timeout", "ok"]
    assert "CompileError" in found[1].message
    assert "2048 threads" in found[2].message
    # CUDA is used by the process that measures, and by no other.
    assert gpu.calls() == []


def test_what_the_driver_refuses_is_a_failure_in_its_words(
    gpu: emulated_cuda.Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task, library = GpuToyTask(), built("none", tmp_path)
    with Measurer(OPTIONS) as measurer:
        # The first process finds all faults, one after another: its fourth allocation is the scratch memory's.
        monkeypatch.setenv("GF_CUDA_FAULT", "cuMemAlloc_v2:4:2,cuLaunchKernel:1:701,cuStreamSynchronize:2:719")
        measurer._runner.start()
        process = measurer._runner._process
        assert process is not None
        process.start()
        monkeypatch.delenv("GF_CUDA_FAULT")
        for words, alive in (
            ("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2)", True),
            ("cuLaunchKernel: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)", True),
            (None, True),
            # The context is lost: in this process every other candidate would fail, too.
            ("cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (719)", False),
        ):
            result = measurer.run(task, library)
            assert (result.status, words is None or words in result.message) == ("run" if words else "ok", True), result
            assert process.alive == alive
        assert measurer.run(task, library).status == "ok"


def test_the_final_comparison(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    libraries = {act: built(act, tmp_path) for act in ("none", "too many threads")}
    with Measurer(OPTIONS) as measurer:
        results = measurer.compare(GpuToyTask(), libraries, seed=3)
    assert {name: result.status for name, result in results.items()} == {"none": "ok", "too many threads": "run"}
    assert len(results["none"].runs) == OPTIONS.rounds
