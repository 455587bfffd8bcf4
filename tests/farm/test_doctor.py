"""``gf-tvm farm doctor``: whatever a probe does becomes one line; and kernels that crash or hang, too."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import pytest

from gf_tvm.core.geometry import Geometry
from gf_tvm.core.workload import Workload
from gf_tvm.errors import FarmError
from gf_tvm.farm import doctor, doctor_ssh, tracker
from gf_tvm.farm.doctor import FAILED, OK, UNKNOWN, WARNING, Check, compare_versions, guarded, in_child, verify_library
from gf_tvm.machine.sensors import Sensors
from gf_tvm.runners.cli import main

FARM = Path(doctor.__file__).parent

# --- probes that go wrong ---------------------------------------------------------------------------------------------


def raises() -> Check:
    raise ZeroDivisionError("division\nby zero")


def refuses() -> Check:
    raise FarmError("no such board")


def gives_up_halfway() -> Iterator[Check]:
    yield Check("first", OK, "")
    raise OSError(5, "Input/output error")


def test_whatever_goes_wrong_in_a_probe_becomes_a_line() -> None:
    assert guarded("x", raises) == [Check("x", UNKNOWN, "cannot be told: ZeroDivisionError: division by zero")]
    assert guarded("x", refuses) == [Check("x", FAILED, "no such board")]
    first, second = guarded("x", gives_up_halfway)
    assert first.status == OK
    assert second.status == UNKNOWN
    assert "Input/output error" in second.detail


def test_a_hanging_probe_becomes_a_line() -> None:
    release = threading.Event()
    start = time.monotonic()
    (check,) = guarded("disk", lambda: release.wait(250) and [], seconds=0.2)  # type: ignore[arg-type, return-value]
    assert time.monotonic() - start < 100
    assert str(check) == "unknown disk cannot be told: no answer in 0.2 s"
    release.set()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("raise ImportError('libcudart.so.13: cannot open')", "ImportError: libcudart.so.13: cannot open"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("import time; time.sleep(1000)", "no answer in 1 s"),
        ("print('not JSON')", "nothing of use"),
        ("", "nothing of use"),
    ],
)
def test_a_child_that_goes_wrong_is_a_reason(code: str, reason: str) -> None:
    with pytest.raises(doctor.ProbeError, match=reason):
        in_child(code, seconds=1 if "sleep" in code else 250)


def test_a_childs_answer_is_its_last_line() -> None:
    assert in_child("print('noise of a library'); print('[1, 2]')", seconds=250) == [1, 2]


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (Check("python", OK, "3.11.2"), "ok      python 3.11.2"),
        (Check("governor", WARNING, "ondemand", "set performance"), "warning governor ondemand; set performance"),
        (Check("threads", FAILED, ""), "failed  threads"),
    ],
)
def test_a_check_is_one_line(check: Check, line: str) -> None:
    assert str(check) == line


# --- this machine -----------------------------------------------------------------------------------------------------


def test_this_machine_is_fit() -> None:
    checks = [*doctor.board_checks(), *doctor.host_checks()]
    names = {check.name for check in checks}
    assert {"python", "system", *doctor.PACKAGES, "tvm runtime", "cores", "memory", "disk", "clock"} <= names
    assert {"governor", "temperature", "throttling", "time", "user", "tuning", "compiler"} <= names
    assert not doctor.failed(checks), "\n".join(map(str, checks))


def put(root: Path, name: str, text: object) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def board(root: Path, governor: str, khz: int, millicelsius: int, flags: str) -> dict[str, Check]:
    """What is said about the sensors of a board."""
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    for name, value in (("scaling_governor", governor), ("scaling_cur_freq", khz), ("cpuinfo_max_freq", 1800000)):
        put(root, f"{policy}/{name}", value)
    put(root, "sys/class/thermal/thermal_zone0/type", "cpu-thermal")
    put(root, "sys/class/thermal/thermal_zone0/temp", millicelsius)
    put(root, "sys/devices/platform/soc/soc:firmware/get_throttled", flags)
    return {check.name: check for check in guarded("clock", lambda: doctor._sensors(Sensors(root)))}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (("performance", 1800000, 45000, "0"), (OK, OK, OK, OK)),
        (("ondemand", 600000, 45000, "0"), (WARNING, OK, OK, OK)),  # idle, as it should be
        (("performance", 600000, 45000, "0"), (OK, WARNING, OK, OK)),
        (("performance", 1800000, 72000, "0"), (OK, OK, WARNING, OK)),
        (("performance", 1000000, 84000, "e0008"), (OK, WARNING, WARNING, FAILED)),
        (("performance", 1800000, 45000, "50000"), (OK, OK, OK, WARNING)),
    ],
)
def test_sensors_of_a_board(tmp_path: Path, state: tuple[str, int, int, str], expected: tuple[str, ...]) -> None:
    found = board(tmp_path, *state)
    assert tuple(found[name].status for name in ("governor", "clock", "temperature", "throttling")) == expected


def test_throttling_says_what_to_do(tmp_path: Path) -> None:
    found = board(tmp_path, "performance", 600000, 50000, "50005")["throttling"]
    assert "undervoltage" in found.detail
    assert "power supply" in found.advice
    assert "fan" in board(tmp_path, "performance", 600000, 84000, "80008")["throttling"].advice


def test_a_machine_without_sensors_is_unknown_and_not_failed(tmp_path: Path) -> None:
    checks = guarded("clock", lambda: doctor._sensors(Sensors(tmp_path)))
    assert {check.status for check in checks} == {UNKNOWN}


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for free, status in ((3 << 30, OK), (1 << 30, WARNING), (1 << 20, FAILED)):
        usage = shutil._ntuple_diskusage(1 << 40, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        (check,) = guarded("disk", lambda: doctor._disk(tmp_path / "not" / "yet"))
        assert (check.status, str(tmp_path) in check.detail) == (status, True)


@pytest.mark.parametrize(
    ("libc", "machine", "status"),
    [
        (("glibc", "2.36"), "aarch64", OK),
        (("glibc", "2.28"), "aarch64", OK),
        (("glibc", "2.27"), "aarch64", WARNING),  # Ubuntu 18.04: PyTorch up to 2.5
        (("glibc", "2.26"), "aarch64", FAILED),
        (("", ""), "aarch64", FAILED),  # Alpine
        (("glibc", "2.36"), "armv7l", FAILED),
    ],
)
def test_operating_systems(monkeypatch: pytest.MonkeyPatch, libc: tuple[str, str], machine: str, status: str) -> None:
    monkeypatch.setattr(doctor, "libc", lambda: libc)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    (check,) = guarded("system", doctor._system)
    assert check.status == status


def test_what_is_not_installed_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package in ("torch", "xgboost", "psutil") else "1")
    monkeypatch.setattr(doctor, "TUNING_PACKAGES", ("psutil",))
    failed = [check for check in guarded("packages", doctor._packages) if check.status == FAILED]
    assert [check.detail for check in failed] == ["torch is not installed"]
    assert guarded("torch", doctor._torch) == []
    assert guarded("tvm", doctor._runtime) == []
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    # A board does not tune; a host on which somebody asks for a device or a tracker does.
    assert doctor._tuning(False).status == OK
    assert doctor._tuning(True).status == FAILED


def test_a_compiler_that_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "in_child", lambda code: [False, "install g++"])
    assert doctor._compiler("host", True) == Check("compiler", FAILED, "install g++")
    assert doctor._compiler("host", False).status == OK


def test_versions_on_both_sides() -> None:
    host = {"apache-tvm": "0.27.0", "apache-tvm-ffi": "0.1.14", "gf-tvm": "0.1.0"}
    same = list(compare_versions(host, host))
    assert [check.status for check in same] == [OK] * 3
    found = {
        check.name.partition(" ")[0]: check.status
        for check in compare_versions(host, {"apache-tvm": "0.26.0", "apache-tvm-ffi": "0.1.13"}, "pi")
    }
    assert found == {"apache-tvm": FAILED, "apache-tvm-ffi": WARNING, "gf-tvm": FAILED}
    (patch, *_) = compare_versions(host, {**host, "apache-tvm": "0.27.1"})
    assert patch.status == WARNING


def test_a_tracker_that_is_none_fails() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        (check,) = guarded("tracker", lambda: doctor._tracker(closed.getsockname(), None))
    assert check.status == FAILED
    assert "cannot be reached" in check.detail


def test_a_tracker_and_its_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    here = doctor.versions()
    boards = [
        tracker.Board("rpi4", "127.0.0.1:1", {"name": "good", "versions": here}),
        tracker.Board("rpi4", "127.0.0.1:2", {"name": "old", "versions": {**here, "apache-tvm": "0.26.0"}}),
        tracker.Board("rpi4", "127.0.0.1:3", {}),
        tracker.Board("nano", "127.0.0.1:4", {"name": "other", "versions": {}}),
    ]
    monkeypatch.setattr(tracker, "boards", lambda address: boards)
    found = {check.name: check.status for check in doctor._tracker(("127.0.0.1", 9190), "rpi4")}
    assert found["tracker"] == OK
    assert found["apache-tvm on good"] == OK
    assert found["apache-tvm on old"] == FAILED
    assert found["board 127.0.0.1:3"] == WARNING
    assert not [name for name in found if "other" in name]
    (_, check) = doctor._tracker(("127.0.0.1", 9190), "typo")
    assert check.status == FAILED
    assert "known keys: nano, rpi4" in check.detail


# --- Jetsons ----------------------------------------------------------------------------------------------------------


def nano(root: Path, **changes: str) -> dict[str, Check]:
    """What the doctor says of a Jetson Nano whose files are those given, by the names of the lines."""
    gpu = "sys/class/devfreq/57000000.gpu"
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64",
        "var/lib/nvpmodel/status": "pmode:0000 fmode:fanNull",
        **{f"{gpu}/{name}": "921600000" for name in ("cur_freq", "min_freq", "max_freq")},
        "usr/local/cuda-10.2/targets/aarch64-linux/lib/libnvrtc.so.10.2": "",
        "usr/local/cuda-10.2/targets/aarch64-linux/lib/libnvrtc-builtins.so.10.2": "",
        "proc/meminfo": "MemTotal:        4059328 kB\nSwapTotal:       6223964 kB\nSwapFree:        6223964 kB\n",
        **{name.replace("__", "/"): text for name, text in changes.items()},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {check.name: check for check in doctor._jetson(root)}


def test_a_jetson_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["found", "10.2", "NVIDIA Tegra X1", "sm_53"]
    monkeypatch.setattr(doctor, "in_child", lambda code, seconds: found)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    checks = nano(tmp_path)
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(checks, OK)
    assert [str(check) for check in checks.values()] == [
        "ok      L4T R32.7.1",
        "ok      nvpmodel mode 0 (MAXN)",
        "ok      GPU clock 922 MHz, fixed",
        "ok      CUDA driver CUDA 10.2, NVIDIA Tegra X1 (sm_53)",
        f"ok      CUDA compiler {tmp_path}/usr/local/cuda-10.2/targets/aarch64-linux/lib/libnvrtc.so.10.2",
        "ok      swap 5.9 GiB, 5.9 free",
    ]
    gpu = "sys__class__devfreq__57000000.gpu__min_freq"
    worse = {
        "etc__nv_tegra_release": "# R32 (release), REVISION: 2.1",
        "var__lib__nvpmodel__status": "pmode:0001",
        gpu: "76800000",
        "proc__meminfo": "MemTotal: 2029664 kB\nSwapTotal: 1014828 kB\nSwapFree: 10 kB\n",
    }
    checks = nano(tmp_path, **worse)
    assert [name for name, check in checks.items() if check.status == WARNING] == [
        "L4T",
        "nvpmodel",
        "GPU clock",
        "swap",
    ]
    for name, advice in (("nvpmodel", "nvpmodel -m 0"), ("GPU clock", "jetson_clocks"), ("swap", "swap file of 4 GiB")):
        assert advice in checks[name].advice
    for answer, part in (
        (["no driver", "libcuda.so.1: cannot open shared object file"], "libcuda.so.1: cannot open"),
        (["found", "10.0", "NVIDIA Tegra X1", "sm_53"], "CUDA 10.0"),
    ):
        found[:] = answer
        check = nano(tmp_path)["CUDA driver"]
        assert (check.status, part in check.detail) == (FAILED, True)


def test_a_jetson_of_which_nothing_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert list(doctor._jetson(tmp_path)) == []  # not a Jetson at all
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("NVIDIA Jetson Nano Developer Kit\0")
    status = {check.name: check.status for check in doctor._jetson(tmp_path)}
    driver = status.pop("CUDA driver")  # of this machine
    assert driver in (OK, FAILED)
    assert status == {**dict.fromkeys(("L4T", "nvpmodel", "GPU clock", "swap"), UNKNOWN), "CUDA compiler": WARNING}


def test_the_compiler_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    there = emulated_cuda.variables()
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    for device, status, part in (
        ("jetson-nano", OK, "(for jetson-nano)"),
        ("sm_55", FAILED, "makes no code for sm_55"),
    ):
        check = doctor._compiler(device, True)
        assert (check.status, part in check.detail) == (status, True), check


# --- sent to a board --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["doctor.py", "../machine/sensors.py", "jetson.py", "_remote.py", "../errors.py", "__init__.py"]
)
def test_what_is_sent_to_boards_is_python_3_7(name: str) -> None:
    ast.parse((FARM / name).read_text(), feature_version=(3, 7))


def test_the_doctor_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    script = doctor_ssh._doctor_script(doctor_ssh._LOOK.format(folder=str(tmp_path)))
    # Neither site-packages nor this checkout.
    done = subprocess.run([sys.executable, "-I", "-S", "-"], input=script, capture_output=True, check=True, cwd="/")
    lines = done.stdout.decode().splitlines()
    assert all(line.startswith(doctor_ssh._MESSAGE) for line in lines)
    *checks, report = (json.loads(line[len(doctor_ssh._MESSAGE) :]) for line in lines)
    status = {check["name"]: check["status"] for check in checks}
    assert (status["python"], status["system"], status["packages"]) == (OK, OK, FAILED)
    assert report["kind"] == "report"
    assert report["versions"]["torch"] is None


def test_clocks() -> None:
    assert doctor_ssh._clock(1000.0, 999.0, 1001.0).status == OK
    for there in (100.0, 5000.0):
        check = doctor_ssh._clock(there, 999.0, 1001.0)
        assert check.status == WARNING
        assert "timedatectl" in check.advice


# --- kernels of a bundle ----------------------------------------------------------------------------------------------

SOURCE = """
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#define KERNEL(name, body) \\
    int __tvm_ffi_##name(void *self, const void *args, int32_t count, void *result) { body; return 0; }
