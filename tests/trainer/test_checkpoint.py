import json
import random
import shutil

import pytest
import torch
from tests_tiny import tiny_model

from opsdc import checkpoint
from opsdc.batch import Pair
from opsdc.config import OPSDCConfig, TeacherConfig
from opsdc.errors import CheckpointError
from opsdc.teacher import Teacher
from opsdc.update import Layout, update


def trained(steps=2, **teacher):
    """Model, teacher and optimizer after a few real updates."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    held = Teacher(model, TeacherConfig(**{"mode": "refresh", "refresh_steps": 2, **teacher}))
    for step in range(1, steps + 1):
        pair = Pair(
            student_prompt_ids=[1, 9],
            teacher_prompt_ids=[1, 8, 7, 9],
            response_ids=[30 + step, 40, 50],
        )
        layout = Layout(packed=False, max_tokens=99, pad_id=0, dtype=torch.float32)
        update(model, held, [pair], optimizer, layout, OPSDCConfig())
        held.after_update(step)
    return model, held, optimizer


def everything(model, teacher, optimizer):
    found = {f"m/{n}": p.detach().clone() for n, p in model.named_parameters()}
    with teacher.weights():
        found |= {f"t/{n}": p.detach().clone() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"o/{name}/{k}": v.clone() for k, v in optimizer.state[p].items()}
    return found


def write(root, step=3, keep=2, steps=3):
    parts = trained(steps)
    state = {"teacher_version": parts[1].version, "weights_version": step, "skipped_steps": 0}
    return checkpoint.save(root, step, *parts, state, keep=keep), parts


@pytest.mark.parametrize("mode", ["refresh", "ema", "live"])
def test_round_trip_is_bit_exact(tmp_path, mode):
    parts = trained(3, mode=mode)
    folder = checkpoint.save(tmp_path, 3, *parts, {"teacher_version": parts[1].version}, keep=2)
    fresh = trained(1, mode=mode)
    checkpoint.restore(folder, *fresh)
    assert fresh[1].version == parts[1].version
    expected, found = everything(*parts), everything(*fresh)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_model_folder_opens_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    folder, (model, *_) = write(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, p in loaded.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name])


def test_keeps_the_newest_and_leaves_nothing_aside(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / ".tmp-step-000009-1").mkdir()
    write(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_every_damage_is_found_and_the_one_before_is_used(tmp_path, capsys):
    good, _ = write(tmp_path, 1)
    bad, _ = write(tmp_path, 2)
    whole = tmp_path / "whole"
    shutil.copytree(bad, whole)
    rng = random.Random(0)
    files = sorted(p.relative_to(bad) for p in bad.rglob("*") if p.is_file())

    def damaged(change):
        shutil.rmtree(bad)
        shutil.copytree(whole, bad)
        name = rng.choice(files)
        change(bad / name)
        assert checkpoint.newest_good(tmp_path) == good, name
        assert "step-000002 is damaged" in capsys.readouterr().err

    def flip(path):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    def cut(path):
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    for _ in range(40):
        damaged(flip)
        damaged(cut)
    for name in files:
        shutil.rmtree(bad)
        shutil.copytree(whole, bad)
        (bad / name).unlink()
        assert checkpoint.newest_good(tmp_path) == good


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(tmp_path):
    assert checkpoint.newest_good(tmp_path) is None
    folder, _ = write(tmp_path)
    (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        checkpoint.newest_good(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../x"])
def test_names_outside_the_folder_are_refused(tmp_path, name):
    folder, _ = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0", "bytes": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the checkpoint" in checkpoint.verify(folder)


def test_a_folder_that_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch):
    before, _ = write(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2)
    assert checkpoint.verify(before) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
