"""FilteredConv2d, filter_model, unfilter_model and select_layers."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_library import FakeLibrary, loaded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import gf_cuda.nn
import gf_tvm
from gf_tvm import FilteredConv2d, filter_model, filter_report, select_layers, unfilter_model
from gf_tvm.errors import GeometryError, ModelError
from gf_tvm.ops.functional import conv2d

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def library() -> Iterator[FakeLibrary]:
    library = FakeLibrary()
    with loaded(library):
        yield library


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))) + x)


class Net(nn.Module):
    """Convolutions by name: stem, blocks.{0,1}.conv{1,2}, and no convolution in the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 14, 12, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    model(images() if x is None else x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)


def names_of(selected: list[tuple[str, nn.Conv2d]]) -> list[str]:
    return [name for name, _ in selected]


# FilteredConv2d


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_forward_is_that_of_conv2d(padding_mode, padding, kernel) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, padding=padding, groups=2, padding_mode=padding_mode)
    filtered = FilteredConv2d.from_conv(conv, patch=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")  # torch's remark on uneven padding
        for x in (torch.randn(2, 4, 9, 10), torch.randn(4, 9, 10)):
            torch.testing.assert_close(filtered(x), conv(x), rtol=0, atol=0)


def test_padding_modes_filter_the_padded_map() -> None:
    conv = FilteredConv2d(2, 3, 3, padding=(2, 1), padding_mode="circular", patch=2)
    x = torch.randn(1, 2, 6, 7, requires_grad=True)
    padded = F.pad(x, (1, 1, 2, 2), mode="circular")
    expected = torch.autograd.grad(conv2d(padded, conv.weight, conv.bias, patch=2).sum(), (x, conv.weight))
    for ours, other in zip(torch.autograd.grad(conv(x).sum(), (x, conv.weight)), expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_settings_are_passed_on() -> None:
    conv = FilteredConv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2, bias=False, patch=(3, 2), dtype=torch.float64)
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64)
    grad_y = torch.randn_like(conv(x))
    expected = conv2d(x, conv.weight, None, (2, 1), (1, 2), (1, 2), 2, (3, 2))
    torch.testing.assert_close(conv(x), expected)
    actual, expected = (torch.autograd.grad(y, conv.weight, grad_y)[0] for y in (conv(x), expected))
    torch.testing.assert_close(actual, expected)


def test_repr_says_what_it_is(library) -> None:
    assert repr(FilteredConv2d(3, 4, 3, padding=1, patch=(4, 2))) == (
        "FilteredConv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), patch=(4, 2))"
    )
    assert "library=FakeLibrary(" in repr(FilteredConv2d(3, 4, 3, patch=2, library=library))


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 6, 3, 2, 1, 1, 2), FilteredConv2d(4, 4, 1, bias=False, patch=2)], ids=repr
)
def test_from_conv_shares_parameters_and_leaves_the_original(conv: nn.Conv2d) -> None:
    conv.eval()
    kind, before = type(conv), repr(conv)
    filtered = FilteredConv2d.from_conv(conv, patch=5)
    assert filtered.weight is conv.weight
    assert filtered.bias is conv.bias
    assert not filtered.training
    assert filtered.state_dict().keys() == conv.state_dict().keys()
    assert (type(conv), repr(conv)) == (kind, before)
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(filtered(x), conv(x))


@pytest.mark.parametrize("patch", [0, -1, (2, 0), 1.5, "2", (1, 2, 3), None])
def test_bad_patches(patch) -> None:
    for make in (
        lambda: FilteredConv2d(3, 4, 3, patch=patch),
        lambda: FilteredConv2d.from_conv(nn.Conv2d(3, 4, 3), patch),
        lambda: filter_model(Net(), patch, last=1),
        lambda: filter_model(Net(), {"stem": patch}),
    ):
        with pytest.raises(GeometryError, match=r"patch.* must be") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_from_conv_takes_plain_convolutions_only() -> None:
    for module in (nn.Linear(2, 3), nn.LazyConv2d(2, 3), nn.ConvTranspose2d(2, 3, 3)):
        with pytest.raises(ModelError, match="plain Conv2d"):
            FilteredConv2d.from_conv(module, patch=2)


