"""What C is compiled with, where it is kept, and what is loaded from where."""

import ast
import os
import shutil
import stat
import subprocess
import sys

import pytest

from opsdc_kernels.row_pass import build, compiled

SOURCE = compiled.SOURCE

pytestmark = pytest.mark.skipif(
    compiled.native().dll is None, reason=f"row passes run in {compiled.native().description}"
)


@pytest.mark.whole
def test_without_a_compiler_torch_runs():
    """The same results within the budget, and the plan says why."""
    code = (
        "import torch\nfrom opsdc_kernels import plan, testing\n"
        "case = testing.make_case(tokens=3, dim=16, vocab_size=500, entropy=1.0, kl=1e-3)\n"
        "testing.assert_accurate(case, backend='chunked')\n"
        "print(plan.estimate(tokens=3, vocab_size=500, student_dim=16).row_passes)"
    )
    environment = {**os.environ, "PATH": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("CC", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "torch (no C compiler: cc, gcc, clang not found)"


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert compiled.native().dll is None
    assert compiled.native().description == f"torch ({broken} or its cache failed: out of order)"


COMPILER = shutil.which("cc") or "cc"


def test_built_once_in_a_directory_of_ours(tmp_path):
    directory = tmp_path / "cache" / "opsdc_kernels"
    build.load(COMPILER, SOURCE, directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (made,) = directory.iterdir()
    before = made.stat().st_mtime_ns
    build.load(COMPILER, SOURCE, directory)
    assert made.stat().st_mtime_ns == before
    # Another source, and the same under another header, are other libraries.
    (tmp_path / "rows.c").write_text(SOURCE.read_text("utf-8") + "\n")
    header = SOURCE.with_name("common.h").read_text("utf-8")
    for more in ("", "\n"):
        (tmp_path / "common.h").write_text(header + more)
        build.load(COMPILER, tmp_path / "rows.c", directory)
    assert len(list(directory.iterdir())) == 3


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755])
def test_a_directory_open_to_others_is_refused(tmp_path, mode):
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(PermissionError, match="mode 0700"):
        build.load(COMPILER, SOURCE, directory)


def test_a_link_a_planted_library_and_an_open_parent_are_refused(tmp_path):
    directory = tmp_path / "parent" / "cache"
    build.load(COMPILER, SOURCE, directory)
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(PermissionError, match="not a link"):
        build.load(COMPILER, SOURCE, link)
    (made,) = directory.iterdir()
    made.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write"):
        build.load(COMPILER, SOURCE, directory)
    made.chmod(0o755)
    directory.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="everybody"):
        build.load(COMPILER, SOURCE, directory)


def test_every_c_file_is_packaged():
    root = SOURCE.parents[2]
    calls = [node for node in ast.walk(ast.parse((root / "setup.py").read_text("utf-8")))
             if isinstance(node, ast.keyword) and node.arg == "package_data"]  # fmt: skip
    patterns = ast.literal_eval(calls[0].value)["opsdc_kernels"]
    packaged = {path for pattern in patterns for path in (root / "opsdc_kernels").glob(pattern)}
    written = {path for end in "ch" for path in (root / "opsdc_kernels").rglob(f"*.{end}")}
    assert len(written) == 3
    assert written <= packaged
