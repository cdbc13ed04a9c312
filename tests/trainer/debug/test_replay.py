"""A run that gives up leaves its batch and the state before it, and `inspect --batch` finds why."""

import json
import math

import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model

from opsdc import checks, cli
from opsdc.debug import replay
from opsdc.errors import CheckpointError, DataError, TrainingError
from opsdc.record import checkpoint
from opsdc.train import OPSDCTrainer

SICK_TOKEN = 200


@pytest.fixture
def gave_up(make_config, tmp_path, monkeypatch):
    """A model in which one token's embedding is not a number: sick where a response holds it."""
    # Not to be found before the first step: one sampled token is nobody's input.
    monkeypatch.setattr(checks, "_RESPONSE_TOKENS", 1)
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[SICK_TOKEN] = math.nan
        # Some responses sample it; prompts are ASCII and never hold it.
        model.lm_head.weight[SICK_TOKEN] *= 3
    folder = tmp_path / "sick-model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = make_config(
        **{
            "model.name_or_path": str(folder),
            "eval.problems": 0,
            "train.steps": 40,
            "optim.lr": 0.0,
        }
    )
    with pytest.raises(TrainingError, match="3 steps in a row") as error:
        OPSDCTrainer(None, config).train()
    (batch,) = (tmp_path / "run").glob("sick-step-*.json")
    assert str(batch) in str(error.value)
    return batch, config


def test_the_batch_is_replayed_and_the_place_named(gave_up, capsys):
    batch, _ = gave_up
    assert cli.main(["inspect", "--batch", str(batch)]) == 0
    text = capsys.readouterr().out
    pairs = json.loads(batch.read_text())["pairs"]
    assert "loss nan" in text
    assert "parameters that are not finite: 1: model.embed_tokens.weight" in text
    rows = text.splitlines()[4:]
    assert len(rows) == len(pairs)
    sick = 0
    for row, pair in zip(rows, pairs):
        ids = pair["response_ids"]
        # Attention gives masked positions weight 0, and 0 · NaN is NaN: all of it is sick.
        is_sick = SICK_TOKEN in ids[:-1]
        sick += is_sick
        assert row.endswith(f" at 0, {len(ids)} in all" if is_sick else "none")
    assert sick > 0


def test_the_state_before_the_step_is_saved_and_replays_it(gave_up, tmp_path):
    batch, config = gave_up
    step = json.loads(batch.read_text())["step"]
    newest = checkpoint.newest_good(tmp_path / "run" / "checkpoints")
    assert checkpoint.read_state(newest)["step"] == step - 1
    first = batch.read_text()
    batch.unlink()
    # The same command meets the same batch, and gives up at once instead of after three more.
    with pytest.raises(TrainingError, match=f"last: step {step}"):
        OPSDCTrainer(None, config).train()
    assert batch.read_text() == first


def test_without_its_checkpoint_it_says_so(gave_up, tmp_path, capsys):
    batch, _ = gave_up
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"raise train\.keep"):
        replay.replay(batch)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1, "pairs": [{"x": 1}]}', "\x00\xff"])
def test_a_file_that_no_run_left(tmp_path, text):
    path = tmp_path / "batch.json"
    path.write_text(text)
    with pytest.raises(DataError, match="not a batch"):
        replay.replay(path)
    with pytest.raises(DataError, match="cannot be read"):
        replay.replay(tmp_path / "none.json")
