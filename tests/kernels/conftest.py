"""Tests of the kernels run on one thread: results repeat, and tiny shapes are faster."""

import os

import pytest
import torch
from helpers.interpreter import PROCESSES, Interpreter

from opsdc_kernels.row_pass import build, compiled


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["compiled", "torch"])
def row_passes(request):
    """A module's tests with the row passes in C, then with those in torch."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setenv(build.SWITCH, "1" if request.param == "compiled" else "0")
        if request.param == "compiled" and compiled.native().dll is None:
            pytest.skip(f"row passes run in {compiled.native().description}")
        yield request.param


@pytest.fixture(scope="session")
def interpreter():
    processes = Interpreter()
    yield processes
    processes.close()


@pytest.fixture(scope="session", autouse=True)
def interpreter_ahead(request):
    """Where they will be needed, the interpreter's processes start first and run beside the other
    tests. (Of pytest-xdist's workers each starts the one that it is asked for.)"""
    needed = any("interpreter" in getattr(x, "fixturenames", ()) for x in request.session.items)
    if needed and "PYTEST_XDIST_WORKER" not in os.environ:
        for i in range(len(PROCESSES)):
            request.getfixturevalue("interpreter").start(i)
