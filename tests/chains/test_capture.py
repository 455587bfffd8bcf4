"""What is compiled is what the model's code does, whatever its state does: against eager PyTorch, step by step.

The filtered gradient of a 1x1 convolution with patches of one pixel is the exact one, so that the model itself, not
filtered, is the reference.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, compiling
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import gf_tvm
from gf_tvm.chains import chains_of
from gf_tvm.chains.capture import live

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 4
Change = Callable[[Any], None]


def images(n: int = 2, seed: int = 0, size: int = 6) -> Tensor:
    return torch.randn(n, CHANNELS, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """A training step's result, its gradients, and the buffers afterwards."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    y = model(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y * weights).sum()
    seen = getattr(model, "seen", None)
    if seen is not None:
        loss = loss + seen.square().sum()
    loss.backward()
    assert x.grad is not None
    found = {"result": y.detach(), "gradient of the input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def chained(model: nn.Module) -> nn.Module:
    """A copy with chains of all its convolutions, whose gradients are the exact ones."""
    return gf_tvm.filter_model(copy.deepcopy(model), 1, layers=convolutions(model))


def lengths(model: nn.Module) -> list[int]:
    return [len(chain.convolutions) for chain in chains_of(model).chains]


class Net(nn.Module):
    """Three convolutions in one chain, with what has settings between them."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2) for _ in range(3)
        )
        self.norm, self.act, self.drop = nn.BatchNorm2d(CHANNELS).eval(), nn.LeakyReLU(0.1), nn.Dropout(0.2)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.norm(self.conv1(x))))
        return self.conv3(torch.tanh(self.middle(self.conv2(y)))).mean((2, 3))

    def middle(self, y: Tensor) -> Tensor:
        return y


def three_steps(model: nn.Module, change: Change, chains: list[int] | None = None) -> None:
    """The model against its chained copy, changed after the first step and after the second."""
    ours = chained(model)
    for k in range(3):
        if k:
            change(model)
            change(ours)
        assert_same(step(ours, images(seed=k), k), step(model, images(seed=k), k))
        assert lengths(ours) == ([3] if chains is None else chains), str(chains_of(ours))


def set_slope(model: Net) -> None:
    model.act.negative_slope += 0.2


def set_probability(model: Net) -> None:
    model.drop.p += 0.3


def set_eps(model: Net) -> None:
    model.norm.eps += 0.5


@pytest.mark.parametrize("change", [set_slope, set_probability, set_eps])
def test_settings_of_modules(change: Change) -> None:
    three_steps(Net(), change)


def test_dilation() -> None:
    """Of a kernel that has one; its filtered gradients are those of the convolution by itself."""
    exact = Net(3)
    plain = gf_tvm.filter_model(copy.deepcopy(exact), 2, layers=convolutions(exact), chain=False)
    ours = gf_tvm.filter_model(copy.deepcopy(exact), 2, layers=convolutions(exact))
    for k, dilation in enumerate((1, 2, 3)):
        for model in (exact, plain, ours):
            model.conv2.dilation, model.conv2.padding = (dilation, dilation), (dilation, dilation)
        found = step(ours, images(seed=k), k)
        assert_same(found, step(plain, images(seed=k), k))
        torch.testing.assert_close(found["result"], step(exact, images(seed=k), k)["result"], rtol=1e-12, atol=1e-12)
        assert lengths(ours) == [3]


def test_an_attribute_that_is_annealed() -> None:
    class Annealed(Net):
        strength = 1.0

        def middle(self, y: Tensor) -> Tensor:
            return y * self.strength

    def change(model: Annealed) -> None:
        model.strength *= 0.7

    three_steps(Annealed(), change)


class Shifted(nn.Conv2d):
    """Filtered where it is captured, and only there."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(2 * x, self.weight, self.bias, padding=self.padding)


@pytest.mark.parametrize("breaks", [False, True])
def test_more_situations_than_dynamo_keeps(
    breaks: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An attribute that changes in every step; each step has the gradients of a model that has run no other."""

    class Annealed(Net):
        strength = 1.0

        def __init__(self) -> None:
            super().__init__(3)
            self.conv2.__class__ = Shifted

        def middle(self, y: Tensor) -> Tensor:
            if breaks and y[0, 0, 0, 0] > 100:
                return y
            return y * self.strength

    monkeypatch.setattr(live, "_SITUATIONS", 4)
    model = Annealed()
    ours = gf_tvm.filter_model(copy.deepcopy(model), 2, layers=convolutions(model))
    for k in range(8):
        ours.strength = model.strength = 1 - k / 20
        fresh = gf_tvm.filter_model(copy.deepcopy(model), 2, layers=convolutions(model))
        assert_same(step(ours, images(seed=k), k), step(fresh, images(seed=k), k))
        assert lengths(ours) == lengths(fresh) != []
    assert "was compiled for 4 situations and begins anew" in caplog.text


def test_forward_counts_its_calls_and_stores_a_map() -> None:
    """A loss may be made of the map; step() does."""

    class Stores(Net):
        calls: Tensor
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def middle(self, y: Tensor) -> Tensor:
            self.calls += 1
            self.seen = y
            return y

    model = Stores()
    ours = chained(model)
    for k in range(3):
        assert_same(step(ours, images(seed=k)), step(model, images(seed=k)))
        torch.testing.assert_close(ours.seen, model.seen)
        assert ours.seen.requires_grad
        assert int(ours.calls) == k + 1


def test_pruning() -> None:
    """Channels of the map between the first two convolutions go."""

    def change(model: Net) -> None:
        kept = slice(1, model.conv1.out_channels)
        for module, name in [
            (model.conv1, "weight"),
            (model.conv1, "bias"),
            (model.norm, "weight"),
            (model.norm, "bias"),
        ]:
            setattr(module, name, nn.Parameter(getattr(module, name).detach()[kept].clone()))
        for name in ("running_mean", "running_var"):
            setattr(model.norm, name, getattr(model.norm, name)[kept].clone())
        model.conv2.weight = nn.Parameter(model.conv2.weight.detach()[:, kept].clone())
        model.conv1.out_channels = model.conv2.in_channels = model.norm.num_features = model.conv1.out_channels - 1

    three_steps(Net(), change)


def replica(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """As ``torch.nn.parallel.replicate`` makes them: parameters are attributes, and no leaves."""
    copies = {name: module._replicate_for_data_parallel() for name, module in model.named_modules()}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for child in module._modules:
            setattr(copies[name], child, copies[prefix + child])
        for parameter in module._parameters:
            if prefix + parameter in tensors:
                setattr(copies[name], parameter, tensors[prefix + parameter])
    return copies[""]


def test_replicas_run_with_their_own_tensors() -> None:
    """As ``torch.nn.DataParallel`` runs them, one in each thread; gradients reach the parameters by the copies."""
    model = Net()
    model.drop.p = 0.0
    ours = chained(model)
    for k in range(3):
        assert_same(step(ours, images(seed=k)), step(model, images(seed=k)))
        results: dict[str, dict[str, Tensor]] = {}
        for name, each in (("ours", ours), ("plain", model)):
            each.zero_grad(set_to_none=True)
            copies = [replica(each, {n: p * factor for n, p in each.named_parameters()}) for factor in (1.0, 1.5)]
            outputs: dict[int, Tensor] = {}

            def run(number: int, copies: Any = copies, outputs: Any = outputs, k: int = k) -> None:
                outputs[number] = copies[number](images(seed=10 * k + number))

            in_threads([lambda number=number: run(number) for number in (0, 1)])
            (outputs[0].square().sum() + outputs[1].sum()).backward()
            results[name] = {str(number): y.detach() for number, y in outputs.items()}
            results[name] |= {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        assert_same(results["ours"], results["plain"])
        assert len(results["ours"]) == 2 + len(list(model.parameters()))


@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_a_wrapper_binds_forward_again(when: str) -> None:
    """As Accelerate does for training in bfloat16: forward under autocast, in the place of the model's own."""
    from types import MethodType

    model = Net().float()
    model.drop.p = 0.0
    ours = chained(model)
    x = images().float()
    if when == "after it":
        assert_same(step(ours, x), step(model, x), 1e-5)
    for each in (model, ours):
        each.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(each.forward.__func__), each)
    assert type(model(x)) is Tensor
    assert ours(x).dtype == model(x).dtype == torch.bfloat16
    for k in range(2):
        found, expected = step(ours, images(seed=k).float()), step(model, images(seed=k).float())
        torch.testing.assert_close(found["result"], expected["result"])
        # Gradients on the grid are float32, theirs rounded to bfloat16.
        for name, value in ((n, t) for n, t in expected.items() if t.is_floating_point()):
            assert float((found[name] - value).norm()) <= 0.03 * float(value.norm()), name
        assert lengths(ours) == [3]


def in_threads(jobs: list[Callable[[], None]]) -> None:
    """All jobs at once; raises what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            start.wait(60)
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_another_thread_runs_its_own_model_while_one_is_captured() -> None:
    """It computes what it always does, and none of it is in our graph."""
    model, theirs = Net(), Net()
    theirs.drop.p = model.drop.p = 0.0
    ours, x = chained(model), images()
    expected = theirs(x).detach()
    done, started = threading.Event(), threading.Event()
    runs = []

    def train() -> None:
        started.wait(60)
        try:
            for k in range(2):
                assert_same(step(ours, images(seed=k)), step(model, images(seed=k)))
                assert lengths(ours) == [3]
        finally:
            done.set()

    def run() -> None:
        while not (done.is_set() and runs):
            torch.testing.assert_close(theirs(x), expected)
            runs.append(1)
            started.set()

    in_threads([train, run])
    assert runs


def test_threads_that_train_at_once() -> None:
    """Eight models, each with a number of images of its own."""
    models = [Net() for _ in range(8)]
    for number, model in enumerate(models):
        model.drop.p, model.act.negative_slope = 0.0, 0.1 * number
    ours = [chained(model) for model in models]
    found: list[list[dict[str, Tensor]]] = [[] for _ in models]

    def job(number: int) -> Callable[[], None]:
        return lambda: found[number].extend(step(ours[number], images(1 + number, seed=k)) for k in range(3))

    in_threads([job(number) for number in range(8)])
    for number, model in enumerate(models):
        for k in range(3):
            assert_same(found[number][k], step(model, images(1 + number, seed=k)))
        assert lengths(ours[number]) == [3]


def test_hooks_are_noticed_while_another_thread_runs() -> None:
    """Dynamo has settings for each thread, and by its defaults it would not look for hooks again."""

    class Waits(Net):
        def middle(self, y: Tensor) -> Tensor:
            wait()
            return y

    inside, leave = threading.Event(), threading.Event()

    @torch.compiler.disable
    def wait() -> None:
        inside.set()
        assert leave.wait(120)

    other = chained(Waits())
    thread = threading.Thread(target=lambda: step(other, images()))
    thread.start()
    try:
        assert inside.wait(120)
        model = Net()
        ours = chained(model)
        for k in range(2):
            if k:
                for each in (model, ours):
                    each.act.register_forward_hook(lambda module, args, y: y * 3)
            assert_same(step(ours, images(seed=k), k), step(model, images(seed=k), k))
            assert lengths(ours) == [3]
    finally:
        leave.set()
        thread.join(120)


@pytest.mark.parametrize("first_out", [0, 1])
def test_dynamo_has_its_settings_back_in_every_thread(first_out: int) -> None:
    """Two threads run models at once; whichever ends first, both have what was set there before."""
    names = ("skip_nnmodule_hook_guards", "optimize_ddp")
    ended = [threading.Event(), threading.Event()]
    found: list[list[Any]] = [[], []]
    entered = threading.Barrier(2)

    def read() -> list[Any]:
        return [getattr(torch._dynamo.config, name) for name in names]

    def run(number: int) -> None:
        found[number].append(read())
        with live._settings:
            entered.wait(60)
            found[number].append(read())
            if number != first_out:
                ended[first_out].wait(60)
                found[number].append(read())
        found[number].append(read())
        ended[number].set()

    in_threads([lambda number=number: run(number) for number in (0, 1)])
    for before, *inside, after in found:
        assert before == after == [True, True]
        assert inside == [[False, False]] * len(inside)
    assert sorted(map(len, found)) == [3, 4]


def test_another_thread_traces_by_fx() -> None:
    """Its flag for that is one for all threads, and Dynamo by its defaults refuses to run while it is set."""
    inside, leave = threading.Event(), threading.Event()

    def traced(x: Tensor) -> Tensor:
        inside.set()
        assert leave.wait(120)
        return x + 1

    model = Net()
    ours = chained(model)
    thread = threading.Thread(target=lambda: make_fx(traced)(torch.ones(2)))
    thread.start()
    try:
        assert inside.wait(120)
        for k in range(2):
            assert_same(step(ours, images(seed=k), k), step(model, images(seed=k), k))
            assert lengths(ours) == [3]
    finally:
        leave.set()
        thread.join(120)


def test_a_hook_on_a_stage() -> None:
    """It is registered after the first step and changed after the second; what it writes is written."""

    class Staged(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(self.conv1, self.norm, self.act)
            self.sizes: list[int] = []
            self.factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.conv3(torch.tanh(self.conv2(self.stage(x)))).mean((2, 3))

    model = Staged()
    ours = chained(model)
    for k in range(3):
        for each in (model, ours):
            if k == 1:
                each.stage.register_forward_hook(
                    lambda module, args, y, each=each: (each.sizes.append(len(y)), y * each.factor)[1]
                )
            each.factor = 1.0 + k
        assert_same(step(ours, images(k + 1)), step(model, images(k + 1)))
        assert ours.sizes == model.sizes == [2, 3][:k]
        assert lengths(ours) == [3]


def test_a_branch_that_depends_on_values() -> None:
    class Branches(Net):
        def middle(self, y: Tensor) -> Tensor:
            return y * 2 if y.sum() > 0 else y.flip(3) - 1

    model = Branches()
    ours = chained(model)
    taken = set()
    for k in range(6):
        x = images(seed=k) + 5 * (-1) ** k
        taken.add(bool(model.conv2(F.leaky_relu(model.norm(model.conv1(x)), 0.1)).sum() > 0))
        assert_same(step(ours, x, k), step(model, x, k))
    assert taken == {False, True}
    assert lengths(ours) in ([2], [2, 1])  # as the last step took one way or the other
    assert chains_of(ours).breaks[""]


@pytest.mark.parametrize("which", ["random", "numpy", "own generator"])
def test_random_numbers_of_others(which: str) -> None:
    """Each step draws its own, and as many as in eager PyTorch."""

    class Draws(Net):
        def __init__(self) -> None:
            super().__init__()
            self.generator = random.Random(3)

        def middle(self, y: Tensor) -> Tensor:
            if which == "random":
                return y * random.random() + random.randint(1, 5)
            return y * (np.random.rand() if which == "numpy" else self.generator.random())

    model = Draws()
    ours = chained(model)
    for k in range(3):
        found, after = step(ours, images(), k), (random.getstate(), np.random.get_state()[1].tolist())
        assert_same(found, step(model, images(), k))
        assert after == (random.getstate(), np.random.get_state()[1].tolist())
        assert ours.generator.getstate() == model.generator.getstate()


# Random modules that read and write state. Each is built twice, filtered and not, so that they share nothing.

#: A global that modules read, and one that they write.
SCALE = 1.0
CALLS: dict[str, int] = {"calls": 0}


class Part(nn.Module):
    """Something with state. ``change`` is done between steps from outside."""

    def change(self, by: float) -> None:
        """Nothing."""

    def state(self) -> Any:
        """What can be read of it."""
        return None


class Attribute(Part):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def change(self, by: float) -> None:
        self.factor += by


class CountsInAttribute(Part):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * 2 if self.steps % 2 else x - self.steps

    def state(self) -> Any:
        return self.steps


class CountsInBuffer(Part):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * (1 + 0.25 * self.steps)

    def change(self, by: float) -> None:
        self.steps = self.steps + by  # another tensor


class Statistics(Part):
    """Batch norm that changes between its modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def change(self, by: float) -> None:
        self.norm.train(not self.norm.training)
        self.norm.eps += by
        self.norm.momentum = 0.3 + by / 10


class Setting(Part):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.soft = nn.LeakyReLU(0.1), nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        return self.soft(self.act(x))

    def change(self, by: float) -> None:
        self.act.negative_slope += by
        self.soft.beta += by


class ReadsGlobal(Part):
    def forward(self, x: Tensor) -> Tensor:
        return x * SCALE

    def change(self, by: float) -> None:
        global SCALE
        SCALE += by


class WritesGlobal(Part):
    def forward(self, x: Tensor) -> Tensor:
        CALLS["calls"] += 1
        return x + CALLS["calls"]


class Closure(Part):
    def __init__(self) -> None:
        super().__init__()
        calls, factor = 0, 1.0

        def scale(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return x * factor if calls != 2 else x.flip(2)

        def set_factor(by: float) -> None:
            nonlocal factor
            factor += by

        self.scale, self.change, self.state = scale, set_factor, lambda: (calls, factor)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x)


class PythonRandom(Part):
    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.4:
            x = x.sin()
        return x * random.uniform(0.5, 2)


class NumpyRandom(Part):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.uniform(0.5, 2))


