"""Filtered convolutions, chained too, under DistributedDataParallel: two processes with half of the batch each."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gf_tvm
from gf_tvm.shapes import model_cases, workloads_of

BATCH, WORLD = 4, 2


def network() -> nn.Sequential:
    """Two convolutions; the second, filtered one is what a library may have kernels for."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 9, 9, generator=generator), torch.randint(5, (BATCH,), generator=generator)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


def work(rank: int, folder: str, bundle: str) -> None:
    """One process: its half of the batch, gradients averaged over both processes; without and with the library."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", gf_tvm.FallbackWarning)  # with a library, its kernels must run
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        x, y = (tensor.chunk(WORLD)[rank] for tensor in images())
        fast = gf_tvm.filter_model(network(), patch=2, layers=["2"], library=gf_tvm.load(bundle), chain=False)
        results = {"kernels": gradients(DistributedDataParallel(fast), x, y)}
        chained = gf_tvm.filter_model(network(), 2, layers=["0", "2"], library=gf_tvm.load(bundle), chain=True)
        results["chained"] = gradients(DistributedDataParallel(chained), x, y)
        assert [chain.convolutions for chain in gf_tvm.chains_of(chained).chains] == [("0", "2")]
        warnings.simplefilter("ignore", gf_tvm.FallbackWarning)
        plain = gf_tvm.filter_model(network(), patch=2, layers=["2"], chain=False)
        results["plain"] = gradients(DistributedDataParallel(plain), x, y)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    bundle = str(tmp_path / "half.gfb")
    cases = model_cases(network(), (BATCH // WORLD, 3, 9, 9), layers=["0", "2"], patches=[2])
    # As the layer before it is trained, too, the last convolution's input needs a gradient; the first one's does not.
    workloads = [w for w in workloads_of(cases, chained=True) if w.kernel != "backward_weight"]
    chained = gf_tvm.filter_model(network(), 2, layers=["0", "2"], chain=True)
    gradients(chained, *(tensor.chunk(WORLD)[0] for tensor in images()))
    gf_tvm.build(workloads, "host", out=bundle, shipped=False, programs=gf_tvm.programs_of(chained))
    torch.multiprocessing.spawn(work, (str(tmp_path), bundle), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    whole = gradients(gf_tvm.filter_model(network(), patch=2, layers=["2"]), *images())
    both = gradients(gf_tvm.filter_model(network(), patch=2, layers=["0", "2"]), *images())
    exact = gradients(network(), *images())
    assert len(whole) == len(exact) == 6
    for name, wanted in (("kernels", whole), ("plain", whole), ("chained", both)):
        for a, b, expected in zip(first[name], second[name], wanted, strict=True):
            assert a.equal(b)
            torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(exact[2], whole[2], rtol=1e-2)  # filtered, and not by accident the exact gradient
