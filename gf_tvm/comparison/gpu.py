"""Comparing on an NVIDIA GPU: exact backward passes by cuDNN, times by CUDA events, memory and energy.

See :mod:`gf_cuda.timing` for how times are taken and :mod:`gf_cuda.meters` for joules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import gf_cuda
from gf_cuda import board, energy, meters, rounds, timing
from gf_cuda.exact import NO_TF32, WAYS, columns, out_of_memory, ways
from gf_cuda.timing import TorchGpu

from ..core.geometry import Geometry
from ..errors import DeviceError
from ..machine import cpu
from ..machine.profiles import DeviceProfile
from ..machine.timing import Timing
from ..shapes.cases import Case
from .backend import Backend, Call, CaseTimings, Rotation, variant_calls
from .convolutions import ComparisonError, Data, Variants, baseline_name, check_baseline, exact_backward
from .limits import copying
from .rows import GpuRow, Row

#: Seconds that each variant runs for its energy.
ENERGY_SECONDS = 1.5
REST_SECONDS = 2.0


@dataclass(frozen=True)
class GpuSetup:
    """The GPU at hand: what measures on it, what it is, and its meter (or why there is none)."""

    gpu: TorchGpu
    capability: tuple[int, int]
    l2_bytes: int
    description: dict[str, Any]
    meter: meters.Meter | None
    no_meter: str = ""


def require_cuda(profile: DeviceProfile) -> None:
    """Raise DeviceError where PyTorch cannot use a GPU; one line that says what is missing."""
    if torch.version.cuda is None:
        raise DeviceError(
            f"device {profile.name!r} needs a PyTorch with CUDA, because that is what is compared with; "
            f"torch {torch.__version__} was built without"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device {profile.name!r}: torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU that it can "
            "use; its driver is missing or too old, or CUDA_VISIBLE_DEVICES hides it"
        )


def open_gpu(measure_energy: bool | None = None) -> GpuSetup:
    """PyTorch's current GPU.

    Args:
        measure_energy: None: where there is a meter.

    Raises:
        DeviceError: no GPU, or energy was asked for and cannot be measured; the message is the reason.
    """
    ordinal = torch.cuda.current_device()
    try:
        device = gf_cuda.get_driver().device(ordinal)
    except gf_cuda.GfCudaError as error:
        raise DeviceError(f"no NVIDIA GPU can be used on this machine: {error}") from None
    meter, reason = None, "switched off"
    if measure_energy is not False:
        try:
            meter, reason = energy.find_meter(energy.pci_bus_id(ordinal)), ""
        except meters.NotMeasured as error:
            if measure_energy:
                raise DeviceError(f"energy cannot be measured here: {error}") from None
            reason = str(error)
    description = board.describe(device)
    if device.driver.emulated:
        description["emulated"] = True  # its times say nothing about a GPU
    return GpuSetup(TorchGpu(ordinal), device.capability, device.l2_bytes, description, meter, reason)


class CudaBackend(Backend):
    """PyTorch's current GPU. ``setup`` is what :func:`open_gpu` found."""

    def __init__(self, setup: GpuSetup) -> None:
        self._setup, self._gpu = setup, setup.gpu
        self._idle_watts: float | None = None
        self._fp16_gflops, self._best = 0.0, (0.0, 0.0)

    def available_bytes(self) -> int | None:
        return self._gpu.free_bytes()

    @contextmanager
    def running(self, threads: int | None) -> Iterator[int]:
        with super().running(threads) as used, timing.precision(tf32=False):
            self._gpu.synchronize()
            if self._setup.meter is not None:
                self._idle_watts = self._setup.meter.rest(REST_SECONDS)
            yield used

    def limits(self) -> tuple[float, float]:
        bandwidth = timing.copy_bandwidth(self._gpu, self._setup.l2_bytes)
        self._fp16_gflops = max(self._fp16_gflops, timing.gemm_peak(self._gpu, "float16"))
        self._best = max(self._best[0], timing.gemm_peak(self._gpu)), max(self._best[1], bandwidth)
        return self._best

    def data(self, case: Case) -> Data:
        return Data.random(case).to(self._gpu.device)

    def check_baseline(self, case: Case, data: Data) -> None:
        for way in ways(case.dtype, self._setup.capability):
            # One image is enough, and is there beside the whole batch.
            image = Data(data.x[:1], data.weight, data.grad_y[:1]).to(self._gpu.device, way.memory_format)
            with timing.precision(way.tf32):
                check_baseline(case, image, way.rounding)

    def time(
        self, data: Data, variants: Sequence[Variants], effort: tuple[int, float], progress: Callable[[float], None]
    ) -> CaseTimings:
        case, count = variants[0].case, input_sets(data.nbytes, self._setup.l2_bytes)
        copies = [data, *(data.to(self._gpu.device) for _ in range(count - 1))]
        calls, failures = self._exact_calls(copies, case)
        sets = [list(variants), *([variant.on(copy) for variant in variants] for copy in copies[1:])]
        calls.update(variant_calls(sets))
        measured = timing.measure(self._gpu, calls, *effort, progress)
        best = min((way.name for way in WAYS if way.name in measured), key=lambda name: measured[name].median)
        calls["baseline"], measured["baseline"] = calls[best], measured[best]
        shared = {
            "baselines": columns(measured, failures),
            "input_sets": count,
        }
        watched = self._watch(calls["baseline"], measured["baseline"])
        more = tuple(self._more(shared, watched, calls, measured, index) for index in range(len(variants)))
        times = {name: Timing(t.median, t.quartiles, t.repeats) for name, t in measured.items()}
        return CaseTimings(times, f"{baseline_name(data, case.geometry)} {best}", more)

    def row(self, row: Row, more: Mapping[str, Any]) -> Row:
        pooled = copying(row.saved_bytes_baseline + row.saved_bytes_gf_tvm, self._best[1])
        return GpuRow(**vars(row), **more, filter_input_roofline_ms=pooled)

    def machine(self) -> dict[str, Any]:
        return {**cpu.describe(), "gpu": self._setup.description}

    def versions(self) -> dict[str, str | None]:
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        return {
            **cpu.versions(),
            "cuda": torch.version.cuda,
            "cudnn": None if cudnn is None else str(cudnn),
            "driver_cuda": self._setup.description["driver_cuda"],
        }

    def conditions(self) -> dict[str, Any]:
        meter = self._setup.meter
        return {
            "statistic": "median of samples; quartiles (lower, upper)",
            "repeats": {"min": rounds.MIN_REPEATS, "min_slow": rounds.MIN_REPEATS_SLOW},
            "samples": f"CUDA events around as many calls as take {timing.SAMPLE_MS} ms, at most {timing.MAX_CALLS}, "
            "all queued before the first runs: the host's part is in host_us; where a call waits for the GPU that "
            "cannot be, and it is listed in host_bound",
            "order": "variants interleaved in one run, order shuffled in every round",
            "inputs": "rotated among input_sets sets, which together are three times the L2 cache where they can be; "
            "results of the call before may be in it",
            "outputs": "allocated in every call of every variant; gf_tvm_kernel_ms alone writes into existing ones",
            "gradients": "baseline and reference: grad_x, grad_W; gf_tvm: grad_x, grad_W, grad_b",
            "baseline": "the fastest of baselines, cudnn.benchmark on; channels_last: all its tensors are; all other "
            "variants: TF32 off",
            "saved_bytes": "what autograd keeps of the input: x or x~; the weights, kept by both, are not counted",
            "peak_bytes": "allocated by PyTorch during a call at most, results included",
            "limits": "copy bandwidth (read + write) by a copy on the device, peak by float32 torch.mm, TF32 off; best "
            "of start and end",
            "fp16_gemm_gflops": self._fp16_gflops,
            "energy": {
                "meter": None if meter is None else meter.name,
                "reason": self._setup.no_meter,
                "idle_watts": self._idle_watts,
                "seconds": ENERGY_SECONDS,
                "joules": "of one call, above idle power, which was measured before the run",
            },
            "advice": board.advice(),
        }

    def _exact_calls(self, copies: Sequence[Data], case: Case) -> tuple[dict[str, Call], dict[str, str]]:
        """Exact backward passes by name, and why others cannot run. Raises ComparisonError if none can."""
        calls: dict[str, Call] = {}
        failures: dict[str, str] = {}
        possible = ways(case.dtype, self._setup.capability)
        for channels_last in (False, True):
            same = [way for way in possible if way.channels_last is channels_last]
            try:
                inputs = copies
                if channels_last:
                    inputs = [copy.to(self._gpu.device, torch.channels_last) for copy in copies]
                for way in same:
                    call = Rotation([partial(_exact, one, case.geometry, way.tf32) for one in inputs])
                    call()
                    calls[way.name] = call
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._gpu.forget()
                failures.update({way.name: "out of memory" for way in same if way.name not in calls})
        if not calls:
            raise ComparisonError(f"case {case.name}: the exact backward pass does not fit into the GPU's memory")
        failures.update({way.name: NO_TF32 for way in WAYS if way not in possible})
        return calls, failures

    def _watch(self, call: Call, times: timing.GpuTiming) -> dict[str, Any]:
        """Memory, energy and the host's part of one variant."""
        joules = None
        if self._setup.meter is not None:
            seconds = max(times.median, times.host_us / 1e3) / 1e3
            try:
                joules, _ = meters.joules_a_step(
                    self._setup.meter, call, self._gpu.synchronize, seconds, ENERGY_SECONDS
                )
            except meters.NotMeasured as error:
                raise DeviceError(f"energy cannot be measured any more: {error}") from None
        return {
            "peak_bytes": self._gpu.peak_bytes(call),
            "joules": joules,
            "host_us": times.host_us,
            "host_bound": times.host_bound,
        }

    def _more(
        self,
        shared: dict[str, Any],
        baseline: dict[str, Any],
        calls: dict[str, Call],
        measured: dict[str, timing.GpuTiming],
        index: int,
    ) -> dict[str, Any]:
        """Further fields of one patch's row."""
        names = {
            "reference": f"reference {index}",
            "gf_tvm": f"gf_tvm {index}",
            "filter_input": f"filter_input {index}",
        }
        watched = {"baseline": baseline}
        for name, key in names.items():
            if key in calls:
                watched[name] = self._watch(calls[key], measured[key])
        fields: dict[str, Any] = {
            what: {name: values[what] for name, values in watched.items()}
            for what in ("peak_bytes", "joules", "host_us")
        }
        fields["host_bound"] = tuple(name for name, values in watched.items() if values["host_bound"])
        return {**shared, **fields}


def input_sets(nbytes: int, l2_bytes: int, most: int = 8) -> int:
    """How many sets of inputs of ``nbytes`` to rotate among: together three times the L2 cache, but at most 8."""
    return max(1, min(most, math.ceil(3.0 * l2_bytes / max(nbytes, 1))))


def _exact(data: Data, geometry: Geometry, tf32: bool) -> Any:
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, tf32
    try:
        return exact_backward(data.grad_y, data.x, data.weight, geometry)
    finally:
        cudnn.allow_tf32 = before
