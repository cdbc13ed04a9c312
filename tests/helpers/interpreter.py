"""pytest in Triton's interpreter, for the tests that need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "kernels"
# About equal times; two processes for two cores.
PROCESSES = (
    ("fused/test_forward.py",),
    ("fused/test_op.py", "fused/test_backward.py", "row_pass/test_kernels.py"),
)


class Interpreter:
    """The processes, each running or finished once it was started."""

    def __init__(self):
        self.running = {}

    def start(self, i):
        """Start process i, if nobody has."""
        if i in self.running:
            return
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        self.running[i] = subprocess.Popen(
            [*command, *(str(TESTS / name) for name in PROCESSES[i])],
            env=environment,
            cwd=TESTS.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def outcome(self, i):
        """(output, exit status) of a process."""
        self.start(i)
        return self.running[i].communicate()[0], self.running[i].returncode

    def close(self):
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.communicate()
