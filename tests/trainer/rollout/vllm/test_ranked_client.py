"""vLLM and several ranks, as real gloo processes: an engine on each, or one server for all.

What is sampled must not depend on the number of ranks, nor on where vLLM runs.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
from helpers import ranks as t
from helpers import runs
from helpers.vllm_runs import small_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; `make install` does it",
    ),
]
STEPS = 3
LORA = {"lora": {"r": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, problem_file):
    folder = small_folder(tmp_path_factory, "qwen3", tied=False, head_dim=64)

    def make(out, engine="vllm", strategy="ddp", **model):
        return {
            "output_dir": str(out),
            "model": {"name_or_path": str(folder), **model},
            "data": {"source": str(problem_file), "eval_size": 6},
            "prompt": {"instruction": "Be brief.", "max_tokens": 128},
            "rollout": {
                "engine": engine,
                "prompts_per_step": 3,
                "max_new_tokens": 12,
                "timeout_s": 100,
            },
            "teacher": {"refresh_steps": 2},
            "optim": {"lr": 1e-3},
            "train": {"steps": STEPS, "save_every": 2, "max_tokens_per_micro_batch": 300},
            "eval": {"problems": 1, "max_new_tokens": 4, "scorer": "number"},
            "distributed": {"strategy": strategy},
        }

    return make


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The run of one process, of all weights or of an adapter."""
    done = {}

    def run(**model):
        key = json.dumps(model)
        if key not in done:
            out = tmp_path_factory.mktemp("alone") / "run"
            assert runs.finish(settings(out, **model)) == 0, runs.log(out)
            done[key] = out
        return done[key]

    return run


def record(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(out, expected):
    assert (out / "rollouts.jsonl").read_text() == (expected / "rollouts.jsonl").read_text()
    rows, wanted = record(out), record(expected)
    assert len(rows) == STEPS
    for row, other in zip(rows, wanted):
        assert row["loss_nats"] == pytest.approx(other["loss_nats"], rel=1e-5)
        # Proven anew by every rank, and the worst of them kept.
        assert 0 < row["perf/probe_max_difference"] <= 1e-4


CASES = {
    "an engine each": ("vllm", "ddp", {}),
    "an engine each, parts of the model": ("vllm", "fsdp", {}),
    "an engine each, parts of an adapter": ("vllm", "fsdp", LORA),
    "one server": ("vllm_server", "ddp", {}),
    "one server, parts of an adapter": ("vllm_server", "fsdp", LORA),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_sample_and_learn_as_one(settings, alone, tmp_path, case):
    engine, strategy, model = CASES[case]
    out = tmp_path / "run"
    assert t.train(settings(out, engine, strategy, **model), 2) == [0, 0], runs.log(out)
    assert_same_run(out, alone(**model))
    log = runs.log(out)
    place = "in each of the ranks' processes" if engine == "vllm" else "for all ranks"
    assert log.count(place) == log.count("rollouts: vLLM") == 1


def test_a_server_that_is_killed_gets_the_gathered_weights_again(settings, alone, tmp_path):
    """With parts of the model on each rank, and the other rank waiting for the answers."""
    out = tmp_path / "run"
    run = settings(out, "vllm_server", "fsdp")
    # Preflight, two evaluations of the base, two steps: at the third the server is gone.
    assert t.train(run, 2, t.kill_server_before_sampling, 6) == [0, 0], runs.log(out)
    assert_same_run(out, alone())
    assert "its server was killed" in runs.log(out)


def test_a_push_that_one_rank_loses_ends_the_run_by_its_name(settings, tmp_path):
    out = tmp_path / "run"
    # Pushed before the first step and after each: the second of rank 1 goes nowhere.
    assert 0 not in t.train(settings(out), 2, t.lose_push, 2)
    log = runs.log(out)
    assert log.count("opsdc train: rank 1: after the push of weights version 1") == 1
    assert "does not compute with these weights" in log
    assert not (out / "metrics.jsonl").is_file() or record(out) == []
