"""Measure chains: the same part of a network exactly, filtered layer by layer, and in a chain.

A part is the operations of one chain and nothing else: it gets random maps where the chain begins and random gradients
where it ends, so that neither the frozen layers before it nor the loss are in its times. In each of the three variants
a step is a forward pass and the backward pass behind it, as in training, where the one finds the caches as the other
left them.

Before anything is timed, the gradients of all three are compared with float64. A ReLU jumps at zero, so a forward pass
in float64 would differ from one in float32 by more than rounding, at single pixels; the backward pass in float64
therefore runs on the values of the float32 forward pass, see :func:`_gradients_in_float64`.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .autograd import FallbackWarning
from .chains.model import chains_of
from .chains.piece import Bound, Piece, pieces_of
from .chains.steps import ConvInput, ConvWeight
from .errors import ModelError
from .geometry import Geometry, Pair
from .nn import FilteredConv2d, filter_model, filter_report
from .rows import ChainRow
from .shapes import Patch, _check_patches, format_patch, model_cases, workloads_of
from .training.measure import count_kept_bytes
from .training.trainer import freeze
from .variants import ComparisonError, Timing, measure, relative_error, timing_of, tolerance, torch_dtype
from .workload import DTYPES, Workload

if TYPE_CHECKING:
    from .library import Library

VARIANTS = ("exact", "filtered", "chained")

#: Where a chain's forward pass rounds in another way than that of single layers, a ReLU may see another sign at one
#: pixel in some millions. In maps that large that changes gradients by less than this share of their norm, and a mean
#: that is wrong by 1 % changes them by more. Chains whose exits are equal bit by bit get no such allowance.
_OTHER_SIGNS = 2e-3

#: Numbers that the float64 reference holds of all maps together, about: it takes so many images at once.
_VALUES = 1 << 23

#: Names of the gradients of maps begin so; those of parameters have no blanks.
_MAP = "map "

#: How rows of chains are measured, for the conditions of a comparison.
CONDITIONS = (
    "the operations of one chain, on random maps and gradients; a step is a forward pass and the backward pass behind "
    "it; the filtered convolutions and the last linear layer are trained, batch norms are frozen"
)


@dataclass(frozen=True)
class ChainCase:
    """A model whose chains are measured with one patch.

    Attributes:
        model: unfiltered, in evaluation mode; what requires a gradient is trained.
        input_shape: (n, c, h, w) of a training batch.
        layers: names of the convolutions that are filtered.
        dtype: of the model, one of :data:`~gf_tvm.workload.DTYPES`.
    """

    model: nn.Module
    input_shape: tuple[int, ...]
    layers: tuple[str, ...]
    patch: Pair
    dtype: str

    def workloads(self) -> list[Workload]:
        """What the filtered and the chained variant call."""
        cases = model_cases(_copy(self.model), self.input_shape, layers=list(self.layers), patches=[self.patch])
        return workloads_of(cases, chained=True)


def chain_cases(
    model: nn.Module,
    input_shape: Sequence[int],
    last: int | None = None,
    layers: Any = None,
    patches: Sequence[Patch] = (2,),
    dtypes: Sequence[str] | None = None,
) -> list[ChainCase]:
    """What :func:`gf_tvm.compare` takes as ``chains``: ``model`` with each patch and dtype.

    As in fine-tuning, the selected convolutions and the last linear layer are trained, and batch norms are frozen.

    Args:
        model: is left as it is. input_shape: (n, c, h, w) of a training batch.
        last, layers: which convolutions are filtered, as in :func:`gf_tvm.filter_model`.
        patches: each is a case of its own. dtypes: likewise; None for the model's.

    Raises:
        ModelError: no such layers, or a dtype that kernels do not have. GeometryError: bad patches.
    """
    pairs = _check_patches(patches, "patches")
    report = filter_report(filter_model(_copy(model), pairs[0], last=last, layers=layers))
    names = tuple(report.filtered)
    own = copy.deepcopy(model).eval()
    freeze(own, list(names))
    if dtypes is None:
        dtypes = [str(own.get_submodule(names[0]).weight.dtype).removeprefix("torch.")]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ModelError(f"the model works in {dtype}; kernels store {', '.join(DTYPES)}")
    models = {dtype: copy.deepcopy(own).to(torch_dtype(dtype)) for dtype in dtypes}
    return [ChainCase(models[d], tuple(input_shape), names, patch, d) for d in dtypes for patch in pairs]


def workloads(chains: Iterable[ChainCase]) -> list[Workload]:
    """What a library for these cases needs, each once."""
    return list(dict.fromkeys(workload for case in chains for workload in case.workloads()))


@dataclass(frozen=True)
class Measured:
    """What one chain took; :meth:`row` needs the machine's limits."""

    case: ChainCase
    piece: Piece
    ends: tuple[str, ...]
    schedules: dict[str, Counter[str]]
    times: dict[str, dict[str, Timing]]  # variant -> forward, backward
    kept: dict[str, int]
    error: float

    def row(self, device: str, limits: tuple[float, float]) -> ChainRow:
        """With GFLOP/s and GB/s of the same run."""
        moved, operations = _traffic(self.piece, self.case.dtype, self.kept["chained"])
        peak, bandwidth = limits
        least = {"bandwidth": moved / bandwidth / 1e6, "arithmetic": operations / peak / 1e6}
        limit = max(least, key=least.__getitem__)
        names, plan = self.piece.convolutions, self.piece.plan
        by_part = {
            f"{part}_ms{suffix}": {variant: getattr(times[part], what) for variant, times in self.times.items()}
            for part in ("forward", "backward")
            for suffix, what in (("", "median"), ("_quartiles", "quartiles"))
        }
        return ChainRow(
            name=names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
            device=device,
            dtype=self.case.dtype,
            patch=self.case.patch,
            input=self.case.input_shape,
            convolutions=names,
            ends=self.ends,
            entries=tuple(plan.shapes[v] for v in plan.entries),
            exits=tuple(plan.shapes[v] for v in plan.exits),
            **by_part,
            repeats={variant: times["backward"].repeats for variant, times in self.times.items()},
            schedule=_least(self.schedules["chained"]),
            filtered_schedule=_least(self.schedules["filtered"]),
            kernels={variant: dict(counted) for variant, counted in self.schedules.items()},
            kept_bytes=self.kept,
            roofline_ms=least[limit],
            roofline=limit,
            operations=operations,
            moved_bytes=moved,
            max_rel_error=self.error,
        )


