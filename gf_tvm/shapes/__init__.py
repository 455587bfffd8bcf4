"""Which convolutions to tune, compile and compare: the paper's cases, a shapes file, or the layers of a model.

Names are imported on first use: only the layers of a model need PyTorch.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .cases import Case as Case
    from .cases import as_patches as as_patches
    from .cases import format_patch as format_patch
    from .cases import load_cases as load_cases
    from .cases import paper_cases as paper_cases
    from .cases import parse_dtypes as parse_dtypes
    from .cases import parse_input as parse_input
    from .cases import parse_patches as parse_patches
    from .cases import pick_cases as pick_cases
    from .cases import with_dtypes as with_dtypes
    from .cases import workloads_of as workloads_of
    from .model import does_not_run as does_not_run
    from .model import last_to_run as last_to_run
    from .model import layer_geometry as layer_geometry
    from .model import model_cases as model_cases

_HOMES = {
    "Case": "cases",
    "as_patches": "cases",
    "does_not_run": "model",
    "format_patch": "cases",
    "last_to_run": "model",
    "layer_geometry": "model",
    "load_cases": "cases",
    "model_cases": "model",
    "paper_cases": "cases",
    "parse_dtypes": "cases",
    "parse_input": "cases",
    "parse_patches": "cases",
    "pick_cases": "cases",
    "with_dtypes": "cases",
    "workloads_of": "cases",
}

__getattr__, __dir__ = attach(__name__, _HOMES)
