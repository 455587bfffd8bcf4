"""The way to one board: its link process, and the state of what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from .link import Link, new_link
from .messages import Operation, request_text
from .process import Process


class State(Enum):
    """What a session does or waits for; messages have the values."""

    CLOSED = "closed"  # until it is time to ask the tracker
    STARTING = "starting"  # the link process
    CONNECTING = "connecting"
    GREETING = "greeting"
    PREPARING = "preparing"
    UPLOADING = "uploading"
    RUNNING = "running"
    RESTING = "resting"  # it cools down
    FREE = "free"
    ASIDE = "aside"  # held without work: the tracker would only give it again


#: The link process owes an answer.
BUSY = frozenset(
    {
        *(State.STARTING, State.CONNECTING, State.GREETING, State.PREPARING, State.UPLOADING, State.RUNNING),
        State.RESTING,
    }
)
#: There is a session with a board.
HELD = frozenset(State) - {State.CLOSED, State.STARTING, State.CONNECTING}


class BoardLink:
    """A link process and the board behind it.

    Args:
        number: tells links apart.

    Attributes:
        state: see :class:`State`.
        process: of the link; None if there is none.
        name: of the board, once it has told it.
        address: of the board, once the tracker has given it.
        heard: when the board answered last, on the monotonic clock.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = State.CLOSED
        self.process: Process | None = None
        self.name = ""
        self.address = ""
        self.heard = 0.0

    @property
    def label(self) -> str:
        """For messages."""
        return self.name or self.address or "a board"

    @property
    def connected(self) -> bool:
        """Whether the board works or could work."""
        return self.state in HELD and self.state is not State.ASIDE

    @property
    def waited_for(self) -> Process | None:
        """The link process, if it owes an answer."""
        return self.process if self.state in BUSY else None

    def start_process(self, folder: Path) -> bool:
        """Start the link process, with its output in ``folder``. Returns whether one was there and can be used."""
        if self.process is not None and self.process.alive:
            return True
        self.hang_up()
        self.process = Process(f"link-{self.number}", 1, folder, new_link)
        self.state = State.STARTING
        return False

    def hang_up(self) -> None:
        """End the process, and with it the session; harmless when repeated."""
        if self.process is not None:
            self.process.end()
            self.process = None
        self.state = State.CLOSED
        self.name, self.address = "", ""

    def ask(self, state: State, timeout: float, request: Callable[..., Any], /, **arguments: Any) -> None:
        """Make a request of the link process.

        Args:
            state: until it answers.
            timeout: seconds.
            request: a method of :class:`~gf_tvm.tuning.measuring.link.Link`.
            arguments: of the method.
        """
        assert self.process is not None
        self.state = state
        self.process.send(None, request, timeout, **arguments)

    def call(self, state: State, timeout: float, operation: Operation, /, **arguments: Any) -> None:
        """Make a request of the board."""
        self.ask(state, timeout, Link.call, request=request_text(operation, **arguments))
