"""Runs with vLLM: models of sizes that it takes, and what a process of its own measures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.tiny import byte_tokenizer, tiny_model
from opsdc.config.settings import OPSDCConfig

SCRIPT = Path(__file__).with_name("vllm_script.py")
# Sizes of heads that vLLM's CPU attention has.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; `make install` does it"
)


def small_folder(tmp_path_factory, kind, **settings):
    folder = tmp_path_factory.mktemp(kind)
    tiny_model(kind, **{**SIZES, **settings}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def measure(config: OPSDCConfig, tokens: int, tmp_path: Path) -> dict:
    path = tmp_path / "measured.yaml"
    path.write_text(config.to_yaml(), "utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), str(tokens)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def assert_synchronized(found: dict, steps: int) -> None:
    assert found["start"] <= 1e-4
    assert found["after_updates"] <= 1e-4
    # The same test without pushes fails.
    assert found["without_sync"] > 1e-4
    assert found["versions"] == [steps]
    assert found["repeats"]
