"""Gradient filtering for modules: one convolution (:class:`FilteredConv2d`) or a live model (:func:`filter_model`)."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .chains.capture.backend import Backend
from .chains.capture.sites import Choice
from .chains.model import chain_model, check_means, graphs_of, unchain_model
from .core.geometry import Pair, Patch, as_pair
from .errors import ModelError
from .forward.engine import Engine, FrontStep, check_budget
from .on_demand.models import find_kernels
from .ops.module import FilteredConv2d as FilteredConv2d
from .ops.module import check_library

if TYPE_CHECKING:
    from .bundle.library import Library

logger = logging.getLogger("gf_tvm")

M = TypeVar("M", bound=nn.Module)
Layers = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class FilterReport:
    """The convolutions of a model: which are filtered, and why the others are not. ``str()`` is a readable list.

    Attributes:
        filtered: fully qualified name -> patch (height, width).
        left_alone: fully qualified name -> reason.
        forward: what runs compiled of what needs no gradient, a line for each part of the last training step.
    """

    filtered: Mapping[str, Pair]
    left_alone: Mapping[str, str]
    forward: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.filtered) + len(self.left_alone)
        lines = [f"{len(self.filtered)} of {total} convolutions filtered"]
        lines += [f"  {shown_name(name)}: patch {ph}x{pw}" for name, (ph, pw) in self.filtered.items()]
        lines += [f"  {shown_name(name)}: left alone, {reason}" for name, reason in self.left_alone.items()]
        lines += [f"  forward pass: {line}" for line in self.forward]
        return "\n".join(lines)


def filter_report(model: nn.Module) -> FilterReport:
    """What of ``model`` is filtered at present, and what is not and why.

    After a training step in the order in which convolutions ran; those of other modules than Conv2d are known then.
    """
    filtered: dict[str, Pair] = {}
    left_alone: dict[str, str] = {}
    for prefix, graph in graphs_of(model):
        for site in graph.chosen.sites:
            name = f"{prefix}.{site.name}" if prefix else site.name
            if site.node in graph.chosen.filters:
                filtered[name] = graph.chosen.filters[site.node].patch
            elif name not in filtered:
                left_alone[name] = graph.chosen.left_alone[site.name]
    for name, module in model.named_modules():
        if name in filtered or name in left_alone:
            continue
        if isinstance(module, FilteredConv2d):
            filtered[name] = module.patch
        elif isinstance(module, _ConvNd):
            left_alone[name] = _why_left_alone(module)
    fronts = [front for _, graph in graphs_of(model) for front in graph.assembled.fronts]
    return FilterReport(filtered, left_alone, tuple(str(front) for front in fronts if isinstance(front, FrontStep)))


def _why_left_alone(module: nn.Module) -> str:
    kind = parametrize.type_before_parametrizations(module)
    if not isinstance(module, nn.Conv2d):
        return f"a {_kind_name(kind)} is no two-dimensional convolution"
    if (reason := filter_obstacle(module)) is not None:
        return reason
    return (
        f"a {_kind_name(kind)} is filtered when it runs, if it is selected" if runs_its_own(module) else "not selected"
    )


def select_layers(
    model: nn.Module, last: int | None = None, layers: Layers | None = None
) -> list[tuple[str, nn.Conv2d]]:
    """The convolutions that ``last`` or ``layers`` stands for, with fully qualified names, in the model's order.

    A convolution is a Conv2d, subclasses included, or another module that has a weight of four dimensions of its own,
    and so may call ``torch.nn.functional.conv2d``.

    Args:
        model: the order of its modules is the order in which they were registered (as printed), which need not be
            the order in which they run. A module with several names counts once, under its first.
        last: that many of the last Conv2d modules.
        layers: a name, names, or a function of (name, module) that says which.

    Raises:
        ModelError: neither or both given, no such layers, layers that are no Conv2d, or no convolution selected.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if (last is None) == (layers is None):
        raise ModelError("say which convolutions: either last=K or layers=[names] or layers=function(name, module)")
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if not convs and (last is not None or not any(map(_has_weight_of_its_own, model.modules()))):
        raise ModelError(f"{type(model).__name__} has no Conv2d module, so nothing can be filtered")
    if last is not None:
        if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= len(convs):
            raise ModelError(
                f"last must be between 1 and {len(convs)}, the number of convolutions in {type(model).__name__}; "
                f"got {last!r}"
            )
        return list(convs.items())[-last:]
    assert layers is not None
    convs |= {name: module for name, module in model.named_modules() if _has_weight_of_its_own(module)}
    if callable(layers):
        selected = [(name, module) for name, module in convs.items() if layers(name, module)]
        if not selected:
            raise ModelError(f"the function given as layers chose none of the {len(convs)} convolutions")
        return selected
    if not isinstance(layers, Iterable):
        raise ModelError(f"layers must be a name, names, or a function of (name, module); got {layers!r}")
    wanted = {id(_named(model, name, list(convs))) for name in ([layers] if isinstance(layers, str) else layers)}
    if not wanted:
        raise ModelError("layers is empty: name at least one convolution")
    return [(name, module) for name, module in convs.items() if id(module) in wanted]


