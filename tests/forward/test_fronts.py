"""Compiled forward passes of random networks, against PyTorch in float64."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from front_networks import MAPS, Network, exact, excess, network_of, random_networks, varied
from torch import Tensor
from virtual_pi import run_in

import gf_tvm
from gf_tvm.blocked import emit_steps
from gf_tvm.blocked.emit_steps import Products, StepCode
from gf_tvm.blocked.steps import Convolution, Each, Enter, Leave, Mean, Window, Winograd
from gf_tvm.blocked.winograd import Matrix
from gf_tvm.bundle.format import LIBRARY, MANIFEST
from gf_tvm.bundle.library import Library
from gf_tvm.chains.plan.elementwise import FUNCTIONS
from gf_tvm.chains.plan.graph import Add, Conv, Gate, Map, Outside, Pad, Pool, View, WindowPool
from gf_tvm.core.workload import ALIGNMENT
from gf_tvm.forward.engine import Compiled
from gf_tvm.forward.front import _Places
from gf_tvm.forward.lower import Lowered, lower
from gf_tvm.forward.programs import FrontProgram
from gf_tvm.kernels.cpu import simd
from gf_tvm.machine.profiles import DeviceProfile, get_profile, missing_flags

pytestmark = pytest.mark.usefixtures("one_thread")

#: Elements around what a compiled function may write to.
_FENCE = 64


def build(fronts: Sequence[Lowered], profile: DeviceProfile, path: Path) -> Library:
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
    before = [entry.view(torch.int32).clone() for entry in network.entries]
    what._function(*(entry.view(-1) for entry in network.entries), weights, arena, *results)
    assert all(torch.equal(was, entry.view(torch.int32)) for was, entry in zip(before, network.entries, strict=True))
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
    library = build([found for _, found in cases], profile, tmp_path / "fronts.gfb")
    for network, found in cases:
        assert worst(network, found, library) <= 1, f"{network}\n{[call.step for call in found.front.calls]}"


def test_random_networks_on_an_emulated_cortex_a72(virtual_root: Path, tmp_path: Path) -> None:
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("linking for aarch64 needs: apt-get install g++-aarch64-linux-gnu")
    profile = get_profile("rpi4")
    cases = cases_of(profile, 20)
    assert kinds(cases) == KINDS.keys()
    gf_tvm.build([], profile, out=tmp_path / "rpi4.gfb", programs=[FrontProgram(found.front) for _, found in cases])
    with zipfile.ZipFile(tmp_path / "rpi4.gfb") as archive:
        manifest = json.loads(archive.read(MANIFEST))
        (tmp_path / "kernels.so").write_bytes(archive.read(LIBRARY))
    symbols = {program["key"]: program["symbol"] for program in manifest["programs"]}
    arrays: dict[str, Any] = {}
    described = []
    for k, (network, found) in enumerate(cases):
        wanted, front = exact(network, by_winograd(found)), found.front
        # Packed here, by PyTorch.
        what = Compiled(network.part, found, lambda *_: None, lambda *_: b"")
        what._pack([network.tensors[t] for t in network.part.tensors])
        for j, tensor in enumerate((*network.entries, what._weights)):
            arrays[f"{k}_given_{j}"] = tensor.numpy()
        for j, exit in enumerate(wanted):
            arrays[f"{k}_value_{j}"], arrays[f"{k}_error_{j}"] = exit.value.numpy(), exit.error.numpy()
        given = len(network.entries) + 1
        described.append(
            {"symbol": symbols[front.key], "arena": front.memory.size, "given": given, "exits": len(wanted)}
        )
    (tmp_path / "cases.json").write_text(json.dumps(described))
    np.savez(tmp_path / "arrays.npz", **arrays)
    said = json.loads(run_in(virtual_root, Path(__file__).with_name("on_board.py"), str(tmp_path), cwd=tmp_path))
    assert len(said["worst"]) == len(cases)
    for (network, found), error in zip(cases, said["worst"], strict=True):
        assert error <= 1, f"{network}\n{[call.step for call in found.front.calls]}"
    assert said["changes"] == 8 * 297


def conv(x: int, weight: int, co: int, kernel: int = 3, **settings: Any) -> Conv:
    return Conv(
        "conv",
        (x,),
        (weight, None),
        kernel=(kernel,) * 2,
        padding=(kernel // 2,) * 2,
        co=co,
        filtered=False,
        **settings,
    )


def odd_networks() -> dict[str, Network]:
    """What random networks hardly ever have."""
    torch.manual_seed(1)
    x, pixel = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 1, 1)
    weights = [torch.randn(4, 3, 3, 3), torch.randn(3, 3, 3, 3), torch.randn(1, 1, 3, 3)]
    pad = {"rows": (1, 1), "cols": (0, 2)}
    largest = {"kind": "max", "kernel": (2, 2), "stride": (1, 1), "padding": (1, 1)}
    # Read by convolutions outside, which no part has.
    outside = (Outside("outside", (0,), reason="is outside", result=(2, 3, 6, 6)),)
    return {
        "one channel": network_of([conv(0, 2, 1), conv(1, 2, 1)], [x[:, :1].clone()], weights, [2]),
        "a padding of an entry that only others read": network_of(
            [conv(0, 0, 4), Pad("pad", (1,), **pad), *outside, conv(3, 0, 4)], [x, x + 1], weights, [2, 5]
        ),
        "a padding that others read, too": network_of(
            [conv(0, 1, 3), Pad("pad", (1,), **pad), conv(2, 0, 4), *outside, conv(2, 0, 4)], [x], weights, [3, 5]
        ),
        "a pixel with two borders, by way of views": network_of(
            [
                Pool("pool", (0,)),
                conv(1, 0, 4),
                View("flat", (1,), flat=True),
                View("back", (3,)),
                WindowPool("largest", (4,), **largest),
            ],
            [x],
            weights,
            [2, 5],
        ),
        "a view and what it is a view of": network_of(
            [conv(0, 1, 3), View("flat", (1,), flat=True), Map("relu", (2,), flat=True, kind="relu")],
            [pixel], weights, [1, 2, 3],
        ),
        "a pixel that gates itself": network_of([Gate("gate", (0, 0)), conv(1, 0, 4)], [pixel], weights, [1, 2]),
        "added to itself, then changed": network_of(
            [conv(0, 1, 3), Add("add", (1, 1), alpha=-0.5), Map("relu", (2,), kind="relu"), Add("add", (3, 1))],
            [x], weights, [4],
        ),
        "the same twice": network_of([conv(0, 1, 3), conv(0, 1, 3), Add("add", (1, 2))], [x], weights, [1, 3]),
        "what nobody reads": network_of([conv(0, 0, 4), conv(0, 1, 3)], [x], weights, [2]),
        "flat entries": network_of(
            [Conv("linear", (0,), (3, None), True, co=5, filtered=False)],
            [pixel.flatten(1)], [*weights, torch.randn(5, 3)], [1],
        ),
    }  # fmt: skip


def test_odd_networks(host: DeviceProfile, tmp_path: Path) -> None:
    networks = odd_networks()
    found = {name: lower(network.part, host) for name, network in networks.items()}
    assert [len(n.entries) for n in networks.values()] == [1] * len(networks)
    library = build(list(found.values()), host, tmp_path / "odd.gfb")
    for name, network in networks.items():
        assert worst(network, found[name], library) <= 1, name


def test_winograd_loses_little(host: DeviceProfile, tmp_path: Path) -> None:
    """Of the result's norm, on an x86-64 with AVX-512: tiles of 4 pixels up to 1.6e-6, those of 2 up to 6e-7."""
    generator = torch.Generator().manual_seed(1)
    cases = []
    for channels, size in ((64, 28), (256, 14), (512, 7)):
        weight = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        # As after an activation: not about zero.
        x = torch.randn(2, channels, size, size, generator=generator).relu()
        network = network_of([conv(0, 0, channels)], [x], [weight], [1])
        found = lower(network.part, host)
        cases += [(network, found), (network, varied(found, host, 0, outputs=2))]
    library = build([found for _, found in cases], host, tmp_path / "winograd.gfb")
    for network, found in cases:
        (step,) = (call.step for call in found.front.calls if isinstance(call.step, Winograd))
        (y,), (wanted,) = run(network, compiled(network, found, library)), exact(network)
        lost = float((y.double() - wanted.value).norm() / wanted.value.norm())
        assert 0 < lost < {2: 1e-6, 4: 3e-6}[step.outputs], (step.outputs, step.dst)


