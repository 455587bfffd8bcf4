"""Networks that nobody here wrote, of transformers and of efficientnet-lite-pytorch, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: The class of each model of transformers, and that of its configuration, which has the defaults.
TRANSFORMERS = {
    "MobileNetV1": ("MobileNetV1ForImageClassification", "MobileNetV1Config"),
    "MobileNetV2": ("MobileNetV2ForImageClassification", "MobileNetV2Config"),
    "DeepLabV3+": ("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config"),
    "UPerNet": ("UperNetForSemanticSegmentation", "UperNetConfig"),
    "SegFormer": ("SegformerForSemanticSegmentation", "SegformerConfig"),
    "MobileViT": ("MobileViTForImageClassification", "MobileViTConfig"),
    "ResNet-50": ("ResNetForImageClassification", "ResNetConfig"),
    "RegNet": ("RegNetForImageClassification", "RegNetConfig"),
    "EfficientNet": ("EfficientNetForImageClassification", "EfficientNetConfig"),
}
LITE = "EfficientNet-Lite0"
NAMES = (*TRANSFORMERS, LITE)


def real_model(name: str) -> nn.Module:
    """In evaluation mode."""
    if name == LITE:
        from efficientnet_lite_pytorch import EfficientNet

        model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        return model.eval()
    import transformers

    kind, config = TRANSFORMERS[name]
    settings: dict[str, Any] = {}
    if name == "UPerNet":
        settings["backbone_config"] = transformers.ResNetConfig(out_features=[f"stage{i}" for i in range(1, 5)])
    built: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    return built.eval()


def logits(output: Any) -> torch.Tensor:
    """A model's result as a tensor."""
    result = output if isinstance(output, torch.Tensor) else output.logits
    assert isinstance(result, torch.Tensor)
    return result