extern "C" {
KERNEL(idle, )
KERNEL(crash, abort())
KERNEL(hang, for (;;) pause())
KERNEL(leave, _exit(0))
}
"""


def bundle(folder: Path, *symbols: str) -> Path:
    """A bundle of kernels that go wrong."""
    (folder / "kernels.cpp").write_text(SOURCE)
    compiler = shutil.which("g++") or "c++"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "kernels.so", "kernels.cpp"], cwd=folder, check=True)
    library = (folder / "kernels.so").read_bytes()
    kernels = []
    for index, symbol in enumerate(symbols):
        geometry = Geometry(n=1, ci=index + 1, co=1, h=4, w=4, kernel=3, padding=1, patch=2)  # type: ignore[arg-type]
        workload = Workload("expand", geometry)
        kernels.append({"workload": workload.to_dict(), "schedule": "default", "symbol": symbol})
    manifest = {
        "schema": 1,
        "device": "host",
        "arch": platform.machine(),
        "cpu_flags": [],
        "versions": {"tvm": importlib.metadata.version("apache-tvm")},
        "sha256": {"kernels.so": hashlib.sha256(library).hexdigest()},
        "kernels": kernels,
    }
    path = folder / "bad.gfb"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        archive.writestr("kernels.so", library)
    return path


@pytest.mark.slow
def test_kernels_that_crash_or_hang_are_lines_and_the_others_still_run(tmp_path: Path) -> None:
    path = bundle(tmp_path, "idle", "crash", "hang", "leave", "idle")
    progress: list[tuple[int, int]] = []
    *kernels, summary = verify_library(path, lambda *step: progress.append(step), seed=7, seconds=15)
    assert [check.status for check in kernels] == [FAILED] * 5
    for check, reason in zip(
        kernels, ("unwritten", "SIGABRT", "did not return in 15 s", "exit code 0", "unwritten"), strict=True
    ):
        assert reason in check.detail
        assert "seed 7" in check.detail
        assert "expand" in check.name
    assert (summary.status, summary.detail) == (FAILED, "0 of 5 kernels equal the float64 reference")
    assert progress == [(done, 5) for done in range(1, 6)]


def test_right_kernels_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps({"patches": [2], "cases": [{"n": 1, "ci": 4, "co": 4, "h": 6, "w": 6, "kernel": 3}]}))
    library = tmp_path / "host.gfb"
    assert main(["build", "--shapes", str(shapes), "--out", str(library)]) == 0
    (check,) = verify_library(library)
    assert check.status == OK
    assert check.detail.endswith("kernels equal the float64 reference")
    # Twice with other inputs.
    (check,) = verify_library(library, seed=1)
    assert check.status == OK


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_bundle_that_does_not_load_is_one_line(tmp_path: Path, damage: str) -> None:
    path = bundle(tmp_path, "idle")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    (check,) = verify_library(path)
    assert check.status == FAILED


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """The doctor without its probes; the checks that it finds."""
    checks = [Check("python", OK, "3.11.2")]
    monkeypatch.setattr(doctor, "board_checks", lambda: iter(checks))
    monkeypatch.setattr(doctor, "host_checks", lambda *_, **__: iter(()))
    monkeypatch.delenv("TVM_TRACKER_HOST", raising=False)
    monkeypatch.delenv("TVM_TRACKER_KEY", raising=False)
    return checks


def test_exit_code_says_whether_something_failed(quick: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    quick += [Check("governor", WARNING, "ondemand"), Check("clock", UNKNOWN, "")]
    assert main(["farm", "doctor"]) == 0
    quick.append(Check("torch", FAILED, "died of SIGILL"))
    assert main(["farm", "doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed  torch died of SIGILL"


def test_json(quick: list[Check], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["farm", "doctor", "--json", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out == "ok      python 3.11.2\n"
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["checks"] == [{"name": "python", "status": OK, "detail": "3.11.2", "advice": ""}]
    assert written["versions"]["gf-tvm"]
    assert main(["farm", "doctor", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"] == written["checks"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--device", "pi"], "pi"),
        (["--library", "/nowhere.gfb"], "/nowhere.gfb"),
        (["--tracker", "nowhere"], "--tracker"),
        (["--json", "/nowhere/a.json"], "/nowhere"),
        (["pi@a", "--device", "host"], "--device"),
        (["pi@a", "--ssh-option", "--verbose"], "--ssh-option"),
        (["pi@a", "--folder", "~other/x"], "--folder"),
        (["--", "-oProxyCommand=touch x"], "USER@HOST"),
    ],
)
def test_mistakes_are_one_line(
    quick: list[Check], capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    code = main(["farm", "doctor", *words])
    out, err = capsys.readouterr()
    assert part in out + err
    assert len((out + err).splitlines()) == 1
    assert code == (1 if "--folder" in words else 2)


def test_a_tracker_of_the_environment_is_no_reason_to_refuse_a_board(
    quick: list[Check], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TVM_TRACKER_HOST", "127.0.0.1")
    monkeypatch.setattr(doctor_ssh, "remote_checks", lambda *_: iter(quick))
    assert main(["farm", "doctor", "pi@a"]) == 0
    assert capsys.readouterr().out == "ok      python 3.11.2\n"
