"""The convolutions of a model as cases: what would be filtered, with the shapes that it sees."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..chains.capture.live import by_modules
from ..core.geometry import Geometry, Patch, as_pair
from ..core.workload import DTYPES
from ..errors import GeometryError, ModelError
from ..nn import Layers, select_filterable, select_layers
from .cases import Case, as_patches

logger = logging.getLogger("gf_tvm")


def model_cases(
    model: nn.Module,
    input_shape: Sequence[int],
    last: int | None = None,
    layers: Layers | None = None,
    patches: Sequence[Patch] = (2,),
) -> list[Case]:
    """The convolutions of a model that would be filtered, with the shapes that they see.

    Runs the model once on zeros, in evaluation mode, and leaves it as it was. Which inputs need a gradient when
    the selected layers alone are trained is taken from autograd itself, not from the order of the layers: the
    shortcut of a residual block needs none either if its main path's first layer does not.

    Args:
        model: takes one tensor of ``input_shape``.
        input_shape: (n, c, h, w) of a training batch, n >= 1.
        last, layers: as in :func:`gf_tvm.filter_model`.
        patches: every layer is taken with each of them.

    Returns:
        Cases in the order in which the layers first run; layers with equal geometry and dtype are one case whose
        name counts them ("layer4.1.conv1 x3").

    Raises:
        ModelError: no such layers, or the model does not run on that input.
        GeometryError: bad patches.
    """
    shape = tuple(input_shape)
    pairs = as_patches(patches)
    if last is not None and layers is None:
        chosen = set(last_to_run(model, last, shape))
        selection = select_filterable(model, layers=lambda name, _: name in chosen)
    else:
        selection = select_filterable(model, last, layers)
    selected = selection.filterable
    seen: dict[tuple[Geometry, str], list[tuple[str, bool]]] = {}  # geometry without patch, dtype: who, needs gradient
    called: set[str] = set()

    def note(name: str, x: Tensor, found: tuple[Geometry, str]) -> None:
        called.add(name)
        seen.setdefault(found, []).append((name, bool(x.requires_grad)))

    calls = _Calls(lambda name, x, *call: note(name, x, _call_geometry(name, x, *call)))

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            note(name, x, layer_geometry(name, module, x))

        return record

    hooks = []
    for name, layer in selected.items():
        if name in selection.captured:
            hooks += calls.watch(name, layer)
        else:
            hooks.append(layer.register_forward_pre_hook(recorder(name), with_kwargs=True))
    trained = {id(p) for module in selected.values() for p in module.parameters()}
    try:
        with calls:
            _run_on_zeros(model, shape, trained)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name in selected if name not in called]
    if not called:
        raise ModelError(f"none of the selected layers ran in {type(model).__name__}: {', '.join(idle)}")
    if idle:
        logger.warning("selected layers that the model does not use: %s", ", ".join(idle))

    cases = []
    for (geometry, dtype), users in seen.items():
        names = tuple(dict.fromkeys(name for name, _ in users))
        label = names[0] if len(users) == 1 else f"{names[0]} x{len(users)}"
        needs_no_gradient = not all(needed for _, needed in users)
        cases += [Case(label, replace(geometry, patch=p), dtype, names, needs_no_gradient) for p in pairs]
    return cases


def last_to_run(model: nn.Module, last: int, input_shape: Sequence[int]) -> list[str]:
    """The last Conv2d modules of a model, by name, in the order in which they run first.

    They are those that ``last=`` stands for in :func:`gf_tvm.filter_model`. Runs the model once on zeros, as
    :func:`model_cases` does. Modules that do not run come before all others.

    Raises:
        ModelError: fewer convolutions, or the model does not run on that input.
    """
    select_layers(model, last=last)  # whether there are so many
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    ran: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: void(ran.setdefault(name)))
        for name, module in convs.items()
    ]
    try:
        _run_on_zeros(model, tuple(input_shape), set())
    finally:
        for hook in hooks:
            hook.remove()
    return [*(name for name in convs if name not in ran), *ran][-last:]


def _run_on_zeros(model: nn.Module, shape: tuple[int, ...], trained: set[int]) -> None:
    """Run a model in evaluation mode, where the parameters of these identities alone need gradients."""
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    first = next((p for p, _ in parameters if p.is_floating_point()), None)
    try:
        model.eval()
        for parameter, _ in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in trained)
        with torch.enable_grad(), by_modules():  # a filtered model would be compiled with the hooks
            zeros = torch.zeros(
                shape,
                dtype=first.dtype if first is not None else torch.float32,
                device=first.device if first is not None else None,
            )
            model(zeros)
    except (GeometryError, ModelError):
        raise
    except Exception as error:
        raise does_not_run(model, shape, error) from error
    finally:
        for parameter, flag in parameters:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


class _Calls(TorchFunctionMode):
    """Tells of the convolutions that modules compute in forward passes of their own.

    Args:
        told: called with the module's name and the arguments of ``torch.nn.functional.conv2d``.
    """

    def __init__(self, told: Callable[..., None]) -> None:
        super().__init__()
        self._told, self._inside = told, list[str]()

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Handles of the hooks that tell when this module runs."""
        enter = module.register_forward_pre_hook(lambda *_: self._inside.append(name))
        leave = module.register_forward_hook(lambda *_: void(self._inside.pop()), always_call=True)
        return [enter, leave]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and self._inside:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            self._told(self._inside[-1], *(given[name] for name in names if name != "bias"))
        return func(*args, **kwargs)


def void(_: object) -> None:
    """What a hook returns that changes nothing."""


def does_not_run(model: nn.Module, shape: Sequence[int], error: Exception) -> ModelError:
    """What to raise where ``model``, which is the user's code, fails on an input of that shape."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(f"{type(model).__name__} does not run on an input of shape {'x'.join(map(str, shape))}: {reason}")


def layer_geometry(name: str, module: Any, x: Tensor) -> tuple[Geometry, str]:
    """Geometry (with a patch of one pixel) and dtype of one call of a layer, as FilteredConv2d would see it."""
    padding = module.padding
    if module.padding_mode != "zeros":  # padded before the convolution, which then sees a larger map
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    return _call_geometry(name, x, module.weight, module.stride, padding, module.dilation, module.groups)


def _call_geometry(
    name: str, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Geometry, str]:
    """Geometry (with a patch of one pixel) and dtype of one call of ``torch.nn.functional.conv2d``."""
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelError(f"layer {name!r} works in {dtype}; kernels store {', '.join(DTYPES)}")
    if x.dim() != 4:
        raise ModelError(f"layer {name!r} gets an input of {x.dim()} dimensions; a batch (n, c, h, w) has 4")
    n, ci, h, w = x.shape
    co, _, kh, kw = weight.shape
    dilation = as_pair(dilation, "dilation", 1)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # an odd total is padded to an even one after the map
        total = [d * (k - 1) for d, k in zip(dilation, (kh, kw), strict=True)]
        h, w, padding = h + total[0] % 2, w + total[1] % 2, (total[0] // 2, total[1] // 2)
    return Geometry(n, ci, co, h, w, (kh, kw), (1, 1), stride, padding, dilation, groups), dtype
