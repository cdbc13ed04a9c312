"""One JSON message each way over a socket: 8 bytes of length, then UTF-8; never past a deadline.

Plain data only: nothing that arrives is unpickled, imported or run. A timeout on single reads would
let a peer that sends a byte now and then hold us for ever, so that every read is given what is left
until the deadline, a `time.monotonic()` value.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

from opsdc.ranks import stop

MAX_BYTES = 1 << 28
_LENGTH = struct.Struct(">Q")
# How soon a wait for the peer is left when the process is asked to stop.
POLL_S = 0.5


class WireError(Exception):
    """The peer closed, stalled, or sent something that is no message."""


def send(connection: socket.socket, message: dict[str, Any], deadline: float) -> None:
    """Raises WireError."""
    body = json.dumps(message).encode()
    _limit(connection, deadline)
    try:
        connection.sendall(_LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise WireError(f"cannot send: {error or type(error).__name__}") from error


def receive(connection: socket.socket, deadline: float) -> dict[str, Any]:
    """Raises WireError."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    if length > MAX_BYTES:
        raise WireError(f"announced {length} bytes, more than any message has")
    try:
        message = json.loads(_exactly(connection, length, deadline))
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"not a message but a {type(message).__name__}")
    return message


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    missing = count
    while missing:
        _limit(connection, min(deadline, time.monotonic() + POLL_S))
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


def _limit(connection: socket.socket, deadline: float) -> None:
    # Not 0, which would mean not to wait at all, and be another error.
    connection.settimeout(max(deadline - time.monotonic(), 1e-3))
