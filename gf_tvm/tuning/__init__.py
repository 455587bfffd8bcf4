"""Choosing schedules: search over the spaces of :mod:`gf_tvm.schedules`, measurement, and the tuning log.

Each module builds on those before it:

========  =============================================================================================
log       the files of measured trials; needs neither TVM nor PyTorch
merge     puts logs of several farms together, and says what logs have; needs neither of the two as well
task      what is tuned: definition, space, arguments and reference of one workload
metaschedule  imports TVM's MetaSchedule
worker    what the processes that build and run candidates do
process   starts such processes, asks them with a deadline, ends them
runner    runs candidates in one and turns what becomes of them into results; here or on a board
measure   builds on this machine, and measures here too
session   what a board does for the tuner
link      the host's process for one board
remote    builds on this machine and measures on a farm of boards
ms_runner  MetaSchedule's own tools on a farm
search    proposes candidates, ranked by MetaSchedule's XGBoost cost model
loop      all of these, over and over: :func:`gf_tvm.tune`
========  =============================================================================================
"""

from .log import Record, find_best, shipped_logs
from .loop import Event, Summary, TaskSummary, tune
from .task import TuningError

__all__ = ["Event", "Record", "Summary", "TaskSummary", "TuningError", "find_best", "shipped_logs", "tune"]
