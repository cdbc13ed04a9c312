"""Trackers: refused before anything is loaded, or left out; a user's own callback is obeyed."""

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.record.callbacks import Callbacks
from opsdc.record.lines import read_lines
from opsdc.train import OPSDCTrainer


class Tracker(TrainerCallback):
    """Keeps the events that it is sent, and fails at one of them."""

    fails_at, seen = None, []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            Tracker.seen.append(name)
            if name == Tracker.fails_at:
                raise ConnectionError("the server is gone")
        return super().__getattribute__(name)


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    monkeypatch.setattr(Tracker, "seen", [])
    return Tracker


def run(make_config, callbacks=(), **settings):
    settings = {"log.report_to": ["mine"], "train.steps": 2, "eval.every": 1, **settings}
    trainer = OPSDCTrainer(None, make_config(**settings), callbacks=callbacks)
    return trainer.train()


@pytest.mark.parametrize(
    ("name", "told"),
    [("weights_and_biases", "not supported, only"), ("comet_ml", "comet"), ("dvclive", "dvclive")],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_loaded(name, told):
    config = OPSDCConfig.from_dict(
        {"log": {"report_to": [name]}, "model": {"name_or_path": "there is no such model"}}
    )
    with pytest.raises(ConfigError, match=rf"log\.report_to {name}: .*{told}") as refused:
        OPSDCTrainer(None, config)
    assert "\n" not in str(refused.value)


def test_a_tracker_that_cannot_start_ends_the_start(make_config, tracker, monkeypatch, tmp_path):
    monkeypatch.setattr(tracker, "fails_at", "on_train_begin")
    with pytest.raises(ConfigError, match=r"log\.report_to mine: on_train_begin .*server is gone"):
        run(make_config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.whole
@pytest.mark.parametrize("event", ["on_log", "on_evaluate", "on_save", "on_step_end"])
def test_a_tracker_that_fails_later_is_left_out(
    make_config, tracker, monkeypatch, tmp_path, capsys, event
):
    monkeypatch.setattr(tracker, "fails_at", event)
    assert run(make_config)["steps"] == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "log.report_to" in line]
    assert len(told) == 1
    assert f"mine: {event} failed: ConnectionError" in told[0]
    assert tracker.seen[0] == "on_train_begin"
    assert tracker.seen[-1] == event
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_an_error_of_a_users_callback_is_the_users(make_config, tracker, monkeypatch):
    monkeypatch.setattr(tracker, "fails_at", "on_log")
    with pytest.raises(ConnectionError):
        run(make_config, callbacks=[Tracker()], **{"log.report_to": []})


def test_a_tracker_is_sent_every_event_in_order(make_config, tracker, monkeypatch):
    monkeypatch.setattr(tracker, "fails_at", None)
    run(make_config, **{"eval.problems": 0, "eval.every": 0})
    wanted = ["on_train_begin", "on_log", "on_step_end", "on_save", "on_log", "on_step_end"]
    assert tracker.seen == [*wanted, "on_save", "on_train_end"]
    assert Callbacks(OPSDCConfig(), [])._trackers == {}


class Logs(TrainerCallback):
    """Keeps what it is sent, with the step."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append((state.global_step, dict(logs)))

    def curve(self, key):
        return [(step, logs[key]) for step, logs in self.sent if key in logs]


def test_evaluations_are_a_curve_for_callbacks_trackers_and_the_record(
    make_config, monkeypatch, tmp_path
):
    mine, tracker = Logs(), Logs()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", tracker)
    run(make_config, callbacks=[mine])
    curve = mine.curve("eval/tokens_mean")
    assert [step for step, _ in curve] == [0, 1, 2]
    assert [step for step, _ in mine.curve("eval/accuracy")] == [0, 1, 2]
    # Trackers of transformers show eval_x as eval/x.
    assert tracker.curve("eval_tokens_mean") == curve
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["base/tokens_mean"] for row in rows[:1]] == [curve[0][1]]
    assert [(row["step"], row["eval/tokens_mean"]) for row in rows] == curve[1:]
    # The same command again finds them there.
    again = Logs()
    run(make_config, callbacks=[again])
    assert again.curve("eval/tokens_mean") == []
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == rows
