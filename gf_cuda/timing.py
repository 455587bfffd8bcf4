"""Times on a GPU by CUDA events, the two limits that no kernel beats, and the memory that a call takes.

A call of a few microseconds takes PyTorch longer to launch than the GPU to run. What is measured here is the GPU:
while a sample's calls are queued, the GPU is kept busy by a kernel that only waits, so they run one after another
without a gap. How long the host takes to queue a call is told besides.
"""

import math
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from . import rounds

#: Milliseconds of calls in a sample, at least: an event's time is right to half a microsecond.
SAMPLE_MS = 0.25
#: Calls in a sample, at most. The queue holds about a thousand launches, and a call may consist of twenty.
MAX_CALLS = 32
#: A sample that is queued more slowly than this (seconds) is not worth waiting for.
LONGEST_LEAD = 0.1
SHORTEST_LEAD = 2e-5

Call = Callable[[], Any]


class GpuTiming(NamedTuple):
    """One call on the GPU.

    ``median`` and ``quartiles`` (lower, upper) in milliseconds, of ``repeats`` samples of ``calls`` calls each;
    ``host_us``: microseconds that the host takes to queue a call. ``host_bound``: the GPU had to wait for the host,
    because the call waits for the GPU itself, so the time is not the GPU's alone.
    """

    median: float
    quartiles: Tuple[float, float]
    repeats: int
    calls: int
    host_us: float
    host_bound: bool


