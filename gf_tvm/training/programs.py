"""What a fine-tuning run calls besides single kernels, found without running anything."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..chains import programs_of
from ..chains.compile.programs import Program
from ..core.geometry import Patch
from ..machine.profiles import DeviceProfile
from ..nn import filter_model, select_filterable
from ..shapes.model import does_not_run, last_to_run
from .loop import training_mode
from .trainer import freeze


def chain_programs(
    model: nn.Module,
    input_shape: Sequence[int],
    last: int,
    patches: Iterable[Patch] = (2,),
    train_bn_affine: bool = False,
    device: DeviceProfile | str = "host",
    chain: bool = True,
) -> list[Program]:
    """The programs that :func:`gf_tvm.build` can compile for fine-tuning of ``model``, which stays as it was.

    Args:
        model: takes one tensor of ``input_shape``, (n, c, h, w) of a training batch.
        last: its last convolutions are fine-tuned, as :class:`TrainConfig` says.
        patches: programs for each of them.
        train_bn_affine: as in :class:`TrainConfig`.
        device: the CPU that they are for.
        chain: without, each convolution is filtered by itself.

    Raises:
        DeviceError: there is no such profile.
        ModelError: no such layers, or the model does not run on that input.
    """
    found: dict[str, Program] = {}
    for patch in patches:
        run = copy.deepcopy(model)
        chosen = set(last_to_run(run, last, input_shape))
        selected = select_filterable(run, layers=lambda name, _, chosen=chosen: name in chosen)  # type: ignore[misc]
        freeze(run, list(selected.convs), train_bn_affine)
        filter_model(run, patch, layers=list(selected.filterable), chain=chain)
        training_mode(run, "finetune")
        found |= {program.key: program for program in programs_for(run, input_shape, device)}
    return list(found.values())


def programs_for(model: nn.Module, input_shape: Sequence[int], device: DeviceProfile | str = "host") -> list[Program]:
    """:func:`gf_tvm.programs_of` a filtered model that has not run.

    Args:
        model: in the mode and with the flags of training; its parameters and buffers are lost, only shapes remain.
        input_shape: (n, c, h, w) of a training batch.
        device: the CPU that they are for.

    Raises:
        DeviceError: there is no such profile.
        ModelError: the model does not run on that input.
    """
    try:
        with torch.enable_grad():
            model.to("meta")(torch.empty(tuple(input_shape), device="meta"))
    except Exception as error:
        raise does_not_run(model, input_shape, error) from error
    return programs_of(model, device)
