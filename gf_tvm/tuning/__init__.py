"""Choosing schedules: search over the spaces of :mod:`gf_tvm.schedules`, measurement, and the tuning log.

Names are imported on first use: a board's processes measure without loading the search. Each module builds on those
before it:

============  =========================================================================================
traces        which of MetaSchedule's instructions a log may have
log           the files of measured trials
merge         puts logs of several farms together, and says what logs have
task          what is tuned: definition, space, arguments and reference of one workload
measuring     a package of its own: builds and measures candidates, here or on a farm of boards
cost_model    how fast a candidate of a space of ours is likely to be: xgboost's trees on its knobs
metaschedule  imports TVM's MetaSchedule
search        proposes candidates of a space of ours, ranked by the cost model, or MetaSchedule's
options       how much to search, where, and when to stop
loop          all of these, over and over: :func:`gf_tvm.tune`
============  =========================================================================================

``traces``, ``log`` and ``merge`` need neither TVM nor PyTorch. ``measuring`` imports nothing from here but ``task``
and ``log``.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .log import Record as Record
    from .log import find_best as find_best
    from .log import shipped_logs as shipped_logs
    from .loop import Event as Event
    from .loop import Summary as Summary
    from .loop import TaskSummary as TaskSummary
    from .loop import tune as tune
    from .task import TuningError as TuningError

_HOMES = {
    "Event": "loop",
    "Record": "log",
    "Summary": "loop",
    "TaskSummary": "loop",
    "TuningError": "task",
    "find_best": "log",
    "shipped_logs": "log",
    "tune": "loop",
}

__all__ = ["Event", "Record", "Summary", "TaskSummary", "TuningError", "find_best", "shipped_logs", "tune"]

__getattr__, __dir__ = attach(__name__, _HOMES)
