"""Runs that are killed, crash, and are told to stop: each must go on to the very same result."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import runs
from transformers import TrainerCallback

from opsdc.config.settings import OPSDCConfig
from opsdc.ranks import stop
from opsdc.record import checkpoint
from opsdc.train import OPSDCTrainer

pytestmark = pytest.mark.whole

M = 3
STEPS = 6


@pytest.fixture(scope="module")
def settings(tiny_folder, problem_file):
    def make(out, **train):
        return {
            "output_dir": str(out),
            "model": {"name_or_path": str(tiny_folder)},
            "data": {"source": str(problem_file), "eval_size": 6},
            "prompt": {"instruction": "Be brief."},
            "rollout": {"prompts_per_step": 3, "max_new_tokens": 8},
            "teacher": {"refresh_steps": M},
            "optim": {"lr": 1e-3},
            "train": {
                "steps": STEPS,
                "save_every": 2,
                "max_tokens_per_micro_batch": 100,
                **train,
            },
            "eval": {"problems": 2, "every": 2, "max_new_tokens": 4, "scorer": "number"},
        }

    return make


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """What a run that nobody disturbs comes to, and how long it takes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert runs.finish(settings(out)) == 0
    shutil.rmtree(out)
    process = runs.start(settings(out))
    seconds = runs.wait(process, 120)
    assert process.exitcode == 0
    found = runs.outcome(out)
    assert len(found["record"]) == STEPS
    assert all(row["loss_nats"] > 0 for row in found["record"])
    return found, seconds


def resumed(settings, out):
    """Start the run again until it ends; what it came to."""
    status = runs.finish(settings(out))
    assert status == 0, runs.log(out)
    assert runs.leftovers(out) == []
    return runs.outcome(out)


# A hundred or two in ten parts, so that any share can be run by itself; one is in the quick suite.
PARTS = [0, *(pytest.param(i, marks=[pytest.mark.slow, pytest.mark.chaos]) for i in range(1, 10))]