@dataclass(frozen=True)
class Selection:
    """Selected convolutions by name: all of them, and why some cannot be filtered.

    ``captured``: those whose module has a forward pass of its own, so that they are filtered where it is captured.
    """

    convs: Mapping[str, nn.Conv2d]
    obstacles: Mapping[str, str]
    captured: frozenset[str] = frozenset()

    @property
    def filterable(self) -> dict[str, nn.Conv2d]:
        """Those that can be filtered."""
        return {name: module for name, module in self.convs.items() if name not in self.obstacles}


def select_filterable(model: nn.Module, last: int | None = None, layers: Layers | None = None) -> Selection:
    """:func:`select_layers`, without the convolutions that cannot be filtered: they are left out with a warning.

    Raises:
        ModelError: as select_layers does; a convolution that was asked for by name, or all of them, cannot be filtered.
    """
    convs = dict(select_layers(model, last, layers))
    obstacles = {name: reason for name, module in convs.items() if (reason := filter_obstacle(module))}
    by_name = last is None and not callable(layers)
    if obstacles and (by_name or len(obstacles) == len(convs)):
        name, reason = next(iter(obstacles.items()))
        raise ModelError(f"{shown_name(name)} cannot be filtered: {reason}")
    for name, reason in obstacles.items():
        logger.warning("%s left alone: %s", shown_name(name), reason)
    captured = frozenset(name for name, module in convs.items() if name not in obstacles and runs_its_own(module))
    return Selection(convs, obstacles, captured)


