"""Filtered, chained models with parameters in two processes: FSDP2 over gloo, half of the batch each.

DistributedDataParallel is in tests/ops/test_distributed.py.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gf_tvm
from gf_tvm.chains import chains_of

WORLD = 2


class Net(nn.Module):
    """Of a class of its own: Dynamo does not capture what PyTorch's containers run, once it has broken a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return y


def network(filtered: bool = True, chain: bool = True) -> Net:
    model = Net().double()
    return gf_tvm.filter_model(model, 2, layers=["first", "second"], chain=chain) if filtered else model


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def work(rank: int, folder: str) -> None:
    """One process: its half of the batch; the model as one unit, and with units inside of it."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        results = {}
        for name, units in (("whole", []), ("units", ["first", "head"])):
            model = network()
            mesh = dist.init_device_mesh("cpu", (WORLD,))
            for unit in units:
                fully_shard(model.get_submodule(unit), mesh=mesh)
            fully_shard(model, mesh=mesh)
            for _ in range(2):
                model.zero_grad()
                model(images().chunk(WORLD)[rank]).square().mean().backward()
            gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}  # type: ignore[union-attr]
            lengths = [len(chain.convolutions) for chain in chains_of(model).chains]
            results[name] = (gradients, lengths, list(gf_tvm.filter_report(model).filtered))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_sharded_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=WORLD)
    model, exact = network(chain=False), network(filtered=False)
    for each in (model, exact):
        each(images()).square().mean().backward()
    for rank in range(WORLD):
        for name, (gradients, lengths, filtered) in torch.load(tmp_path / f"{rank}.pt").items():
            for parameter, expected in model.named_parameters():
                torch.testing.assert_close(gradients[parameter], expected.grad, rtol=1e-9, atol=1e-12)
            assert not torch.allclose(gradients["second.weight"], exact.second.weight.grad, rtol=0.02)
            assert filtered == ["first", "second"]
            assert lengths == {"whole": [2], "units": [1]}[name]  # a unit's hooks end the graph, and so the chain