def two_at_once(work, arguments):
    """One for each core."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, arguments))


@pytest.mark.parametrize("part", PARTS)
def test_killed_at_a_random_moment(settings, whole, tmp_path, part):
    """Twenty kills."""
    expected, seconds = whole

    def kill_once(i):
        rng, longest = random.Random(f"{part}/{i}"), seconds
        # A kill that came too late tests nothing, and shows that runs are faster than thought.
        for attempt in range(4):
            out = tmp_path / f"{i}-{attempt}"
            process = runs.start(settings(out))
            after = rng.uniform(0, longest)
            process.join(after)
            process.kill()
            process.join()
            assert resumed(settings, out) == expected, (i, after)
            shutil.rmtree(out)
            if process.exitcode == -signal.SIGKILL:
                return True
            longest = after
        return False

    assert all(two_at_once(kill_once, range(20)))


@pytest.mark.parametrize("when", ["before_save", "after_save"])
@pytest.mark.parametrize("step", [M - 1, M, M + 1])
def test_the_teacher_survives_kills_around_its_refresh(settings, whole, tmp_path, step, when):
    out = tmp_path / "run"
    every = settings(out, save_every=1)
    process = runs.start(every, kill_around_save, step, when)
    runs.wait(process, 60)
    assert process.exitcode == -signal.SIGKILL
    assert runs.finish(every) == 0
    assert runs.outcome(out) == whole[0]


def kill_around_save(step, when):
    save = checkpoint.save

    def killed(root, at, *arguments, **keywords):
        if at == step and when == "before_save":
            os.kill(os.getpid(), signal.SIGKILL)
        save(root, at, *arguments, **keywords)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = killed


# Where a run can break: module, attribute, before or after its n-th call.
CRASH_POINTS = {
    "before any file of a save": ("opsdc.record.checkpoint", "save_weights", "before", 3),
    "after the model's weights": ("opsdc.record.checkpoint", "save_weights", "after", 3),
    "after the teacher's weights": ("opsdc.record.checkpoint", "save_weights", "after", 4),
    "after the optimizer's moments": ("opsdc.record.checkpoint", "save_file", "after", 2),
    "between two syncs": ("opsdc.record.checkpoint", "_sync", "after", 20),
    "before the manifest": ("opsdc.record.checkpoint", "_write_json", "before", 4),
    "before the rename": ("opsdc.record.checkpoint.Path", "rename", "before", 2),
    "after the rename": ("opsdc.record.checkpoint.Path", "rename", "after", 2),
    "before pruning": ("opsdc.record.checkpoint", "_remove", "before", 1),
    "in the middle of pruning": ("opsdc.record.checkpoint.shutil", "rmtree", "before", 2),
    "after the optimizer's step": ("opsdc.train", "update", "after", 4),
    "after the teacher's refresh": ("opsdc.method.teacher.Teacher", "after_update", "after", M),
    "after the push to the sampler": ("opsdc.rollout.hf.HFSampler", "push", "after", 5),
    "before the record": ("opsdc.record.lines.Lines", "write", "before", 8),
    "between responses and record": ("opsdc.record.lines.Lines", "write", "after", 7),
    "before an evaluation is written": ("opsdc.eval.arms", "write_answers", "before", 3),
}


@pytest.mark.parametrize("how", ["exception", "hard exit"])
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_crash_at_a_named_point(settings, whole, tmp_path, point, how):
    out = tmp_path / "run"
    status = runs.finish(settings(out), crash_at, *CRASH_POINTS[point], how)
    log = runs.log(out)
    assert status == (77 if how == "hard exit" else 1), log
    assert ("RuntimeError: injected" in log) == (how == "exception")
    assert resumed(settings, out) == whole[0]


def crash_at(owner, name, when, n, how):
    target = pkgutil.resolve_name(owner)
    # Some are called by several threads at once.
    original, calls = getattr(target, name), itertools.count(1)

    def crashing(*arguments, **keywords):
        call = next(calls)
        if call == n and when == "before":
            crash()
        result = original(*arguments, **keywords)
        if call == n and when == "after":
            crash()
        return result

    def crash():
        if how == "hard exit":
            os._exit(77)
        raise RuntimeError("injected")

    setattr(target, name, crashing)


def test_twenty_crashes_in_a_row_leave_nothing_behind(settings, whole, tmp_path):
    """Of one run: kills at random times until it has ended in spite of them."""
    out = tmp_path / "run"
    many = settings(out, save_every=1)
    rng = random.Random(1)
    for _ in range(20):
        process = runs.start(many)
        process.join(rng.uniform(0, whole[1]))
        process.kill()
        process.join()
    assert runs.finish(many) == 0
    assert runs.outcome(out) == whole[0]
    assert runs.leftovers(out) == []
    alive = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True)
    assert alive.stdout == ""


def test_cycles_in_one_process_leave_no_descriptor_and_no_thread(settings, whole, tmp_path):
    out = tmp_path / "run"
    tree = settings(out, save_every=0)
    tree["train"]["steps"] = 20
    tree["eval"] = {"problems": 0}

    class StopAfterOne(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    def held():
        files = [os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
        return len(files), threading.active_count(), signal.getsignal(signal.SIGTERM)

    held()
    before = None
    for step in range(1, 20):
        trainer = OPSDCTrainer(None, OPSDCConfig.from_dict(tree), callbacks=[StopAfterOne()])
        assert trainer.train() == {"stopped": "SIGTERM", "steps": step}
        before = before or held()
    assert held() == before
    assert len(checkpoint.listing(out / "checkpoints")) == 2


def caught_sigterm(pid):
    """True once the process has its handler: from then on a stop is asked for, not suffered."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("part", PARTS)
def test_sigterm_at_a_random_moment(settings, whole, tmp_path, part):
    """Ten, each to a run of its own, which then goes on."""
    expected, seconds = whole

    def stop_once(i):
        rng, longest = random.Random(f"{part}/{i}"), seconds
        for attempt in range(4):
            out = tmp_path / f"{i}-{attempt}"
            process = runs.start(settings(out))
            while not caught_sigterm(process.pid):
                time.sleep(0.002)
            after = rng.uniform(0, 0.9 * longest)
            process.join(after)
            asked = process.exitcode is None
            if asked:
                with contextlib.suppress(ProcessLookupError):  # it may end in this very moment
                    os.kill(process.pid, rng.choice([signal.SIGTERM, signal.SIGINT]))
            took = runs.wait(process, 60)
            # A signal that comes when the run is over and has given its handlers back ends what is
            # left of the process; the record must be whole all the same.
            over = asked and "record: " in runs.log(out)
            assert process.exitcode == 0 or over, runs.log(out)
            stopped = "stopped by SIG" in runs.log(out)
            assert resumed(settings, out) == expected, (i, after)
            shutil.rmtree(out)
            if asked:
                return took, stopped
            longest = after
        raise AssertionError("runs are faster than thought")

    found = two_at_once(stop_once, range(10))
    assert max(took for took, _ in found) < 30
    # One asked for in the very last moments finds nothing left to leave.
    assert any(stopped for _, stopped in found)


