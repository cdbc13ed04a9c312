"""Tests of the kernels run on one thread: results repeat, and tiny shapes are faster."""

import shutil
from pathlib import Path

import pytest
import torch

import opsdc_kernels
from opsdc_kernels.problem import OPTIONS, Options, Problem
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


@pytest.fixture
def make_problem():
    """A `Problem` from tensors and the options that differ from the defaults."""

    def make(h, w, ht, wt=None, **given):
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        absent = dict.fromkeys(("student_bias", "teacher_bias", "token_weight", "target_ids"))
        return Problem(
            student_hidden=h,
            student_weight=w,
            teacher_hidden=ht,
            teacher_weight=wt,
            **{**absent, **given},
            options=Options(**{"reduction": "sum", **options}),
        )

    return make


@pytest.fixture
def compiled_mutant(monkeypatch, tmp_path):
    """compiled_mutant(owner, old, new): the C of `owner` runs with `old` replaced by `new`, also in
    the header. Skips where nothing is compiled."""

    def install(owner, old, new):
        monkeypatch.setenv(build.SWITCH, "1")
        if owner.native().dll is None:
            pytest.skip(f"row passes run in {owner.native().description}")
        package, occurrences = Path(opsdc_kernels.__file__).parent, 0
        for path in (compiled.SOURCE.with_name("common.h"), owner.SOURCE):
            text = path.read_text("utf-8")
            occurrences += text.count(old)
            copy = tmp_path / path.relative_to(package)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(text.replace(old, new))
        assert occurrences
        source = tmp_path / owner.SOURCE.relative_to(package)
        library = build.load(shutil.which("cc"), source, tmp_path)
        monkeypatch.setattr(owner, "native", lambda: build.Build(library, "mutant"))

    return install
