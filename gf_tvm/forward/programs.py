"""Compiled forward passes, as :func:`gf_tvm.build` takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.workload import Workload
from ..machine.profiles import DeviceProfile
from .front import Front


@dataclass(frozen=True)
class FrontProgram:
    """One function of a bundle, see :class:`gf_tvm.bundle.program.Program`."""

    front: Front

    @property
    def key(self) -> str:
        """Equal for functions that do the same."""
        return self.front.key

    def module(self, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
        """The IRModule of the function ``main``; needs the compiler."""
        # Here, because whoever builds has TVM's compiler; a board that runs it need not.
        from .emit_front import emit_front

        return emit_front(self.front, profile)
