"""What comparing needs of a device: its limits, a clock, the exact backward passes it has, what else is measured.

CPUs are in :mod:`gf_tvm.comparison.cpu`, GPUs in :mod:`gf_tvm.comparison.gpu`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..machine import cpu
from ..machine.timing import Timing
from ..shapes.cases import Case
from .convolutions import Data, Variants
from .rows import Row

if TYPE_CHECKING:
    from ..bundle.library import Library

Call = Callable[[], Any]


@dataclass(frozen=True)
class CaseTimings:
    """What was measured of one convolution with all of its patches.

    Attributes:
        times: "baseline", and "reference i", "filter_input i", "gf_tvm i", "kernel i" of the patch with index i.
        baseline: which implementation of the exact backward pass that is.
        more: for each patch, what :meth:`Backend.row` needs besides.
    """

    times: dict[str, Timing]
    baseline: str
    more: tuple[dict[str, Any], ...]


class Backend(ABC):
    """One kind of device."""

    #: Sets of results that are held at once while they are compared with float64.
    results = 2

    #: Whether the limits are timed in the rounds of the cases; else they are measured before and after everything.
    limits_in_rounds = False

    @abstractmethod
    def available_bytes(self) -> int | None:
        """Memory that can be allocated; None where the system does not say."""

    @contextmanager
    def running(self, threads: int | None) -> Iterator[int]:
        """Set up what holds for the whole run; yields the number of CPU threads."""
        with cpu.torch_threads(threads) as used, torch.no_grad():
            yield used

    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """GFLOP/s of a float32 matrix product, GB/s of a copy (read + write), as far as is known by now."""

    @abstractmethod
    def data(self, case: Case) -> Data:
        """Random inputs, where the device finds them."""

    @abstractmethod
    def check_baseline(self, case: Case, data: Data) -> None:
        """Compare the exact backward pass with float64. Raises ComparisonError."""

    def variants(self, case: Case, data: Data, library: Library | None) -> Variants:
        """What is timed of one case."""
        return Variants(case, data, library)

    @abstractmethod
    def row(self, row: Row, more: Mapping[str, Any]) -> Row:
        """A row with what else the backend measured: ``more`` is the patch's part of :attr:`CaseTimings.more`."""

    @abstractmethod
    def time(
        self, data: Data, variants: Sequence[Variants], effort: tuple[int, float], progress: Callable[[float], None]
    ) -> CaseTimings:
        """Time one convolution's checked variants (one for each patch), ``effort`` being repeats and seconds."""

    def machine(self) -> dict[str, Any]:
        """What the machine is."""
        return cpu.describe()

    def versions(self) -> dict[str, str | None]:
        """Versions of what decides a time."""
        return cpu.versions()

    @abstractmethod
    def conditions(self) -> dict[str, Any]:
        """How was measured, as far as it depends on the kind of device; called after the run."""


def variant_calls(sets: Sequence[Sequence[Variants]]) -> dict[str, Call]:
    """The calls to time once per patch; the names end in the patch's index.

    Args:
        sets: for each set of inputs, one variant per patch; the calls go from set to set.
    """
    calls: dict[str, Call] = {}
    outputs = None
    for index in range(len(sets[0])):
        own = [variants[index] for variants in sets]
        calls[f"reference {index}"] = _rotate([variant.plain_backward for variant in own])
        calls[f"filter_input {index}"] = _rotate([variant.filter_input for variant in own])
        if own[0].backward:
            if outputs is None:  # their shapes do not depend on the patch
                outputs = [variant.kernel_backward() for variant in own]
            calls[f"gf_tvm {index}"] = _rotate([variant.kernel_backward for variant in own])
            calls[f"kernel {index}"] = _rotate(
                [partial(variant.kernel_backward, into) for variant, into in zip(own, outputs, strict=True)]
            )
        for name in own[0].others:
            others = [variant.others[name] for variant in own]
            calls[f"{name} {index}"] = _rotate([other.backward for other in others])
            pools = [other.filter_input for other in others if other.filter_input]
            if pools:
                calls[f"{name} filter_input {index}"] = _rotate(pools)
    return calls


class Rotation:
    """Calls that do the same on different inputs, one after another, so that none finds its own in the L2 cache."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._next = list(calls), 0

    def __call__(self) -> Any:
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        return call()


def _rotate(calls: Sequence[Call]) -> Call:
    return calls[0] if len(calls) == 1 else Rotation(calls)
