"""What a chain keeps for a compiled backward pass: in two buffers, and the same numbers as without."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from chain_networks import CHANNELS, Unit
from hypothesis import given
from hypothesis import strategies as st
from strategies import saved_tensors
from test_chain_programs import UNIT
from test_chains import filtered_names, prepare, worst
from torch import Tensor, nn

import gf_tvm
from gf_tvm.bundle.library import Library
from gf_tvm.chains import chains_of
from gf_tvm.chains.compile import compiled, packs
from gf_tvm.chains.run import run
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload

pytestmark = pytest.mark.usefixtures("one_thread")

SMOOTH = {**UNIT, "norm": "frozen", "act": "silu"}


class Branches(nn.Module):
    """Two units, and two convolutions that read the last one: both give a map."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(Unit(SMOOTH), Unit({**SMOOTH, "act": "relu"}))
        self.left, self.right = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.units(x)
        return self.left(y), self.right(y)


def network(chain: bool, library: Library | None = None, means: torch.dtype | None = None) -> nn.Module:
    model = prepare(Branches(), 4, "nothing").float()
    names = filtered_names(model)
    return gf_tvm.filter_model(
        model, 2, layers=names, chain=chain, library=library, **({"means": means} if chain else {})
    )


def image() -> Tensor:
    return torch.randn(3, CHANNELS, 9, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    model = network(True)
    model(image())
    workload = Workload("filter_input", Geometry(3, CHANNELS, CHANNELS, 9, 7, 3, 2, padding=1))
    path = tmp_path_factory.mktemp("packs") / "all.gfb"
    programs = gf_tvm.programs_of(model)
    assert any(isinstance(program.what, compiled.Backward) for program in programs)
    gf_tvm.build([workload], "host", out=path, shipped=False, programs=programs)
    return gf_tvm.load(path)


def gradients(model: nn.Module, right: bool = True) -> dict[str, Tensor]:
    """Those of all parameters; with ``right`` both maps are part of the loss."""
    model.zero_grad(set_to_none=True)
    left, other = model(image())
    loss = (left * torch.linspace(0.5, 1.5, 7)).sum()
    (loss + (other**2).sum() if right else loss).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def test_two_buffers_and_the_weights_are_kept(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run._Backward, "run", lambda self: pytest.fail("ran step by step"))
    chained = network(True, library)
    with saved_tensors() as saved:
        chained(image())
    weights = {p.data_ptr() for p in chained.parameters()}
    own = [tensor for tensor in saved if tensor.data_ptr() not in weights]
    assert len(own) == 2
    (chain,) = chains_of(chained).chains
    assert chain.kept_bytes == sum(t.numel() * t.element_size() for t in own)
    # Cells are whole lines, and a line is behind the last of them.
    least = 4 * chain.kept_values
    assert least <= chain.kept_bytes <= least + 4 * packs.LINE * (2 + len(chain.convolutions) * 4)
    assert worst(gradients(chained), gradients(network(False))) < 1e-5


def test_a_map_without_a_gradient(library: Library) -> None:
    """The compiled function wants all of them: the steps are done one by one, from the same buffers."""
    found = gradients(network(True, library), right=False)
    expected = gradients(network(False), right=False)
    assert not any(name.startswith("right") for name in expected)
    # As zeros, if at all.
    for name in [name for name in found if name not in expected]:
        assert not found.pop(name).any()
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("means", [torch.float16, torch.bfloat16])
def test_means_in_16_bits(library: Library, means: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(network(True, None, means))
    monkeypatch.setattr(run._Backward, "run", lambda self: pytest.fail("ran step by step"))
    chained = network(True, library, means)
    with saved_tensors() as saved:
        chained(image())
    assert [t.dtype for t in saved].count(means) == 1
    for model in (chained, copy.deepcopy(chained)):
        assert worst(gradients(model), plain) < 1e-5
    assert worst(plain, gradients(network(False))) > 1e-5


def test_changed_weights_are_noticed(library: Library) -> None:
    """As autograd does: a weight that the backward pass reads must not change before it has."""
    chained = network(True, library)
    left, right = chained(image())
    with torch.no_grad():
        chained.get_submodule("left").weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (left.sum() + right.sum()).backward()


@given(
    st.lists(
        st.tuples(st.sampled_from([None, packs.OTHERS, packs.MEANS]), st.lists(st.integers(1, 9), max_size=4)),
        min_size=1,
        max_size=9,
    )
)
def test_slots_lie_beside_each_other(slots: list[tuple[int | None, list[int]]]) -> None:
    layout = packs.Layout.of({k: (pack, tuple(shape)) for k, (pack, shape) in enumerate(slots) if pack is not None})
    kept = {k: torch.full(shape, float(k)) for k, (_, shape) in enumerate(slots)}
    buffers = layout.empty()
    packed = packs.Packed.of(kept, layout, buffers, layout.views(buffers))
    assert list(packed.alone) == [k for k, (pack, _) in enumerate(slots) if pack is None]
    assert all(view.data_ptr() % 64 == 0 for view in layout.views(buffers).values())
    found = packed.slots()
    assert all(torch.equal(found[k], t) for k, t in kept.items())
    halves = packed.with_means([k for k, (pack, _) in enumerate(slots) if pack == packs.MEANS], torch.float16)
    assert halves.packs[packs.MEANS].dtype == torch.float16
    assert halves.packs[packs.OTHERS] is packed.packs[packs.OTHERS]
    moved = layout.renumbered([k + 3 for k in range(len(slots))])
    assert moved.places.keys() == {k + 3 for k in layout.places}
    assert sum(layout.sizes) >= sum(math.prod(shape) for pack, shape in slots if pack is not None)
