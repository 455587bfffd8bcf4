"""Fine-tuning networks with the exact or the filtered backward pass: data, protocol, checkpoints.

Names are imported on first use: the command line reads the defaults of :class:`TrainConfig` without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .config import TrainingError as TrainingError
    from .data import Dataset as Dataset
    from .data import Images as Images
    from .data import load_dataset as load_dataset
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
    "finetune": "trainer",
    "load_data": "trainer",
    "load_dataset": "data",
    "pretrain": "trainer",
    "train": "trainer",
    "train_variants": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
