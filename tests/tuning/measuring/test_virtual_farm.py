"""The whole way on Cortex-A72 code: virtual Pis are tuned on, through trouble, and then train with the bundle.

Times under emulation mean nothing, and no test here looks at one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkout import HELPERS
from farm_helpers import (
    BABBLE,
    CONT,
    STOP,
    TrackerProcess,
    TreacherousTask,
    babble,
    later,
    small_workload,
    suggesting,
)
from hypothesis import HealthCheck, Phase, given, settings
from strategies import geometries, kinds
from test_farm_faults import QUICK, at_note, at_trial, check_trials, each, met, notes
from tiny_network import tiny
from virtual_pi import run_in

from gf_tvm.building import build
from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.farm.virtual import VirtualPi
from gf_tvm.shapes import model_cases, workloads_of
from gf_tvm.tuning import loop
from gf_tvm.tuning.log import log_path, read_log
from gf_tvm.tuning.loop import Event, tune_tasks
from gf_tvm.tuning.measuring import board
from gf_tvm.tuning.measuring.farm_measurer import FarmMeasurer
from gf_tvm.tuning.measuring.options import FarmOptions
from gf_tvm.tuning.measuring.reference import reference_task
from gf_tvm.tuning.options import SearchOptions

pytestmark = pytest.mark.early

TUNED = small_workload()
GEOMETRIES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("virtual")


@pytest.fixture(scope="module")
def pis(virtual_root: Path, folder: Path) -> Iterator[tuple[TrackerProcess, list[VirtualPi]]]:
    with TrackerProcess() as tracker:
        found = [VirtualPi(virtual_root, f"pi-{i}", tracker.address, "rpi4", folder / "pis") for i in (1, 2, 3)]
        try:
            for pi in found:
                pi.start()
            tracker.wait_for(3)
            yield tracker, found
        finally:
            for pi in found:
                pi.kill()


@pytest.fixture(scope="module")
def logs(pis: tuple[TrackerProcess, list[VirtualPi]], folder: Path) -> Path:
    """Tune on three virtual Pis, while everything that can go wrong does."""
    tracker, (first, second, third) = pis
    task = TreacherousTask(TUNED, "rpi4")
    events: list[Event] = []
    farm = FarmOptions(tracker.address, "rpi4")
    measurer = FarmMeasurer(QUICK, farm, "virtual Pi", reference_task("rpi4"))

    def strangers_and_losses() -> None:
        for data in BABBLE:
            for address in (tracker.address, ("127.0.0.1", port_of(third))):
                babble(address, data, 0.1)
        first.kill()
        later(2.0, first.start)
        second.signal(STOP)

    def power_cut() -> None:
        """Everything is gone at once, and the tracker comes back last, after 90 seconds."""
        tracker.kill()
        for pi in (first, second, third):
            pi.kill()
            pi.start()
        later(90.0, tracker.start)

    progress = each(
        events.append,
        at_trial(6, strangers_and_losses, met(measurer, "pi-1", "pi-2")),
        at_note("pi-2: board lost", lambda: second.signal(CONT)),
        at_trial(20, power_cut),
    )
    patient = pytest.MonkeyPatch()
    patient.setattr(board, "_SILENT_SECONDS", 20.0)
    patient.setattr(loop, "ConfigSearch", suggesting(task.examples))
    begun = time.monotonic()
    try:
        summary = tune_tasks(
            [task], SearchOptions(trials=30), logs=folder, options=QUICK, measurer=measurer, progress=progress
        )
    finally:
        patient.undo()
    assert time.monotonic() - begun > 90
    log = read_log(log_path(folder, "rpi4", TUNED.key), task.identity)
    check_trials(task, log.records, 30)
    assert log.made["emulated"] is True
    assert summary.tasks[0].confirmed
    assert summary.farm is not None
    troubles = {name: Counter(board["troubles"]) for name, board in summary.farm["boards"].items()}
    assert troubles[""]["no board"] >= 1
    assert sum(count["board lost"] for count in troubles.values()) >= 3, notes(events)
    told = notes(events)
    for line in ("pi-1: board lost", "pi-2: board lost", "cannot be reached", "the tracker is back"):
        assert line in told, told
    assert len(tracker.boards()) == 3
    return folder


def port_of(pi: VirtualPi) -> int:
    return int(pi.wait_for("serving ").rpartition(":")[2])


@pytest.fixture(scope="module")
def bundle(logs: Path, folder: Path) -> Path:
    """The tuned workload, those of a tiny network, and as many random geometries as the brief asks for."""
    found: dict[str, Geometry] = {}

    @settings(
        max_examples=4 * GEOMETRIES, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    @given(geometry=geometries(smallest_n=1, largest_out=6))
    def collect(geometry: Geometry) -> None:
        if len(found) < GEOMETRIES:
            found[geometry.key] = geometry

    collect()
    assert len(found) == GEOMETRIES
    assert len(set().union(*map(kinds, found.values()))) > 15
    cases = model_cases(tiny(10, 1), (8, 1, 8, 8), last=2, patches=[2])
    out = folder / "rpi4.gfb"
    random = [Workload("backward", geometry) for geometry in found.values()]
    report = build([TUNED, *workloads_of(cases), *random], "rpi4", [logs], out)
    assert [kernel.schedule for kernel in report.kernels].count("tuned") == 1
    assert "emulation" in next(kernel for kernel in report.kernels if kernel.workload == TUNED).note
    return out


CHECK_AND_TRAIN = """
import json, os, sys
import gf_tvm
from gf_tvm.runners.cli import main
from gf_tvm.core.verify import excess, expected, poisoned_outputs, random_inputs
path = sys.argv[1]
library = gf_tvm.load(path)
for workload in library.workloads:
    kernel = library.find(workload.kernel, workload.geometry, workload.dtype)
    seed = int.from_bytes(os.urandom(4), "little")
    inputs, outputs = random_inputs(workload, seed), poisoned_outputs(workload)
    kernel(*inputs, *outputs)
    print("checked", json.dumps([workload.key, seed, excess(outputs, expected(workload, inputs))]))
