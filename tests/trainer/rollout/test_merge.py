"""Every way of adapting a model: plain weights compute as the adapter does, or it is refused."""

import copy

import peft
import pytest
import torch
from helpers.tiny import tiny_model
from torch import nn

from opsdc.config.settings import LoRAConfig, ModelConfig
from opsdc.errors import ModelError
from opsdc.models.load import prepare_model
from opsdc.rollout import merge
from opsdc.rollout.merge import check_merge, merged
from opsdc.rollout.weights import named_weights

IDS = torch.randint(3, 260, (1, 20), generator=torch.Generator().manual_seed(0))
LINEAR = ["q_proj", "v_proj", "down_proj"]


def lora(**settings):
    return peft.LoraConfig(r=4, **{"target_modules": LINEAR, **settings})


METHODS = {
    "LoRA": lora(),
    "LoRA with biases": lora(bias="lora_only"),
    "LoRA with dropout": lora(lora_dropout=0.5),
    "rsLoRA": lora(use_rslora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "DoRA": lora(use_dora=True),
    "LoRA on a parameter": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "LoRA and a norm": lora(modules_to_save=["input_layernorm"]),
    "LoRA and tokens": lora(trainable_token_indices=[5, 6, 7]),
    "IA3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "HRA": peft.HRAConfig(r=4, target_modules=LINEAR),
    "MISS": peft.MissConfig(r=4, target_modules=LINEAR),
    "LN-tuning": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=LINEAR),
    "LoKr": peft.LoKrConfig(r=4, target_modules=LINEAR),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, target_modules=LINEAR),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=LINEAR, total_step=100),
}
ENDS = {
    # These part the embedding from the head: right only where a model does not tie them.
    "LoRA on the embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA and a head": lora(modules_to_save=["lm_head"]),
    "LoRA, an embedding and a head": lora(modules_to_save=["lm_head", "embed_tokens"]),
}
NO_MODULES = {
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8),
    "adaption prompt": peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=4),
}


def adapted(config, *, tied=False, **settings):
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(2)
    return peft.get_peft_model(tiny_model(tied=tied, **settings), config)


def trained(model):
    """What training would do, at a size that shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model.eval()


@torch.no_grad()
def logprobs(model):
    return model(input_ids=IDS).logits.log_softmax(-1)


@torch.no_grad()
def off(model, weights, *, tied=False):
    """Largest distance of log p between an adapted model and the plain one with these weights."""
    plain = tiny_model(seed=9, tied=tied).eval()
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == [] or (tied and missing == ["lm_head.weight"])
    plain.tie_weights()
    return float((logprobs(model) - logprobs(plain)).abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_plain_weights_compute_as_the_adapter_does(method, tied):
    model = adapted(METHODS[method], tied=tied).train()
    check_merge(model, IDS[0].tolist())
    assert model.training
    trained(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    base = tiny_model(tied=tied).state_dict()
    assert off(model, base, tied=tied) > 0.01
    weights = dict(named_weights(model, torch.float32))
    assert off(model, weights, tied=tied) < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", ENDS)
def test_an_embedding_is_not_parted_from_its_head(method):
    model = adapted(ENDS[method])
    check_merge(model, IDS[0].tolist())
    assert off(trained(model), dict(named_weights(model, torch.float32))) < 1e-4
    model = adapted(ENDS[method], tied=True)
    with pytest.raises(ModelError, match=r"one weight.*rollout\.engine hf"):
        check_merge(model, IDS[0].tolist())
    # What would have been sampled from.
    trained(model)
    assert off(model, dict(named_weights(model, torch.float32)), tied=True) > 0.1


@pytest.mark.parametrize("method", NO_MODULES)
def test_what_is_no_module_is_refused(method):
    model = adapted(NO_MODULES[method])
    with pytest.raises(ModelError, match=r"no place in plain weights; use rollout\.engine hf"):
        check_merge(model, IDS[0].tolist())


def as_lora(module):
    """Merge everything as if it were LoRA, which was done before."""
    plain = module.get_base_layer()
    for adapter in module.active_adapters:
        plain.weight.add_(module.get_delta_weight(adapter))
    return plain


def as_base(module):
    return module.get_base_layer()


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("DoRA", as_lora),
        ("OFT", as_lora),
        ("IA3", as_base),
        ("LN-tuning", as_base),
        ("LoRA with biases", as_base),
    ],
)
def test_a_wrong_merge_is_found_while_the_adapter_is_still_the_identity(method, wrong, monkeypatch):
    model = adapted(METHODS[method])
    monkeypatch.setattr(merge, "_plain", wrong)
    with pytest.raises(ModelError, match=r"off by|cannot be merged"):
        check_merge(model, IDS[0].tolist())
    # A plain LoRA is merged rightly this way.
    if wrong is as_lora:
        check_merge(adapted(METHODS["LoRA"]), IDS[0].tolist())


def test_a_module_that_no_forward_calls_is_refused():
    model = adapted(lora(target_modules=["q_proj"]))
    model.base_model.model.unused = peft.tuners.ia3.layer.Linear(
        nn.Linear(4, 4), "default", config=peft.IA3Config(), is_feedforward=False
    )
    with pytest.raises(ModelError, match="no forward calls it"):
        check_merge(model, IDS[0].tolist())


def test_an_adapter_that_transformers_holds_is_merged_too():
    model = tiny_model(tied=False)
    model.add_adapter(lora(), "mine")
    check_merge(model, IDS[0].tolist())
    assert off(trained(model), dict(named_weights(model, torch.float32))) < 1e-4


def two_adapters(active):
    model = adapted(lora())
    model.add_adapter("second", lora(target_modules=["k_proj", "v_proj"]))
    model.base_model.set_adapter(active)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]])
def test_only_active_adapters_are_merged(active):
    model = two_adapters(active)
    check_merge(model, IDS[0].tolist())
    assert off(model, dict(named_weights(model, torch.float32))) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_rounded_once(dtype):
    """Of base and adapter, both in more bits than the engine's: not each before they are added."""
    model = prepare_model(tiny_model().to(dtype), ModelConfig(lora=LoRAConfig(r=4, alpha=8)))
    trained(model)
    weights = dict(named_weights(model, torch.bfloat16))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        base = layer.base_layer.weight
        whole = base.float() + layer.get_delta_weight("default").float()
        rounded = base.bfloat16() + layer.get_delta_weight("default").bfloat16()
    found = weights["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, whole.bfloat16())
    assert not torch.equal(found, rounded)
    if dtype == torch.float32:
        first = (base.bfloat16().float() + layer.get_delta_weight("default").float()).bfloat16()
        assert not torch.equal(found, first)


def test_a_merged_copy_shares_no_memory():
    layer = trained(adapted(lora())).base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    merged(layer).weight.data.zero_()
    assert torch.equal(layer.base_layer.weight, before)
