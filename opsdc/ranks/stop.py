"""Leaving a run well: the first SIGTERM or SIGINT asks, the second ends the process at once.

Nobody is interrupted in the middle of anything. Long work asks `check()` where it can be left: a
sampler at every token, an update between micro-batches. `Stopped` then unwinds to the trainer,
which saves the state before the unfinished step, so that it replays exactly.
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
# A signal is the whole process's, and so is what is known about it.
_requested: signal.Signals | None = None
_installed = False
_held_back = False
_exchange: Callable[[str | None], str | None] | None = None
_asked_at = 0.0
# torchrun passes on what a scheduler has sent to the whole group: twice the same request.
_SAME_REQUEST_S = 5.0


class Stopped(BaseException):
    """A signal asked to stop; its text is the signal's name.

    Like KeyboardInterrupt no `Exception`: it must pass everything on its way to the trainer.
    """


def requested() -> str | None:
    """Name of the signal that has asked to stop, here or on another rank."""
    name = None if _requested is None else _requested.name
    return name if _exchange is None else _exchange(name)


def check() -> None:
    """Raise Stopped if a signal has asked to stop."""
    name = None if _held_back else requested()
    if name is not None:
        raise Stopped(name)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within the block `check` passes: what has begun there is done to its end."""
    global _held_back
    before, _held_back = _held_back, True
    try:
        yield
    finally:
        _held_back = before


def tell_others(exchange: Callable[[str | None], str | None] | None) -> None:
    """From now on `exchange(own signal or None)` says what is asked of all ranks together."""
    global _exchange
    _exchange = exchange


@contextlib.contextmanager
def on_signal() -> Iterator[None]:
    """Within the block signals ask instead of ending the process; what was there before returns.

    Outside the main thread, where Python takes no handlers, and inside another such block this
    does nothing.
    """
    global _requested, _installed
    if _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _installed = True
    try:
        for number in _SIGNALS:
            # Ignored by whoever started us (nohup, a shell's background job): stays ignored.
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, _ask)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _requested, _installed = None, False


def _ask(number: int, frame: FrameType | None) -> None:
    global _requested, _asked_at
    if _requested is not None:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if launched and time.monotonic() - _asked_at < _SAME_REQUEST_S:
            return
        # As if no handler had ever been there: the parent sees the signal in the exit status.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _requested, _asked_at = signal.Signals(number), time.monotonic()
    # Not print: a handler may run in the middle of another print to the same stream.
    name = _requested.name
    os.write(2, f"{name}: leaving the step and saving; once more ends at once\n".encode())
