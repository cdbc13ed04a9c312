"""What is pushed is what a checkpoint of the model holds: its names, its layout, merged."""

import copy

import pytest
import torch
from helpers.tiny import tiny_model
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from opsdc.config.settings import LoRAConfig, ModelConfig
from opsdc.errors import ModelError, WeightSyncError
from opsdc.models.load import prepare_model
from opsdc.rollout.weights import Weights, named_weights, read_weights, write_weights


def mixture_of_experts():
    """transformers keeps its experts in one tensor, checkpoints and vLLM one by one."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        )
    )


MODELS = {
    "tied head": lambda: tiny_model("llama", tied=True),
    "own head": lambda: tiny_model("qwen3", tied=False),
    "mixture of experts": mixture_of_experts,
}


def checkpoint(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", MODELS)
def test_names_and_values_are_those_of_a_checkpoint(kind, tmp_path):
    model = MODELS[kind]()
    expected = checkpoint(model, tmp_path / "saved")
    found = dict(named_weights(model, torch.float32))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ("lm_head.weight" in found) == (kind != "tied head")


@pytest.mark.parametrize("kind", ["tied head", "own head"])
def test_an_adapter_is_merged_and_the_model_left_alone(kind, tmp_path):
    model = prepare_model(MODELS[kind](), ModelConfig(lora=LoRAConfig(r=4, alpha=8)))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = dict(named_weights(model, torch.float32))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = copy.deepcopy(model).merge_and_unload()
    expected = checkpoint(merged, tmp_path / "merged")
    assert sorted(found) == sorted(expected)
    plain = dict(MODELS[kind]().named_parameters())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
        adapted = name.endswith("proj.weight")
        assert torch.equal(found[name], plain[name].detach()) == (not adapted)


def test_files_hold_the_same_in_the_engines_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr("opsdc.rollout.weights._SHARD_BYTES", 5_000)
    model = tiny_model()
    write_weights(Weights(model, torch.bfloat16), tmp_path / "w")
    assert len(list((tmp_path / "w").iterdir())) > 3
    found = dict(read_weights(tmp_path / "w"))
    expected = dict(named_weights(model, torch.bfloat16))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())


def test_weights_are_not_read_after_an_update():
    model = tiny_model()
    weights = Weights(model, torch.float32)
    assert len(list(weights)) == len(list(weights))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    with pytest.raises(WeightSyncError, match="was updated"):
        list(weights)


def test_quantized_weights_are_refused():
    model = tiny_model()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"down_proj\.weight.*quantized"):
        list(named_weights(model, torch.float32))
