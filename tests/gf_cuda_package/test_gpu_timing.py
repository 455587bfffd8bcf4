"""Timing on a GPU: queueing, interleaving and limits on a simulated one; PyTorch's calls on a stand-in of torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from simulated_gpu import SimulatedGpu

from gf_cuda import rounds, timing
from gf_cuda.rounds import quantile
from gf_cuda.timing import GpuTiming, copy_bandwidth, gemm_peak, measure, precision
from gf_tvm.comparison.backend import Rotation
from gf_tvm.comparison.gpu import input_sets


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    monkeypatch.setattr(timing.time, "perf_counter", simulated.perf_counter)
    return simulated


def timed(gpu: SimulatedGpu, call: Callable[[], Any], repeats: int = 20, seconds: float = 0.1) -> GpuTiming:
    return measure(gpu, {"call": call}, repeats, seconds)["call"]


@pytest.mark.parametrize("device_ms", [0.004, 0.03, 0.2, 3.0])
def test_the_host_is_not_in_the_time(gpu: SimulatedGpu, device_ms: float) -> None:
    """Queueing takes 0.08 ms; the GPU's own time is found whether it is longer or shorter than that."""
    found = timed(gpu, gpu.work("short", device_ms, host_ms=0.08))
    assert found.median == pytest.approx(device_ms, rel=1e-3)
    assert found.quartiles == pytest.approx((device_ms, device_ms), rel=1e-3)
    assert found.host_us == pytest.approx(80, rel=0.01)
    assert not found.host_bound


def test_short_calls_share_a_sample(gpu: SimulatedGpu) -> None:
    assert timed(gpu, gpu.work("a", 0.001)).calls == timing.MAX_CALLS
    assert timed(gpu, gpu.work("a", 0.05)).calls == 5
    assert timed(gpu, gpu.work("a", 5.0)).calls == 1


def test_a_call_that_waits_for_the_gpu_is_named(gpu: SimulatedGpu) -> None:
    found = timed(gpu, gpu.work("blocking", 0.05, host_ms=0.1, blocking=True))
    assert found.host_bound
    assert found.median == pytest.approx(0.15, rel=0.1)  # there is no other time to be had
    waited = len(gpu.waits)
    gpu.log.clear()
    assert waited < 20  # and it is not tried again and again


def test_a_hiccup_of_the_host_is_measured_again(gpu: SimulatedGpu) -> None:
    normal = gpu.work("a", 0.05, host_ms=0.01)

    def call() -> None:
        normal()
        if len(gpu.log) == 30:
            gpu.now += 0.02

    found = timed(gpu, call, repeats=50)
    assert not found.host_bound
    assert found.quartiles == pytest.approx((0.05, 0.05), rel=1e-3)


def test_calls_are_interleaved_and_their_order_varies(gpu: SimulatedGpu) -> None:
    found = measure(gpu, {name: gpu.work(name, 1.0) for name in "abc"}, 30, 1.0)
    assert {t.repeats for t in found.values()} == {30}
    rounds = ["".join(gpu.log[i : i + 3]) for i in range(len(gpu.log) - 90, len(gpu.log), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) == 6


def test_slow_calls_get_fewer_samples_spread_over_the_run(gpu: SimulatedGpu) -> None:
    parts: list[float] = []
    found = measure(gpu, {"slow": gpu.work("slow", 100.0), "fast": gpu.work("fast", 1.0)}, 100, 2.0, parts.append)
    assert found["fast"].repeats == 100
    assert 5 <= found["slow"].repeats <= 10
    tail = gpu.log[-100 - found["slow"].repeats :]
    slow_at = [i for i, name in enumerate(tail) if name == "slow"]
    assert max(b - a for a, b in zip([0, *slow_at], [*slow_at, len(tail)], strict=True)) < 40
    assert parts == sorted(parts)
    assert parts[-1] == 1


def test_the_least_samples(gpu: SimulatedGpu) -> None:
    assert timed(gpu, gpu.work("a", 1.0), seconds=0.0).repeats == rounds.MIN_REPEATS
    assert timed(gpu, gpu.work("a", 1500.0), seconds=0.0).repeats == rounds.MIN_REPEATS_SLOW


def test_quantiles_are_those_of_the_standard_library() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.5, 9.0]
    expected = statistics.quantiles(values, n=4, method="inclusive")
    assert [quantile(values, part) for part in (0.25, 0.5, 0.75)] == pytest.approx(expected)
    assert quantile([7.0], 0.5) == 7.0


def test_rotation() -> None:
    seen: list[int] = []
    rotation = Rotation([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(5):
        rotation()
    assert seen == [0, 1, 2, 0, 1]


def test_inputs_rotate_only_if_they_fit_into_the_cache() -> None:
    assert input_sets(100 << 20, 256 << 10) == 1  # a Nano
    assert input_sets(40 << 20, 50 << 20) == 4
    assert input_sets(1, 50 << 20) == 8
    assert input_sets(0, 0) == 1


def test_limits(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated GPU of 1 TB/s and 10 TFLOP/s, whose small products are slow."""
    copy = torch.Tensor.copy_

    def copying(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        gpu.queue(2 * other.numel() * 4 / 1e12)
        return copy(self[:1], other[:1])

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        assert torch.backends.cuda.matmul.allow_tf32 is False
        size = len(a)
        gpu.queue(2 * size**3 / (10e12 if size >= 1024 else 2e12))
        return out

    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    monkeypatch.setattr(torch, "mm", product)
    assert copy_bandwidth(gpu, 1 << 20, 0.01) == pytest.approx(1000, rel=0.01)
    monkeypatch.undo()
    monkeypatch.setattr(timing.time, "perf_counter", gpu.perf_counter)
    monkeypatch.setattr(torch, "mm", product)
    assert gemm_peak(gpu, "float32", 0.01, largest=1024) == pytest.approx(10_000, rel=0.01)


def test_precision_puts_everything_back() -> None:
    def flags() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return (cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)

    before = flags()
    with precision(tf32=False):
        assert flags() == (True, False, False)
        with precision(tf32=True):
            assert flags() == (True, True, True)
        assert flags() == (True, False, False)
    with pytest.raises(ZeroDivisionError), precision(tf32=True):
        print(1 // 0)
    assert flags() == before


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeCuda.clock

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class FakeCuda:
    """torch.cuda of a GPU with 1 MHz: a million cycles are a second."""

    clock = 0.0
    Event = Event
    slept: ClassVar[list[int]] = []

    @classmethod
    def _sleep(cls, cycles: int) -> None:
        cls.slept.append(cycles)
        cls.clock += cycles / 1e3

    @staticmethod
    def synchronize(device: Any) -> None:
        assert device == torch.device("cuda", 1)

    mem_get_info = staticmethod(lambda device: (100, 200))
    memory_reserved = staticmethod(lambda device: 70)
    memory_allocated = staticmethod(lambda device: 50)
    max_memory_allocated = staticmethod(lambda device: 90)
    reset_peak_memory_stats = staticmethod(lambda device: None)


def test_calls_of_torch_cuda() -> None:
    gpu = timing.TorchGpu(1)
    gpu._torch = SimpleNamespace(cuda=FakeCuda)
    gpu.wait(0.25)
    gpu.wait(0.5)
    assert FakeCuda.slept == [1000, 1_000_000, 250_001, 500_001]  # calibrated once
    assert gpu.free_bytes() == 120
    assert gpu.peak_bytes(lambda: None) == 40
    first = gpu.record()
    FakeCuda.clock += 3
    assert gpu.elapsed_ms(first, gpu.record()) == 3
    assert gpu.passed(first)
