"""Training CNNs on the device: gradient filtering with kernels that TVM compiled.

Names are imported on first use, so that ``import gf_tvm`` is cheap and training on a board never loads a compiler.
"""

from typing import TYPE_CHECKING

from ._lazy import attach
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import errors as errors
    from . import functional as functional
    from . import nn as nn
    from .building import build as build
    from .bundle.library import Library as Library
    from .bundle.library import load as load
    from .chains import ChainReport as ChainReport
    from .chains import chains_of as chains_of
    from .chains import programs_of as programs_of
    from .comparison.run import compare as compare
    from .core.geometry import Geometry as Geometry
    from .core.workload import Workload as Workload
    from .evaluation import EvaluateConfig as EvaluateConfig
    from .evaluation import evaluate as evaluate
    from .nn import FilteredConv2d as FilteredConv2d
    from .nn import FilterReport as FilterReport
    from .nn import filter_model as filter_model
    from .nn import filter_report as filter_report
    from .nn import select_layers as select_layers
    from .nn import unfilter_model as unfilter_model
    from .ops.dispatch import FallbackWarning as FallbackWarning
    from .tuning import tune as tune

#: Where each name lives; "" marks a module of its own.
_HOMES = {
    "ChainReport": "chains",
    "EvaluateConfig": "evaluation",
    "FallbackWarning": "ops.dispatch",
    "FilterReport": "nn",
    "FilteredConv2d": "nn",
    "Geometry": "core.geometry",
    "Library": "bundle.library",
    "Workload": "core.workload",
    "build": "building",
    "chains_of": "chains",
    "programs_of": "chains",
    "compare": "comparison.run",
    "errors": "",
    "evaluate": "evaluation",
    "filter_model": "nn",
    "filter_report": "nn",
    "functional": "",
    "load": "bundle.library",
    "nn": "",
    "select_layers": "nn",
    "tune": "tuning",
    "unfilter_model": "nn",
}

__getattr__, __dir__ = attach(__name__, _HOMES)