class TorchGpu:
    """What measuring needs of torch.cuda, on the current device and stream. Tests put another one in its place."""

    def __init__(self, ordinal: int = 0) -> None:
        import torch

        self._torch: Any = torch
        self.device = torch.device("cuda", ordinal)
        self._cycles_per_second = 0.0

    def record(self) -> Any:
        """An event behind everything that is in the queue."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, event: Any) -> bool:
        """Whether the GPU has got to this event."""
        return bool(event.query())

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """Waits for ``last``."""
        last.synchronize()
        return float(first.elapsed_time(last))

    def wait(self, seconds: float) -> None:
        """Put a kernel into the queue that does nothing for about so long."""
        if not self._cycles_per_second:
            for cycles in (1000, 1000000):  # the first call loads the kernel
                start = self.record()
                self._torch.cuda._sleep(cycles)
                took = self.elapsed_ms(start, self.record())
            self._cycles_per_second = 1e6 / max(took, 1e-3) * 1e3
        self._torch.cuda._sleep(int(seconds * self._cycles_per_second) + 1)

    def synchronize(self) -> None:
        self._torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """Memory that can be allocated, PyTorch's cache included."""
        if hasattr(self._torch.cuda, "mem_get_info"):
            free = int(self._torch.cuda.mem_get_info(self.device)[0])
        else:  # PyTorch 1.10 has no such function
            from .driver import get_driver

            self.synchronize()
            device = get_driver().device(self.device.index)
            device.activate()
            free = device.free_memory()[0]
        cached = self._torch.cuda.memory_reserved(self.device) - self._torch.cuda.memory_allocated(self.device)
        return free + int(cached)

    def forget(self) -> None:
        """Give cached memory back; for after an allocation that failed."""
        self._torch.cuda.empty_cache()

    def peak_bytes(self, call: Call) -> int:
        """Memory that a call allocates at most, results included, above what is allocated before."""
        self.synchronize()
        self._torch.cuda.reset_peak_memory_stats(self.device)
        before = int(self._torch.cuda.memory_allocated(self.device))
        result = call()
        self.synchronize()
        del result
        return int(self._torch.cuda.max_memory_allocated(self.device)) - before


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """cuDNN searches for its fastest algorithm (benchmark mode), and float32 products are rounded to TF32 or not."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32)

    def put(values: Sequence[bool]) -> None:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = values

    put((True, True, False, tf32, tf32))
    try:
        yield
    finally:
        put(before)


class _Sampler:
    """Takes samples of one call; finds out how many calls a sample needs and how long queueing them takes."""

    def __init__(self, gpu: TorchGpu, call: Call) -> None:
        self._gpu, self._call = gpu, call
        self.calls, self.host_bound, self._lead = 1, False, 0.0
        self.host_seconds: List[float] = []
        for _ in range(2):  # the first call compiles, loads and, in cuDNN, searches
            call()
        gpu.synchronize()
        self.seconds = self.sample() / 1e3
        if self.seconds < rounds.SLOW_SECONDS:
            self.seconds = min(self.seconds, self.sample() / 1e3)
        self.calls = max(1, min(MAX_CALLS, math.ceil(SAMPLE_MS / 1e3 / max(self.seconds, 1e-9))))
        self.sample()  # finds the lead for so many calls
        self.host_seconds = []

    def sample(self) -> float:
        """Milliseconds of a call."""
        for _ in range(4):
            took, host, late = self._try()
            if not late or self.host_bound:
                break
            # The GPU got there before the calls were all queued: let it wait longer, if that can help at all.
            self._lead = max(2 * self._lead, 1.5 * host, SHORTEST_LEAD)
            if self._lead > LONGEST_LEAD:
                self._lead, self.host_bound = 0.0, True
        else:
            self._lead, self.host_bound = 0.0, True
        self.host_seconds.append(host / self.calls)
        return took / self.calls

    def _try(self) -> Tuple[float, float, bool]:
        gpu = self._gpu
        gpu.synchronize()
        if self._lead:
            gpu.wait(self._lead)
        start = gpu.record()
        begin = time.perf_counter()
        for _ in range(self.calls):
            self._call()
        host = time.perf_counter() - begin
        late = gpu.passed(start)
        return gpu.elapsed_ms(start, gpu.record()), host, late

    @property
    def cost(self) -> float:
        """Seconds that a sample takes."""
        return self._lead + self.calls * max(self.seconds, min(self.host_seconds or [0.0]))


def measure(
    gpu: TorchGpu,
    calls: Mapping[str, Call],
    repeats: int = 100,
    seconds: float = 5.0,
    progress: Optional[Callable[[float], None]] = None,
) -> Dict[str, GpuTiming]:
    """Time several calls interleaved, so that they meet the same clocks and temperatures.

    Every call gets an equal part of ``seconds``; the order is shuffled in every round, with a fixed seed.

    Args:
        gpu: see :class:`TorchGpu`.
        calls: what to time, by name; results are dropped.
        repeats: samples of each at most, see :func:`gf_cuda.rounds.repeats_for`.
        seconds: for all calls together.
        progress: told the part of the rounds that is done, after each.
    """
    samplers = {name: _Sampler(gpu, call) for name, call in calls.items()}
    repeats_of = {}
    for name, sampler in samplers.items():
        repeats_of[name] = rounds.repeats_for(sampler.seconds, sampler.cost, seconds / len(calls), repeats)
    samples = rounds.interleaved(repeats_of, lambda name: samplers[name].sample(), progress)
    return {name: _timing(samples[name], sampler) for name, sampler in samplers.items()}


def _timing(values: Sequence[float], sampler: _Sampler) -> GpuTiming:
    lower, median, upper = (rounds.quantile(values, part) for part in (0.25, 0.5, 0.75))
    host_us = 1e6 * rounds.quantile(sampler.host_seconds, 0.5)
    return GpuTiming(median, (lower, upper), len(values), sampler.calls, host_us, sampler.host_bound)


def copy_bandwidth(gpu: TorchGpu, l2_bytes: int, seconds: float = 0.5) -> float:
    """GB/s (1e9 bytes) that a copy reads and writes together, between buffers far larger than the L2 cache.

    The best of the copies made in ``seconds``: a limit is the best that was seen, not the usual.
    """
    import torch

    nbytes = min(max(8 * l2_bytes, 256 << 20), 1 << 30, gpu.free_bytes() // 8)
    source = torch.ones(max(nbytes // 4, 1 << 18), dtype=torch.float32, device=gpu.device)
    target = torch.zeros_like(source)
    best = _best_ms(gpu, lambda: target.copy_(source), seconds)
    return 2 * source.numel() * 4 / best / 1e6


def gemm_peak(gpu: TorchGpu, dtype: str = "float32", seconds: float = 1.0, largest: int = 8192) -> float:
    """GFLOP/s of the fastest ``torch.mm`` of square matrices, TF32 off, made in about ``seconds``.

    The matrices grow to 8192 x 8192, or to what fits into the memory or one call can do in the time.
    """
    import torch

    size, peak = 512, 0.0
    generator = torch.Generator().manual_seed(0)  # not zeros or ones: those take less power, and a higher clock
    with precision(tf32=False):
        while True:
            numbers = torch.rand((size, size), generator=generator).to(gpu.device, getattr(torch, dtype))
            a, b, c = numbers, numbers.t().contiguous(), torch.empty_like(numbers)
            best = _best_ms(gpu, lambda: torch.mm(a, b, out=c), seconds / 5)  # noqa: B023 (called at once)
            peak = max(peak, 2 * size**3 / best / 1e6)
            nbytes = 3 * 4 * (2 * size) ** 2
            if 2 * size > largest or 8 * best / 1e3 > seconds or nbytes > gpu.free_bytes() // 2:
                return peak
            size *= 2


def _best_ms(gpu: TorchGpu, call: Call, seconds: float) -> float:
    sampler, end = _Sampler(gpu, call), time.perf_counter() + seconds
    best = min(sampler.sample() for _ in range(3))
    while time.perf_counter() < end:
        best = min(best, sampler.sample())
    return best
