"""Compiled forward passes in live models: whatever happens to the model, its results are those of eager PyTorch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_task import wait_until

import gf_tvm
from gf_tvm.bundle.library import Library
from gf_tvm.chains import programs_of
from gf_tvm.chains.model import graphs_of
from gf_tvm.forward.engine import Compiled, FrontStep
from gf_tvm.forward.programs import FrontProgram
from gf_tvm.on_demand import KernelCache, models

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of the float64 result's norm; float32 loses less, also by Winograd's algorithm.
CLOSE = 1e-5


class Unit(nn.Sequential):
    def __init__(
        self, ci: int, co: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU6
    ) -> None:
        conv = nn.Conv2d(ci, co, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(co), act())


class Net(nn.Module):
    """A front of most kinds of operations, two convolutions that are filtered, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 32, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = Unit(32, 32, act=nn.ReLU)
        self.again = Unit(32, 32, act=nn.Identity)
        self.depthwise = Unit(32, 32, groups=32, act=lambda: nn.SiLU(inplace=True))
        self.squeeze = nn.Conv2d(32, 32, 1)
        self.tail = nn.Sequential(nn.Conv2d(32, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def front(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = F.relu(self.again(self.wide(x)) + x)
        y = self.depthwise(x)
        return y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.front(x)).mean((2, 3)))


def plain(seed: int = 1) -> Net:
    """Frozen but for the last convolutions and the classifier, with statistics that are not the initial ones."""
    torch.manual_seed(seed)
    model = Net().eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    model.requires_grad_(False)
    model.tail.requires_grad_(True)
    model.head.requires_grad_(True)
    return model


def images(count: int = 4, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 30, 26, generator=torch.Generator().manual_seed(seed))


def fronts(model: nn.Module) -> list[FrontStep]:
    return [step for _, graph in graphs_of(model) for step in graph.assembled.fronts]  # type: ignore[misc]


def unfrozen(model: Net) -> None:
    model.depthwise.requires_grad_(True)


def statistics(model: Net) -> None:
    model.again[1].train()


@pytest.fixture(scope="module")
def library(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The forward passes of all situations below in which something is compiled."""
    programs: dict[str, FrontProgram] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GF_TVM_ON_DEMAND", "0")
        for count, change in ((4, None), (3, None), (4, unfrozen), (4, statistics)):
            model = plain()
            if change is not None:
                change(model)
            gf_tvm.filter_model(model, 2, last=2)
            model(images(count))
            found = [program for program in programs_of(model) if isinstance(program, FrontProgram)]
            assert found
            programs |= {program.key: program for program in found}
    path = tmp_path_factory.mktemp("engine") / "front.gfb"
    gf_tvm.build([], "host", out=path, programs=programs.values())
    return gf_tvm.load(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """The compiled functions that were called."""
    found: list[Compiled] = []
    true = Compiled.__call__

    def noted(self: Compiled, *given: Any) -> Any:
        found.append(self)
        return true(self, *given)

    monkeypatch.setattr(Compiled, "__call__", noted)
    return found


@pytest.fixture
def model(library: Library) -> Net:
    return gf_tvm.filter_model(plain(), 2, last=2, library=library)


def eager(model: nn.Module, x: Tensor) -> Tensor:
    """What PyTorch gives in float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model)
        gf_tvm.unfilter_model(exact)
        return exact.double()(x.detach().double())


def right(model: nn.Module, x: Tensor) -> bool:
    expected = eager(model, x)
    y = model(x)
    assert y.requires_grad
    return bool((y.detach().double() - expected).norm() <= CLOSE * expected.norm())


def test_results_and_gradients(model: Net, library: Library, calls: list[Compiled]) -> None:
    x = images()
    without = gf_tvm.filter_model(plain(), 2, last=2, library=library, forward=False)
    assert right(model, x)
    assert len(calls) == 1
    (step,) = fronts(model)
    assert step.library == library.digest
    assert right(without, x)
    assert fronts(without) == []
    assert len(calls) == 1
    for network in (model, without):
        network.zero_grad()
        F.cross_entropy(network(x), torch.tensor([0, 1, 2, 3])).backward()
    compared = 0
    for (name, a), b in zip(model.named_parameters(), without.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == 6


def by_data(model: Net) -> None:
    model.wide[0].weight.data[3, 2, 1, 0] += 1.0


def of_statistics(model: Net) -> None:
    model.depthwise[1].running_var.data.mul_(2.0)


def of_another_state(model: Net) -> None:
    model.load_state_dict(plain(2).state_dict())


def of_assigned_state(model: Net) -> None:
    model.load_state_dict(plain(2).state_dict(), assign=True)
    model.requires_grad_(False)
    model.tail.requires_grad_(True)
    model.head.requires_grad_(True)


def by_swapped_memory(model: Net) -> None:
    """As an average of weights takes the weights' place."""
    for p, q in zip(model.parameters(), plain(3).parameters(), strict=True):
        p.data = q.data


def by_new_parameters(model: Net) -> None:
    model.stem[0].weight = nn.Parameter(torch.randn(32, 3, 3, 3), requires_grad=False)


def of_weights_strides(model: Net) -> None:
    model.to(memory_format=torch.channels_last)


def of_signs(model: Net) -> None:
    model.wide[0].weight.data.neg_()


def by_numpy(model: Net) -> None:
    """No version counter sees this."""
    model.squeeze.bias.numpy()[:] = 0.75


CHANGES = (
    by_data, of_statistics, of_another_state, of_assigned_state, by_swapped_memory, by_new_parameters,
    of_weights_strides, of_signs, by_numpy,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_frozen_parameters(model: Net, calls: list[Compiled], change: Callable[[Net], None]) -> None:
    x = images()
    assert right(model, x)
    before = model(x).detach()
    change(model)
    assert right(model, x)
    assert (model(x) - before).norm() > 0.001 * before.norm() or change is of_weights_strides
    assert len(calls) == 4


def test_averages_that_change_places_with_weights_in_every_step(model: Net, calls: list[Compiled]) -> None:
    other = plain(4)
    for _ in range(4):
        assert right(model, images())
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data, q.data = q.data, p.data
    assert len(calls) == 4


def test_layers_are_unfrozen_and_frozen(model: Net, calls: list[Compiled]) -> None:
    x = images()
    assert right(model, x)
    whole = len(fronts(model)[0].part.ops)
    unfrozen(model)
    assert right(model, x)
    assert len(fronts(model)[0].part.ops) < whole
    model(x).sum().backward()
    gradient = model.depthwise[0].weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        model.depthwise[0].weight -= 0.1 * gradient
    assert right(model, x)
    model.depthwise.requires_grad_(False)
    assert right(model, x)
    assert len(fronts(model)[0].part.ops) == whole
    assert len(calls) == 5


def test_batch_norms_that_learn_their_statistics(model: Net, calls: list[Compiled]) -> None:
    x = images()
    assert right(model, x)
    statistics(model)
    mean = model.again[1].running_mean.clone()
    assert right(model, x)
    assert not torch.equal(model.again[1].running_mean, mean)
    called = len(calls)
    assert called > 1
    model.eval()
    assert right(model, x)
    assert len(calls) == called + 1


def test_hooks(model: Net, calls: list[Compiled]) -> None:
    x = images()
    assert right(model, x)
    seen = []

    def hook(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        seen.append(tuple(result.shape))
        return result * 2

    handle = model.wide.register_forward_hook(hook)
    assert right(model, x)
    handle.remove()
    assert right(model, x)
    assert (4, 32, 8, 7) in seen
    assert len(calls) >= 2


def test_batches(model: Net, calls: list[Compiled]) -> None:
    for count in (4, 3, 4, 2, 3):
        assert right(model, images(count))
    assert len(calls) == 4  # nothing is compiled for 2


def test_memory_of_inputs(model: Net, calls: list[Compiled]) -> None:
    x = images(4)
    unaligned = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    wide = torch.randn(4, 3, 30, 52, generator=torch.Generator().manual_seed(1))
    for given in (x.to(memory_format=torch.channels_last), unaligned, wide[..., ::2], images(8)[::2], images(5)[1:],
                  x.transpose(2, 3).contiguous().transpose(2, 3), x[:1].expand(4, -1, -1, -1)):  # fmt: skip
        before = given.clone()
        assert right(model, given)
        assert torch.equal(given, before)
    assert len(calls) == 7


def test_results_belong_to_the_caller(library: Library, calls: list[Compiled]) -> None:
    class Features(Net):
        def forward(self, x: Tensor) -> Any:
            features = self.front(x)
            return features, self.head(self.tail(features).mean((2, 3)))

    model = Features()
    model.load_state_dict(plain().state_dict())
    model.eval().requires_grad_(False)
    model.tail.requires_grad_(True)
    gf_tvm.filter_model(model, 2, last=2, library=library)
    first, _ = model(images())
    kept = first.clone()
    second, y = model(images(seed=6))
    assert torch.equal(first, kept)
    wanted = y.detach().clone()
    first.fill_(9)
    second.fill_(9)
    third, z = model(images(seed=6))
    assert torch.equal(z, wanted)
    # What comes out goes in again.
    x = images()
    x[:, :, :8, :7] = third[:, :3]
    torch.testing.assert_close(model(x)[1].double(), eager(model, x)[1], rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


def test_no_gradients_and_other_dtypes(model: Net, calls: list[Compiled]) -> None:
    x = images()
    with torch.no_grad():
        y = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(y.double(), eager(model, x), rtol=1e-4, atol=1e-5)
    assert calls == []
    expected = eager(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert (half.double() - expected).norm() < 0.05 * expected.norm()
    assert calls == []
    assert right(model, x)
    model.double()
    torch.testing.assert_close(model(x.double()), expected)
    model.float()
    assert right(model, x)
    assert len(calls) == 2


def test_an_input_that_needs_gradients(model: Net, calls: list[Compiled]) -> None:
    x = images().requires_grad_()
    assert right(model, x)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert calls == []


def test_other_parameters_in_several_threads(model: Net, calls: list[Compiled]) -> None:
    """``functional_call`` puts them into the model's place for a time, so threads take turns; copies need not."""
    lock, wrong = threading.Lock(), []
    model(images())
    states = [dict(plain(seed).named_parameters()) | dict(plain(seed).named_buffers()) for seed in range(4)]
    expected = [eager(plain(seed), images(seed=seed)) for seed in range(4)]

    def work(number: int) -> None:
        for _ in range(5):
            with lock:
                y = torch.func.functional_call(model, states[number], (images(seed=number),))
            if (y.double() - expected[number]).norm() > CLOSE * expected[number].norm():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(calls) == 21


def test_one_step_with_other_parameters_in_several_threads(model: Net) -> None:
    """What is compiled is called by all threads at once, each with parameters of its own."""
    model(images())
    (step,) = fronts(model)
    assert step.compiled is not None
    wrong: list[int] = []
    (graph,) = (graph for _, graph in graphs_of(model))
    tensors = [t.detach() for t in _tensors(graph, model)]

    def work(number: int) -> None:
        x = images(seed=number)
        own = [t * (1 + 0.1 * number) if t.dim() == 4 else t for t in tensors]
        with torch.no_grad():
            (expected,) = step.body(x, *own)
        for _ in range(10):
            (y,) = step(x, *own)
            if (y - expected).norm() > CLOSE * expected.norm():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tensors_of_other_kinds_are_left_to_pytorch(model: Net, calls: list[Compiled]) -> None:
    class Special(Tensor):
        pass

    model(images())
    (step,) = fronts(model)
    (graph,) = (graph for _, graph in graphs_of(model))
    tensors = [t.detach() for t in _tensors(graph, model)]
    called = len(calls)
    for x, own in ((images().double(), [t.double() for t in tensors]), (images().as_subclass(Special), tensors)):
        with torch.no_grad():
            (y,), (expected,) = step(x, *own), step.body(x, *own)
        assert type(y) is type(x)
        assert torch.equal(y, expected)
    assert len(calls) == called


def _tensors(graph: Any, model: nn.Module) -> list[Tensor]:
    """What the model's step is given besides its entries."""
    found: list[Tensor] = []
    (step,) = graph.assembled.fronts
    true = step.forward

    def noted(*given: Tensor) -> Any:
        found[:] = given[len(step.part.entries) :]
        return true(*given)

    step.forward = noted
    model(images())
    del step.forward
    return found


def test_copies(model: Net, calls: list[Compiled]) -> None:
    x = images()
    assert right(model, x)
    twin = copy.deepcopy(model)
    by_data(twin)
    assert right(twin, x)
    assert right(model, x)
    assert not torch.equal(twin(x), model(x))
    assert len(calls) == 5
    gf_tvm.unfilter_model(twin)
    twin(x)
    assert len(calls) == 5


def test_what_changes_its_input_in_place(library: Library) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(F.relu_(x))

    model = InPlace()
    model.load_state_dict(plain().state_dict())
    model.eval().requires_grad_(False)
    model.tail.requires_grad_(True)
    exact = copy.deepcopy(model)
    gf_tvm.filter_model(model, 2, last=2, library=library)
    x, z = images(), images().double()
    y, wanted = model(x), exact.double()(z)
    assert (y.double() - wanted).norm() <= CLOSE * wanted.norm()
    torch.testing.assert_close(x.double(), z)


def test_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Compiled]) -> None:
    """Built in the background when the model first runs, and used when it is there."""
    cache = KernelCache(tmp_path / "kernels", logs=())
    monkeypatch.setenv("GF_TVM_ON_DEMAND", "1")
    monkeypatch.setattr(models, "_kernel_cache", lambda: cache)
    model = gf_tvm.filter_model(plain(), 2, last=2)
    assert right(model, images())
    assert calls == []
    (step,) = fronts(model)
    assert wait_until(lambda: bool(step.library), 120)
    assert right(model, images())
    assert len(calls) == 1
