"""Filtered, chained models with the tools that train them: the steps of the layer by layer form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gf_tvm
from gf_tvm.chains import chains_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of these tools' own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Net(nn.Module):
    """Three convolutions that make one chain; gives the loss, and the result, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(pixel_values))))))
        logits = self.head(x.mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


NAMES = ["first", "second", "third"]


def network(chain: bool, layers: list[str] = NAMES) -> Net:
    return gf_tvm.filter_model(Net(), 2, layers=layers, chain=chain)


def data(n: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(i % 3)} for i in range(n)
    ]


def batch() -> dict[str, Tensor]:
    return {key: torch.stack([one[key] for one in data()]) for key in ("pixel_values", "labels")}


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def assert_same_steps(chained: nn.Module, plain: nn.Module, exact: nn.Module, rtol: float = 1e-4) -> None:
    """Both came to the same place, and training without filtering to another."""
    way = (values(plain) - values(Net())).norm()
    assert (values(chained) - values(plain)).norm() < rtol * way
    assert (values(exact) - values(plain)).norm() > 0.02 * way


def lengths(model: nn.Module) -> list[int]:
    return [len(chain.convolutions) for chain in chains_of(model).chains]


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    models = [network(True), network(False), Net()]
    for model in models:
        settings = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=3,
            learning_rate=0.1,
            optim="sgd",
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(model, settings, train_dataset=data()).train()
    assert_same_steps(*models)
    assert lengths(models[0]) == [3]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    models = [network(True), network(False), Net()]
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        for model in models:
            accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
            prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
            for _ in range(2):
                optimizer.zero_grad()
                accelerator.backward(prepared(**batch())["loss"])
                optimizer.step()
            assert accelerator.unwrap_model(prepared) is model
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    assert_same_steps(*models, rtol=1e-4 if precision == "no" else 0.02)
    assert lengths(models[0]) == [3]


@pytest.mark.parametrize("first", ["filter", "adapters"])
@pytest.mark.parametrize(
    ("targets", "chains"), [(["head"], []), (["first", "head"], [2])], ids=["linear", "another convolution"]
)
def test_peft(targets: list[str], chains: list[int], first: str) -> None:
    """LoRA on the classifier leaves nothing to filter; on the first convolution, gradients come through the others."""
    peft = pytest.importorskip("peft")
    layers = [name for name in NAMES if name not in targets]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    found = []
    for filtered, chain in ((True, True), (True, False), (False, False)):
        model = Net()
        if filtered and first == "filter":
            gf_tvm.filter_model(model, 2, layers=layers, chain=chain)
        torch.manual_seed(1)
        adapted: Any = peft.get_peft_model(model, config)
        if filtered and first == "adapters":
            gf_tvm.filter_model(adapted, 2, layers=[f"base_model.model.{name}" for name in layers], chain=chain)
        adapted.double()(**{k: v.double() if v.is_floating_point() else v for k, v in batch().items()})[
            "loss"
        ].backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
        if chain:
            assert lengths(adapted) == chains
    assert len(found[0]) == 2 * len(targets)
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-9, atol=1e-12)
    if chains:
        assert any(not torch.allclose(found[2][name], gradient, rtol=0.02) for name, gradient in found[1].items())


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, given: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.model(**given)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    models = [network(True), network(False), Net()]
    for model in models:
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Task(model), torch.utils.data.DataLoader(data(), 2))  # type: ignore[arg-type]
    assert_same_steps(*models)
    assert lengths(models[0]) == [3]
