"""What gradient filtering would gain for a model and its data, and what it costs: ``gf-tvm evaluate``.

Names are imported on first use: the command line reads the defaults of :class:`EvaluateConfig` without loading PyTorch.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .config import EvaluateConfig as EvaluateConfig
    from .evaluator import evaluate as evaluate
    from .recommendation import recommend as recommend
    from .results import Evaluation as Evaluation
    from .results import EvaluationError as EvaluationError
    from .results import Layer as Layer
    from .results import Obstacles as Obstacles
    from .results import Progress as Progress
    from .results import Recommendation as Recommendation
    from .results import Setting as Setting

_HOMES = {
    "EvaluateConfig": "config",
    "Evaluation": "results",
    "EvaluationError": "results",
    "Layer": "results",
    "Obstacles": "results",
    "Progress": "results",
    "Recommendation": "results",
    "Setting": "results",
    "evaluate": "evaluator",
    "recommend": "recommendation",
}

__getattr__, __dir__ = attach(__name__, _HOMES)
