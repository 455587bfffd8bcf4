"""Networks to train: built-in ones sized for small images, and anything that a ``module:factory`` makes.

* ``layers``: the blocks, and which strides a network keeps
* ``classification``: MobileNetV2, EfficientNet-Lite0, MCUNet, ResNet-18 and ResNet-34, and their trunks
* ``segmentation``: FCN, PSPNet, DeepLabV3 and UPerNet on those trunks
* ``factories``: networks by name
* ``preprocessing``, ``weights``: what trained networks' weights expect of images; weights from files and packages
"""

from .classification import EfficientNetLite0, MCUNet, MobileNetV2, ResNet18, ResNet34
from .factories import MODELS, build_model, logits_of
from .layers import LAST_MAP, SMALL_IMAGE, BasicBlock, InvertedResidual
from .preprocessing import Preprocessing
from .segmentation import HEADS, SegmentationNetwork
from .weights import Weights, classifier_of, find_weights, load_weights, replace_classifier

__all__ = [
    "HEADS",
    "LAST_MAP",
    "MODELS",
    "SMALL_IMAGE",
    "BasicBlock",
    "EfficientNetLite0",
    "InvertedResidual",
    "MCUNet",
    "MobileNetV2",
    "Preprocessing",
    "ResNet18",
    "ResNet34",
    "SegmentationNetwork",
    "Weights",
    "build_model",
    "classifier_of",
    "find_weights",
    "load_weights",
    "logits_of",
    "replace_classifier",
]
