"""Chains: gradients that stay on the patch grid are those of the unchained filtered model."""

from __future__ import annotations

import copy
import io
import pickle
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_networks import (
    BLOCKS,
    BREAKERS,
    CHANNELS,
    Breaker,
    Context,
    Network,
    Residual,
    Squeeze,
    SqueezeLinear,
    Unit,
)
from fake_library import FakeLibrary, loaded
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, saved_tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gf_tvm
from gf_tvm.chains import ChainReport, chains_of
from gf_tvm.chains.capture.assemble import ConvolutionStep
from gf_tvm.chains.capture.live import filtered_parts
from gf_tvm.chains.plan import elementwise, grids, lowering
from gf_tvm.chains.run import run
from gf_tvm.errors import ModelError
from gf_tvm.models import build_model

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


def both(
    model: nn.Module, patches: dict[str, Any], x: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], ChainReport]:
    """Gradients chained and unchained, and the chains."""
    plain = gf_tvm.filter_model(copy.deepcopy(model), patches, chain=False)
    chained = gf_tvm.filter_model(copy.deepcopy(model), patches)
    expected = gradients(plain, x)
    return gradients(chained, x), expected, chains_of(chained)


def runs(model: nn.Module, x: Tensor) -> bool:
    """Whether no map becomes too small for a kernel."""
    try:
        with torch.no_grad():
            copy.deepcopy(model)(x)
    except (RuntimeError, ValueError):
        return False
    return True


def filtered_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and not name.endswith("exact")]


@pytest.mark.parametrize("part", range(4))
@settings(max_examples=80, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    blocks=st.lists(BLOCKS, min_size=1, max_size=4),
    head=st.sampled_from(["pool", "mean", "map"]),
    size=st.tuples(st.integers(4, 15), st.integers(4, 15)),
    patches=st.lists(st.sampled_from([2, 2, 2, 4, 4, 7, (2, 4), (3, 2)]), min_size=1, max_size=2),
    freeze=st.sampled_from(["nothing", "first", "some"]),
    needs_input=st.booleans(),
    cells=st.sampled_from([1.0, grids.MAX_CELLS, grids.MAX_CELLS]),
    seed=SEEDS,
)
def test_chained_gradients_equal_unchained_ones(
    part, blocks, head, size, patches, freeze, needs_input, cells, seed
) -> None:
    model = prepare(Network(copy.deepcopy(blocks), head), seed, freeze)
    names = filtered_names(model)
    x = torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assume(runs(model, x))
    assume(names)
    choice = random.Random(seed)
    by_name = {name: choice.choice(patches) for name in names if choice.random() < 0.9}
    assume(by_name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "MAX_CELLS", cells)  # at 1 chains end where grids cut a map in different places
        actual, expected, report = both(model, by_name, x.requires_grad_(needs_input))
    # Not bit by bit: the order of a convolution's sums depends on where its tensors lie.
    if not torch.allclose(actual["result"], expected["result"], rtol=1e-10, atol=1e-12):
        # Chains run as wholes, so that several dropouts may draw their noise in another order.
        assert sum(isinstance(module, nn.Dropout | nn.Dropout2d) for module in model.modules()) > 1
        assume(False)
    assert worst(actual, expected) < 1e-10, str(report)
    lengths = [len(chain.convolutions) for chain in report.chains]
    MET.update({"networks": 1, "chained": bool(lengths), "of several": max(lengths, default=0) > 1})
    MET["longest"] = max(MET["longest"], *lengths, 0)


def test_random_networks_were_chained() -> None:
    """Runs after the property test, which without chains would show nothing."""
    if not MET:
        pytest.skip("the property test did not run")
    assert MET["networks"] >= 300
    assert MET["chained"] > 0.6 * MET["networks"]
    assert MET["of several"] > 0.5 * MET["networks"]
    assert MET["longest"] >= 6


UNIT: dict[str, Any] = {"kernel": 3, "stride": 1, "dilation": 1, "padding": None, "groups": 1, "bias": True}


