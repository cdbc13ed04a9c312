"""Which tests run here, and why the others do not: skipped ones stand in the closing summary."""

import os
import sys
from pathlib import Path

# Before torch is loaded, and for the processes that tests start: two workers with a thread each do
# not wait for one another, as two with all cores each would.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# For `from helpers import …`; and, as for `python examples/…`, files there import one another.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="takes minutes: `make test-slow`")
    gpu = pytest.mark.skip(reason="needs a CUDA or ROCm device: `make test-gpu` on one")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)