@pytest.mark.parametrize("kind", [FilteredConv2d, gf_cuda.nn.FilteredConv2d])
def test_a_layer_has_the_signature_of_conv2d_and_needs_a_patch(kind: type[nn.Conv2d]) -> None:
    ours, theirs = (list(inspect.signature(of).parameters.values()) for of in (kind, nn.Conv2d))
    assert [(p.name, p.default, p.kind) for p in ours[:-2]] == [(p.name, p.default, p.kind) for p in theirs]
    everything = (4, 6, 3, 2, 1, 1, 2, False, "reflect", "meta", torch.float64)
    assert nn.Conv2d.extra_repr(kind(*everything, patch=4)) == nn.Conv2d(*everything).extra_repr()
    layer = torch.nn.utils.skip_init(kind, 3, 8, 3, padding=1, patch=4)
    assert layer.patch == (4, 4)
    assert layer.weight.device.type == "cpu"
    for another in (lambda: type(layer)(layer.in_channels, 2, 3), lambda: kind(3, 8, 3, library=None)):
        with pytest.raises(TypeError, match="patch"):
            another()


# filter_model and unfilter_model


@pytest.mark.parametrize(
    "how",
    [
        {"last": 2},
        {"layers": ["blocks.1.conv2", "blocks.1.conv1"]},
        {"layers": lambda name, module: name.startswith("blocks.1") and module.padding == (1, 1)},
    ],
    ids=["last", "layers", "predicate"],
)
def test_selected_layers_are_filtered_and_the_rest_is_exact(how, library) -> None:
    model = Net()
    exact = gradients(model)
    expected = copy.deepcopy(model)
    expected.blocks[1].conv1 = FilteredConv2d.from_conv(expected.blocks[1].conv1, 2)
    expected.blocks[1].conv2 = FilteredConv2d.from_conv(expected.blocks[1].conv2, 2)
    assert filter_model(model, patch=2, library=library, **how) is model
    filtered = gradients(model)
    assert same(filtered, gradients(expected))
    assert not same(filtered, exact)
    assert torch.allclose(filtered["head.weight"], exact["head.weight"])
    assert sorted(library.called) == ["backward", "backward", "filter_input", "filter_input"]
    assert dict(filter_report(model).filtered) == {"blocks.1.conv1": (2, 2), "blocks.1.conv2": (2, 2)}
    assert same(gradients(unfilter_model(model)), exact)


def test_everything_else_stays_as_it_was() -> None:
    """Parameters, hooks, flags and names are the same objects before, during and after."""
    model = Net().double().eval()
    model.blocks[1].conv1.train()
    conv = model.blocks[1].conv2
    conv.weight.requires_grad_(False)
    conv.remark = "mine"
    ran: list[str] = []
    handles = [
        conv.register_forward_pre_hook(lambda module, args: ran.append("pre")),
        conv.register_forward_hook(lambda module, args, y: ran.append("forward")),
        conv.register_full_backward_hook(lambda module, grad_x, grad_y: ran.append("backward")),
        conv.register_state_dict_post_hook(lambda *args: ran.append("state_dict")),
        conv.register_load_state_dict_pre_hook(lambda module, *args: ran.append(f"load {module is conv}")),
    ]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    attributes = set(vars(conv))
    state = model.state_dict()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def check() -> None:
        assert dict(model.named_modules()) == modules
        now = dict(model.named_parameters())
        assert now.keys() == parameters.keys()
        assert all(now[name] is parameters[name] for name in now)
        assert list(model.state_dict()) == list(state)
        assert not model.training
        assert model.blocks[1].conv1.training
        assert not conv.training
        assert not conv.weight.requires_grad
        assert conv.remark == "mine"
        assert all(p.dtype == torch.float64 for p in model.parameters())
        ran.clear()
        model(images().double()).sum().backward()
        model.load_state_dict(model.state_dict())
        assert ran == ["pre", "forward", "backward", "state_dict", "load True"]
        optimizer.step()

    check()
    filter_model(model, patch=2, last=4)
    assert isinstance(conv, FilteredConv2d)
    check()
    assert conv.weight.grad is None
    unfilter_model(model)
    assert type(conv) is nn.Conv2d
    assert set(vars(conv)) == attributes
    check()
    filter_model(model, patch=2, last=4)
    for handle in handles:
        handle.remove()
    ran.clear()
    model(images().double())
    assert ran == []


