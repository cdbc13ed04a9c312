"""vLLM itself, on a CPU: the same model as the trainer's, the weights of the last push, no others.

Each engine is a process of its own: the run's server, or a script for the engine in the trainer's.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model
from helpers.vllm_runs import SIZES, assert_synchronized, measure, needs_vllm, small_folder

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, RolloutError
from opsdc.record.versions import check_vllm
from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.start import start_sampler
from opsdc.rollout.vllm.engine import VLLMEngine
from opsdc.rollout.vllm.messages import EngineOptions
from opsdc.rollout.weights import sequence_logprobs
from opsdc.train import OPSDCTrainer

pytestmark = pytest.mark.whole


@needs_vllm
def test_colocated_with_an_adapter_and_a_head_of_its_own(make_config, tmp_path_factory, tmp_path):
    folder = small_folder(tmp_path_factory, "qwen3", tied=False, head_dim=64)
    config = make_config(
        **{
            "model.name_or_path": str(folder),
            "model.lora": {"r": 4, "alpha": 8},
            "rollout.engine": "vllm",
            "rollout.max_new_tokens": 24,
            "optim.lr": 1e-2,
        }
    )
    found = measure(config, 200, tmp_path)
    assert_synchronized(found, 5)
    assert "does not compute with these weights" in found["lost_push"]
    assert "push before" in found["then_generate"]
    assert found["push_again"] is None
    assert "have changed" in found["behind_the_back"]
    assert "were not in the push" in found["partial"]
    assert found["threads_function_kept"]
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["weights_version"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(0 <= row["perf/probe_max_difference"] <= 3e-4 for row in rows)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A run's own server for a model with a tied head; (sampler, model, config)."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; `make install` does it")
    folder = small_folder(tmp_path_factory, "llama", tied=True)
    config = OPSDCConfig.from_dict(
        {
            "output_dir": str(tmp_path_factory.mktemp("server") / "run"),
            "model": {"name_or_path": str(folder)},
            "prompt": {"max_tokens": 64},
            "rollout": {"engine": "vllm_server", "max_new_tokens": 200, "timeout_s": 120},
            "eval": {"max_new_tokens": 200},
        }
    )
    model = tiny_model("llama", tied=True, **SIZES).eval()
    sampler = start_sampler(config, model, byte_tokenizer(), list(range(10, 60)))
    yield sampler, model, config
    sampler.close()


def requests(count, step=1):
    return [Request(key=f"{step}/{i}", prompt_ids=[5 + i, 6, 7, 8]) for i in range(count)]


def worst(model, rollouts):
    gaps = []
    for r in rollouts:
        own = sequence_logprobs(model, [*r.prompt_ids, *r.response_ids], torch.float32)
        gaps += [abs(a - b) for a, b in zip(own[-len(r.response_ids) :], r.logprobs, strict=True)]
    return max(gaps)


def test_server_samples_the_pushed_weights(server):
    sampler, model, _ = server
    params = SamplingParams(max_new_tokens=40)
    sampler.push(model, 0)
    first = sampler.generate(requests(8), params, label="test")
    assert worst(model, first) <= 1e-4
    assert [r.key for r in first] == [r.key for r in requests(8)]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.sign(p), alpha=1e-2)
    assert worst(model, first) > 1e-4
    sampler.push(model, 1)
    second = sampler.generate(requests(8), params, label="test")
    assert worst(model, second) <= 1e-4
    assert {r.weights_version for r in second} == {1}


def test_streams_do_not_depend_on_the_batch(server):
    sampler, model, _ = server
    sampler.push(model, 2)
    params = SamplingParams(max_new_tokens=16)
    together = sampler.generate(requests(6), params, label="test")
    alone = sampler.generate(requests(6)[3:4], params, label="test")
    assert alone[0].response_ids == together[3].response_ids
    other = sampler.generate(requests(6, step=2), params, label="test")
    assert [r.response_ids for r in other] != [r.response_ids for r in together]
    greedy = SamplingParams(max_new_tokens=16, temperature=0.0)
    again = [sampler.generate(requests(2, step), greedy, label="test") for step in (1, 2)]
    assert [r.response_ids for r in again[0]] == [r.response_ids for r in again[1]]


def test_server_killed_in_the_middle_of_a_batch(server):
    """SIGKILL while it samples: a new process, the same weights, the very same responses."""
    sampler, model, _ = server
    sampler.push(model, 3)
    params = SamplingParams(max_new_tokens=200)
    expected = sampler.generate(requests(16), params, label="test")
    process = sampler._engine._process
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    began = time.monotonic()
    rollouts = sampler.generate(requests(16), params, label="test")
    assert process.poll() == -signal.SIGKILL
    assert sampler._engine._process.pid != process.pid
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in expected]
    assert {r.weights_version for r in rollouts} == {3}
    assert time.monotonic() - began < 2 * 120


def test_server_answers_nobody_without_the_key(server):
    sampler, model, _ = server
    engine = sampler._engine
    sampler.push(model, 4)
    assert engine._address[0] == "127.0.0.1"
    log, key = engine._log, engine._key
    # As a stranger would: another key, and no power over the process.
    engine._key, engine._log = "guess", None
    with pytest.raises(RolloutError, match="wrong or missing key"):
        sampler.generate(requests(1), SamplingParams(max_new_tokens=4), label="test")
    engine._key, engine._log = key, log
    # Nor are weights read from anywhere but the run's own folder.
    hostile = {"op": "load", "folder": "../../etc", "weights_id": "x", "probe": [5, 6]}
    with pytest.raises(Exception, match="no folder of weights"):
        engine._request(hostile, time.monotonic() + 10)
    assert len(sampler.generate(requests(1), SamplingParams(max_new_tokens=4), label="test")) == 1


@pytest.mark.slow
@needs_vllm
def test_a_run_told_to_stop_while_its_server_starts_ends_at_once(
    make_config, tmp_path_factory, tmp_path
):
    out = tmp_path / "run"
    path = tmp_path / "config.yaml"
    folder = small_folder(tmp_path_factory, "llama")
    config = make_config(
        **{"model.name_or_path": str(folder), "rollout.engine": "vllm_server"},
        output_dir=str(out),
    )
    path.write_text(config.to_yaml(), "utf-8")
    command = [sys.executable, "-m", "opsdc", "train", "--config", str(path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (out / "vllm_server.log").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=30)
    assert run.returncode == 0
    assert "stopped by SIGTERM before the run began" in printed


@pytest.mark.slow
def test_server_dies_with_its_run(server, tmp_path):
    """No process and no weights are left behind when the trainer is killed."""
    _, _, config = server
    code = (
        "import sys, time\n"
        "from opsdc.config import OPSDCConfig\n"
        "from opsdc.models.load import load_model, load_tokenizer\n"
        "from opsdc.rollout.start import start_sampler\n"
        "config = OPSDCConfig.load(sys.argv[1])\n"
        "model, tokenizer = load_model(config.model), load_tokenizer(config.model)\n"
        "sampler = start_sampler(config, model, tokenizer, list(range(10, 40)))\n"
        "engine = sampler._engine\n"
        "print(engine._process.pid, engine.weights_dir, flush=True)\n"
        "time.sleep(600)\n"
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), "utf-8")
    run = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    for raw in run.stdout:
        words = raw.decode().split()
        if words and words[0].isdigit():
            pid, folder = int(words[0]), Path(words[1])
            break
    assert folder.is_dir()
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while (alive(pid) or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)
    assert not folder.exists()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_vllm
def test_a_whole_run_over_a_server_started_by_hand(
    make_config, tmp_path_factory, tmp_path, monkeypatch
):
    """`opsdc serve` with a key, and a run that is pointed to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = make_config(
        **{
            "model.name_or_path": str(small_folder(tmp_path_factory, "llama")),
            "rollout.engine": "vllm_server",
            "rollout.timeout_s": 60,
            "rollout.server_address": address,
            "rollout.weights_dir": str(tmp_path),
            "train.steps": 2,
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), "utf-8")
    monkeypatch.setenv("OPSDC_SERVER_KEY", "right")
    command = [sys.executable, "-m", "opsdc", "serve", "--config", str(path)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert any("listening on" in line for line in server.stdout)
        monkeypatch.setenv("OPSDC_SERVER_KEY", "wrong")
        with pytest.raises(ConfigError, match="wrong or missing key"):
            OPSDCTrainer(None, config)
        monkeypatch.setenv("OPSDC_SERVER_KEY", "right")
        tree = config.to_dict()
        other = OPSDCConfig.from_dict({**tree, "model": {**tree["model"], "dtype": "bfloat16"}})
        with pytest.raises(ConfigError, match="start it with this run's config"):
            OPSDCTrainer(None, other)
        trainer = OPSDCTrainer(None, config)
        trainer.train()
        trainer.sampler.close()
        # It is not the run's to end.
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()
    rows = [json.loads(x) for x in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {(r["step"], r["weights_version"]) for r in rows} == {(1, 0), (2, 1)}
    assert not list(tmp_path.rglob("weights-*.safetensors"))


@pytest.mark.parametrize("name", ["VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"])
@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_dangerous_variables_are_refused(make_config, monkeypatch, name, engine):
    monkeypatch.setenv(name, "1")
    model = tiny_model()
    config = make_config(**{"rollout.engine": engine})
    with pytest.raises(ConfigError, match=name):
        start_sampler(config, model, byte_tokenizer(), [5, 6, 7])


class Recorder:
    """In place of vLLM on a GPU, which is the only place where it can sleep: the calls it gets."""

    def __init__(self):
        self.calls = []

    def wake_up(self):
        self.calls.append("wake_up")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def collective_rpc(self, name, args):
        self.calls.append(name)
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(("gpu", "sleeps"), [(True, True), (True, False), (False, True)])
def test_an_engine_is_awake_only_for_its_work_even_when_that_fails(gpu, sleeps):
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.options = EngineOptions(
        folder="",
        dtype="bfloat16",
        vocab_size=264,
        max_model_len=64,
        max_num_seqs=4,
        memory_share=0.3,
        trust_remote_code=False,
        sleeps=sleeps,
    )
    engine._gpu, engine._llm, engine._weights_id = gpu, Recorder(), "old"
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.load([], "new", [5, 6])
    around = ["wake_up", "opsdc_load", "sleep 1"]
    assert engine._llm.calls == (around if gpu and sleeps else ["opsdc_load"])
    # Nobody may take what it holds now for the old weights or the new.
    assert engine._weights_id == ""


@pytest.mark.parametrize("version", [None, "0.26.1", "0.33.0", "1.0.0"])
def test_unsupported_versions_are_named(monkeypatch, version):
    monkeypatch.setattr(
        "opsdc.record.versions.versions_of", lambda *names: dict.fromkeys(names, version)
    )
    with pytest.raises(ConfigError, match=r"vllm>=0\.27,<0\.33"):
        check_vllm()


def test_hf_runs_never_import_vllm(make_config, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(make_config(**{"train.steps": 1, "eval.problems": 0}).to_yaml(), "utf-8")
    code = (
        "import sys; from opsdc.cli import main\n"
        f"assert main(['train', '--config', {str(path)!r}]) == 0\n"
        "assert 'vllm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.model
@needs_vllm
@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_the_demo_model_agrees_over_a_thousand_tokens(smollm2, tmp_path, engine):
    """At the start and after five updates of the demo; without pushes it would not."""
    config = OPSDCConfig.load(
        "smollm2-cpu",
        {
            "output_dir": str(tmp_path / "run"),
            "rollout.engine": engine,
            "rollout.max_new_tokens": 64,
            "train.steps": 5,
            "eval.problems": 0,
        },
    )
    found = measure(config, 1000, tmp_path)
    print(found)
    assert found["tokens"] >= 1000
    assert_synchronized(found, 5)
    assert os.listdir(tmp_path / "run" / "model")