@pytest.mark.parametrize("norm", ["trained", "none"])
@pytest.mark.parametrize(("breaker", "reason"), BREAKERS.items())
def test_ways_in_which_chains_end(breaker: str, reason: str, norm: str) -> None:
    """A convolution and a residual block before what ends the chain, and after it."""
    unit = {**UNIT, "norm": norm, "act": "relu"}
    blocks = [nn.Sequential(Unit(unit), Residual(unit, unit, False, "plus", "relu")) for _ in range(2)]
    model = prepare(Network([blocks[0], Breaker(breaker), blocks[1]], "mean"), 0, "nothing")
    x = torch.randn(2, CHANNELS, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual, expected, report = both(model, dict.fromkeys(filtered_names(model), 2), x)
    assert worst(actual, expected) < 1e-10
    first, last = report.chains[0], report.chains[-1]
    assert any(end.endswith(reason) for end in first.ends), report
    assert last.convolutions[-3:] == ("blocks.2.0.conv", "blocks.2.1.first.conv", "blocks.2.1.second.conv")
    assert last.needs_input
    # The residual's gradient has full size on both of its ways, up to the convolution before the block.
    assert first.convolutions == ("blocks.0.1.first.conv", "blocks.0.1.second.conv")
    assert report.alone["blocks.0.0.conv"].endswith(reason)


# Networks that are used


def fine_tuned(name: str, last: int, train_norm: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A built-in network with random statistics; its last convolutions and its classifier are trained."""
    torch.manual_seed(0)
    model = build_model(name, 5, 3, 32).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.requires_grad_(False)
    names = [layer for layer, _ in gf_tvm.select_layers(model, last=last)]
    after = False
    for layer, module in model.named_modules():
        after = after or layer in names
        if (
            layer in names
            or isinstance(module, nn.Linear)
            or (train_norm and after and isinstance(module, nn.BatchNorm2d))
        ):
            module.requires_grad_(True)
    return model.to(dtype)


def images(n: int = 2, size: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def filtered(model: nn.Module, last: int, patch: int = 2, chain: bool = False, **how: Any) -> nn.Module:
    """Without chains its modules run one by one, uncompiled: a reference of its own."""
    which: dict[str, Any] = {"last": last}
    if not chain:
        which = {"layers": [name for name, _ in gf_tvm.select_layers(model, last=last)]}
    return gf_tvm.filter_model(copy.deepcopy(model), patch, chain=chain, **which, **how)


@pytest.mark.parametrize("train_norm", [False, True])
@pytest.mark.parametrize("last", [4, 8])
@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("resnet18_025", {4: [4], 8: [8]}),
        ("mobilenetv2_025", {4: [4], 8: [8]}),
        ("mcunet_050", {4: [4], 8: [8]}),
        ("efficientnet_lite0_025", {4: [4], 8: [8]}),
        ("fcn_resnet18_025", {4: [4], 8: [8]}),
        ("deeplabv3_resnet18_025", {4: [4], 8: [8]}),
        ("pspnet_resnet18_025", {4: [], 8: [2]}),
        ("upernet_resnet18_025", {4: [2], 8: [3]}),
    ],
)
def test_networks(name: str, chains: dict[int, list[int]], last: int, train_norm: bool) -> None:
    model = fine_tuned(name, last, train_norm)
    plain, chained = filtered(model, last), filtered(model, last, chain=True)
    actual, expected = gradients(chained, images()), gradients(plain, images())
    torch.testing.assert_close(actual["result"], expected["result"], rtol=0, atol=0)
    assert worst(actual, expected) < 1e-10
    report = chains_of(chained)
    assert sorted(len(chain.convolutions) for chain in report.chains) == chains[last], str(report)
    convs = [conv for chain in report.chains for conv in chain.convolutions]
    assert sorted([*convs, *report.alone]) == sorted(gf_tvm.filter_report(chained).filtered)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "last", "chains"), [("ResNet", 8, [2, 5]), ("UperNet", 14, [3, 4])])
def test_networks_of_transformers(name: str, last: int, chains: list[int]) -> None:
    """They read sizes between operations, add in place and return objects of their own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6, 8, 10], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    if name == "ResNet":
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))
    else:
        trunk = transformers.ResNetConfig(**sizes, out_features=[f"stage{i}" for i in range(1, 5)])
        config = transformers.UperNetConfig(
            backbone_config=trunk, hidden_size=4, num_labels=3, use_auxiliary_head=False
        )
        model = transformers.UperNetForSemanticSegmentation(config)
    model.double().eval()
    # Not by names: the order in which layers run is another one than that in which they are listed.
    plain, chained = (gf_tvm.filter_model(copy.deepcopy(model), 2, last=last, chain=chain) for chain in (False, True))
    x = images(2, 64)
    results = []
    for each in (plain, chained):
        output = each(x)
        assert type(output) is type(model(x))
        output.logits.square().sum().backward()
        results.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert worst(results[1], results[0]) < 1e-10
    assert [len(chain.convolutions) for chain in chains_of(chained).chains] == chains


def test_whole_network_trained_with_wide_patches() -> None:
    model = fine_tuned("resnet18_025", 20, True).requires_grad_(True)
    plain, chained = filtered(model, 20, 4), filtered(model, 20, 4, chain=True)
    assert worst(gradients(chained, images()), gradients(plain, images())) < 1e-10
    assert max(len(chain.convolutions) for chain in chains_of(chained).chains) > 4


@pytest.fixture
def mistake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "mean":
        means = grids.patch_means
        monkeypatch.setattr(grids, "patch_means", lambda t, grid: means(t, grid) * 1.01)
    elif request.param == "product":
        monkeypatch.setattr(run, "_product", lambda a, b: b)
    elif request.param == "derivative":
        lax = replace(elementwise.FUNCTIONS["relu"], derivative=lambda g, z: torch.ones_like(z))
        monkeypatch.setitem(elementwise.FUNCTIONS, "relu", lax)


