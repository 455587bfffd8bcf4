"""Compiled forward passes in bundles: built by the commands' functions, loaded, used by a model that is filtered."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gf_tvm
from gf_tvm.chains.model import graphs_of
from gf_tvm.errors import ModelError
from gf_tvm.forward.engine import FrontStep
from gf_tvm.machine.profiles import get_profile
from gf_tvm.models import build_model
from gf_tvm.training import chain_programs
from gf_tvm.training.loop import training_mode
from gf_tvm.training.trainer import freeze

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 3, 32, 32)
LAST = 2


def network() -> nn.Module:
    """Fine-tuned as ``gf-tvm train`` does, with batch norms that do something."""
    torch.manual_seed(0)
    model = build_model("resnet18_025", 10, 3, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][-LAST:]
    freeze(model, names, False)
    training_mode(model, "finetune")
    return model


def fronts(model: nn.Module) -> list[FrontStep]:
    """Of the last step."""
    found = [front for _, graph in graphs_of(model) for front in graph.assembled.fronts]
    assert all(isinstance(front, FrontStep) for front in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("chain", [True, False])
def test_a_bundle_has_what_a_filtered_model_runs(tmp_path: Path, chain: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    names = [name for name, _ in gf_tvm.select_layers(model, last=LAST)]
    programs = chain_programs(copy.deepcopy(model), SHAPE, LAST, [2], chain=chain)
    library = gf_tvm.load(gf_tvm.build([], "host", out=tmp_path / "all.gfb", programs=programs).path)

    def outputs(**options: Any) -> tuple[torch.Tensor, list[FrontStep], nn.Module]:
        run = gf_tvm.filter_model(copy.deepcopy(model), 2, layers=names, chain=chain, **options)
        return run(x), fronts(run), run

    x = torch.randn(SHAPE)
    plain, none, _ = outputs(forward=False)
    assert none == []
    with caplog.at_level(logging.INFO, "gf_tvm"):
        compiled, (front,), run = outputs(library=library)
    assert front.library == library.digest
    (line,) = gf_tvm.filter_report(run).forward
    assert line == str(front)
    assert re.match(r"\d+ convolutions from conv1 to layer4\.0\.\S+ compiled; [\d.]+ MB between them at most, ", line)
    assert f"forward pass: {line}" in str(gf_tvm.filter_report(run))
    assert "no compiled forward pass" not in caplog.text
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    # Of another batch the library has none, which is said, and PyTorch runs it.
    with caplog.at_level(logging.INFO, "gf_tvm"):
        run(torch.randn(3, *SHAPE[1:]))
    assert [other.library for other in fronts(run)] == [""]
    assert gf_tvm.filter_report(run).forward[0].endswith(" in PyTorch, without a compiled function so far")
    assert "no compiled forward pass of" in caplog.text


def test_programs_are_those_of_the_device() -> None:
    model = network()
    found = {
        device: {p.key for p in chain_programs(model, SHAPE, LAST, [2], device=device)}
        for device in ("x86-64-v3", "rpi4")
    }
    own = {device: {key for key in keys if key.startswith("forward_")} for device, keys in found.items()}
    assert len(own["x86-64-v3"]) == len(own["rpi4"]) == 1
    assert own["x86-64-v3"] != own["rpi4"]
    # Chains and convolutions are the same functions on all.
    assert found["x86-64-v3"] - own["x86-64-v3"] == found["rpi4"] - own["rpi4"]


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "64MB"])
def test_a_budget_is_a_number_of_bytes(budget: Any) -> None:
    with pytest.raises(ModelError, match=r"memory_budget must be None or a positive number of bytes, got"):
        gf_tvm.filter_model(network(), 2, last=LAST, memory_budget=budget)


def test_a_budget_reaches_the_programs() -> None:
    model = network()
    names = [name for name, _ in gf_tvm.select_layers(model, last=LAST)]
    sizes = []
    for budget in (None, 1):
        run = gf_tvm.filter_model(copy.deepcopy(model), 2, layers=names, memory_budget=budget)
        run(torch.randn(4, *SHAPE[1:]))
        (front,) = fronts(run)
        sizes.append(front.program(get_profile("x86-64-v3")).front.memory.size)
    assert sizes[1] < sizes[0]
