"""Fine-tuning networks with the exact or the filtered backward pass.

``job`` fine-tunes a network on somebody's pictures and leaves a model; ``trainer`` compares backward passes by the
paper's protocol. They share data, loop and checkpoints.

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
    from .job.config import JobConfig as JobConfig
    from .job.run import JobResult as JobResult
    from .job.run import fine_tune_model as fine_tune_model
    from .job.saved import Preprocessing as Preprocessing
    from .job.saved import SavedModel as SavedModel
    from .job.saved import load_model as load_model
    from .job.using import Prediction as Prediction
    from .job.using import export_onnx as export_onnx
    from .job.using import predict as predict
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
    "JobConfig": "job.config",
    "JobResult": "job.run",
    "Prediction": "job.using",
    "Preprocessing": "job.saved",
    "Pretrained": "results",
    "SavedModel": "job.saved",
    "TrainConfig": "config",
    "TrainResult": "results",
    "TrainingError": "config",
    "chain_programs": "programs",
    "export_onnx": "job.using",
    "fine_tune_model": "job.run",
    "finetune": "trainer",
    "load_data": "trainer",
    "load_dataset": "data",
    "load_model": "job.saved",
    "predict": "job.using",
    "pretrain": "trainer",
    "train": "trainer",
    "train_variants": "trainer",
}

__getattr__, __dir__ = attach(__name__, _HOMES)
