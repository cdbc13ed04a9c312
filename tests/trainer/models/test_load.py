"""Heads: what the loss describes is used exactly, what it does not describe is refused."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.passes import both_passes
from helpers.tiny import byte_tokenizer, tiny_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from opsdc.config.settings import LoRAConfig, ModelConfig, OPSDCConfig, TeacherConfig
from opsdc.errors import ModelError
from opsdc.method.batch import Layout, Pair, token_batch
from opsdc.method.teacher import Teacher
from opsdc.models.head import check_head, hidden_states, read_head
from opsdc.models.load import load_model, prepare_model

SIZES = dict(  # noqa: C408
    vocab_size=264,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def biased():
    model = tiny_model(tied=False)
    model.lm_head = nn.Linear(32, 264, bias=True)
    with torch.no_grad():
        model.lm_head.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


HEADS = {
    "plain": tiny_model,
    "bias": biased,
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)
    ),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_known_head_is_described_exactly(name):
    torch.manual_seed(0)
    model = HEADS[name]().eval()
    assert check_head(model) <= 1e-6
    # And the loss over that description is the divergence of the model's own logits.
    pair = Pair(student_prompt_ids=[5, 6], teacher_prompt_ids=[7, 5, 6], response_ids=[9, 10, 11])
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    layout = Layout(packed=False, max_tokens=99, pad_id=0, dtype=torch.float32)
    loss, *_ = both_passes(model, teacher, [pair], layout, OPSDCConfig())
    with torch.no_grad():
        s = model(torch.tensor([[5, 6, 9, 10, 11]])).logits[0, 1:4].double().log_softmax(-1)
        t = model(torch.tensor([[7, 5, 6, 9, 10, 11]])).logits[0, 2:5].double().log_softmax(-1)
    expected = float((s.exp() * (s - t)).sum(-1).mean())
    assert expected > 1e-4
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_head_with_an_unknown_feature_is_refused():
    model = tiny_model()
    plain = model.forward

    def doubled(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = doubled
    with pytest.raises(ModelError, match="cannot be trained exactly"):
        check_head(model)


def test_a_head_that_is_no_linear_layer_is_refused():
    model = tiny_model(tied=False)
    model.lm_head = nn.Sequential(nn.Linear(32, 264))
    with pytest.raises(ModelError, match="Sequential"):
        read_head(model)


def test_an_adapter_on_the_head_is_refused():
    config = ModelConfig(lora=LoRAConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match="lm_head"):
        prepare_model(tiny_model(tied=False), config)


def test_lora_leaves_the_base_alone():
    model = prepare_model(tiny_model("qwen3"), ModelConfig(lora=LoRAConfig(r=2)))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in n for n in trainable)


def test_a_missing_model_is_named():
    with pytest.raises(ModelError, match="no/such/folder"):
        load_model(ModelConfig(name_or_path="./no/such/folder"))


def test_trained_parameters_are_float32_whatever_the_forward_computes_in(tiny_folder):
    model = load_model(ModelConfig(name_or_path=str(tiny_folder), dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_code_in_a_model_folder_runs_only_where_the_user_says_so(tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "not-a-type-of-transformers",
        "auto_map": {"AutoConfig": "ours.C", "AutoModelForCausalLM": "ours.M"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "ours.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        # Classes of its own: transformers marks what it loads as somebody's code, for good.
        "class C(LlamaConfig): pass\n"
        "class M(LlamaForCausalLM): pass\n"
    )
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(ModelConfig(name_or_path=str(folder)))
    assert not marker.exists()
    with contextlib.suppress(Exception):  # what it then makes of the folder is its own affair
        load_model(ModelConfig(name_or_path=str(folder), trust_remote_code=True))
    assert marker.exists()


@pytest.mark.whole
def test_the_revision_of_a_hub_model_is_recorded(tmp_path):
    """From the hub's cache, which names a snapshot by its commit; no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    tiny_model().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from opsdc.config import ModelConfig; from opsdc.models.load import describe, load_model\n"
        "print(describe(load_model(ModelConfig(name_or_path='someone/tiny')))['revision'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [commit]


RAGGED = [([5, 6, 7], [8, 9, 10, 11]), ([20] * 9, [21, 22]), ([1, 2], [3] * 30), ([9], [7])]


@pytest.mark.parametrize(
    "attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_packed_hidden_states_are_those_of_padded_rows(attention):
    """Positions that start anew tell transformers' own masks where sequences begin."""

    def states(packed, attention):
        model.set_attn_implementation(attention)
        batch = token_batch(RAGGED, packed=packed, pad_id=0, device=torch.device("cpu"))
        return hidden_states(model, batch)

    # Heads of 16: flex attention has no smaller ones.
    model = tiny_model(hidden_size=64).eval()
    expected = states(False, "sdpa")
    for packed in (False, True):
        difference = (states(packed, attention) - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max()
    # A row in which one of the sequences does not start anew is another row.
    batch = token_batch(RAGGED, packed=True, pad_id=0, device=torch.device("cpu"))
    batch.position_ids[0, 7:] += 7
    assert (hidden_states(model, batch) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_an_attention_that_is_not_installed_is_named(tiny_folder):
    config = ModelConfig(name_or_path=str(tiny_folder), attn_implementation="flash_attention_2")
    with pytest.raises(ModelError, match=r"model\.attn_implementation flash_attention_2.*Use sdpa"):
        load_model(config)
