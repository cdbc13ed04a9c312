"""One run at a time in a folder, and nothing left by a start that failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import runs

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, OPSDCError
from opsdc.record import folder as record_folder
from opsdc.record.folder import claimed
from opsdc.train import OPSDCTrainer

HOLD = """
import sys, time
from pathlib import Path
from opsdc.record.folder import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_until_its_run_is_dead(tmp_path, holder):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on .*output_dir"):
        claimed(out).__enter__()
    # A process that only waits is alive.
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(ConfigError, match="in use"):
        claimed(out).__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert f"process {holder.pid} " in (out / ".lock").read_text()
    with claimed(out):
        assert (out / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        # Two trainers in one process are two runs as well.
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            claimed(out).__enter__()


def test_a_lock_that_its_run_removes_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Opened before the other run removed it, locked after: a third may have a new one by then."""
    flock = record_folder.fcntl.flock

    def late(file, flags):
        (tmp_path / ".lock").unlink()
        flock(file, flags)

    monkeypatch.setattr(record_folder.fcntl, "flock", late)
    with pytest.raises(ConfigError, match="in use"):
        claimed(tmp_path).__enter__()


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def missing(file, flags):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(record_folder.fcntl, "flock", missing)
    with claimed(tmp_path / "run"):
        pass
    assert "cannot be locked" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_leave_the_record_of_one(make_config, tmp_path):
    """The second is told, and what the first writes is what it writes alone."""
    alone = make_config(output_dir=str(tmp_path / "alone")).to_dict()
    both = make_config(output_dir=str(tmp_path / "both")).to_dict()
    assert runs.finish(alone) == 0
    first = runs.start(both)
    deadline = time.monotonic() + 60
    while not (tmp_path / "both" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runs.finish(both) == 2
    assert runs.wait(first, 120) < 120
    assert first.exitcode == 0
    assert "is in use by process" in runs.log(tmp_path / "both")
    assert runs.outcome(tmp_path / "both") == runs.outcome(tmp_path / "alone")
    assert not (tmp_path / "both" / ".lock").exists()


@pytest.mark.parametrize("name", ["my-experiment.yaml", "sub/other.yml", "plain.json"])
def test_a_file_of_settings_that_names_no_folder_gives_its_own_name(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{seed: 3}")
    assert OPSDCConfig.load(path).output_dir == f"runs/{path.stem}"
    assert OPSDCConfig.load(path, {"output_dir": "x"}).output_dir == "x"
    path.write_text("output_dir: runs/told")
    assert OPSDCConfig.load(path).output_dir == "runs/told"


def no_memory(*arguments, **keywords):
    raise MemoryError("in a check")


FAILED_STARTS = {
    "a check": {"model.attn_implementation": "flex_attention"},
    "a checkpoint that is none": {"train.resume": "nowhere"},
    "packing that leaks": {"train.packing": "on"},
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("why", FAILED_STARTS)
def test_a_start_that_fails_leaves_nothing(make_config, tmp_path, monkeypatch, why, there):
    out = tmp_path / "new" / "run"
    if there:
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
    if why == "packing that leaks":
        monkeypatch.setattr("opsdc.checks.packing_difference", lambda *a: 0.3)
    trainer = OPSDCTrainer(None, make_config(output_dir=str(out), **FAILED_STARTS[why]))
    before = sorted(Path(tmp_path).rglob("*"))
    with pytest.raises(OPSDCError):
        trainer.train()
    assert sorted(Path(tmp_path).rglob("*")) == before
    assert out.exists() == there


def test_an_error_of_any_kind_in_a_check_leaves_nothing(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("opsdc.checks.check_sampler", no_memory)
    trainer = OPSDCTrainer(None, make_config())
    with pytest.raises(MemoryError):
        trainer.train()
    assert list(tmp_path.iterdir()) == []
