"""Lengths that positions allow: read from the model, and never longer than what is true."""

import pytest
import torch
from helpers.tiny import tiny_model
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    CodeGenConfig,
    CTRLConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    OPTConfig,
    Phi3Config,
)

from opsdc.method.batch import token_batch
from opsdc.models.head import hidden_states
from opsdc.models.positions import longest_sequence

LLAMA = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
GPT = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 50}


def longrope(**settings):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    return Phi3Config(
        **LLAMA,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters=rope,
        **settings,
    )


def gemma3():
    """Parameters by the kind of layer, one of them dynamic."""
    return Gemma3TextConfig(
        **LLAMA,
        head_dim=8,
        num_key_value_heads=2,
        max_position_embeddings=80,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    )


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return tiny_model(max_position_embeddings=48, rope_parameters=rope).eval()


SWITCHES = {
    "longrope": (lambda: build(longrope()), 64),
    "dynamic": (dynamic, 48),
    "by layer": (lambda: build(gemma3()), 80),
}


@torch.no_grad()
def states(model, lengths):
    """Hidden states of the tokens of sequences that share a batch, apart."""
    parts = [([5], [7 + i % 90 for i in range(n - 1)]) for n in lengths]
    batch = token_batch(parts, packed=False, pad_id=0, device=torch.device("cpu"))
    return hidden_states(model, batch).split([n - 1 for n in lengths])


@pytest.mark.parametrize("name", SWITCHES)
def test_up_to_the_switch_a_sequence_is_as_if_alone_and_no_longer(name):
    make, switch = SWITCHES[name]
    model = make()
    limit, why = longest_sequence(model)
    assert (limit, "rotary positions" in why) == (switch, True)
    (alone,) = states(model, [20])

    def difference(neighbour):
        return float((states(model, [20, neighbour])[0] - alone).abs().max() / alone.abs().max())

    assert difference(switch) <= 1e-5
    assert difference(switch + 1) > 1e-4


TABLES = {
    "GPT-2": GPT2Config(**GPT),
    "GPT-J": GPTJConfig(**GPT, rotary_dim=4),
    "CodeGen": CodeGenConfig(**GPT, rotary_dim=4),
    "CTRL": CTRLConfig(**GPT, dff=64),
    "OPT": OPTConfig(
        vocab_size=264, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=50, word_embed_proj_dim=32,
    ),
    "BioGPT": BioGptConfig(**LLAMA, max_position_embeddings=50),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_ends_where_it_says(name):
    model = build(TABLES[name])
    assert longest_sequence(model) == (50, "it has a table of so many positions")
    states(model, [50])
    # OPT and BioGPT keep two entries more, so that the first that fails is the 53rd.
    with pytest.raises((IndexError, RuntimeError)):
        states(model, [53])


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model(max_position_embeddings=32),
        lambda: build(BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4)),
        lambda: tiny_model("qwen3", max_position_embeddings=264),
    ],
)
def test_others_have_no_limit(make):
    """Hidden size or vocabulary as large as the number of positions make no table of them."""
    assert longest_sequence(make()) is None
