"""What ``python3 -m gf_cuda bench`` does: checks and measures backward kernels, and cuDNN beside them."""

import math
import os
import platform
import time
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from . import _bench_report as report
from . import board, energy, exact, meters, reference, rounds, timing
from .bundle import Bundle, Convolution, Kernel
from .driver import Device
from .errors import GfCudaError, NoDriverError
from .tensors import TensorKernel, tensor_kernel
from .timing import GpuTiming, TorchGpu

SCHEMA_VERSION = 1  # of gf-tvm compare --json
ENERGY_SECONDS = 1.5
REST_SECONDS = 2.0


class BenchSetup(NamedTuple):
    """What measuring needs: the GPU for PyTorch and for the driver, the meter or why there is none, and how long."""

    gpu: TorchGpu
    device: Device
    meter: Optional[meters.Meter]
    no_meter: str
    seconds: float
    repeats: int = 100


def open_setup(bundle: Bundle, ordinal: int, measure_energy: bool, seconds: float) -> BenchSetup:
    """The GPU, ready to be measured. Raises GfCudaError if PyTorch or the bundle cannot use it."""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise NoDriverError(f"PyTorch {torch.__version__} ({built}) cannot use a GPU, and cuDNN comes with it")
    device = bundle.check_device(ordinal)
    torch.cuda.set_device(ordinal)
    meter, reason = None, "switched off"
    if measure_energy:
        try:
            meter, reason = energy.find_meter(energy.pci_bus_id(ordinal)), ""
        except meters.NotMeasured as error:
            reason = str(error)
    return BenchSetup(TorchGpu(ordinal), device, meter, reason, seconds)


def bench(
    bundle: Bundle, setup: BenchSetup, only: Optional[str] = None, say: Callable[[str], None] = lambda text: None
) -> Dict[str, Any]:
    """Check and measure every backward kernel; returns the document for JSON.

    Args:
        bundle: with kernels ``backward``; those of ``filter_input`` for the same convolution are measured as well.
        setup: see :func:`open_setup`.
        only: a part of the key of the convolutions to measure.
        say: told what is done.

    Raises:
        GfCudaError: nothing to measure, a wrong result, or a kernel that fails.
    """
    kernels = [k for k in bundle.kernels if k.name == "backward" and (only is None or only in k.key)]
    if not kernels:
        what = "backward kernel" if only is None else f"backward kernel with {only!r} in its key"
        raise GfCudaError(f"{os.path.basename(bundle.path)} has no {what}")
    gpu, device = setup.gpu, setup.device
    with torch.no_grad(), timing.precision(tf32=False):
        say("the GPU's limits")
        limits = [(timing.gemm_peak(gpu), timing.copy_bandwidth(gpu, device.l2_bytes))]
        gpu.synchronize()
        idle = setup.meter.rest(REST_SECONDS) if setup.meter is not None else None
        measured = []
        for index, kernel in enumerate(kernels, start=1):
            say(f"{index}/{len(kernels)} {kernel.key}")
            pooling = bundle.find("filter_input", kernel.convolution, kernel.dtype)
            measured.append(_measure(kernel, pooling, setup))
            gpu.forget()  # the next one may need the memory
        limits.append((timing.gemm_peak(gpu), timing.copy_bandwidth(gpu, device.l2_bytes)))
    peak, bandwidth = (max(values) for values in zip(*limits))
    rows = [dict(row, device=bundle.device, **report.limits(row, kernel, peak, bandwidth)) for kernel, row in measured]
    cudnn: Optional[int] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": {"cpu": platform.processor() or platform.machine(), "gpu": board.describe(device)},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "cudnn": None if cudnn is None else str(cudnn),
        },
        "peak_gflops": peak,
        "bandwidth_gbs": bandwidth,
        "conditions": _conditions(bundle, setup, idle),
        "rows": rows,
        "geometric_means": report.geometric_means(rows),
    }


