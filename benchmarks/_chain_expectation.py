"""What bytes and operations alone promise of a chain, by the operations that it really has.

The rule of thumb, 1 + 180 / C at patches of 2 and 1 + 730 / C at 4, is for residual blocks in the middle of a network.
A decode head begins and ends with maps of full size, and concatenates: here its own sweeps over full maps are counted,
with the same two rates, for float32.
"""

from __future__ import annotations

import math
from collections import Counter

from gf_tvm.chains.piece import Piece
from gf_tvm.chains.plan.graph import Add, Conv, Map, Norm
from gf_tvm.chains.plan.steps import Expand, Filter
from gf_tvm.chains.run.plan import Plan

#: The rates of the rule of thumb, and bytes of a number.
BYTES_A_SECOND, OPERATIONS_A_SECOND, ITEM = 35e9, 200e9, 4


def expected_gain(piece: Piece) -> float:
    """How many times as fast the chained backward pass should be as that of single filtered layers."""
    products = 0
    for geometry, made in piece.products().values():
        products += 2 * geometry.n * math.prod(geometry.grid) * geometry.co * geometry.ci_group * len(made)
    arithmetic = products / OPERATIONS_A_SECOND
    one_by_one, chained = (ITEM * sweeps(piece.plan) / BYTES_A_SECOND for sweeps in (layers_sweeps, chain_sweeps))
    return (arithmetic + one_by_one) / (arithmetic + chained)


def layers_sweeps(plan: Plan) -> int:
    """Numbers of full-size maps that the backward pass of single layers reads and writes.

    A convolution reads one map and writes one, a batch norm likewise; an activation reads its gradient and what it kept
    and writes; where a value is used k times, k - 1 additions read two gradients and write one.
    """
    needs = set(plan.needs)
    shapes = dict(plan.shapes)
    uses: Counter[int] = Counter()
    total = 0
    for step in plan.forward:
        op = step.op
        shapes[step.result] = op.shape(*(shapes[v] for v in op.inputs))
        needed = [v for v in op.inputs if v in needs]
        uses.update(needed)
        if needed or any(t in plan.trained for t in op.tensors):
            needs.add(step.result)
        size = math.prod(shapes[step.result]) if shapes[step.result][2:] != (1, 1) else 0
        if isinstance(op, Conv) and op.filtered:
            total += size if step.result in needs else 0
            total += sum(math.prod(shapes[v]) for v in needed)
        elif needed and not isinstance(op, Add):
            total += {Norm: 2, Map: 3}.get(type(op), 0) * size
    return total + sum(3 * (count - 1) * math.prod(shapes[v]) for v, count in uses.items())


def chain_sweeps(plan: Plan) -> int:
    """Likewise of the chain: the gradients that come in and go out at full size."""
    total = sum(math.prod(step.geometry.y_shape) for step in plan.steps if isinstance(step, Filter))
    written = {step.value for step in plan.steps if isinstance(step, Expand)}
    return total + sum(math.prod(plan.shapes[v]) for v in written)