@pytest.mark.parametrize("mistake", ["mean", "product", "derivative"], indirect=True)
def test_a_mistake_is_noticed(mistake: None) -> None:
    model = fine_tuned("resnet18_025", 8, True)
    plain, chained = filtered(model, 8), filtered(model, 8, chain=True)
    assert worst(gradients(chained, images()), gradients(plain, images())) > 1e-3


@pytest.mark.parametrize("wrong", ["_times", "_times_saved", "_resize"])
def test_a_mistake_with_values_of_one_pixel_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost factor: of a mean or a repeated pixel; of dropped channels or a gate; a lost image branch."""
    unit = {**UNIT, "norm": "none", "act": "silu"}
    middle = [Context("tanh", "bilinear", "shape"), nn.Dropout2d(0.4), SqueezeLinear("relu", "view")]
    model = prepare(Network([Unit(unit), *middle, Unit(unit)], "map"), 0, "nothing")
    x = torch.randn(2, CHANNELS, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = {"blocks.0.conv": 2, "blocks.4.conv": 2}
    actual, expected, report = both(model, patches, x)
    assert worst(actual, expected) < 1e-10
    assert [chain.convolutions for chain in report.chains] == [tuple(patches)]
    wrongly = {"_times": lambda self, term, factor: term, "_times_saved": lambda self, term, kept: term}
    monkeypatch.setattr(lowering._Lowering, wrong, wrongly.get(wrong, lambda self, i, op, terms: None))
    actual, expected, _ = both(model, patches, x)
    assert any(
        name not in actual or (actual[name] - expected[name]).norm() > 1e-3 * expected[name].norm() for name in expected
    )


# What is kept


def kept(model: nn.Module, x: Tensor) -> tuple[int, list[Tensor]]:
    """What autograd keeps: bytes of the distinct storages, parameters and buffers left out, and the tensors."""
    ignored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}
    with saved_tensors() as saved:
        y = model(x).sum()
    for tensor in saved:
        if (address := tensor.untyped_storage().data_ptr()) not in ignored:
            found.setdefault(address, tensor)
    del y
    return sum(t.untyped_storage().nbytes() for t in found.values()), list(found.values())


@pytest.mark.parametrize("train_norm", [False, True])
@pytest.mark.parametrize(("name", "patch"), [("resnet18_025", 2), ("resnet18_025", 4), ("mobilenetv2_025", 2)])
def test_nothing_of_full_size_is_kept(name: str, patch: int, train_norm: bool) -> None:
    """Patches tile these maps, so 1 / patch^2 of the numbers is what two grids (x~ and the derivative's mean) take."""
    model = fine_tuned(name, 8, train_norm, torch.float32)
    x = images(8, 64, torch.float32)
    exact, _ = kept(copy.deepcopy(model), x)
    unchained, _ = kept(filtered(model, 8, patch), x)
    chained = filtered(model, 8, patch, chain=True)
    bytes_, tensors = kept(chained, x)
    (chain,) = chains_of(chained).chains
    maps = [t for t in tensors if t.dim() == 4 and t.numel() > t.shape[0] * max(t.shape[1], t.shape[3])]
    assert maps
    vectors = sum(t.numel() * t.element_size() for t in tensors if all(t is not m for m in maps))
    assert vectors < 0.03 * unchained  # per channel, and the classifier's input
    assert bytes_ - vectors <= 1.5 / patch**2 * exact
    assert bytes_ < 0.75 * unchained
    head = 4 * 8 * model.get_submodule("fc" if name.startswith("resnet") else "classifier.1").in_features
    assert 4 * chain.kept_values + head == bytes_


@pytest.mark.parametrize("means", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "relu6", "silu", "dropout"])
def test_means_in_16_bits(act: str, means: torch.dtype) -> None:
    """Exact where derivatives are 0 or 1 and patches have 4 pixels; the bytes are those that autograd keeps."""
    unit = {**UNIT, "norm": "frozen", "act": act}
    model = prepare(Network([Unit(unit), Residual(unit, unit, False, "plus", act)], "mean"), 0, "nothing")
    names, x = filtered_names(model), torch.randn(2, CHANNELS, 12, 8, dtype=torch.float64)
    chained = gf_tvm.filter_model(copy.deepcopy(model), 2, layers=names, means=means)
    plain = gf_tvm.filter_model(copy.deepcopy(model), 2, layers=names, chain=False)
    error = worst(gradients(chained, x), gradients(plain, x))
    exact, coarse = act.startswith("relu"), 2 * torch.finfo(means).eps
    assert error < (1e-10 if exact else coarse)
    assert exact or error > 1e-6
    for again in (copy.deepcopy(chained), pickle.loads(pickle.dumps(chained))):
        assert worst(gradients(again, x), gradients(chained, x)) < 1e-12
    bytes_, tensors = kept(chained, x)
    (chain,) = chains_of(chained).chains
    ours = 8 * (3 * 2 * 4 * 24 + 3 * 4) + 2 * (4 * 2 * 4 * 24)  # x~ and norms' scales; relu, relu, both relus, relu
    assert sum(t.dtype == means for t in tensors) == 4
    assert chain.kept_bytes == ours
    assert bytes_ == ours + 8 * 2 * CHANNELS  # and the classifier's input