def _measure(kernel: Kernel, pooling: Optional[Kernel], setup: BenchSetup) -> Tuple[Kernel, Dict[str, Any]]:
    at, gpu = kernel.convolution, setup.gpu
    ours = tensor_kernel(kernel)
    inputs, worst = _check(ours, at, gpu)
    grad_y, saved, weight = (inputs[name] for name in ("grad_y", "filtered_x", "weight"))
    x = torch.randn((at.n, at.ci, at.h, at.w), device=gpu.device).to(grad_y.dtype)

    def allocate() -> Tuple[Tensor, ...]:
        make = torch.empty_like if kernel.covers_input else torch.zeros_like
        return make(x), torch.empty_like(weight), weight.new_empty(at.co)

    def into(outputs: Tuple[Tensor, ...]) -> None:
        ours(grad_y, saved, weight, *outputs)

    calls, failures = _exact_calls(grad_y, x, weight, kernel, setup)
    outputs = allocate()
    calls["gf_tvm"] = lambda: into(allocate())
    calls["kernel"] = lambda: into(outputs)
    if pooling is not None:
        pool = tensor_kernel(pooling)
        calls["filter_input"] = lambda: pool(x, torch.empty_like(saved))
    times = timing.measure(gpu, calls, setup.repeats, setup.seconds)
    best = min((way.name for way in exact.WAYS if way.name in times), key=lambda name: times[name].median)
    watched = {
        name: _watch(calls[key], times[key], setup)
        for name, key in (("baseline", best), ("gf_tvm", "gf_tvm"), ("filter_input", "filter_input"))
        if key in times
    }
    row: Dict[str, Any] = {
        "name": f"{at.ci}-{at.co}x{at.h}x{at.w}",
        "dtype": kernel.dtype,
        **at._asdict(),
        "baseline": f"{exact.implementation(x, weight, at)} {best}",
        "reference_ms": None,
        "reference_ms_quartiles": None,
        "gf_tvm_kernel_ms": times["kernel"].median,
        "gf_tvm_kernel_ms_quartiles": times["kernel"].quartiles,
        "schedule": kernel.schedule,
        "filter_input_schedule": pooling.schedule if pooling else None,
        "saved_bytes_baseline": x.numel() * x.element_size(),
        "saved_bytes_gf_tvm": saved.numel() * saved.element_size(),
        "max_rel_error": worst,
        "repeats": {"baseline": times[best].repeats, "gf_tvm": times["gf_tvm"].repeats},
        "layers": [],
        "baselines": exact.columns(times, failures),
        "input_sets": 1,
        "host_bound": [name for name, values in watched.items() if values["host_bound"]],
    }
    for name, key in (("baseline", best), ("gf_tvm", "gf_tvm"), ("filter_input", "filter_input")):
        row[f"{name}_ms"] = times[key].median if key in times else None
        row[f"{name}_ms_quartiles"] = times[key].quartiles if key in times else None
    for what in ("peak_bytes", "joules", "host_us"):
        row[what] = {name: values[what] for name, values in watched.items()}
    return kernel, row


def _check(ours: TensorKernel, at: Convolution, gpu: TorchGpu) -> Tuple[Dict[str, Tensor], float]:
    """Inputs on the GPU, and the largest error relative to a result's largest value. Raises WrongResult."""
    specs = {name: (shape, dtype) for name, shape, dtype in ours.arguments}
    names = [argument.name for argument in ours.kernel.program.arguments if not argument.output]
    host = reference.random_inputs({name: specs[name] for name in names}, seed=0)
    inputs = {name: tensor.to(gpu.device, copy=True) for name, tensor in host.items()}
    found = {name: _poisoned(name, spec, at).to(gpu.device) for name, spec in specs.items() if name not in inputs}
    tensors = dict(inputs, **found)
    ours(*(tensors[name] for name, _, _ in ours.arguments))
    gpu.synchronize()
    worst = _Worst(ours.kernel.key)
    for key, output, want in reference.compared("backward", at, host, found):
        worst.add(key, output, want)
    return inputs, worst.error


