"""Every recipe, dry: the plan and one real step of its twin, offline, nothing left behind."""

from pathlib import Path

import pytest
from helpers.tiny import byte_tokenizer
from transformers import (
    BloomConfig,
    FalconH1Config,
    GPT2Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Mamba2Config,
    MixtralConfig,
    MptConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
    T5Config,
)

from opsdc.cli import main
from opsdc.config.settings import ModelConfig, OPSDCConfig
from opsdc.config.yaml_file import recipe_names
from opsdc.errors import ModelError
from opsdc.models.load import load_architecture
from opsdc.planner import activations
from opsdc.planner.activations import count_activations
from opsdc.planner.dry_run import twin_of
from opsdc.planner.plan import make_plan

pytestmark = pytest.mark.whole


@pytest.mark.parametrize(
    "recipe",
    # Where test_plan plans the same recipe, its passes are counted already.
    [
        pytest.param(n, marks=pytest.mark.xdist_group(n))
        for n in recipe_names()
        if n.startswith("qwen3")
    ],
)
def test_recipes_run_dry_without_a_network(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", recipe, "--dry-run", "--output_dir", "out"]) == 0
    shown = capsys.readouterr().out
    said = ("GiB per device", "activations", "one step of a twin: Qwen3", "step 1/1", "ok\n")
    for words in said:
        assert words in shown
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_reads_the_data_and_makes_the_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = Path("data.jsonl")
    data.write_text("".join(f'{{"problem": "Sum {i}", "answer": {i}}}\n' for i in range(90)))
    command = ["train", "--config", "smollm2-cpu", "--dry-run", "--output_dir", "out"]
    command += ["--data.source", "data.jsonl", "--data.gate_size", "0", "--data.eval_size", "10"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "80 problems to train on, 10 held out" in shown
    assert shown.endswith("dry run: ok\n")
    data.write_text('{"problem": "Sum 1"\n')
    assert main(command) == 2
    assert "data.jsonl, line 1" in capsys.readouterr().err
    assert main([*command, "--prompt.max_tokens", "4"]) == 2
    assert not Path("out").exists()


def test_a_twin_is_the_architecture_in_small():
    twin = twin_of(load_architecture(ModelConfig(name_or_path="Qwen/Qwen3-8B")), byte_tokenizer())
    assert type(twin).__name__ == "Qwen3ForCausalLM"
    assert len(twin.model.layers) == 2
    assert twin.lm_head.weight is not twin.model.embed_tokens.weight
    assert sum(p.numel() for p in twin.parameters()) < 200_000
    assert hasattr(twin.model.layers[0].self_attn, "q_norm")
    small = twin_of(GPT2Config(n_layer=6), byte_tokenizer())
    assert small.config.n_layer == 2


SMALL = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXERS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
ARCHITECTURES = {
    "Qwen3-MoE": Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "OLMoE": OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, eos_token_id=2),
    "gpt-oss": GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, sliding_window=16),
    "BLOOM": BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4),
    "MPT": MptConfig(vocab_size=264, d_model=32, n_layers=2, n_heads=4),
    "Falcon-H1": FalconH1Config(**SMALL, **MIXERS, mamba_d_ssm=64),
    "Mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "Phi-3, longrope": Phi3Config(
        **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    ),
}  # fmt: skip


def folder_of(architecture, tmp_path):
    architecture.save_pretrained(tmp_path / "architecture")
    return str(tmp_path / "architecture")


COMMON = ["--rollout.max_new_tokens", "24", "--prompt.max_tokens", "40", "--output_dir", "out"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_trains_is_planned(name):
    sizes = {"rollout": {"max_new_tokens": 24}, "prompt": {"max_tokens": 40}}
    config = OPSDCConfig.from_dict(sizes)
    plan = make_plan(config, memory_bytes=10**9, architecture=ARCHITECTURES[name])
    assert plan.unknown is None
    part = plan.parts["activations"]
    # The backward begins with all that the loss was computed beside.
    assert 0 < part["teacher"] < part["loss"] < 1.3 * part["backward"]


def test_an_architecture_of_experts_runs_dry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = folder_of(ARCHITECTURES["Qwen3-MoE"], tmp_path)
    assert main(["train", "--model.name_or_path", folder, *COMMON, "--dry-run"]) == 0
    assert "step 1/1" in capsys.readouterr().out


def test_what_cannot_be_traced_is_said_and_the_rest_is_planned(tmp_path, monkeypatch, capsys):
    """OPT asks for the values of its mask."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 264, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    opt = OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=32)
    command = ["plan", "--model.name_or_path", folder_of(opt, tmp_path), *COMMON]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "activations unknown, and not in these sums: the passes of OPTConfig cannot" in shown
    assert "fits, but for the activations" in shown
    assert "the most that fits: unknown" in shown
    assert "weights, trained (float32)" in shown


def test_a_trace_that_would_take_hours_is_given_up(monkeypatch):
    monkeypatch.setattr(activations, "_TRACE_SECONDS", 0)
    text = MptConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2).to_json_string(False)
    why = count_activations(text, ModelConfig(), width=9, masked=True)
    assert "takes more than 0 s" in why


UNSHRINKABLE = {
    "Mamba-2": Mamba2Config(vocab_size=264),
    "Granite's hybrid": GraniteMoeHybridConfig(
        **SMALL, **MIXERS, layer_types=["mamba", "attention"]
    ),
    "an encoder": T5Config(vocab_size=264, d_model=32),
}


@pytest.mark.parametrize("name", UNSHRINKABLE)
def test_what_cannot_be_run_dry_is_one_line(name):
    with pytest.raises(ModelError, match=r"small twin.*no step is tried.*train\.steps 1"):
        twin_of(UNSHRINKABLE[name], byte_tokenizer())


def test_what_is_no_causal_model_is_not_planned(tmp_path, monkeypatch, capsys):
    folder = folder_of(UNSHRINKABLE["an encoder"], tmp_path)
    assert main(["plan", "--model.name_or_path", folder]) != 0
    assert "T5Config" in capsys.readouterr().err
