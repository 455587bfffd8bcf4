"""What is no chain, compiled by another backend of ``torch.compile``: inductor, say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.fx.passes.split_module import split_module

from .aten import switches

#: A backend of ``torch.compile``, or its name.
Backend = str | Callable[..., Any]

#: Fewer operators than that are not worth a compiled function.
_WORTH = 2


def compile_rest(module: fx.GraphModule, backend: Backend) -> fx.GraphModule:
    """``module`` with each stretch of plain operators as a function that ``backend`` compiles when it first runs."""
    parts: dict[fx.Node, int] = {}
    plain: dict[int, int] = {}
    number, before = -1, False
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        # What takes a chain's results apart stays with it.
        own = node.op == "call_module" or isinstance(node.target, HigherOrderOperator) or switches(node)
        if not own and not _is_operator(node) and parts.get(node.args[0]) is not None:
            parts[node] = parts[node.args[0]]
            continue
        if own or not before:
            number += 1
        before = not own
        parts[node] = number
        if not own:
            plain[number] = plain.get(number, 0) + 1
    split = split_module(module, module, lambda node: parts[node])
    for k, count in plain.items():
        name = f"submod_{k}"
        if count >= _WORTH:
            setattr(split, name, torch.compile(getattr(split, name), backend=backend, dynamic=False))
    return split


def _is_operator(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)
