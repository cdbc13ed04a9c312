"""Compiled layers give the numbers of plain ones; Liger's are put where they belong, or refused."""

import subprocess
import sys

import pytest
import torch
from helpers import ranks as t
from helpers.tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from opsdc.config.settings import ModelConfig
from opsdc.errors import ModelError
from opsdc.models.faster_layers import compile_layers, patch
from opsdc.models.load import prepare_model

pytestmark = pytest.mark.whole


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True, "lora": {"r": 4}}])
def test_five_compiled_steps_are_those_of_plain_layers(more):
    """Lengths, the teacher's pass and the student's each ask for another forward of a layer."""
    settings = {
        "teacher": {"mode": "refresh", "refresh_steps": 2},
        "optim": {"lr": 1e-3, "grad_clip": 1e9},
        "train": {"max_tokens_per_micro_batch": 40},
    }
    lengths = (9, 3, 14, 1, 6)
    plain = t.five_steps({**settings, "model": more}, lengths)
    torch._dynamo.utils.counters.clear()
    compiled = t.five_steps({**settings, "model": {**more, "compile": True}}, lengths)
    # Fewer graphs than the 8 after which torch gives up on a layer, whatever the lengths.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert t.distance(plain["gradients"], compiled["gradients"]) <= 1e-5
    assert t.distance(plain["weights"], compiled["weights"]) <= 1e-5


def test_compiled_layers_keep_their_names_and_others_are_left_alone():
    model = tiny_model()
    before = list(model.state_dict())
    prepare_model(model, ModelConfig(compile=True))
    assert list(model.state_dict()) == before
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert model._compiled_call_impl is None


def test_a_model_that_names_no_layers_is_not_compiled():
    model = tiny_model()
    model._no_split_modules = None
    with pytest.raises(ModelError, match=r"model\.compile true: LlamaForCausalLM"):
        compile_layers(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_liger_without_a_gpu_is_refused():
    with pytest.raises(ModelError, match=r"model\.liger true.*need a GPU.*set it to false"):
        prepare_model(tiny_model(), ModelConfig(liger=True))


def test_liger_for_an_unknown_architecture_is_refused():
    pytest.importorskip("liger_kernel")
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(ModelError, match="nothing for model type 'gpt2'"):
        patch(model)


_PATCHED = """
import torch
from transformers import AutoModelForCausalLM
from opsdc.config.settings import ModelConfig
from opsdc.models.faster_layers import patch
from opsdc.models.load import load_architecture
from opsdc.planner.activations import shallower

with torch.device("meta"):
    architecture = load_architecture(ModelConfig(name_or_path="Qwen/Qwen3-8B"))
    model = AutoModelForCausalLM.from_config(shallower(architecture, 2))
loss = model.forward
patch(model)
assert model.forward == loss
for name, module in model.named_modules():
    owner = getattr(module.forward, "__func__", module.forward).__module__
    if "liger" in owner:
        print(name)
import transformers.models.qwen3.modeling_qwen3 as module
assert "liger" in module.apply_rotary_pos_emb.__module__
assert "liger" not in torch.nn.functional.cross_entropy.__module__
"""


def test_liger_takes_the_norms_and_the_mlps_and_never_the_head():
    """In a process of its own: it replaces the rotary positions of all Qwen3 models in one."""
    pytest.importorskip("liger_kernel")
    done = subprocess.run([sys.executable, "-c", _PATCHED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    layer = ("self_attn.q_norm", "self_attn.k_norm", "mlp", "input_layernorm")
    names = (*layer, "post_attention_layernorm")
    expected = {f"model.layers.{i}.{name}" for i in range(2) for name in names} | {"model.norm"}
    assert set(done.stdout.split()) == expected
