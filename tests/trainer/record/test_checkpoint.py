import hashlib
import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from opsdc.config.settings import LoRAConfig, ModelConfig, OPSDCConfig, TeacherConfig
from opsdc.errors import CheckpointError
from opsdc.method.batch import Layout, Pair
from opsdc.method.teacher import Teacher
from opsdc.method.update import update
from opsdc.models.load import load_weights, prepare_model, save_weights
from opsdc.record import checkpoint


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


def state_of(teacher):
    return {
        "teacher_version": teacher.version,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "config": {},
    }


def write(root, step=3, keep=2, steps=3):
    parts = trained(steps)
    return checkpoint.save(root, step, *parts, state_of(parts[1]), keep=keep), parts


@pytest.mark.parametrize("mode", ["refresh", "ema", "live"])
def test_round_trip_is_bit_exact(tmp_path, mode):
    parts = trained(3, mode=mode)
    folder = checkpoint.save(tmp_path, 3, *parts, state_of(parts[1]), keep=2)
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


@pytest.mark.whole
def test_every_damage_is_found_and_the_one_before_is_used(tmp_path, capsys):
    """300 flipped bits and 300 truncations in all files, each file missing, one too many."""
    good, _ = write(tmp_path, 1)
    bad, _ = write(tmp_path, 2)
    rng = random.Random(0)
    files = sorted(p.relative_to(bad) for p in bad.rglob("*") if p.is_file())
    assert len(files) >= 8

    def found(name):
        assert checkpoint.newest_good(tmp_path) == good, name
        assert "step-000002 is damaged" in capsys.readouterr().err

    for i in range(300):
        name = files[i % len(files)]
        path, whole = bad / name, (bad / name).read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        found(name)
        path.write_bytes(whole[: rng.randrange(len(whole))])
        found(name)
        path.write_bytes(whole)
    for name in files:
        whole = (bad / name).read_bytes()
        (bad / name).unlink()
        found(name)
        (bad / name).write_bytes(whole)
    (bad / "model" / "adapter_config.json").write_text("{}")
    found("one too many")
    (bad / "model" / "adapter_config.json").unlink()
    assert checkpoint.newest_good(tmp_path) == bad


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(tmp_path):
    assert checkpoint.newest_good(tmp_path) is None
    folder, _ = write(tmp_path)
    (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        checkpoint.newest_good(tmp_path)


EVIL_NAMES = [
    "../../x",
    "/etc/passwd",
    "a/../../x",
    "..",
    ".",
    "",
    "model/../../step-000003/state.json",
    "C:\\\\x",
    "~/x",
    "x\0y",
    "model",
    "．．/x",
    "state.json/",
    "x" * 5000,
]


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_names_outside_the_folder_are_refused(tmp_path, name):
    folder, _ = write(tmp_path)
    (tmp_path / "x").write_text("1")
    edit_manifest(folder, lambda m: m["files"].update({name: {"sha256": "0", "bytes": 1}}))
    assert "outside the checkpoint" in checkpoint.verify(folder)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sealed(folder):
    """A manifest that fits whatever is in the folder: what somebody who means harm would write."""

    def describe(manifest):
        manifest["files"] = {
            str(p.relative_to(folder)): {
                "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
                "bytes": p.stat().st_size,
            }
            for p in folder.rglob("*")
            if p.is_file() and p.name != "manifest.json"
        }

    edit_manifest(folder, describe)


class Marker:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def as_pickle(folder, marker):
    (folder / "model" / "model.safetensors").unlink()
    torch.save(Marker(marker), folder / "model" / "pytorch_model.bin")


def as_pickle_named_safetensors(folder, marker):
    (folder / "optimizer.safetensors").write_bytes(pickle.dumps(Marker(marker)))
    (folder / "model" / "model.safetensors").write_bytes(pickle.dumps(Marker(marker)))


def as_pickled_moments(folder, marker):
    (folder / "optimizer.safetensors").write_bytes(pickle.dumps(Marker(marker)))


def as_moments_of_another_shape(folder, marker):
    path = folder / "optimizer.safetensors"
    save_file({k: v.new_zeros(7) for k, v in load_file(path).items()}, path)


def as_remote_code(folder, marker):
    path = folder / "model" / "config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    path.write_text(json.dumps(settings))
    (folder / "model" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")


def as_index_outside(folder, marker):
    (folder / "model" / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def as_link(folder, marker):
    (folder / "model" / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    link = folder / "model" / "model.safetensors"
    link.symlink_to(folder.parent / "elsewhere.safetensors")


def as_link_to_a_folder(folder, marker):
    (folder / "model").rename(folder.parent / "elsewhere")
    (folder / "model").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    "attack",
    [
        as_pickle,
        as_pickle_named_safetensors,
        as_pickled_moments,
        as_moments_of_another_shape,
        as_remote_code,
        as_index_outside,
        as_link,
        as_link_to_a_folder,
    ],
)
def test_a_checkpoint_made_to_harm_runs_nothing(tmp_path, attack):
    folder, parts = write(tmp_path / "root")
    marker = tmp_path / "marker"
    attack(folder, marker)
    sealed(folder)
    problem = checkpoint.verify(folder)
    if problem is None:
        # Sealed and of an innocent kind: then loading must fail without running it.
        with pytest.raises(CheckpointError, match="does not fit"):
            checkpoint.restore(folder, *parts)
    assert not marker.exists()
    innocent = (as_pickle_named_safetensors, as_pickled_moments, as_moments_of_another_shape)
    assert (problem is None) == (attack in innocent)


def test_what_its_loaders_would_unpickle_is_not_even_looked_at(tmp_path):
    """The same without our check: the loaders themselves are told to take safetensors only."""
    folder, parts = write(tmp_path / "root")
    marker = tmp_path / "marker"
    as_pickle(folder, marker)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.restore(folder, *parts)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("shard", "leads_out"),
    [
        ("model.safetensors", False),
        ("./model.safetensors", True),
        ("absent.safetensors", True),
        ("/dev/null", True),
        ("../model/model.safetensors", True),
        ("../state.json", True),
    ],
)
def test_an_index_names_neighbours_only(tmp_path, shard, leads_out):
    folder, _ = write(tmp_path)
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": shard}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    sealed(folder)
    fault = f"names a file outside the checkpoint: {shard!r}"
    assert (checkpoint.verify(folder) or "").endswith(fault) == leads_out
    assert leads_out or checkpoint.verify(folder) is None


def test_all_of_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut loses what was not synced: files, their names in folders, the folder's own."""
    synced, fsync, rename = [], os.fsync, Path.rename

    def record(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path, {p.name for p in path.iterdir()} if path.is_dir() else None))

    def renamed(path, target):
        for p in (path, *path.rglob("*")):
            # A folder with the very names that it has now.
            last = [names for there, names in synced if there == p]
            assert last[-1:] == [{q.name for q in p.iterdir()} if p.is_dir() else None], p
        synced.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", renamed)
    folder, _ = write(tmp_path / "root")
    assert (folder / "model").is_dir()
    assert [(p, folder.name in names) for p, names in synced] == [(folder.parent, True)]


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_that_are_not_there_are_not_made_up(tmp_path, adapter):
    settings = ModelConfig(lora=LoRAConfig(r=2, alpha=4) if adapter else None)
    model = prepare_model(tiny_model(), settings)
    save_weights(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    gone = sorted(tensors)[-1]
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(KeyError, match=f"1 tensors are missing, {re.escape(gone)}"):
        load_weights(model, tmp_path)


def test_another_models_checkpoint_is_refused_by_name(tmp_path):
    folder, _ = write(tmp_path)
    model = tiny_model(hidden_size=16)
    teacher = Teacher(model, TeacherConfig())
    with pytest.raises(CheckpointError, match=r"does not fit.*shape"):
        checkpoint.restore(folder, model, teacher, torch.optim.AdamW(model.parameters()))


def test_checkpoints_of_an_abandoned_future_do_not_push_good_ones_out(tmp_path, capsys):
    """Steps 7 and 8 are damaged, the run goes on from 2: it must always have two that are good."""
    for step in (2, 7, 8):
        write(tmp_path, step, keep=9)
    for step in (7, 8):
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{}")
    assert checkpoint.newest_good(tmp_path).name == "step-000002"
    write(tmp_path, 3)
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["step-000003", "step-000002"]
    assert checkpoint.newest_good(tmp_path).name == "step-000003"


def test_one_of_the_same_step_is_kept_until_its_successor_is_verified(tmp_path, monkeypatch):
    """A run that was told to start before a good checkpoint comes to that step again."""
    before, _ = write(tmp_path, 3)
    sha256 = checkpoint._sha256(before / "optimizer.safetensors")
    verify = checkpoint.verify
    monkeypatch.setattr(
        checkpoint, "verify", lambda p: "a sector is gone" if ".tmp" in p.name else verify(p)
    )
    with pytest.raises(CheckpointError, match="a sector is gone"):
        write(tmp_path, 3, steps=2)
    assert verify(before) is None
    assert checkpoint._sha256(before / "optimizer.safetensors") == sha256
    monkeypatch.undo()
    write(tmp_path, 3, steps=2)
    assert verify(before) is None
    assert checkpoint._sha256(before / "optimizer.safetensors") != sha256
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


class Killed(BaseException):
    """Passes every handler, as a kill does."""


@pytest.mark.parametrize("how", [OSError, Killed])
def test_between_two_checkpoints_of_one_step_there_always_is_one(tmp_path, monkeypatch, how):
    """Killed, or failed, after the old one was moved aside and before the new one has its name."""
    write(tmp_path, 2)
    before, _ = write(tmp_path, 3)
    sha256 = checkpoint._sha256(before / "optimizer.safetensors")
    rename = Path.rename

    def stuck(path, target):
        if path.name.startswith(".tmp-step"):
            raise how("injected")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(CheckpointError if how is OSError else how):
        write(tmp_path, 3, steps=2)
    monkeypatch.undo()
    # What every start does first.
    checkpoint.clear_unfinished(tmp_path)
    assert checkpoint.newest_good(tmp_path) == before
    assert checkpoint._sha256(before / "optimizer.safetensors") == sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


STATE_EDITS = {
    "nothing": lambda state: state.clear(),
    "skipped_steps": lambda state: state.pop("skipped_steps"),
    "teacher_version": lambda state: state.update(teacher_version="two"),
    "config": lambda state: state.update(config=None),
    "versions": lambda state: state.pop("versions"),
}


@pytest.mark.parametrize("missing", STATE_EDITS)
def test_a_sealed_checkpoint_that_lacks_its_state_is_passed_over(tmp_path, missing, capsys):
    good, _ = write(tmp_path, 1)
    bad, _ = write(tmp_path, 2)
    state = checkpoint.read_state(bad)
    STATE_EDITS[missing](state)
    (bad / "state.json").write_text(json.dumps(state))
    sealed(bad)
    assert checkpoint.newest_good(tmp_path) == good
    name = "step" if missing == "nothing" else missing
    assert f"step-000002 is damaged (state.json has no {name} (" in capsys.readouterr().err


def test_the_manifest_says_which_software_wrote_it(tmp_path):
    folder, _ = write(tmp_path)
    found = json.loads((folder / "manifest.json").read_text())["versions"]
    assert found["torch"] == torch.__version__
    assert {"opsdc", "transformers", "python", "threads"} <= found.keys()
    edit_manifest(folder, lambda m: m["versions"].update(torch="1.0"))
    assert checkpoint.verify(folder) == "manifest.json and state.json are of different versions"


def test_only_our_own_names_are_checkpoints(tmp_path):
    write(tmp_path, 3)
    for name in ("step-000004.bak", "step-x", "step-9", "step-0000005 copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-1000000").mkdir()
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["step-1000000", "step-000003"]


def test_a_folder_that_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch):
    before, _ = write(tmp_path, 1)

    def full(*args, **kwargs):
        # What safetensors makes of a full disk is no OSError.
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2)
    assert checkpoint.verify(before) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