def _poisoned(name: str, spec: Tuple[Tuple[int, ...], torch.dtype], at: Convolution) -> Tensor:
    """NaN, but zero where the kernel does not write, which is the caller's part."""
    tensor = torch.full(spec[0], math.nan).to(spec[1])
    return tensor.masked_fill_(~reference.covered(at), 0) if name == "grad_x" else tensor


class _Worst:
    """The largest error so far."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.error = 0.0

    def add(self, name: str, output: Tensor, want: reference.Expected) -> None:
        excess = reference.excess(output, want)
        if not excess <= 1:
            raise exact.WrongResult(
                f"{self._key}: {name} is wrong, so it was not timed: an error is {excess:.3g} times what float32 sums "
                "and the storage explain"
            )
        scale = float(want.value.abs().max())
        if scale:
            self.error = max(self.error, float((output.double() - want.value).abs().max()) / scale)


def _exact_calls(
    grad_y: Tensor, x: Tensor, weight: Tensor, kernel: Kernel, setup: BenchSetup
) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Exact backward passes by name, checked on one image, and why others cannot run."""
    at, calls, failures = kernel.convolution, {}, {}
    possible = exact.ways(kernel.dtype, setup.device.capability)
    failures = {way.name: exact.NO_TF32 for way in exact.WAYS if way not in possible}
    for way in possible:
        try:
            tensors = [t.contiguous(memory_format=way.memory_format) for t in (grad_y, x, weight)]
            exact.check(tensors, at, way, kernel.key)
            call = exact.backward(tensors[0], tensors[1], tensors[2], at, way.tf32)
            call()
            calls[way.name] = call
        except RuntimeError as error:
            if not exact.out_of_memory(error):
                raise
            tensors = []
            setup.gpu.forget()
            failures[way.name] = "out of memory"
    if not calls:
        raise GfCudaError(f"{kernel.key}: the exact backward pass does not fit into the GPU's memory")
    return calls, failures


def _watch(call: Callable[[], Any], times: GpuTiming, setup: BenchSetup) -> Dict[str, Any]:
    """Memory, energy and the host's part of one variant."""
    joules = None
    if setup.meter is not None:
        seconds = max(times.median, times.host_us / 1e3) / 1e3
        joules, _ = meters.joules_a_step(setup.meter, call, setup.gpu.synchronize, seconds, ENERGY_SECONDS)
    peak = setup.gpu.peak_bytes(call)
    return {"peak_bytes": peak, "joules": joules, "host_us": times.host_us, "host_bound": times.host_bound}


def _conditions(bundle: Bundle, setup: BenchSetup, idle: Optional[float]) -> Dict[str, Any]:
    meter = setup.meter
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "measured_by": "python3 -m gf_cuda bench",
        "seconds_per_convolution": setup.seconds,
        "other_cores": None,
        "statistic": "median of samples; quartiles (lower, upper)",
        "repeats": {"min": rounds.MIN_REPEATS, "min_slow": rounds.MIN_REPEATS_SLOW, "max": setup.repeats},
        "inputs": "the same in every call",
        "gradients": "baseline: grad_x, grad_W; gf_tvm: grad_x, grad_W, grad_b",
        "baseline": "the fastest of baselines, cudnn.benchmark on",
        "limits": "copy bandwidth (read + write), float32 torch.mm with TF32 off; best of start and end",
        "energy": {
            "meter": None if meter is None else meter.name,
            "reason": setup.no_meter,
            "idle_watts": idle,
            "seconds": ENERGY_SECONDS,
            "joules": "of one call, above idle power, which was measured before",
        },
        "advice": board.advice(),
        "library": {"file": os.path.basename(bundle.path), "sha256": bundle.digest},
    }
