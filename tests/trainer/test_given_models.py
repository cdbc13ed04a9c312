"""Runs of models that are given from Python: they keep the promises that the loader makes."""

from pathlib import Path

import peft
import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    TrainerCallback,
)

from opsdc.errors import ModelError
from opsdc.record.lines import read_lines
from opsdc.train import OPSDCTrainer

QUIET = {"eval.problems": 0, "train.steps": 3}


def trainer(config, model, **settings):
    return OPSDCTrainer(model, config, processing_class=byte_tokenizer(), **settings)


def losses(config):
    return [row["loss_nats"] for row in read_lines(Path(config.output_dir) / "metrics.jsonl")]


def adapted(**settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(tiny_model(), config)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_learning_rate_moves_a_model_given_in_16_bits(make_config, dtype):
    config = make_config(**QUIET, **{"optim.lr": 1e-6, "optim.weight_decay": 0.0})
    model = tiny_model().to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    trainer(config, model).train()
    moved = [(p != b.float()).float().mean() for p, b in zip(model.parameters(), before)]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(moved) / len(moved) > 0.9


def gpt2(**settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **settings))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda: adapted(lora_dropout=0.3), 1e-2),
        (lambda: tiny_model(attention_dropout=0.2), 1e-3),
        (lambda: gpt2(n_positions=1100, resid_pdrop=0.2), 1e-3),
    ],
    ids=["LoRA", "attention", "GPT-2"],
)
def test_dropout_is_not_the_teachers_and_a_run_with_it_resumes(make_config, tmp_path, make, rate):
    """After a refresh too, when an adapter is no longer the identity and dropout shows."""
    settings = {**QUIET, "train.steps": 4, "teacher.refresh_steps": 2, "optim.lr": rate}
    whole = make_config(**settings, output_dir=str(tmp_path / "whole"))
    trainer(whole, make()).train()
    parts = make_config(**settings, output_dir=str(tmp_path / "parts"))
    trainer(parts, make(), callbacks=[StopAt(2)]).train()
    assert len(losses(parts)) == 2
    trainer(parts, make()).train()
    assert losses(parts) == losses(whole)


def test_an_adapter_on_an_adapter_is_refused(make_config):
    with pytest.raises(ModelError, match="leave it unset"):
        trainer(make_config(**{"model.lora": {"r": 4}}), adapted())


def phi3(switch, **settings):
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    config = Phi3Config(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=1024, original_max_position_embeddings=switch,
        rope_parameters=rope, initializer_range=0.3, **settings,
    )  # fmt: skip
    return Phi3ForCausalLM(config)


def dynamic(switch):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return tiny_model(max_position_embeddings=switch, rope_parameters=rope)


@pytest.mark.whole
@pytest.mark.parametrize(
    "make", [phi3, dynamic, lambda n: gpt2(n_positions=n)], ids=["longrope", "dynamic", "table"]
)
def test_a_run_longer_than_the_positions_is_refused(make_config, make):
    longest = trainer(make_config(), tiny_model()).problems.longest
    limit = longest + 5
    told = rf"max_new_tokens 12 makes .* {longest + 12} tokens.* {limit} at most.*lower it to 5"
    with pytest.raises(ModelError, match=told):
        trainer(make_config(**QUIET), make(limit))
    fits = QUIET | {"rollout.max_new_tokens": 5, "train.steps": 1}
    trainer(make_config(**fits), make(limit)).train()
    # The evaluation's answers may be the longer ones.
    with pytest.raises(ModelError, match=r"eval\.max_new_tokens 9"):
        trainer(make_config(**fits | {"eval.problems": 4, "eval.max_new_tokens": 9}), make(limit))


def test_a_prompt_with_ids_beyond_the_embedding_is_refused(make_config):
    with pytest.raises(ModelError, match=r"token id 2\d\d, and .* 200 rows.*resize_token_embed"):
        trainer(make_config(**QUIET), tiny_model(vocab_size=200))


def test_a_padding_id_beyond_the_embedding_changes_nothing(make_config, tmp_path):
    """Masks hide what stands there."""
    seen = []
    for pad in (0, 700):
        tokenizer = byte_tokenizer()
        if pad:
            tokenizer.add_tokens([f"<unused{i}>" for i in range(600)])
            tokenizer.pad_token = "<unused500>"
            assert tokenizer.pad_token_id > 264
        config = make_config(**QUIET, output_dir=str(tmp_path / str(pad)))
        OPSDCTrainer(tiny_model(), config, processing_class=tokenizer).train()
        seen.append(losses(config))
    assert seen[0] == seen[1]


def test_an_adapter_that_no_checkpoint_would_hold_is_refused_before_step_1(make_config, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config, adapter_name="mine")
    with pytest.raises(ModelError, match=r"would lose weights.*called 'default'"):
        trainer(make_config(**QUIET), model)
    assert not (tmp_path / "run").exists()
