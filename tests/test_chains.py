"""Chains: gradients that stay on the patch grid are those of the unchained filtered model."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import pytest
import torch
from chain_networks import BLOCKS, CHANNELS, Network
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor, nn

import gf_tvm
from gf_tvm.chains import ChainReport, chains_of
from gf_tvm.chains import grids, lowering

pytestmark = pytest.mark.usefixtures("one_thread")

#: What the random networks were made of, to show that they met everything.
MET: Counter[str] = Counter()


def prepare(model: nn.Module, seed: int, freeze: str) -> nn.Module:
    """Random weights, statistics and flags; batch norms in the mode that they are marked with."""
    generator = torch.Generator().manual_seed(seed)
    model.double().train()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.data.copy_(0.4 * noise + (0.3 if tensor.dim() > 1 else 0.6))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_().add_(0.1)
            module.train(not module.frozen)
            for parameter in module.parameters():
                parameter.requires_grad_(module.trained)
    choice = random.Random(seed)
    parameters = list(model.parameters())
    if freeze == "some":
        for parameter in parameters:
            parameter.requires_grad_(parameter.requires_grad and choice.random() < 0.6)
    if freeze == "first":
        for parameter in parameters[: len(parameters) // 2]:
            parameter.requires_grad_(False)
    return model


def gradients(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The result and the gradients of all parameters and of the input, if it needs one."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    torch.manual_seed(seed)  # of dropout
    y = model(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"result": y.detach(), **found, **({"input": x.grad} if x.grad is not None else {})}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference; what is zero up to rounding is compared with the largest gradient."""
    assert actual.keys() == expected.keys()
    floor = 1e-4 * max(float(t.norm()) for t in expected.values())
    return max(
        float((actual[name] - expected[name]).norm()) / max(float(expected[name].norm()), floor, 1e-300)
        for name in expected
    )


def both(model: nn.Module, patches: dict[str, Any], x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], ChainReport]:
    """Gradients chained and unchained, and the chains."""
    plain = gf_tvm.filter_model(copy.deepcopy(model), patches)
    chained = gf_tvm.filter_model(copy.deepcopy(model), patches, chain=True)
    expected = gradients(plain, x)
    return gradients(chained, x), expected, chains_of(chained)


def filtered_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and not name.endswith("exact")]


@settings(max_examples=330, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    blocks=st.lists(BLOCKS, min_size=1, max_size=4),
    head=st.sampled_from(["pool", "mean", "map"]),
    size=st.tuples(st.integers(4, 15), st.integers(4, 15)),
    patches=st.lists(st.sampled_from([2, 2, 2, 4, 4, 7, (2, 4), (3, 2)]), min_size=1, max_size=2),
    freeze=st.sampled_from(["nothing", "first", "some"]),
    needs_input=st.booleans(),
    seed=SEEDS,
)
def test_chained_gradients_equal_unchained_ones(blocks, head, size, patches, freeze, needs_input, seed) -> None:
    model = prepare(Network(copy.deepcopy(blocks), head), seed, freeze)
    names = filtered_names(model)
    x = torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        with torch.no_grad():
            copy.deepcopy(model)(x)
    except (RuntimeError, ValueError):  # a map became too small for a kernel
        assume(False)
    assume(names)
    choice = random.Random(seed)
    by_name = {name: choice.choice(patches) for name in names if choice.random() < 0.9}
    assume(by_name)
    actual, expected, report = both(model, by_name, x.requires_grad_(needs_input))
    assert worst(actual, expected) < 1e-10, str(report)
    MET["networks"] += 1
    MET["chained networks"] += bool(report.chains)
    MET["chains of several"] += any(len(chain.convolutions) > 1 for chain in report.chains)
    MET["longest"] = max(MET["longest"], *(len(chain.convolutions) for chain in report.chains), 0)
    for chain in report.chains:
        MET.update(" ".join(end.split(": ", 1)[1].split()[1:4]) for end in chain.ends)
    MET.update(" ".join(reason.split()[1:5]) for reason in report.alone.values())


def test_show() -> None:
    for k, v in MET.most_common(80):
        print(v, k)
