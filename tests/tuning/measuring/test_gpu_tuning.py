"""Measuring and tuning for GPUs, on a driver that runs CUDA C on the CPU: every way to fail, and none of the speed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import emulated_cuda
import pytest
from farm_helpers import NativeBoard, TrackerProcess, small_workload
from gpu_toy_task import GpuToyTask, TreacherousGpuTask, program
from toy_task import N, wait_until

from gf_cuda import CompileError, DriverError, NoCompilerError, ProgramError, compile_source
from gf_tvm.errors import DeviceError, FarmError
from gf_tvm.farm.server import Counters, SessionContext
from gf_tvm.machine.gpu import GpuInfo, check_device
from gf_tvm.machine.profiles import get_profile
from gf_tvm.machine.sensors import Sensors
from gf_tvm.runners.cli import main
from gf_tvm.tuning.log import read_log
from gf_tvm.tuning.loop import tune, tune_tasks
from gf_tvm.tuning.measuring import gpu_worker
from gf_tvm.tuning.measuring.board_service import BoardService
from gf_tvm.tuning.measuring.farm_measurer import FarmMeasurer
from gf_tvm.tuning.measuring.gpu_worker import GpuWorker
from gf_tvm.tuning.measuring.measurer import Measurer
from gf_tvm.tuning.measuring.messages import task_values
from gf_tvm.tuning.measuring.options import FarmOptions, MeasureOptions
from gf_tvm.tuning.measuring.service import worker_for
from gf_tvm.tuning.measuring.worker import Worker
from gf_tvm.tuning.options import SearchOptions
from gf_tvm.tuning.task import TuningError, WorkloadTask

OPTIONS = MeasureOptions(repeats=2, min_seconds=0.0005, max_seconds=0.1, run_timeout=20.0, final=2, rounds=2)


@pytest.fixture
def gpu() -> Iterator[emulated_cuda.Emulated]:
    """This process, and those that it starts, have a GPU."""
    with emulated_cuda.environment() as found:
        yield found


def built(act: str, folder: Path) -> Path:
    """The file of a candidate."""
    path = folder / f"{act}.zip"
    GpuToyTask((act,)).export({"act": act}, path)
    return path


def prepared(seed: int = 0) -> GpuWorker:
    worker = worker_for(GpuToyTask())
    assert isinstance(worker, GpuWorker)
    worker.prepare(seed)
    return worker


def checked(act: str, folder: Path) -> tuple[float, str]:
    worker = prepared()
    worker.load("it", built(act, folder))
    worker.run("it")
    return worker.check()


# ---------------------------------------------------------------------------------------------------------- the worker


def test_a_right_kernel_is_right_and_is_timed(
    gpu: emulated_cuda.Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = prepared()
    worker.load("it", built("none", tmp_path))
    for seed in (0, 5):
        worker.prepare(seed)
        worker.run("it")
        excess, complaint = worker.check()
        assert excess <= 1
        assert not complaint
    tried = worker._try

    def steady(name: str, calls: int) -> tuple[float, float, float]:
        # A call that a busy machine interrupts would seem to fill a repetition by itself.
        lead, queueing, seconds = tried(name, calls)
        return lead, queueing, min(seconds, calls * 3e-4)

    monkeypatch.setattr(worker, "_try", steady)
    for cold in (False, True):
        gpu.forget_calls()
        runs = worker.time("it", repeats=3, min_seconds=0.002, max_seconds=1e6, cold=cold)
        calls = gpu.calls()
        assert len(runs) == 3
        assert all(0 < seconds <= 3e-4 for seconds in runs)
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


@pytest.mark.parametrize(("gpu_us", "leads"), [(5, 4), (50, 1), (500, 1)])
def test_the_gpu_is_kept_busy_while_calls_are_queued(monkeypatch: pytest.MonkeyPatch, gpu_us: int, leads: int) -> None:
    """Unless the GPU takes longer for the calls than the host anyway: else it would wait, which is not the kernel."""
    worker = GpuWorker(GpuToyTask())

    def calls(name: str, count: int) -> tuple[float, float, float]:
        lead, queueing = 50e-6 * worker._leads, 10 * 12e-6
        waited = max(0.0, queueing - lead - count * gpu_us * 1e-6) if gpu_us < 12 else 0.0
        return lead, queueing, count * gpu_us * 1e-6 + waited

    monkeypatch.setattr(worker, "_try", calls)
    assert worker._seconds("it", 10) == pytest.approx(10 * gpu_us * 1e-6)
    assert worker._leads == leads


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


def test_a_driver_that_does_not_know_the_code_compiles_the_source(
    gpu: emulated_cuda.Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a Jetson Nano, whose driver is of CUDA 10.2, while the code was made by the compiler of CUDA 11.8."""
    gpu.fault("cuModuleLoadDataEx:1:200")
    assert checked("none", tmp_path)[0] <= 1
    # Without a compiler both reasons are told.
    library = built("none", tmp_path)
    monkeypatch.setattr(gpu_worker, "compile_source", no_compiler)
    gpu.fault("cuModuleLoadDataEx:1:209")
    with pytest.raises(ProgramError, match=r"NO_BINARY_FOR_GPU.*; the source cannot be compiled here either: no nvcc"):
        prepared().load("it", library)
    # What is wrong with a candidate itself is not tried again.
    gpu.fault("cuModuleLoadDataEx:1:2")
    gpu.forget_calls()
    with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        prepared().load("it", library)
    assert gpu.calls().count("cuModuleLoadDataEx") == 1


