"""Another model as the teacher (`teacher.model`): any size, the student's vocabulary, frozen."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import ModelConfig, OPSDCConfig
from opsdc.errors import ModelError
from opsdc.models.admit import admit
from opsdc.models.head import Head, TokenBatch, read_head
from opsdc.models.load import load_model, load_tokenizer

_SETTING = "teacher.model"

_PROBES = (
    "Solve 12345 + 67890 = 80235; then \\boxed{\\frac{1}{2}}.\n\n  The answer is 3.50 %.",
    "def f(x):\n\treturn x ** 2  # don't\r\n",
    "naïve ÅÄÖ ﬁ ½ 二十三 рассуждение 🙂 \u200b…",
)
"""Texts in which tokenizers of one vocabulary may differ: digits, blanks, forms of Unicode."""


class OtherModel:
    """A model that teaches another one: its module, and how both heads are made to match.

    It has the parts of a `method.teacher.Snapshot` that score: `weights` and `head`.

    Args:
        module: The model; it is frozen.
        vocab_size: The tokens that both heads score, None where all rows are alike.

    Raises ModelError for a model that cannot be used, see `admit`.
    """

    def __init__(self, module: Any, vocab_size: int | None = None) -> None:
        admit(module, trained=False)
        self.module = module.requires_grad_(False).eval()
        self.vocab_size = vocab_size
        self._device = self._home = read_head(module).weight.device

    def place(self, device: torch.device, *, offload: bool = False) -> None:
        """Compute on `device` from now on; with `offload` stay in the host's memory in between."""
        self._device, self._home = device, torch.device("cpu") if offload else device
        self.module.to(self._home)

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Let the module compute within the block."""
        self.module.to(self._device)
        try:
            yield
        finally:
            self.module.to(self._home)

    def head(self) -> Head:
        """Return the head, on the device where the module computes."""
        head = read_head(self.module)
        bias = None if head.bias is None else head.bias.to(self._device)
        return dataclasses.replace(head, weight=head.weight.to(self._device), bias=bias)

    def known(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch whose ids all have an embedding here.

        A student with more rows of padding may, once in a while, sample one of them.
        """
        rows = len(self.module.get_input_embeddings().weight)
        return dataclasses.replace(batch, input_ids=batch.input_ids.clamp(max=rows - 1))


def settings_of_other(config: OPSDCConfig) -> ModelConfig | None:
    """Return the settings by which `teacher.model` is loaded: the student's, but nothing trained.

    None where the student teaches itself.
    """
    name = config.teacher.model
    if name is None:
        return None
    return replace(config.model, name_or_path=name, revision=None, lora=None, quantize=None)


def load_other(
    config: OPSDCConfig, student: Any, tokenizer: PreTrainedTokenizerBase
) -> OtherModel | None:
    """Load the model that `teacher.model` names; None where the student teaches itself.

    Raises ModelError where it cannot be loaded or used, or has another vocabulary.
    """
    settings = settings_of_other(config)
    if settings is None:
        return None
    its_tokenizer = load_tokenizer(settings, setting=_SETTING)
    check_same_tokenizer(tokenizer, its_tokenizer, config)
    if its_tokenizer.chat_template not in (None, tokenizer.chat_template):
        print(
            f"{_SETTING} {settings.name_or_path} has a chat template of its own, which is not "
            "used: the student's renders both prompts",
            file=sys.stderr,
        )
    module = load_model(settings, trained=False, setting=_SETTING)
    other = OtherModel(module)
    sizes = [len(read_head(model).weight) for model in (student, module)]
    if sizes[0] != sizes[1]:
        other.vocab_size = len(tokenizer)
        if min(sizes) < len(tokenizer):
            raise ModelError(
                f"{_names(config)}: their heads have {sizes[1]} and {sizes[0]} rows, and the "
                f"tokenizer {len(tokenizer)} tokens: one of them lacks tokens of the other; give a "
                "model with the student's vocabulary"
            )
    return other


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, its_tokenizer: PreTrainedTokenizerBase, config: OPSDCConfig
) -> None:
    """Raise ModelError unless ids mean to the teacher what they mean to the student.

    Compared by content: each token and its id, the end of a response, and a few texts.
    """
    remedy = "a response's ids would mean other text to it; give a model with the same tokenizer"
    ours, theirs = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    if ours != theirs:
        token = min(ours.items() ^ theirs.items(), key=lambda entry: (entry[1], entry[0]))[0]
        raise ModelError(
            f"{_names(config)}: their tokenizers have {len(theirs)} and {len(ours)} tokens, and "
            f"{token!r} has the id {theirs.get(token)} there and {ours.get(token)} here: {remedy}"
        )
    if tokenizer.eos_token_id != its_tokenizer.eos_token_id:
        raise ModelError(
            f"{_names(config)}: a response ends in {its_tokenizer.eos_token!r} there and in "
            f"{tokenizer.eos_token!r} here, so that they would disagree at every end; give a model "
            "whose tokenizer has the same eos_token"
        )
    for text in (*_PROBES, *sorted(tokenizer.all_special_tokens)):
        ids = [t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, its_tokenizer)]
        if ids[0] != ids[1]:
            raise ModelError(
                f"{_names(config)}: their tokenizers read {text!r} as other tokens, though they "
                f"have the same ones: {remedy}"
            )


def _names(config: OPSDCConfig) -> str:
    return f"{_SETTING} {config.teacher.model} teaches model.name_or_path " + (
        config.model.name_or_path
    )
