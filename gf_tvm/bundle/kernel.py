"""What every loaded kernel is, whatever device it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.workload import ALIGNMENT, Workload


@dataclass(frozen=True)
class Kernel(ABC):
    """One compiled kernel.

    Attributes:
        workload: what it computes.
        schedule: "tuned" or "default".
        alignment: of its tensors' addresses, in bytes.
    """

    workload: Workload
    schedule: str
    function: Callable[..., None]
    alignment: int = ALIGNMENT

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> None:
        """Run on contiguous tensors of its device, inputs then outputs, written in place; no tensor is copied.

        Raises:
            GeometryError: a tensor begins at an address that the kernels' vector loads cannot take (a slice, say).
        """

    @abstractmethod
    def prepare(self, device: str | int | torch.device | None) -> None:
        """See :meth:`gf_tvm.Library.prepare`."""