def filter_model(
    model: M,
    patch: Patch | Mapping[str, Patch],
    last: int | None = None,
    layers: Layers | None = None,
    library: Library | None = None,
    chain: bool = True,
    means: torch.dtype | None = None,
    rest: str | None = None,
    forward: bool = True,
    memory_budget: int | None = None,
) -> M:
    """Give convolutions of ``model`` a filtered backward pass, in place.

    The model compiles itself with PyTorch's Dynamo when it first runs with gradients, and again when something that
    its forward pass depends on changes: shapes, settings, attributes, what is trained. Gradients stay on the patch
    grid between filtered convolutions where that is exact, so that the backward pass neither reads nor keeps maps of
    full size there (docs/patch_grid.md); :func:`gf_tvm.chains_of` tells these chains after a training step.

    Modules stay the same objects; a plain Conv2d only changes its class, as ``torch.nn.utils.parametrize`` does it, so
    that it is filtered wherever it runs. Convolutions of other modules (subclasses with a forward pass of their own,
    calls of ``torch.nn.functional.conv2d``) are filtered in what Dynamo captures. Parameters, hooks, device, dtype,
    training flag, ``state_dict`` keys and references from elsewhere all stay valid. Filtering a filtered convolution
    changes its patch and library. :func:`filter_report` lists what is filtered and why the rest is not,
    :func:`unfilter_model` undoes it all.

    Args:
        model: any module, also a Conv2d itself.
        patch: pixels of an output that share one gradient: an integer, a pair (height, width), or one per name. A
            mapping without ``last`` and ``layers`` also says which convolutions.
        last: that many of the last convolutions, in the order in which they run.
        layers: see :func:`select_layers`.
        library: what :func:`gf_tvm.load` returned; None for kernels that are built when they are first wanted.
        chain: without it each convolution is filtered by itself, as in the paper: same gradients, more time and memory.
        means: dtype in which chains keep the means over patches of activations' derivatives: ``torch.float16`` or
            ``torch.bfloat16``; None keeps them as they are summed (float32, for float64 float64). Rounding is at most
            5e-4 of a mean in float16 (below 6e-5: 3e-8), 4e-3 in bfloat16; means of ReLU and ReLU6 over patches of
            2^k pixels are exact, up to 2048 pixels in float16 and 256 in bfloat16.
        rest: a backend of ``torch.compile``, such as "inductor", that compiles what is neither a chain nor a filtered
            convolution; None: that runs as it is. Under an outer ``torch.compile`` it is that one's backend.
        forward: whether the parts before the first trained layer are compiled, too, for CPUs in float32: convolutions
            with the frozen batch norms, activations and additions after them, and pooling (docs/forward.md). Without
            it PyTorch runs them.
        memory_budget: bytes that the maps between the layers of a compiled part may take: the batch then goes through
            it in smaller pieces, with the same results. None: as is fastest. Where even one image at a time needs more,
            it takes what that needs; :func:`filter_report` says how much.

    Returns:
        ``model``.

    Raises:
        ModelError: a selection that fits the model badly, a convolution that is named but cannot be filtered, a dtype
            of means that is none of these, or a budget that is no number of bytes. Nothing has been changed.
        GeometryError: a patch that is not one or two positive integers. Nothing has been changed.
    """
    if isinstance(patch, Mapping) and last is None and layers is None:
        layers = list(patch)
    selection = select_filterable(model, last, layers)
    check_library(library)
    check_means(means)
    check_budget(memory_budget)
    patches = _patches(model, selection.convs, patch)
    for name, module in selection.filterable.items():
        if name not in selection.captured:
            _become(module, FilteredConv2d)
            module.patch, module.library = patches[name], library  # type: ignore[assignment]
    choice = Choice(
        patch=patches if isinstance(patch, Mapping) else as_pair(patch, "patch", 1),
        last=last,
        names=frozenset(selection.filterable),
        library="" if library is None else library.digest,
    )
    if chain or selection.captured or last is not None or rest is not None or forward:
        engine = Engine("" if library is None else library.digest, memory_budget) if forward else None
        chain_model(model, means, choice, chain, bool(selection.captured), rest, find_kernels, engine)
    else:
        unchain_model(model)
    logger.info("%s", filter_report(model))
    return model


#: What ``options`` of :func:`compile_backend` may hold.
_OPTIONS = ("patch", "last", "layers", "library", "chain", "means", "rest", "forward", "memory_budget")


