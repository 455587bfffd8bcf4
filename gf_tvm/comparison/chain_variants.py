"""The variants of one chain that are compared: run, check against float64, time.

In each of the three a step is a forward pass and the backward pass behind it, as in training, where the one finds the
caches as the other left them. All get the same random maps and incoming gradients. The backward pass is timed from the
moment at which PyTorch's engine has brought a gradient to the chain: what it takes to start the engine is the same for
every variant, and in training it was started before, by the loss.

Before anything is timed, the gradients of all three are compared with float64. A ReLU jumps at zero, so a forward pass
in float64 would differ from one in float32 by more than rounding, at single pixels; the backward pass in float64
therefore runs on the values of the float32 forward pass, see :func:`_gradients_in_float64`.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..chains.piece import Bound, Piece
from ..core.dtypes import torch_dtype
from ..core.geometry import Pair
from ..machine.timing import Timing, measure, timing_of
from ..nn import FilteredConv2d
from ..ops.dispatch import FallbackWarning
from ..shapes.cases import format_patch
from ..training.step_costs import count_kept_bytes
from .convolutions import ComparisonError, relative_error, tolerance

VARIANTS = ("exact", "filtered", "chained")

#: Where a chain's forward pass rounds in another way than that of single layers, a ReLU may see another sign at one
#: pixel in some millions. In maps that large that changes gradients by less than this share of their norm, and a mean
#: that is wrong by 1 % changes them by more. Chains whose exits are equal bit by bit get no such allowance.
_OTHER_SIGNS = 2e-3

#: Numbers that the float64 reference holds of all maps together, about: it takes so many images at once.
_VALUES = 1 << 23

#: Names of the gradients of maps begin so; those of parameters have no blanks.
_MAP = "map "


class ChainVariants:
    """A chain's operations in all three variants, on the same maps and with the same incoming gradients.

    Args:
        models: by variant: unfiltered, filtered, and the one that ``piece`` was found in.
    """

    def __init__(self, piece: Piece, patch: Pair, dtype: str, models: Mapping[str, nn.Module]) -> None:
        self.piece, self.patch, self.dtype, self.models = piece, patch, dtype, models
        generator = torch.Generator().manual_seed(0)

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.randn(tuple(shape), generator=generator).to(torch_dtype(dtype))

        self.maps = [normal(shape) for shape, _ in piece.entries]
        self.needs = [needed for _, needed in piece.entries]
        bound = {variant: Bound(piece, model) for variant, model in models.items()}
        self.steps = {
            variant: _Step(bound[variant], partial(_exits, bound[variant], variant == "chained"), self.maps, self.needs)
            for variant in VARIANTS
        }
        with torch.no_grad():
            shapes = [y.shape for y in self.steps["filtered"].run(self.steps["filtered"].entries())]
        self.grads = [normal(shape) for shape in shapes]
        for step in self.steps.values():
            step.grads = self.grads

    def check(self) -> float:
        """Compare the gradients of all variants with float64; returns the largest relative error of the chain's.

        Raises:
            ComparisonError: an error is larger than rounding explains.
        """
        filtered = self.steps["filtered"]
        expected = _gradients_in_float64(filtered, self.models["filtered"])
        exits = {variant: self.steps[variant].exits() for variant in ("filtered", "chained")}
        same = all(torch.equal(a, b) for a, b in zip(exits["filtered"], exits["chained"], strict=True))
        for a, b in zip(exits["chained"], exits["filtered"], strict=True):
            self._judge("chained", "the forward pass", a, b.double(), against="the filtered one")
        self._judge_all("filtered", filtered.gradients(), expected)
        error = self._judge_all("chained", self.steps["chained"].gradients(), expected, same)
        # The framework's own operators, on one image: in float64 they take long.
        one = self.steps["exact"].cut(slice(1))
        self._judge_all("exact", one.gradients(), _gradients_in_float64(one, self.models["exact"]))
        return error

    def _judge_all(
        self, variant: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], same_signs: bool = True
    ) -> float:
        """The largest error; a gradient that lacks counts as zero."""
        errors = []
        for name in dict.fromkeys((*expected, *found)):
            a, b = found.get(name), expected.get(name)
            if b is None:
                assert a is not None
                b = torch.zeros_like(a, dtype=torch.float64)
            a = torch.zeros_like(b) if a is None else a
            errors.append(self._judge(variant, f"the gradient of {name}", a, b, same_signs))
        return max(errors, default=0.0)

    def _judge(
        self,
        variant: str,
        what: str,
        found: Tensor,
        expected: Tensor,
        same_signs: bool = True,
        against: str = "float64",
    ) -> float:
        error = relative_error(found, expected)
        allowed = _tolerance(self.piece, self.dtype, variant)
        apart = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))
        if not (error <= allowed or (not same_signs and apart <= max(allowed, _OTHER_SIGNS))):
            raise ComparisonError(
                f"chain of {', '.join(self.piece.convolutions)} {format_patch(self.patch)}: {what} of the "
                f"{variant} variant is wrong, so it was not timed: relative error {error:.3g} against {against}, "
                f"rounding explains {allowed:.3g}"
            )
        return error

    def kept_bytes(self) -> dict[str, int]:
        """What the forward pass of each variant keeps for the backward pass."""
        kept = {}
        for variant, step in self.steps.items():
            entries = step.entries()
            with count_kept_bytes(self.models[variant], {}) as counted:
                exits = step.run(entries)
            kept[variant] = counted.total
            del exits
        return kept

    def time(self, effort: tuple[int, float]) -> dict[str, dict[str, Timing]]:
        """Milliseconds of each variant's forward and backward pass."""
        whole = measure(self.steps, *effort)
        # The calls before the last ones warmed up, and told how many fit into the time.
        return {
            variant: {part: timing_of(values[-whole[variant].repeats :]) for part, values in step.seconds.items()}
            for variant, step in self.steps.items()
        }