def test_filtering_twice_changes_patch_and_library(library) -> None:
    model = filter_model(Net(), patch=2, last=3)
    filter_model(model, patch=(4, 3), last=1, library=library)
    filtered = filter_report(model).filtered
    assert filtered == {"blocks.0.conv2": (2, 2), "blocks.1.conv1": (2, 2), "blocks.1.conv2": (4, 3)}
    assert model.blocks[1].conv2.library is library
    assert model.blocks[1].conv1.library is None
    filter_model(model, patch=2, last=1)
    assert model.blocks[1].conv2.library is None
    for _ in range(2):
        unfilter_model(model)
        assert not any(isinstance(module, FilteredConv2d) for module in model.modules())
        assert repr(model) == repr(Net())


def test_a_patch_for_each_layer() -> None:
    model = filter_model(Net(), {"blocks.1.conv2": 4, "stem": (1, 2)})
    assert filter_report(model).filtered == {"stem": (1, 2), "blocks.1.conv2": (4, 4)}
    model = filter_model(Net(), {"blocks.1.conv2": 4, "blocks.1.conv1": 2}, last=2)
    assert filter_report(model).filtered == {"blocks.1.conv1": (2, 2), "blocks.1.conv2": (4, 4)}
    with pytest.raises(ModelError, match=r"no entry for the selected convolution blocks\.1\.conv1"):
        filter_model(Net(), {"blocks.1.conv2": 4}, last=2)
    with pytest.raises(ModelError, match="entry for stem, which is not selected"):
        filter_model(Net(), {"blocks.1.conv2": 4, "stem": 2}, last=1)
    with pytest.raises(GeometryError, match=r"patch of blocks\.1\.conv2 must be at least 1, got 0"):
        filter_model(Net(), {"blocks.1.conv2": 0}, last=1)


def test_a_convolution_alone_is_a_model() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert filter_model(conv, patch=2, last=1) is conv
    assert isinstance(conv, FilteredConv2d)
    assert "the model itself: patch 2x2" in str(filter_report(conv))
    assert type(unfilter_model(conv)) is nn.Conv2d


def test_a_shared_module_is_filtered_once() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.ModuleDict({"first": shared, "other": nn.Conv2d(3, 3, 1), "again": shared})
    assert names_of(select_layers(model, last=2)) == ["first", "other"]
    assert names_of(select_layers(model, layers=["again", "first"])) == ["first"]
    filter_model(model, {"again": 3})
    assert model["first"] is model["again"] is shared
    assert filter_report(model).filtered == {"first": (3, 3)}
    unfilter_model(model)
    assert type(shared) is nn.Conv2d


def test_shared_weights_stay_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model[1].weight = model[0].weight
    filter_model(model, patch=2, last=1)
    assert model[1].weight is model[0].weight
    assert len(list(model.parameters())) == 3


def test_references_from_elsewhere_see_the_change() -> None:
    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            self.order = [self.conv]  # a plain list: not a child

        def forward(self, x: Tensor) -> Tensor:
            return self.order[0](x)

    model = Keeper()
    exact = gradients(model)
    filter_model(model, patch=2, last=1)
    assert not same(gradients(model), exact)


