"""Runs the tests of the Triton kernels in the interpreter, in processes of their own.

`TRITON_INTERPRET` must be set before triton is imported and forbids compiling in that process, so
the modules below skip themselves here and pass there. The processes start with the first test of
the kernels (see `conftest`), beside the others.
"""

import re

import pytest
from helpers.interpreter import PROCESSES

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("i", range(len(PROCESSES)), ids=[" ".join(names) for names in PROCESSES])
def test_passes_in_the_interpreter(i, interpreter):
    output, status = interpreter.outcome(i)
    assert status == 0, output[-8000:]
    assert re.search(r"\d+ passed", output)
    assert "skipped" not in output
