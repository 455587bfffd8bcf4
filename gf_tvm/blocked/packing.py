"""Parameters as compiled convolutions read them: what is frozen after them folded in, channels in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .steps import Convolution, Winograd
from .tiling import cuts
from .winograd import matrices


@dataclass(frozen=True)
class Norm:
    """A frozen batch norm after a convolution: numbers of its tensors (scale and shift may be None), and its eps."""

    mean: int
    variance: int
    scale: int | None
    shift: int | None
    eps: float


@dataclass(frozen=True)
class Parameters:
    """Where a convolution's parameters come from: numbers of tensors.

    Attributes:
        weight: None: ones, of a batch norm that follows no convolution.
        norms: in their order.
    """

    weight: int | None
    bias: int | None
    norms: tuple[Norm, ...] = ()

    @property
    def tensors(self) -> tuple[int, ...]:
        """All that it is made of."""
        norms = (t for norm in self.norms for t in (norm.mean, norm.variance, norm.scale, norm.shift))
        return tuple(t for t in (self.weight, self.bias, *norms) if t is not None)


def pack(step: Convolution, parameters: Parameters, tensors: dict[int, Tensor], out: Tensor) -> None:
    """Write a convolution's packed parameters, :attr:`Convolution.weights` elements.

    Folded in float64, so that nothing is lost by it.

    Args:
        tensors: by number.
        out: float32, of one dimension.
    """
    weight, bias = _folded(step, parameters, tensors)
    block, co = step.dst.block, step.dst.channels
    padded = step.dst.blocks * block
    out[step.bias_at :].zero_()
    out[step.bias_at : step.bias_at + co].copy_(bias)
    if step.depthwise:
        columns = torch.zeros(padded, step.taps, dtype=torch.float64)
        columns[:co] = weight.reshape(co, step.taps)
        out[: step.bias_at].copy_(columns.view(step.dst.blocks, block, step.taps).transpose(1, 2).reshape(-1))
        return
    if isinstance(step, Winograd):
        g = torch.tensor(matrices(step.outputs)[1], dtype=torch.float64)
        weight = g @ weight @ g.T
    # (blocks of output channels, input channels that they read, taps, output channels)
    dense = _by_block(step, weight)
    at = 0
    if isinstance(step, Winograd):
        # By product of a tile: (taps, tiles of output channels, depth, output channels of a tile).
        wide = out[: step.bias_at].view(step.taps, -1)
        for cut in cuts(step.dst.blocks, step.tile.vectors):
            count = cut.count * cut.size
            part = dense[cut.start : cut.start + count].unflatten(0, (cut.count, cut.size))
            columns = count * block * step.depth
            wide[:, at : at + columns].copy_(part.permute(3, 0, 2, 1, 4).reshape(step.taps, -1))
            at += columns
        return
    for cut in cuts(step.dst.blocks, step.tile.vectors):
        for tile in range(cut.count):
            first = cut.start + tile * cut.size
            part = dense[first : first + cut.size]
            turned = _in_turns(step, part)
            out[at : at + turned.numel()].copy_(turned)
            at += turned.numel()


def _folded(step: Convolution, parameters: Parameters, tensors: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, with the norms in them."""

    def of(number: int | None, otherwise: float) -> Tensor:
        if number is None:
            return torch.full((step.dst.channels,), otherwise, dtype=torch.float64)
        return tensors[number].detach().double()

    weight = of(parameters.weight, 1.0)
    weight = weight.reshape(step.dst.channels, -1, *step.kernel)
    bias = of(parameters.bias, 0.0)
    for norm in parameters.norms:
        factor = of(norm.scale, 1.0) / torch.sqrt(of(norm.variance, 1.0) + norm.eps)
        weight = weight * factor[:, None, None, None]
        bias = (bias - of(norm.mean, 0.0)) * factor + of(norm.shift, 0.0)
    return weight, bias


def _by_block(step: Convolution, weight: Tensor) -> Tensor:
    """(blocks, depth, taps, block): zero where a channel does not read what others of its block do."""
    block, co = step.dst.block, step.dst.channels
    ci_group, co_group = step.srcs[0].channels // step.groups, co // step.groups
    found = torch.zeros(step.dst.blocks, step.depth, step.taps, block, dtype=torch.float64)
    channels = torch.arange(co)
    # By output channel, where its group's input channels begin among those that its block reads.
    first = torch.tensor([step.first_block(b) * step.srcs[0].block for b in range(step.dst.blocks)])[channels // block]
    at = (channels // co_group * ci_group - first)[:, None] + torch.arange(ci_group)
    found[(channels // block)[:, None], at, :, (channels % block)[:, None]] = weight.flatten(2)
    return found


def _in_turns(step: Convolution, part: Tensor) -> Tensor:
    """(vectors, depth, taps, block) in the order in which the products are made.

    Blocks of input channels, taps, the input channels of a block, output channels; what is left of the channels last.
    """
    block = step.srcs[0].block
    ordered = part.permute(1, 2, 0, 3)  # depth, taps, vectors, block
    whole = step.depth // block * block
    pieces = []
    if whole:
        pieces.append(ordered[:whole].unflatten(0, (-1, block)).transpose(1, 2).reshape(-1))
    if whole < step.depth:
        pieces.append(ordered[whole:].transpose(0, 1).reshape(-1))
    return torch.cat(pieces)
