"""Fine-tuning networks with the exact or the filtered backward pass: data, protocol, checkpoints.

Names are imported on first use: the command line reads the defaults of :class:`TrainConfig` without loading PyTorch.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .config import TrainingError as TrainingError
    from .data import Dataset as Dataset
    from .data import Images as Images
    from .data import load_dataset as load_dataset
    from .programs import chain_programs as chain_programs
    from .results import EpochRow as EpochRow
    from .results import Event as Event
    from .results import Pretrained as Pretrained
    from .results import TrainResult as TrainResult
    from .trainer import finetune as finetune
    from .trainer import load_data as load_data
    from .trainer import pretrain as pretrain
    from .trainer import train as train
    from .trainer import train_variants as train_variants

_HOMES = {
    "Dataset": "data",
    "EpochRow": "results",
    "Event": "results",
    "Images": "data",
    "Pretrained": "results",
    "TrainConfig": "config",
    "TrainResult": "results",
    "TrainingError": "config",
    "chain_programs": "programs",
    "finetune": "trainer",
    "load_data": "trainer",
    "load_dataset": "data",
    "pretrain": "trainer",
    "train": "trainer",
    "train_variants": "trainer",
}

__getattr__, __dir__ = attach(__name__, _HOMES)