# What is left alone


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LazyConv2d(3, 1), "a LazyConv2d has no weight before its first forward pass"),
        (lambda: nn.Conv2d(3, 3, 1, dtype=torch.complex64), "its weight is torch.complex64"),
    ],
)
def test_what_cannot_be_filtered_is_left_alone_and_said(make: Callable[[], nn.Conv2d], reason: str, caplog) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make())
    kind = type(model[1])
    with caplog.at_level(logging.INFO, logger="gf_tvm"):
        filter_model(model, patch=2, last=2)
    assert type(model[0]) is FilteredConv2d
    assert type(model[1]) is kind
    assert filter_report(model).left_alone == {"1": reason}
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [f"1 left alone: {reason}"]
    unfilter_model(model)
    for how in ({"layers": ["0", "1"]}, {"last": 1}):  # named, or the only one: not what was asked for
        with pytest.raises(ModelError, match=f"1 cannot be filtered: {reason}"):
            filter_model(model, patch=2, **how)
        assert type(model[0]) is nn.Conv2d


def test_report(caplog) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2))
    with caplog.at_level(logging.INFO, logger="gf_tvm"):
        filter_model(model, patch=(2, 3), last=1)
    assert str(filter_report(model)).splitlines() == [
        "1 of 3 convolutions filtered",
        "  2: patch 2x3",
        "  0: left alone, not selected",
        "  3: left alone, a ConvTranspose2d is no two-dimensional convolution",
    ]
    assert caplog.messages == [str(filter_report(model))]
    assert filter_report(copy.deepcopy(model)) == filter_report(model)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, r"say which convolutions: either last=K or layers="),
        ({"last": 1, "layers": ["stem"]}, r"say which convolutions"),
        ({"last": 6}, "last must be between 1 and 5, the number of convolutions in Net; got 6"),
        ({"last": 0}, "last must be between 1 and 5"),
        ({"last": -1}, "last must be between 1 and 5"),
        ({"last": 1.0}, "last must be between 1 and 5"),
        ({"last": True}, "last must be between 1 and 5"),
        ({"layers": []}, "layers is empty"),
        ({"layers": 7}, "layers must be a name, names, or a function .* got 7"),
        ({"layers": [7]}, "Net has no layer 7"),
        (
            {"layers": ["stem", "blocks.1.conv3"]},
            r"Net has no layer 'blocks.1.conv3'; near convolutions: blocks.1.conv",
        ),
        ({"layers": "steam"}, "Net has no layer 'steam'; near convolutions: stem"),
        ({"layers": ["head"]}, "layer 'head' is a Linear, not a Conv2d"),
        ({"layers": ["blocks.0"]}, r"layer 'blocks.0' is a test_nn.Block, .*: blocks.0.conv1, blocks.0.conv2$"),
        ({"layers": lambda name, module: False}, "chose none of the 5 convolutions"),
        (
            {"last": 1, "library": "host.gfb"},
            r"library must be what gf_tvm.load\(FILE\) returned, or None; got 'host.gfb'",
        ),
    ],
)
def test_bad_selections(how: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ModelError, match=message) as caught:
        filter_model(model, patch=2, **how)
    assert "\n" not in str(caught.value)
    assert filter_report(model).filtered == {}


def test_models_without_convolutions() -> None:
    for model in (nn.Linear(2, 3), nn.Sequential(nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1))):
        with pytest.raises(ModelError, match="has no Conv2d module"):
            filter_model(model, patch=2, last=1)
    with pytest.raises(ModelError, match=r"model must be a torch\.nn\.Module, got str"):
        filter_model("resnet18", patch=2, last=1)
    assert filter_report(nn.Linear(2, 3)).filtered == {}