# What a run of the demo model may be doing: module, attribute, and how long it may take.
DOING = {
    "preflight": ("opsdc.checks", "before_first_step", 5),
    "rollout": ("opsdc.train", "sample_step", 8),
    "update": ("opsdc.train", "update", 8),
    "save": ("opsdc.record.checkpoint", "save", 6),
}


def say_what_it_does():
    """In the log, and what it was when the signal came; before all this it is loading."""
    doing = ["load"]

    def watched(word, original):
        def call(*arguments, **keywords):
            doing.append(word)
            os.write(2, f"doing: {word}\n".encode())
            try:
                return original(*arguments, **keywords)
            finally:
                doing.pop()

        return call

    for word, (owner, name, _) in DOING.items():
        target = pkgutil.resolve_name(owner)
        setattr(target, name, watched(word, getattr(target, name)))
    asked = stop._ask

    def ask(number, frame):
        os.write(2, f"asked in: {doing[-1]}\n".encode())
        asked(number, frame)

    stop._ask = ask


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("part", PARTS)
def test_the_demo_model_is_left_within_thirty_seconds(smollm2, tmp_path, part):
    """Ten stops: of two runs, each stopped and started again five times.

    A stop comes at a random time after something, chosen at random, has begun. Part 0 takes the
    demo's own steps, the others shorter ones.
    """

    def stop_again_and_again(which):
        out = tmp_path / str(which)
        tree = OPSDCConfig.load("smollm2-cpu").to_dict()
        tree["output_dir"], tree["eval"]["problems"] = str(out), 0
        # At the second rollouts and updates after a start there is a step to save.
        tree["train"] |= {"steps": 100, "save_every": 2}
        if part:
            tree["rollout"] |= {"prompts_per_step": 4, "max_new_tokens": 32}
        rng = random.Random(f"{part}/{which}")
        took = []
        for _ in range(5):
            before = len(runs.log(out)) if took else 0
            process = runs.start(tree, say_what_it_does)
            while not caught_sigterm(process.pid):
                time.sleep(0.002)
            word = rng.choice(["load", *DOING])
            if word != "load":
                times = rng.choice([1, 2]) if word in ("rollout", "update") else 1
                while runs.log(out)[before:].count(f"doing: {word}") < times:
                    assert process.exitcode is None, runs.log(out)
                    time.sleep(0.01)
            process.join(rng.uniform(0, DOING[word][2] if word in DOING else 3))
            os.kill(process.pid, signal.SIGTERM)
            took.append(runs.wait(process, 60))
            assert process.exitcode == 0, runs.log(out)
            where = re.findall("asked in: (.*)", runs.log(out))
            print(f"{where[-1]}: {took[-1]:.1f} s", flush=True)
        assert runs.log(out).count("stopped by SIGTERM") == len(took)
        # Raises where none of them is good.
        checkpoint.newest_good(out / "checkpoints")
        # Not left for pytest to keep: gigabytes.
        shutil.rmtree(out)
        return max(took)

    assert max(two_at_once(stop_again_and_again, range(2))) < 30


# Where the signal arrives: its place, the call that sends it, and the step that is saved then.
STOPS = {
    "rollout": ("opsdc.rollout.hf._Advance", "__call__", 43, {2, 3}),
    "teacher's pass": ("opsdc.method.update", "teacher_pass", 4, {3}),
    "student's pass": ("opsdc.method.update", "distillation_loss", 8, {2, 3}),
    "save": ("opsdc.record.checkpoint", "save_file", 2, {4}),
    "teacher's refresh": ("opsdc.method.teacher.Teacher", "after_update", 3, {3}),
    "evaluation": ("opsdc.eval.answers", "score", 5, {2}),
}


@pytest.mark.parametrize("place", STOPS)
def test_sigterm_in_a_named_place_saves_the_step_before(settings, whole, tmp_path, place):
    owner, name, n, saved = STOPS[place]
    out = tmp_path / "run"
    assert runs.finish(settings(out), signal_at, owner, name, n) == 0, runs.log(out)
    newest = checkpoint.newest_good(out / "checkpoints")
    assert int(newest.name[-6:]) in saved
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == int(newest.name[-6:])
    assert resumed(settings, out) == whole[0]


