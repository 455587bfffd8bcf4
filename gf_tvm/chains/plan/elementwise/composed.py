"""Finds functions that PyTorch makes of several operators (softsign, tanhshrink) in graphs of ATen operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx


def argument_of(last: fx.Node, function: Callable[[Tensor], Tensor]) -> fx.Node | None:
    """z, if the step ``last`` of a graph and those before it are ``function(z)``, operator by operator; else None."""
    pattern = _traced(function)
    (result,) = pattern.output_node().all_input_nodes
    found: dict[fx.Node, fx.Node] = {}
    if not _same(result, last, found):
        return None
    (z,) = (found[node] for node in pattern.nodes if node.op == "placeholder")
    return z


@cache
def _traced(function: Callable[[Tensor], Tensor]) -> fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx  # whose import takes a second

    with torch.no_grad():
        return make_fx(function, pre_dispatch=True)(torch.zeros(1)).graph


def _same(expected: Any, actual: Any, found: dict[fx.Node, fx.Node]) -> bool:
    """Whether an argument is the pattern's. ``found``: which steps those of the pattern are, so that each is one."""
    if not isinstance(expected, fx.Node):
        return isinstance(actual, int | float) and bool(expected == actual)
    if not isinstance(actual, fx.Node):
        return False
    if expected not in found:
        if expected.op != "placeholder":
            if (expected.op, expected.target, len(expected.args)) != (actual.op, actual.target, len(actual.args)):
                return False
            if expected.kwargs != actual.kwargs:
                return False
            if not all(_same(a, b, found) for a, b in zip(expected.args, actual.args, strict=True)):
                return False
        found[expected] = actual
    return found[expected] is actual
