"""Decides, for the shapes of one step, which operations of a region form chains and which run as in the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .graph import Conv, Op, Region, Shape
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


def partition(region: Region, shapes: Sequence[Shape | None], needs: Sequence[bool], trained: frozenset[int]) -> Layout:
    """Find the longest chains.

    A value's gradient either stays on patch grids or has full size. It has full size where it comes from outside of
    the region; where an operation that is not a convolution has one at its result, its inputs have one, too. A chain
    is what is connected by values of the first kind. Whatever stands in the way makes one more gradient full-size,
    until nothing does.

    Args:
        shapes, needs: of the entries (None: no map), and whether their gradients are needed.
        trained: the region's tensors whose gradients are needed.
    """
    all_shapes, misfits = region.shapes(shapes)
    needed = _needed(region, needs, trained)
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
            chains = _connected(region, situation)
            found = _circular(region, situation, chains)
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
        needed.append(any(t in trained for t in op.tensors) or any(needed[v] for v in op.inputs))
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


def _connected(region: Region, situation: Situation) -> list[set[int]]:
    chain_of: dict[int, set[int]] = {}
    for i in range(len(region.ops)):
        if i in situation.plain:
            continue
        joined = {i}
        for v in _links(region, situation, i):
            joined |= chain_of[v - region.entries]
        for j in joined:
            chain_of[j] = joined
    chains: dict[int, set[int]] = {id(chain): chain for chain in chain_of.values()}
    return list(chains.values())


def _circular(region: Region, situation: Situation, chains: list[set[int]]) -> dict[int, str]:
    """Values that a chain needs from outside before it ends, though that depends on the chain itself."""
    number = {i: k for k, chain in enumerate(chains) for i in chain}
    before: list[set[int]] = []  # by operation, the chains that have to run before its result is there
    for op in region.ops:
        found: set[int] = set()
        for v in op.inputs:
            if v >= region.entries:
                source = v - region.entries
                found |= before[source]
                if source in number:
                    found.add(number[source])
        before.append(found)
    for i, op in enumerate(region.ops):
        if i not in number:
            continue
        links = set(_links(region, situation, i))
        for v in op.inputs:
            if v >= region.entries and v not in links:
                source = v - region.entries
                if number[i] in before[source] or number.get(source) == number[i]:
                    return {region.result(i): f"{op.name} depends on the chain's own result by another way"}
    # One chain may also wait for another that waits for it: give up a link of the first such chain.
    waits: list[set[int]] = [set() for _ in chains]
    for i in number:
        for v in region.ops[i].inputs:
            if v >= region.entries:
                source = v - region.entries
                others = before[source] | ({number[source]} if source in number else set())
                waits[number[i]] |= others - {number[i]}
    for k, chain in enumerate(chains):
        if k in _closure(waits, k):
            for i in sorted(chain, reverse=True):
                for v in _links(region, situation, i):
                    return {v: f"{region.ops[i].name} is part of two chains that need each other"}
    return {}


def _closure(waits: Sequence[set[int]], k: int) -> set[int]:
    found: set[int] = set()
    new = set(waits[k])
    while new:
        found |= new
        new = set().union(*(waits[j] for j in new)) - found
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
