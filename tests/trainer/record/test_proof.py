"""A checkpoint that could not be read is found before there is anything to lose."""

import peft
import pytest
import torch
from helpers.tiny import tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from opsdc.errors import ModelError
from opsdc.ranks.talk import ALONE
from opsdc.record import proof


def lora(name="default", **settings):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(tiny_model(), config, adapter_name=name)


def two():
    model = lora()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


def with_norm():
    model = lora()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def biased_head():
    model = tiny_model(tied=False)
    model.lm_head = nn.Linear(32, 264, bias=True)
    return model


def cut():
    """Layers taken out after the model was built; its config does not know."""
    model = tiny_model()
    model.model.layers.append(tiny_model(seed=1).model.layers[0])
    return model


UNREADABLE = {
    "an adapter of another name": lambda: lora("mine"),
    "two adapters": two,
    "a norm beside the adapter": with_norm,
    "a bias that the config does not know": biased_head,
    "a layer that the config does not know": cut,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_would_be_lost_is_said(name, tmp_path):
    model = UNREADABLE[name]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ModelError, match=r"would lose weights.*called 'default'"):
        proof.check_saving(model, tmp_path / "run", ALONE)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert list(tmp_path.iterdir()) == []


class Small(LlamaForCausalLM):
    """Somebody's class."""


READABLE = {
    "tied": tiny_model,
    "untied": lambda: tiny_model("qwen3", tied=False),
    "LoRA": lora,
    "biases of LoRA": lambda: lora(bias="lora_only"),
    "DoRA": lambda: lora(use_dora=True),
    "modules_to_save": lambda: lora(modules_to_save=["norm"]),
    "IA3": lambda: peft.get_peft_model(
        tiny_model(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ),
    "a class of one's own": lambda: Small(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_what_comes_back_is_let_in(name, tmp_path):
    model = READABLE[name]()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    proof.check_saving(model, tmp_path / "not" / "there", ALONE)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_another_checks_affair(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    proof.check_saving(model, tmp_path, ALONE)


def test_what_would_take_minutes_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "_MOST_BYTES", 1000)
    proof.check_saving(lora("mine"), tmp_path, ALONE)
