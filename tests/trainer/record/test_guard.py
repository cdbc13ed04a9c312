from dataclasses import replace

import pytest

from opsdc.config.settings import GuardConfig, OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.eval import arms as evaluate
from opsdc.record import checkpoint, guard
from opsdc.record.guard import Finding, check_answers, check_steps, repeated_share
from opsdc.record.lines import read_lines
from opsdc.train import OPSDCTrainer

SOUND = {
    "response_tokens_mean": 80.0,
    "truncated_share": 0.5,
    "repeated_share": 0.02,
    "loss_nats": 0.1,
    "student_entropy": 1.7,
}


def rows(n, **changes):
    """n sound rows, then four in which something has changed."""
    return [dict(SOUND)] * n + [{**SOUND, **changes}] * 4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"response_tokens_mean": 19.0}, "0.25 times"),
        ({"truncated_share": 0.75}, "0.2 above"),
        ({"repeated_share": 0.15}, "is 0.1"),
        ({"loss_nats": 0.35}, "3 times"),
        ({"student_entropy": 0.8}, "0.5 to 1.7"),
        ({"student_entropy": 3.0}, "0.5 to 1.7"),
    ],
)
def test_each_sign_is_found_once_and_its_limit_named(changes, word):
    found = check_steps(rows(4, **changes), GuardConfig())
    assert [f.action for f in found] == ["warn"]
    assert word in found[0].text
    # Said when it becomes true, not at every later step.
    assert check_steps([*rows(4, **changes), {**SOUND, **changes}], GuardConfig()) == []


@pytest.mark.parametrize(
    ("measure", "limit", "sick_side"),
    [
        ("response_tokens_mean", 0.25 * 80, -1),
        ("truncated_share", 0.5 + 0.2, 1),
        ("repeated_share", 0.1, 1),
        ("loss_nats", 3 * 0.1, 1),
        ("student_entropy", 1.7 / 2, -1),
        ("student_entropy", 1.7 * 1.7, 1),
    ],
)
def test_limits_are_where_they_are_said_to_be(measure, limit, sick_side):
    beyond, within = (limit * (1 + side * sick_side * 1e-4) for side in (1, -1))
    assert len(check_steps(rows(4, **{measure: beyond}), GuardConfig())) == 1
    assert check_steps(rows(4, **{measure: within}), GuardConfig()) == []
    # Means over a window of four: each row of the last and of the first counts.
    stop, swing = GuardConfig(action="stop"), (0.5, -0.5, -0.25, 0.25)
    for value, count in ((beyond, 1), (within, 0)):
        last = [{**SOUND, measure: value * (1 + x)} for x in swing]
        first = [{**SOUND, measure: SOUND[measure] * (1 + x)} for x in swing]
        assert len(check_steps([*rows(0), *last], stop)) == count
        assert len(check_steps([*first, *rows(0), *rows(0, **{measure: value})], stop)) == count


def test_off_says_nothing_and_stop_keeps_stopping():
    sick = {k: v * 40 for k, v in SOUND.items()} | {"response_tokens_mean": 1.0}
    everything = rows(4, **sick)
    assert len(check_steps(everything, GuardConfig())) == 5
    assert check_steps(everything, GuardConfig(action="off")) == []
    longer = [*everything, {**SOUND, **sick}]
    assert [f.action for f in check_steps(longer, GuardConfig(action="stop"))] == ["stop"] * 5
    assert guard.apply(check_steps(longer, GuardConfig(action="stop"))) == "stop"


def test_a_healthy_compression_is_none_of_it():
    """The recorded demo run at 4e-6: lengths, entropies, losses and truncated shares by step."""
    record = zip(
        [86.6, 84.1, 63.5, 52.9, 49.1, 48.8, 41.1, 31.2, 26.0, 35.8, 21.6, 17.8],
        [1.64, 1.92, 1.60, 1.81, 1.77, 2.14, 2.14, 2.15, 2.20, 2.97, 2.37, 1.82],
        [0.123, 0.087, 0.099, 0.109, 0.138, 0.097, 0.089, 0.108, 0.094, 0.109, 0.081, 0.086],
        [0.62, 0.62, 0.38, 0.12, 0.12, 0.12, 0.12, 0.12, 0.0, 0.12, 0.0, 0.0],
    )
    keys = ("response_tokens_mean", "student_entropy", "loss_nats", "truncated_share")
    history = [dict(zip(keys, values)) for values in record]
    for n in range(1, len(history) + 1):
        assert check_steps(history[:n], GuardConfig()) == []


def test_windows_do_not_overlap_and_skipped_steps_have_no_say():
    assert check_steps(rows(3, loss_nats=9.0), GuardConfig()) == []
    holes = rows(4, loss_nats=None)
    assert check_steps(holes, GuardConfig()) == []


def test_repeated_share():
    assert repeated_share(range(50)) == 0
    assert repeated_share([1, 2] * 3) == 0
    assert repeated_share([7] * 100) == pytest.approx(1 - 1 / 93)
    assert repeated_share(list(range(20)) * 2) == pytest.approx(13 / 33)


def test_answers_against_the_base_model():
    base = {"accuracy": 0.5, "tokens_mean": 80.0}
    c = GuardConfig(target_compression=0.5, action="rollback")
    assert check_answers(base, {"accuracy": 0.45, "tokens_mean": 60.0}, c) == []
    (fell,) = check_answers(base, {"accuracy": 0.35, "tokens_mean": 60.0}, c)
    assert fell.action == "rollback"
    (reached,) = check_answers(base, {"accuracy": None, "tokens_mean": 40.0}, c)
    assert (reached.action, "target_compression" in reached.text) == ("stop", True)


