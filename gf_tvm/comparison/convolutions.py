"""The variants of one convolution's backward pass that are compared: run, check against float64.

The same random inputs go to all of them. Nothing here knows about devices, clocks, limits or tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import reference
from ..core.dtypes import torch_dtype
from ..core.geometry import Geometry
from ..core.verify import from_saved, poisoned_outputs, to_saved
from ..core.workload import Workload
from ..errors import GfTvmError
from ..machine import cpu
from ..shapes.cases import Case, format_patch

if TYPE_CHECKING:
    from ..bundle.kernel import Kernel
    from ..bundle.library import Library


class ComparisonError(GfTvmError):
    """A case that cannot be compared: a wrong result, or tensors that do not fit into memory."""


def tolerance(dtype: str, length: int) -> float:
    """Largest max|a - b| / max|b| that rounding explains, for sums of ``length`` terms in float32, stored as ``dtype``.

    Rounding errors of a sum grow like the root of its length (they have no preferred sign), as do the sums
    themselves for the random signs used here; a term left out changes the result by more than this for every
    length up to half a million.
    """
    stored = 0.0 if dtype == "float32" else torch.finfo(torch_dtype(dtype)).eps
    return stored + torch.finfo(torch.float32).eps * (16 + 4 * math.sqrt(length))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max|expected| in float64; infinite for anything not finite or a wrong shape."""
    worst = _Worst()
    worst.add(found, expected)
    return worst.error()


class _Worst:
    """Relative error of a tensor that is compared piece by piece."""

    def __init__(self) -> None:
        self.difference = self.scale = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        if found.shape != expected.shape:
            self.difference = math.inf
        elif found.numel():
            difference = (found.double() - expected).abs().max().item()
            self.difference = max(self.difference, difference if math.isfinite(difference) else math.inf)
            self.scale = max(self.scale, expected.abs().max().item())

    def error(self) -> float:
        if self.difference == 0:
            return 0.0
        return self.difference / self.scale if self.scale else math.inf


@dataclass(frozen=True)
class Data:
    """Random inputs of one convolution, contiguous NCHW unless :meth:`to` was told otherwise."""

    x: Tensor
    weight: Tensor
    grad_y: Tensor

    @classmethod
    def random(cls, case: Case) -> Data:
        geometry, generator = case.geometry, torch.Generator().manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(torch_dtype(case.dtype))

        fan_in = geometry.ci_group * math.prod(geometry.kernel)
        return cls(normal(geometry.x_shape), normal(geometry.weight_shape, fan_in**-0.5), normal(geometry.y_shape))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.x, self.weight, self.grad_y))

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Data:
        """A copy on a device, in NCHW or channels_last."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device, copy=True, memory_format=memory_format)

        return Data(moved(self.x), moved(self.weight), moved(self.grad_y))


def exact_backward(grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The framework's exact grad_x and grad_W."""
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
        *(grad_y, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, (0, 0)),
        *(geometry.groups, (True, True, False)),
    )
    return grad_x, grad_w


def baseline_name(data: Data, geometry: Geometry) -> str:
    """Which implementation PyTorch chooses for this convolution: "onednn", "cudnn", or "torch" for its own."""
    arguments = (geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups)
    try:
        backend = str(torch._C._select_conv_backend(data.x, data.weight, None, *arguments))
    except (AttributeError, TypeError):  # not a public function; without it, what PyTorch was built with
        backend = "Cudnn" if data.x.is_cuda else "Mkldnn" if cpu.has_onednn() else ""
    return "onednn" if "Mkldnn" in backend else "cudnn" if "Cudnn" in backend else "torch"


@dataclass(frozen=True)
class Contender:
    """One more implementation of a filtered backward pass, to be timed beside those of :class:`Variants`.

    Attributes:
        backward: computes the gradients, into memory that it allocates.
        results: computes what is compared with float64: x~ (n, ci, ph, pw), grad_x, grad_W and grad_b, as far as it
            has them, by these names. Into memory full of NaN, so that what is left out shows.
        filter_input: the forward pass's pooling, if that is to be timed too.
        schedule: as in :func:`schedule_of`.
    """

    backward: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]
    filter_input: Callable[[], Any] | None = None
    schedule: str = "torch"


