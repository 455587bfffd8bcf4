"""A GPU with a queue, in simulated time: what :class:`gf_cuda.timing.TorchGpu` offers, without CUDA and waiting.

Host and device have a clock each. ``work(device_ms, host_ms)`` is a call that the host needs ``host_ms`` to queue
and the device ``device_ms`` to run; ``blocking`` calls return when the device has finished.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import gf_cuda.timing


class SimulatedGpu(gf_cuda.timing.TorchGpu):
    def __init__(self, ordinal: int = 0) -> None:
        self.device = torch.device("cpu")
        self.now = self.free_at = 0.0
        self.waits: list[float] = []
        self.log: list[str] = []
        self.allocated = 0
        self.peak = 0

    def perf_counter(self) -> float:
        self.now += 1e-7  # reading a clock takes time, so that loops until a moment end
        return self.now

    def queue(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds

    def work(self, name: str, device_ms: float, host_ms: float = 0.02, blocking: bool = False) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now += host_ms / 1e3
            self.queue(device_ms / 1e3)
            if blocking:
                self.synchronize()

        return call

    def record(self) -> Any:
        self.now += 1e-6
        return max(self.free_at, self.now)

    def passed(self, event: Any) -> bool:
        return bool(event <= self.now)

    def elapsed_ms(self, first: Any, last: Any) -> float:
        self.now = max(self.now, last)
        return float((last - first) * 1e3)

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.queue(seconds)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)

    def free_bytes(self) -> int:
        return 64 << 20

    def forget(self) -> None:
        self.log.append("forget")

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 1 << 20
