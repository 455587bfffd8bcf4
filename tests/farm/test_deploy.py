"""``gf-tvm farm deploy`` and ``doctor USER@HOST``, over a real sshd on loopback; a "board" is a folder here."""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_task import wait_until

from gf_tvm.errors import FarmError
from gf_tvm.farm import _remote, tracker
from gf_tvm.farm.deploy import SshBoard, check_board, connect, make_package
from gf_tvm.farm.doctor import FAILED, OK
from gf_tvm.farm.ssh import Ssh, SshError, explain
from gf_tvm.runners.cli import main
from gf_tvm.runners.farm import deploy as _farm_deploy

pytestmark = pytest.mark.early

GF_TVM = [sys.executable, "-m", "gf_tvm.runners.cli"]
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs OpenSSH (openssh-server, openssh-client)"
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Sshd:
    """An ssh server of the current user on loopback, with keys of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        for name in ("host", "client", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        (folder / "authorized").write_text((folder / "client.pub").read_text())
        kind, key, *_ = (folder / "host.pub").read_text().split()
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        kind, key, *_ = (folder / "stranger.pub").read_text().split()
        (folder / "changed").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        (folder / "conf").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\n"
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # where sshd wants to lock its helpers in
        assert SSHD is not None
        log = open(folder / "log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "conf")], stdin=-3, stdout=log, stderr=log
        )
        log.close()
        assert wait_until(self._answers), (folder / "log").read_text()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    target = f"{getpass.getuser()}@127.0.0.1"

    def options(self, key: str = "client", known: str = "known", port: int | None = None) -> list[str]:
        return [
            *("-F none", f"Port={port or self.port}", f"IdentityFile={shlex.quote(str(self.folder / key))}"),
            *(f"UserKnownHostsFile={self.folder / known}", "IdentitiesOnly=yes"),
        ]

    def ssh(self, **changes: Any) -> Ssh:
        return Ssh(self.target, self.options(**changes))

    def words(self) -> list[str]:
        """Options of the command line."""
        return [word for option in self.options() for word in ("--ssh-option", option)]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.process.terminate()
    server.process.wait()


def lend_packages(folder: Path) -> None:
    """Make the board's environment see what this one has, so that pip finds all but gf_tvm installed."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


