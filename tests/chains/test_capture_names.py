"""Convolutions of a captured graph have the names that their modules have, however the model's code reaches them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import gf_tvm

#: What PyTorch takes as a module's name, without what torch.fx cannot quote and what Dynamo's paths consist of.
NAMES = st.text(st.sampled_from("ab01_ -'é"), min_size=1, max_size=4)


class Reached(nn.Module):
    """One convolution behind modules of the given names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        inside: nn.Module = nn.Conv2d(2, 2, 1)
        for name in reversed(names[1:]):
            outside = Calls(name)
            outside.add_module(name, inside)
            inside = outside
        self.add_module(names[0], inside)
        self.name = names[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, self.name)(x)
        return y


class Calls(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._modules[self.name](x)  # type: ignore[misc]
        return y


@settings(max_examples=12, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=3).filter(lambda names: not {"name", "_"} & set(names)), st.booleans())
def test_names_are_the_modules(names: list[str], traced: bool) -> None:
    model: nn.Module = Reached(names)
    if traced:  # its code then has getattr where a name is no identifier
        model = fx.symbolic_trace(model)
    gf_tvm.filter_model(model, 2, layers=".".join(names))
    model(torch.randn(1, 2, 4, 4))
    assert list(gf_tvm.filter_report(model).filtered) == [".".join(names)]
    assert not gf_tvm.filter_report(model).left_alone
