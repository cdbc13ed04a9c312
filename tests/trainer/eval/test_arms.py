"""A scorer that cannot judge the answers is refused before a model samples any."""

from __future__ import annotations

import pytest

from opsdc.data.problem import Problem
from opsdc.errors import ConfigError, DataError, ModelError, OPSDCError
from opsdc.eval import arms, grader
from opsdc.eval.scorers import SCORERS, check_scorer
from opsdc.train import OPSDCTrainer


def problem(answer: str | None, **fields) -> Problem:
    messages = ({"role": "user", "content": "Q"},)
    return Problem(id="p:1", messages=messages, answer=answer, **fields)


@pytest.fixture
def no_sampling(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("sampled before the check")

    monkeypatch.setattr(arms, "answer", refuse)
    monkeypatch.setattr("opsdc.rollout.hf.HFSampler.generate", refuse)


ROWS = [{"problem": f"What is {i}?", "answer": f"value {i}"} for i in range(30)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval.scorer": "number"}, "scorer 'number' needs a number as answer, got 'value"),
        ({"eval.scorer": "vibes"}, "eval.scorer: unknown scorer 'vibes'; there are math_verify"),
        ({"eval.scorer": "reasoning_gym"}, "is not from reasoning-gym"),
        (
            {"eval.scorer": "exact", "data.train_on": "dial", "data.scorer": "number"},
            "data.train_on",
        ),
    ],
)
def test_a_scorer_is_checked_before_a_training_run_samples(
    make_config, no_sampling, settings, message
):
    with pytest.raises(OPSDCError, match=message):
        OPSDCTrainer(None, make_config(**settings), ROWS)


@pytest.mark.parametrize("scorer", ["number", "vibes", "reasoning_gym"])
def test_a_scorer_is_checked_before_an_evaluation_samples(
    make_config, tmp_path, no_sampling, scorer
):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"problem": "{i}?", "answer": "n{i}"}}\n' for i in range(30)))
    config = make_config(**{"data.source": str(path), "eval.scorer": scorer})
    with pytest.raises((ConfigError, DataError), match="scorer"):
        arms.evaluate_arms(config, config.model.name_or_path)


def test_the_trained_model_is_looked_for_before_an_evaluation_samples(make_config, no_sampling):
    with pytest.raises(ModelError, match="no trained model in nowhere"):
        arms.evaluate_arms(make_config(), "nowhere")


@pytest.mark.parametrize("scorer", [s for s in SCORERS if s not in ("exact", "reasoning_gym")])
def test_an_answer_that_nothing_is_left_of(scorer):
    refused = r"p:1.*(nothing is left|needs a number|needs one of A to Z)"
    for answer in ("$", r"\,", "."):
        with pytest.raises(DataError, match=refused):
            check_scorer(scorer, [problem("5"), problem(answer)], "eval.scorer")


def test_a_package_that_fails_is_met_by_the_check(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("import no_such_module_here\n", "utf-8")
    grader._stop()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        with pytest.raises(ConfigError, match="needs the package math-verify"):
            check_scorer("dual", [problem("5")], "eval.scorer")
        check_scorer("boxed", [problem("5")], "eval.scorer")
    finally:
        monkeypatch.undo()
        grader._stop()
    check_scorer("dual", [problem("5")], "eval.scorer")
