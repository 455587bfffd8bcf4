"""What the commands show and write: tables, progress, JSON files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from unicodedata import category

from tabulate import tabulate
from tqdm import tqdm

from ..errors import GfTvmError
from ..files import create

#: Seconds between two lines of progress where the output is not a terminal (a log file, a CI job).
LINE_INTERVAL = 10.0


def printable(text: str, keep: str = "") -> str:
    """``text`` with control characters as escapes: names and messages come from boards and files of strangers.

    Args:
        text: any.
        keep: control characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() or category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Escaping:
    """A text stream that writes all control characters but the ends of lines as escapes; else it is ``stream``.

    Attributes:
        unescaped: the stream behind, for what moves the cursor itself.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        self.unescaped.write(printable(text, keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


class OutputError(GfTvmError):
    """A file that cannot be written."""


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]], floats: str = ".4g") -> str:
    """Return a plain text table. ``floats`` is the format of floating point cells; None is shown as a dash."""
    cells = [[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    # Without rows tabulate takes the headers for data.
    return tabulate(cells, headers=headers, tablefmt="simple", floatfmt=floats, missingval="-")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that :func:`write_json` could write ``path`` now: called before the work whose result goes there.

    Leaves an existing file as it is. Raises OutputError.
    """
    target = Path(path)
    try:
        if _in_place(target):
            os.close(os.open(target, os.O_WRONLY | os.O_APPEND))
            return
        stage, file = _open_stage(target)
        file.close()
        stage.unlink()
    except OSError as error:
        raise _cannot_write(target, error) from None


def check_results(json_file: Path | None, plot_file: Path | None) -> None:
    """Make sure that both files, where they are wanted, could be written now. Raises GfTvmError."""
    for path in (json_file, plot_file):
        if path is not None:
            check_writable(path)
    if plot_file is not None:
        from ..comparison.plot import check_plot  # here, because commands that draw nothing do without matplotlib

        check_plot(plot_file)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write ``value`` to ``path`` so that the file is there whole or, on any failure, as it was before.

    Numbers that JSON does not have (NaN and the infinities) become null. Raises OutputError.
    """
    target = Path(path)
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    try:
        if _in_place(target):
            with open(target, "ab") as device:
                device.write(text.encode())
            return
        stage, file = _open_stage(target)
        try:
            with file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(stage, os.path.realpath(target))
        except BaseException:
            stage.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _cannot_write(target, error) from None


def _in_place(target: Path) -> bool:
    """Whether a rename over ``target`` would do harm: it is a pipe or a device, such as /dev/stdout or /dev/null."""
    return target.parent == Path("/dev") or (target.exists() and not target.is_file() and not target.is_dir())


def _open_stage(target: Path) -> tuple[Path, BinaryIO]:
    """Create the file that is renamed to ``target`` when complete. Raises OSError if one of the two is impossible."""
    real = Path(os.path.realpath(target))
    if real.is_dir():
        raise IsADirectoryError(21, "it is a folder")
    if real.exists() and not os.access(real, os.W_OK):
        raise PermissionError(13, "Permission denied")
    stage = real.with_name(f".{real.name}.{os.getpid()}.tmp")
    # Not tempfile.mkstemp: its files can be read by nobody else, and the result would keep that.
    return stage, create(stage)


def _cannot_write(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        reason = f"there is no folder {str(target.parent)!r}"
    return OutputError(f"cannot write {str(target)!r}: {reason}")


def _plain(value: Any) -> Any:
    """Return ``value`` made of what JSON knows; numpy and torch scalars become Python numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class ProgressBar:
    """Progress of a long job: a bar with the time left on a terminal, else a line every ten seconds.

    The lines come however long a step takes: who reads a log file sees that the job goes on. A context manager; to be
    used from one thread.

    Args:
        total: number of steps, or None where it is not known.
        label: what the job is, in front of every line.
        unit: what a step is ("trial", "epoch").
        initial: steps done before (a job that was resumed); they do not count for the time left.
        stream: where to write; standard error by default.
        leave: keep the bar on the terminal when it is closed.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "step",
        initial: int = 0,
        stream: TextIO | None = None,
        leave: bool = True,
    ) -> None:
        self.total, self.label, self.unit, self.initial = total, printable(label), unit, initial
        self.done = initial
        self.note = ""
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last_line = time.monotonic()
        self._lines = 0
        self._news = False  # since the last line
        self._bar: tqdm[Any] | None = None
        self._lock = threading.Lock()  # for the lines: those of the watch below and those of the job
        self._closed = threading.Event()
        if not self._stream.isatty():
            threading.Thread(target=self._watch, name="progress", daemon=True).start()
        else:
            self._bar = tqdm(
                total=total,
                desc=self.label,
                unit=f" {unit}",
                initial=initial,
                leave=leave,
                file=getattr(self._stream, "unescaped", self._stream),
                dynamic_ncols=True,
            )

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count ``steps`` as done. ``note`` (best so far, loss) is shown until the next one."""
        self.update(self.done + steps, note)

    def update(self, done: float, note: str = "") -> None:
        """Say that ``done`` steps are done in all; shown as a whole number."""
        steps = round(done) - self.done
        with self._lock:
            self.done, self.note, self._news = self.done + steps, printable(note) or self.note, True
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(steps)
        else:
            self._line_if_due()

    def write(self, message: str) -> None:
        """Print a line of its own."""
        message = printable(message, keep="\n")
        if self._bar is not None:
            self._bar.write(message, file=getattr(self._stream, "unescaped", self._stream))
        else:
            with self._lock:
                print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar, or print the last state if lines have been printed and it is newer."""
        self._closed.set()
        if self._bar is not None:
            self._bar.close()
            return
        with self._lock:  # the watch has written its last line
            if self._lines and self._news:
                self._line()

    def _watch(self) -> None:
        """Write lines while no step ends, in a thread."""
        left = LINE_INTERVAL
        while not self._closed.wait(max(left, 0.01)):
            # The stream may be gone; the job's own next line will say so where somebody can deal with it.
            with contextlib.suppress(OSError, ValueError):
                self._line_if_due()
            left = self._last_line + LINE_INTERVAL - time.monotonic()

    def _line_if_due(self) -> None:
        with self._lock:
            if not self._closed.is_set() and time.monotonic() - self._last_line >= LINE_INTERVAL:
                self._line()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> None:
        now = time.monotonic()
        elapsed = now - self._start
        text = f"{self.label}: "
        if self.total is not None or self.done:
            text += f"{self.done}" + ("" if self.total is None else f"/{self.total}") + f" {self.unit}s, "
        text += f"{tqdm.format_interval(elapsed)} passed"
        steps = self.done - self.initial
        if self.total is not None and steps > 0:
            left = max(self.total - self.done, 0) * elapsed / steps
            text += f", {tqdm.format_interval(left)} left"
        print(text + (f", {self.note}" if self.note else ""), file=self._stream, flush=True)
        self._last_line, self._lines, self._news = now, self._lines + 1, False
