"""The end of a run by signals: the first SIGTERM or SIGINT asks, the second ends it at once.

No work is interrupted in the middle. Long work calls `check()` where it can be left: a sampler at
every token, an update between micro-batches. `Stopped` then unwinds to the trainer, which saves the
state before the unfinished step, so that a resumed run does that step exactly as it would have been
done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""These signals ask a run to stop."""

_SAME_REQUEST_S = 5.0
"""Under torchrun a second signal within this time is the same request, which torchrun passes on
after a scheduler has sent it to the whole group."""

# A signal is sent to the whole process, so its state is the process's too.
_requested: signal.Signals | None = None
_installed = False
_held_back = False
_exchange: Callable[[str | None], str | None] | None = None
_asked_at = 0.0


class Stopped(BaseException):
    """A signal's request to stop, with the signal's name as its text.

    It is no `Exception`, as KeyboardInterrupt is none, so that no handler stops it on its way.
    """


def requested() -> str | None:
    """Return the name of the signal that has asked to stop, here or on another rank, or None."""
    name = None if _requested is None else _requested.name
    return name if _exchange is None else _exchange(name)


def check() -> None:
    """Raise Stopped if a signal has asked to stop."""
    name = None if _held_back else requested()
    if name is not None:
        raise Stopped(name)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let `check` pass within the block, so that its work is done to the end."""
    global _held_back
    before, _held_back = _held_back, True
    try:
        yield
    finally:
        _held_back = before


def set_exchange(exchange: Callable[[str | None], str | None] | None) -> None:
    """Set how ranks share their signals; None: they do not.

    `exchange` is given this process's signal, or None, and returns the signal that holds for all.
    """
    global _exchange
    _exchange = exchange


@contextlib.contextmanager
def on_signal() -> Iterator[None]:
    """Let signals ask within the block instead of ending the process.

    Earlier handlers return afterwards. Outside the main thread, where Python takes no handlers, and
    inside another such block this does nothing.
    """
    global _requested, _installed
    if _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _installed = True
    try:
        for number in _SIGNALS:
            # A signal that is ignored from the start (nohup, a background job) stays so.
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, _ask)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _requested, _installed = None, False


def _ask(number: int, frame: FrameType | None) -> None:
    """Handle a signal: note the first, end the process by the second."""
    global _requested, _asked_at
    if _requested is not None:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if launched and time.monotonic() - _asked_at < _SAME_REQUEST_S:
            return
        # The default handler ends the process, and the parent sees the signal in its status.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _requested, _asked_at = signal.Signals(number), time.monotonic()
    # print could fail here: a handler may run in the middle of another print to the stream.
    name = _requested.name
    os.write(2, f"{name}: leaving the step and saving; once more ends at once\n".encode())
