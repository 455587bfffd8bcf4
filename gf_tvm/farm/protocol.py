"""The handshakes of TVM's RPC server and tracker, spoken with a deadline on every step.

TVM's own Python client and server wait without a limit for whatever the other side does not send. Only the handshakes
are spoken here: what follows them on an RPC connection is TVM's C++ on both sides (``rpc.Connect`` and
``rpc.ServerLoop``). The tracker's messages are JSON behind a 4-byte length. Numbers: tvm/rpc/base.py.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from typing import Any

from ..errors import FarmError

RPC_MAGIC = 0xFF271
RPC_MISMATCH = RPC_MAGIC + 2
TRACKER_MAGIC = 0x2F271
SUCCESS = 0
_PUT, _REQUEST, _UPDATE_INFO, _SUMMARY, _PENDING = 3, 4, 5, 6, 7

#: Longest key or message that is believed; TVM's tracker has the same limit.
MAX_MESSAGE = 1 << 20
MAX_KEY = 4096

Address = tuple[str, int]


class TrackerLost(FarmError):
    """The tracker cannot be reached, does not answer in time, or is no tracker."""


def show(address: Address) -> str:
    """``HOST:PORT`` for people."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def new_match_key(key: str) -> str:
    """A key that admits one client, as TVM makes them: the board's key and a random number."""
    return f"{key}:{random.SystemRandom().random()}"


def keep_alive(connection: socket.socket) -> None:
    """Let the system find out within about a minute that the other machine is gone; TVM would wait for ever."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class ClientHello:
    """What a client sends first, collected piece by piece: magic number, length, ``client:KEY [-timeout=S]``."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> tuple[str, float | None] | None:
        """Add what came in.

        Returns:
            (match key, seconds that the session may last or None) when complete, else None.

        Raises:
            ValueError: this is no client of TVM's.
        """
        self._data += data
        if len(self._data) >= 4 and struct.unpack("<i", self._data[:4])[0] != RPC_MAGIC:
            raise ValueError("does not speak TVM's RPC protocol")
        if len(self._data) < 8:
            return None
        length = struct.unpack("<i", self._data[4:8])[0]
        if not 0 < length <= MAX_KEY:
            raise ValueError(f"sent a key of {length} bytes")
        if len(self._data) < 8 + length:
            return None
        words = self._data[8 : 8 + length].decode("utf-8", "replace").split()
        if not words:
            raise ValueError("sent an empty key")
        timeout = None
        for word in words[1:]:
            if word.startswith("-timeout="):
                timeout = float(word.removeprefix("-timeout="))
        # TVM's C++ client puts "client:" in front of the key that it is given.
        return words[0].removeprefix("client:"), timeout

    @staticmethod
    def accept(key: str) -> bytes:
        """The answer to a client with the right key; the session follows."""
        name = f"server:{key}".encode()
        return struct.pack("<ii", RPC_MAGIC, len(name)) + name

    @staticmethod
    def refuse() -> bytes:
        """The answer to a client with another key."""
        return struct.pack("<i", RPC_MISMATCH)


class TrackerConnection:
    """A connection to TVM's tracker.

    Args:
        address: of the tracker.
        timeout: seconds for connecting, and for each answer.

    Raises:
        TrackerLost: here and in every method; the connection is closed then.
    """

    def __init__(self, address: Address, timeout: float = 5.0) -> None:
        self.address = address
        self.timeout = timeout
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.create_connection(address, timeout)
            keep_alive(self._socket)
            self._socket.sendall(struct.pack("<i", TRACKER_MAGIC))
            magic = struct.unpack("<i", self._receive(4, time.monotonic() + timeout))[0]
        except OSError as error:
            raise self._lost(error) from None
        if magic != TRACKER_MAGIC:
            self.close()
            raise TrackerLost(f"there is something at {show(address)}, but not a tracker of TVM")

    def __enter__(self) -> TrackerConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; harmless when repeated."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def fileno(self) -> int:
        """For select()."""
        return -1 if self._socket is None else self._socket.fileno()

    def _lost(self, error: Exception) -> TrackerLost:
        self.close()
        reason = "no answer in time" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        return TrackerLost(f"the tracker at {show(self.address)} cannot be reached: {reason}")

    def _receive(self, count: int, deadline: float) -> bytes:
        if self._socket is None:
            raise ConnectionError("the connection is closed")
        data = b""
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            piece = self._socket.recv(count - len(data))
            if not piece:
                raise ConnectionError("it closed the connection")
            data += piece
        return data

    def _call(self, message: list[Any], timeout: float | None = None) -> Any:
        data = json.dumps(message).encode()
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        try:
            if self._socket is None:
                raise ConnectionError("the connection is closed")
            self._socket.settimeout(self.timeout)
            self._socket.sendall(struct.pack("<i", len(data)) + data)
            size = struct.unpack("<i", self._receive(4, deadline))[0]
            if not 0 < size <= MAX_MESSAGE:
                raise ConnectionError(f"it sent a message of {size} bytes")
            return json.loads(self._receive(size, deadline))
        except RecursionError:  # brackets in brackets in brackets
            raise self._lost(ConnectionError("it sent nonsense")) from None
        except (OSError, ValueError) as error:
            raise self._lost(error) from None

    def _expect_success(self, message: list[Any]) -> None:
        if self._call(message) != SUCCESS:
            self.close()
            raise TrackerLost(f"the tracker at {show(self.address)} refused a message")

    def update_info(self, info: dict[str, Any]) -> None:
        """Tell what this server is. ``info`` needs "key" ("server:KEY") and "addr" ([host or None, port])."""
        self._expect_success([_UPDATE_INFO, info])

    def put(self, key: str, port: int, match_key: str, host: str | None) -> None:
        """Offer this server to one client, who will come with ``match_key``."""
        self._expect_success([_PUT, key, [port, match_key], host])

    def pending_match_keys(self) -> list[str]:
        """The offers of this connection that nobody has taken."""
        keys = self._call([_PENDING])
        return [str(key) for key in keys] if isinstance(keys, list) else []

    def summary(self) -> dict[str, Any]:
        """What the tracker knows: ``queue_info`` by key and ``server_info``, a list."""
        answer = self._call([_SUMMARY])
        if not (isinstance(answer, list) and len(answer) == 2 and isinstance(answer[1], dict)):
            self.close()
            raise TrackerLost(f"the tracker at {show(self.address)} sent no summary")
        return answer[1]

    def request(self, key: str, timeout: float, priority: int = 1) -> tuple[Address, str] | None:
        """Ask for a server and wait for one.

        The tracker has no way to take a request back but closing the connection; this closes it after ``timeout``.

        Returns:
            (address, match key), or None if no server became free in ``timeout`` seconds.
        """
        try:
            answer = self._call([_REQUEST, key, "", priority], timeout)
        except TrackerLost as lost:
            if "in time" in str(lost):
                return None
            raise
        try:
            code, (host, port, match_key) = answer
            if code == SUCCESS and 0 < int(port) < 1 << 16:
                return (str(host), int(port)), str(match_key)
        except (TypeError, ValueError, OverflowError):
            pass
        self.close()
        raise TrackerLost(f"the tracker at {show(self.address)} did not grant a server for {key!r}")