def test_means_in_another_dtype_are_refused() -> None:
    model = small(chain=False)
    with pytest.raises(ModelError, match=r"means must be None .* or torch.bfloat16, got torch.int8"):
        gf_tvm.filter_model(model, 4, last=5, means=torch.int8)
    assert model.stem.patch == (2, 2)


def test_derivatives_are_kept_only_for_what_is_trained() -> None:
    chained = filtered(fine_tuned("resnet18_025", 8, True), 8, chain=True)
    all_of_it, _ = kept(chained, images())
    for layer, module in chained.named_modules():
        if isinstance(module, nn.BatchNorm2d) or layer.startswith("layer3"):
            module.requires_grad_(False)
    assert kept(chained, images())[0] < 0.6 * all_of_it
    assert worst(gradients(chained, images()), gradients(gf_tvm.unfilter_model(chained), images())) > 1e-6


# Everything else that happens to models


class Small(nn.Module):
    """Two residual blocks and a classifier; batch norms may use their statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(F.relu(self.stem(x)))).flatten(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        y += x
        return self.act(y)


def small(chain: bool = True, **how: Any) -> Small:
    model = Small().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.5)
    # Without chains its modules run one by one, uncompiled: a reference of its own.
    return gf_tvm.filter_model(model, 2, layers=lambda name, module: True, chain=chain, **how)


def is_chained(model: nn.Module) -> bool:
    return any(state.settings.chain for _, state in filtered_parts(model))


def lengths(model: nn.Module) -> list[int]:
    return [len(chain.convolutions) for chain in chains_of(model).chains]


def assert_same(chained: nn.Module, plain: nn.Module, x: Tensor | None = None) -> None:
    x = images(2, 14) if x is None else x
    assert worst(gradients(chained, x), gradients(plain, x)) < 1e-10


def test_report() -> None:
    model = small()
    assert "unchained, it has not run a training step" in str(chains_of(model))
    gradients(model, images(2, 14))
    report = chains_of(model)
    assert str(report).splitlines() == [
        "1 chains of 5 filtered convolutions",
        "  chain of 5: stem, blocks.0.conv1, blocks.0.conv2, blocks.1.conv1, blocks.1.conv2",
        "    ends after pool: its map is one pixel, so the gradient is the same on every grid",
    ]
    assert not report.chains[0].needs_input
    model(x=images(2, 14).requires_grad_())
    assert chains_of(model).chains[0].needs_input
    assert chains_of(nn.Linear(2, 3)).chains == ()


def test_modes_and_flags_count_when_the_model_runs() -> None:
    """Batch statistics, what is frozen, shapes, the input's gradient, patches: each step has its own plan."""
    chained, plain = small(), small(chain=False)
    assert_same(chained, plain)
    for model in (chained, plain):
        model.train()
    for size in (14, 9):
        assert_same(chained, plain, images(2, size))
    assert lengths(chained) == []
    assert "uses batch statistics" in str(chains_of(chained))
    for model in (chained, plain):
        model.eval().stem.requires_grad_(False)
        model.blocks[0].norm1.weight.requires_grad_(False)
    assert_same(chained, plain)
    assert lengths(chained) == [4]
    assert_same(chained, plain, images(3, 17).requires_grad_())
    for model in (chained, plain):
        model.stem.requires_grad_(True)
        model.blocks[1].conv2.patch = (3, 4)
    assert_same(chained, plain)
    for model in (chained, plain):
        model.requires_grad_(False)
    assert not chained(images(2, 14)).requires_grad


def test_gradients_off_runs_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    expected = model(images(2, 14)).detach()
    monkeypatch.setattr(run, "forward", None)
    with torch.no_grad():
        torch.testing.assert_close(model(images(2, 14)), expected, rtol=0, atol=0)


def hook_modules(
    models: tuple[Small, ...], where: str, change: Callable[[Tensor], Tensor], seen: list[str]
) -> list[Any]:
    """Forward hooks on one module of each model."""

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        seen.append(type(module).__name__)
        return change(y)

    parts = {"convolution": lambda m: m.blocks[0].conv2, "activation": lambda m: m.blocks[0].act}
    parts |= {"block": lambda m: m.blocks[1], "model": lambda m: m}
    return [parts[where](m).register_forward_hook(hook) for m in models]


