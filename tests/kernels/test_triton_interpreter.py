"""Runs the tests of the Triton kernels in the interpreter, in processes of their own.

`TRITON_INTERPRET` must be set before triton is imported and forbids compiling in that process, so
the modules below skip themselves here and pass there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# About equal times; two processes for two cores.
PROCESSES = (
    ("test_fused.py",),
    ("test_fused_autograd.py", "test_fused_rounding.py", "test_triton_rows.py"),
)


@pytest.fixture(scope="module")
def outputs():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    running = [
        subprocess.Popen(
            [*command, *(str(HERE / name) for name in names)],
            env=environment,
            cwd=HERE.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for names in PROCESSES
    ]
    return [(process.communicate()[0], process.returncode) for process in running]


@pytest.mark.parametrize("i", range(len(PROCESSES)), ids=[" ".join(names) for names in PROCESSES])
def test_passes_in_the_interpreter(i, outputs):
    output, status = outputs[i]
    assert status == 0, output[-8000:]
    assert re.search(r"\d+ passed", output)
    assert "skipped" not in output