@pytest.mark.parametrize("limit", [None, 0.0, 0.03, 0.25])
def test_a_drop_in_accuracy_is_judged_at_its_limit(limit):
    config = GuardConfig() if limit is None else GuardConfig(max_accuracy_drop=limit)
    limit = 0.1 if limit is None else limit
    base = {"accuracy": 0.5, "tokens_mean": 80.0}
    for drop, count in ((limit + 1e-6, 1), (limit - 1e-6, 0), (-0.4, 0)):
        now = {"accuracy": 0.5 - drop, "tokens_mean": 80.0}
        assert len(check_answers(base, now, config)) == count
        assert check_answers(base, now, replace(config, action="off")) == []
        assert check_answers({**base, "accuracy": None}, now, config) == []


def test_a_target_is_reached_at_its_value_and_stops_whatever_the_action():
    base = {"accuracy": None, "tokens_mean": 80.0}
    for tokens, count in ((60.0, 1), (60.001, 0), (20.0, 1), (160.0, 0)):
        for action in ("off", "warn", "rollback"):
            config = GuardConfig(target_compression=0.25, action=action)
            told = check_answers(base, {"accuracy": None, "tokens_mean": tokens}, config)
            assert [f.action for f in told] == ["stop"] * count
    stop, warn, back = (Finding(a, "") for a in ("stop", "warn", "rollback"))
    assert guard.apply([warn, stop, back]) == guard.apply([back, stop]) == "rollback"
    assert (guard.apply([warn, stop]), guard.apply([warn]), guard.apply([])) == ("stop", None, None)


def run(make_config, tmp_path, **changes):
    config = make_config(
        **{
            "eval.problems": 0,
            "train.steps": 8,
            "train.save_every": 1,
            "train.keep": 9,
            **changes,
        }
    )
    summary = OPSDCTrainer(None, config).train()
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    return summary, rows, [p.name for p in checkpoint.listing(tmp_path / "run" / "checkpoints")]


@pytest.mark.whole
@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_a_run_heeds_its_guards(make_config, tmp_path, monkeypatch, capsys, action):
    judge = guard.check_steps

    def sick_from_5(history, config):
        # The real judge on a record in which lengths collapse from step 4 on.
        told = [
            {**row, "response_tokens_mean": 1.0 if row["step"] >= 4 else 80.0} for row in history
        ]
        return judge(told, config)

    monkeypatch.setattr(guard, "check_steps", sick_from_5)
    monkeypatch.setattr(guard, "WINDOW", 2)
    summary, rows, saved = run(make_config, tmp_path, **{"guard.action": action})
    assert f"guard, {action}: response_tokens_mean is 1" in capsys.readouterr().err
    # Two windows of 2 differ as they should not at step 5.
    last = {"warn": 8, "stop": 5, "rollback": 4}[action]
    assert summary["steps"] == len(rows) == last
    assert saved[0] == f"step-{last:06d}"
    again, _, _ = run(make_config, tmp_path, **{"guard.action": action})
    assert again["steps"] == last
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.whole
def test_rolling_back_restores_weights_and_teacher(make_config, tmp_path, monkeypatch):
    whole = OPSDCTrainer(
        None,
        make_config(**{"eval.problems": 0, "train.steps": 3}, output_dir=str(tmp_path / "whole")),
    )
    whole.train()

    def at_5(history, config):
        return [Finding("rollback", "test")] if len(history) >= 4 else []

    monkeypatch.setattr(guard, "check_steps", at_5)
    config = make_config(**{"eval.problems": 0, "train.steps": 8, "train.keep": 3})
    trainer = OPSDCTrainer(None, config)
    assert trainer.train()["steps"] == 3
    assert trainer.teacher.version == whole.teacher.version == 2
    for ours, theirs in zip(trainer.model.parameters(), whole.model.parameters()):
        assert (ours == theirs).all()
    with trainer.teacher.weights(), whole.teacher.weights():
        for ours, theirs in zip(trainer.model.parameters(), whole.model.parameters()):
            assert (ours == theirs).all()


def test_a_run_ends_when_its_target_is_reached(make_config, tmp_path, monkeypatch, capsys):
    real = evaluate.read_answers

    def shorter_from_step_4(path):
        # The tiny model's answers all have the cap's length.
        answers = real(path)
        return [replace(a, tokens=2) for a in answers] if "000004" in path.name else answers

    monkeypatch.setattr(evaluate, "read_answers", shorter_from_step_4)
    changes = {"eval.problems": 2, "eval.every": 2, "guard.target_compression": 0.5}
    summary, rows, saved = run(make_config, tmp_path, **changes)
    assert summary["steps"] == len(rows) == 4
    assert saved[0] == "step-000004"
    assert "target_compression" in capsys.readouterr().err
    assert run(make_config, tmp_path, **changes)[0]["steps"] == 4


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"guard": {"action": "explode"}}, "guard.action"),
        ({"guard": {"window": 4}}, "unknown key 'guard.window'; it is gone, use guard.action"),
        ({"guard": {"target_compression": 1.5}}, "guard.target_compression"),
        ({"teacher": {"refresh_plateau": -1}}, "teacher.refresh_plateau"),
    ],
)
def test_settings_out_of_range(section, word):
    with pytest.raises(ConfigError, match=word):
        OPSDCConfig.from_dict(section)
