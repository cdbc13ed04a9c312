"""Several ranks, as real gloo processes: the same gradients, tokens and record as one process.

Equality of a step is to 1e-6 of a gradient's size plus the conditioning of fp32 logits (`bound`).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ranks as t
from helpers import runs

from opsdc.method.batch import share_out
from opsdc.ranks.talk import ALONE
from opsdc.record import checkpoint
from opsdc.record.lines import read_lines

pytestmark = pytest.mark.whole

UNEVEN = (9, 3, 14, 1, 6, 12, 2, 7)
TWO = (11, 4)
"""Of three ranks one gets nothing."""
LORA = {"model": {"lora": {"r": 4, "alpha": 8}}}


def settings_of_steps(strategy, **more):
    return {
        "distributed": {"strategy": strategy, **more.pop("distributed", {})},
        "teacher": {"mode": "refresh", "refresh_steps": 2},
        # Gradients of equal direction would be equal after clipping.
        "optim": {"lr": 1e-3, "grad_clip": 1e9},
        # Ranks have different numbers of micro-batches.
        "train": {"max_tokens_per_micro_batch": 40},
        **more,
    }


def bound(loss):
    """Logits of the tiny model stay below 40."""
    return 1e-6 + 3e-7 * 40 / math.sqrt(2 * loss)


CASES = {
    "ddp": ("ddp", 2, UNEVEN, {}),
    "ddp, three ranks": ("ddp", 3, UNEVEN, {}),
    "ddp, a rank has nothing": ("ddp", 3, TWO, {}),
    "ddp, an adapter": ("ddp", 2, UNEVEN, LORA),
    "fsdp": ("fsdp", 2, UNEVEN, {}),
    "fsdp, three ranks": ("fsdp", 3, UNEVEN, {"kind": "qwen3", "tied": False}),
    "fsdp, a rank has nothing": ("fsdp", 3, TWO, {}),
    "fsdp, an adapter, a rank has nothing": ("fsdp", 3, TWO, LORA),
    "fsdp, an adapter": ("fsdp", 2, UNEVEN, LORA),
    "fsdp, gradients added at once": (
        "fsdp",
        2,
        UNEVEN,
        {"distributed": {"reduce_every_micro_batch": True}},
    ),
    "fsdp, activations again": ("fsdp", 2, UNEVEN, {"model": {"gradient_checkpointing": True}}),
    "ddp, half of the tokens": ("ddp", 2, UNEVEN, {"loss": {"token_share": 0.5}}),
    "fsdp, a rank has nothing, tokens by entropy": (
        "fsdp",
        3,
        TWO,
        {"loss": {"token_share": 0.6, "token_criterion": "entropy", "skip_tolerance": 1e-3}},
    ),
    "fsdp, ema, mean over tokens": (
        "fsdp",
        2,
        UNEVEN,
        {"teacher": {"mode": "ema", "ema_decay": 0.5}, "loss": {"normalization": "token"}},
    ),
}


QUICK = ("ddp, a rank has nothing", "fsdp, three ranks", "fsdp, an adapter, a rank has nothing")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_five_steps_are_those_of_one_process(case):
    strategy, size, lengths, more = CASES[case]
    settings = settings_of_steps(strategy, **more)
    one = t.five_steps(settings, lengths)
    found = t.ranks(size, t.five_steps, settings, lengths)
    assert min(one["loss"]) > 0.1
    limit = bound(min(one["loss"]))
    for rank in found:
        assert rank["loss"] == found[0]["loss"]
        assert rank["tokens"] == one["tokens"]
        assert rank["loss"] == pytest.approx(one["loss"], rel=limit)
        assert rank["grad_norm"] == pytest.approx(one["grad_norm"], rel=limit)
        assert rank["entropy"] == pytest.approx(one["entropy"], rel=1e-5)
        assert t.distance(one["gradients"], rank["gradients"]) <= limit
        assert t.distance(one["weights"], rank["weights"]) <= 1e-5


def test_the_comparison_fails_where_gradients_are_averaged():
    settings = settings_of_steps("fsdp")
    one = t.five_steps(settings, UNEVEN)
    found = t.ranks(2, t.averaged, settings, UNEVEN)[0]
    assert t.distance(one["gradients"], found["gradients"]) == pytest.approx(0.5, rel=1e-3)


def test_shares_are_balanced_and_complete():
    lengths = [9000, 10, 300, 300, 4000, 5000, 20]
    shares = share_out(lengths, 3)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) <= 1.02 * max(lengths)
    assert share_out([5], 3) == [[0], [], []]


def test_what_ranks_tell_each_other():
    for rank, found in enumerate(t.ranks(3, t.talk)):
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["first"] == "from 0"
        assert found["sum"] == 0.1 + 1.1 + 2.1
        assert found["any"] == [True, False]
        assert found["rows"] == [1.0, 2.0, 2.0]
        assert found["error"] == ("ConfigError", "rank 1: no" if rank != 1 else "no")
        assert found["stopped"] == "SIGTERM"
    assert ALONE.gather(3) == [3]
    assert ALONE.on_each_rank(lambda: 4) == [4]


@pytest.mark.parametrize(
    "more", [LORA, pytest.param({"kind": "qwen3", "tied": False}, marks=pytest.mark.slow)]
)
def test_what_is_pushed_of_parts_is_what_is_pushed_of_the_whole(more):
    whole, expected = t.pushed_weights(settings_of_steps("ddp", **more))
    assert not whole
    for sharded, found in t.ranks(2, t.pushed_weights, settings_of_steps("fsdp", **more)):
        assert sharded
        assert list(found) == list(expected)
        for name in expected:
            assert found[name] == pytest.approx(expected[name], abs=1e-6)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all():
    for skipped, unchanged in t.ranks(2, t.not_finite_on_one, settings_of_steps("fsdp")):
        assert skipped
        assert unchanged


# Whole runs.

STEPS = 6


@pytest.fixture(scope="module")
def settings(tiny_folder, problem_file):
    def make(out, steps=STEPS, **more):
        return {
            "output_dir": str(out),
            "model": {"name_or_path": str(tiny_folder), **more.pop("model", {})},
            "data": {"source": str(problem_file), "eval_size": 6},
            "prompt": {"instruction": "Be brief."},
            "rollout": {"prompts_per_step": 3, "max_new_tokens": 8},
            "teacher": {"refresh_steps": 2},
            "optim": {"lr": 1e-3},
            "train": {"steps": steps, "save_every": 2, "max_tokens_per_micro_batch": 100},
            "eval": {"problems": 2, "every": 2, "max_new_tokens": 4, "scorer": "number"},
            "distributed": more,
        }

    return make


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert runs.finish(settings(out)) == 0
    return out


def record(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(out, expected):
    """The same tokens, and the same numbers but for the order of additions."""
    assert (out / "rollouts.jsonl").read_text() == (expected / "rollouts.jsonl").read_text()
    looks = [read_lines(root / "divergence.jsonl") for root in (out, expected)]
    assert len(looks[0]) == len(looks[1]) > 2
    for look, other in zip(*looks):
        assert look["key"] == other["key"]
        assert [text for text, _ in look["tokens"]] == [text for text, _ in other["tokens"]]
        nats = [value for _, value in other["tokens"]]
        assert [value for _, value in look["tokens"]] == pytest.approx(nats, abs=2e-4)
    for name in ("base", "prompt_only", "step-000002", "step-000004", "trained"):
        answers = [(root / "eval" / f"{name}.jsonl").read_text() for root in (out, expected)]
        assert answers[0] == answers[1]
    rows, wanted = record(out), record(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted):
        for key, value in other.items():
            if not key.startswith("perf/"):
                assert row[key] == pytest.approx(value, rel=1e-5), (row["step"], key)


def test_ranks_sample_the_same_tokens_and_keep_one_record(settings, alone, tmp_path):
    out = tmp_path / "run"
    assert t.train(settings(out), 2) == [0, 0], runs.log(out)
    assert_same_run(out, alone)
    assert runs.log(out).count("step 3/6") == 1
    assert json.loads((out / "summary.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("train_on", ["dial", pytest.param("correct", marks=pytest.mark.slow)])
def test_ranks_agree_who_is_right_and_what_the_gate_lets_pass(settings, tmp_path, train_on):
    """Judged by one, known to all; the target's dial moves alike."""
    records = []
    for size in (1, 2):
        out = tmp_path / f"ranks-{size}"
        run = settings(out, strategy="ddp")
        run["data"] |= {"train_on": train_on, "scorer": "number", "gate_size": 5}
        run["teacher"] |= {"gate": True, "target": 0.4}
        run["rollout"] |= {"max_new_tokens": 40}
        run["train"] |= {"keep_best": True}
        assert t.train(run, size, t.right_by_length) == [0] * size, runs.log(out)
        records.append(record(out))
        lines = runs.log(out).splitlines()
        records[-1].append([line for line in lines if line.startswith(("gate", "keeping"))])
        records[-1].append(sorted(p.name for p in (out / "eval").iterdir()))
    one, two = records
    assert {row["right_share"] for row in one[:-2]} - {0.0, 1.0}
    assert any(row["dial"] != 1.0 for row in one[:-2])
    assert len(one[-2]) >= 2
    assert two[-2:] == one[-2:]
    for row, wanted in zip(two[:-2], one[:-2]):
        for key, value in wanted.items():
            if not key.startswith("perf/"):
                assert row[key] == pytest.approx(value, rel=1e-4), (row["step"], key)