@pytest.fixture(scope="module")
def installed(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gf_tvm installed through deploy; its name is what a shell would trip over."""
    folder = tmp_path_factory.mktemp("board") / "it's $HOME; false"
    folder.mkdir()
    lend_packages(folder)
    done = subprocess.run(
        [*GF_TVM, "farm", "deploy", sshd.target, *sshd.words(), "--folder", str(folder), "--install-only"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "127.0.0.1: installed in" in done.stdout
    return folder


# --- what would reach ssh or a shell ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "",
        "-oProxyCommand=x",
        "-v",
        "pi@-v",
        "a b",
        "pi@a;b",
        "pi@$(x)",
        "pi@a'b",
        "@a",
        "pi@",
        "a\nb",
        "-p@a",
        "pi@a/b",
    ],
)
def test_a_target_that_ssh_or_a_shell_would_misread_is_refused(target: str) -> None:
    with pytest.raises(FarmError, match="is not USER@HOST"):
        Ssh(target)


@pytest.mark.parametrize("target", ["pi@pi4a.local", "10.0.0.7", "pi@[fe80::1%eth0]", "board_1", "a-b.c+d@host"])
def test_targets(target: str) -> None:
    command = Ssh(target).command("echo x")
    assert command[-3:] == ["--", target, "echo x"]
    assert "-oBatchMode=yes" in command


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("-p 2222", ["-p", "2222"]),
        ("-p2222", ["-p", "2222"]),
        ("-4", ["-4"]),
        ("-i 'a key'", ["-i", "a key"]),
        ("-o Port=1", ["-o", "Port=1"]),
        ("Port=2222", ["-o", "Port=2222"]),
        ("ProxyCommand=nc -x a %h %p", ["-o", "ProxyCommand=nc -x a %h %p"]),
    ],
)
def test_ssh_options(option: str, words: list[str]) -> None:
    ssh = Ssh("a", [option])
    assert ssh.options == words
    # ssh takes the first value of an option: the caller's comes before ours.
    command = ssh.command("x")
    assert command.index(words[0]) < command.index("-oBatchMode=yes")


@pytest.mark.parametrize("option", ["", "-v", "-p", "-p 1 2", "--", "host", "-L 1:2:3", "'", "-tt", "=x", "-4 a"])
def test_other_ssh_options_are_refused(option: str) -> None:
    with pytest.raises(FarmError, match="--ssh-option"):
        Ssh("a", [option])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["pi@a"], "--tracker"),
        (["pi@a", "--tracker", "h:1"], "--key"),
        (["pi@a", "--tracker", "h", "--key", "k"], "--tracker"),
        (["pi@a", "--tracker", "h:1", "--key", "a b"], "--key"),
        (["pi@a", "pi@b", "--name", "x", "--install-only"], "--name"),
        (["pi@a", "--name", "../x", "--install-only"], "name"),
        (["pi@a", "--port", "70000", "--install-only"], "--port"),
        (["pi@a", "pi@b", "--port", "65535", "--install-only"], "--port"),
        (["pi@a", "--wheels", "/nowhere", "--install-only"], "--wheels"),
        (["--install-only", "--", "-oProxyCommand=x"], "USER@HOST"),
        ([], "USER@HOST"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    for name in ("TVM_TRACKER_HOST", "TVM_TRACKER_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["farm", "deploy", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert part in err


def test_boards_are_named_by_their_hosts() -> None:
    targets = ["pi@pi4a.local", "root@pi4a.local", "pi@[fe80::1]", "pi4a.local"]
    assert _farm_deploy._names(targets, None) == ["pi4a.local", "pi4a.local-2", "fe80-1", "pi4a.local-3"]
    assert _farm_deploy._names(["pi@a"], "left") == ["left"]


# --- what a board may lack --------------------------------------------------------------------------------------------

PI = {
    "folder": "/home/pi/.local/share/gf_tvm",
    "machine": "aarch64",
    "bits": 64,
    "system": "Linux",
    "python": "3.11.2",
    "libc": "glibc",
    "libc_version": "2.36",
    "free": 20 << 30,
    "writable": True,
    "venv_module": True,
    "venv": False,
    "stamp": None,
}


def test_a_pi_is_fit() -> None:
    check_board(SshBoard(Ssh("pi@a"), "a", "python3", dict(PI)))
    check_board(SshBoard(Ssh("pi@a"), "a", "python3", {**PI, "venv": True, "venv_module": False, "free": 1}))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"python": "3.9.2"}, "Python 3.9.2; gf_tvm needs 3.10 or newer"),
        ({"machine": "armv7l", "bits": 32}, "64-bit OS"),
        ({"bits": 32}, "64-bit OS"),  # a 32-bit system with a 64-bit kernel
        ({"libc_version": "2.26"}, "glibc 2.27"),
        ({"libc_version": "2.27", "machine": "x86_64"}, "glibc 2.28"),
        ({"libc": "", "libc_version": ""}, "no glibc"),
        ({"venv_module": False}, "python3-venv"),
        ({"free": 1 << 30}, "1.1 GB free"),
        ({"writable": False}, "--folder"),
    ],
)
def test_an_unfit_board_is_refused_with_the_reason(change: dict[str, Any], part: str) -> None:
    with pytest.raises(FarmError, match=f"pi@a: .*{re.escape(part)}"):
        check_board(SshBoard(Ssh("pi@a"), "a", "python3", {**PI, **change}))


def test_a_package_pins_what_must_agree_and_what_would_bring_cuda(tmp_path: Path) -> None:
    from importlib.metadata import version

    arm, again, x86 = (make_package(tmp_path, machine) for machine in ("aarch64", "aarch64", "x86_64"))
    for package in (arm, x86):
        assert f"apache-tvm=={version('apache-tvm')}\n" in package.constraints
        assert f"apache-tvm-ffi=={version('apache-tvm-ffi')}\n" in package.constraints
    assert "torch==2.7.1\n" in arm.constraints
    assert arm.requirements == ("torch-c-dlpack-ext",)
    assert x86.requirements == ()
    assert "+" not in x86.constraints
    assert arm.digest == again.digest != x86.digest


def test_a_jetson_nano_gets_the_last_pytorch_that_its_c_library_runs(tmp_path: Path) -> None:
    nano = SshBoard(Ssh("pi@a"), "a", "python3", {**PI, "libc_version": "2.27"})
    check_board(nano)
    package = make_package(tmp_path, nano.system)
    assert package.machine == "aarch64"
    assert "torch==2.5.1\n" in package.constraints
    # gf-tvm's own metadata asks for a newer one, so it is installed without a look at it.
    assert not package.own_requirements
    assert {"torch", "numpy"} <= set(package.requirements)
    assert not any(text.startswith("torch-c-dlpack-ext") or "extra" in text for text in package.requirements)
    assert any(text.startswith("apache-tvm==") for text in package.requirements)
    newer = make_package(tmp_path, SshBoard(Ssh("pi@a"), "a", "python3", dict(PI)).system)
    assert newer.own_requirements
    assert newer.digest != package.digest


def test_wheels_are_part_of_a_package(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(FarmError, match="no wheels"):
        make_package(tmp_path, "aarch64", wheels)
    (wheels / "a-1-py3-none-any.whl").write_bytes(b"1")
    first = make_package(tmp_path, "aarch64", wheels)
    assert first.offline
    assert [file.name for file in first.files][1:] == ["a-1-py3-none-any.whl"]
    (wheels / "a-1-py3-none-any.whl").write_bytes(b"12")
    assert make_package(tmp_path, "aarch64", wheels).digest != first.digest


# --- connections that fail --------------------------------------------------------------------------------------------


@needs_sshd
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"port": 1}, ("cannot be reached", "Connection refused")),
        ({"key": "stranger"}, ("refuses the login", "ssh-copy-id")),
        ({"known": "nothing"}, ("host key is not known", "connect once by hand")),
        ({"known": "changed"}, ("host key is another than before", "ssh-keygen -R")),
    ],
)
def test_a_failing_connection_says_why(sshd: Sshd, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(SshError) as caught:
        connect(sshd.ssh(**changes), "a")
    assert caught.value.code == 255
    for part in (f"{sshd.target}: ", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_sshd
def test_an_unknown_host_says_so() -> None:
    with pytest.raises(SshError, match=r"no such host name"):
        connect(Ssh("pi@no-such-board.invalid", ["-F none"]), "a")


def test_without_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SshError, match="openssh-client"):
        connect(Ssh("pi@a"), "a")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ssh: connect to host a port 22: No route to host", "cannot be reached"),
        ("ssh: connect to host a port 22: Connection timed out", "cannot be reached"),
        ("Error: remote port forwarding failed for listen port 4000", "AllowTcpForwarding"),
        ("bind [127.0.0.1]:9090: Address already in use\nCould not request local forwarding.", "--port"),
        ("Connection to a closed by remote host.", "Connection to a closed by remote host."),
        ("", "the connection ended"),
    ],
)
def test_reasons_of_ssh(text: str, part: str) -> None:
    assert part in explain("pi@a", 255, text)


@needs_sshd
def test_no_python(sshd: Sshd) -> None:
    with pytest.raises(FarmError, match="no Python: python9 does not run there"):
        connect(sshd.ssh(), "a", python="python9")


@needs_sshd
@pytest.mark.parametrize("old", ["3.7", "3.6", "2.7"])
def test_an_old_python(sshd: Sshd, tmp_path: Path, old: str) -> None:
    fake = tmp_path / "python"
    # 3.7 can answer; those before it fail as they do in truth.
    answer = _remote.MARK + json.dumps({**PI, "python": "3.7.3"})
    says = f"echo {shlex.quote(answer)}" if old == "3.7" else "echo 'SyntaxError: invalid syntax' >&2; exit 1"
    fake.write_text(f"#!/bin/sh\ncat > /dev/null\n{says}\n")
    fake.chmod(0o755)
    with pytest.raises(FarmError, match=r"gf_tvm needs 3\.10 or newer"):
        check_board(connect(sshd.ssh(), "a", python=str(fake)))


@needs_sshd
def test_a_command_that_hangs(sshd: Sshd) -> None:
    start = time.monotonic()
    with pytest.raises(SshError, match="no answer in 1 s"):
        sshd.ssh().run("exec sleep 250", seconds=1)
    assert time.monotonic() - start < 100


@needs_sshd
def test_a_long_input_that_is_not_read_does_not_hang(sshd: Sshd) -> None:
    with pytest.raises(SshError, match="exit code 3") as caught:
        sshd.ssh().run("exit 3", data=bytes(8 << 20), seconds=250)
    assert caught.value.code == 3


@needs_sshd
@pytest.mark.parametrize("name", ["plain", "two words", "it's", "$HOME", "a;touch b", "`x`", "ü", '"', "-x"])
def test_folders_arrive_as_they_are(sshd: Sshd, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    assert connect(sshd.ssh(), "a", sys.executable, str(folder)).folder == str(folder)
    assert not list(tmp_path.iterdir())


@needs_sshd
def test_the_home_folder_is_that_of_the_board(sshd: Sshd) -> None:
    for folder in ("~/.local/share/gf_tvm", ".local/share/gf_tvm"):
        assert connect(sshd.ssh(), "a", sys.executable, folder).folder == str(Path.home() / ".local/share/gf_tvm")


# --- installing -------------------------------------------------------------------------------------------------------


def deploy_only(sshd: Sshd, folder: Path, *words: str) -> int:
    """``words`` come first: other boards, options."""
    return main(["farm", "deploy", *words, sshd.target, *sshd.words(), "--folder", str(folder), "--install-only"])


@needs_sshd
def test_what_is_installed_is_this_gf_tvm_and_nothing_of_tuning(installed: Path) -> None:
    python = installed / "venv/bin/python"
    code = "import gf_tvm, gf_tvm.farm.deploy as d; print(d.__file__)"
    file = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert str(installed / "venv") in file
    assert not (installed / "incoming").exists()
    (site,) = (installed / "venv" / "lib").glob("python*/site-packages")
    assert not list(site.glob("xgboost*"))


@needs_sshd
def test_again_is_quick(sshd: Sshd, installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy_only(sshd, installed) == 0
    out = capsys.readouterr().out
    assert "127.0.0.1: is up to date" in out
    assert "install" not in out


@needs_sshd
def test_half_an_installation_is_completed(sshd: Sshd, installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (installed / "venv" / _remote.STAMP).write_text("something else")
    (site,) = (installed / "venv" / "lib").glob("python*/site-packages")
    shutil.rmtree(site / "gf_tvm" / "farm")
    assert deploy_only(sshd, installed) == 0
    assert "installed in" in capsys.readouterr().out
    assert (site / "gf_tvm" / "farm" / "server.py").exists()


@needs_sshd
def test_an_installation_without_a_network(
    sshd: Sshd, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other-1-py3-none-any.whl").write_bytes(b"nobody asks for this one")
    assert deploy_only(sshd, installed, "--wheels", str(tmp_path)) == 0
    assert "installed in" in capsys.readouterr().out
    assert not (installed / "incoming").exists()
    # The wheels are part of what was installed.
    assert deploy_only(sshd, installed, "--wheels", str(tmp_path)) == 0
    assert "is up to date" in capsys.readouterr().out


@needs_sshd
def test_an_environment_without_pip_is_made_anew(sshd: Sshd, tmp_path: Path) -> None:
    # What remains when the board's Python was upgraded.
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "venv/bin/python").chmod(0o755)
    assert not connect(sshd.ssh(), "a", sys.executable, str(tmp_path)).facts["venv"]


@needs_sshd
def test_an_installation_that_fails_says_why_and_leaves_no_stamp(
    sshd: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "nothing-1-py3-none-any.whl").write_bytes(b"")
    assert deploy_only(sshd, tmp_path / "board", "--wheels", str(wheels)) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "left out" in err[0]
    assert "could not install" in err[0]
    assert "--wheels" in err[0]
    assert err[1] == "gf-tvm: error: no board could be set up"
    assert not (tmp_path / "board/venv" / _remote.STAMP).exists()


@needs_sshd
def test_a_board_that_fails_does_not_hold_up_the_others(
    sshd: Sshd, installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy_only(sshd, installed, f"{getpass.getuser()}@no-such-board.invalid") == 1
    out, err = capsys.readouterr()
    assert re.search(r"^127\.0\.0\.1: (is up to date|installed in)", out, flags=re.MULTILINE)
    assert err.startswith("no-such-board.invalid: left out: ")


@needs_sshd
def test_ctrl_c_ends_an_installation(sshd: Sshd, tmp_path: Path) -> None:
    # A Python that takes its time.
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ntouch started\nexec sleep 1000\n".replace("started", str(tmp_path / "started")))
    fake.chmod(0o755)
    command = [*GF_TVM, "farm", "deploy", sshd.target, *sshd.words(), "--install-only", "--python", str(fake)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert wait_until((tmp_path / "started").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 130
    assert err == "gf-tvm: interrupted\n"


# --- doctor over ssh --------------------------------------------------------------------------------------------------


@needs_sshd
def test_doctor_of_an_installed_board(sshd: Sshd, installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["farm", "doctor", sshd.target, *sshd.words(), "--folder", str(installed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ok      connection {sshd.target} answers"
    assert any(line.startswith("ok      tvm runtime loads") for line in lines)
    assert any(re.fullmatch(r"ok      apache-tvm on the board \S+, as here", line) for line in lines)


@needs_sshd
def test_doctor_of_a_board_with_nothing(sshd: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [sshd.target, *sshd.words(), "--folder", str(tmp_path / "board"), "--json", "-"]
    code = main(["farm", "doctor", *words, "--library", str(Path(__file__))])
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert found["python"]["status"] == OK
    assert found[Path(__file__).name]["status"] == FAILED
    assert "not installed" in found[Path(__file__).name]["detail"]
    assert code == 1


@needs_sshd
def test_doctor_of_a_board_that_is_not_there(sshd: Sshd, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for option in sshd.options(port=1) for word in ("--ssh-option", option)]
    assert main(["farm", "doctor", sshd.target, *words]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("failed  connection")


@needs_sshd
def test_doctor_runs_a_bundle_on_the_board(
    sshd: Sshd, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps({"patches": [2], "cases": [{"n": 1, "ci": 4, "co": 4, "h": 6, "w": 6, "kernel": 3}]}))
    library = tmp_path / "my library.gfb"
    assert main(["build", "--shapes", str(shapes), "--out", str(library)]) == 0
    capsys.readouterr()
    words = [sshd.target, *sshd.words(), "--folder", str(installed), "--library", str(library)]
    assert main(["farm", "doctor", *words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"ok      my library\.gfb \d kernels equal the float64 reference", line)
    assert not list((installed / "run").glob("*.gfb"))


# --- tunnel and server ------------------------------------------------------------------------------------------------


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that run from a board's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].startswith(os.fsencode(folder)):
            found.append(f"{entry.parent.name} {b' '.join(words).decode()}")
    return found


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted({int(word) for task in text.parent.parent.glob("*/children") for word in task.read_text().split()})


class Deploy:
    """A running ``gf-tvm farm deploy``."""

    def __init__(self, sshd: Sshd, folder: Path, port: int, log: Path, *words: str) -> None:
        command = [*GF_TVM, "farm", "deploy", sshd.target, *sshd.words(), "--folder", str(folder), "--allow-root"]
        command += ["--tracker", f"127.0.0.1:{port}", "--key", "loop", *words]
        self._log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        assert wait_until(lambda: self.output.count(text) >= times or self.process.poll() is not None, 120)
        assert self.output.count(text) >= times, self.output

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(250)


@pytest.fixture
def tracker_port(tmp_path: Path) -> Iterator[int]:
    port = free_port()
    with open(tmp_path / "tracker.log", "wb") as log:
        process = subprocess.Popen([*GF_TVM, "farm", "tracker", "--port", str(port)], stdout=log, stderr=log)
    yield port
    process.terminate()
    process.wait()


@pytest.fixture
def start(sshd: Sshd, installed: Path, tracker_port: int, tmp_path: Path) -> Iterator[Callable[..., Deploy]]:
    started: list[Deploy] = []

    def call(*words: str) -> Deploy:
        started.append(Deploy(sshd, installed, tracker_port, tmp_path / f"deploy{len(started)}.log", *words))
        return started[-1]

    yield call
    for one in started:
        if one.process.poll() is None:
            one.end(signal.SIGTERM)


def registered(port: int) -> list[str]:
    try:
        return [board.name for board in tracker.boards(("127.0.0.1", port))]
    except FarmError:
        return []


@needs_sshd
@pytest.mark.slow
def test_a_board_registers_comes_back_and_leaves_nothing_behind(
    start: Callable[..., Deploy], installed: Path, tracker_port: int
) -> None:
    port = free_port()
    one = start("--name", "left", "--port", str(port))
    assert wait_until(lambda: registered(tracker_port) == ["left"]), one.output
    (board,) = tracker.boards(("127.0.0.1", tracker_port))
    assert board.address == f"127.0.0.1:{port}"  # where this host reaches it
    with socket.create_connection(("127.0.0.1", port), 10):
        pass
    (first,) = processes_of(installed)

    (ssh,) = children_of(one.process.pid)
    os.kill(ssh, signal.SIGKILL)
    one.wait_for("connects again in 1 s")
    one.wait_for("serving loop as left", times=2)
    assert wait_until(lambda: processes_of(installed) and first not in processes_of(installed))
    assert wait_until(lambda: registered(tracker_port) == ["left"]), one.output

    (server,) = processes_of(installed)
    os.kill(int(server.split()[0]), signal.SIGKILL)
    one.wait_for("serving loop as left", times=3)
    assert wait_until(lambda: registered(tracker_port) == ["left"]), one.output

    assert one.end() == 0
    assert wait_until(lambda: not processes_of(installed)), processes_of(installed)
    assert wait_until(lambda: registered(tracker_port) == [])
    assert "Traceback" not in one.output


@needs_sshd
@pytest.mark.slow
def test_a_deploy_that_is_killed_leaves_nothing_on_the_board(start: Callable[..., Deploy], installed: Path) -> None:
    one = start()
    one.wait_for("serving loop")
    one.end(signal.SIGKILL)
    assert wait_until(lambda: not processes_of(installed)), processes_of(installed)


@needs_sshd
@pytest.mark.slow
def test_a_second_deploy_takes_the_board_and_the_first_gives_up(
    start: Callable[..., Deploy], installed: Path, tracker_port: int
) -> None:
    first = start()
    first.wait_for("serving loop")
    second = start()
    second.wait_for("serving loop")
    assert "ended a server that an earlier connection had left" in second.output
    assert first.process.wait(250) == 1
    assert "another gf-tvm farm deploy has taken this board; gives up" in first.output
    # A server has a process more while it answers somebody.
    assert wait_until(lambda: len(processes_of(installed)) == 1), processes_of(installed)
    assert second.end() == 0


@needs_sshd
@pytest.mark.slow
def test_a_board_whose_network_goes_silent(
    sshd: Sshd, start: Callable[..., Deploy], installed: Path, tracker_port: int
) -> None:
    before = set(children_of(sshd.process.pid))
    one = start()
    assert wait_until(lambda: registered(tracker_port) == ["127.0.0.1"]), one.output
    (server,) = processes_of(installed)
    silent = set(children_of(sshd.process.pid)) - before
    try:
        # Nothing closes the connection: its end is stopped, and so is the server, which cannot see its input's end.
        for pid in (*silent, int(server.split()[0])):
            os.kill(pid, signal.SIGSTOP)
        one.wait_for("connects again in")
        one.wait_for("serving loop", times=2)
        assert "ended a server that an earlier connection had left" in one.output
        assert wait_until(lambda: registered(tracker_port) == ["127.0.0.1"]), one.output
        assert server not in processes_of(installed)
        assert len(processes_of(installed)) == 1
        assert one.end() == 0
    finally:
        for pid in silent:
            os.kill(pid, signal.SIGKILL)


@needs_sshd
@pytest.mark.slow
def test_boards_wait_for_a_tracker(sshd: Sshd, installed: Path, tmp_path: Path) -> None:
    one = Deploy(sshd, installed, free_port(), tmp_path / "log")
    try:
        one.wait_for("the boards register as soon as it is there")
        one.wait_for("serving loop")
    finally:
        assert one.end() == 0
    assert not processes_of(installed)
