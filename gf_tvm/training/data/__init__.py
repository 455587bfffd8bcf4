"""Data sets to train on, in memory or decoded as they are wanted (``photos``). Nothing is downloaded.

The paper's protocol (CVPR 2023, section 4) pretrains on one part of a data set and fine-tunes on another with a
different distribution, "non-i.i.d." in the sense of federated learning (McMahan et al. 2017); see :func:`split_parts`
for how the parts are drawn here. ``load`` chooses the reader, which has a module of its own; ``base`` is what all give.
"""

from .base import CHANNELS, IGNORED, PARTS, Dataset, Images
from .batching import batches, steps
from .load import load_dataset, load_images
from .photos import Photos
from .split import split_labels, split_parts

__all__ = [
    "CHANNELS",
    "IGNORED",
    "PARTS",
    "Dataset",
    "Images",
    "Photos",
    "batches",
    "load_dataset",
    "load_images",
    "split_labels",
    "split_parts",
    "steps",
]
