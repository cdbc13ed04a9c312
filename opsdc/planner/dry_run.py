"""`opsdc train --dry-run`: the plan of a run, then one whole step of it on a tiny twin.

The twin has the model's architecture, adapter and settings, but two layers, small dimensions and
random weights, and it is given four sums as problems. The run's own are read and put into prompts
first, unless that takes the network. Nothing is downloaded, and nothing is left in output_dir.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import prompted_sets, read_problems
from opsdc.data.sources import is_on_hub
from opsdc.errors import ModelError
from opsdc.models import demo_model
from opsdc.models.head import check_head
from opsdc.models.load import load_architecture, load_model
from opsdc.models.other import settings_of_other
from opsdc.planner.activations import shallower
from opsdc.planner.report import report

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""The twin has these dimensions, where its architecture has one of that name."""

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of the tokenizer of bytes."""


def dry_run(config: OPSDCConfig, trainer: Callable[..., Any]) -> None:
    """Print the plan for this machine, then train one step of a twin.

    `trainer` is `OPSDCTrainer`, which stands above this file. Raises what a run would raise.
    """
    source = config.data.source
    problems = None if is_on_hub(source) else read_problems(config)
    on_gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    print(report(config, memory_bytes=memory, gpus=1, tflops=600.0)[1], flush=True)

    tokenizer, is_own = _load_tokenizer(config.model.name_or_path)
    if problems is None:
        print(f"\ndata.source {source} is on the Hub: not read")
    elif is_own:
        sets = prompted_sets(config, tokenizer, problems)
        print(f"\n{len(sets.training)} problems to train on, {len(sets.held_out)} held out")
    else:
        print(f"\n{len(problems[0])} problems to train on, {len(problems[2])} held out; no prompts")
    whose = "the model's own tokenizer" if is_own else "a tokenizer of bytes (no other is here)"
    shape = load_architecture(config.model)
    twin = twin_of(shape, tokenizer)
    print(f"\none step of a twin: {type(twin).__name__}, two layers, {whose}", flush=True)
    if (other := settings_of_other(config)) is not None:
        its_twin = twin_of(load_architecture(other, setting="teacher.model"), tokenizer)
        print(f"taught by a twin of {other.name_or_path}: {type(its_twin).__name__}", flush=True)
    if config.rollout.engine != "hf":
        print(f"rollout.engine {config.rollout.engine} is not started: hf samples instead")

    with tempfile.TemporaryDirectory(prefix="opsdc-dry-run-") as folder:
        small = _small_run(config, folder, on_gpu)
        rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
        if config.model.quantize is not None:
            # Weights are quantized only while they are loaded.
            place = f"{folder}/twin"
            twin.save_pretrained(place)
            twin = load_model(replace(small.model, name_or_path=place, revision=None))
        if other is not None:
            place = f"{folder}/teacher"
            its_twin.save_pretrained(place)
            tokenizer.save_pretrained(place)
            small = replace(small, teacher=replace(small.teacher, model=place))
        trainer(twin, small, rows, rows, tokenizer).train()
    print("dry run: ok")


def twin_of(architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build the same architecture with two small layers and random weights in float32.

    Raises ModelError where its dimensions do not shrink together.
    """
    small = shallower(architecture, 2)
    text = small.get_text_config()
    for name, size in _SMALL.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, size)
    text.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    try:
        twin = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        check_head(twin)
    except Exception as error:  # whatever an architecture's own code makes of small dimensions
        raise ModelError(
            f"--dry-run cannot make a small twin of {type(architecture).__name__}, so that no step "
            f"is tried; the plan stands, and train.steps 1 tries one on the model itself ({error})"
        ) from error
    return twin


def _small_run(config: OPSDCConfig, folder: str, on_gpu: bool) -> OPSDCConfig:
    """Return settings for a short step that computes as a step of the run does."""
    attention = config.model.attn_implementation
    return replace(
        config,
        output_dir=folder,
        # These kernels exist on a GPU only.
        model=replace(
            config.model,
            attn_implementation=attention if on_gpu else None,
            liger=config.model.liger and on_gpu,
        ),
        # A random model is never right: nothing is decided by its answers.
        data=replace(
            config.data,
            prompt_column="problem",
            answer_column="answer",
            eval_size=0,
            gate_size=0,
            train_on="all" if config.data.train_on == "correct" else config.data.train_on,
        ),
        teacher=replace(config.teacher, gate=False),
        prompt=replace(config.prompt, max_tokens=1 << 20),
        rollout=replace(
            config.rollout,
            engine="hf",
            prompts_per_step=2,
            max_new_tokens=min(config.rollout.max_new_tokens, 8),
            server_address=None,
        ),
        train=replace(config.train, steps=1, save_every=0, resume="none", keep_best=False),
        eval=replace(config.eval, problems=0, every=0),
        log=replace(config.log, report_to=()),
    )


def _load_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, bool]:
    """Load the model's tokenizer, and True, if it is on this machine, else make one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo_model.resolve(name), local_files_only=True)
        # Of a folder with a config alone transformers makes one without a vocabulary.
        if "sum" in tokenizer.decode(tokenizer.encode("the sum of 2 and 3")):
            return tokenizer, True
    except (OSError, ValueError):
        pass
    return _bytes_tokenizer(), False


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