@pytest.mark.parametrize("where", ["convolution", "activation", "block", "model"])
def test_hooks_run_and_end_no_chains(where: str) -> None:
    """What they compute is part of the network, whenever they come and go."""
    chained, plain = small(), small(chain=False)
    assert_same(chained, plain)
    seen: list[str] = []
    handles = hook_modules((chained, plain), where, lambda y: y * 2, seen)
    try:
        assert_same(chained, plain)
        runs = len(seen)
        assert runs
        assert lengths(chained) == [5]
        gradients(plain, images(2, 14))
        assert len(seen) == runs + runs / 2
    finally:
        for handle in handles:
            handle.remove()
    assert_same(chained, plain)
    assert len(seen) == runs + runs / 2
    assert lengths(chained) == [5]


@pytest.mark.parametrize(("where", "chains"), [("convolution", [2, 2]), ("activation", [2]), ("block", [2, 2])])
def test_hooks_that_leave_the_grid_end_chains(where: str, chains: list[int]) -> None:
    chained, plain = small(), small(chain=False)
    handles = hook_modules((chained, plain), where, lambda y: y.flip(3), [])
    assert_same(chained, plain)
    assert lengths(chained) == chains, str(chains_of(chained))
    assert re.search(r"by itself, blocks\S* cannot stay on the patch grid", str(chains_of(chained)))
    for handle in handles:
        handle.remove()
    assert_same(chained, plain)
    assert lengths(chained) == [5]


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_hooks_on_all_modules_see_all_modules(factor: float) -> None:
    """Dynamo would leave them out; so the model runs module by module while there are any."""
    chained, plain = small(), small(chain=False)
    assert_same(chained, plain)
    seen: list[nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, y: (seen.append(module), y * factor)[1]
    )
    try:
        actual = gradients(chained, images(2, 14))
        assert set(seen) == set(chained.modules())
        assert worst(actual, gradients(plain, images(2, 14))) < 1e-10
        assert "hooks on all modules" in chains_of(chained).waiting[""]
    finally:
        handle.remove()
    seen.clear()
    assert_same(chained, plain)
    assert not seen
    assert lengths(chained) == [5]


def test_hooks_on_the_model_run_once() -> None:
    chained, plain = small(), small(chain=False)
    for model in (chained, plain):
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model.register_forward_hook(lambda module, args, y: y * 3)
    assert_same(chained, plain)
    assert lengths(chained) == [5]


def test_state_dict_copies_and_pickles() -> None:
    chained, plain = small(), small(chain=False)
    assert list(chained.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in chained.named_modules()] == [name for name, _ in plain.named_modules()]
    assert type(chained) is Small
    for model in (chained, plain):
        assert_same(model, plain)
    file = io.BytesIO()
    torch.save(chained, file)
    file.seek(0)
    for again in (copy.deepcopy(chained), pickle.loads(pickle.dumps(chained)), torch.load(file, weights_only=False)):
        assert dict(filtered_parts(again))[""].module is again
        nn.init.zeros_(again.stem.weight)
        again.load_state_dict(plain.state_dict(), strict=True)
        assert_same(again, plain)
        assert lengths(again) == [5]


def test_unfiltering_and_filtering_again_remove_chains() -> None:
    model = small()
    assert is_chained(model)
    before = {*vars(Small())}
    assert {*vars(gf_tvm.unfilter_model(model))} == before
    assert not is_chained(model)
    gf_tvm.filter_model(model, 2, last=2)
    gradients(model, images(2, 14))
    assert lengths(model) == [2]
    gf_tvm.filter_model(model, 2, last=5, chain=False)
    assert not is_chained(model)
    assert_same(model, small(chain=False))
    assert lengths(model) == []
    assert set(chains_of(model).alone.values()) == {"chains are switched off"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    chained, plain = small(), small(chain=False)
    x = images(2, 14).requires_grad_()
    results = []
    for model in (chained, plain):
        x.grad = None
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        results.append({"input": x.grad.clone(), **{name: p.grad for name, p in model.named_parameters()}})
    assert worst(*results) < 1e-10
    assert lengths(chained) == [5]


class Checkpointed(Small):
    """Checkpoints its blocks, which drop pixels and channels."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.act = nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Dropout2d(0.3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        for block in self.blocks:
            y = checkpoint(block, y, use_reentrant=self.reentrant)
        return self.head(self.pool(y).flatten(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that are computed again have chains of their own."""
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)
    chained, plain = (
        gf_tvm.filter_model(Checkpointed().double().eval(), 2, layers=lambda name, module: True, chain=chain)
        for chain in (True, False)
    )
    for model in (chained, plain):
        for block in model.blocks:
            block.act.train()
    assert worst(gradients(chained, images(2, 14)), gradients(plain, images(2, 14))) < 1e-10
    report = chains_of(chained)
    assert [chain.convolutions for chain in report.chains] == [
        (f"blocks.{i}.conv1", f"blocks.{i}.conv2") for i in range(2)
    ]
    assert list(report.alone) == ["stem"]
    assert not report.breaks
    assert not report.waiting
    # What the blocks' chains keep is not there before the backward pass.
    _, tensors = kept(chained, images(2, 14))
    assert not [t for t in tensors if t.dim() == 4 and t.shape[1:] == (4, 4, 4)]


