"""`python -m opsdc_kernels.verify`: what it prints, its exit status, real hidden states."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from opsdc_kernels import testing, verify
from opsdc_kernels.memory import PeakMemory

SMALL = ["--tokens", "12", "--dim", "32", "--vocab-size", "600", "--dtype", "float32"]


def test_passes_and_prints_errors_beside_the_naive_ones(capsys):
    assert verify.main(SMALL) == 0
    text = capsys.readouterr().out
    assert "PASS: every backend is within its budget in all 10 cases" in text
    for word in ("chunked", "reference", "naive bf16", "naive fp32", "two heads", "plan:"):
        assert word in text


def test_fails_with_status_1_where_a_backend_is_wrong(monkeypatch, capsys):
    original = testing.run

    def wrong(case, **options):
        found = original(case, **options)
        factor = 1.01 if options["backend"] == "chunked" else 1.0
        return testing.Outcome(
            found.loss, found.per_token, found.hidden_gradient * factor, found.weight_gradient
        )

    monkeypatch.setattr(testing, "run", wrong)
    assert verify.main(SMALL) == 1
    assert "FAIL: over budget" in capsys.readouterr().out


def test_real_hidden_states_from_a_file(tmp_path, capsys):
    case = testing.make_case(tokens=6, dim=16, vocab_size=100, entropy=1.0, kl=1e-2)
    path = tmp_path / "real.safetensors"
    save_file(
        {
            "student_hidden": case.student_hidden,
            "student_weight": case.student_weight,
            "teacher_hidden": case.teacher_hidden,
        },
        path,
    )
    assert verify.main([*SMALL, "--hidden-states", str(path)]) == 0
    assert "real.safetensors, fp32: mean reverse_kl" in capsys.readouterr().out


def test_a_file_without_the_tensors_says_so(tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    assert verify.main([*SMALL, "--hidden-states", str(path)]) == 2
    assert "holds no student_hidden" in capsys.readouterr().err


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_other_divergences(divergence, capsys):
    assert verify.main([*SMALL, "--divergence", divergence, "--backend", "chunked"]) == 0
    assert "naive" not in capsys.readouterr().out


@pytest.mark.whole
def test_help_teaches():
    done = subprocess.run(
        [sys.executable, "-m", "opsdc_kernels.verify", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for word in ("examples:", "exit status", "naive bf16", "student_hidden", "budget"):
        assert word in done.stdout


def test_peak_memory_sees_what_a_call_takes():
    with PeakMemory() as memory:
        x = torch.ones(16 << 20)
        x.add_(1)
        del x
    assert 60 <= memory.peak_mib <= 80