def no_compiler(*_: object) -> NoReturn:
    raise NoCompilerError("no nvcc")


def test_workers_of_cpus_stay_what_they_are() -> None:
    from toy_task import ToyTask

    assert type(worker_for(ToyTask())) is Worker
    assert not ToyTask().gpu
    assert (ToyTask().suffix, GpuToyTask().suffix) == (".so", ".zip")


def test_compilers_errors(gpu: emulated_cuda.Emulated, tmp_path: Path) -> None:
    with pytest.raises(CompileError):
        built("does not compile", tmp_path)


# ----------------------------------------------------------------------------------------------- builders and a runner


def test_what_the_driver_refuses_is_a_failure_in_its_words(
    gpu: emulated_cuda.Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task, library, large = GpuToyTask(), built("none", tmp_path), built("too many threads", tmp_path)
    gpu.forget_calls()
    with Measurer(OPTIONS) as measurer:
        # The first process finds all faults, one after another: its fourth allocation is the scratch memory's.
        monkeypatch.setenv("GF_CUDA_FAULT", "cuMemAlloc_v2:4:2,cuLaunchKernel:1:701,cuStreamSynchronize:2:719")
        measurer._measuring.start()
        process = measurer._measuring._process
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
        result = measurer.run(task, large)
        assert (result.status, "uses 2048 threads of a block" in result.message) == ("run", True), result
        results = measurer.compare(task, {"a": library, "b": library}, seed=3)
        assert [(result.status, len(result.runs)) for result in results.values()] == 2 * [("ok", OPTIONS.rounds)]
    # CUDA is used by the process that measures, and by no other.
    assert gpu.calls() == []


# ------------------------------------------------------------------------------------------------ this machine's GPU


def test_tuning_on_the_gpu_of_this_machine(
    gpu: emulated_cuda.Emulated,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gf_tvm.machine.cpu.usable_cores", lambda: 1)  # one builder has enough to do
    shapes = tmp_path / "shapes.json"
    fields = {"n": 1, "ci": 8, "co": 8, "h": 6, "w": 6, "kernel": 3, "padding": 1}
    shapes.write_text(json.dumps({"patches": [2], "cases": [fields]}))
    options = ["--shapes", str(shapes), "--kernels", "filter_input", "--logs", str(tmp_path), "--trials", "1"]
    assert main(["tune", "--device", "cuda", *options]) == 0
    assert "this GPU is emulated" in capsys.readouterr().out
    (path,) = (tmp_path / "sm_53").glob("*.jsonl")
    log = read_log(path)
    assert [record.status for record in log.records] == ["ok", "ok"]
    assert log.records[-1].kind == "winner"
    assert log.made["gpu"] == "Emulated Maxwell (sm_53)"
    assert (log.made["driver"], log.made["max_mhz"], log.made["threads"]) == ("10.2", 921.6, 1)
    assert "cpu" not in log.made
    # What was measured on no GPU must never count as if it had been.
    assert log.made["emulated"]
    assert all(record.emulated for record in log.records)


def test_what_cannot_be_tuned_is_said_before_anything_starts(
    gpu: emulated_cuda.Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match="threads are those of kernels on CPUs"):
        tune([small_workload()], "jetson-nano", logs=tmp_path, threads=2)
    with pytest.raises(TuningError, match="'metaschedule' is for CPUs"):
        tune([small_workload()], "jetson-nano", logs=tmp_path, space="metaschedule")
    with pytest.raises(DeviceError, match=r"'sm_90' cannot be .*: a GPU of sm_90 is wanted, .* Maxwell \(sm_53\)"):
        tune([small_workload()], "sm_90", logs=tmp_path)
    monkeypatch.setenv("GF_CUDA_DRIVER", "/no/such/libcuda.so")
    with pytest.raises(
        DeviceError, match="'jetson-nano' cannot be measured on this machine: no GPU can be used: no CU"
    ):
        tune([small_workload()], "jetson-nano", logs=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ a board

NANO = GpuInfo(name="X", arch="sm_53", driver="10.2", multiprocessors=1, max_mhz=1.0, memory_bytes=1, emulated=True)


def test_a_server_starts_on_what_it_was_said_to_be(
    gpu: emulated_cuda.Emulated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.forget_calls()
    for device in ("jetson-nano", "cuda", "sm_53"):
        assert check_device(device) == {**NANO, "name": "Emulated Maxwell", "max_mhz": 921.6, "memory_bytes": 4 << 30}
    assert check_device("host") is None
    assert gpu.calls() == []  # the server forks its sessions, and CUDA does not survive that
    serve = ["farm", "serve", "--key", "nano", "--tracker", "127.0.0.1:9", "--device"]
    for device, driver, words in (
        ("sm_90", str(gpu.path), "no sm_90: a GPU of sm_90 is wanted, this machine's is Emulated Maxwell (sm_53)"),
        ("jetson-nano", "/no/such/libcuda.so", "this machine is no jetson-nano: no GPU can be used: no CUDA driver"),
        ("rpi5", str(gpu.path), "unknown device 'rpi5'"),
    ):
        monkeypatch.setenv("GF_CUDA_DRIVER", driver)
        assert main([*serve, device]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "b measures with no GPU: start its server with gf-tvm farm serve --device DEVICE"),
        (GpuInfo(**{**NANO, "arch": "sm_72"}), "b measures with X (sm_72), what it is sent is for sm_53"),  # type: ignore[typeddict-item]
    ],
)
def test_a_board_without_the_gpu_says_so(tmp_path: Path, found: GpuInfo | None, words: str) -> None:
    session = BoardService(SessionContext("b", tmp_path, Counters(), Sensors(tmp_path), True, found))
    task = task_values(WorkloadTask(small_workload(), "jetson-nano"))
    assert json.loads(session.handle(json.dumps({"op": "hello", "options": asdict(OPTIONS)})))["done"]["gpu"] == found
    for request in ({"op": "prepare", "seed": 0}, {"op": "run", "file": "1.zip", "best": None}):
        assert json.loads(session.handle(json.dumps({**request, "task": task}))) == {
            "broken": words,
            "name": "b",
        }


def test_tuning_on_a_board_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The host compiles, and has no GPU; the board measures, and has no compiler."""
    there = emulated_cuda.variables()
    monkeypatch.setenv("GF_CUDA_NVRTC", there["GF_CUDA_NVRTC"])
    monkeypatch.setenv("GF_CUDA_DRIVER", "/no/such/libcuda.so")
    there["GF_CUDA_NVRTC"] = "/no/such/libnvrtc.so"
    task = TreacherousGpuTask(small_workload(), "jetson-nano")
    profile = get_profile("jetson-nano")
    with TrackerProcess() as tracker:
        nano = NativeBoard("nano-1", tracker.address, "nano", tmp_path, "--device", "jetson-nano", **there)
        with nano:
            (board,) = tracker.wait_for(1)
            assert board.info["device"] == "jetson-nano"
            assert board.info["gpu"]["arch"] == "sm_53"
            assert board.info["emulated"]
            main(["farm", "status", "--tracker", tracker.text])
            (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("nano-1"))
            assert "Emulated Maxwell (sm_53), CUDA 10.2" in line
            farm = FarmOptions(tracker.address, "nano")
            words = r"no board .* 'nano' has a GPU of sm_72: nano-1 measures with Emulated Maxwell \(sm_53\)"
            with pytest.raises(FarmError, match=words), FarmMeasurer(OPTIONS, farm, "a Xavier", None, "sm_72"):
                pass
            options = replace(OPTIONS, final=1)
            measurer = FarmMeasurer(options, farm, profile.description, None, "sm_53")
            trials = len(task.acts)
            tune_tasks([task], SearchOptions(trials=trials), logs=tmp_path / "logs", options=options, measurer=measurer)
            # The server tells once the session is over.
            assert wait_until(lambda: tracker.wait_for(1)[0].info["state"] == "free")
            served = tracker.wait_for(1)[0].info
    (path,) = (tmp_path / "logs" / "jetson-nano").glob("*.jsonl")
    log = read_log(path)
    assert log.made["gpu"] == profile.description
    assert log.made["emulated"]
    records = {task.acts[record.config["point"]]: record for record in log.records if record.kind == "trial"}  # type: ignore[index]
    assert {act: record.status for act, record in records.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "crash": "crash",
        "illegal address": "run",
        "hang": "timeout",
        "over the limits": "build",
    }
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in records["illegal address"].message
    assert "threads" in records["over the limits"].message
    # It was not sent to any board.
    assert records["over the limits"].board is None
    assert served["trials"] == trials - 1 + 1  # one was not sent; the final comparison has one more
    assert served["crashed_sessions"] == 0
    assert records["right"].board is not None
    assert records["right"].board["name"] == "nano-1"
    assert log.records[-1].kind == "winner"
    assert log.records[-1].emulated
