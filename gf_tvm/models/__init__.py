"""Networks to train: built-in ones sized for small images, and anything that a ``module:factory`` makes.

* ``layers``: the blocks, and which strides a network keeps
* ``classification``: MobileNetV2, MCUNet, ResNet-18 and ResNet-34, and their trunks
* ``segmentation``: FCN, PSPNet, DeepLabV3 and UPerNet on those trunks
* ``factories``: networks by name
"""

from .classification import MCUNet, MobileNetV2, ResNet18, ResNet34
from .factories import MODELS, build_model, logits_of
from .layers import LAST_MAP, SMALL_IMAGE, BasicBlock, InvertedResidual
from .segmentation import HEADS, SegmentationNetwork

__all__ = [
    "HEADS",
    "LAST_MAP",
    "MODELS",
    "SMALL_IMAGE",
    "BasicBlock",
    "InvertedResidual",
    "MCUNet",
    "MobileNetV2",
    "ResNet18",
    "ResNet34",
    "SegmentationNetwork",
    "build_model",
    "logits_of",
]
