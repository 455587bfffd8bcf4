"""Commands that are ended from outside end as cleanly as from the keyboard."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

#: What ends a command besides Ctrl-C: whoever ends a job, and a terminal or connection that is closed.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def handled(handler: Callable[..., Any], *numbers: int) -> Iterator[None]:
    """Within it ``handler`` takes signals; one that is ignored (``nohup``) stays so.

    Args:
        handler: as of :func:`signal.signal`.
        numbers: of the signals.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextlib.contextmanager
def interrupted_from_outside() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise KeyboardInterrupt, once: what follows is cleaning up."""

    def interrupt(*_: Any) -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with handled(interrupt, *_ENDING):
        yield
