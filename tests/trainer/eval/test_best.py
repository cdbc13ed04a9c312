"""The step that is kept: the rule on constructed answers, and what a run leaves of it."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.eval.answers import Answer, write_answers
from opsdc.eval.best import candidates
from opsdc.train import OPSDCTrainer


def arm(tokens, right, n=200):
    """n answers of about `tokens` tokens, of which the first `right` are right."""
    return [
        Answer(
            problem_id=f"p{i}",
            sample=0,
            question="?",
            gold="1",
            text="",
            tokens=tokens + i % 3,
            truncated=False,
            correct=i < right,
            extracted="1",
        )
        for i in range(n)
    ]


def rows(tmp_path, steps, margin=0.05, last_step=None):
    for step, answers in steps.items():
        write_answers(tmp_path / f"step-{step:06d}.jsonl", answers)
    config = OPSDCConfig.from_dict({"train": {"best_margin": margin}})
    return candidates(tmp_path, arm(60, 100), config, last_step)


def kept(*arguments, **settings):
    return next(row["step"] for row in rows(*arguments, **settings) if row["kept"])


def test_the_shortest_that_has_not_fallen_is_kept(tmp_path):
    steps = {4: arm(30, 110), 8: arm(20, 104), 12: arm(10, 70), 16: arm(25, 120)}
    assert kept(tmp_path, steps) == 8
    # A margin that excludes only a fall, or lets a large one pass.
    assert kept(tmp_path, steps, margin=0.5) == 12
    assert kept(tmp_path, steps, last_step=4) == 4


def test_of_steps_that_save_about_as_much_the_most_accurate_is_kept(tmp_path):
    """Of 60 tokens 40 are saved, 37, or 35, which is less than nine tenths of 40."""
    steps = {4: arm(20, 104), 8: arm(23, 130), 12: arm(25, 140)}
    assert kept(tmp_path, steps) == 8


def test_where_nothing_is_saved_the_shortest_is_kept(tmp_path):
    assert kept(tmp_path, {4: arm(80, 104), 8: arm(90, 190)}) == 4


def test_an_interval_that_reaches_too_far_down_is_not_enough(tmp_path):
    """60 answers of 200 turn, as many for the better: no fall on average, but none excluded."""
    shuffled = arm(10, 100)
    shuffled = [
        dataclasses.replace(a, correct=not a.correct) if 70 <= i < 130 else a
        for i, a in enumerate(shuffled)
    ]
    steps = {4: arm(30, 100), 8: shuffled}
    assert kept(tmp_path, steps, margin=0.05) == 4
    assert kept(tmp_path, steps, margin=0.10) == 8


def test_where_all_have_fallen_the_most_accurate_is_kept(tmp_path):
    steps = {4: arm(40, 60), 8: arm(30, 50), 12: arm(20, 70), 16: arm(10, 20)}
    table = rows(tmp_path, steps)
    assert not any(row["eligible"] for row in table)
    assert [row["step"] for row in table if row["kept"]] == [12]


def test_the_pareto_front(tmp_path):
    steps = {4: arm(40, 120), 8: arm(30, 110), 12: arm(35, 100), 16: arm(10, 90), 20: arm(12, 90)}
    assert [row["step"] for row in rows(tmp_path, steps) if row["pareto"]] == [4, 8, 16]


@pytest.mark.whole
def test_a_run_leaves_its_best_step(make_config, tmp_path):
    """The tiny model is never right, so that no step has fallen and the shortest one wins."""
    config = make_config(
        **{
            "train.keep_best": True,
            "data.gate_size": 6,
            "eval.every": 1,
            "eval.max_new_tokens": 40,
            "eval.temperature": 1.0,
            "train.steps": 5,
            "train.keep": 9,
            "optim.lr": 5e-3,
        }
    )
    summary = OPSDCTrainer(None, config).train()
    out = tmp_path / "run"
    table = {row["step"]: row for row in summary["evaluated"]}
    assert list(table) == [1, 2, 3, 4, 5]
    best = min(table, key=lambda step: table[step]["tokens"])
    assert best != 5, "choose another seed: the last step must not be the best here"
    assert summary["kept_step"] == best
    assert table[best]["kept"]
    model, last = (
        load_file(out / name / "model.safetensors")
        for name in ("model", "checkpoints/step-000005/model")
    )
    at_best = load_file(out / f"checkpoints/step-{best:06d}/model/model.safetensors")
    assert all(torch.equal(model[n], at_best[n]) for n in at_best)
    assert not all(torch.equal(model[n], last[n]) for n in last)
    # The evaluation is of the model that is left, and says the same when it is asked again.
    again = OPSDCTrainer(None, config).train()
    assert again["trained"] == summary["trained"]
    assert again["kept_step"] == best
    assert json.loads((out / "best" / "opsdc_step.json").read_text()) == {"step": best}


def test_keeping_the_best_needs_answers(make_config):
    with pytest.raises(ConfigError, match=r"train.keep_best true"):
        OPSDCTrainer(None, make_config(**{"train.keep_best": True, "eval.problems": 0}))
