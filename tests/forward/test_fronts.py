"""Compiled forward passes of random networks, against PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from front_networks import Network, exact, excess, random_networks, varied
from torch import Tensor

import gf_tvm
from gf_tvm.bundle.library import Library
from gf_tvm.core.workload import ALIGNMENT
from gf_tvm.forward.engine import Compiled
from gf_tvm.forward.lower import Lowered, lower
from gf_tvm.forward.programs import FrontProgram
from gf_tvm.forward.steps import Convolution, Each, Enter, Leave, Mean, Window, Winograd
from gf_tvm.machine.profiles import DeviceProfile, get_profile, missing_flags

pytestmark = pytest.mark.usefixtures("one_thread")

#: Elements around what a compiled function may write to.
_FENCE = 64


def build(fronts: Sequence[Lowered], profile: str, path: Path) -> Library:
    gf_tvm.build([], profile, out=path, programs=[FrontProgram(found.front) for found in fronts])
    return gf_tvm.load(path)


def compiled(network: Network, found: Lowered, library: Library) -> Compiled:
    function = library.program(found.front.key)
    assert function is not None
    assert library.fingerprints is not None
    return Compiled(network.part, found, function, library.fingerprints)


def fenced(elements: int) -> tuple[Tensor, Tensor]:
    """(memory full of NaN, the elements in it that may be written)."""
    memory = torch.full((elements + 2 * _FENCE,), math.nan)
    return memory, memory[_FENCE : _FENCE + elements]


def run(network: Network, what: Compiled) -> list[Tensor]:
    """The exits, where everything that is written was NaN before; nothing is written beside it."""
    front = what.front
    sizes = [max(1, front.weights), front.memory.size, *(math.prod(shape) for shape in what._shapes)]
    memories, inner = zip(*map(fenced, sizes), strict=True)
    weights, arena, *results = inner
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in inner)
    what._weights, what._packed = weights, None
    what._pack([network.tensors[t] for t in network.part.tensors])
    before = [entry.clone() for entry in network.entries]
    what._function(*(entry.view(-1) for entry in network.entries), weights, arena, *results)
    assert all(map(torch.equal, before, network.entries))
    for memory in memories:
        assert memory[:_FENCE].isnan().all()
        assert memory[-_FENCE:].isnan().all()
    return [result.view(shape) for result, shape in zip(results, what._shapes, strict=True)]


def by_winograd(found: Lowered) -> list[int]:
    pairs = zip(found.front.calls, found.parameters, strict=True)
    return [p.weight for call, p in pairs if p is not None and p.weight is not None and isinstance(call.step, Winograd)]


def worst(network: Network, found: Lowered, library: Library) -> float:
    return excess(run(network, compiled(network, found, library)), exact(network, by_winograd(found)))


#: What makes steps differ, to show that all of it was met.
KINDS: dict[str, Callable[[Any], bool]] = {
    "dense": lambda s: type(s) is Convolution and s.groups == 1 and not s.depthwise,
    "of few channels": lambda s: type(s) is Convolution and s.srcs[0].block < s.dst.block and s.dst.block > 1,
    "groups of whole blocks": lambda s: type(s) is Convolution and s._blockwise and not s.depthwise,
    "other groups": lambda s: type(s) is Convolution and s.groups > 1 and not s._blockwise and not s.depthwise,
    "depthwise": lambda s: type(s) is Convolution and s.depthwise,
    "strided": lambda s: type(s) is Convolution and max(s.stride) > 1,
    "dilated": lambda s: type(s) is Convolution and max(s.dilation) > 1,
    "by channels": lambda s: type(s) is Convolution and s.tile.by_channels,
    "Winograd's, 2": lambda s: isinstance(s, Winograd) and s.outputs == 2,
    "Winograd's, 4": lambda s: isinstance(s, Winograd) and s.outputs == 4,
    "largest": lambda s: isinstance(s, Window) and s.kind == "max",
    "means of windows": lambda s: isinstance(s, Window) and s.kind == "mean",
    "means": lambda s: isinstance(s, Mean),
    "by themselves": lambda s: isinstance(s, Each),
    "added": lambda s: any(kind == "add" for kind, _ in s.after),
    "gated": lambda s: any(kind == "gate" for kind, _ in s.after),
    "unequal borders": lambda s: s.dst.top != s.dst.bottom or s.dst.left != s.dst.right,
    "channels left over": lambda s: s.dst.channels % s.dst.block > 0,
    "one pixel": lambda s: (s.dst.height, s.dst.width) == (1, 1),
    "some images": lambda s: s.images > 1,
    "shared": lambda s: s.shared,
    "not shared": lambda s: not s.shared,
}


def kinds(cases: Iterable[tuple[Network, Lowered]]) -> set[str]:
    steps = [call.step for _, found in cases for call in found.front.calls]
    return {name for name, holds in KINDS.items() if any(map(holds, steps))}


def cases_of(profile: DeviceProfile, count: int) -> list[tuple[Network, Lowered]]:
    """Networks as they are compiled by default, and in other tiles and orders."""
    networks = random_networks(count, 1000 * profile.lanes, 2 * profile.lanes)
    cases = [(network, lower(network.part, profile)) for network in networks]
    return cases + [(network, varied(found, profile, network.seed)) for network, found in cases]


@pytest.mark.parametrize("name", ["host", "x86-64-v3"])
def test_random_networks(name: str, tmp_path: Path) -> None:
    profile = get_profile(name)
    if missing := missing_flags(profile):
        pytest.skip(f"this CPU lacks {missing[0]}")
    cases = cases_of(profile, 25)
    assert kinds(cases) == KINDS.keys()
    steps = {call.step for _, found in cases for call in found.front.calls}
    assert sum(not isinstance(step, Enter | Leave) for step in steps) > 150  # twice
    library = build([found for _, found in cases], profile.name, tmp_path / "fronts.gfb")
    for network, found in cases:
        assert worst(network, found, library) <= 1, f"{network}\n{found.front.nests}"
