"""Filtered, chained models under PyTorch's own tools: the same gradients as layer by layer, or a clear error."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gf_tvm
from gf_tvm.chains import chains_of
from gf_tvm.errors import GfTvmError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Dynamo looks at everything that a graph takes, maps after a break too.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # PyTorch's own forward mode uses it
]


class Net(nn.Module):
    """Three convolutions that make one chain."""

    def __init__(self, inside: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.third, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.inside = inside  # with checkpointing, reentrant or not

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.third(F.relu(self.norm(self.second(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.body(x) if self.inside is None else checkpoint(self.body, x, use_reentrant=self.inside)
        return self.head(x.mean((2, 3)))


class Own(nn.Conv2d):
    """Filtered only where it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OwnNet(Net):
    def __init__(self) -> None:
        super().__init__()
        second = Own(4, 4, 3, padding=1)
        second.load_state_dict(self.second.state_dict())
        self.second = second


def network(chain: bool = True, kind: type[Net] = Net, dtype: torch.dtype = torch.float64, **how: Any) -> Net:
    return gf_tvm.filter_model(kind(**how).to(dtype).eval(), 2, last=3, chain=chain)


def images(n: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def loss(y: Tensor) -> Tensor:
    return y.square().sum()


Gradients = dict[str, Tensor]


def gradients(model: nn.Module, x: Tensor | None = None, run: Callable[[Tensor], Tensor] | None = None) -> Gradients:
    """Of ``model``'s parameters, in a step in which ``run`` (None: the model itself) computes the result."""
    model.zero_grad()
    loss((model if run is None else run)(images() if x is None else x)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_filtered(actual: Gradients, x: Tensor | None = None, rtol: float = 1e-10) -> None:
    """These are the gradients of the layer by layer form, and not the exact ones."""
    expected, exact = gradients(network(chain=False), x), gradients(Net().double().eval(), x)
    assert list(actual) == list(expected)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= rtol * gradient.norm(), name
    assert (actual["second.weight"] - exact["second.weight"]).norm() > 0.1 * exact["second.weight"].norm()


def lengths(model: nn.Module) -> list[int]:
    return [len(chain.convolutions) for chain in chains_of(model).chains]


# Compilers


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_from_outside(backend: str, whole: bool) -> None:
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend=backend, fullgraph=whole)
    assert_filtered(gradients(model, run=compiled))
    assert lengths(model) == ([] if whole else [3])  # one graph has its convolutions filtered one by one


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x + 0) * 1
        return y


@pytest.mark.parametrize("kind", [Net, OwnNet])
@pytest.mark.parametrize("how", ["function", "module"])
def test_compiled_as_a_part(how: str, kind: type[Net]) -> None:
    """Dynamo calls the forward pass of modules that it meets at once, if nothing stands in the way."""
    torch._dynamo.reset()
    model = network(kind=kind)
    part: Any = Wrapped(model) if how == "module" else lambda x: model(x + 0) * 1
    assert_filtered(gradients(model, run=torch.compile(part, backend="eager")))
    assert lengths(model) == [3]


@pytest.mark.parametrize("how", [lambda model: model, Wrapped, lambda model: lambda x: model(x + 0)])
def test_one_graph_refuses_what_would_be_exact(how: Callable[[nn.Module], Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(how(network(kind=OwnNet)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="would have exact gradients"):
        compiled(images())


def test_backend_by_its_entry_point() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="gf_tvm")
    assert entry.load() is gf_tvm.nn.compile_backend
    torch._dynamo.reset()
    model = Net().double().eval()
    compiled = torch.compile(model, backend="gf_tvm", options={"patch": 2, "last": 3})
    assert_filtered(gradients(model, run=compiled))
    assert not any(isinstance(module, gf_tvm.FilteredConv2d) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 2, "lst": 3}, "no option 'lst'"),
        ({"patch": 0, "last": 3}, "patch must be at least 1, got 0"),
        ({"patch": 2, "last": 0}, "last must be a positive integer, got 0"),
        ({"last": 3}, "needs the option patch"),
    ],
)
def test_backend_refuses_options(options: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Net().double().eval(), backend="gf_tvm", options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as error:
        compiled(images())
    assert isinstance(error.value.inner_exception, GfTvmError)


# Mixed precision, accumulation, checkpointing


def test_autocast_and_scaler() -> None:
    results = []
    for chain in (True, False):
        model = network(chain, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                result = loss(model(images(dtype=torch.float32)))
            scaler.scale(result).backward()
            scaler.step(optimizer)
            scaler.update()
        if chain:
            assert lengths(model) == [3]
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in Net().parameters()])
    assert not torch.allclose(results[1], start, rtol=1e-2)
    # Both round to bfloat16, in other places.
    assert (results[0] - results[1]).norm() < 0.02 * (results[1] - start).norm()


