"""Programs: the compiled functions of chains, as :func:`gf_tvm.build` takes them.

What a function computes is plain data (:mod:`.compiled`, :mod:`.segment`), and its key is all that a library needs to
have it found. Only here is that data put together with the compiler's side, so that chains run without TVM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ...core.workload import Workload
from ...machine.profiles import DeviceProfile
from .compiled import Backward
from .segment import Segment


class Program(Protocol):
    """What :class:`gf_tvm.building.Program` says, for what is above and below it."""

    @property
    def key(self) -> str:
        """Equal for functions that do the same."""

    def module(self, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
        """The IRModule of the function ``main``; needs the compiler."""


@dataclass(frozen=True)
class ChainProgram:
    """One function of a bundle, see :class:`gf_tvm.building.Program`.

    Attributes:
        what: a chain's whole backward pass, or a segment of its forward pass.
    """

    what: Backward | Segment

    @property
    def key(self) -> str:
        """Equal for functions that do the same."""
        return self.what.key

    def module(self, profile: DeviceProfile, config_of: Callable[[Workload], dict[str, Any]]) -> Any:
        """The IRModule of the function ``main``; needs the compiler.

        ``config_of``: the best known point of a workload's space, for the products in a backward pass.
        """
        # Here, because whoever builds has TVM's compiler; a board that runs chains need not.
        if isinstance(self.what, Segment):
            from .emit_forward import forward_segment

            return forward_segment(self.what, profile)
        from .emit_backward import emit_backward

        return emit_backward(self.what, profile, config_of)
