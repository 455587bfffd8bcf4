"""Fine-tuning as a person's job: a network with its weights, a folder of photographs, and a model to take away.

* ``config``: what is asked
* ``dataset``: pictures to train on and to look at meanwhile
* ``network``: the network with its weights and a classifier for these classes
* ``memory``: whether a step fits
* ``run``: the job
* ``saved``: the folder that it leaves, and loading that; ``drawing``: its pictures
* ``using``: predictions, and the model as ONNX

Names are imported on first use: the command line reads the defaults of :class:`JobConfig` without loading PyTorch.
"""

from typing import TYPE_CHECKING

from ..._lazy import attach

if TYPE_CHECKING:
    from .config import JobConfig as JobConfig
    from .run import JobResult as JobResult
    from .run import fine_tune_model as fine_tune_model
    from .saved import SavedModel as SavedModel
    from .saved import load_model as load_model
    from .using import Prediction as Prediction
    from .using import export_onnx as export_onnx
    from .using import predict as predict

_HOMES = {
    "JobConfig": "config",
    "JobResult": "run",
    "Prediction": "using",
    "SavedModel": "saved",
    "export_onnx": "using",
    "fine_tune_model": "run",
    "load_model": "saved",
    "predict": "using",
}

__getattr__, __dir__ = attach(__name__, _HOMES)
