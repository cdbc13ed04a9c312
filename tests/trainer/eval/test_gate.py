"""The gate in front of refreshes, on runs of the tiny model whose evidence is set by the test."""

import json

import pytest
import torch

from opsdc.errors import ConfigError
from opsdc.eval import gate
from opsdc.record.lines import read_lines
from opsdc.train import OPSDCTrainer

pytestmark = pytest.mark.whole

GATED = {
    "teacher.gate": True,
    "data.gate_size": 4,
    "eval.problems": 0,
    "train.steps": 8,
    "train.keep": 9,
    "teacher.refresh_steps": 2,
}


@pytest.fixture
def evidence(monkeypatch):
    """Let `accuracy[step]` and `truncated[step]` be what the gate reads, 0.5 and 0 else."""
    accuracy, truncated = {}, {}
    real = gate.Arms.validate, gate.Arms.validation
    monkeypatch.setattr(gate.Arms, "validate", lambda self, step: (step, real[0](self, step)))
    monkeypatch.setattr(gate.Arms, "validation", lambda self, step: (step, real[1](self, step)))
    monkeypatch.setattr(
        gate,
        "headline",
        lambda told: {
            "accuracy": accuracy.get(told[0], 0.5),
            "truncated": truncated.get(told[0], 0.0),
        },
    )
    return accuracy, truncated


def versions(folder):
    return [row["teacher_version"] for row in read_lines(folder / "metrics.jsonl")]


def test_a_student_that_answers_as_well_becomes_the_teacher(make_config, tmp_path, evidence):
    OPSDCTrainer(None, make_config(**GATED)).train()
    assert versions(tmp_path / "run") == [0, 2, 2, 4, 4, 6, 6, 8]
    # Of problems that are neither trained on nor evaluated.
    names = sorted(p.name for p in (tmp_path / "run" / "eval").iterdir())
    assert names == ["gate-base.jsonl", *(f"step-{s:06d}.jsonl" for s in (2, 4, 6, 8))]


@pytest.mark.parametrize("sign", ["accuracy", "truncated"])
def test_a_student_that_fell_does_not(make_config, tmp_path, evidence, capsys, sign):
    accuracy, truncated = evidence
    if sign == "accuracy":
        # Within the margin at step 2, beyond it at step 4; compared with step 2 from then on.
        accuracy.update({2: 0.48, 4: 0.45, 6: 0.47})
    else:
        truncated.update({4: 0.25})
    OPSDCTrainer(None, make_config(**GATED)).train()
    assert versions(tmp_path / "run") == [0, 2, 2, 2, 2, 6, 6, 8]
    assert "gate, step 4" in capsys.readouterr().out


def test_after_two_refusals_the_student_goes_back(make_config, tmp_path, evidence, capsys):
    accuracy, _ = evidence
    accuracy.update({4: 0.1, 6: 0.1})
    config = make_config(**{**GATED, "train.steps": 6})
    trainer = OPSDCTrainer(None, config)
    trainer.train()
    assert versions(tmp_path / "run") == [0, 2, 2, 2, 2, 2]
    assert "the student goes back to step 2" in capsys.readouterr().err
    student = [p.clone() for p in trainer.model.parameters()]
    with trainer.teacher.weights():
        assert all(torch.equal(a, b) for a, b in zip(student, trainer.model.parameters()))
    assert not trainer.optimizer.state
    # The sampler has them too: the next step's responses are of these weights.
    assert trainer.sampler._version == 6


def test_a_gated_run_resumes_at_any_step(make_config, tmp_path, evidence):
    accuracy, _ = evidence
    accuracy.update({4: 0.1, 6: 0.1, 8: 0.1})

    def outcome(name, stops):
        out = tmp_path / name
        for steps in stops:
            # Stopped as a scheduler would: the same command with fewer steps, then with all.
            config = make_config(**{**GATED, "train.steps": steps}, output_dir=str(out))
            OPSDCTrainer(None, config).train()
        rows = [
            {k: v for k, v in row.items() if not k.startswith("perf/")}
            for row in read_lines(out / "metrics.jsonl")
        ]
        state = json.loads((out / "checkpoints" / "step-000008" / "state.json").read_text())
        return rows, state["gate"]

    whole = outcome("whole", [8])
    assert whole[1] == {"accepted": 2, "refusals": 1}
    for stop in (3, 4, 5, 6, 7):
        assert outcome(f"stopped-{stop}", [stop, 8]) == whole


def test_a_gate_without_answers_is_refused_before_the_first_step(make_config, tmp_path):
    rows = [{"problem": f"What is {i}?"} for i in range(30)]
    with pytest.raises(ConfigError, match=r"teacher.gate true .* data\.gate_size"):
        OPSDCTrainer(None, make_config(**GATED), rows)
    with pytest.raises(ConfigError, match=r"teacher.gate true"):
        OPSDCTrainer(None, make_config(**{**GATED, "data.gate_size": 0}))
    assert not (tmp_path / "run").exists()


def test_the_gate_answers_by_the_students_weights(make_config, tmp_path):
    """Not by the teacher's, and with the noise of the base's answers."""
    settings = {**GATED, "train.steps": 2, "eval.max_new_tokens": 12, "eval.temperature": 1.0}
    OPSDCTrainer(None, make_config(**settings)).train()
    folder = tmp_path / "run" / "eval"
    base, after = (read_lines(folder / name) for name in ("gate-base.jsonl", "step-000002.jsonl"))
    assert [row["problem_id"] for row in base] == [row["problem_id"] for row in after]
    assert [row["text"] for row in base] != [row["text"] for row in after]
    still = make_config(**{**settings, "optim.lr": 0.0}, output_dir=str(tmp_path / "still"))
    OPSDCTrainer(None, still).train()
    folder = tmp_path / "still" / "eval"
    same = [read_lines(folder / name) for name in ("gate-base.jsonl", "step-000002.jsonl")]
    assert same[0] == same[1]
