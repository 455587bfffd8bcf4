"""gf-tvm compare on a GPU: a simulated one whose memory is the CPU's, and whose kernels are the reference.

What PyTorch and cuDNN do on a real GPU is not tested here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_library import FakeLibrary
from simulated_gpu import SimulatedGpu
from torch import Tensor

import gf_cuda
from gf_cuda import board, energy, meters, timing
from gf_cuda import exact as exact_module
from gf_tvm.comparison import convolutions as variants
from gf_tvm.comparison import gpu as gpu_comparison
from gf_tvm.comparison import run as comparison
from gf_tvm.comparison.convolutions import ComparisonError, Data, exact_backward
from gf_tvm.comparison.gpu import GpuSetup
from gf_tvm.comparison.rows import GpuRow
from gf_tvm.comparison.run import compare
from gf_tvm.core.geometry import Geometry
from gf_tvm.errors import DeviceError
from gf_tvm.machine import profiles as devices
from gf_tvm.runners import compare as command
from gf_tvm.runners.cli import main
from gf_tvm.shapes import Case

SMALL = Geometry(2, 4, 6, 9, 8, (3, 3), (2, 2), padding=(1, 1))
CASE = Case("small", SMALL)

#: Milliseconds that the simulated GPU takes.
EXACT = {"contiguous": 8.0, "contiguous tf32": 6.0, "channels_last": 4.0, "channels_last tf32": 2.0}
PLAIN, POOLING, KERNEL = 1.0, 0.4, 0.5


class Scheduled:
    """A kernel of a library, on the simulated GPU."""

    schedule = "tuned"

    def __init__(self, kernel: Any, gpu: SimulatedGpu) -> None:
        self.kernel, self.gpu = kernel, gpu
        self.spoil: Callable[..., None] = lambda *tensors: None

    def __call__(self, *tensors: Tensor) -> None:
        self.gpu.work(f"{self.kernel.name} {tensors[0].data_ptr()}", KERNEL)()
        self.kernel(*tensors)
        self.spoil(*tensors)


class Library(FakeLibrary):
    path, device = Path("somewhere/fake.gfb"), "sm_80"
    gpu: SimulatedGpu
    spoil: Callable[..., None] | None = None

    def find(self, kernel: str, geometry: Geometry, dtype: str) -> Any:
        found = super().find(kernel, geometry, dtype)
        if found is None:
            return None
        scheduled = Scheduled(found, self.gpu)
        if self.spoil and kernel == "backward":
            scheduled.spoil = self.spoil
        return scheduled


class Meter(meters.Meter):
    """2 W at rest, 10 W while the simulated GPU works."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__("fake meter", "gpu")
        self.gpu = gpu

    def rest(self, seconds: float = 2.0) -> float:
        self.idle_watts = {"gpu": 2.0}
        return 2.0

    def _over(self, run: Callable[[], None]) -> tuple[dict[str, float], float, int]:
        begin = self.gpu.now
        run()
        seconds = self.gpu.now - begin
        return {"gpu": 10.0 * seconds}, seconds, 2


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()

    def exact(grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        last = not x.is_contiguous()
        assert grad_y.is_contiguous() is not last
        assert x.is_contiguous(memory_format=torch.channels_last) is last
        way = ("channels_last" if last else "contiguous") + (" tf32" if torch.backends.cudnn.allow_tf32 else "")
        simulated.queue(EXACT[way] / 1e3)
        return exact_backward(grad_y, x, weight, geometry)

    def queued(method: Any, milliseconds: float) -> Any:
        def call(self: Any) -> Any:
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
            if not (method.__name__ == "filter_input" and self.pooling):
                simulated.queue(milliseconds / 1e3)
            return method(self)

        return call

    monkeypatch.setattr(gpu_comparison, "exact_backward", exact)
    monkeypatch.setattr(variants.Variants, "plain_backward", queued(variants.Variants.plain_backward, PLAIN))
    monkeypatch.setattr(variants.Variants, "filter_input", queued(variants.Variants.filter_input, POOLING))
    monkeypatch.setattr(timing.time, "perf_counter", simulated.perf_counter)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda gpu, l2_bytes: 1000.0)
    monkeypatch.setattr(timing, "gemm_peak", lambda gpu, dtype="float32": 10_000.0 if dtype == "float32" else 80_000.0)
    monkeypatch.setattr(gpu_comparison, "require_cuda", lambda profile: None)
    monkeypatch.setattr(gpu_comparison, "ENERGY_SECONDS", 0.01)
    monkeypatch.setattr(devices, "runs_here", lambda profile: True)
    install(monkeypatch, simulated)
    return simulated


