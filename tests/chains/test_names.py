"""Convolutions of captured graphs have their fully qualified names, whatever way the model's code reaches them."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch import Tensor, nn

import gf_tvm

pytestmark = pytest.mark.usefixtures("one_thread")


#: Dynamo breaks a graph where code takes a lock.
LOCK = threading.Lock()


class Own(nn.Conv2d):
    """Filtered only where it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Part(nn.Module):
    """Convolutions and other parts, reached in ways that differ from their names.

    Attributes:
        order: names of all convolutions in it, in the order in which they run; relative to it.
    """

    def __init__(self, choose: random.Random, depth: int, breaks: bool, kind: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.breaks, self.held, self.way = breaks, [], []
        self.order: list[str] = []
        names = choose.sample("abcdefg", choose.randint(1, 3))
        for name in names:
            inside = depth > 0 and choose.random() < 0.6
            child = Part(choose, depth - 1, breaks and choose.random() < 0.4, kind) if inside else kind(2, 2, 1)
            self.add_module(name, child)
        for name in choose.sample(names, len(names)):
            child = getattr(self, name)
            self.held.append(child)
            self.way.append(choose.choice(("list", "attribute", "modules", "hidden")))
            self.order += [f"{name}.{inner}" for inner in child.order] if isinstance(child, Part) else [name]
        self.names = [next(n for n, m in self.named_children() if m is child) for child in self.held]
        self.hidden = {name: (child,) for name, child in zip(self.names, self.held, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        for number, (name, way) in enumerate(zip(self.names, self.way, strict=True)):
            if self.breaks:
                LOCK.acquire()
                LOCK.release()
            if way == "list":
                x = self.held[number](x)
            elif way == "attribute":
                x = getattr(self, name)(x)
            elif way == "modules":
                x = self._modules[name](x)  # type: ignore[misc]
            else:
                x = self.hidden[name][0](x)
        return x.relu()


# Dynamo looks at everything that a graph takes, maps after a break too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_names_are_those_of_the_model(seed: int, breaks: bool) -> None:
    torch.manual_seed(seed)
    model = Part(random.Random(seed), 2, breaks).double()
    registered = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(model.order) == sorted(registered)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    for last in sorted({1, (len(registered) + 1) // 2, len(registered)}):
        gf_tvm.filter_model(model, 2, last=last)
        for _ in range(2):
            model(x).sum().backward()
            report, chains = gf_tvm.filter_report(model), gf_tvm.chains_of(model)
            named = [*report.filtered, *report.left_alone]
            assert sorted(named) == sorted(registered)
            if not breaks:
                assert set(report.filtered) == set(model.order[-last:])
            else:  # the order in which they run is not known
                assert set(report.filtered) == set(registered[-last:])
            in_chains = [conv for chain in chains.chains for conv in chain.convolutions]
            assert sorted([*in_chains, *chains.alone]) == sorted(report.filtered)
        gf_tvm.unfilter_model(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("seed", range(8))
def test_parts_of_one_class_are_filtered_as_each_was_chosen(seed: int) -> None:
    """Dynamo captures the code of a class once for all its objects, where it may."""
    models = []
    for kind in (Own, nn.Conv2d):
        torch.manual_seed(seed)
        models.append(Part(random.Random(seed), 2, True, kind).double())
    own, plain = models
    choose = random.Random(seed)
    chosen = choose.sample(own.order, choose.randint(1, len(own.order)))
    gf_tvm.filter_model(own, 2, layers=chosen)
    gf_tvm.filter_model(plain, 2, layers=chosen, chain=False)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for _ in range(2):
        for model in models:
            model.zero_grad()
            model(x).square().sum().backward()
        for (name, a), b in zip(own.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert set(gf_tvm.filter_report(own).filtered) == set(chosen)
