"""A chain by itself: its operations apart from the network around them, in a chain or one by one.

For measuring and checking. The operations are those of the network's trace, the modules those of whatever copy of the
network they are run with: an unfiltered one, one that is filtered layer by layer, one in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..core.geometry import Geometry
from .capture import Capture, CapturedRegion
from .graph import Shape
from .interpreter import Interpreter
from .model import ChainedForward
from .plan import Plan
from .run import run_chain
from .steps import ConvInput, ConvWeight

#: Called with a step and its result; what it returns takes the result's place.
Watch = Callable[[fx.Node, Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """One chain of a model.

    Attributes:
        root: name of the traced module that it lies in.
        plan: what the chain does.
        sizes: of maps, also of some outside of the chain, that its operations take.
    """

    root: str
    captured: Capture
    part: CapturedRegion
    plan: Plan
    sizes: Mapping[fx.Node, Any]

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Fully qualified names of the filtered ones, in the order of execution."""
        prefix = f"{self.root}." if self.root else ""
        return tuple(prefix + name for name in self.plan.convolutions)

    @property
    def entries(self) -> list[tuple[Shape, bool]]:
        """The maps that it takes: shape, and whether the gradient is needed."""
        return [(self.plan.shapes[v], v in self.plan.needs) for v in self.plan.entries]

    @property
    def exits(self) -> list[bool]:
        """Of each map that it gives, whether a gradient comes back (or only its shape is read)."""
        members = {step.index for step in self.plan.forward}
        region = self.part.region
        read = {v for i, op in enumerate(region.ops) if i not in members for v in op.inputs}
        return [v in read or v in region.exits for v in self.plan.exits]

    def products(self) -> dict[int, tuple[Geometry, set[str]]]:
        """By the register of g~: the convolution, and the kernels of the products that are made of it."""
        found: dict[int, tuple[Geometry, set[str]]] = {}
        for step in self.plan.steps:
            if isinstance(step, ConvInput | ConvWeight):
                _, made = found.setdefault(step.src, (step.geometry, set()))
                made.add("input_grad" if isinstance(step, ConvInput) else "weight_grad")
        return found


def pieces_of(model: nn.Module) -> Iterator[Piece]:
    """The chains of ``model``'s last training step, as :func:`gf_tvm.chains_of` lists them."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, ChainedForward) and isinstance(forward.last, Interpreter):
            for runner in forward.last.regions.values():
                for plan, _ in () if runner.last is None else runner.last[1]:
                    yield Piece(name, forward.last.captured, runner.part, plan, runner.sizes)


class Bound:
    """A piece with the modules of ``model``: the one that it was found in, or a copy, filtered or not."""

    def __init__(self, piece: Piece, model: nn.Module) -> None:
        self.piece = piece
        self._interpreter = Interpreter(model.get_submodule(piece.root), piece.captured)
        self._readers: dict[fx.Node, int] = {}
        for k, step in enumerate(piece.plan.forward):
            for v in step.op.inputs:
                self._readers[piece.part.nodes[v]] = k
        values = (*piece.plan.entries, *(step.result for step in piece.plan.forward))
        inside = {piece.part.nodes[v] for v in values}
        self._measured = {size: self._maps_of(size, inside) for size in piece.sizes}

    def _maps_of(self, size: fx.Node, inside: set[fx.Node]) -> set[fx.Node] | None:
        """The maps, of those ``inside`` of the piece, that a size is computed from; None if it takes any other."""
        maps: set[fx.Node] = set()
        steps = [size]
        while steps:
            step = steps.pop()
            if step in inside:
                maps.add(step)
            elif step in self.piece.captured.numbers:
                steps += step.all_input_nodes
            else:
                return None
        return maps

    def _measure(self, env: dict[fx.Node, Any]) -> None:
        """Read the sizes of maps while they are there: the batch may be another one than the network's."""
        for size, maps in self._measured.items():
            if size not in env and maps is not None and maps <= env.keys():
                self._interpreter.compute(size, env)

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, by ``plan.tensors``."""
        return [self._interpreter.attribute(self.piece.part.tensors[t]) for t in self.piece.plan.tensors]

    @property
    def trained(self) -> list[Tensor]:
        """Of these, the parameters whose gradients are needed."""
        return [t for i, t in zip(self.piece.plan.tensors, self.tensors, strict=True) if i in self.piece.plan.trained]

    def chained(self, entries: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The exits, with the chain's own backward pass."""
        return run_chain(self.piece.plan, entries, self.tensors)

    def one_by_one(self, entries: Sequence[Tensor], watch: Watch | None = None) -> tuple[Tensor, ...]:
        """The exits, each operation as the network runs it without chains. What works in place may change entries."""
        piece, part = self.piece, self.piece.part
        numbered = set(part.nodes)
        exits = [part.nodes[v] for v in piece.plan.exits]
        env = {part.nodes[v]: entry for v, entry in zip(piece.plan.entries, entries, strict=True)}
        env |= {size: piece.sizes[size] for size, maps in self._measured.items() if maps is None}
        self._measure(env)
        for k, step in enumerate(piece.plan.forward):
            node = part.nodes[step.result]
            self._interpreter.compute(node, env)
            if watch is not None:
                env[node] = watch(node, env[node])
            self._measure(env)
            # As in the network: what nobody reads any more is held by autograd alone, if at all.
            for gone in [n for n in env if n not in exits and (n not in numbered or self._readers.get(n, -1) <= k)]:
                if gone not in self._measured:
                    del env[gone]
        return tuple(env[node] for node in exits)
