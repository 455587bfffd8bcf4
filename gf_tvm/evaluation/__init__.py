"""What gradient filtering would gain for a model and its data, and what it costs: ``gf-tvm evaluate``.

Names are imported on first use: the command line reads the defaults of :class:`EvaluateConfig` without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EvaluateConfig as EvaluateConfig
    from .evaluator import evaluate as evaluate
    from .recommendation import Recommendation as Recommendation
    from .recommendation import recommend as recommend
    from .results import Evaluation as Evaluation
    from .results import EvaluationError as EvaluationError
    from .results import Layer as Layer
    from .results import Progress as Progress
    from .results import Setting as Setting

_HOMES = {
    "EvaluateConfig": "config",
    "Evaluation": "results",
    "EvaluationError": "results",
    "Layer": "results",
    "Progress": "results",
    "Recommendation": "recommendation",
    "Setting": "results",
    "evaluate": "evaluator",
    "recommend": "recommendation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
