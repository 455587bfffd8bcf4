"""FilteredConv2d under DistributedDataParallel: two processes with half of the batch each, over gloo."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gf_tvm

BATCH, WORLD = 4, 2


def network() -> nn.Sequential:
    """Two convolutions; the second, filtered one is what a library may have kernels for."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    return model


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 9, 9, generator=generator), torch.randint(5, (BATCH,), generator=generator)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


def work(rank: int, folder: str, bundle: str | None) -> None:
    """One process: its half of the batch, gradients averaged over both processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        library = None if bundle is None else gf_tvm.load(bundle)
        model = gf_tvm.filter_model(network(), patch=2, layers=["2"], library=library)
        x, y = (tensor.chunk(WORLD)[rank] for tensor in images())
        torch.save(gradients(DistributedDataParallel(model), x, y), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes_give_the_gradients_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    bundle = None
    if compiled:
        from gf_tvm.shapes import model_cases, workloads_of

        bundle = str(tmp_path / "half.gfb")
        cases = model_cases(network(), (BATCH // WORLD, 3, 9, 9), layers=["2"], patches=[2])
        # The layer before is trained, too, so its gradient is needed.
        workloads = [w for w in workloads_of(cases) if w.kernel in ("filter_input", "backward")]
        gf_tvm.build(workloads, "host", out=bundle, shipped=False)
        with pytest.warns(gf_tvm.FallbackWarning):  # it is a library for half of the batch
            gf_tvm.autograd._said.clear()
            gradients(gf_tvm.filter_model(network(), patch=2, layers=["2"], library=gf_tvm.load(bundle)), *images())
    torch.multiprocessing.spawn(work, (str(tmp_path), bundle), nprocs=WORLD)
    expected = gradients(gf_tvm.filter_model(network(), patch=2, layers=["2"]), *images())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    exact = gradients(network(), *images())
    assert len(expected) == 6
    for a, b, whole in zip(first, second, expected, strict=True):
        assert a.equal(b)
        torch.testing.assert_close(a, whole, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(exact[2], expected[2], rtol=1e-2)  # filtered, and not by accident the exact gradient
