"""Commands on another machine through the ``ssh`` program, with the reason in words when that fails.

The program is used as it is, so ~/.ssh/config, agents and jump hosts work. Passwords are never asked for: what runs
overnight must come back without anybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FarmError
from . import _remote

CONNECT_SECONDS = 15
COMMAND_SECONDS = 120.0

Say = Callable[[str], None]

_TARGET = re.compile(r"(?:[A-Za-z0-9_][\w.+-]*@)?[A-Za-z0-9_:\[][\w.:%\[\]-]*", re.ASCII)
_SSH_FLAGS = {"-p": 1, "-i": 1, "-F": 1, "-J": 1, "-o": 1, "-4": 0, "-6": 0}


class SshError(FarmError):
    """A command on another machine that could not be run, or failed.

    Attributes:
        code: its exit code, 255 if ssh itself failed, None if it took too long.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Ssh:
    """Runs commands on one machine.

    Args:
        target: ``USER@HOST`` or a name from ~/.ssh/config.
        options: for ssh: ``Name=Value`` as in its configuration, or one of -p, -i, -F, -J, -o with its value, -4, -6.

    Raises:
        FarmError: a target or option that ssh would not take as one.
    """

    def __init__(self, target: str, options: Sequence[str] = ()) -> None:
        if not _TARGET.fullmatch(target):
            raise FarmError(f"{target!r} is not USER@HOST")
        self.target = target
        self.options = [word for option in options for word in _ssh_words(option)]
        self._running: set[subprocess.Popen[bytes]] = set()

    @property
    def host(self) -> str:
        """The target without the user."""
        return self.target.rpartition("@")[2]

    def command(self, remote: str, *extra: str) -> list[str]:
        """The words of a command line that runs ``remote`` there."""
        always = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": 10,
            "ServerAliveCountMax": 3,
            "RemoteCommand": "none",
            "LogLevel": "ERROR",  # no banners: what remains is the reason of a failure
        }
        fixed = [f"-o{name}={value}" for name, value in always.items()]
        # ssh takes the first of two values: what the caller says wins.
        return ["ssh", "-T", "-a", "-x", *self.options, *fixed, *extra, "--", self.target, remote]

    def run(
        self,
        remote: str,
        data: bytes | BinaryIO = b"",
        seconds: float = COMMAND_SECONDS,
        on_line: Say | None = None,
        on_sent: Callable[[int], None] | None = None,
    ) -> str:
        """Run a command of the remote shell and return what it prints.

        Args:
            remote: the command; whoever calls has quoted it.
            data: its standard input.
            seconds: that it may take.
            on_line: called with each line as it comes.
            on_sent: called with the number of bytes of ``data`` sent so far.

        Raises:
            SshError: no connection, the command failed, or it took too long.
        """
        process = self.start(remote)
        self._running.add(process)
        assert process.stdout is not None
        assert process.stderr is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        errors: list[bytes] = []
        stderr = process.stderr
        threads = [
            threading.Thread(target=lambda: errors.append(stderr.read()), daemon=True),
            threading.Thread(target=_send, args=(process.stdin, data, on_sent), daemon=True),
        ]
        try:
            for thread in threads:
                thread.start()
            lines = []
            for raw in process.stdout:
                line = raw.decode("utf-8", "replace").rstrip("\n")
                lines.append(line)
                if on_line is not None:
                    on_line(line)
            code = process.wait()
        finally:
            timer.cancel()
            self._running.discard(process)
            process.kill()
            process.wait()
            for thread in threads:
                thread.join(5)
            process.stdout.close()
            process.stderr.close()
        if late.is_set():
            raise SshError(f"{self.target}: no answer in {seconds:g} s")
        if code:
            text = b"".join(errors).decode("utf-8", "replace")
            raise SshError(explain(self.target, code, text or "\n".join(lines)), code)
        return "\n".join(lines)

    def close(self) -> None:
        """End what :meth:`run` has under way in other threads."""
        for process in list(self._running):
            process.kill()

    def start(self, remote: str, *extra: str) -> subprocess.Popen[bytes]:
        """Start a command with pipes to it. Raises SshError if there is no ssh."""
        try:
            return subprocess.Popen(
                self.command(remote, *extra),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C is for us: we end the connections in order.
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError:
            raise SshError("there is no ssh here; install OpenSSH's client (Debian: openssh-client)") from None

    def ask(self, python: str, function: str, *args: str) -> dict[str, Any]:
        """Call a function of :mod:`gf_tvm.farm._remote` there. Raises SshError."""
        # Python looks for modules in the present folder first, and homes are full of things.
        remote = "cd / && exec " + shlex.join([python, "-", function, *args])
        output = self.run(remote, Path(_remote.__file__).read_bytes())
        for line in output.splitlines():
            if line.startswith(_remote.MARK):
                answer: dict[str, Any] = json.loads(line[len(_remote.MARK) :])
                return answer
        raise SshError(f"{self.target}: {python} gave no answer: {last_line(output) or 'nothing'}")


def _ssh_words(option: str) -> list[str]:
    try:
        words = shlex.split(option)
    except ValueError:
        words = []
    if len(words) == 1 and re.match(r"-[piFJo].", words[0]):  # -p2222
        words = [words[0][:2], words[0][2:]]
    if words and words[0] in _SSH_FLAGS and len(words) == 1 + _SSH_FLAGS[words[0]]:
        return words
    if re.fullmatch(r"[A-Za-z]\w*\s*=.+", option):
        return ["-o", option]
    raise FarmError(f"--ssh-option {option!r} is neither NAME=VALUE nor one of {' '.join(_SSH_FLAGS)} with its value")


def _send(pipe: Any, data: bytes | BinaryIO, on_sent: Callable[[int], None] | None) -> None:
    sent = 0
    # The other side may end before it has read everything; its exit code says why.
    with contextlib.suppress(OSError, ValueError):
        pieces = (
            (data[at : at + (1 << 16)] for at in range(0, len(data), 1 << 16))
            if isinstance(data, bytes)
            else iter(lambda: data.read(1 << 16), b"")
        )
        for piece in pieces:
            pipe.write(piece)
            pipe.flush()
            sent += len(piece)
            if on_sent is not None:
                on_sent(sent)
    with contextlib.suppress(OSError, ValueError):
        pipe.close()


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def explain(target: str, code: int, text: str) -> str:
    """Why ssh, or the command that it ran, failed, and what to do about it, in one line."""
    if code != 255:
        if code in (126, 127) and re.search(r"not found|No such file|Permission denied|not executable", text):
            return f"{target}: {last_line(text)}"
        return f"{target}: {last_line(text) or f'a command ended with exit code {code}'}"
    for pattern, reason in _REASONS:
        if re.search(pattern, text, re.IGNORECASE):
            return f"{target}: {reason.format(target=target, line=last_line(text))}"
    return f"{target}: {last_line(text) or 'the connection ended'}"


_REASONS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is another than before: a new installation, or another machine in its place; if you know why, "
        "remove the old one with ssh-keygen -R and connect once by hand",
    ),
    (
        r"host key verification failed|host key is known for|strict checking",
        "its host key is not known here; connect once by hand (ssh {target}) and compare the key",
    ),
    (
        r"permission denied|too many authentication failures",
        "refuses the login, and passwords are not asked for; set up a key: ssh-keygen -t ed25519, then "
        "ssh-copy-id {target}",
    ),
    (r"could not resolve", "no such host name; use its address, or see that the board is on the network"),
    (
        r"connection refused|timed out|no route to host|network is unreachable|host is down",
        "cannot be reached ({line}); is it on, on the network, and is its ssh server enabled?",
    ),
    (r"identity file .* not accessible|bad permissions|unprotected private key", "the key cannot be used: {line}"),
    (
        r"remote port forwarding failed|administratively prohibited",
        "its ssh server does not forward ports; allow AllowTcpForwarding in /etc/ssh/sshd_config there",
    ),
    (
        r"cannot listen to port|could not request local forwarding|address already in use",
        "the port for it is in use on this machine ({line}); choose another with --port",
    ),
)