def install(monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, **other: Any) -> None:
    description = {"name": "Simulated GPU", "arch": "sm_80", "driver_cuda": "12.4"}
    fields = {"capability": (8, 0), "l2_bytes": 1 << 10, "description": description, "meter": Meter(gpu)}
    made = GpuSetup(gpu, **{**fields, **other})
    monkeypatch.setattr(gpu_comparison, "open_gpu", lambda energy=None: made)


def library(gpu: SimulatedGpu, spoil: Callable[..., None] | None = None) -> Any:
    made = Library()
    made.gpu, made.spoil = gpu, spoil
    return made


def row_of(cases: list[Case], library: Any = None) -> GpuRow:
    (row,) = compare(cases, library, "sm_80", repeats=5, seconds=0.0).rows
    assert isinstance(row, GpuRow)
    return row


def test_a_row(gpu: SimulatedGpu) -> None:
    before = torch.backends.cudnn.allow_tf32
    result = compare([CASE], library(gpu), "sm_80", repeats=5, seconds=0.0)
    document = json.loads(json.dumps(result.to_dict()))
    (row,) = document["rows"]
    assert document["schema_version"] == comparison.SCHEMA_VERSION
    assert {name: column["ms"] for name, column in row["baselines"].items()} == pytest.approx(EXACT, rel=1e-2)
    assert row["baseline"].endswith(" channels_last tf32")
    assert row["baseline_ms"] == pytest.approx(2.0, rel=1e-2)
    assert row["reference_ms"] == pytest.approx(PLAIN, rel=1e-2)
    assert row["gf_tvm_ms"] == pytest.approx(KERNEL, rel=1e-2)
    assert row["gf_tvm_kernel_ms"] == pytest.approx(KERNEL, rel=1e-2)
    assert row["gf_tvm_kernel_ms_quartiles"] == pytest.approx([KERNEL, KERNEL], rel=1e-2)
    assert row["filter_input_ms"] == pytest.approx(KERNEL, rel=1e-2)
    assert row["schedule"] == "tuned"
    assert set(row["peak_bytes"]) == {"baseline", "reference", "gf_tvm", "filter_input"}
    assert row["host_bound"] == []
    assert row["host_us"]["gf_tvm"] == pytest.approx(20, rel=0.1)
    # 8 W above idle
    assert row["joules"]["baseline"] == pytest.approx(8 * 2e-3, rel=0.05)
    assert row["joules"]["gf_tvm"] == pytest.approx(8 * KERNEL / 1e3, rel=0.15)
    moved = row["saved_bytes_baseline"] + row["saved_bytes_gf_tvm"]
    assert row["filter_input_roofline_ms"] == pytest.approx(moved / 1e9)
    assert (row["limit_ms"], row["limit"]) == (row["roofline_ms"], row["roofline"])
    assert row["fraction_of_limit"] == row["limit_ms"] / row["gf_tvm_ms"]
    assert (document["peak_gflops"], document["bandwidth_gbs"]) == (10_000.0, 1000.0)
    assert document["machine"]["gpu"]["name"] == "Simulated GPU"
    assert result.device_name == "Simulated GPU"
    assert document["versions"]["driver_cuda"] == "12.4"
    conditions = document["conditions"]
    assert conditions["repeats"]["max"] == 5
    assert conditions["fp16_gemm_gflops"] == 80_000.0
    assert conditions["energy"]["meter"] == "fake meter"
    assert conditions["energy"]["idle_watts"] == 2.0
    assert conditions["library"]["file"] == "fake.gfb"
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_gpu_without_tf32(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu, capability=(5, 3))
    row = row_of([CASE])
    assert row.baseline_ms == pytest.approx(4.0, rel=1e-2)
    assert row.baselines["contiguous tf32"] == {"ms": None, "reason": "no TF32 for this dtype or GPU"}
    assert row.baselines["channels_last tf32"]["ms"] is None


