"""Asks another process to compare answers: math-verify and reasoning-gym, bounded in CPU time.

Works from any thread. The process starts with the first question, is started anew after one that
it did not survive, and ends with this program.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from opsdc.errors import ConfigError

_PROGRAM = Path(__file__).with_name("grader_child.py")
# By path and without the package's folder on sys.path: its file names must shadow no library's.
_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
_PACKAGES = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None
_owner_pid = 0


def math_verify(gold: str, texts: list[str]) -> list[tuple[bool, str | None]]:
    """Per text: (does it hold the gold answer, what was found or None). Gold is LaTeX, boxed.

    Texts that used up the time or the memory count as (False, None).
    Raises ConfigError where math-verify is not installed.
    """
    reply = _ask({"kind": "math_verify", "gold": gold, "texts": texts})
    if reply is None:
        # One text's hang must not take the others with it.
        return [math_verify(gold, [t])[0] for t in texts] if len(texts) > 1 else [(False, None)]
    return [(correct, found) for correct, found in reply["results"]]


def reasoning_gym(entry: dict[str, Any], answer: str) -> float:
    """The task's own score of `answer`, 0 to 1. `entry` holds task, options (with seed), index.

    Raises ConfigError where reasoning-gym is not installed, or where the task's scorer cannot
    do without running answers as Python.
    """
    reply = _ask({"kind": "reasoning_gym", "entry": entry, "answer": answer})
    if reply is None:
        return 0.0
    if reply.get("unusable"):
        raise ConfigError(
            f"the scorer of reasoning_gym:{entry['task']} evaluates answers as Python, which OPSDC "
            "lets no model's output do; use eval.scorer exact, number or answer_line"
        )
    return float(reply["score"])


def _ask(request: dict[str, Any]) -> dict[str, Any] | None:
    """The reply, or None if the process ended over the question."""
    with _lock:
        process = _running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:
            # An interrupt between question and answer: the next question must not read this one's.
            _stop()
            raise
        if not line.endswith(b"\n"):
            status = _stop()
            # A signal is a limit at work (CPU time, memory); an exit status is a defect.
            if status >= 0:
                raise RuntimeError(f"{_PROGRAM} ended with status {status}; run it by hand")
            return None
    reply: dict[str, Any] = json.loads(line)
    if "missing" in reply:
        package = _PACKAGES[request["kind"]]
        raise ConfigError(
            f"scorer '{request['kind']}' needs the package {package} (no module named "
            f"'{reply['missing']}'): pip install \"opsdc[eval]\""
        )
    return reply


def _running() -> subprocess.Popen[bytes]:
    global _process, _owner_pid
    # A forked child must not talk through its parent's pipes.
    if _process is None or _owner_pid != os.getpid():
        _process = subprocess.Popen(
            [sys.executable, "-c", _START, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Sums of fixed order, and no pool of threads to start for each process.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            # Ctrl-C is for the trainer, which may want to finish a step and its scores first.
            start_new_session=True,
        )
        _owner_pid = os.getpid()
    return _process


def _stop() -> int:
    """Ends the process, if it has not ended itself, and says how it ended."""
    global _process
    status = 0
    if _process is not None and _owner_pid == os.getpid():
        for pipe in (_process.stdin, _process.stdout):
            if pipe is not None:
                # What was left to write has no reader any more.
                with contextlib.suppress(OSError):
                    pipe.close()
        # Its pipes are closed, so it is ending; a hang in C is not worth more than a second.
        with contextlib.suppress(subprocess.TimeoutExpired):
            _process.wait(timeout=1.0)
        _process.kill()
        status = _process.wait()
    _process = None
    return status
