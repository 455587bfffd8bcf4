"""Measure chains: the same part of a network exactly, filtered layer by layer, and in a chain.

A part is the operations of one chain and nothing else: it gets random maps where the chain begins and random gradients
where it ends, so that neither the frozen layers before it nor the loss are in its times. How it is run, checked and
timed is in :mod:`gf_tvm.comparison.chain_variants`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..chains.compile.programs import Program
from ..chains.model import chains_of
from ..chains.piece import Piece, pieces_of
from ..core.dtypes import itemsize, torch_dtype
from ..core.geometry import Geometry, Pair, Patch
from ..core.workload import DTYPES, Workload
from ..errors import ModelError
from ..machine.timing import Timing
from ..nn import filter_model, filter_report
from ..shapes.cases import as_patches, format_patch, workloads_of
from ..shapes.model import does_not_run, model_cases
from ..training.programs import programs_for
from ..training.trainer import freeze
from .chain_variants import ChainVariants, plain_operators_wanted
from .limits import shortest
from .rows import ChainRow

if TYPE_CHECKING:
    from ..bundle.library import Library

#: How rows of chains are measured, for the conditions of a comparison.
CONDITIONS = (
    "the operations of one chain, on random maps and gradients; a step is a forward pass and the backward pass behind "
    "it, which is timed from the moment at which a gradient arrives; the filtered convolutions and the last linear "
    "layer are trained, batch norms are frozen"
)


@dataclass(frozen=True)
class ChainCase:
    """A model whose chains are measured with one patch.

    Attributes:
        model: unfiltered, in evaluation mode; what requires a gradient is trained.
        input_shape: (n, c, h, w) of a training batch.
        layers: names of the convolutions that are filtered.
        dtype: of the model, one of :data:`~gf_tvm.core.workload.DTYPES`.
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

    def programs(self) -> list[Program]:
        """What of the chained variant can be compiled as a whole."""
        run = filter_model(copy.deepcopy(self.model), self.patch, layers=list(self.layers), forward=False)
        return programs_for(run, self.input_shape)


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
    pairs = as_patches(patches)
    report = filter_report(filter_model(_copy(model), pairs[0], last=last, layers=layers, chain=False))
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


def programs(chains: Iterable[ChainCase]) -> list[Program]:
    """And what else of the chained variants a library can have."""
    return list({program.key: program for case in chains for program in case.programs()}.values())


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
        limit, limit_name = shortest(moved, operations, peak, bandwidth)
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
            roofline_ms=limit,
            roofline=limit_name,
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
    chained = filter_model(_copy(case.model), case.patch, layers=list(case.layers), library=library)
    filtered = filter_model(_copy(case.model), case.patch, layers=list(case.layers), library=library, chain=False)
    models = {"exact": case.model, "filtered": filtered, "chained": chained}
    with torch.enable_grad(), plain_operators_wanted() if library is None else nullcontext():
        _run_once(chained, case)
        report = chains_of(chained)
        found = list(pieces_of(chained))
        measured = []
        for number, (piece, chain) in enumerate(zip(found, report.chains, strict=True)):
            what = f"{format_patch(case.patch)} chain of {len(piece.convolutions)}"
            progress(number / len(found), f"checking {what}")
            part = ChainVariants(piece, case.patch, case.dtype, models)
            error = part.check()
            kept = part.kept_bytes()
            progress((number + 0.3) / len(found), f"timing {what}")
            times = part.time(effort)
            schedules = _schedules(piece, library, case.dtype)
            measured.append(Measured(case, piece, chain.ends, schedules, times, kept, error))
    chained_names = {name for chain in report.chains for name in chain.convolutions}
    # A module without any chain has no report.
    alone = {name: "nothing next to it can stay on the patch grid" for name in case.layers if name not in chained_names}
    return Outcome(measured, {**alone, **report.alone, **report.waiting})


def _copy(model: nn.Module) -> nn.Module:
    """Modules of its own with the same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _run_once(model: nn.Module, case: ChainCase) -> None:
    try:
        model(torch.zeros(case.input_shape, dtype=torch_dtype(case.dtype)))
    except Exception as error:
        raise does_not_run(model, case.input_shape, error) from error


def _schedules(piece: Piece, library: Library | None, dtype: str) -> dict[str, Counter[str]]:
    """How many kernels of the backward pass have which schedule; "torch" are those that the library lacks.

    Convolutions on maps of one pixel, which are not filtered, have kernels nowhere and are not counted.
    """
    counted: dict[str, Counter[str]] = {"filtered": Counter(), "chained": Counter()}
    whole = {frozenset(("input_grad", "weight_grad")): "backward", frozenset(("input_grad",)): "backward_input"}
    for geometry, made in piece.products().values():
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
    plan, item = piece.plan, itemsize(dtype)
    moved, operations = kept, 0
    for geometry, made in piece.products().values():
        weight = math.prod(geometry.weight_shape)
        taps = math.prod(geometry.kernel) if geometry.dilated else 1
        product = 2 * geometry.n * math.prod(geometry.grid) * geometry.co * geometry.ci_group
        moved += item * weight * len(made)
        operations += product * (("weight_grad" in made) + taps * ("input_grad" in made))
    in_full = [shape for shape, needed in piece.entries if needed]
    out = [plan.shapes[v] for v in plan.exits]
    moved += item * sum(math.prod(shape) for shape in (*in_full, *out))
    return moved, operations
