"""TVM's tracker with bounds: what one client says, or does not say, keeps no other from being served.

TVM's own tracker believes what it is told. A registration of the wrong type, or one so long that the list no longer
fits a message, ends every later request for the list; connections that nobody uses take all file descriptors, and then
it runs for ever at full speed. Here each message is checked before TVM's code sees it, and connections, their idle time
and what is kept for each are bounded. The protocol stays TVM's.
"""

from __future__ import annotations

import heapq
import json
import logging
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tornado.ioloop import PeriodicCallback
from tvm.rpc import base, tracker

from .protocol import MAX_MESSAGE, keep_alive, show

_MOST_CONNECTIONS = 512
_SPARE_FILES = 64  # descriptors for everything else
_HELLO_SECONDS = 10.0
# TVM's clients keep a connection between two requests.
_IDLE_SECONDS = 600.0
_SWEEP_SECONDS = 2.0
# A client waits for the list for a few seconds only, and reads no more than a message.
_MOST_LIST = MAX_MESSAGE * 3 // 4
_MOST_INFO = 8192  # ours are of 1500 bytes
_LONGEST_WORD = 200
_MOST_OFFERS = 64
_MOST_KEYS = 1000
_MOST_UNREAD = 2 * MAX_MESSAGE
# Lines about strangers in a minute.
_MOST_LINES = 20

_CODE = base.TrackerCode


class BoundedTracker(tracker.TrackerServerHandler):  # type: ignore[misc]
    """TVM's tracker on a socket that listens.

    Args:
        listener: the socket.
        say: called with a line of text about clients that are refused.
    """

    _scheduler_map: dict[str, _Scheduler]
    _connections: set[BoundedConnection]

    def __init__(self, listener: socket.socket, say: Callable[[str], None]) -> None:
        logging.getLogger("RPCTracker").setLevel(logging.CRITICAL)  # it shows tracebacks of what strangers send
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MOST_CONNECTIONS + _SPARE_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self._most = (
            _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(_MOST_CONNECTIONS, soft - _SPARE_FILES)
        )
        self._say_line = say
        self._said: list[float] = []
        super().__init__(listener, base.random_key("tracker"))
        self._sweeper = PeriodicCallback(self._sweep, 1000 * _SWEEP_SECONDS)
        self._sweeper.start()

    def say(self, line: str) -> None:
        """Say a line, unless there were too many lately."""
        now = time.monotonic()
        self._said = [at for at in self._said if now - at < 60] + [now]
        if len(self._said) <= _MOST_LINES:
            self._say_line(line)
        elif len(self._said) == _MOST_LINES + 1:
            self._say_line("further lines like these are left out for a while")
        else:
            self._said.pop()

    # ----------------------------------------------------------------------------------------------------- connections

    def _on_event(self, _: Any) -> None:
        while True:
            try:
                connection, address = self._sock.accept()
            except OSError:  # nothing more to accept; or no descriptor for it, and no use in trying at once
                return
            if len(self._connections) >= self._most and not self._make_room():
                self.say(f"refused {show(address[:2])}: there are {self._most} connections")
                connection.close()
                continue
            with suppress(OSError):
                keep_alive(connection)
            BoundedConnection(self, connection, address)

    def _make_room(self) -> bool:
        """Close the connection that has been of no use for longest. Returns whether there was one."""
        useless = [connection for connection in self._connections if connection.useless]
        if not useless:
            return False
        oldest = min(useless, key=lambda connection: connection.heard)
        oldest.refuse(f"there are {self._most} connections, and it does nothing")
        return True

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections):
            limit = _IDLE_SECONDS if connection.greeted else _HELLO_SECONDS
            if connection.useless and now - connection.heard > limit:
                connection.refuse(f"it said nothing for {limit:.0f} s")

    # -------------------------------------------------------------------------------------------- what TVM's code asks

    def create_scheduler(self, key: str) -> _Scheduler:
        return _Scheduler(key)

    def has_room_for(self, key: str) -> bool:
        """Whether ``key`` is known or may become so."""
        if key not in self._scheduler_map and len(self._scheduler_map) >= _MOST_KEYS:
            self._forget_keys()
        return key in self._scheduler_map or len(self._scheduler_map) < _MOST_KEYS

    def _forget_keys(self) -> None:
        self._scheduler_map = {key: found for key, found in self._scheduler_map.items() if found.used}

    def close(self, connection: BoundedConnection) -> None:
        """A connection is closed: nobody waits there any more, and its offers are void."""
        self._connections.discard(connection)
        for scheduler in self._scheduler_map.values():
            scheduler.forget(connection)
        self._forget_keys()

    def summary(self) -> dict[str, Any]:
        """TVM's summary, cut to what a client reads."""
        found: dict[str, Any] = super().summary()
        room = _MOST_LIST - len(json.dumps(found["queue_info"]))
        entries = []
        for entry in found["server_info"]:
            room -= len(json.dumps(entry)) + 2
            if room < 0:
                self.say("there are more servers than the list has room for")
                break
            entries.append(entry)
        return {**found, "server_info": entries}