def test_autocast() -> None:
    chained, plain = (model.float() for model in (small(), small(chain=False)))
    x = images(4, 32, torch.float32)
    results = []
    for model in (chained, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        results.append({"result": y.detach().float(), **{name: p.grad for name, p in model.named_parameters()}})
    torch.testing.assert_close(results[0]["result"], results[1]["result"], rtol=0, atol=0)
    assert lengths(chained) == [5]
    # Gradients on the grid are float32, those of the unchained model rounded to bfloat16 at every layer.
    assert worst(*results) < 0.05
    exact = gradients(plain.float(), x)
    assert exact.keys() == results[0].keys()


def test_autocast_with_values_of_one_pixel() -> None:
    """Every operation has the dtype that it has in the network."""
    unit = {**UNIT, "norm": "frozen", "act": "relu"}
    middle = [Context("tanh", "bilinear", "shape"), nn.Dropout2d(0.4), SqueezeLinear("relu", "view")]
    model = prepare(Network([Unit(unit), *middle, Unit(unit)], "mean"), 0, "nothing").float()
    x = torch.randn(2, CHANNELS, 12, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected, report = both(model, {"blocks.0.conv": 2, "blocks.4.conv": 2}, x)
    assert len(report.chains) == 1
    assert actual["result"].dtype == expected["result"].dtype == torch.bfloat16
    torch.testing.assert_close(actual["result"], expected["result"])
    # Gradients on the grid are float32, those of the unchained model rounded to bfloat16 at every step.
    assert worst(actual, expected) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    chained, plain = small().to(dtype), small(chain=False).to(torch.float64)
    x = images(2, 14)
    actual, expected = gradients(chained, x.to(dtype)), gradients(plain, x)
    assert all(t.dtype == dtype for t in actual.values())
    unchained = gradients(small(chain=False).to(dtype), x.to(dtype))
    theirs, ours = (worst({name: t.double() for name, t in g.items()}, expected) for g in (unchained, actual))
    assert ours < 1.2 * theirs + 2 * torch.finfo(dtype).eps


def test_channels_last_and_empty_batches() -> None:
    chained, plain = small(), small(chain=False)
    assert_same(chained, plain, images(2, 14).to(memory_format=torch.channels_last))
    assert_same(chained, plain, images(0, 14))
    assert_same(chained, plain, images(1, 14))


def test_second_derivatives_are_refused() -> None:
    model = small()
    (grad,) = torch.autograd.grad(model(images(2, 14)).sum(), model.stem.weight, create_graph=True)
    with pytest.raises(gf_tvm.errors.DerivativeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("products", [("input_grad", "weight_grad"), ("weight_grad",), ()])
def test_a_library_serves_both_passes_and_what_it_lacks_is_said(
    products: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gf_tvm.ops.dispatch._said", set())
    library = FakeLibrary(digest="chains", has=("filter_input", *products))
    with loaded(library), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chained, plain = small(library=library).float(), small(chain=False).float()
        x = images(2, 14, torch.float32)
        actual = gradients(chained, x)
        called = Counter(library.called)
        assert worst(actual, gradients(plain, x)) < 1e-4
    # The first convolution's input needs no gradient.
    wanted = {"filter_input": 5, "input_grad": 4, "weight_grad": 5}
    assert called == {name: wanted[name] for name in ("filter_input", *products)}
    lacking = {"input_grad", "weight_grad"} - {*products}
    said = [str(warning.message) for warning in caught if issubclass(warning.category, gf_tvm.FallbackWarning)]
    assert {name for name in ("input_grad", "weight_grad") if any(f"lacks {name}" in line for line in said)} == lacking


class Branches(nn.Module):
    """Python code that depends on values: Dynamo ends a graph there."""

    def __init__(self, inner: Small) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = inner.stem, inner.blocks, inner.head

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.stem(x)))
        if y.sum() > 0:
            y = y * 1.5
        return self.head(y.mean((2, 3)))


class MakesTensors(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.blocks(F.relu(self.stem(x))) + torch.ones(7, 7, dtype=torch.float64)).mean((2, 3)))


class DrawsNumbers(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.blocks(F.relu(self.stem(x))) * (1 + random.random() * 0)).mean((2, 3)))


