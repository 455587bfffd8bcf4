"""The command ``gf-tvm``: finds the command's module, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn, TextIO, cast

from .._version import __version__
from ..errors import GfTvmError
from . import build, cache, compare, devices, evaluate, export, farm, logs, predict, report, train, tune
from ._output import Escaping

#: One module each, with ``add_parser(subparsers)`` and ``run(args)``; in the order of ``--help``. Importing one must
#: stay cheap (no torch, no TVM), because every call of gf-tvm imports them all.
COMMANDS: dict[str, ModuleType] = {
    "devices": devices,
    "tune": tune,
    "farm": farm,
    "logs": logs,
    "build": build,
    "cache": cache,
    "train": train,
    "predict": predict,
    "export": export,
    "compare": compare,
    "evaluate": evaluate,
    "report": report,
}

#: A mistake of the user, or a file that cannot be read or written.
EXIT_ERROR = 2
#: What a shell reports for a program ended by Ctrl-C, and for one whose reader went away.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front, and takes options only by their full names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="gf-tvm",
        description="Gradient filtering for training CNNs on the device: tunes, builds, uses and measures backward "
        "kernels of convolutions.",
    )
    parser.add_argument("--version", action="version", version=f"gf-tvm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    return run_command("gf-tvm", lambda: _run(argv))


def run_command(name: str, command: Callable[[], int]) -> int:
    """Call ``command`` and return its exit code; what goes wrong is said in one line that begins with ``name``."""

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"{name}: warning: {message}\n"

    def fail(message: str) -> int:
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
        return EXIT_ERROR

    for stream in (sys.stdout, sys.stderr):
        # A letter of a file's name that the terminal does not have is written as an escape; it ends no command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    formatwarning, stdout, stderr = warnings.formatwarning, sys.stdout, sys.stderr
    warnings.formatwarning = format_warning
    # What boards, files and other machines name themselves must not give the terminal orders.
    sys.stdout, sys.stderr = cast(TextIO, Escaping(stdout)), cast(TextIO, Escaping(stderr))
    try:
        code = command()
        sys.stdout.flush()  # here, where a full disk or a reader that went away can still be reported
        return code
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except _expected_errors() as error:
        return fail(str(error))
    except OSError as error:
        _discard_stdout()
        return fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))
    finally:
        warnings.formatwarning, sys.stdout, sys.stderr = formatwarning, stdout, stderr


def _run(argv: Sequence[str] | None) -> int:
    return run_parsed(build_parser(), argv)


def run_parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse the arguments and call their ``run``, which the parser's defaults name."""
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse's way to end after --help, --version and its errors
        return stop.code if isinstance(stop.code, int) else 0
    code: int = args.run(args)
    return code


def _expected_errors() -> tuple[type[Exception], ...]:
    """What is said in one line. gf_cuda is not imported for it: that takes longer than all of --help."""
    gpu = sys.modules.get("gf_cuda.errors")
    return (GfTvmError,) if gpu is None else (GfTvmError, gpu.GfCudaError)


def _discard_stdout() -> None:
    """Send to nowhere what standard output still holds, if it cannot take it: Python would complain at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


if __name__ == "__main__":
    sys.exit(main())