@dataclass(frozen=True)
class Outcome:
    """The chains of one case, and its filtered convolutions that are in none, with the reasons."""

    chains: list[Measured]
    alone: dict[str, str]


def measure_chains(
    case: ChainCase, library: Library | None, effort: tuple[int, float], progress: Callable[[float, str], None]
) -> Outcome:
    """Check and time every chain of a case.

    Args:
        effort: repeats at most, and seconds for one chain.
        progress: told the part that is done, and what is being done.

    Raises:
        ModelError: the model does not run on such an input. ComparisonError: a wrong gradient.
    """
    chained = filter_model(_copy(case.model), case.patch, layers=list(case.layers), library=library, chain=True)
    filtered = filter_model(_copy(case.model), case.patch, layers=list(case.layers), library=library)
    with torch.enable_grad(), _no_surprise(library):
        _run_once(chained, case)
        report = chains_of(chained)
        found = list(pieces_of(chained))
        measured = []
        for number, (piece, chain) in enumerate(zip(found, report.chains, strict=True)):
            what = f"{format_patch(case.patch)} chain of {len(piece.convolutions)}"
            progress(number / len(found), f"checking {what}")
            part = _Part(case, piece, {"exact": case.model, "filtered": filtered, "chained": chained})
            error = part.check()
            kept = part.kept_bytes()
            progress((number + 0.3) / len(found), f"timing {what}")
            times = part.time(effort)
            schedules = _schedules(piece, library, case.dtype)
            measured.append(Measured(case, piece, chain.ends, schedules, times, kept, error))
    chained_names = {name for chain in report.chains for name in chain.convolutions}
    # A module without any chain has no report.
    alone = {name: "nothing next to it can stay on the patch grid" for name in case.layers if name not in chained_names}
    return Outcome(measured, {**alone, **report.alone, **report.waiting, **report.untraced})


@contextmanager
def _no_surprise(library: Library | None) -> Iterator[None]:
    """Without a library PyTorch operators run on purpose, and rows say so."""
    with warnings.catch_warnings():
        if library is None:
            warnings.simplefilter("ignore", FallbackWarning)
        yield


def _copy(model: nn.Module) -> nn.Module:
    """Modules of its own with the same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _run_once(model: nn.Module, case: ChainCase) -> None:
    try:
        model(torch.zeros(case.input_shape, dtype=torch_dtype(case.dtype)))
    except Exception as error:  # the model is the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        shape = "x".join(map(str, case.input_shape))
        raise ModelError(f"{type(model).__name__} does not run on an input of shape {shape}: {reason}") from error


class _Part:
    """A chain's operations in all three variants, on the same maps and with the same incoming gradients."""

    def __init__(self, case: ChainCase, piece: Piece, models: Mapping[str, nn.Module]) -> None:
        self.case, self.piece, self.models = case, piece, models
        generator = torch.Generator().manual_seed(0)

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.randn(tuple(shape), generator=generator).to(torch_dtype(case.dtype))

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
        allowed = _tolerance(self.piece, self.case.dtype, variant)
        apart = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))
        if not (error <= allowed or (not same_signs and apart <= max(allowed, _OTHER_SIGNS))):
            raise ComparisonError(
                f"chain of {', '.join(self.piece.convolutions)} {format_patch(self.case.patch)}: {what} of the "
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
        forward = time.perf_counter()
        found = self._backward(exits)
        self.seconds["backward"].append(time.perf_counter() - forward)
        self.seconds["forward"].append(forward - start)
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
        pairs = [(y, g) for y, g, used in zip(exits, self.grads, self.bound.piece.exits, strict=True) if used]
        leaves = [leaf for leaf in self.leaves if leaf.requires_grad]
        ys, grads = zip(*pairs, strict=True)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            ys, [*leaves, *self.bound.trained], grads, allow_unused=True
        )
        return found

    def _names(self) -> list[str]:
        maps = [f"{_MAP}{k + 1}" for k, needed in enumerate(self.needs) if needed]
        plan, tensors = self.bound.piece.plan, self.bound.piece.part.tensors
        return [*maps, *(tensors[t] for t in plan.tensors if t in plan.trained)]


