"""MetaSchedule, imported in one place and in a tolerable time."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .task import import_tool

#: The package of all intrinsics; every ``TuneContext`` imports it.
INTRINSICS = "tvm.s_tir.tensor_intrin"
#: The intrinsics that its rules for CPUs look up by name.
OF_CPU = {"x86_64": "x86", "aarch64": "arm_cpu"}


def metaschedule() -> Any:
    """The module ``tvm.s_tir.meta_schedule``. Raises TuningError if it or its cost model is not installed."""
    # MetaSchedule itself imports xgboost when it is too late to say anything.
    import_tool("xgboost")
    return import_tool("tvm.s_tir.meta_schedule")


def tune_context(module: Any, target: Any, **options: Any) -> Any:
    """A ``TuneContext``, made without importing the intrinsics of every device that TVM knows.

    The constructor imports them all. They are some 250 functions in TVM's script language, most of them for GPUs, and
    parsing one takes longer the more modules are loaded: with PyTorch half a minute together, in every process. Only
    those of this machine's CPU are imported here.
    """
    ms = metaschedule()
    if INTRINSICS in sys.modules:
        return ms.TuneContext(module, target=target, **options)
    folder = Path(import_module("tvm.s_tir").__file__ or "").parent / "tensor_intrin"
    stand_in = ModuleType(INTRINSICS)
    stand_in.__path__ = [str(folder)]
    sys.modules[INTRINSICS] = stand_in
    try:
        # A second import of what has registered itself would fail, so it stays when the stand-in goes.
        if options.get("space_generator") is not None and platform.machine() in OF_CPU:
            import_module(f"{INTRINSICS}.{OF_CPU[platform.machine()]}")
        return ms.TuneContext(module, target=target, **options)
    finally:
        del sys.modules[INTRINSICS]