common = ["train", "--protocol", "paper", "--model", "tiny_network:tiny", "--data", "data.npz"]
common += ["--image-size", "8", "--patch", "2"]
common += ["--last", "2", "--batch", "8", "--epochs", "3", "--pretrain-epochs", "1", "--threads", "1"]
assert main([*common, "--json", "reference.json"]) == 0
assert main([*common, "--library", path, "--json", "library.json"]) == 0
assert not {"tvm", "xgboost", "psutil"} & set(sys.modules)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_tuning_to_training(
    pis: tuple[TrackerProcess, list[VirtualPi]], bundle: Path, virtual_root: Path, folder: Path
) -> None:
    """On a virtual Pi: every kernel of the bundle equals the float64 reference; training with it follows plain
    PyTorch's; and neither needs the compiler.
    """
    for pi in pis[1]:
        pi.kill()  # they have done their part, and there are two cores
    generator = np.random.default_rng()
    y = np.tile(np.arange(4), 24)
    x = generator.random((96, 8, 8), dtype=np.float32) * 0.3
    x += np.stack([np.roll(np.eye(8, dtype=np.float32), 2 * label, axis=1) for label in y])
    np.savez(folder / "data.npz", x=(255 * x.clip(0, 1)).astype(np.uint8), y=y)
    printed = run_in(
        virtual_root, "-c", CHECK_AND_TRAIN, bundle, cwd=folder, seconds=600, PYTHONPATH=HELPERS, OMP_NUM_THREADS="1"
    )
    checked = [json.loads(line.partition(" ")[2]) for line in printed.splitlines() if line.startswith("checked ")]
    assert len(checked) >= GEOMETRIES + 3
    assert not [check for check in checked if not check[2] <= 1]
    losses = {}
    for name in ("reference", "library"):
        (run,) = json.loads((folder / f"{name}.json").read_text())["runs"]
        losses[name] = [row["train_loss"] for row in run["rows"]]
    assert len(losses["library"]) == 3
    assert losses["library"] == pytest.approx(losses["reference"], rel=1e-3)
    assert losses["library"][-1] < losses["library"][0]
