"""Virtual Pis: their root, running Python in it, and boards that do not outlive whoever started them."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkout import HELPERS, ROOT
from torch import nn
from virtual_pi import run_in, running, wait_until_gone

import gf_tvm
from gf_tvm.errors import FarmError
from gf_tvm.farm import virtual
from gf_tvm.farm.virtual import EXTRAS, VirtualPi, environment, prepare_root, python_command
from gf_tvm.runners.cli import main
from gf_tvm.shapes import model_cases, workloads_of

pytestmark = pytest.mark.early


# --------------------------------------------------------------------------------------- the root, with its parts faked


class Fake:
    """Stands for what takes long: counts it, and can fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[list[str]] = []
        self.at_work = 0
        self.fails = False
        for name in ("_compile", "_try"):
            monkeypatch.setattr(virtual, name, lambda root: None)
        monkeypatch.setattr(virtual, "_unpack_debian", self.debian)
        monkeypatch.setattr(virtual, "_unpack_wheels", self.wheels)
        monkeypatch.setattr(virtual, "missing_packages", list)
        monkeypatch.setattr(virtual, "_find_qemu", lambda: "/usr/bin/true")

    def debian(self, stage: Path, root: Path) -> None:
        for name in ("etc", "usr/bin"):
            (root / name).mkdir(parents=True)

    def wheels(self, stage: Path, root: Path, wheels: list[str]) -> None:
        self.at_work += 1
        assert self.at_work == 1
        (root / virtual._SITE).mkdir(parents=True)
        time.sleep(0.1)
        self.at_work -= 1
        if self.fails:
            raise FarmError("no such wheel")
        self.made.append(wheels)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def roots(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != "lock")


def code_of(root: Path) -> Path:
    """Where the root's Python finds gf_tvm."""
    site = root / virtual._SITE
    return Path(os.path.normpath(site / (site / "gf_tvm.pth").read_text().strip()))