class _Scheduler(tracker.PriorityScheduler):  # type: ignore[misc]
    """TVM's queue of offers and requests for one key."""

    _values: list[Any]
    _requests: list[Any]

    @property
    def used(self) -> bool:
        """Whether anything waits in it."""
        return bool(self._values or self._requests)

    def forget(self, connection: BoundedConnection) -> None:
        """Drop the offers and requests of a connection."""
        self._values = [value for value in self._values if value[0] is not connection]
        self._requests = [request for request in self._requests if request[-1].__self__ is not connection]
        heapq.heapify(self._requests)


class BoundedConnection(tracker.TCPEventHandler):  # type: ignore[misc]
    """One client.

    Attributes:
        greeted: it has said that it speaks the protocol.
        heard: when it said something last, on the monotonic clock.
    """

    def __init__(self, server: BoundedTracker, connection: socket.socket, address: Any) -> None:
        self.greeted = False
        self.heard = time.monotonic()
        self._waits = False
        self._start = b""
        super().__init__(server, connection, address)

    @property
    def useless(self) -> bool:
        """Whether it is neither a server's nor waits for one."""
        return not self._info and not self._waits

    def refuse(self, reason: str) -> None:
        """Close the connection and say why."""
        if self._sock is not None:
            self._tracker.say(f"closed the connection of {show(self._addr[:2])}: {reason}")
            self.close()

    def on_message(self, message: bytes) -> None:
        """Bytes have come; the first four say what is spoken."""
        self.heard = time.monotonic()
        try:
            if not self.greeted:
                self._start += message
                if len(self._start) < 4:
                    return
                hello, message = self._start[:4], self._start[4:]
                if int.from_bytes(hello, "little") != base.RPC_TRACKER_MAGIC:
                    self.refuse("it does not speak TVM's protocol")
                    return
                self.greeted, self._init_req_nbytes = True, 0
                self.write_message(hello)
            if message and self._sock is not None:
                super().on_message(message)
        except (OSError, ValueError) as error:  # it went away, or its bytes are no text
            self.refuse(str(error))

    def call_handler(self, args: Any) -> None:
        """A message has come."""
        if self._sock is None:
            return
        if complaint := self._complaint(args):
            self.refuse(complaint)
            return
        if args[0] == _CODE.REQUEST:
            # TVM's own callback would not say whose it is when the connection closes.
            self._waits = True
            self._tracker.request(args[1], args[2], args[3], self._grant)
            return
        super().call_handler(args)
        self.put_values.clear()  # which TVM keeps for ever; BoundedTracker.close does without

    def _grant(self, value: Any) -> bool:
        """A server is there for this client; returns whether it takes it."""
        if self._sock is None:
            return False
        self._waits = False
        try:
            self.ret_value([_CODE.SUCCESS, value])
        except OSError:
            return False
        return self._sock is not None

    def ret_value(self, data: Any) -> None:
        """Answer."""
        super().ret_value(data)
        if sum(map(len, self._pending_write)) > _MOST_UNREAD:
            self.refuse("it does not read its answers")

    def _complaint(self, args: Any) -> str:
        """Why a message is not believed; empty if it is."""
        if not isinstance(args, list) or not args or type(args[0]) is not int:
            return "its message is no list that begins with a number"
        code, rest = args[0], args[1:]
        checks: dict[int, Callable[[], bool]] = {
            _CODE.PING: lambda: True,
            _CODE.GET_PENDING_MATCHKEYS: lambda: True,
            _CODE.SUMMARY: lambda: True,
            _CODE.STOP: lambda: len(rest) == 1 and isinstance(rest[0], str),
            _CODE.PUT: lambda: self._is_offer(rest),
            _CODE.REQUEST: lambda: self._is_request(rest),
            _CODE.UPDATE_INFO: lambda: len(rest) == 1 and _is_info(rest[0], self._info),
        }
        if code not in checks:
            return f"there is no message {code}"
        return "" if checks[code]() else f"what it says in message {code} makes no sense, or is too long"

    def _is_offer(self, rest: list[Any]) -> bool:
        if not (2 <= len(rest) <= 3 and _is_word(rest[0]) and isinstance(rest[1], list) and len(rest[1]) == 2):
            return False
        port, match_key = rest[1]
        host = rest[2] if len(rest) == 3 else None
        new = _is_word(match_key) and match_key not in self.pending_matchkeys
        room = len(self.pending_matchkeys) < _MOST_OFFERS and self._tracker.has_room_for(rest[0])
        return new and room and _is_address([host, port])

    def _is_request(self, rest: list[Any]) -> bool:
        if not (len(rest) == 3 and _is_word(rest[0]) and isinstance(rest[1], str) and len(rest[1]) <= _LONGEST_WORD):
            return False
        number = type(rest[2]) is int and abs(rest[2]) < 1 << 31
        return number and not self._waits and self._tracker.has_room_for(rest[0])


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_WORD


def _is_address(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    host, port = value
    return (host is None or _is_word(host)) and type(port) is int and 0 <= port < 1 << 16


def _is_info(value: Any, known: dict[str, Any]) -> bool:
    if not (isinstance(value, dict) and _is_word(value.get("key")) and _is_address(value.get("addr"))):
        return False
    return len(json.dumps({**known, **value})) <= _MOST_INFO
