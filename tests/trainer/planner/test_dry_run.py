"""Every recipe, dry: the plan and one real step of its twin, offline, nothing left behind."""

import pytest
from helpers.tiny import byte_tokenizer
from transformers import GPT2Config

from opsdc.cli import main
from opsdc.config.yaml_file import recipe_names
from opsdc.models.load import load_architecture
from opsdc.planner.dry_run import twin_of

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("recipe", [n for n in recipe_names() if n.startswith("qwen3")])
def test_recipes_run_dry_without_a_network(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", recipe, "--dry-run", "--output_dir", "out"]) == 0
    shown = capsys.readouterr().out
    for words in ("GiB per device", "activations", "one step of a twin: Qwen3", "step 1/1"):
        assert words in shown
    assert list(tmp_path.iterdir()) == []


def test_a_twin_is_the_architecture_in_small():
    twin = twin_of(load_architecture("Qwen/Qwen3-8B"), byte_tokenizer())
    assert type(twin).__name__ == "Qwen3ForCausalLM"
    assert len(twin.model.layers) == 2
    assert twin.lm_head.weight is not twin.model.embed_tokens.weight
    assert sum(p.numel() for p in twin.parameters()) < 200_000
    assert hasattr(twin.model.layers[0].self_attn, "q_norm")
    small = twin_of(GPT2Config(n_layer=6), byte_tokenizer())
    assert small.config.n_layer == 2