def test_gradients_accumulate() -> None:
    chained, plain = network(), network(chain=False)
    for model in (chained, plain):
        for part in images(4).split(2):
            loss(model(part)).backward()
    for a, b in zip(chained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    assert_filtered({name: p.grad for name, p in chained.named_parameters()}, images(4))  # type: ignore[misc]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_checkpointing(where: str, reentrant: bool) -> None:
    model = network(inside=reentrant) if where == "inside" else network()
    x = images()

    def around(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
        return y

    assert_filtered(gradients(model, x, around if where == "around" else None), x.detach())


# Copies


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def by_state_dict(model: nn.Module) -> nn.Module:
    other = network()
    nn.init.zeros_(other.second.weight)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        by_torch_save,
        by_state_dict,
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["deepcopy", "pickle", "torch.save", "load_state_dict", "AveragedModel"],
)
def test_copies(copied: Callable[[nn.Module], nn.Module], ran: bool) -> None:
    model = network()
    if ran:
        gradients(model)
    other = copied(model)
    found = gradients(other)
    assert_filtered({name.removeprefix("module."): gradient for name, gradient in found.items()})
    assert lengths(other) == [3]
    assert_filtered(gradients(model))
    assert lengths(model) == [3]


def test_an_average_is_updated() -> None:
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    before = model.second.weight.detach().clone()
    gradients(model)
    with torch.no_grad():
        model.second.weight.add_(1)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.second.weight.detach(), before + 0.5)
    y = Net().double().eval()
    y.load_state_dict(average.module.state_dict())
    assert average(images()).equal(y(images()))


# torch.func and forward mode


def test_functional_call() -> None:
    model = network()
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss(functional_call(model, given, (images(),))).backward()
    assert_filtered({name: p.grad for name, p in given.items()})  # type: ignore[misc]
    assert all(p.grad is None for p in model.parameters())


def of_parameters(model: nn.Module) -> tuple[Gradients, Callable[[Gradients], Tensor]]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, lambda given: functional_call(model, given, (images(),))


def test_func_grad_and_vjp() -> None:
    parameters, function = of_parameters(network())
    assert_filtered(grad(lambda given: loss(function(given)))(parameters))
    y, back = vjp(function, parameters)
    assert_filtered(back(2 * y)[0])


def test_gradients_of_each_image() -> None:
    model = network()
    parameters, _ = of_parameters(model)

    def of_one(given: Gradients, image: Tensor) -> Tensor:
        return loss(functional_call(model, given, (image[None],)))

    found = vmap(grad(of_one), (None, 0))(parameters, images())
    for number, image in enumerate(images()):
        assert_filtered({name: g[number] for name, g in found.items()}, image[None])


def test_vmap() -> None:
    model = network()
    assert_filtered(gradients(model, images(4), lambda x: vmap(model)(x.unflatten(0, (2, 2))).flatten(0, 1)), images(4))


@pytest.mark.parametrize("kind", [Net, OwnNet])
def test_func_jvp_is_exact(kind: type[Net]) -> None:
    parameters, function = of_parameters(network(kind=kind))
    _, exact = of_parameters(kind().double().eval())
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    (y, tangent), (y2, expected) = jvp(function, (parameters,), (tangents,)), jvp(exact, (parameters,), (tangents,))
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(tangent, expected)
    assert tangent.norm() > 0


def test_dual_tensors_are_exact() -> None:
    x, direction = images(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for model in (network(), Net().double().eval()):
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
            found.append((y.detach(), tangent.detach()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    "use",
    [
        lambda m: grad(lambda x: loss(m(x)))(images()),
        lambda m: vmap(m)(images()[None]),
        lambda m: under(forward_ad.dual_level(), m),
        lambda m: under(FlopCounterMode(display=False), m),
    ],
    ids=["grad", "vmap", "dual_level", "dispatch mode"],
)
def test_what_would_be_exact_is_refused(use: Callable[[nn.Module], Any]) -> None:
    """A convolution that is filtered only where it is captured, where nothing is captured."""
    model = network(kind=OwnNet)
    with pytest.raises(GfTvmError, match="OwnNet"):
        use(model)
    assert_filtered(gradients(model))


def under(context: Any, model: nn.Module) -> Tensor:
    with context:
        y: Tensor = model(images())
    return y


# Export and accounting


@pytest.mark.parametrize("kind", [Net, OwnNet])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exports_compute_the_same(kind: type[Net]) -> None:
    model = network(kind=kind)
    x = images(2) * 2
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, images())(x), expected)
    for strict in (False, True):
        torch.testing.assert_close(torch.export.export(model, (images(),), strict=strict).module()(x), expected)
    assert_filtered(gradients(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.onnx")
def test_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    files = []
    for model in (network(dtype=torch.float32), Net().eval()):
        file = io.BytesIO()
        torch.onnx.export(model, (images(dtype=torch.float32),), file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue()).graph
        files.append(([node.op_type for node in graph.node], [t.raw_data for t in graph.initializer]))
    assert files[0] == files[1]
    assert files[0][0].count("Conv") == 3


def test_operations_are_counted() -> None:
    """Under a dispatch mode Dynamo captures nothing, so that each convolution is filtered by itself."""
    counts = []
    for model in (network(), network(chain=False), Net().double().eval()):
        gradients(model)
        with FlopCounterMode(display=False) as counter:
            found = gradients(model)
        counts.append(counter.get_total_flops())
        if len(counts) == 1:
            assert_filtered(found)
    assert counts[0] == counts[1]
    # By hand: 3 convolutions and the classifier forward; backward a filtered product is a quarter at patch 2.
    convolutions = [2 * 2 * 64 * macs for macs in (4 * 3 * 9, 4 * 4 * 9, 4 * 4)]
    classifier = 2 * 2 * 4 * 3
    assert counts[2] == 3 * sum(convolutions) - convolutions[0] + 3 * classifier