# Other things that change modules


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        lambda conv: prune.random_unstructured(conv, "weight", amount=0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "prune"],
)
@pytest.mark.parametrize("first", ["filter", "change"])
def test_parametrized_weights(change, first) -> None:
    """Whichever comes first, the weight is still computed, and gradients reach what it is computed from."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)).eval()
    if first == "filter":
        filter_model(model, patch=2, last=1)
    torch.manual_seed(0)
    change(model[1])
    if first == "change":
        filter_model(model, patch=2, last=1)
    assert isinstance(model[1], FilteredConv2d)
    assert "patch=(2, 2)" in repr(model[1])
    keys = list(model.state_dict())
    filtered = gradients(model)
    y = model(images())  # hooks of the older kinds compute the weight here
    reference = conv2d(model[0](images()), model[1].weight, model[1].bias, padding=1, patch=2)
    torch.testing.assert_close(y, reference)
    model.zero_grad()
    reference.square().sum().backward()
    assert same(filtered, {name: p.grad for name, p in model.named_parameters()})

    unfilter_model(model)
    assert not isinstance(model[1], FilteredConv2d)
    assert list(model.state_dict()) == keys
    exact = gradients(model)
    assert exact.keys() == filtered.keys()
    assert not same(exact, filtered)
    if parametrize.is_parametrized(model[1]):
        parametrize.remove_parametrizations(model[1], "weight")
        assert type(model[1]) is nn.Conv2d


def test_deepcopy(library) -> None:
    model = filter_model(Net(), patch=2, last=2, library=library)
    clone = copy.deepcopy(model)
    assert clone.blocks[1].conv2.library is library
    assert clone.blocks[1].conv2.weight is not model.blocks[1].conv2.weight
    assert same(gradients(clone), gradients(model))
    assert clone.blocks[1].conv2.weight.grad is not model.blocks[1].conv2.weight.grad
    unfilter_model(clone)
    assert len(filter_report(model).filtered) == 2


def test_pickle_and_whole_module_files(library) -> None:
    model = filter_model(Net(), patch=(2, 3), last=2, library=library)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert filter_report(again) == filter_report(model)
        assert again.blocks[1].conv2.library is library
        assert same(gradients(again), gradients(model))


def test_state_dict_goes_both_ways() -> None:
    plain, filtered = Net(), filter_model(Net(), patch=2, last=3)
    for parameter in filtered.parameters():
        nn.init.normal_(parameter)
    assert list(plain.state_dict()) == list(filtered.state_dict())
    file = io.BytesIO()
    torch.save(filtered.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    plain.eval()
    filtered.eval()
    torch.testing.assert_close(plain(images()), filtered(images()))
    filtered.load_state_dict(Net().state_dict())
    torch.testing.assert_close(filtered(images()), Net().eval()(images()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("with_library", [True, False])
def test_gradient_checkpointing(reentrant, with_library, library) -> None:
    model = filter_model(Net(), patch=2, last=4, library=library if with_library else None)
    expected = gradients(model)
    model.zero_grad()
    library.calls.clear()
    x = images().requires_grad_()
    y = checkpoint(model.blocks, model.stem(x), use_reentrant=reentrant)
    forward = len(library.calls)
    model.head(y.mean(dim=(2, 3))).square().sum().backward()
    assert same({name: p.grad for name, p in model.named_parameters()}, expected)
    if with_library:
        # Under no_grad, as the reentrant kind runs it first, there is nothing to filter for.
        assert forward == (0 if reentrant else 4)
        assert library.called.count("filter_input") == (4 if reentrant else 8)
        assert library.called.count("backward") == 4


def test_training_with_a_library_and_without_is_the_same(library) -> None:
    results = []
    for chosen in (None, library):
        model = filter_model(Net(), patch=2, last=3, library=chosen)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            model(images(step)).square().mean().backward()
            optimizer.step()
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert same(*results)
    assert not same(results[0], dict(Net().named_parameters()))


def test_two_models_in_two_threads_share_a_library(library) -> None:
    models = [filter_model(Net(), patch=2, last=4, library=library) for _ in range(2)]
    batches = [images(seed) for seed in range(2)]
    expected = [gradients(model, x) for model, x in zip(models, batches, strict=True)]
    barrier = threading.Barrier(2)
    results: list[bool] = []

    def work(i: int) -> None:
        barrier.wait()
        results.extend(same(gradients(models[i], batches[i]), expected[i]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


# The package


def test_package_is_lazy_and_complete() -> None:
    code = "import sys, gf_tvm as g; print('torch' in sys.modules); g.nn, g.load; print('tvm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
    for name in gf_tvm._HOMES:
        assert name in dir(gf_tvm)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gf_tvm.nothing  # noqa: B018