class ChangesShared(Branches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.blocks(y)
        return self.head((z + y.mul_(2)).mean((2, 3)))


class SwitchesGradients(Branches):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.stem(x)
        return self.head(self.blocks(F.relu(y)).mean((2, 3)))


class SwitchesAutocast(Branches):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.blocks(F.relu(self.stem(x)))
        return self.head(y.mean((2, 3)))


class ChangesByAnotherName(Branches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        other = y
        y += 1
        return self.head((self.blocks(y) + other).mean((2, 3)))


#: The convolutions of blocks whose result needs a gradient of full size: so do both ways through them.
APART = [(f"blocks.{i}.conv1", f"blocks.{i}.conv2") for i in range(2)]
BLOCKS_OF_SMALL = [(*APART[0], *APART[1])]


@pytest.mark.parametrize(
    ("kind", "chains", "alone"),
    [
        (SwitchesGradients, BLOCKS_OF_SMALL, "nothing is trained in it or before it"),
        (SwitchesAutocast, APART, "mean cannot stay on the patch grid"),
        (ChangesByAnotherName, APART, "add adds something else than two maps"),
        (Branches, APART, "it is a result of the graph"),
        (MakesTensors, APART, "add cannot stay on the patch grid"),
        (DrawsNumbers, APART, "it is a result of the graph"),
        (ChangesShared, [("stem", *BLOCKS_OF_SMALL[0])], None),
    ],
)
def test_code_between_layers(kind: type[Branches], chains: list[tuple[str, ...]], alone: str | None) -> None:
    """Chains end where a step cannot stay on the grid, or cannot be moved, and go on behind it."""
    chained = gf_tvm.filter_model(kind(small(chain=False)), 2, last=5)
    plain = kind(small(chain=False))
    assert_same(chained, plain)
    report = chains_of(chained)
    assert [chain.convolutions for chain in report.chains] == chains, str(report)
    assert report.alone == ({"stem": alone} if alone else {})
    assert bool(report.breaks) == (kind in (Branches, DrawsNumbers))


def test_breaks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class Moody(Small):
        moody = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if self.moody and y.sum() > 1e9 else y

    chained, plain = Moody().double().eval(), small(chain=False)
    chained.load_state_dict(plain.state_dict())
    gf_tvm.filter_model(chained, 2, last=5)
    assert_same(chained, plain)
    assert lengths(chained) == [5]
    assert not chains_of(chained).breaks
    chained.moody = True
    assert_same(chained, plain)
    assert lengths(chained) == [5]  # it breaks behind them
    (reason,) = chains_of(chained).breaks[""]
    assert "jump" in reason or "ata-dependent" in reason
    assert "a graph ends early" in str(chains_of(chained))
    assert "Moody: a chain ends where Dynamo ends a graph" in caplog.text
    with pytest.raises(TypeError):
        chained(images(2, 14), 3)


def test_two_inputs_and_a_tuple_of_results() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            z = torch.tanh(self.a(x)) + torch.relu(self.b(y))
            return self.c(z), {"mean": z.mean((2, 3))}

    x, y = images(2, 10), images(2, 10).flip(0).requires_grad_()
    results = []
    for chain in (True, False):
        model = gf_tvm.filter_model(Two().double(), 2, last=3, chain=chain)
        y.grad = None
        a, b = model(x, y)
        (a.square().sum() + b["mean"].square().sum()).backward()
        results.append({"input": y.grad.clone(), **{name: p.grad for name, p in model.named_parameters()}})
        if chain:
            assert lengths(model) == [3]
    assert worst(*results) < 1e-10


class Sizes(nn.Module):
    """Sizes are read of maps that other maps are resized to."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batched = batched
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        side = self.b(torch.tanh(self.a(x)))
        h, w = side.shape[-2:]
        top = self.c(F.max_pool2d(x, 2))
        side += F.adaptive_avg_pool2d(top, (h, w))  # in place: reading a size is no use of the map
        if self.batched:
            side = side + F.interpolate(torch.relu(side).mean((-2, -1), keepdim=True), size=[h, w])
        return self.d(torch.tanh(side))


def test_every_step_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a size is read of a map that is not there, and of one that is."""

    class Model(Sizes):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            z = y.cumsum(3)  # so y is there before its size is read
            return z * y.size(2) + y if self.batched else z.reshape(y.shape)

    runs: Counter[str] = Counter()
    chained, plainly = run._convolution, ConvolutionStep.forward
    monkeypatch.setattr(run, "_convolution", lambda op, *rest: (runs.update([op.name]), chained(op, *rest))[1])
    monkeypatch.setattr(
        ConvolutionStep, "forward", lambda self, *given: (runs.update([self.site.name]), plainly(self, *given))[1]
    )
    x = images(2, 10, torch.float32)
    for batched, chain in ((True, [2]), (False, [2])):
        model = gf_tvm.filter_model(Model(batched), 2, last=4)
        runs.clear()
        model(x)
        assert lengths(model) == chain
        assert runs == Counter("abcd")


@pytest.mark.parametrize("how", ["mean", "view", "flatten", "conv", "used elsewhere"])
def test_squeeze_excitation_ends_no_chain(how: str) -> None:
    unit = {**UNIT, "norm": "trained", "act": "silu"}
    middle = Squeeze("relu", True) if how == "conv" else SqueezeLinear("relu", how)
    model = prepare(Network([Unit(unit), nn.Sequential(nn.Dropout2d(0.4), middle), Unit(unit)], "mean"), 0, "nothing")
    x = torch.randn(2, CHANNELS, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = ["blocks.0.conv", "blocks.2.conv"]
    actual, expected, report = both(model, dict.fromkeys(names, 2), x)
    assert worst(actual, expected) < 1e-10
    chains = [chain.convolutions for chain in report.chains]
    assert chains == ([("blocks.2.conv",)] if how == "used elsewhere" else [tuple(names)]), report


@pytest.mark.parametrize("size", [(2, 3, 10, 7), (3, 10, 7)], ids=["images", "one image"])
def test_reading_a_size_ends_no_chain(size: tuple[int, ...]) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, chained = (
        gf_tvm.filter_model(Sizes(len(size) == 4).double(), 2, last=4, chain=chain) for chain in (False, True)
    )
    for patch in (2, 3):
        for model in (plain, chained):
            for conv in (model.a, model.b, model.c, model.d):
                conv.patch = (patch, patch)
        assert_same(chained, plain, x)
    # A single image without a batch dimension runs as it is. What is resized needs a gradient of full size.
    convolutions = [("a", "b")] if x.dim() == 4 else []
    assert [chain.convolutions for chain in chains_of(chained).chains] == convolutions


def test_parametrized_weights() -> None:
    results = []
    for chain in (True, False):
        model = small(chain=False)
        nn.utils.parametrizations.weight_norm(model.blocks[0].conv2)
        gf_tvm.filter_model(model, 2, last=5, chain=chain)
        results.append(gradients(model, images(2, 14)))
        if chain:
            assert lengths(model) == [5]
    assert worst(*results) < 1e-10


@pytest.mark.parametrize("max_cells", [1.0, grids.MAX_CELLS])
@pytest.mark.parametrize("size", [28, 32])
def test_grids_that_cut_a_map_in_different_places(size: int, max_cells: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """28 x 28, patches of 4: the first grid's patches begin at 0, 4, ...; those of stride 2 at -2, 6, ..."""
    monkeypatch.setattr(grids, "MAX_CELLS", max_cells)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)
    ).double()
    x = torch.randn(2, 2, size, size, dtype=torch.float64)
    actual, expected, report = both(model, {"0": 4, "2": 4, "4": 4}, x)
    assert worst(actual, expected) < 1e-10
    ends = size == 28 and max_cells == 1  # at 32 x 32 one grid refines the other
    assert [chain.convolutions for chain in report.chains] == [("2", "4") if ends else ("0", "2", "4")]
    if ends:
        assert "a grid of 7x7 patches and one of 4x4 cut the 28x28 map in different places" in report.alone["0"]
    else:
        cells = 10 if size == 28 else 8  # along one axis: cut at 0, 4, 6, 8, 12, 14, 16, 20, 22, 24
        sums, masks = 3 * (-(-size // 4)) ** 2 + 2 * 3 * 4**2, 3 * cells**2 + 3 * 4**2
        (chain,) = report.chains
        assert chain.kept_values == 2 * (sums - (-(-size // 4)) ** 2 + masks)


@settings(max_examples=60)
@given(
    size=st.integers(1, 12),
    points=st.tuples(*(st.lists(st.integers(0, 12), min_size=2, max_size=6) for _ in range(3))),
    seed=SEEDS,
)
def test_grids(size: int, points: tuple[list[int], ...], seed: int) -> None:
    """Means, expansion and cells against loops over pixels, for any cut points."""
    a, b, c = (grids.Cuts(size, tuple(sorted(min(p, size) for p in some))) for some in points)
    t = torch.randn(1, 2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grid = grids.Grid(a, b)
    means = grids.patch_means(t, grid)
    values = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    full = grids.expand(values, grid)
    assert full.shape == t.shape
    outside = torch.ones(size, size, dtype=torch.bool)
    for i in range(a.patches):
        for j in range(b.patches):
            rows, cols = slice(*a.points[i : i + 2]), slice(*b.points[j : j + 2])
            piece = t[:, :, rows, cols]
            expected = piece.mean((2, 3)) if piece.numel() else torch.zeros(1, 2, dtype=t.dtype)
            torch.testing.assert_close(means[:, :, i, j], expected)
            outside[rows, cols] = False
            assert (full[:, :, rows, cols] == values[:, :, i, j, None, None]).all()
    assert (full[:, :, outside] == 0).all()
    both_ = grids.shared(a, c)
    assert len(both_.in_a) == len(both_.in_b) == both_.cells.patches
    for k, (i, j) in enumerate(zip(both_.in_a, both_.in_b, strict=True)):
        cell = range(*both_.cells.points[k : k + 2])
        assert set(cell) <= set(range(*a.points[i : i + 2])) & set(range(*c.points[j : j + 2]))
    covered = {p for k in range(both_.cells.patches) for p in range(*both_.cells.points[k : k + 2])}
    in_both = set(range(a.points[0], a.points[-1])) & set(range(c.points[0], c.points[-1]))
    assert covered == in_both