def test_a_run_goes_on_with_another_number_of_ranks(settings, alone, tmp_path):
    out = tmp_path / "run"
    for size, steps in ((2, 2), (1, 4), (3, STEPS)):
        run = settings(out, steps, strategy="fsdp")
        assert t.train(run, size) == [0] * size, runs.log(out)
    rows, wanted = record(out), record(alone)
    assert [r["loss_nats"] for r in rows] == pytest.approx(
        [r["loss_nats"] for r in wanted], rel=1e-5
    )
    assert (out / "rollouts.jsonl").read_text() == (alone / "rollouts.jsonl").read_text()
    newest = checkpoint.newest_good(out / "checkpoints")
    names = {p.name for p in newest.rglob("*.safetensors")}
    assert "model-00003-of-00003.safetensors" in names
    assert "optimizer-00002-of-00003.safetensors" in names
    assert runs.leftovers(out) == []
    # An ordinary folder for everybody else.
    from opsdc.config.settings import ModelConfig
    from opsdc.models.load import load_trained

    model = load_trained(ModelConfig(name_or_path=str(out / "model")), out / "model")
    expected = load_trained(ModelConfig(name_or_path=str(alone / "model")), alone / "model")
    weights = {n: p.detach().numpy() for n, p in expected.named_parameters()}
    assert t.distance(weights, {n: p.detach().numpy() for n, p in model.named_parameters()}) < 1e-5