def test_a_root_is_made_once(fake: Fake, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    root = prepare_root(tmp_path, progress=lambda *step: steps.append(step))
    assert [number for number, _, _ in steps] == [0, 1, 2, 3, 4]
    assert {count for _, count, _ in steps} == {4}
    assert prepare_root(tmp_path, progress=lambda *step: pytest.fail("made again")) == root
    assert len(fake.made) == 1
    assert roots(tmp_path) == [root]


def test_a_root_of_other_versions_is_replaced(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = prepare_root(tmp_path)
    monkeypatch.setattr(virtual, "_WHEELS", (*virtual._WHEELS[1:], "apache-tvm==0.28.0"))
    new = prepare_root(tmp_path)
    assert new != old
    assert "apache-tvm==0.28.0" in fake.made[-1]
    assert roots(tmp_path) == [new]


def test_a_root_in_use_stays_for_a_while(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = prepare_root(tmp_path)
    monkeypatch.setattr(virtual, "_FORMAT", 1000)
    with subprocess.Popen(["/bin/sh", "-c", "read line", old / "usr/bin/python3"], stdin=subprocess.PIPE):
        new = prepare_root(tmp_path)
        assert roots(tmp_path) == sorted([old, new])
    monkeypatch.setattr(virtual, "_FORMAT", 1001)
    newest = prepare_root(tmp_path)
    assert roots(tmp_path) == [newest]


def test_a_damaged_stamp_means_a_new_root(fake: Fake, tmp_path: Path) -> None:
    root = prepare_root(tmp_path)
    (root / virtual._STAMP).write_text('{"wheels"')
    assert prepare_root(tmp_path) == root
    assert len(fake.made) == 2


def test_a_failure_leaves_the_old_root_and_nothing_else(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = prepare_root(tmp_path)
    monkeypatch.setattr(virtual, "_FORMAT", 1000)
    fake.fails = True
    with pytest.raises(FarmError, match="no such wheel"):
        prepare_root(tmp_path)
    assert roots(tmp_path) == [old]


def test_what_a_killed_process_left_is_removed(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / ".making/root/usr").mkdir(parents=True)
    assert roots(tmp_path) == [tmp_path / ".making"]
    root = prepare_root(tmp_path)
    assert roots(tmp_path) == [root]


def test_extras_are_added_and_kept(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_root(tmp_path, ["train"])
    assert set(EXTRAS["train"]) <= set(fake.made[-1])
    # Who needs less is content with more, and who needs something else takes nothing away.
    prepare_root(tmp_path)
    assert len(fake.made) == 1
    root = prepare_root(tmp_path, ["rpc"])
    assert {*EXTRAS["train"], *EXTRAS["rpc"]} <= set(fake.made[-1])
    assert roots(tmp_path) == [root]
    with pytest.raises(FarmError, match="no extra 'cuda'"):
        prepare_root(tmp_path, ["cuda"])


def test_two_at_once_make_one_root(fake: Fake, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(prepare_root(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(fake.made) == 1


def test_the_present_code_is_unpacked(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = prepare_root(tmp_path)
    first = code_of(root)
    assert (first / "gf_tvm/runners/cli.py").read_bytes() == (ROOT / "runners/cli.py").read_bytes()
    assert list(first.glob("gf_tvm-*.dist-info"))
    real = virtual.build_wheel

    def changed(folder: Path) -> Path:
        wheel = real(folder)
        with open(wheel, "ab") as file:  # what follows the end of a zip file is taken for its comment
            file.write(b"\0")
        return wheel

    monkeypatch.setattr(virtual, "build_wheel", changed)
    assert prepare_root(tmp_path) == root
    assert code_of(root) != first
    assert first.is_dir(), "a board that is running needs the code it was started with"
    assert (code_of(root) / "gf_tvm/__init__.py").is_file()


def test_missing_packages_give_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["farm", "virtual", "--prepare", "--root", str(tmp_path / "root")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "apt-get install qemu-user-static mmdebstrap" in error
    assert not (tmp_path / "root").exists()


def test_a_step_that_fails_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "_find_qemu", lambda: "/usr/bin/true")
    tool = tmp_path / "bin/mmdebstrap"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'I: running apt-get update'\necho 'E: no network'\necho 'I: cleaning'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with pytest.raises(FarmError, match="unpacking Debian's packages for arm64 failed: E: no network"):
        prepare_root(tmp_path / "roots")
    assert roots(tmp_path / "roots") == []


def test_versions_are_those_that_are_tested() -> None:
    constraints = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if found := re.match(r"([\w.-]+)==([\w.]+)", line):
            constraints[found[1].lower().replace("_", "-")] = found[2]
    pins = dict(pin.lower().replace("_", "-").split("==") for pin in (*virtual._WHEELS, *sum(EXTRAS.values(), ())))
    assert pins.pop("torch") == "2.7.1"  # the newest for aarch64 without CUDA
    assert {name: version for name, version in pins.items() if name in constraints} == {
        name: constraints[name] for name in pins if name in constraints
    }
    assert {"apache-tvm", "apache-tvm-ffi", "numpy", "scipy", "tqdm"} <= set(constraints)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either the number"),
        (["2", "--prepare"], "either the number"),
        (["0", "--tracker", "127.0.0.1:9190", "--key", "rpi4"], "at least 1, got 0"),
        (["2", "--key", "rpi4"], "--tracker is missing"),
        (["2", "--tracker", "127.0.0.1:9190"], "--key is missing"),
        (["2", "--tracker", "127.0.0.1", "--key", "rpi4"], "--tracker must be HOST:PORT"),
        (["--prepare", "--with", "cuda"], "no extra 'cuda'"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOST", "PORT", "KEY"):
        monkeypatch.delenv(f"TVM_TRACKER_{name}", raising=False)
    assert main(["farm", "virtual", *arguments]) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- under qemu


def test_python_runs_as_on_a_board(virtual_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor, child processes, and nothing of the host's Python."""
    leak = tmp_path / "leak"
    leak.mkdir()
    (leak / "leaked.py").write_text("")
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, str(leak))
    monkeypatch.setenv("PYTHONSTARTUP", str(leak / "leaked.py"))
    code = """
import ctypes, importlib.util, json, multiprocessing, os, platform, subprocess, sys
from gf_tvm.machine.profiles import get_profile
child = subprocess.run([sys.executable, "-c", "import platform, sys; print(platform.machine(), sys.executable)"],
                       stdout=subprocess.PIPE, text=True, check=True).stdout.split()
with multiprocessing.get_context("fork").Pool(1) as pool:
    forked = pool.apply(platform.machine)
with multiprocessing.get_context("spawn").Pool(1) as pool:
    spawned = pool.apply(platform.machine)
ctypes.CDLL("libgomp.so.1")
import gf_tvm, numpy
print(json.dumps({
    "machines": [platform.machine(), child[0], forked, spawned], "executables": [sys.executable, child[1]],
    "version": sys.version_info[:2], "path": sys.path[1:], "leaked": importlib.util.find_spec("leaked") is not None,
    "profile": get_profile("host").arch, "emulated": os.environ["GF_TVM_EMULATED"], "gf_tvm": gf_tvm.__file__,
    "numpy": numpy.__file__}))
"""
    found = json.loads(run_in(virtual_root, "-c", code, cwd=tmp_path))
    assert found["machines"] == ["aarch64"] * 4
    assert found["executables"] == [str(virtual_root / virtual._EXECUTABLE)] * 2
    assert found["version"] == [3, 11]
    assert not found["leaked"]
    assert all(path.startswith(str(virtual_root)) for path in [*found["path"], found["gf_tvm"], found["numpy"]])
    assert found["profile"] == "aarch64"
    assert found["emulated"] == "qemu"


def smooth_network() -> nn.Module:
    """Convolutions with activations that chains compute by polynomials."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for channels, act in ((3, nn.SiLU()), (8, nn.GELU()), (8, nn.Tanh())):
        layers += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), act]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval().requires_grad_(False)


def build_smooth(bundle: str) -> None:
    """Its chain for a board, and the kernels beside it."""
    model = smooth_network()
    cases = model_cases(model, (2, 3, 9, 9), last=3, patches=[2])
    gf_tvm.filter_model(model, 2, last=3)
    for name in gf_tvm.filter_report(model).filtered:
        model.get_submodule(name).requires_grad_(True)
    model(torch.zeros(2, 3, 9, 9))
    workloads = workloads_of(cases, chained=True)
    gf_tvm.build(workloads, "rpi4", out=bundle, shipped=False, programs=gf_tvm.programs_of(model))


@pytest.mark.slow
def test_kernels_for_a_board_are_right_on_it(virtual_root: Path, tmp_path: Path) -> None:
    """Built here for rpi4, loaded there, called with aarch64 PyTorch's tensors, compared with float64; a chain, too."""
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("linking for aarch64 needs: apt-get install g++-aarch64-linux-gnu")
    shapes = {"n": 2, "kernel": 3, "stride": 1, "padding": 1, "dtype": "float32", "patches": [2, 4]}
    cases = [{"ci": 8, "co": 8, "h": 6, "w": 6}, {"ci": 24, "co": 12, "h": 13, "w": 9}]
    (tmp_path / "shapes.json").write_text(json.dumps({**shapes, "cases": cases}))
    bundle, chain = str(tmp_path / "rpi4.gfb"), str(tmp_path / "chain.gfb")
    assert (
        main(["build", "--device", "rpi4", "--shapes", str(tmp_path / "shapes.json"), "--no-chain", "--out", bundle])
        == 0
    )
    network = ["--model", "mobilenetv2_025", "--input", "2x3x16x16", "--last", "3", "--patch", "2"]
    assert main(["build", "--device", "rpi4", *network, "--out", chain]) == 0
    smooth = str(tmp_path / "smooth.gfb")
    build_smooth(smooth)
    code = """
import copy, json, sys, warnings, torch, gf_tvm
from torch import nn
from gf_tvm.core import verify
from gf_tvm.models import build_model
"""
    code += f"""
{inspect.getsource(smooth_network)}
"""
    code += """

warnings.simplefilter("error", gf_tvm.FallbackWarning)


def gradients(model, x):
    model(x).square().sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def difference(model, size, bundle):
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    exact = copy.deepcopy(model).double()
    for m in (model, exact):
        chained = m is model
        gf_tvm.filter_model(m, 2, last=3, chain=chained, library=gf_tvm.load(bundle) if chained else None)
        for name in gf_tvm.filter_report(m).filtered:
            m.get_submodule(name).requires_grad_(True)
    actual = gradients(model, x)
    warnings.simplefilter("ignore", gf_tvm.FallbackWarning)
    wanted = gradients(exact, x.double())
    report = gf_tvm.chains_of(model)
    assert [len(chain.convolutions) for chain in report.chains] == [3], str(report)
    assert actual.keys() == wanted.keys() and len(actual) == 3
    return max(float((actual[n] - w).norm() / w.norm()) for n, w in wanted.items())


library = gf_tvm.load(sys.argv[1])
result = {}
for workload in library.workloads:
    inputs, outputs = verify.random_inputs(workload, 1), verify.poisoned_outputs(workload)
    library.find(workload.kernel, workload.geometry, workload.dtype)(*inputs, *outputs)
    result[workload.key] = verify.excess(outputs, verify.expected(workload, inputs))
exchange = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
mobilenet = build_model("mobilenetv2_025", 10, in_channels=3, image_size=16).eval().requires_grad_(False)
found = {"torch": torch.__version__, "excess": result, "exchange": exchange}
found["chained"] = difference(mobilenet, 16, sys.argv[2])
found["smooth"] = difference(smooth_network(), 9, sys.argv[3])
print(json.dumps(found))
"""
    found = json.loads(run_in(virtual_root, "-c", code, bundle, chain, smooth, cwd=tmp_path))
    assert found["torch"].startswith("2.7.1")
    assert found["exchange"], "the quick exchange of tensors, without a compiler on the board"
    assert len(found["excess"]) == 8
    assert {key: value for key, value in found["excess"].items() if not value <= 1} == {}
    assert found["chained"] < 1e-5
    assert found["smooth"] < 1e-5


class Board(VirtualPi):
    """Runs a script in place of the server, whose start takes long."""

    script = ""

    @property
    def arguments(self) -> list[str]:
        return ["-c", self.script, *super().arguments]


@pytest.fixture
def board(virtual_root: Path, tmp_path: Path) -> Iterator[Board]:
    made = Board(virtual_root, "one", ("127.0.0.1", 9190), "rpi4", tmp_path, GF_TVM_SENSORS="/elsewhere")
    yield made
    made.kill()


def test_a_board_has_its_own_folders_and_arguments(board: Board, tmp_path: Path) -> None:
    board.script = (
        "import os, sys, tempfile; print('board', os.environ['HOME'], tempfile.gettempdir(), os.getcwd(), "
        "os.environ['GF_TVM_SENSORS'], *sys.argv[1:]); sys.stdin.read()"
    )
    with board:
        line = board.wait_for("board").split()
        assert board.alive
        assert os.getpgid(board.pid) == board.pid
        with pytest.raises(FarmError, match="runs already"):
            board.start()
    own = tmp_path / "one"
    assert line[1:5] == [str(own / "home"), str(own / "tmp"), str(own), "/elsewhere"]
    assert " ".join(line[5:]).endswith(
        "farm serve --tracker 127.0.0.1:9190 --key rpi4 --name one --port 0 --until-stdin-closes --allow-root"
    )
    assert board.exit_code == -signal.SIGTERM


def test_a_board_that_ends_says_why_and_starts_again(board: Board) -> None:
    board.script = "import sys; print('first'); sys.exit('no such thing')"
    board.start()
    with pytest.raises(FarmError, match="one ended with code 1: no such thing"):
        board.wait_for("serving")
    assert not board.alive
    board.script = "print('second', flush=True); input()"
    board.start()
    assert board.wait_for("second") == "second"
    assert "first" not in board.output
    assert "first" in board.log.read_text()
    with pytest.raises(FarmError, match="said nothing of 'third'"):
        board.wait_for("third", seconds=0.2)


FAMILY = """
import os, subprocess, sys, time
child = os.fork()
if child == 0:
    os.setsid()  # as a server's sessions do
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("family", os.getppid(), os.getpid(), grandchild.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_kill_leaves_nothing(board: Board, stopped: bool) -> None:
    board.script = FAMILY
    board.start()
    pids = [int(word) for word in board.wait_for("family").split()[1:]]
    assert pids[0] == board.pid
    assert all(map(running, pids))
    if stopped:
        board.signal(signal.SIGSTOP)
        assert board.alive
    board.kill()
    assert board.exit_code == -signal.SIGKILL
    for pid in pids:
        wait_until_gone(pid)
    board.kill()  # once more does no harm


def test_a_board_ends_with_whoever_started_it(virtual_root: Path, tmp_path: Path) -> None:
    """Its standard input closes, however the other process ended."""
    code = f"""
import sys, time
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {HELPERS!r}]
from test_virtual import Board
board = Board(Path({str(virtual_root)!r}), "one", ("127.0.0.1", 9190), "rpi4", Path({str(tmp_path)!r}))
board.script = "import sys; print('ready'); sys.stdin.read(); print('end')"
board.start()
board.wait_for("ready")
print(board.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert running(pid)
        starter.kill()
    wait_until_gone(pid)
    assert (tmp_path / "one.log").read_text().split() == ["ready", "end"]


@pytest.mark.slow
def test_command_runs_boards_and_starts_them_again(virtual_root: Path, tmp_path: Path) -> None:
    """Real servers; there is no tracker at that address, and they go on looking for it."""
    command = [sys.executable, "-u", "-m", "gf_tvm.runners.cli", "farm", "virtual", "2"]
    errors = tmp_path / "errors"
    with (
        open(errors, "w") as file,
        subprocess.Popen(
            [*command, "--tracker", "127.0.0.1:9", "--key", "rpi4"], stdout=subprocess.PIPE, stderr=file, text=True
        ) as running_command,
    ):
        try:
            assert running_command.stdout is not None
            lines = sorted(running_command.stdout.readline() for _ in range(2))
            for number, line in enumerate(lines, 1):
                assert re.fullmatch(rf"serving rpi4 as virtual-{number} on 127\.0\.0\.1:\d+\n", line)
            children = virtual._tree(running_command.pid)[1:]
            first, second = sorted(pid for pid in children if os.getpgid(pid) == pid)
            os.kill(first, signal.SIGKILL)
            assert running_command.stdout.readline().startswith("serving rpi4 as virtual-1 ")
            assert running(second)
            boards = virtual._tree(running_command.pid)[1:]
            running_command.send_signal(signal.SIGINT)
            assert running_command.wait(250) == 130
        finally:
            running_command.kill()
    for pid in boards:
        wait_until_gone(pid)
    said = errors.read_text()
    assert "say nothing about a board" in said
    assert "virtual-1 was ended by SIGKILL; starting it again in 1 s" in said
    assert "Traceback" not in said


def test_environment_passes_little_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "LD_PRELOAD", "OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "QEMU_CPU"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    found = environment(tmp_path, TVM_NUM_THREADS="2")
    assert set(found) <= {
        *("LANG", "LC_ALL", "HOME", "PATH", "USER", "LOGNAME", "TERM", "TZ", "PYTHONNOUSERSITE"),
        *("GF_TVM_EMULATED", "GF_TVM_SENSORS", "TVM_NUM_THREADS"),
    }
    assert found["TZ"] == "Asia/Tokyo"
    assert found["HOME"] == str(tmp_path)


def test_command_names_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "_find_qemu", lambda: "/usr/bin/qemu-aarch64-static")
    monkeypatch.chdir(tmp_path)
    command = python_command(Path("root"), "-c", "pass")
    assert command[0] == "/usr/bin/qemu-aarch64-static"
    assert command[1:] == [
        "-cpu",
        "cortex-a72",
        "-L",
        f"{tmp_path}/root",
        f"{tmp_path}/root/usr/bin/python3",
        "-c",
        "pass",
    ]
