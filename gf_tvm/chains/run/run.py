"""Runs a chain: an exact forward pass that keeps what the plan says, and one backward pass on the patch grid.

Where a library has the whole backward pass as one function (:mod:`..compile.compiled`) it is called; else the steps are
done one by one, the products by a library's kernels where it has them (:mod:`..compile.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import reference
from ...errors import DerivativeError
from ...ops import operators
from ...ops.derivatives import NO_SECOND
from ...ops.dispatch import without_autocast
from ...ops.functional import cast_for_convolution
from ..compile import kernels
from ..compile.forward import Call, Forward
from ..compile.packs import UNPACKED, Layout, Packed
from ..plan import elementwise, grids
from ..plan.graph import Add, Cat, Conv, Drop, Gate, Map, Norm, Op, Pad, Pool, Resize, Scale, Slice, View, WindowPool
from ..plan.grids import vector
from ..plan.lowering import Factor, Mean, Resampling
from ..plan.steps import (
    Channels,
    ConvInput,
    ConvWeight,
    Expand,
    Filter,
    Gather,
    MapSum,
    PatchSum,
    Plus,
    Take,
    Times,
    TimesSaved,
    reads,
)
from .plan import Plan


def run_chain(plan: Plan, entries: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The chain's exits, with its own backward pass.

    Args:
        entries: by ``plan.entries``. tensors: by ``plan.tensors``.
    """
    entries = [t if t.dim() == 4 else t[:, :, None, None] for t in entries]
    given = dict(zip(plan.tensors, tensors, strict=True))
    # Autograd works for every tensor that it is given, so it gets none that is frozen.
    trained = [given.pop(t) for t in plan.trained]
    results: tuple[Tensor, ...] = _Chain.apply(plan, given, *entries, *trained)  # type: ignore[no-untyped-call]
    return results


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, frozen: dict[int, Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        entries = given[: len(plan.entries)]
        tensors = {**frozen, **dict(zip(plan.trained, given[len(plan.entries) :], strict=True))}
        ctx.function, layout = _compiled_backward(plan, entries)
        exits, kept = forward(plan, entries, tensors, layout)
        ctx.plan, ctx.layout, ctx.alone = plan, layout, tuple(kept.alone)
        ctx.dtypes = [t.dtype for t in given]
        ctx.shapes = [t.shape for t in given]
        ctx.save_for_backward(*kept.packs, *kept.alone.values())
        ctx.kept_bytes = _kept_bytes(plan, kept)
        ctx.set_materialize_grads(False)
        return exits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # What refuses to be differentiated again takes 4 % of a small chain's time, so only where somebody might.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, *grads)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    plan: Plan = ctx.plan
    saved, packs = ctx.saved_tensors, len(ctx.layout.sizes)
    kept = Packed(ctx.layout, saved[:packs], dict(zip(ctx.alone, saved[packs:], strict=True)))
    of_entries, of_tensors = backward(plan, kept, dict(zip(plan.exits, grads, strict=True)), ctx.function)
    found = [*(of_entries.get(v) for v in plan.entries), *(of_tensors.get(t) for t in plan.trained)]
    return (None, None, *map(_as, found, ctx.shapes, ctx.dtypes))


def _gradients_once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same where somebody may differentiate them again, which is refused."""
    with torch.no_grad():
        found = _gradients(ctx, *grads)
    made = [t for t in found if t is not None]
    read = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
    results = iter(_Once.apply(len(made), *made, *read))  # type: ignore[no-untyped-call]
    return tuple(None if t is None else next(results) for t in found)


class _Once(torch.autograd.Function):
    """Gradients, as functions of what they were made of, which have no derivatives."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise DerivativeError(NO_SECOND)


def _as(grad: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    if grad is None:
        return None
    if grad.shape != shape:
        grad = grad.reshape(shape)
    return grad if grad.dtype is dtype else grad.to(dtype)


def _kept_bytes(plan: Plan, kept: Packed) -> int:
    """What is kept for the backward pass, in bytes; weights are there in any case."""
    alone = (t for slot, t in kept.alone.items() if plan.packs[slot] is not None)
    return sum(t.numel() * t.element_size() for t in (*kept.packs, *alone))


# Forward


def forward(
    plan: Plan, entries: Sequence[Tensor], tensors: Mapping[int, Tensor], layout: Layout = UNPACKED
) -> tuple[tuple[Tensor, ...], Packed]:
    """The chain's exits, and what :func:`backward` needs, in packs of this layout. Gradients must be off."""
    packs = layout.empty()
    room = layout.views(packs)
    state = _Forward(plan, dict(zip(plan.entries, entries, strict=True)), tensors, room)
    functions = _segments(plan, entries, [tensors[t] for t in plan.tensors])
    for unit in plan.forward if functions is None else plan.units:
        if isinstance(unit, Call):
            assert functions is not None
            state.segment(unit, functions[unit.segment.key])
        else:
            state.step(unit)
        state.forget(unit)
    values = state.values
    exits = tuple(values[v].flatten(1) if v in plan.flat else values[v] for v in plan.exits)
    kept = Packed.of(state.kept, layout, packs, room)
    if plan.means is not None:
        kept = kept.with_means(plan.derivatives, plan.means)
    return exits, kept


def _compiled_backward(plan: Plan, entries: Sequence[Tensor]) -> tuple[Callable[..., None] | None, Layout]:
    """The library's function for the backward pass of a chain, and how it takes what is kept.

    None and unpacked where the library has none, or not for such maps.
    """
    bound = plan.backward if plan.library else None
    if bound is None or any(not t.is_cpu or t.dtype not in kernels.STORAGE for t in entries):
        return None, UNPACKED
    function = kernels.find_program(bound.program.key, plan.library)
    return function, UNPACKED if function is None else bound.layout


def _segments(
    plan: Plan, entries: Sequence[Tensor], tensors: Sequence[Tensor]
) -> dict[str, Callable[..., None]] | None:
    """The compiled segments of a chain, by key; None where it has none or they do not take these tensors."""
    for tensor in (*entries, *tensors):
        # Of weights that are channels last, PyTorch makes such maps.
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return None
    if torch.is_autocast_enabled("cpu") or not plan.library:
        return None
    return kernels.find_programs([segment.key for segment in plan.segments], plan.library)


@dataclass
class _Forward:
    """A forward pass under way: values, what is kept, and products of derivatives that are still needed.

    ``room``: by slot, where what is kept may be written at once.
    """

    plan: Plan
    values: dict[int, Tensor]
    tensors: Mapping[int, Tensor]
    room: Mapping[int, Tensor]
    kept: dict[int, Tensor] = field(default_factory=dict)
    products: dict[tuple[Factor, int], Tensor] = field(default_factory=dict)

    def step(self, step: Forward) -> None:
        """One operation, by PyTorch."""
        self.values[step.result], stash = _operation(self.plan, step, self.values, self.tensors, self.kept)
        for product in step.products:
            factor, width = product.factor, product.width
            (_, offset) = factor[-1]
            own = None if stash is None else _some(stash, offset, width)
            if isinstance(step.op, Resampling):
                result = _through(step.op, self.products[factor[:-1], width], own)
            else:
                assert own is not None
                result = own if len(factor) == 1 else _product(self.products[factor[:-1], width], own)
            self.products[factor, width] = result
            for slot in product.means:
                mean = self.plan.slots[slot]
                assert isinstance(mean, Mean)
                self.kept[slot] = grids.patch_means(result, mean.grid)

    def segment(self, call: Call, function: Callable[..., None]) -> None:
        """Several operations, by a library's function."""
        segment = call.segment
        maps = [kernels.ready(self.values[v]) for v in call.values]
        maps += [kernels.ready(self.products[key]) for key in call.products]
        given = [kernels.ready(self.tensors[t]) for t in call.tensors]
        outputs = [
            maps[0].new_empty(shape) if slot is None or slot not in self.room else self.room[slot].view(shape)
            for shape, slot in zip(segment.outputs, call.slot_of_output, strict=True)
        ]
        function(*maps, *given, *outputs)
        results = iter(outputs)
        for value, (_, over) in zip(call.written, segment.written, strict=True):
            self.values[value] = next(results) if over is None else maps[over]
        for key in call.handed:
            self.products[key] = _channels(next(results), key[0][-1][1], key[1])
        averages = [next(results) for _ in segment.averages]
        for slot, number, channels in call.slots:
            self.kept[slot] = averages[number] if channels is None else _channels(averages[number], *channels)
        for slot, slope in zip(call.slopes, results, strict=True):
            self.kept[slot] = slope.view(1, -1, 1, 1)

    def forget(self, unit: Forward | Call) -> None:
        """What nobody needs any more."""
        for key in unit.forget_products:
            del self.products[key]
        for value in unit.forget:
            del self.values[value]


def _channels(t: Tensor, start: int, width: int) -> Tensor:
    return _some(t, start, width).contiguous()


def _some(t: Tensor, start: int, width: int) -> Tensor:
    return t if (start, width) == (0, t.shape[1]) else t[:, start : start + width]


def _product(before: Tensor, factor: Tensor) -> Tensor:
    return before * factor


def _operation(
    plan: Plan, step: Forward, values: Mapping[int, Tensor], tensors: Mapping[int, Tensor], kept: dict[int, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """One operation's result, and what of it is a factor of products."""
    op = step.op
    inputs = [values[v] for v in op.inputs]
    own = [None if t is None else tensors[t] for t in op.tensors]
    x = inputs[0]
    if isinstance(op, Conv):
        return _convolution(op, step, x, own, kept), None
    if isinstance(op, Norm):
        return _normalisation(op, step, x, own, kept)
    if isinstance(op, Map):
        return elementwise.run(op.kind, op.settings, x, step.inplace, step.stash)
    if isinstance(op, Gate):
        scale = inputs[1] if len(inputs) == 2 else own[0]
        assert scale is not None
        scale = scale if scale.dim() == 4 else scale.unsqueeze(0)
        if "gate" in step.keep:
            kept[step.keep["gate"]] = scale.expand(-1, x.shape[1], -1, -1)
        return x * scale, x if step.stash else None
    if isinstance(op, Scale):
        return x * op.factor, None
    if isinstance(op, Add):
        other = inputs[1]
        if step.inplace and x.dtype == torch.promote_types(x.dtype, other.dtype):
            return x.add_(other, alpha=op.alpha), None
        return torch.add(x, other, alpha=op.alpha), None
    if isinstance(op, Cat):
        return torch.cat(inputs, dim=1), None
    if isinstance(op, Slice):
        part = x[:, op.start : op.start + op.width]
        # A view of an entry cannot leave an autograd function.
        return part.clone() if step.result in plan.exits else part, None
    if isinstance(op, View):
        return x, None
    if isinstance(op, Drop):
        noise = elementwise.noise(x.new_empty(*x.shape[:2], 1, 1), op.p)
        if "gate" in step.keep:
            kept[step.keep["gate"]] = noise
        return x * noise, None
    if isinstance(op, Resize):
        return _resize(op, x), None
    if isinstance(op, Pad):
        return F.pad(x, (*op.cols, *op.rows, *op.channels), value=op.value), None
    if isinstance(op, WindowPool):
        return _pool(op, x, step.stash)
    assert isinstance(op, Pool)
    return x.mean(dim=(2, 3), keepdim=True), None


def _resize(op: Resize, x: Tensor) -> Tensor:
    if op.scale is not None:
        # Told the size, PyTorch may round the ratio differently.
        return F.interpolate(x, scale_factor=op.scale, mode=op.mode, align_corners=op.corners)
    return F.interpolate(x, op.size, mode=op.mode, align_corners=op.corners)


def _pool(op: WindowPool, x: Tensor, places: bool) -> tuple[Tensor, Tensor | None]:
    """The result, and of maxima, if wanted, where in a plane they are."""
    how = (op.kernel, op.stride, op.padding)
    if op.kind == "mean":
        return F.avg_pool2d(x, *how, op.ceil, op.include_pad, op.divisor), None
    if not places:
        return F.max_pool2d(x, *how, ceil_mode=op.ceil), None
    return F.max_pool2d_with_indices(x, *how, ceil_mode=op.ceil)


def _through(op: Op, product: Tensor, places: Tensor | None) -> Tensor:
    """A product of derivatives taken through an operation; of maxima it is that at their ``places``."""
    if isinstance(op, Pad):
        return F.pad(product, (*op.cols, *op.rows))
    if isinstance(op, Resize):
        return _resize(op, product)
    assert isinstance(op, WindowPool)
    if op.kind == "mean":
        product = product.to(reference.sum_dtype(product.dtype))
        return F.avg_pool2d(product, op.kernel, op.stride, op.padding, op.ceil, count_include_pad=False)
    assert places is not None
    return product.flatten(2).gather(2, places.flatten(2)).view(places.shape)


def _convolution(op: Conv, step: Forward, x: Tensor, own: Sequence[Tensor | None], kept: dict[int, Tensor]) -> Tensor:
    weight, bias = own
    assert weight is not None
    if weight.dim() == 2:  # of a linear layer
        weight = weight[:, :, None, None]
    if "weight" in step.keep:
        kept[step.keep["weight"]] = weight
    x, weight, bias = cast_for_convolution(x, weight, bias)
    # A segment that made x may have made x~, too.
    save = "x~" in step.keep and step.keep["x~"] not in kept
    y: Tensor
    y, filtered = operators.conv2d(
        x, weight, bias, op.stride, op.padding, op.dilation, op.groups, op.patch, op.library, save
    )
    if save:
        kept[step.keep["x~"]] = filtered
    return y


def _normalisation(
    op: Norm, step: Forward, x: Tensor, own: Sequence[Tensor | None], kept: dict[int, Tensor]
) -> tuple[Tensor, Tensor | None]:
    mean, variance, scale, shift = own
    assert mean is not None
    assert variance is not None
    dtype = reference.sum_dtype(torch.promote_types(x.dtype, variance.dtype))
    inverse = (variance.to(dtype) + op.eps).rsqrt()
    if "scale" in step.keep:
        slope = inverse if scale is None else inverse * scale.to(dtype)
        kept[step.keep["scale"]] = slope.view(1, -1, 1, 1)
    normalised = None
    if step.stash:
        normalised = (x.to(dtype) - mean.to(dtype).view(1, -1, 1, 1)).mul_(inverse.view(1, -1, 1, 1))
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, op.eps), normalised


# Backward


def backward(
    plan: Plan, kept: Packed, grads: Mapping[int, Tensor | None], function: Callable[..., None] | None = None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The backward pass of a chain: by ``function``, which a library has for it, else its steps one by one.

    One by one, products are the library's kernels where it has them, and the rest PyTorch's operators.

    Args:
        kept: what :func:`forward` returned, packed as ``function`` takes it.
        grads: the gradient of each exit, None where there is none.

    Returns:
        The gradients of entries (full size) and of tensors (of any shape), by their numbers; those that are zero may
        lack.
    """
    like = next((grad for grad in grads.values() if grad is not None), None)
    if like is None:
        return {}, {}
    if function is not None and plan.backward is not None:
        inputs = plan.backward.inputs(kept, grads)
        if inputs is not None:
            return plan.backward.run(function, inputs)
    with without_autocast(like.device.type):
        return _Backward(plan, kept.slots(), grads).run()


class _Backward:
    def __init__(self, plan: Plan, kept: Sequence[Tensor], grads: Mapping[int, Tensor | None]) -> None:
        self.plan, self.kept, self.grads = plan, kept, grads
        self.registers: list[Tensor | None] = [None] * len(plan.registers)
        self.last_use = _last_use(plan)
        self.of_entries: dict[int, Tensor] = {}
        self.of_tensors: dict[int, Tensor] = {}

    def run(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        for number, step in enumerate(self.plan.steps):
            if isinstance(step, Filter | Take):
                self._incoming(step)
            elif isinstance(step, Gather):
                self.registers[step.dst] = self._gather(step)
            elif isinstance(step, Plus):
                a, b = self.registers[step.a], self.registers[step.b]
                self.registers[step.dst] = a if b is None else b if a is None else a + b
            else:
                src = self.registers[step.src]
                if src is not None:
                    self._from(step, src)
            for register in self.last_use.get(number, ()):
                self.registers[register] = None
        return self.of_entries, self.of_tensors

    def _incoming(self, step: Filter | Take) -> None:
        grad = self.grads[step.value]
        if grad is None:
            return
        if isinstance(step, Filter):
            self.registers[step.dst] = reference.filter_grad(grad, step.geometry)
        else:
            self.registers[step.dst] = grad.reshape(*grad.shape[:2], 1, 1).to(reference.sum_dtype(grad.dtype))

    def _gather(self, step: Gather) -> Tensor | None:
        total: Tensor | None = None
        for part in step.parts:
            t = self.registers[part.src]
            if t is None:
                continue
            for dim, cells in ((2, part.rows), (3, part.cols)):
                t = grids.to_cells(t, dim, cells.in_b)
            if part.mean is not None:
                t = t * self._kept(part.mean, t)
            t = _weighted(t, part.weight_rows, part.weight_cols)
            t = t.expand(*t.shape[:2], part.rows.cells.patches, part.cols.cells.patches)
            t = grids.add_cells(t, 2, part.rows.in_a, step.grid.rows.patches)
            t = grids.add_cells(t, 3, part.cols.in_a, step.grid.cols.patches)
            if part.width < step.channels:
                t = F.pad(t, (0, 0, 0, 0, part.start, step.channels - part.start - part.width))
            total = t if total is None else total + t
        return total

    def _kept(self, slot: int, like: Tensor) -> Tensor:
        return self.kept[slot].to(like.dtype)

    def _from(self, step: Any, src: Tensor) -> None:
        if isinstance(step, ConvInput):
            weight = self.kept[step.weight]
            self.registers[step.dst] = kernels.input_grad(src, weight, step.geometry, step.library)
        elif isinstance(step, ConvWeight):
            grad = kernels.weight_grad(src, self.kept[step.filtered], step.geometry, step.library)
            self._give(step.tensor, grad.flatten())
        elif isinstance(step, PatchSum):
            mean = None if step.mean is None else self._kept(step.mean, src)
            sums = _pixel_sums(src, mean, step.grid).sum(0)
            self._give(step.tensor, F.pad(sums, (step.start, step.channels - step.start - step.width)))
        elif isinstance(step, MapSum):
            sums = _pixel_sums(src, self._kept(step.mean, src), step.grid)
            self.registers[step.dst] = (sums.sum(0, keepdim=True) if step.batch else sums)[:, :, None, None]
        elif isinstance(step, Times):
            self.registers[step.dst] = src * step.factor
        elif isinstance(step, TimesSaved):
            scale = self._kept(step.slot, src)
            self.registers[step.dst] = src * scale[:, step.start : step.start + step.width]
        elif isinstance(step, Channels):
            self.registers[step.dst] = src[:, step.start : step.start + step.width]
        else:
            assert isinstance(step, Expand)
            full = grids.expand(src, step.grid)
            channels = self.plan.shapes[step.value][1]
            if step.width < channels:
                full = F.pad(full, (0, 0, 0, 0, step.start, channels - step.start - step.width))
            before = self.of_entries.get(step.value)
            self.of_entries[step.value] = full if before is None else before + full

    def _give(self, tensor: int, grad: Tensor) -> None:
        before = self.of_tensors.get(tensor)
        self.of_tensors[tensor] = grad if before is None else before + grad


def _last_use(plan: Plan) -> dict[int, list[int]]:
    """By step, the registers that nobody reads afterwards."""
    last: dict[int, int] = {}
    for number, step in enumerate(plan.steps):
        for register in reads(step):
            last[register] = number
    found: dict[int, list[int]] = {}
    for register, number in last.items():
        found.setdefault(number, []).append(register)
    return found


def _weighted(t: Tensor, rows: tuple[float, ...], cols: tuple[float, ...]) -> Tensor:
    if any(weight != 1 for weight in rows):
        t = t * vector(rows, t)[:, None]
    if any(weight != 1 for weight in cols):
        t = t * vector(cols, t)
    return t


def _pixel_sums(t: Tensor, mean: Tensor | None, grid: grids.Grid) -> Tensor:
    """Per image and channel, the sum over all pixels of the map that is t * mean on each patch."""
    t = t if mean is None else t * mean
    t = t @ vector(tuple(float(c) for c in grid.cols.counts), t)
    return t @ vector(tuple(float(c) for c in grid.rows.counts), t)
