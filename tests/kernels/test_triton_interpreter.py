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
MODULES = ("test_fused.py", "test_fused_fuzz.py", "test_fused_rounding.py", "test_triton_rows.py")


@pytest.mark.parametrize("module", MODULES)
def test_passes_in_the_interpreter(module):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module)]
    result = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
    assert "skipped" not in result.stdout
