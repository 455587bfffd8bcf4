"""A stretch of a graph, between borders, as a region: all of its steps as numbered operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx
from torch._ops import OpOverload

from ..plan.graph import Conv, Op, Outside, Pool, Region, View
from .recognise import Found, Known, is_flat, outside, recognise
from .sites import name_of


@dataclass(frozen=True)
class Stretch:
    """A region, and where its values and tensors are found.

    Attributes:
        nodes: the step that computes each value, entries first.
        tensors: the steps that compute its parameters and buffers.
    """

    region: Region
    nodes: tuple[fx.Node, ...]
    tensors: tuple[fx.Node, ...]


def as_stretch(steps: Sequence[fx.Node], known: Known) -> Stretch:
    """The steps, none of which is early, as a region. Adds them to ``known.found``."""
    for node in steps:
        known.found[node] = recognise(node, known)
    found = {node: what for node in steps if isinstance(what := known.found[node], Found)}
    dropped: set[fx.Node] = set()
    _drop_unread(found, known, dropped)
    _leave_flat(found, known, dropped)
    found = _restored(found, steps, known, dropped)
    _drop_unread(found, known, dropped)
    readers = _readers(found, known, dropped)
    order = list(found)
    members = set(order)
    inputs = {node: [known.source(i) for i in found[node].inputs] for node in order}
    entries = list(dict.fromkeys(i for node in order for i in inputs[node] if i not in members))
    numbers = {node: v for v, node in enumerate((*entries, *order))}
    tensors: dict[fx.Node, int] = {}
    ops: list[Op] = []
    for node in order:
        given = tuple(
            None if t is None else tensors.setdefault(known.source(t), len(tensors)) for t in found[node].tensors
        )
        ops.append(replace(found[node].op, inputs=tuple(numbers[i] for i in inputs[node]), tensors=given))
    exits = {
        numbers[node]: _user(others[0]) for node in order if (others := [u for u in readers[node] if u not in members])
    }
    names = tuple(map(name_of, entries))
    return Stretch(Region(len(entries), tuple(ops), exits, names), (*entries, *order), tuple(tensors))


def _readers(
    found: Mapping[fx.Node, Found], known: Known, dropped: Collection[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """By operation, the steps that read its result, perhaps by another name of it."""
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in found}
    for node in found:
        stack = list(node.users)
        while stack:
            user = stack.pop(0)
            if user in dropped:
                continue
            if user in known.found and known.source(user) is node:
                stack += user.users
            elif user in found:
                if any(known.source(i) is node for i in found[user].inputs):
                    readers[node].append(user)
            else:
                readers[node].append(user)
    # A view that skips the steps between reads what none of its own arguments is.
    for user, what in found.items():
        for source in map(known.source, what.inputs):
            if source in readers and user not in readers[source]:
                readers[source].append(user)
    return readers


def _drop_unread(found: dict[fx.Node, Found], known: Known, dropped: set[fx.Node]) -> None:
    """Steps that only gave what is now read from elsewhere: a cut of which all pieces are known, say."""
    readers = _readers(found, known, dropped)
    for node in reversed(list(found)):
        pure = not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable
        if node.op == "call_function" and pure and not readers[node]:
            del found[node]
            dropped.add(node)
            for others in readers.values():
                if node in others:
                    others.remove(node)


def _restored(
    found: Mapping[fx.Node, Found], steps: Sequence[fx.Node], known: Known, dropped: set[fx.Node]
) -> dict[fx.Node, Found]:
    """With the steps that were dropped, and are read after all, in the order of the graph."""
    result = dict(found)
    stack = [i for what in found.values() for i in what.inputs]
    while stack:
        node = known.source(stack.pop())
        if node in dropped:
            dropped.discard(node)
            result[node] = outside(node, known)
            stack += result[node].inputs
    return {node: result[node] for node in steps if node in result}


def _user(node: fx.Node) -> str:
    """Why a gradient that comes from ``node`` has full size."""
    if node.op == "output":
        return "it is a result of the graph"
    return f"{name_of(node)} cannot stay on the patch grid"


def _leave_flat(found: dict[fx.Node, Found], known: Known, dropped: Collection[fx.Node]) -> None:
    """Values (n, c) that go elsewhere than back to a map run as they are: a classifier is as ever.

    The mean over a map may be a chain's last operation.
    """
    while True:
        readers = _readers(found, known, dropped)
        gone = []
        for node, what in found.items():
            if isinstance(what.op, Pool | Outside):
                continue
            to_flat = isinstance(what.op, View) and what.op.flat
            reads_flat = not to_flat and any(map(is_flat, what.inputs))
            read_by_others = not readers[node] or any(
                user not in found or isinstance(found[user].op, Outside) for user in readers[node]
            )
            source = known.source(what.inputs[0])
            known_source = source in found and not isinstance(found[source].op, Outside)
            if (is_flat(node) and read_by_others) or (reads_flat and not known_source):
                gone.append(node)
        if not gone:
            return
        for node in gone:
            found[node] = outside(node, known, "is not filtered" if isinstance(found[node].op, Conv) else "is flat")