def test_float16_has_no_tf32(gpu: SimulatedGpu) -> None:
    row = row_of([replace(CASE, dtype="float16")], library(gpu))
    assert row.baseline.endswith(" channels_last")
    assert row.baselines["contiguous tf32"]["ms"] is None
    assert row.gf_tvm_ms == pytest.approx(KERNEL, rel=1e-2)


def test_what_does_not_fit_is_left_out(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_comparison.exact_backward

    def exact(grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if not x.is_contiguous():
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return right(grad_y, x, weight, geometry)

    monkeypatch.setattr(gpu_comparison, "exact_backward", exact)
    row = row_of([CASE])
    assert row.baselines["channels_last"] == {"ms": None, "reason": "out of memory"}
    assert row.baseline_ms == pytest.approx(6.0, rel=1e-2)
    assert "forget" in gpu.log

    def never(*arguments: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(gpu_comparison, "exact_backward", never)
    with pytest.raises(ComparisonError, match="case small: the exact backward pass does not fit"):
        row_of([CASE])
    monkeypatch.setattr(gpu_comparison, "exact_backward", lambda *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # nothing else is swallowed
        row_of([CASE])


def test_a_wrong_kernel_is_refused_before_anything_is_timed(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda *arguments: pytest.fail("was timed"))
    with pytest.raises(ComparisonError, match="case small R2: grad_W of gf_tvm is wrong"):
        row_of([CASE], library(gpu, lambda *tensors: tensors[-2].mul_(1.01) if len(tensors) > 2 else None))


@pytest.mark.parametrize(("factor", "refused"), [(1.0005, "only without tf32"), (1.01, "always")])
def test_a_wrong_baseline_is_refused(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, factor: float, refused: str
) -> None:
    """TF32 has errors of its own size, and no others."""

    def exact(grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        grad_x, grad_w = exact_backward(grad_y, x, weight, geometry)
        wrong = x.dtype != torch.float64 and torch.backends.cudnn.allow_tf32
        return grad_x, grad_w * factor if wrong else grad_w

    monkeypatch.setattr(variants, "exact_backward", exact)
    if refused == "always":
        with pytest.raises(ComparisonError, match="grad_W of the exact backward is wrong"):
            row_of([CASE])
    else:
        row_of([CASE])
        monkeypatch.setattr(exact_module, "TF32_ERROR", 0.0)
        with pytest.raises(ComparisonError, match="grad_W of the exact backward is wrong"):
            row_of([CASE])


def test_inputs_that_fit_into_the_cache_rotate(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the cache: the addresses that kernels see take turns."""
    nbytes = Data.random(CASE).nbytes
    install(monkeypatch, gpu, l2_bytes=nbytes)
    row = row_of([CASE], library(gpu))
    assert row.input_sets == 3
    seen = [name for name in gpu.log if name.startswith("backward ")]
    assert len(set(seen)) == 3
    install(monkeypatch, gpu, l2_bytes=nbytes // 10)
    assert row_of([CASE]).input_sets == 1


def test_without_kernels_plain_operators_count(gpu: SimulatedGpu) -> None:
    row = row_of([CASE])
    assert row.schedule == "torch"
    assert row.gf_tvm_ms == row.reference_ms == pytest.approx(PLAIN, rel=1e-2)
    assert "gf_tvm" not in row.joules
    assert row.filter_input_ms == pytest.approx(POOLING, rel=1e-2)


def test_no_meter_is_no_error_unless_asked_for(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu, meter=None, no_meter="no NVML")
    result = compare([CASE], None, "sm_80", repeats=5, seconds=0.0)
    row = result.rows[0]
    assert isinstance(row, GpuRow)
    assert set(row.joules.values()) == {None}
    assert result.conditions["energy"]["reason"] == "no NVML"


def test_opening_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(
        name="GPU", arch="sm_80", capability=(8, 0), multiprocessors=1, total_memory=1, l2_bytes=7, clock_khz=1000,
        driver=SimpleNamespace(version=12040, emulated=False),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gf_cuda, "get_driver", lambda: SimpleNamespace(device=lambda ordinal: device))

    def no_meter(bus_id: str | None) -> None:
        raise meters.NotMeasured("no NVML")

    monkeypatch.setattr(energy, "find_meter", no_meter)
    opened = gpu_comparison.open_gpu()
    assert (opened.meter, opened.no_meter, opened.l2_bytes) == (None, "no NVML", 7)
    assert opened.description["driver_cuda"] == "12.4"
    assert "emulated" not in opened.description
    assert gpu_comparison.open_gpu(False).no_meter == "switched off"
    device.driver.emulated = True
    assert gpu_comparison.open_gpu().description["emulated"] is True
    with pytest.raises(DeviceError, match="energy cannot be measured here: no NVML"):
        gpu_comparison.open_gpu(True)

    def no_driver() -> None:
        raise gf_cuda.GfCudaError("no CUDA driver")

    monkeypatch.setattr(gf_cuda, "get_driver", no_driver)
    with pytest.raises(DeviceError, match="no CUDA driver"):
        gpu_comparison.open_gpu()


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, available, said in (
        (None, False, "needs a PyTorch with CUDA.*was built without"),
        ("12.4", False, "finds no GPU that it can use"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        with pytest.raises(DeviceError, match=said) as caught:
            compare([CASE], device="jetson-nano")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "runs_here", lambda profile: False)
    monkeypatch.setattr(devices, "present_gpu", lambda: "sm_90")
    with pytest.raises(DeviceError, match=r"device 'jetson-nano' .* is not this machine's GPU \(sm_90\)"):
        compare([CASE], device="jetson-nano")
    monkeypatch.setattr(devices, "runs_here", lambda profile: True)
    with pytest.raises(DeviceError, match="energy is measured on GPUs only"):
        compare([CASE], device="x86-64-v3", energy=True)


def test_the_command_prints_and_writes(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_library", lambda *arguments: (Path("gpu.gfb"), None))
    monkeypatch.setattr("gf_tvm.bundle.library.load", lambda path: library(gpu))
    Path("shapes.json").write_text(
        json.dumps({"n": 2, "kernel": 3, "padding": 1, "cases": [{"name": "small", "ci": 4, "co": 6, "h": 9, "w": 8}]})
    )
    words = ["compare", "--device", "sm_80", "--shapes", "shapes.json", "--patch", "2", "--dtype", "float32,float16"]
    assert main([*words, "--seconds", "0", "--json", "rows.json", "--plot", "rows.png"]) == 0
    out = capsys.readouterr().out
    for text in (
        *("Simulated GPU, allocator: ", "copying: 1000.0 GB/s", "the fastest of those below", "small float16"),
        *("joules above idle (fake meter)", "Not measured: channels_last tf32: no TF32"),
        "geometric mean of 1 R2 float16 rows",
    ):
        assert text in out, text
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "float16"]
    assert Path("rows.png").stat().st_size
    install(monkeypatch, gpu, meter=None, no_meter="no NVML")
    assert main([*words, "--seconds", "0"]) == 0
    assert "energy not measured (no NVML)" in capsys.readouterr().out
    assert main([*words[:-1], "float8", "--seconds", "0"]) == 2
    assert "got 'float8'" in capsys.readouterr().err


def test_a_description_of_a_jetson(tmp_path: Path) -> None:
    assert (board.board(str(tmp_path)), board.l4t(str(tmp_path)), board.clocks(str(tmp_path))) == (None, None, None)
    assert board.advice(str(tmp_path)) is None
    for name, text in {
        "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64\n",
        "sys/class/devfreq/57000000.gpu/cur_freq": "76800000\n",
        "sys/class/devfreq/57000000.gpu/min_freq": "76800000\n",
        "sys/class/devfreq/57000000.gpu/max_freq": "921600000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    root = str(tmp_path)
    assert board.board(root) == "NVIDIA Jetson Nano Developer Kit"
    assert board.l4t(root) == "32.7.1"
    assert board.clocks(root) == {"now": 76.8, "lowest": 76.8, "highest": 921.6}
    assert "between 77 and 922 MHz: sudo nvpmodel -m 0 && sudo jetson_clocks" in str(board.advice(root))
    (tmp_path / "sys/class/devfreq/57000000.gpu/min_freq").write_text("921600000\n")
    assert board.advice(root) is None
