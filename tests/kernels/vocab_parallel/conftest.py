"""One set of processes for all tests of shards."""

import pytest
from helpers.kernel_ranks import Ranks


@pytest.fixture(scope="package")
def ranks(tmp_path_factory):
    processes = Ranks(tmp_path_factory.mktemp("gloo") / "store")
    yield processes
    processes.close()
