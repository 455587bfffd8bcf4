"""Decides, for the shapes of one step, which operations of a region form chains and which run as in the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .graph import Conv, Op, Outside, Region, Shape
from .lowering import Situation, lower


@dataclass(frozen=True)
class Layout:
    """What runs in one training step, in this order: chains (sets of operations) and plain operations (one number).

    Attributes:
        reasons: value -> why its gradient has full size.
    """

    units: tuple[tuple[int, ...] | int, ...]
    situation: Situation
    reasons: dict[int, str]


def partition(
    region: Region,
    shapes: Sequence[Shape | None],
    needs: Sequence[bool],
    trained: frozenset[int],
    chain: bool = True,
) -> Layout:
    """Find the longest chains.

    A value's gradient either stays on patch grids or has full size. It has full size where it comes from outside of
    the region; where an operation that is not a convolution has one at its result, its inputs have one, too. A chain
    is what is connected by values of the first kind. Whatever stands in the way makes one more gradient full-size,
    until nothing does.

    Args:
        shapes, needs: of the entries (None: no map), and whether their gradients are needed.
        trained: the region's tensors whose gradients are needed.
        chain: whether there are to be chains at all.
    """
    all_shapes, misfits = region.shapes(shapes)
    needed = _needed(region, needs, trained)
    if not chain or not any(needed[value] for _, value in region.filtered()):
        situation = Situation(all_shapes, needed, trained, {}, range(len(region.ops)), frozenset(region.exits))
        return Layout(tuple(range(len(region.ops))), situation, {})
    plain = {i for i in range(len(region.ops)) if not needed[region.result(i)]}
    plain |= {i for i in range(len(region.ops)) if i in misfits or all_shapes[region.result(i)] is None}
    full: dict[int, str] = {}
    situation = Situation(all_shapes, needed, trained, full, plain, frozenset(region.exits))
    for value, reason in region.exits.items():
        if needed[value] and not situation.small(value):
            full[value] = reason
    for i in plain:
        value = region.result(i)
        if needed[value]:
            full[value] = misfits.get(i, "its input is not on the patch grid")
    while True:
        _contaminate(region, situation, full, plain)
        found = lower(region, situation, set(range(len(region.ops))) - plain).problems
        found = {value: reason for value, reason in found.items() if value not in full}
        chains: list[set[int]] = []
        if not found:
            levels = _levels(region, situation)
            chains = _connected(region, situation, levels)
            found = _torn(region, situation, levels)
        full.update(found)
        if not found:
            break
    worth = [chain for chain in chains if _worthwhile(region, situation, chain)]
    alone = set(range(len(region.ops))).difference(*worth)
    return Layout(_ordered(region, [*worth, *({i} for i in alone)], alone), situation, full)


def _needed(region: Region, entries: Sequence[bool], trained: frozenset[int]) -> list[bool]:
    """By value, whether anything that is trained, or an entry whose gradient is needed, comes before it."""
    needed = list(entries)
    for op in region.ops:
        before = any(t in trained for t in op.tensors) or any(needed[v] for v in op.inputs)
        needed.append(before and not (isinstance(op, Outside) and op.stops))
    return needed


def _contaminate(region: Region, situation: Situation, full: dict[int, str], plain: set[int]) -> None:
    """Operations with a full-size gradient at their result run plainly, and hand one to their inputs."""
    for i in reversed(range(len(region.ops))):
        op, value = region.ops[i], region.result(i)
        if value in full and not isinstance(op, Conv):
            plain.add(i)
        if i not in plain or not situation.needs[value]:
            continue
        for u in op.inputs:
            if situation.needs[u] and u >= region.entries and not situation.small(u):
                full.setdefault(u, full[value])


def _links(region: Region, situation: Situation, i: int) -> list[int]:
    """The values that operation ``i``, which is not plain, reads from another one without leaving the patch grid."""
    return [
        v
        for v in region.ops[i].inputs
        if v >= region.entries and situation.needs[v] and v not in situation.full
        and v - region.entries not in situation.plain
    ]  # fmt: skip


def _connected(region: Region, situation: Situation, levels: Sequence[int]) -> list[set[int]]:
    """Operations of one level that are connected by links."""
    chain_of: dict[int, set[int]] = {}
    for i in range(len(region.ops)):
        if i in situation.plain:
            continue
        joined = {i}
        for v in _links(region, situation, i):
            if levels[v - region.entries] == levels[i]:
                joined |= chain_of[v - region.entries]
        for j in joined:
            chain_of[j] = joined
    chains: dict[int, set[int]] = {id(chain): chain for chain in chain_of.values()}
    return list(chains.values())


def _levels(region: Region, situation: Situation) -> list[int]:
    """By operation, how often the way to it leaves a chain: a chain runs as one, so it has one level.

    What is only read further on is done there: a shortcut's convolution with the addition.
    """
    levels: list[int] = []
    for i, op in enumerate(region.ops):
        links = set() if i in situation.plain else set(_links(region, situation, i))
        before = [0]
        for v in op.inputs:
            if v >= region.entries:
                source = v - region.entries
                before.append(levels[source] + (source not in situation.plain and v not in links))
        levels.append(max(before))
    readers: dict[int, set[int]] = {i: set() for i in range(len(region.ops))}
    for i, op in enumerate(region.ops):
        for v in op.inputs:
            if v >= region.entries:
                readers[v - region.entries].add(i)
    moved = True
    while moved:
        moved = False
        for chain in _connected(region, situation, levels):
            after = set().union(*(readers[i] for i in chain)) - chain
            stay = any(region.result(i) in region.exits or region.result(i) in situation.full for i in chain)
            if not after or stay or any(i in situation.plain for i in after):
                continue
            later = min(levels[i] for i in after)
            if later > max(levels[i] for i in chain):
                for i in chain:
                    levels[i] = later
                moved = True
                break
    return levels


def _torn(region: Region, situation: Situation, levels: Sequence[int]) -> dict[int, str]:
    """Values that are read at another level than they are computed at."""
    found = {}
    for i, op in enumerate(region.ops):
        if i not in situation.plain:
            for v in _links(region, situation, i):
                if levels[v - region.entries] != levels[i]:
                    found[v] = f"{op.name} reads something else as well that comes later"
    return found


def _worthwhile(region: Region, situation: Situation, chain: set[int]) -> bool:
    """Whether a chain has a filtered convolution on a map whose result's gradient stays on the patch grid."""

    def gains(i: int, op: Op) -> bool:
        stays = region.result(i) not in situation.full
        return isinstance(op, Conv) and op.filtered and stays and not situation.small(op.inputs[0])

    return any(gains(i, region.ops[i]) for i in chain)


def _ordered(region: Region, units: list[set[int]], alone: set[int]) -> tuple[tuple[int, ...] | int, ...]:
    """The units in an order in which each finds its inputs, as near to the region's order as can be."""
    unit_of = {i: k for k, unit in enumerate(units) for i in unit}
    done: set[int] = set()
    order: list[tuple[int, ...] | int] = []

    def emit(k: int) -> None:
        if k in done:
            return
        done.add(k)
        for i in sorted(units[k]):
            for v in region.ops[i].inputs:
                if v >= region.entries and unit_of[v - region.entries] != k:
                    emit(unit_of[v - region.entries])
        members = tuple(sorted(units[k]))
        order.append(members[0] if members[0] in alone else members)

    for i in range(len(region.ops)):
        emit(unit_of[i])
    return tuple(order)