@pytest.mark.slow
def test_an_adapter_goes_on_with_another_number_of_ranks(settings, tmp_path):
    losses = []
    for name, plan in (("one", ((1, 3),)), ("many", ((2, 1), (1, 2), (3, 3)))):
        out = tmp_path / name
        for size, steps in plan:
            run = settings(out, steps, strategy="fsdp", model=LORA["model"])
            assert t.train(run, size) == [0] * size, runs.log(out)
        losses.append([row["loss_nats"] for row in record(out)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


PLACES = {
    "rollout": ("ddp", "opsdc.rollout.hf._Advance", "__call__", 35),
    "student's pass": ("fsdp", "opsdc.method.update", "distillation_loss", 4),
}


@pytest.mark.parametrize(
    "place", ["rollout", pytest.param("student's pass", marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_leaves_the_step_on_all(settings, tmp_path, place):
    strategy, owner, name, n = PLACES[place]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert t.train(settings(whole, strategy=strategy), 2) == [0, 0]
    run = settings(out, strategy=strategy)
    assert t.train(run, 2, t.signal_one, owner, name, n) == [0, 0], runs.log(out)
    assert "stopped by SIGTERM: step" in runs.log(out)
    newest = checkpoint.newest_good(out / "checkpoints")
    assert checkpoint.read_state(newest)["step"] == record(out)[-1]["step"] < STEPS
    assert t.train(run, 2) == [0, 0], runs.log(out)
    assert runs.leftovers(out) == []
    assert t.outcome(out) == t.outcome(whole)


def test_the_first_rank_that_fails_speaks_for_all(settings, tmp_path):
    out = tmp_path / "run"
    statuses = t.train(settings(out), 2, t.fail_on_one, "opsdc.method.update", "hidden_states", 7)
    assert 0 not in statuses
    log = runs.log(out)
    assert log.count("rank 1 failed:") == 1
    assert log.count("RuntimeError: injected") == 1
    assert "Connection" not in log


def test_a_mistake_of_the_users_is_said_once(settings, tmp_path):
    out = tmp_path / "run"
    run = settings(out)
    run["data"]["source"] = str(tmp_path / "nothing.jsonl")
    assert 0 not in t.train(run, 2)
    assert runs.log(out).count("nothing.jsonl") == 1


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_no_memory_on_one_rank_saves_and_says_what_to_do(settings, tmp_path, strategy):
    """In the loss; with ddp anywhere else as well."""
    out = tmp_path / "run"
    run = settings(out, strategy=strategy)
    statuses = t.train(run, 2, t.no_memory_on_one, "opsdc.method.update", "distillation_loss", 5)
    assert 0 not in statuses
    log = runs.log(out)
    assert log.count("opsdc train: ") == 1
    assert "is saved. Lower train.max_tokens_per_micro_batch" in log
    newest = checkpoint.newest_good(out / "checkpoints")
    # Between two regular saves.
    assert checkpoint.read_state(newest)["step"] == record(out)[-1]["step"] == 3
    assert t.train(run, 2) == [0, 0], runs.log(out)
    assert [row["step"] for row in record(out)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_no_memory_in_a_sharded_layer_ends_all_and_says_what_to_do(settings, tmp_path):
    out = tmp_path / "run"
    run = settings(out, strategy="fsdp")
    statuses = t.train(run, 2, t.no_memory_on_one, "opsdc.method.update", "hidden_states", 9)
    assert 0 not in statuses
    log = runs.log(out)
    assert log.count("opsdc train: rank 1: CUDA out of memory") == 1
    assert "goes on from the last checkpoint" in log
    assert checkpoint.read_state(checkpoint.newest_good(out / "checkpoints"))["step"] == 2


def test_ranks_agree_which_checkpoint_is_good(settings, alone, tmp_path):
    out = tmp_path / "run"
    run = settings(out, 4, strategy="fsdp")
    assert t.train(run, 2) == [0, 0]
    damaged = out / "checkpoints" / "step-000004" / "optimizer-00002-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    run = settings(out, strategy="fsdp")
    assert t.train(run, 2) == [0, 0], runs.log(out)
    assert "step-000004 is damaged (optimizer-00002-of-00002.safetensors" in runs.log(out)
    assert runs.log(out).count("resuming after step 2") == 1
    assert (out / "rollouts.jsonl").read_text() == (alone / "rollouts.jsonl").read_text()


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_real_launchers(settings, alone, tmp_path, launcher):
    out = tmp_path / "run"
    done = launch(settings(out, strategy="fsdp"), launcher)
    log = done.communicate(timeout=300)[0]
    assert done.returncode == 0, log
    assert_same_run(out, alone)
    assert json.loads((out / "summary.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_a_signal_to_torchrun_itself(settings, tmp_path):
    """As a scheduler pre-empts: the launcher passes it on, the state is saved within its 30 s."""
    out = tmp_path / "run"
    run = settings(out, 400)
    started = launch(run, "torchrun")
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").is_file() or len(record(out)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started.send_signal(signal.SIGTERM)
    log = started.communicate(timeout=60)[0]
    assert "stopped by SIGTERM" in log, log
    steps = len(record(out))
    newest = checkpoint.newest_good(out / "checkpoints")
    assert checkpoint.read_state(newest)["step"] == steps
    run = settings(out, steps + 1)
    assert t.train(run, 2) == [0, 0], runs.log(out)


def launch(run, launcher):
    out = Path(run["output_dir"])
    out.parent.mkdir(exist_ok=True)
    config = out.with_suffix(".json")
    config.write_text(json.dumps(run))
    command, *options = LAUNCHERS[launcher]
    port = ["--master_port" if launcher == "torchrun" else "--main_process_port"]
    return subprocess.Popen(
        [
            str(Path(sys.executable).parent / command),
            *options,
            *port,
            str(t.free_port()),
            "-m",
            "opsdc",
            "train",
            "--config",
            str(config),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
