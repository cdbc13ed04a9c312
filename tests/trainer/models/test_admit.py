"""The door for models: what may not come in, and what is made fit on the way."""

import peft
import pytest
import torch
from helpers.tiny import tiny_model
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from opsdc.config.settings import LoRAConfig, ModelConfig
from opsdc.errors import ModelError
from opsdc.models.adapters import perturbed
from opsdc.models.admit import admit, check_adapter_off
from opsdc.models.head import backbone, check_head
from opsdc.models.load import prepare_model

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def adapted(config, model=None):
    config.task_type = "CAUSAL_LM"
    return peft.get_peft_model(model or tiny_model(), config)


def biased(**settings):
    """Qwen2, whose attention has biases, under LoRA."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", **settings)
    return adapted(config, Qwen2ForCausalLM(Qwen2Config(**SIZES)))


VIRTUAL_TOKENS = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=[1], cpt_mask=[1], cpt_tokens_type_mask=[1], task_type="CAUSAL_LM"
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2),
}


@pytest.mark.parametrize("name", VIRTUAL_TOKENS)
def test_virtual_tokens_before_the_backbone_are_refused(name):
    model = adapted(VIRTUAL_TOKENS[name]())
    with pytest.raises(ModelError, match=r"virtual tokens.*use LoRA"):
        admit(model)
    # And the probe would see them by itself: the wrapper's logits count.
    with pytest.raises(ModelError):
        check_head(model)


ADAPTERS = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "dora": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_layers_comes_in_and_is_off_when_switched_off(name):
    model = adapted(ADAPTERS[name]())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    admit(model)
    assert check_head(model) <= 1e-5
    check_adapter_off(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_adapter_beside_the_backbone_shows_only_when_it_is_moved():
    """At its start it adds nothing to the logits, as LoRA's B is zero."""
    model = adapted(peft.LoraConfig(target_modules=["q_proj"]))
    beside = torch.nn.Parameter(torch.zeros(264))
    model.register_parameter("beside", beside)
    forward = model.forward

    def with_bias(*arguments, **settings):
        output = forward(*arguments, **settings)
        output.logits = output.logits + beside
        return output

    model.forward = with_bias
    with pytest.raises(ModelError, match="does not describe"):
        check_head(model)
    assert not beside.any()
    with perturbed(model):
        assert beside.any()


def test_an_adapter_without_its_wrapper_is_refused():
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"without PEFT's wrapper.*get_peft_model"):
        admit(model)


def thawed(name):
    model = biased()
    model.get_base_model().get_submodule(name).weight.requires_grad_(True)
    return model


SURVIVORS = {
    "biases of LoRA": (lambda: biased(bias="lora_only"), "q_proj.base_layer.bias"),
    "all biases": (lambda: biased(bias="all"), "q_proj.base_layer.bias"),
    "a norm": (lambda: thawed("model.norm"), "norm.weight"),
    "the embedding": (lambda: thawed("model.embed_tokens"), "embed_tokens.weight"),
    "the head": (lambda: thawed("lm_head"), "lm_head.weight"),
}


@pytest.mark.parametrize("name", SURVIVORS)
def test_what_trains_on_with_the_adapter_off_is_named(name):
    make, parameter = SURVIVORS[name]
    with pytest.raises(ModelError, match=rf"{parameter}.*pass a teacher"):
        check_adapter_off(make())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_starts_inside_the_base_is_no_teacher(start):
    with pytest.raises(ModelError, match=rf"init_lora_weights '{start}'.*as the teacher"):
        check_adapter_off(biased(init_lora_weights=start))


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica"])
def test_an_adapter_that_leaves_the_base_alone_is(start):
    model, ids = biased(init_lora_weights=start).eval(), torch.arange(7)[None]
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    check_adapter_off(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=2)])
def test_trained_parameters_become_float32_however_they_came_in(dtype, lora):
    model = prepare_model(tiny_model().to(dtype), ModelConfig(lora=lora))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == (set() if lora is None else {dtype})
    assert check_head(model) <= 1e-2
    # At this rate nearly every update of a bfloat16 weight rounds to nothing.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    for p, start in zip(model.parameters(), before, strict=True):
        assert not p.requires_grad or (p != start).float().mean() > 0.9


def test_float64_stays():
    model = tiny_model().double()
    admit(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_model_without_anything_to_train_is_refused(tmp_path):
    adapted(peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is_trainable=True"):
        admit(peft.PeftModel.from_pretrained(tiny_model(), tmp_path))
    admit(peft.PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True))
    with pytest.raises(ModelError, match="no parameter"):
        admit(tiny_model().requires_grad_(False))
    admit(tiny_model().requires_grad_(False), trained=False)


def test_an_encoder_is_refused():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=264, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        admit(model)


def test_a_model_that_calls_itself_its_backbone_has_one_all_the_same():
    torch.manual_seed(0)
    config = Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=64)
    model = Llama4ForCausalLM(config)
    assert model.get_decoder() is model
    assert backbone(model) is model.model
    admit(model)
    assert check_head(model) <= 1e-5


def test_a_head_with_no_backbone_under_it_is_refused():
    model = tiny_model()
    model.get_decoder = lambda: model
    assert backbone(model) is model.model
    model.get_output_embeddings = lambda: model.lm_head
    model.model = torch.nn.ModuleList([model.model])
    with pytest.raises(ModelError, match="does not say which of its modules"):
        admit(model)


def test_parts_of_two_dtypes_are_refused_in_a_line():
    model = tiny_model(tied=False).bfloat16()
    model.lm_head.float()
    with pytest.raises(ModelError, match=r"bfloat16, float32, cannot.*Give all.*one dtype"):
        check_head(model)
