"""What every example starts from: a model, its tokenizer, and responses sampled from it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opsdc.config.settings import ModelConfig
from opsdc.method.batch import Pair
from opsdc.models.load import load_model, load_tokenizer

INSTRUCTION = "Be concise."
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def options(doc: str, *names: str) -> dict[str, str | None]:
    """--model and what else an example takes, from the command line."""
    parser = argparse.ArgumentParser(description=doc)
    for name in ("model", *names):
        parser.add_argument(f"--{name}", help="a folder or a Hub name; default: tiny and random")
    return vars(parser.parse_args())


def load(name: str | None = None, seed: int = 0) -> tuple[Any, Any]:
    """Model and tokenizer by name, or a random two-layer model that reads bytes."""
    if name is not None:
        config = ModelConfig(name_or_path=name)
        return load_model(config), load_tokenizer(config)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return LlamaForCausalLM(config), tokenizer


def questions(count: int) -> list[str]:
    return [f"What is {i} + {i + 3}?" for i in range(count)]


@torch.no_grad()
def sample(model: Any, tokenizer: Any, count: int = 8, seed: int = 0) -> list[Pair]:
    """Responses of different lengths, each behind the student's prompt and the teacher's."""

    def chat(text: str) -> list[int]:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )

    torch.manual_seed(seed)
    pairs = []
    for i, question in enumerate(questions(count)):
        prompt = torch.tensor([chat(question)], device=model.device)
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=4 + 3 * i
        )
        pairs.append(
            Pair(
                student_prompt_ids=prompt[0].tolist(),
                teacher_prompt_ids=chat(f"{question} {INSTRUCTION}"),
                response_ids=ids[0, prompt.shape[1] :].tolist(),
            )
        )
    return pairs
