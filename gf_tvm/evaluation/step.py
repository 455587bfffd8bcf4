"""One step's memory, operations and energy, measured in a fresh process: ``python -m gf_tvm.evaluation.step RESULT``.

A process' peak memory never goes down again, so each setting gets a process of its own. It runs the product's
fine-tuning on a few batches of random images in the shape of the real ones, without loading the data set: what it
takes is the interpreter, the libraries, the network and the step. Its task comes as JSON on standard input, its result
goes into the file RESULT, because models may print.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.capture.backend import watch_steps
from ..chains.model import compiles_itself
from ..errors import GfTvmError
from ..machine import cpu
from ..machine.allocator import environment_of_children
from ..training.config import TrainConfig
from ..training.data import CHANNELS, Dataset, Images
from ..training.loop import training_mode
from ..training.results import TrainResult
from ..training.tasks import loss_of
from ..training.trainer import finetune, pretrain
from .flops import count_step
from .results import EvaluationError

#: In ``kept_bytes_by_type``: what is saved outside the model.
LOSS = "(loss)"
#: And what chains save, which belongs to no single module.
CHAINS = "(chains)"


@dataclass(frozen=True)
class StepCost:
    """See :class:`~.results.Setting`; ``energy`` names the meter, or says why there is none."""

    kept_bytes: int
    kept_bytes_convolutions: int
    kept_bytes_by_type: dict[str, int]
    peak_bytes: int | None
    backward_flops: int
    forward_flops: int
    energy_joules_per_step: float | None
    energy: str


def measure_apart(config: TrainConfig, classes: int, masks: bool, library: Path | None, steps: int) -> StepCost:
    """:func:`measure` in a fresh process with this one's number of threads.

    ``masks``: the labels are those of pixels.

    Raises:
        EvaluationError: the process failed; says with what.
    """
    task = {"config": config.to_dict(), "classes": classes, "masks": masks, "steps": steps}
    task["threads"] = torch.get_num_threads()
    task["library"] = None if library is None else str(library)
    with tempfile.TemporaryDirectory(prefix="gf_tvm-") as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(result)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=False,
            # The user's model may be importable here only because of what this process has in its path.
            env={
                **os.environ,
                **environment_of_children(),
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
        )
        content = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if "cost" in content:
        return StepCost(**content["cost"])
    ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    reason = content.get("error") or (done.stderr.strip().splitlines() or [ended])[-1]
    raise EvaluationError(f"a step of {config.variant}, last {config.last} could not be measured: {reason}")


def measure(config: TrainConfig, classes: int, masks: bool, library: Any, steps: int) -> StepCost:
    """Train ``steps`` steps on random images and say what one takes; to be called once in a process."""
    dataset = _random_dataset(config, classes, masks, steps)
    # The rate keeps random labels from driving the weights anywhere; it changes no size and no time.
    # Nothing is kept of the frozen layers: a first epoch has to compute them all.
    run = replace(config, epochs=1, pretrain_epochs=0, lr=1e-6, cache="off")
    result = finetune(run, dataset, pretrain(run, dataset), library=library)
    peak = cpu.peak_bytes()  # before anything below takes memory of its own
    # Copies: what keeps a part of a tensor keeps, and is counted with, all of it.
    x, y = (t[: config.batch].clone() for t in (dataset.finetune_train.x, dataset.finetune_train.y))
    training_mode(result.model, "finetune")
    flops = count_step(result.model, x)
    joules, energy = _energy(result, x, y)
    return StepCost(
        kept_bytes=result.rows[0].kept_bytes,
        kept_bytes_convolutions=result.rows[0].kept_bytes_convolutions,
        kept_bytes_by_type=kept_by_type(result.model, x, y),
        peak_bytes=peak,
        backward_flops=flops.backward,
        forward_flops=flops.forward,
        energy_joules_per_step=joules,
        energy=energy,
    )


def kept_by_type(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, int]:
    """Bytes that a step keeps for its backward pass, by the type of the innermost module that saved them.

    A storage that several modules save counts once, for the first: the output of a ReLU is the ReLU's, although an
    exact convolution behind it keeps the same storage. Largest first. Parameters and buffers are excluded.
    What chains save is not told apart.
    """
    ignored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    owners: dict[int, tuple[str, torch.UntypedStorage]] = {}  # the storages are held, so that no address comes twice
    active = [LOSS]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            owners.setdefault(storage.data_ptr(), (active[-1], storage))
        return tensor

    def enter(module: nn.Module, *_: object) -> None:
        active.append(type(module).__name__)

    def leave(*_: object) -> None:
        active.pop()

    def watch(path: str | None, kind: str | None) -> None:
        own = kind or type(model).__name__
        active[-1] = LOSS if kind is None else CHAINS if path is None else own

    with ExitStack() as stack:
        if compiles_itself(model):  # and then calls no modules
            stack.enter_context(watch_steps(watch))
        else:
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, x, y)
    kept: Counter[str] = Counter()
    for name, storage in owners.values():
        kept[name] += storage.nbytes()
    return dict(kept.most_common())


def _random_dataset(config: TrainConfig, classes: int, masks: bool, steps: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    names = tuple(map(str, range(classes)))
    shape = (CHANNELS, config.image_size, config.image_size)

    def images(count: int) -> Images:
        x = torch.randn(count, *shape, generator=generator)
        y = torch.randint(classes, (count, *(shape[1:] if masks else ())), generator=generator)
        return Images(x, y.to(torch.uint8) if masks else y, names)

    train, test = images(steps * config.batch), images(config.batch)
    return Dataset("random images", train, test, train, test, (0.0,) * CHANNELS, (1.0,) * CHANNELS)


def _energy(result: TrainResult, x: Tensor, y: Tensor) -> tuple[float | None, str]:
    """Joules of a step above idle and the meter's name; or None, and why there is no figure."""
    from ..machine import energy

    try:
        meter = energy.find_meter()
        parameters = [p for p in result.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=result.config.momentum)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss_of(result.model, x, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        seconds = sum(result.step_ms.values()) / 1e3
        joules, _ = energy.joules_a_step(meter, step, lambda: None, seconds, energy.SECONDS)
    except energy.NotMeasured as error:
        return None, str(error)
    return joules, meter.name


def main(path: Path) -> None:
    """Measure what standard input asks for."""
    from ..bundle.library import load

    task = json.load(sys.stdin)
    content: dict[str, Any]
    try:
        torch.set_num_threads(task["threads"])
        library = None if task["library"] is None else load(task["library"])
        cost = measure(TrainConfig(**task["config"]), task["classes"], task["masks"], library, task["steps"])
        content = {"cost": asdict(cost)}
    except GfTvmError as error:
        content = {"error": " ".join(str(error).split())}
    path.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
