"""The benchmarks measure what they say, and the README shows what the records hold."""

import subprocess
import sys

import pytest
import torch

from benchmarks import memory, phases, record, scaling, speed, tables
from benchmarks.__main__ import gate
from benchmarks.contenders import PEER_MODULES, contenders
from benchmarks.inputs import Shape, inputs
from opsdc_kernels import chunked
from opsdc_kernels.testing import truth

CPU = torch.device("cpu")
SMALL = Shape(tokens=48, dim=32, vocab_size=512)
RECORDS = sorted(record.RECORDS.glob("*.json"))


def test_contenders_compute_the_same_loss():
    """Else their times would be of different things."""
    case = inputs(SMALL)
    true = float(truth(case).loss)
    found, _ = contenders(CPU)
    assert {"ours, chunked", "naive"} <= {c.name for c in found}
    for contender in found:
        if not (contender.cross_entropy or contender.compiled):
            hidden = case.student_hidden.clone().requires_grad_()
            loss = contender.loss(hidden, case.student_weight, case.teacher_hidden,
                                  case.teacher_weight)  # fmt: skip
            assert abs(float(loss.detach()) - true) < 1e-3 * true, contender.name


def test_a_peer_that_does_not_import_is_listed(monkeypatch):
    for name in PEER_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    found, missing = contenders(CPU)
    packages = {c.package for c in found}
    for package, name in (("liger-kernel", "liger"), ("trl", "trl"), ("orda-kernel", "orda")):
        assert package not in packages
        assert missing[name]


def test_gate_refuses_wrong_code(monkeypatch):
    gate()
    right = chunked.hidden_gradient
    monkeypatch.setattr(chunked, "hidden_gradient", lambda *a: right(*a) * 1.001)
    with pytest.raises(AssertionError):
        gate()


def test_speed_counts_gemms():
    """A call of four GEMMs takes about four units."""
    case = inputs(Shape(tokens=128, dim=256, vocab_size=4096))
    gemm = speed.bare_gemm(case)

    def four():
        for _ in range(4):
            gemm()

    (timing,) = speed._interleaved({"four": four}, case, "x", 9)
    assert 3 < timing.units < 5.5


def test_memory_sees_what_a_contender_holds():
    """The naive path holds at least both logits and one gradient of them."""
    shape = Shape(tokens=256, dim=32, vocab_size=16384)
    naive = memory.measure("naive", shape, True)
    ours = memory.measure("ours, chunked", shape, True)
    logits_mib = 4 * shape.tokens * shape.vocab_size / 2**20
    assert 3 * logits_mib < naive.peak_mib < 12 * logits_mib
    assert ours.peak_mib < naive.peak_mib
    assert ours.returned_mib < ours.peak_mib


def test_planned_memory_is_what_is_measured():
    shape = Shape(tokens=1024, dim=256, vocab_size=16384)
    peak = memory.measure("ours, chunked", shape, True)
    assert abs(peak.peak_mib / peak.predicted_mib - 1) < 0.1


def test_a_failing_contender_says_so():
    assert "StopIteration" in memory.measure("nobody", SMALL, True)


def test_phases_add_up(capsys):
    found = {phase.name: phase.units for phase in phases.measure(SMALL, repeats=2)}
    whole = found.pop("whole")
    assert sum(found.values()) == pytest.approx(whole, rel=0.5)
    assert "row passes" in capsys.readouterr().out


def test_slope_of_memory():
    points = [
        scaling.Point("x", "tokens", n, 8, 8, 1.0, 1.0, 1.0, n / 1024, 0.0, None)
        for n in (256, 1024, 4096)
    ]
    assert scaling.bytes_per_token(points, "x") == 1024


def test_a_dirty_tree_is_not_recorded(tmp_path):
    found = {"environment": {"dirty": True}}
    with pytest.raises(record.DirtyTree, match="commit first"):
        record.save(tmp_path / "x.json", found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_readme_shows_the_record(path):
    found = record.load(path)
    assert not found["environment"]["dirty"]
    assert tables.between(tables.README.read_text("utf-8"), path.stem) == tables.render(found)


@pytest.mark.slow
def test_a_whole_quick_run():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick"], capture_output=True, text=True, check=True
    )
    for title in ("correctness gate passed", "Peak memory", "Errors against", "Scaling"):
        assert title in done.stdout
