"""The other process that compares answers: math-verify and reasoning-gym, bounded in CPU time.

Any thread may ask it. The process starts with the first question, is started anew after one that it
did not survive, and ends with this program.
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
"""The file that the process runs."""

_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
"""Python that runs a file by its path, without its folder on sys.path, where its neighbours would
shadow libraries of their names."""

_PACKAGES = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}
"""Packages to install, by kind of question."""

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None
_owner_pid = 0


def math_verify(gold: str, texts: list[str]) -> list[tuple[bool, str | None]]:
    """Compare texts with the gold answer, which is LaTeX in a box or in dollars.

    Returns for each text whether it holds that answer, and the answer read in it or None. A text
    that used up the time or the memory counts as (False, None). Raises ConfigError where
    math-verify is not installed.
    """
    reply = _ask({"kind": "math_verify", "gold": gold, "texts": texts})
    if reply is None:
        # One text's hang must not take the others with it.
        return [math_verify(gold, [t])[0] for t in texts] if len(texts) > 1 else [(False, None)]
    return [(correct, extracted) for correct, extracted in reply["results"]]


def reasoning_gym(entry: dict[str, Any], answer: str) -> float:
    """Score an answer from 0 to 1 by the task's own scorer.

    `entry` holds the task, its options (the seed among them) and the problem's index. Raises
    ConfigError where reasoning-gym is not installed, or where the task's scorer runs answers as
    Python.
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
    """Send a question and return the reply, or None where the process ended over it."""
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
            # Interrupted between question and answer: the next question must not read this reply.
            _stop()
            raise
        if not line.endswith(b"\n"):
            # Without output it is ending: on a busy machine that may take a while.
            status = _stop(wait_s=30.0)
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
    """Return the process, started now where there is none."""
    global _process, _owner_pid
    # A forked child must not talk through its parent's pipes.
    if _process is None or _owner_pid != os.getpid():
        _process = subprocess.Popen(
            [sys.executable, "-c", _START, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Threads would add sums in changing order, and take time to start.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            # Ctrl-C is for the trainer, which may want to finish a step and its scores first.
            start_new_session=True,
        )
        _owner_pid = os.getpid()
    return _process


def _stop(wait_s: float = 1.0) -> int:
    """End the process, if it does not end by itself in time, and return its exit status."""
    global _process
    status = 0
    if _process is not None and _owner_pid == os.getpid():
        for pipe in (_process.stdin, _process.stdout):
            if pipe is not None:
                # Closing writes the rest of the buffer, which has no reader any more.
                with contextlib.suppress(OSError):
                    pipe.close()
        # With its pipes closed it is ending, unless it hangs in C.
        with contextlib.suppress(subprocess.TimeoutExpired):
            _process.wait(timeout=wait_s)
        _process.kill()
        status = _process.wait()
    _process = None
    return status