def signal_at(owner, name, n):
    target = pkgutil.resolve_name(owner)
    original, calls = getattr(target, name), 0

    def signalling(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    setattr(target, name, signalling)


def test_a_second_signal_ends_at_once(settings, tmp_path):
    out = tmp_path / "run"
    process = runs.start(settings(out), slow_saves)
    while "saving slowly" not in (runs.log(out) if Path(f"{out}.log").exists() else ""):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(1)
    assert process.exitcode is None, "the first one waits for the save"
    os.kill(process.pid, signal.SIGTERM)
    process.join(2)
    assert process.exitcode == -signal.SIGTERM
    assert "once more ends at once" in runs.log(out)


def slow_saves():
    save = checkpoint.save_file

    def slow(*arguments):
        print("saving slowly", flush=True)
        for _ in range(600):
            time.sleep(0.1)
        save(*arguments)

    checkpoint.save_file = slow


@contextmanager
def small_disk(folder, options):
    """A real file system of its own; skipped where nobody may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left", [300_000, 0])
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(settings, whole, tmp_path, left):
    """Room for the record but for no checkpoint, and for nothing at all."""
    disk = tmp_path / "disk"
    with small_disk(disk, "size=3m"):
        out = disk / "run"
        # The first checkpoint fits. Then something else takes most of the rest.
        assert runs.finish(settings(out), fill_after_save, str(disk), left) == 2
        log = runs.log(out)
        assert "No space left on device" in log
        assert ("cannot write checkpoint" if left else "jsonl: [Errno 28]") in log
        assert "untouched" in log
        assert "Traceback" not in log
        root = out / "checkpoints"
        assert [p.name for p in checkpoint.listing(root)] == ["step-000002"]
        assert checkpoint.newest_good(root) is not None
        (disk / "ballast").unlink()
        assert resumed(settings, out) == whole[0]


def fill_after_save(disk, left):
    save = checkpoint.save

    def saved(*arguments, **keywords):
        save(*arguments, **keywords)
        room = shutil.disk_usage(disk).free
        Path(disk, "ballast").write_bytes(bytes(room - left))

    checkpoint.save = saved


def test_files_that_may_not_grow_keep_the_old_checkpoint(settings, whole, tmp_path):
    """The same by a limit of the process, which needs no mount."""
    out = tmp_path / "run"
    assert runs.finish(settings(out), limit_files_after_save) == 2
    log = runs.log(out)
    assert "File too large" in log
    assert "Traceback" not in log
    assert checkpoint.newest_good(out / "checkpoints").name == "step-000002"
    assert resumed(settings, out) == whole[0]


def limit_files_after_save():
    save = checkpoint.save

    def saved(*arguments, **keywords):
        save(*arguments, **keywords)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    checkpoint.save = saved


def test_a_read_only_disk_keeps_the_old_checkpoint_and_says_so(settings, whole, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "size=40m"):
        # The log and the settings have to be written elsewhere.
        (disk / "checkpoints").mkdir()
        plain = tmp_path / "run"
        plain.mkdir()
        (plain / "checkpoints").symlink_to(disk / "checkpoints")
        assert runs.finish(settings(plain), read_only_after_save, str(disk)) == 2
        log = runs.log(plain)
        assert "Read-only file system" in log
        assert "Traceback" not in log
        assert checkpoint.newest_good(disk / "checkpoints").name == "step-000002"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert resumed(settings, plain) == whole[0]


def read_only_after_save(disk):
    save = checkpoint.save

    def saved(*arguments, **keywords):
        save(*arguments, **keywords)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

    checkpoint.save = saved


@pytest.mark.slow
@pytest.mark.chaos
def test_a_long_run_does_not_grow(settings, tmp_path):
    """500 steps: resident memory rises by at most 1 % per 100 steps."""
    out = tmp_path / "run"
    tree = settings(out, steps=500, save_every=50)
    tree["eval"] = {"problems": 0}
    process = runs.start(tree)
    sizes = {}
    while process.exitcode is None:
        process.join(0.2)
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            steps = (out / "metrics.jsonl").read_text().count("\n")
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes[steps] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert process.exitcode == 0, runs.log(out)
    # The first steps fill caches; pools are warm after a hundred.
    steps = torch.tensor([s for s in sizes if 100 <= s <= 495], dtype=torch.float64)
    mib = torch.tensor([sizes[int(s)] for s in steps], dtype=torch.float64)
    centred = steps - steps.mean()
    slope = float((centred * mib).sum() / centred.square().sum())
    print(f"{float(mib.mean()):.0f} MiB, {100 * slope:+.2f} MiB per 100 steps")
    assert 100 * slope <= 0.01 * float(mib.mean())