class OwnRandom(Part):
    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.generator.random()

    def state(self) -> Any:
        return self.generator.getstate()


class TorchRandom(Part):
    def __init__(self) -> None:
        super().__init__()
        self.p = 0.2

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)

    def change(self, by: float) -> None:
        self.p = 0.6


class Remembers(Part):
    """The last step's map."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        last, self.last = self.last, x.detach()
        return x if last is None else x + last.mean()

    def state(self) -> Any:
        return self.last


class Collects(Part):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.by_size: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        self.by_size[x.shape[0]] = self.by_size.get(x.shape[0], 0) + 1
        return x * len(self.sizes)

    def state(self) -> Any:
        return self.sizes, self.by_size


class Decides(Part):
    """By values."""

    threshold = 0.0
    taken = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > self.threshold:
            self.taken += 1
            return x.tanh()
        return x.flip(3)

    def change(self, by: float) -> None:
        self.threshold += 10 * by

    def state(self) -> Any:
        return self.taken


class Hooked(Part):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()
        self.seen: list[Tensor] = []
        self.handle: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def change(self, by: float) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.inner.register_forward_hook(
            lambda module, args, y: (self.seen.append(y.detach()), y * by)[1]
        )

    def state(self) -> Any:
        return self.seen


class Replaced(Part):
    """A module in the place of another one, a parameter in the place of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.ReLU()
        self.scale = nn.Parameter(torch.ones(1, CHANNELS, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.scale

    def change(self, by: float) -> None:
        self.act = nn.ELU(1 + by) if isinstance(self.act, nn.ReLU) else nn.ReLU()
        self.scale = nn.Parameter(self.scale.detach() + by)


PARTS: tuple[type[Part], ...] = (
    Attribute, CountsInAttribute, CountsInBuffer, Statistics, Setting, ReadsGlobal, WritesGlobal, Closure,
    PythonRandom, NumpyRandom, OwnRandom, TorchRandom, Remembers, Collects, Decides, Hooked, Replaced,
)  # fmt: skip


class Stateful(nn.Module):
    """A convolution, then parts with a convolution behind each."""

    def __init__(self, kinds: list[type[Part]], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = nn.ModuleList(kind() for kind in kinds)
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(len(kinds) + 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](x)
        for part, conv in zip(self.parts, self.convs[1:], strict=True):
            y = conv(part(y))
        return y.mean((2, 3))


@pytest.fixture
def globals_() -> Iterator[None]:
    global SCALE
    yield
    SCALE, CALLS["calls"] = 1.0, 0


@pytest.mark.usefixtures("globals_")
@pytest.mark.parametrize("kind", PARTS)
@compiling(3)
@given(
    others=st.lists(st.sampled_from(PARTS), max_size=2),
    place=st.integers(0, 2),
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.sampled_from([0.25, 0.5])), min_size=2, max_size=2),
    sizes=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    frozen=st.integers(-1, 3),
    seed=SEEDS,
)
def test_state(kind, others, place, changes, sizes, frozen, seed) -> None:
    """Three steps with changes between them; the same results, gradients and state as in eager PyTorch."""
    global SCALE
    kinds = [*others[:place], kind, *others[place:]]
    after: list[list[Any]] = []
    for filtered in (False, True):
        SCALE, CALLS["calls"] = 1.0, 0
        model = Stateful(kinds, seed)
        if filtered:
            gf_tvm.filter_model(model, 1, layers=convolutions(model))
        steps = []
        for k, n in enumerate(sizes):
            if k:
                changed, which, by = changes[k - 1]
                for number, part in enumerate(model.parts):
                    if changed and number != which:
                        part.change(by)
                if 0 <= frozen < len(model.convs):
                    model.convs[frozen].requires_grad_(k == 2)
            tensors = step(model, images(n, seed + k), k)
            generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
            steps.append(
                (tensors, generators, copy.deepcopy([part.state() for part in model.parts]), SCALE, dict(CALLS))
            )
        after.append(steps)
    for (expected, *theirs), (found, *ours) in zip(*after, strict=True):
        assert_same(found, expected)
        compare(ours, theirs)


def compare(found: Any, expected: Any) -> None:
    """Nested state, tensors up to rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            compare(a, b)
    else:
        assert found == expected
