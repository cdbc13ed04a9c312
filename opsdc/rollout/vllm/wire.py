"""One JSON message each way over a socket: 8 bytes of length, then UTF-8, before a deadline.

Messages are plain data: nothing that arrives is unpickled, imported or run. A deadline is a value
of `time.monotonic()`, and every read gets the time that is left until it. A timeout on single reads
would let a peer that sends a byte now and then hold this process for ever.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

from opsdc.ranks import stop

MAX_BYTES = 1 << 28
"""A message that announces more bytes is refused."""

_LENGTH = struct.Struct(">Q")
"""A message begins with its length in this form."""

POLL_S = 0.5
"""A wait for the peer looks this often whether the process was asked to stop."""


class WireError(Exception):
    """An exchange that failed, because the peer closed, stalled or sent no message."""


def send(connection: socket.socket, message: dict[str, Any], deadline: float) -> None:
    """Send one message; raise WireError where the peer does not take it in time."""
    body = json.dumps(message).encode()
    _set_timeout(connection, deadline)
    try:
        connection.sendall(_LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise WireError(f"cannot send: {error or type(error).__name__}") from error


def receive(connection: socket.socket, deadline: float) -> dict[str, Any]:
    """Receive one message; raise WireError for anything else, or when it is late."""
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size, deadline))
    if length > MAX_BYTES:
        raise WireError(f"announced {length} bytes, more than any message has")
    try:
        message = json.loads(_receive_exactly(connection, length, deadline))
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"not a message but a {type(message).__name__}")
    return message


def _receive_exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    """Receive `count` bytes, leaving the wait when the process is asked to stop."""
    parts: list[bytes] = []
    missing = count
    while missing:
        _set_timeout(connection, min(deadline, time.monotonic() + POLL_S))
        try:
            part = connection.recv(min(missing, 1 << 20))
        except TimeoutError:
            stop.check()
            if time.monotonic() < deadline:
                continue
            raise WireError("no answer in time") from None
        except OSError as error:
            raise WireError(f"no answer: {error or type(error).__name__}") from error
        if not part:
            raise WireError(f"closed after {count - missing} of {count} bytes")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _set_timeout(connection: socket.socket, deadline: float) -> None:
    """Let the next operation on a socket wait until the deadline."""
    # A timeout of 0 would make the socket non-blocking, which ends in another error.
    connection.settimeout(max(deadline - time.monotonic(), 1e-3))
