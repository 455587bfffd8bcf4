"""The filtered backward pass measured against the exact one: single convolutions and chains, on CPUs and GPUs."""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .run import Comparison as Comparison
    from .run import check_request as check_request
    from .run import compare as compare

_HOMES = {"Comparison": "run", "check_request": "run", "compare": "run"}

__getattr__, __dir__ = attach(__name__, _HOMES)
