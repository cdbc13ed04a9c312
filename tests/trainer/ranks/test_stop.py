"""The handlers themselves; what a stopped run leaves is in test_chaos.py."""

import signal
import threading

import pytest

from opsdc.ranks import stop


def test_the_first_signal_asks_and_handlers_return():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop.on_signal():
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stop.Stopped, match="SIGTERM"):
            stop.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    stop.check()


def test_blocks_nest_and_the_outer_one_owns_the_handlers():
    with stop.on_signal():
        with stop.on_signal():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stop.Stopped, match="SIGTERM"):
            stop.check()


def test_no_except_clause_of_others_swallows_it():
    assert not issubclass(stop.Stopped, Exception)


def test_in_another_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside():
        with stop.on_signal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.on_signal():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