def compile_backend(
    graph: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend "gf_tvm" of ``torch.compile``, with ``options={"patch": 4, "last": 4}``.

    Modules stay what they are; convolutions are filtered in the captured graph.

    Args:
        options: ``patch``, ``last`` or ``layers`` (names), ``library``, ``chain``, ``means``, ``rest``, ``forward`` and
            ``memory_budget``, as for :func:`filter_model`. ``last`` counts in each graph, where Dynamo breaks the model
            into several. Without ``last`` and ``layers``: convolutions that are filtered modules already.

    Raises:
        ModelError: an option that there is not, or a value that is none of its kind.
        GeometryError: a patch that is not one or two positive integers.
    """
    given = dict(options or {})
    for name in given:
        if name not in _OPTIONS:
            raise ModelError(f"backend gf_tvm has no option {name!r}; it has {', '.join(_OPTIONS)}")
    last, layers, patch = given.get("last"), given.get("layers"), given.get("patch")
    library = check_library(given.get("library"))
    check_means(given.get("means"))
    check_budget(given.get("memory_budget"))
    choice = None
    if last is not None or layers is not None or patch is not None:
        if patch is None or (last is None) == (layers is None):
            raise ModelError("backend gf_tvm needs the option patch, and either last=K or layers=[names]")
        if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
            raise ModelError(f"last must be a positive integer, got {last!r}")
        if layers is not None and (callable(layers) or not isinstance(layers, Iterable)):
            raise ModelError(f"layers must be a name or names, got {layers!r}")
        names = None if layers is None else frozenset([layers] if isinstance(layers, str) else layers)
        patches: Pair | dict[str, Pair]
        if isinstance(patch, Mapping):
            patches = {name: as_pair(value, f"patch of {name}", 1) for name, value in patch.items()}
        else:
            patches = as_pair(patch, "patch", 1)
        choice = Choice(patches, last, names, "" if library is None else library.digest)
    digest = "" if library is None else library.digest
    engine = Engine(digest, given.get("memory_budget")) if given.get("forward", True) else None
    backend = Backend(
        choice, bool(given.get("chain", True)), given.get("means"), given.get("rest"), find_kernels, engine
    )
    return backend(graph, inputs)


def unfilter_model(model: M) -> M:
    """Turn every FilteredConv2d of ``model`` back into a Conv2d, in place; returns ``model``."""
    unchain_model(model)
    for module in model.modules():
        if parametrize.type_before_parametrizations(module) is FilteredConv2d:
            _become(module, nn.Conv2d)
            del module.patch, module.library
    return model


def filter_obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot become a FilteredConv2d; None if it can."""
    if isinstance(module, LazyModuleMixin):
        kind = parametrize.type_before_parametrizations(module)
        return f"a {_kind_name(kind)} has no weight before its first forward pass"
    if isinstance(module, nn.Conv2d) and not module.weight.dtype.is_floating_point:
        return f"its weight is {module.weight.dtype}"
    return None


def runs_its_own(module: nn.Module) -> bool:
    """Whether a Conv2d computes something else than a Conv2d does, so that its class has to stay."""
    kind = parametrize.type_before_parametrizations(module)
    replaced = any(name in vars(module) for name in ("forward", "_conv_forward"))
    return kind not in (nn.Conv2d, FilteredConv2d) or replaced


def _kind_name(kind: type) -> str:
    """What messages call a class: with its module, where it is not PyTorch's."""
    return kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__qualname__}"


def _become(module: nn.Module, kind: type[nn.Conv2d]) -> None:
    """Make ``kind`` the class of ``module``, below the class that ``parametrize`` may have put on top."""
    if parametrize.is_parametrized(module):
        theirs = ("__module__", "__doc__", "__dict__", "__weakref__")
        own = {name: value for name, value in vars(type(module)).items() if name not in theirs}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    module.__class__ = kind


def _patches(
    model: nn.Module, selected: Mapping[str, nn.Conv2d], patch: Patch | Mapping[str, Patch]
) -> dict[str, Pair]:
    """The patch of each selected convolution."""
    names = list(selected)
    if not isinstance(patch, Mapping):
        return dict.fromkeys(names, as_pair(patch, "patch", 1))
    given = {id(_named(model, name, names)): (name, value) for name, value in patch.items()}
    patches = {}
    for name, module in selected.items():
        if id(module) not in given:
            raise ModelError(f"patch has no entry for the selected convolution {shown_name(name)}")
        patches[name] = as_pair(given.pop(id(module))[1], f"patch of {shown_name(name)}", 1)
    if given:
        name = next(iter(given.values()))[0]
        raise ModelError(f"patch has an entry for {shown_name(name)}, which is not selected")
    return patches


def _named(model: nn.Module, name: str, convs: list[str]) -> nn.Conv2d:
    """The convolution called ``name``. Raises ModelError with the nearest of ``convs``."""
    inside = [conv for conv in convs if conv.startswith(f"{name}.")]
    near = inside or difflib.get_close_matches(str(name), convs, n=3, cutoff=0.4) or convs[-5:]
    hint = f"{'near' if len(near) < len(convs) else 'its'} convolutions: {', '.join(near[:5])}"
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{type(model).__name__} has no layer {name!r}; {hint}") from None
    if not isinstance(module, nn.Conv2d) and not _has_weight_of_its_own(module):
        raise ModelError(f"layer {name!r} is a {_kind_name(type(module))}, not a Conv2d; {hint}")
    return module  # type: ignore[return-value]


def _has_weight_of_its_own(module: nn.Module) -> bool:
    """Whether a module that is no convolution of PyTorch's has a parameter that may be one's weight."""
    if isinstance(module, _ConvNd):
        return False
    parameters = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return any(p.dim() == 4 for p in parameters.values() if not is_lazy(p))


def shown_name(name: str) -> str:
    """What messages call a module: the model itself has no name."""
    return name or "the model itself"
