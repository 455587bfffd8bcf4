"""Networks for benchmarks/step.py that gf_tvm does not have itself."""

from __future__ import annotations

from torch import nn


def efficientnet_lite0(num_classes: int) -> nn.Module:
    """EfficientNet-Lite0 with random weights (the package efficientnet-lite-pytorch, of the extra "test")."""
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", override_params={"num_classes": num_classes})
    return model
