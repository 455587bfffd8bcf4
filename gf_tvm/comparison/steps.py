"""Whole training steps measured: exact, compiled by PyTorch, filtered, chained, whole. What a user gains, not a kernel.

All variants of one model make the same step on the same batch, interleaved in one run: forward pass with the loss,
backward pass, update. As in fine-tuning, the chosen convolutions and the last linear layer are trained, and batch norms
are frozen. Nothing is timed before its logits and gradients agreed with float64. Memory is measured in a process of
its own for each variant (:mod:`gf_tvm.comparison.step_memory`).
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chains.capture.live import filtered_parts
from ..core.geometry import Pair
from ..forward.programs import FrontProgram
from ..machine.profiles import DeviceProfile
from ..machine.timing import Timing, measure, timing_of
from ..models import logits_of
from ..nn import filter_model
from ..on_demand.models import SWITCH
from ..shapes.cases import format_patch
from ..training.step_costs import StepTimes, count_kept_bytes
from .chain_variants import plain_operators_wanted
from .chains import ChainCase
from .convolutions import ComparisonError
from .step_limits import StepLimit, step_limit

if TYPE_CHECKING:
    from ..bundle.library import Library

#: How steps are measured, for the conditions of a comparison.
CONDITIONS = (
    "whole steps on one random batch: forward pass with the loss, backward pass, update by SGD with momentum; the "
    "filtered convolutions and the last linear layer are trained, batch norms are frozen; variants interleaved in one "
    "run; memory: peak of a process of its own for each variant, above what it had before it loaded the model"
)

#: What logits may differ from float64, as a relative norm.
LOGITS = 1e-5
#: And gradients: where a variant rounds in another way than float64, a ReLU may see another sign at one pixel in some
#: millions, and in ResNet-18 even PyTorch's own gradients then differ by 2e-3. A kernel that is wrong changes them by
#: more.
GRADIENTS = 5e-3

#: A forward pass of the model on the step's batch by another program; the first call returns the logits.
Forward = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """One way to make the step.

    Attributes:
        make: changes a copy of the model; gets the patch, the names of the convolutions, and the library.
        filtered: whether there is one for each patch.
        compiles: whether operators of a forward pass are fused.
    """

    name: str
    make: Callable[[nn.Module, Pair, list[str], Library | None], nn.Module]
    filtered: bool = True
    compiles: bool = False


def _compiled(model: nn.Module, *_: Any) -> nn.Module:
    torch._dynamo.reset()  # a limit of compilations per function must not make a later model run eagerly
    return torch.compile(model)  # type: ignore[return-value]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("exact", lambda model, *_: model, filtered=False),
        Variant("compiled", _compiled, filtered=False, compiles=True),
        Variant(
            "filtered",
            lambda model, patch, layers, library: filter_model(
                model, patch, layers=layers, library=library, chain=False, forward=False
            ),
        ),
        Variant(
            "chained",
            lambda model, patch, layers, library: filter_model(
                model, patch, layers=layers, library=library, forward=False
            ),
        ),
        Variant(
            "whole",
            lambda model, patch, layers, library: filter_model(
                model, patch, layers=layers, library=library, forward=True
            ),
            compiles=True,
        ),
    )
}


@dataclass(frozen=True)
class StepRow:
    """The step of one model, its last convolutions and one patch. Times in ms (medians), sizes in bytes.

    What has a value for each variant is an object by the variants' names (:data:`VARIANTS`): ``forward_ms``,
    ``backward_ms``, ``update_ms``, ``step_ms`` and its quartiles, ``repeats``, ``kept_bytes`` (what autograd keeps from
    the forward to the backward pass), ``peak_bytes`` (the process's highest above its start, compiling included) and
    ``step_peak_bytes`` (likewise, in the steps after the first two); None where the system does not tell.
    ``limit_ms``: the shortest forward and backward pass that bytes and operations allow, see
    :mod:`gf_tvm.comparison.step_limits`. ``forward_only_ms`` has the forward passes by other programs.
    ``max_rel_error`` is the largest of all logits and gradients: ||a - b|| / ||b|| against float64. ``unmeasured``
    says of variants that are missing, or whose memory is unknown, why.
    """

    name: str
    device: str
    dtype: str
    patch: Pair
    input: tuple[int, ...]
    convolutions: tuple[str, ...]
    forward_ms: dict[str, float]
    backward_ms: dict[str, float]
    update_ms: dict[str, float]
    step_ms: dict[str, float]
    step_ms_quartiles: dict[str, tuple[float, float]]
    repeats: dict[str, int]
    kept_bytes: dict[str, int]
    peak_bytes: dict[str, int | None]
    step_peak_bytes: dict[str, int | None]
    limit_ms: dict[str, dict[str, float]]
    forward_only_ms: dict[str, float]
    max_rel_error: dict[str, float]
    unmeasured: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def front_programs(cases: Sequence[ChainCase], profile: DeviceProfile) -> list[FrontProgram]:
    """What a library for these cases needs for the variant ``whole`` besides what chains need."""
    found: dict[str, FrontProgram] = {}
    for case in cases:
        model = filter_model(copy.deepcopy(case.model), case.patch, layers=list(case.layers))
        with plain_operators_wanted(), _nothing_built():  # on real memory: what has none is not compiled
            model(torch.zeros(case.input_shape))
        found |= {program.key: program for program in (front.program(profile) for front in _fronts(model))}
    return list(found.values())


@contextmanager
def _nothing_built() -> Iterator[None]:
    """No kernels are built in the background: they would disturb what is timed."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def _fronts(model: nn.Module) -> list[Any]:
    """The parts of the forward pass that may be compiled."""
    states = [state.last for _, state in filtered_parts(model) if not isinstance(state.last, str)]
    return [front for last in states for graph in last for front in graph.assembled.fronts]


class TrainingStep:
    """One training step of a model, on the same batch every time; ``times`` has its phases.

    Args:
        model: a classifier or a segmentation network; what requires a gradient is trained.
        shape: (n, c, h, w) of the batch.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model, self.times = model, StepTimes()
        self.x = torch.randn(tuple(shape), generator=generator).to(dtype)
        self._generator, self._target = generator, torch.empty(0)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # A rate of zero takes as long, and every step does the same: a loss that falls to zero ends in denormals.
        self._optimizer = torch.optim.SGD(self.parameters, lr=0.0, momentum=0.9)

    def __call__(self) -> Tensor:
        """The logits, detached."""
        start = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        logits, loss = self.loss()
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = time.perf_counter()
        self._optimizer.step()
        self.times.add(start, forward, backward, time.perf_counter())
        return logits.detach()

    def loss(self) -> tuple[Tensor, Tensor]:
        """Logits and loss."""
        output = self.model(self.x)
        logits = logits_of(output, getattr(output, "logits", output).dim())
        if not self._target.numel():  # as many as the model gives
            shape = (logits.shape[0], *logits.shape[2:])
            self._target = torch.randint(logits.shape[1], shape, generator=self._generator)
        return logits, F.cross_entropy(logits, self._target)

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step, by the parameter's name; those that are zero may lack."""
        return {
            name: p.grad.detach().clone()
            for name, p in zip(self.names, self.parameters, strict=True)
            if p.grad is not None
        }


def agree(step: TrainingStep, wanted: TrainingStep) -> None:
    """Raise ComparisonError unless a step gave the same gradients as another one of the same precision."""
    _worst("the step", step.gradients(), wanted.gradients(), against="the other step")


@dataclass
class _Measured:
    """One variant with one patch (None: exact)."""

    variant: Variant
    patch: Pair | None
    step: TrainingStep
    error: float
    kept: int
    limit: StepLimit | None = None

    @property
    def key(self) -> str:
        return self.variant.name if self.patch is None else f"{self.variant.name} {format_patch(self.patch)}"


#: Asked for a variant's memory: variant, patch, model (unfiltered), its input, layers. Bytes, or the reason.
Memory = Callable[[Variant, Pair, ChainCase], Mapping[str, Any]]


def measure_steps(
    name: str,
    cases: Sequence[ChainCase],
    library: Library | None,
    device: str,
    effort: tuple[int, float],
    limits: tuple[float, float],
    progress: Callable[[float, str], None] = lambda part, what: None,
    memory: Memory | None = None,
    forwards: Mapping[str, Forward] | None = None,
) -> list[StepRow]:
    """A row for each case.

    Args:
        name: of the model.
        cases: one model in float32 with several patches, made by :func:`gf_tvm.comparison.chains.chain_cases`.
        library: a loaded bundle; kernels that it lacks are run by PyTorch.
        device: name of the profile.
        effort: repeats at most, and seconds for all variants of one model.
        limits: GFLOP/s of products, GB/s of a copy.
        progress: told the part that is done, and what is being done.
        memory: see :data:`Memory`; None: not measured.
        forwards: further forward passes of the same model on the step's batch, timed in the same rounds.

    Raises:
        ComparisonError: a variant's logits or gradients are wrong; nothing was timed.
    """
    first = cases[0]
    if any(case.dtype != "float32" for case in cases):
        raise ComparisonError(f"whole steps are measured in float32, got {', '.join(c.dtype for c in cases)}")
    unmeasured: dict[str, str] = {}
    found: list[_Measured] = []
    with plain_operators_wanted():
        exact = _reference(first, None)
        for variant in VARIANTS.values():
            patches: list[Pair | None] = [case.patch for case in cases] if variant.filtered else [None]
            for patch in patches:
                progress(0.3 * len(found) / (len(VARIANTS) * len(cases)), f"checking {name}, {variant.name}")
                expected = exact if patch is None else _reference(first, patch)
                try:
                    found.append(_made(variant, patch, first, library, expected))
                except ComparisonError:
                    raise
                except Exception as error:
                    if variant.name != "compiled":
                        raise
                    # Inductor needs a C++ compiler, which a board may lack.
                    unmeasured[variant.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        for one in found:
            if one.variant.name == "whole" and not any(front.compiled for front in _fronts(one.step.model)):
                unmeasured["compiled parts of whole"] = "there are none, so PyTorch ran the forward pass"
        extra = _checked(forwards or {}, exact[0])
        for one in found:
            one.limit = _limit_of(one, found, limits)
        calls: dict[str, Callable[[], Any]] = {one.key: one.step for one in found}
        calls |= {f"forward of {key}": call for key, call in extra.items()}
        for one in found:
            one.step.times = StepTimes()
        timings = measure(calls, *effort, lambda part: progress(0.3 + 0.5 * part, f"timing {name}"))
    rows = []
    known: dict[str, Mapping[str, Any]] = {}
    for index, case in enumerate(cases):
        progress(0.8 + 0.2 * index / len(cases), f"memory of {name} {format_patch(case.patch)}")
        own = [one for one in found if one.patch in (None, case.patch)]
        rows.append(
            _row(name, case, device, own, timings, list(extra), _asked(memory, case, own, known), dict(unmeasured))
        )
    return rows


def _made(
    variant: Variant,
    patch: Pair | None,
    case: ChainCase,
    library: Library | None,
    expected: tuple[Tensor, dict[str, Tensor]],
) -> _Measured:
    model = variant.make(copy.deepcopy(case.model), patch or (1, 1), list(case.layers), library)
    step = TrainingStep(model, case.input_shape)
    # A compiled model's parameters have its wrapper's name in front.
    step.names = [name for name, p in case.model.named_parameters() if p.requires_grad]
    step()  # captures, compiles
    logits = step()
    what = f"{variant.name}{'' if patch is None else ' ' + format_patch(patch)}"
    error = max(
        _worst(what, {"the logits": logits}, {"the logits": expected[0]}, LOGITS),
        _worst(what, step.gradients(), expected[1], GRADIENTS),
    )
    with count_kept_bytes(model, {}) as kept:
        output = step.loss()
    del output
    return _Measured(variant, patch, step, error, kept.total)


def _reference(case: ChainCase, patch: Pair | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients in float64, filtered layer by layer by plain operators."""
    model = copy.deepcopy(case.model).double()
    if patch is not None:
        filter_model(model, patch, layers=list(case.layers), chain=False, forward=False)
    step = TrainingStep(model, case.input_shape, torch.float64)
    return step(), step.gradients()


def _worst(
    what: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    allowed: float = GRADIENTS,
    against: str = "float64",
) -> float:
    """The largest relative error by norm. Raises ComparisonError."""
    largest = 0.0
    for name, wanted in expected.items():
        got = found.get(name)
        got = torch.zeros_like(wanted) if got is None else got.double()
        wanted = wanted.double()
        error = float((got - wanted).norm() / wanted.norm().clamp(min=1e-300))
        if not error <= allowed:
            raise ComparisonError(
                f"{what}: {name} is wrong, so nothing was timed: relative error {error:.3g} against {against}, "
                f"{allowed:g} is allowed"
            )
        largest = max(largest, error)
    return largest


def _checked(forwards: Mapping[str, Forward], logits: Tensor) -> dict[str, Forward]:
    for name, call in forwards.items():
        _worst(f"forward pass by {name}", {"the logits": call()}, {"the logits": logits}, LOGITS)
    return dict(forwards)


def _limit_of(one: _Measured, all_of: Sequence[_Measured], limits: tuple[float, float]) -> StepLimit:
    """The step's own; of what runs compiled, whose operators cannot be seen, that of its eager twin."""
    twin = {"compiled": "exact", "chained": "filtered", "whole": "filtered"}.get(one.variant.name, one.variant.name)
    eager = next(m for m in all_of if m.variant.name == twin and m.patch == one.patch)
    kept = one.kept if one.variant.name in ("chained", "whole") else None
    return step_limit(eager.step.loss, eager.step.parameters, limits, fused=one.variant.compiles, kept_bytes=kept)


def _asked(
    memory: Memory | None, case: ChainCase, own: Sequence[_Measured], known: dict[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The memory of each variant; ``known``: of those before, by key."""
    if memory is not None:
        for one in own:
            if one.key not in known:
                known[one.key] = memory(one.variant, case.patch, case)
    return {one.variant.name: known.get(one.key, {}) for one in own}


def _row(
    name: str,
    case: ChainCase,
    device: str,
    own: Sequence[_Measured],
    timings: Mapping[str, Timing],
    extra: Sequence[str],
    peaks: Mapping[str, Mapping[str, Any]],
    unmeasured: dict[str, str],
) -> StepRow:
    for variant, got in peaks.items():
        if "reason" in got:
            unmeasured[f"memory of {variant}"] = str(got["reason"])

    def part(what: str) -> dict[str, float]:
        return {
            one.variant.name: timing_of(getattr(one.step.times, what)[-timings[one.key].repeats :]).median
            for one in own
        }

    return StepRow(
        name=name,
        device=device,
        dtype=case.dtype,
        patch=case.patch,
        input=case.input_shape,
        convolutions=case.layers,
        forward_ms=part("forward"),
        backward_ms=part("backward"),
        update_ms=part("update"),
        step_ms={one.variant.name: timings[one.key].median for one in own},
        step_ms_quartiles={one.variant.name: timings[one.key].quartiles for one in own},
        repeats={one.variant.name: timings[one.key].repeats for one in own},
        kept_bytes={one.variant.name: one.kept for one in own},
        peak_bytes={key: got.get("peak_bytes") for key, got in peaks.items()},
        step_peak_bytes={key: got.get("step_peak_bytes") for key, got in peaks.items()},
        limit_ms={one.variant.name: one.limit.to_dict() for one in own if one.limit is not None},
        forward_only_ms={key: timings[f"forward of {key}"].median for key in extra},
        max_rel_error={one.variant.name: one.error for one in own},
        unmeasured=unmeasured,
    )
