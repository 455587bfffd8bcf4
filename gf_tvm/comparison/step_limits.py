"""The shortest time that a machine's limits allow for a step: operator by operator, bytes moved or operations made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .limits import shortest


@dataclass(frozen=True)
class StepLimit:
    """``forward`` and ``backward`` in ms, and what they are made of."""

    forward: float
    backward: float
    forward_bytes: int
    forward_operations: int
    backward_bytes: int
    backward_operations: int

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Operator:
    moved: int
    operations: int
    views: bool


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What each operator reads, writes and computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[_Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _storages((args, kwargs)), _storages(out)
        operations = _operations(func, args, kwargs, out)
        # What writes in place reads and writes the same memory.
        moved = sum(inputs.values()) + sum(outputs.values())
        views = not func._schema.is_mutable and bool(outputs) and set(outputs) <= set(inputs)
        self.operators.append(_Operator(moved, operations, views))
        return out


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiplications and additions."""
    if func._overloadpacket is torch.ops.aten.convolution_backward:
        # PyTorch's own count multiplies with the groups.
        grad_y, _, weight = args[:3]
        products = sum(bool(wanted) for wanted in args[-1][:2])
        return int(2 * products * grad_y.numel() * math.prod(weight.shape[1:]))
    count = flop_registry.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count is not None else 0


def _storages(values: Any) -> dict[int, int]:
    """Bytes of the tensors in ``values``, those of one storage once."""
    found: dict[int, int] = {}
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            address = value.untyped_storage().data_ptr()
            found[address] = max(found.get(address, 0), value.numel() * value.element_size())
    return found


def step_limit(
    loss: Callable[[], tuple[Tensor, Tensor]],
    parameters: Sequence[Tensor],
    limits: tuple[float, float],
    fused: bool = False,
    kept_bytes: int | None = None,
) -> StepLimit:
    """Run one step eagerly and sum up its operators' limits.

    Args:
        loss: the forward pass; logits and loss.
        parameters: those that are trained.
        limits: GFLOP/s of products, GB/s of a copy.
        fused: whether operators without products come free, because they are part of those beside them.
        kept_bytes: of a backward pass that stays on the patch grid: it reads these, and reads and writes parameters;
            maps on the grid may stay in a cache. None: it is counted as the forward pass is.
    """
    for parameter in parameters:
        parameter.grad = None
    with _Recorder() as forward:
        _, value = loss()
    with _Recorder() as backward:
        value.backward()  # type: ignore[no-untyped-call]
    ahead = _counted(forward.operators, fused)
    back = _counted(backward.operators, fused)
    forward_ms = sum(shortest(op.moved, op.operations, *limits)[0] for op in ahead)
    if kept_bytes is None:
        moved, operations = (sum(getattr(op, what) for op in back) for what in ("moved", "operations"))
        backward_ms = sum(shortest(op.moved, op.operations, *limits)[0] for op in back)
    else:
        moved = kept_bytes + 2 * sum(p.numel() * p.element_size() for p in parameters)
        operations = sum(op.operations for op in back)
        backward_ms = shortest(moved, operations, *limits)[0]
    return StepLimit(
        forward=forward_ms,
        backward=backward_ms,
        forward_bytes=sum(op.moved for op in ahead),
        forward_operations=sum(op.operations for op in ahead),
        backward_bytes=moved,
        backward_operations=operations,
    )


def _counted(operators: Iterable[_Operator], fused: bool) -> list[_Operator]:
    return [op for op in operators if not op.views and (op.operations or not fused)]
