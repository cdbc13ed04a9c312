"""Wheel and sdist: what they hold, and that an empty environment can use them."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

LOSS = """
import sys, torch
from opsdc_kernels import linear_reverse_kl
from opsdc_kernels.row_pass import compiled

h, w, t = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8), torch.randn(5, 8)
loss = linear_reverse_kl(h, w, t)
loss.backward()
log_q, log_p = (h @ w.T).log_softmax(1), (t @ w.T).log_softmax(1)
want = (log_q.exp() * (log_q - log_p)).sum(1).mean()
assert abs(float(loss.detach()) - float(want.detach())) < 1e-5
assert h.grad.abs().sum() > 0
for name in ("transformers", "opsdc", "numpy"):
    assert name not in sys.modules, name
print(compiled.SOURCE)
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
    )
    return folder


def shipped():
    """Files of both packages that a user needs, by their path in the wheel."""
    endings = (".py", ".c", ".h", ".yaml", ".txt", ".typed", ".j2")
    return {
        str(path.relative_to(ROOT))
        for package in ("opsdc", "opsdc_kernels")
        for path in (ROOT / package).rglob("*")
        if path.suffix in endings or path.name == "py.typed"
    }


def test_every_file_is_in_both(dist):
    """The wheel is built from the sdist, so what one lacks the other lacks too."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as file:
        in_sdist = {name.partition("/")[2] for name in file.getnames()}
    assert in_wheel == shipped()
    assert shipped() <= in_sdist
    assert {"README.md", "LICENSE", "setup.py", "pyproject.toml"} <= in_sdist


def test_the_metadata_is_what_a_package_page_shows(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        text = file.read(name).decode()
    for line in ("License-Expression: Apache-2.0", "Author: The OPSDC contributors",
                 "Description-Content-Type: text/markdown", "Requires-Python: >=3.10",
                 "Provides-Extra: docs", "# OPSDC"):  # fmt: skip
        assert f"\n{line}" in text


def test_the_loss_works_in_an_empty_environment_with_torch_alone(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = str(ROOT / "constraints-cpu.txt")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", constraints, "torch"], check=True, env=clean)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, env=clean)
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", LOSS],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "venv") in done.stdout
