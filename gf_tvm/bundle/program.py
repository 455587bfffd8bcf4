"""What every program of a bundle is, before it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..core.workload import Workload
from ..machine.profiles import DeviceProfile


class Program(Protocol):
    """A function that is made of several kernels' work, as the backward pass of a chain; for CPUs."""

    @property
    def key(self) -> str:
        """What it computes: equal keys, equal functions."""

    def module(self, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
        """The IRModule of its function ``main``. ``config_of``: the best known point of a workload's space."""