def test_a_budget_of_memory(host: DeviceProfile, tmp_path: Path) -> None:
    """The same results in less memory, down to what one image at a time takes."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(c, c, 3, 3, generator=generator) / 20 for c in (32, 300)]
    x = torch.randn(8, 32, 16, 16, generator=generator)
    widened = torch.randn(300, 32, 1, 1, generator=generator) / 6
    ops = [conv(0, 0, 32), conv(1, 0, 32), conv(2, 2, 300, 1), conv(3, 1, 300), conv(4, 1, 300)]
    network = network_of(ops, [x], [*weights, widened], [5])
    fastest = lower(network.part, host)
    whole = 4 * fastest.front.memory.size
    budgets = [whole, whole // 2, whole // 4, 1]
    found = [lower(network.part, host, budget) for budget in budgets]
    sizes = [4 * lowered.front.memory.size for lowered in found]
    assert sizes[0] == whole
    assert all(size <= budget for size, budget in zip(sizes[:-1], budgets[:-1], strict=True))
    assert 0 < sizes[-1] == min(sizes) < whole // 6
    assert {nest.images for nest in found[-1].front.nests} == {1}
    library = build(found, host, tmp_path / "budgets.gfb")
    for lowered in found:
        assert worst(network, lowered, library) <= 1


@pytest.mark.parametrize("lanes", [4, 8])
def test_nan_is_where_pytorch_has_it(lanes: int, host: DeviceProfile, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 7, 6, generator=torch.Generator().manual_seed(1))
    x[0, 1, 2, 3] = x[1, 4, 0, 0] = x[1, 0, 6, 5] = math.nan
    windows = {"kernel": (3, 2), "stride": (1, 1), "padding": (1, 0)}
    kinds = sorted({kind for kind, _ in MAPS})
    ops = [WindowPool("largest", (0,), kind="max", **windows)]
    ops += [Map(kind, (0,), kind=kind, settings=settings) for kind, settings in MAPS]
    network = network_of(ops, [x], [], range(1, 1 + len(ops)))
    assert len(network.part.ops) == len(ops) > len(kinds)
    profile = replace(host, lanes=lanes)
    found = lower(network.part, profile)
    results = run(network, compiled(network, found, build([found], profile, tmp_path / "nan.gfb")))
    expected = [F.max_pool2d(x, (3, 2), 1, (1, 0))]
    expected += [FUNCTIONS[kind].apply(x, False, *settings) for kind, settings in MAPS]
    for op, result, wanted in zip(ops, results, expected, strict=True):
        torch.testing.assert_close(result, wanted, equal_nan=True, rtol=1e-5, atol=1e-5, msg=f"{op}")


def no_right_border(self: StepCode, image: Any, block: Any, first: Any, rows: int) -> None:
    self.dst = replace(self.dst, right=0)
    BORDER(self, image, block, first, rows)
    self.dst = self.step.dst


def wrong_matrices(m: int) -> tuple[Matrix, Matrix, Matrix]:
    a, g, b = MATRICES(m)
    return a, g, ((b[0][0] * 1.001, *b[0][1:]), *b[1:])


def freed_early(self: _Places, value: int, elements: int, since: int, until: int) -> None:
    PUT(self, value, elements, since, max(since, until - 1))


BORDER, MATRICES, PUT = StepCode.border, emit_steps.matrices, _Places.put
#: A mistake, and of which kind the step of a network must be that shows it.
MISTAKES: dict[str, tuple[Any, str, Any, str]] = {
    "a border is not written": (StepCode, "border", no_right_border, "unequal borders"),
    "blocks of another group": (Convolution, "first_block", lambda self, block: 0, "groups of whole blocks"),
    "an entry of Winograd's matrices": (emit_steps, "matrices", wrong_matrices, "Winograd's, 4"),
    "places are free too early": (_Places, "put", freed_early, "means of windows"),
    "no bias": (Products, "bias", lambda self, block, vectors: [simd.splat(0.0, self.lanes)] * vectors, "dense"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(
    mistake: str, host: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, wrong, kind = MISTAKES[mistake]
    cases = [case for case in cases_of(host, 25)[:25] if kind in kinds([case])][:4]
    assert cases
    with monkeypatch.context() as patch:
        patch.setattr(where, name, wrong)
        library = build([found for _, found in cases], host, tmp_path / "wrong.gfb")
    assert max(worst(network, found, library) for network, found in cases) > 1