class _Pin(torch.autograd.Function):
    """Replaces a float64 value by the float32 one that was there, and leaves its gradient as it is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, instead: Tensor) -> Tensor:
        return instead.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


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
    with _no_surprise(None):
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
    for geometry, _ in _products(piece).values():
        map_size = geometry.grid if variant == "chained" else geometry.y_shape[2:]  # grad_b sums pixels there
        length = max(length, geometry.co_group * math.prod(geometry.kernel), geometry.n * math.prod(map_size))
    rounding = tolerance(dtype, length) * len(piece.convolutions)
    # The framework's own loops may sum in the storage dtype.
    return rounding * (math.sqrt(length) if variant == "exact" and dtype != "float32" else 1)


def _products(piece: Piece) -> dict[int, tuple[Geometry, set[str]]]:
    """By the register of g~: the convolution, and which products are made of it."""
    found: dict[int, tuple[Geometry, set[str]]] = {}
    for step in piece.plan.steps:
        if isinstance(step, ConvInput | ConvWeight):
            _, made = found.setdefault(step.src, (step.geometry, set()))
            made.add("input_grad" if isinstance(step, ConvInput) else "weight_grad")
    return found


def _schedules(piece: Piece, library: Library | None, dtype: str) -> dict[str, Counter[str]]:
    """How many kernels of the backward pass have which schedule; "torch" are those that the library lacks.

    Convolutions on maps of one pixel, which are not filtered, have kernels nowhere and are not counted.
    """
    counted: dict[str, Counter[str]] = {"filtered": Counter(), "chained": Counter()}
    whole = {frozenset(("input_grad", "weight_grad")): "backward", frozenset(("input_grad",)): "backward_input"}
    for geometry, made in _products(piece).values():
        if geometry.patch == (1, 1) and (geometry.h, geometry.w) == (1, 1):
            continue
        for kernel in made:
            counted["chained"][_schedule(library, [kernel], geometry, dtype)] += 1
        alone = whole.get(frozenset(made), "backward_weight")
        counted["filtered"][_schedule(library, [alone, "backward"], geometry, dtype)] += 1
    return counted


def _schedule(library: Library | None, names: Sequence[str], geometry: Geometry, dtype: str) -> str:
    if library is not None:
        for name in names:
            # As chains look for them: x~ and g~ are float32 whatever the dtype.
            for stored in ("float32", dtype) if name == "weight_grad" else (dtype,):
                if (kernel := library.find(name, geometry, stored)) is not None:
                    return kernel.schedule
    return "torch"


def _least(counted: Counter[str]) -> str:
    """Of all kernels together: "tuned" if all are, "torch" as soon as one of them lacks."""
    return next((name for name in ("torch", "default") if counted[name]), "tuned" if counted else "torch")


def _traffic(piece: Piece, dtype: str, kept: int) -> tuple[int, int]:
    """Bytes that a chain's backward pass moves at least, and the floating-point operations of its products.

    Read once: what was kept, the weights of convolutions whose input needs a gradient, the gradients that come in.
    Written once: the gradients of parameters, and of the maps that come in. Maps on the grid between two layers may
    stay in a cache and are not counted, nor are operations element by element.
    """
    plan, item = piece.plan, torch_dtype(dtype).itemsize
    moved, operations = kept, 0
    for geometry, made in _products(piece).values():
        weight = math.prod(geometry.weight_shape)
        taps = math.prod(geometry.kernel) if geometry.dilated else 1
        product = 2 * geometry.n * math.prod(geometry.grid) * geometry.co * geometry.ci_group
        moved += item * weight * len(made)
        operations += product * (("weight_grad" in made) + taps * ("input_grad" in made))
    in_full = [shape for shape, needed in piece.entries if needed]
    out = [plan.shapes[v] for v, used in zip(plan.exits, piece.exits, strict=True) if used]
    moved += item * sum(math.prod(shape) for shape in (*in_full, *out))
    return moved, operations
