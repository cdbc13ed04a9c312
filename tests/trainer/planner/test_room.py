import pytest
import torch
from helpers.tiny import tiny_model

from opsdc.config.settings import OPSDCConfig, TeacherConfig
from opsdc.errors import CheckpointError
from opsdc.method.teacher import Teacher
from opsdc.planner import room
from opsdc.record import checkpoint


def test_the_disk_must_hold_the_checkpoints(tmp_path, monkeypatch):
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig())
    settings = OPSDCConfig.from_dict({"output_dir": str(tmp_path / "a" / "run")})
    # What one really takes: the weights of both and two moments, and some headers.
    state = {"teacher_version": 0, "skipped_steps": 0, "skipped_in_a_row": 0, "config": {}}
    folder = checkpoint.save(tmp_path, 1, model, teacher, stepped(model), state, keep=1)
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    for free, fits in ((2.7 * size, False), (3.3 * size, True)):
        usage = type("usage", (), {"free": free})
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            assert str(tmp_path) in room.check_disk(model, teacher, settings)
        else:
            with pytest.raises(CheckpointError, match=r"lower train\.keep"):
                room.check_disk(model, teacher, settings)


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer


def test_too_little_memory_is_a_warning_with_the_remedy(monkeypatch):
    model = tiny_model()
    trained = sum(p.numel() for p in model.parameters())
    for free, warns in ((12 * trained, True), (1 << 40, False), (None, False)):
        monkeypatch.setattr(room, "_free_bytes", lambda device, free=free: free)
        line = room.check_memory(model, OPSDCConfig())
        assert line.startswith("warning") == warns
        assert ("max_tokens_per_micro_batch" in line) == warns


def test_free_memory_is_read_from_the_system():
    free = room._free_bytes(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
