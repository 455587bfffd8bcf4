"""Floating-point operations of a training step, counted from the shapes that the layers see.

Counted are convolutions and linear layers, with a multiplication and an addition for each product's term, and one
addition for each term of a sum:

* forward: every product of the network, biases included; for a filtered layer also the sums x~ over the patches.
* backward, exact: grad_W and grad_x, each as many operations as the forward products, where they are needed, and
  the sum grad_b.
* backward, filtered: the sum of grad_y over the patches and their scaling to means, the sums of W over its window, the
  two products on the patch grid, and the sum grad_b. Spreading grad_x~ and grad_W writes without computing.
* in chains (:mod:`gf_tvm.chains`): forward, besides x~, the sums of derivatives over the patches. Backward, the same
  products, the sum of grad_y over the patches only where one of full size comes in, and grad_b from g~.

Batch norms, activations, pooling, the loss and the optimizer are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.capture.live import by_modules
from ..chains.model import compiles_itself, plans_of
from ..chains.plan.graph import Conv
from ..chains.plan.lowering import Kept, Mean
from ..chains.plan.steps import ConvInput, ConvWeight, Filter, PatchSum
from ..chains.run.plan import Plan
from ..core.geometry import Geometry
from ..errors import GeometryError, ModelError
from ..nn import filter_report
from ..ops.flops import product_flops
from ..shapes.model import layer_geometry


@dataclass(frozen=True)
class Needs:
    """Which gradients a layer's backward pass computes."""

    x: bool = True
    weight: bool = True
    bias: bool = False

    @property
    def products(self) -> int:
        """How many of the two products are made."""
        return self.x + self.weight


def forward_flops(geometry: Geometry, bias: bool = False, filtered: bool = False) -> int:
    """Operations of one convolution's forward pass; ``filtered``: with the sums x~."""
    flops = 2 * _terms(geometry) + (prod(geometry.y_shape) if bias else 0)
    if filtered:
        axes = (geometry.rows, geometry.cols)
        rows, cols = (sum(len(axis.in_range(i)) for i in range(axis.patches)) for axis in axes)
        flops += geometry.n * geometry.ci * rows * cols
    return flops


def exact_backward_flops(geometry: Geometry, needs: Needs) -> int:
    """Operations of one convolution's exact backward pass."""
    return 2 * _terms(geometry) * needs.products + (prod(geometry.y_shape) if needs.bias else 0)


def filtered_backward_flops(geometry: Geometry, needs: Needs) -> int:
    """Operations of one convolution's filtered backward pass."""
    pixels = prod(geometry.y_shape)
    flops = product_flops(geometry, needs.x, needs.weight) + (pixels if needs.bias else 0)
    if needs.products:
        flops += pixels + geometry.n * geometry.co * prod(geometry.grid)
    if needs.x and not geometry.dilated:  # W is summed over its window first
        flops += prod(geometry.weight_shape)
    return flops


def _terms(geometry: Geometry) -> int:
    return prod(geometry.y_shape) * geometry.ci_group * prod(geometry.kernel)


@dataclass
class StepFlops:
    """Operations of one training step."""

    forward: int = 0
    backward: int = 0

    def add_convolution(self, geometry: Geometry, needs: Needs, bias: bool, filtered: bool) -> None:
        """Count one call of a convolution; ``geometry`` has its patch if it is filtered."""
        self.forward += forward_flops(geometry, bias, filtered and needs.weight)
        self.backward += (filtered_backward_flops if filtered else exact_backward_flops)(geometry, needs)

    def add_linear(self, rows: int, inputs: int, outputs: int, needs: Needs) -> None:
        """Count one call of a linear layer (with a bias) on ``rows`` vectors."""
        self.forward += 2 * rows * inputs * outputs + rows * outputs
        self.backward += 2 * rows * inputs * outputs * needs.products + (rows * outputs if needs.bias else 0)

    def add_chain(self, plan: Plan) -> None:
        """Correct for a chain what was counted of its convolutions one by one."""
        n = max(shape[0] for shape in plan.shapes.values())
        for what in plan.slots:
            if isinstance(what, Mean):
                rows, cols = (cuts.points[-1] - cuts.points[0] for cuts in (what.grid.rows, what.grid.cols))
                self.forward += n * what.width * rows * cols
        means = {step.dst for step in plan.steps if isinstance(step, Filter)}
        for step in plan.forward:
            if isinstance(step.op, Conv) and step.op.filtered:
                self._add_chained(plan, step.index, step.op, means)

    def _add_chained(self, plan: Plan, index: int, op: Conv, means: set[int]) -> None:
        made = [
            step
            for step in plan.steps
            if (isinstance(step, ConvInput) and plan.slots[step.weight] == Kept(index, "weight"))
            or (isinstance(step, ConvWeight) and plan.slots[step.filtered] == Kept(index, "x~"))
        ]
        if not made:
            return
        geometry, trained = made[0].geometry, {step.tensor for step in plan.steps if isinstance(step, PatchSum)}
        pixels, patches = prod(geometry.y_shape), geometry.n * geometry.co * prod(geometry.grid)
        if made[0].src not in means:
            self.backward -= pixels + patches
        if op.tensors[1] in trained:
            self.backward += 2 * patches - pixels  # each mean times its pixels, and added


def count_step(model: nn.Module, x: Tensor) -> StepFlops:
    """Operations of a training step of ``model`` on ``x``, with the parameters that require a gradient now.

    Runs the forward pass once, twice where the model compiles itself. Which gradients of inputs are needed is what
    autograd says.

    Raises:
        ModelError: a convolution gets an input of a kind that cannot be counted, or the model does not run.
    """
    flops = StepFlops()
    if compiles_itself(model):  # then it is known which convolutions are filtered, and which of them in chains
        _forward(model, x)
    patches = filter_report(model).filtered

    def convolution(name: str) -> Any:
        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: Tensor = args[0] if args else kwargs["input"]
            geometry, _ = layer_geometry(name, module, given)
            filtered = name in patches
            if filtered:
                geometry = replace(geometry, patch=patches[name])
            flops.add_convolution(geometry, _needs(given, module), module.bias is not None, filtered)

        return record

    def linear(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        rows = given.numel() // module.in_features
        flops.add_linear(rows, module.in_features, module.out_features, _needs(given, module))

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_pre_hook(convolution(name), with_kwargs=True))
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(linear, with_kwargs=True))
    try:
        with by_modules():
            _forward(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    for plan in plans_of(model):
        flops.add_chain(plan)
    return flops


def _forward(model: nn.Module, x: Tensor) -> None:
    try:
        with torch.enable_grad():
            model(x)
    except (GeometryError, ModelError):
        raise
    except Exception as error:  # the model is the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the model does not run on images of shape {tuple(x.shape)}: {reason}") from error


def _needs(x: Tensor, module: Any) -> Needs:
    bias = module.bias is not None and module.bias.requires_grad
    return Needs(x.requires_grad, module.weight.requires_grad, bias)