def _exits(bound: Bound, chained: bool, entries: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return bound.chained(entries) if chained else bound.one_by_one(entries)


@dataclass
class _Step:
    """A forward and a backward pass of one variant. ``seconds``: of both, call by call."""

    bound: Bound
    run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    maps: Sequence[Tensor]
    needs: Sequence[bool]
    grads: Sequence[Tensor] = ()
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "backward": []})

    def __post_init__(self) -> None:
        self.leaves = [t.detach().requires_grad_(needed) for t, needed in zip(self.maps, self.needs, strict=True)]

    def entries(self) -> list[Tensor]:
        """The maps that come in, as an earlier layer would hand them on: what works in place may overwrite them."""
        return [leaf.clone() for leaf in self.leaves]

    def __call__(self) -> tuple[Tensor | None, ...]:
        entries = self.entries()
        start = time.perf_counter()
        exits = self.run(entries)
        self.seconds["forward"].append(time.perf_counter() - start)
        arrivals: list[float] = []
        for y in exits:
            if y.requires_grad:
                y.register_hook(lambda grad: arrivals.append(time.perf_counter()))  # type: ignore[no-untyped-call]
        found = self._backward(exits)
        self.seconds["backward"].append(time.perf_counter() - arrivals[0])
        return found

    def exits(self) -> list[Tensor]:
        """What comes out."""
        return [y.detach() for y in self.run(self.entries())]

    def gradients(self) -> dict[str, Tensor]:
        """Those of parameters and of the maps that come in, by name; those that are zero may lack."""
        found = self._backward(self.run(self.entries()))
        return {name: grad for name, grad in zip(self._names(), found, strict=True) if grad is not None}

    def cut(self, images: slice) -> _Step:
        """The same step on some images."""
        run = partial(_exits, self.bound, False)
        return _Step(self.bound, run, [t[images] for t in self.maps], self.needs, [g[images] for g in self.grads])

    def _backward(self, exits: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        pairs = list(zip(exits, self.grads, strict=True))
        leaves = [leaf for leaf in self.leaves if leaf.requires_grad]
        ys, grads = zip(*pairs, strict=True)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            ys, [*leaves, *self.bound.trained], grads, allow_unused=True
        )
        return found

    def _names(self) -> list[str]:
        maps = [f"{_MAP}{k + 1}" for k, needed in enumerate(self.needs) if needed]
        plan, tensors = self.bound.piece.plan, self.bound.piece.tensor_names
        return [*maps, *(tensors[t] for t in plan.tensors if t in plan.trained)]


class _Pin(torch.autograd.Function):
    """Replaces a float64 value by the float32 one that was there, and leaves its gradient as it is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, instead: Tensor) -> Tensor:
        return instead.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@contextmanager
def plain_operators_wanted() -> Iterator[None]:
    """PyTorch operators run on purpose where a warning would say that they do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


def _gradients_in_float64(step: _Step, model: nn.Module) -> dict[str, Tensor]:
    """The gradients of ``step``, layer by layer in float64, at the values of its own forward pass.

    ``model``: the one that the step runs; a copy without a library computes in float64. The batch is walked through in
    pieces: what a network keeps in float64 would not fit into a board's memory.
    """
    values: dict[fx.Node, Tensor] = {}

    def note(node: fx.Node, value: Tensor) -> Tensor:
        values[node] = value.detach().clone()  # the next operation may work in place
        return value

    with torch.no_grad():
        step.bound.one_by_one(step.entries(), note)
    with plain_operators_wanted():
        return _at_values(step, model, values)


def _at_values(step: _Step, model: nn.Module, values: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if isinstance(module, FilteredConv2d):
            module.library = None
    bound = Bound(step.bound.piece, double)
    tensors = [*step.maps, *step.grads, *values.values()]
    sizes = {len(t) for t in tensors if t.dim() > 1}
    n = max(sizes)
    size = n if sizes != {n} else max(1, _VALUES // max(1, sum(t[:1].numel() for t in values.values())))
    total: dict[str, Tensor] = {}
    for start in range(0, n, size):
        some = slice(start, start + size)

        def pin(node: fx.Node, value: Tensor, some: slice = some) -> Tensor:
            pinned: Tensor = _Pin.apply(value, values[node][some])  # type: ignore[no-untyped-call]
            return pinned

        part = _Step(
            bound,
            partial(bound.one_by_one, watch=pin),
            [t[some].double() for t in step.maps],
            step.needs,
            [g[some].double() for g in step.grads],
        )
        for name, grad in part.gradients().items():
            if name not in total:
                total[name] = grad
            else:
                total[name] = torch.cat([total[name], grad]) if name.startswith(_MAP) else total[name] + grad
    return total


def _tolerance(piece: Piece, dtype: str, variant: str) -> float:
    """What rounding explains: the longest sum of any layer, once for each layer that an error passes."""
    length = 1
    for geometry, _ in piece.products().values():
        map_size = geometry.grid if variant == "chained" else geometry.y_shape[2:]  # grad_b sums pixels there
        length = max(length, geometry.co_group * math.prod(geometry.kernel), geometry.n * math.prod(map_size))
    rounding = tolerance(dtype, length) * len(piece.convolutions)
    # The framework's own loops may sum in the storage dtype.
    return rounding * (math.sqrt(length) if variant == "exact" and dtype != "float32" else 1)