class Variants:
    """The calls to time for one case: plain operators and, where the library has them, kernels.

    ``others``: further implementations by name; :meth:`check` leaves their errors in ``errors``.
    """

    def __init__(
        self, case: Case, data: Data, library: Library | None, others: Mapping[str, Contender] | None = None
    ) -> None:
        self.case, self.data, self.library, geometry = case, data, library, case.geometry
        self.others = dict(others or {})
        self.errors: dict[str, float] = {}
        self.backward = library.find("backward", geometry, case.dtype) if library else None
        self.pooling = library.find("filter_input", geometry, case.dtype) if library else None
        self.plain_saved = reference.filter_input(data.x, geometry)
        # What the library's own forward pass would have kept, so that the check covers the whole chain.
        if self.pooling:
            (self.saved,) = self._poisoned("filter_input")
            self.pooling(data.x, self.saved)
        else:
            self.saved = to_saved(self.plain_saved, geometry)

    def on(self, data: Data) -> Variants:
        """The same calls on other inputs."""
        return Variants(self.case, data, self.library)

    def filter_input(self) -> Tensor:
        """The pooling of the forward pass by the kernel, or by plain operators into the same shape."""
        geometry, x = self.case.geometry, self.data.x
        if not self.pooling:
            return to_saved(reference.filter_input(x, geometry), geometry)
        saved = x.new_empty(geometry.saved_shape, dtype=self.plain_saved.dtype)
        self.pooling(x, saved)
        return saved

    def plain_backward(self) -> tuple[Tensor | None, ...]:
        """grad_x and grad_W by plain operators."""
        data, needs = self.data, (True, True, False)
        return reference.backward(data.grad_y, self.plain_saved, data.weight, self.case.geometry, needs)

    def new_outputs(self) -> tuple[Tensor, ...]:
        """grad_x, grad_W, grad_b for the kernel to write; grad_x of zeros where the kernel leaves pixels out."""
        geometry, x = self.case.geometry, self.data.x
        grad_x = (x.new_empty if geometry.covers_input else x.new_zeros)(geometry.x_shape)
        return grad_x, x.new_empty(geometry.weight_shape), x.new_empty(geometry.co)

    def kernel_backward(self, outputs: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """grad_x, grad_W, grad_b by the kernel, into new tensors or into ``outputs``."""
        assert self.backward is not None
        outputs = outputs or self.new_outputs()
        self.backward(self.data.grad_y, self.saved, self.data.weight, *outputs)
        return outputs

    def kernel_results(self) -> dict[str, Tensor]:
        """What the library's kernels compute, by name, x~ as (n, ci, ph, pw); outputs were full of NaN before."""
        found = {}
        if self.pooling:
            found["x~"] = from_saved(self.saved, self.case.geometry)
        if self.backward:
            outputs = self.kernel_backward(tuple(self._poisoned("backward")))
            found.update(zip(("grad_x", "grad_W", "grad_b"), outputs, strict=True))
        return found

    def as_contender(self) -> Contender | None:
        """This library's kernels beside those of another one; None if it has no backward kernel of this case."""
        if self.backward is None:
            return None
        pooling = self.filter_input if self.pooling else None
        return Contender(self.kernel_backward, self.kernel_results, pooling, schedule_of(self.backward))

    def _poisoned(self, kernel: str) -> list[Tensor]:
        outputs = poisoned_outputs(Workload(kernel, self.case.geometry, self.case.dtype))
        return [output.to(self.data.x.device) for output in outputs]

    def check(self) -> float:
        """Compare all implementations with float64 and return the library's error (else the plain operators').

        Raises:
            ComparisonError: an error is larger than rounding explains.
        """
        found: dict[str, dict[str, Tensor]] = {}
        plain_x, plain_w, _ = self.plain_backward()
        assert plain_x is not None
        assert plain_w is not None
        found["reference"] = {"x~": self.plain_saved, "grad_x": plain_x, "grad_W": plain_w}
        if own := self.kernel_results():
            found["gf_tvm"] = own
        found.update({name: other.results() for name, other in self.others.items()})
        errors = _errors(found, self.data, self.case.geometry)
        lengths = _sum_lengths(self.case.geometry)
        for variant, by_output in errors.items():
            for output, error in by_output.items():
                # x~ is kept in float32 whatever the storage dtype
                allowed = tolerance("float32" if output == "x~" else self.case.dtype, lengths[output])
                if not error <= allowed:
                    patch = format_patch(self.case.geometry.patch)
                    raise ComparisonError(
                        f"case {self.case.name} {patch}: {output} of {variant} is wrong, so it was not timed: "
                        f"relative error {error:.3g} against float64, rounding explains {allowed:.3g}"
                    )
        self.errors = {
            variant: max((error for output, error in by_output.items() if output != "x~"), default=0.0)
            for variant, by_output in errors.items()
        }
        return self.errors["gf_tvm" if self.backward else "reference"]


def _sum_lengths(geometry: Geometry) -> dict[str, int]:
    """Terms in the longest sum behind each result."""
    n, _, *map_size = geometry.y_shape
    return {
        "x~": geometry.rows.window * geometry.cols.window,
        "grad_x": geometry.co_group * math.prod(geometry.kernel),
        "grad_W": n * math.prod(geometry.grid),
        "grad_b": n * math.prod(map_size),
    }


def _errors(found: Mapping[str, Mapping[str, Tensor]], data: Data, geometry: Geometry) -> dict[str, dict[str, float]]:
    """Relative errors of several variants' results against the float64 reference.

    The batch is walked through in pieces: in float64 the largest cases would not fit into a board's memory.
    """
    step = max(1, (1 << 23) // (math.prod(geometry.x_shape[1:]) + math.prod(geometry.y_shape[1:])))
    weight = data.weight.double()
    grad_w, grad_b = torch.zeros_like(weight), weight.new_zeros(geometry.co)
    worst = {variant: {output: _Worst() for output in outputs} for variant, outputs in found.items()}
    for start in range(0, geometry.n, step):
        piece = slice(start, start + step)
        grad_y, part = data.grad_y[piece].double(), replace(geometry, n=len(data.x[piece]))
        saved = reference.filter_input(data.x[piece].double(), part)
        grad_x, part_w, part_b = reference.backward(grad_y, saved, weight, part)
        assert grad_x is not None
        assert part_w is not None
        assert part_b is not None
        grad_w += part_w
        grad_b += part_b
        for variant, outputs in found.items():
            for output, expected in (("x~", saved), ("grad_x", grad_x)):
                if output in outputs:
                    worst[variant][output].add(outputs[output][piece], expected)
    for variant, outputs in found.items():
        for output, expected in (("grad_W", grad_w), ("grad_b", grad_b)):
            if output in outputs:
                worst[variant][output].add(outputs[output], expected)
    return {variant: {output: w.error() for output, w in by.items()} for variant, by in worst.items()}


def check_baseline(case: Case, data: Data, rounding: float = 0.0) -> None:
    """Compare the framework's operator with itself in float64 on the CPU, on one image.

    Args:
        case, data: what to run, where the data lie.
        rounding: relative error to allow besides, for algorithms that are known to lose digits.
    """
    geometry = replace(case.geometry, n=1)
    grad_y, x, weight = data.grad_y[:1], data.x[:1], data.weight
    results = [result.cpu() for result in exact_backward(grad_y, x, weight, geometry)]
    expected = exact_backward(grad_y.cpu().double(), x.cpu().double(), weight.cpu().double(), geometry)
    lengths = (geometry.co_group * math.prod(geometry.kernel), math.prod(geometry.y_shape[2:]))
    for output, found, right, length in zip(("grad_x", "grad_W"), results, expected, lengths, strict=True):
        # The framework's own loops may sum in the storage dtype.
        allowed = rounding + tolerance(case.dtype, length) * (1 if case.dtype == "float32" else math.sqrt(length))
        error = relative_error(found, right)
        if not error <= allowed:
            raise ComparisonError(
                f"case {case.name}: {output} of the exact backward is wrong, so it was not timed: "
                f"relative error {error:.3g} against float64, rounding explains {allowed:.3g}"
            )


def schedule_of(kernel: Kernel | None) -> str:
    """Where the kernel's schedule comes from: "tuned", "default", or "torch" where there is no kernel."""
    return "torch" if kernel is None else kernel.schedule
