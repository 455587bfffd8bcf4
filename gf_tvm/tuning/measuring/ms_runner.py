"""MetaSchedule on a farm of ours: a runner, and a builder whose libraries a board can load.

::

    farm = FarmOptions(("127.0.0.1", 9190), "rpi4")
    with contextlib.closing(FarmRunner(farm, MeasureOptions(threads=4))) as runner:
        ms.tune_tir(module, target, folder, 256, builder=farm_builder("rpi4"), runner=runner)

What a candidate computes is not compared with anything, since MetaSchedule tells its runners no more than the types of
the arguments; ``gf-tvm tune`` compares every candidate with a reference.
"""

from __future__ import annotations

import functools
import itertools
import queue
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.builder import LocalBuilder
from tvm.s_tir.meta_schedule.runner import EvaluatorConfig, PyRunner, PyRunnerFuture, RunnerResult

from ...errors import FarmError, GfTvmError
from ...farm.tracker import check_key
from ..task import ArgumentsTask, Candidate, Task
from .farm_measurer import FarmMeasurer
from .options import FarmOptions, MeasureOptions
from .result import Result

#: Types of arguments that can be filled and passed.
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64")

_CPUS = ("llvm", "cpu", "c")
_CLOSE_SECONDS = 10.0


class _Pump:
    """The thread that measures. It is the parent of the processes that hold the boards' sessions, which end with it."""

    def __init__(self, farm: FarmOptions, options: MeasureOptions, say: Callable[[str], None]) -> None:
        check_key(farm.tracker, farm.key)
        self._measurer = FarmMeasurer(options, farm, "")
        self._say = say
        self._inbox: queue.SimpleQueue[tuple[Task, Candidate, Path]] = queue.SimpleQueue()
        self._woken, self._wake = Pipe(duplex=False)
        self._futures: dict[str, Future[Result | None]] = {}
        self._lock = threading.RLock()  # the garbage collector may call close() in the thread itself
        self._numbers = itertools.count(1)
        self._over = threading.Event()
        self._reason: GfTvmError | None = None
        self._thread = threading.Thread(target=self._run, name="farm runner", daemon=True)
        self._thread.start()

    def submit(self, task: Task, library: Path) -> Future[Result | None]:
        """Measure a library; the future has None if it was lost with several boards. Raises what ended the thread."""
        candidate = Candidate("metaschedule", str(next(self._numbers)))
        future: Future[Result | None] = Future()
        with self._lock:
            if self._reason is not None:
                raise self._reason
            if not library.is_file():  # no board's fault
                future.set_result(Result("build", message=f"{library.name} is not there"))
                return future
            self._futures[candidate.id] = future
            self._inbox.put((task, candidate, library))
            self._wake.send_bytes(b"+")
        return future

    def close(self) -> None:
        """End the thread and its sessions; harmless when repeated."""
        self._over.set()
        with self._lock:
            if self._reason is None:
                self._wake.send_bytes(b".")
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def _come_in(self) -> Sequence[tuple[Task, Candidate, Path]]:
        found = []
        while self._woken.poll(0):
            self._woken.recv_bytes()
        while True:
            try:
                found.append(self._inbox.get_nowait())
            except queue.Empty:
                return found

    def _run(self) -> None:
        reason = GfTvmError("the farm's runner is closed")
        try:
            with self._measurer as measurer:
                for candidate, result in measurer.measure_built(
                    self._come_in, self._woken, self._over.is_set, lambda _, line: self._say(line)
                ):
                    self._futures.pop(candidate.id).set_result(result)
        except GfTvmError as error:
            reason = error
        except Exception as error:  # nobody else would hear of it
            reason = FarmError(f"the farm's runner ended: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._reason = reason
                self._wake.close()
                self._woken.close()
            for future in self._futures.values():
                future.set_exception(reason)
            self._futures.clear()


@derived_object
class FarmFuture(PyRunnerFuture):  # type: ignore[misc]
    """What becomes of one candidate."""

    def __init__(self, future: Future[Result | None]) -> None:
        super().__init__()
        self._future = future

    def done(self) -> bool:
        """Whether :meth:`result` returns at once."""
        return self._future.done()

    def result(self) -> RunnerResult:
        """Wait for the result: seconds, or ``<type>: <message>``.

        The types are those of :data:`gf_tvm.tuning.log.STATUSES`, and "board lost".

        Raises:
            FarmError, TuningError: the farm cannot go on, for reasons of its own. TVM makes RuntimeErrors of them.
        """
        result = self._future.result()
        if result is None:
            return RunnerResult(None, "board lost: several boards were lost with this candidate")
        if result.status != "ok":
            return RunnerResult(None, f"{result.status}: {result.message}")
        return RunnerResult(list(result.runs), None)


@derived_object
class FarmRunner(PyRunner):  # type: ignore[misc]
    """A runner of MetaSchedule's that measures on all free boards at once, with a deadline on every step.

    It returns futures at once and measures in the background. What goes wrong with a board and not with the candidate
    is repeated on another one.

    Args:
        farm: where the boards are.
        options: how to measure: ``threads``, ``run_timeout`` and ``max_seconds``; the rest if no ``evaluator_config``.
        evaluator_config: as for TVM's own runners.
        say: called with a line of text about what happens to boards.

    Raises:
        FarmError: no tracker, or no board with the key.
    """

    def __init__(
        self,
        farm: FarmOptions,
        options: MeasureOptions | None = None,
        evaluator_config: EvaluatorConfig | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__()
        options = options or MeasureOptions()
        if evaluator_config is not None:
            seconds = evaluator_config.min_repeat_ms / 1000
            options = replace(
                options,
                repeats=evaluator_config.repeat,
                min_seconds=seconds,
                max_seconds=max(options.max_seconds, 4 * seconds * evaluator_config.repeat),
                least_calls=evaluator_config.number,
                cold=evaluator_config.enable_cpu_cache_flush,
            )
        self._pump = _Pump(farm, options, say)
        # Not a method of its own: the thread and what it has started end with this object and with the interpreter.
        self._close = weakref.finalize(self, self._pump.close)

    def run(self, runner_inputs: Sequence[Any]) -> list[Any]:
        """Start to measure built candidates.

        Raises:
            FarmError: libraries, devices or arguments that boards cannot take; or as :meth:`FarmFuture.result`.
            TuningError: as :meth:`FarmFuture.result`.
        """
        return [FarmFuture(self._pump.submit(_task_of(one), Path(str(one.artifact_path)))) for one in runner_inputs]

    def close(self) -> None:
        """End the sessions on the boards; harmless when repeated."""
        self._close()


def _task_of(runner_input: Any) -> ArgumentsTask:
    """What is to be run. Raises FarmError for what would fail with every candidate."""
    name = Path(str(runner_input.artifact_path)).name
    if not name.endswith(".so"):
        raise FarmError(
            f"boards load shared libraries, not {name}; build with gf_tvm.tuning.measuring.ms_runner.farm_builder"
        )
    if str(runner_input.device_type) not in _CPUS:
        raise FarmError(f"boards run on their CPUs, not on devices of the type {runner_input.device_type!s}")
    arguments = []
    for kind, *description in (info.as_json() for info in runner_input.args_info):
        if kind != "TENSOR" or str(description[0]) not in DTYPES:
            raise FarmError(f"cannot make an argument of the type {description[0] if description else kind}")
        arguments.append((str(description[0]), tuple(int(extent) for extent in description[1])))
    return ArgumentsTask(tuple(arguments))


def farm_builder(device: str, **options: Any) -> Any:
    """MetaSchedule's LocalBuilder, which compiles and links for ``device`` on this machine.

    Args:
        device: name of a device profile.
        options: of the LocalBuilder.

    Raises:
        DeviceError: no such profile.
        BuildError: nothing to link with.
    """
    from ...codegen.linker import find_linker
    from ...machine.profiles import get_profile

    find_linker(get_profile(device))
    functions = {"f_build": functools.partial(_build, device=device)}
    functions["f_export"] = functools.partial(_export, device=device)
    return LocalBuilder(**{**functions, **options})


def _build(module: Any, target: Any, parameters: Any, device: str) -> Any:
    """Compile as ``gf-tvm tune`` does. MetaSchedule's own function first imports all intrinsics, for minutes."""
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    from ...codegen.compile import compile_module
    from ...machine.profiles import get_profile

    return compile_module(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), get_profile(device))


def _export(module: Any, device: str) -> str:
    """Link a module into a folder of its own, which MetaSchedule removes after measuring."""
    from ...codegen.compile import export
    from ...machine.profiles import get_profile

    path = Path(tempfile.mkdtemp(prefix="gf_tvm-")) / "candidate.so"
    export([module], path, get_profile(device))
    return str(path)
