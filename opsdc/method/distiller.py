"""Student, teacher and loss as one module: for transformers' Trainer, or any other loop.

Backbone and loss run inside one forward, so that a wrapper around it (DDP, FSDP, autocast) sees
both. The logits of neither model exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsdc.config.settings import LossConfig
from opsdc.errors import ConfigError, DataError, ModelError
from opsdc.method.batch import Pair, from_labels, to_labels, token_batch
from opsdc.method.loss import distillation_loss, select_tokens
from opsdc.method.mixture import (
    AGAINST,
    CONCISE,
    PLAIN,
    START,
    Mix,
    blend,
    check_mixable,
    widened,
)
from opsdc.models.admit import admit, check_adapter_off
from opsdc.models.head import Head, TokenBatch, check_head, evaluating, hidden_states, read_head
from opsdc.models.positions import longest_sequence


class Distiller(nn.Module):
    """The divergence of a student from its teacher, per response token, in `forward`.

    Args:
        student: A causal language model of transformers, or a PEFT model around one. Its trained
            parameters become float32.
        teacher: Another one with the same vocabulary; it is frozen. None stands for the student
            with its adapter switched off.
        loss: Divergence, backend and scratch budget. The mean is over tokens, since their number
            is all that `Trainer` says of the whole step.
        mix: How the teacher is mixed from its contexts, see `opsdc.method.mixture`.
        start: For an anchor, the model before training; it is frozen. None stands for the teacher.
        vocab_size: The number of tokens, where heads have further rows of padding; None for all
            rows, whose number must then be the same in all models.

    Raises:
        ModelError: A model cannot be used (see `opsdc.models.admit`), a head computes something the
            loss does not describe, the teacher shares parameters with the student or would move
            with it, or a mixture is asked of a head that caps its logits softly.
        ConfigError: The normalization is not "token", or vocab_size does not fit the heads.
    """

    # Makes Trainer pass `num_items_in_batch` and leave the accumulation to us.
    accepts_loss_kwargs = True
    # Makes Trainer count no label in the first column, which nothing predicts.
    loss_type = "ForCausalLM"

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        loss: LossConfig = LossConfig(normalization="token"),  # noqa: B008 (frozen)
        mix: Mix = Mix(),  # noqa: B008 (frozen)
        start: Any = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        if loss.normalization != "token":
            raise ConfigError(
                f"loss.normalization {loss.normalization!r}: the number of responses in the whole "
                "step is not known here; use 'token'"
            )
        if teacher is None and not hasattr(student, "disable_adapter"):
            raise ModelError(
                "teacher=None is the student with its adapter off, and this student has none; "
                "pass a teacher, copy.deepcopy(student) for one that stays as the student is now"
            )
        admit(student)
        for name, model in (("teacher", teacher), ("start", start)):
            if model is not None:
                _check_apart(student, model, name)
                admit(model, trained=False)
        models = [model for model in (student, teacher, start) if model is not None]
        _check_vocabulary([len(read_head(model).weight) for model in models], vocab_size)
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.start = None if start is None else start.requires_grad_(False).eval()
        # Trainer and its loggers read the model's properties here.
        self.config = student.config
        self._loss, self._vocab_size = loss, vocab_size
        limits = [limit for model in models if (limit := longest_sequence(model)) is not None]
        self._longest = min(limits, default=None)
        self._contexts = mix.weights(start_is_teacher=start is None)
        self._anchor = mix.anchor
        for model in models:
            check_head(model)
            if mix != Mix():
                check_mixable(read_head(model), "mix")
        if teacher is None:
            check_adapter_off(student)
        self.register_state_dict_post_hook(_keep_only_trained)
        self.register_load_state_dict_post_hook(_expect_only_trained)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        teacher_input_ids: torch.Tensor,
        teacher_attention_mask: torch.Tensor,
        teacher_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        against_input_ids: torch.Tensor | None = None,
        against_attention_mask: torch.Tensor | None = None,
        against_responses: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return {"loss": Σ divergence / num_items_in_batch}, in nats per response token.

        Args:
            input_ids, attention_mask, labels: [rows, T] int64; a label is the token itself within
                the response and −100 elsewhere.
            teacher_input_ids, teacher_attention_mask, teacher_labels: [rows, T'], the same
                responses behind the teacher's prompts.
            num_items_in_batch: Number of response tokens of the whole optimizer step, over all its
                micro-batches and processes. None counts those of this call.
            against_input_ids, against_attention_mask, against_responses: [rows, T''], with
                `mix.against`: the same responses behind the instruction whose style is subtracted.
                The last is laid out as labels are; Trainer would take that name for more labels.

        Raises:
            DataError: The responses of two sides differ, a side that `mix` needs is missing, or a
                row is longer than the positions of a model allow.
        """
        batch = from_labels(input_ids, attention_mask, labels)
        batches = {
            PLAIN: batch,
            START: batch,
            CONCISE: from_labels(teacher_input_ids, teacher_attention_mask, teacher_labels),
        }
        _check_equal_responses(batch, batches[CONCISE], "teacher_labels")
        if AGAINST in self._contexts:
            if (
                against_input_ids is None
                or against_attention_mask is None
                or against_responses is None
            ):
                raise DataError(
                    "mix.against needs against_input_ids, against_attention_mask and "
                    "against_responses; give each Pair its against_prompt_ids"
                )
            batches[AGAINST] = from_labels(
                against_input_ids, against_attention_mask, against_responses
            )
            _check_equal_responses(batch, batches[AGAINST], "against_responses")
        width = max(batches[context].input_ids.shape[1] for context in (PLAIN, *self._contexts))
        if self._longest is not None and width > self._longest[0]:
            raise DataError(
                f"rows of {width} tokens, and a model is to have {self._longest[0]} at most: "
                f"{self._longest[1]}; give shorter prompts or responses"
            )
        teacher_hidden, teacher_head = self._score_as_teacher(batches)
        student_hidden = hidden_states(self.student, batch)
        count = len(batch.targets) if num_items_in_batch is None else num_items_in_batch
        weight = torch.ones(len(batch.targets), device=student_hidden.device) / count
        states = _in_one_dtype(
            student_hidden, read_head(self.student), teacher_hidden, teacher_head
        )
        size = self._vocab_size
        if self._loss.token_share < 1:
            weight, _ = select_tokens(*states, weight, batch.lengths, self._loss, vocab_size=size)
        loss, _ = distillation_loss(*states, weight, self._loss, vocab_size=size)
        return {"loss": loss}

    @torch.no_grad()
    def _score_as_teacher(self, batches: Mapping[str, TokenBatch]) -> tuple[torch.Tensor, Head]:
        """Return the mixed hidden states of the teacher, [n, D] or wide, and their head."""
        hidden = {}
        model = self.student if self.teacher is None else self.teacher
        with _adapter_off(self.student) if self.teacher is None else contextlib.nullcontext():
            for context in self._contexts:
                if context != START:
                    hidden[context] = hidden_states(model, batches[context])
            head = read_head(model)
        if START not in self._contexts:
            return blend(hidden, self._contexts, wide=False), head
        hidden[START] = hidden_states(self.start, batches[START])
        start_head = read_head(self.start)
        if self._vocab_size is not None:
            head, start_head = (_cut(h, self._vocab_size) for h in (head, start_head))
        wide = start_head.weight is not head.weight
        mixed = blend(hidden, self._contexts, wide=wide)
        return mixed, widened(head, start_head, self._anchor) if wide else head

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Switch checkpointing on in the student, as Trainer asks; the teacher has no graph."""
        self.student.gradient_checkpointing_enable(**settings)

    def train(self, mode: bool = True) -> Distiller:
        """Set the student's mode; teacher and start always stay in evaluation mode."""
        super().train(mode)
        for frozen in (self.teacher, self.start):
            if frozen is not None:
                frozen.eval()
        return self

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the student alone, as an ordinary Hugging Face folder (with LoRA the adapter's).

        `options` go to the student's own `save_pretrained`. (Trainer's `save_model` writes the
        state of this module, from which `Trainer.train` goes on, and which no one else reads.)
        """
        self.student.save_pretrained(str(folder), **options)


def collate(rows: Iterable[Pair | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Lay out the arguments of `Distiller.forward`, [rows, T] int64 each and padded on the right.

    Serves Trainer and DataLoader as collator.

    Args:
        rows: Pairs, or mappings with the keys `student_prompt_ids`, `teacher_prompt_ids` and
            `response_ids` (and `against_prompt_ids`), lists of token ids: the rows of a
            `datasets.Dataset`, or one itself.

    Raises DataError for a row without one of these keys, and for no rows at all.
    """
    pairs = [row if isinstance(row, Pair) else _pair_of(row, i) for i, row in enumerate(rows)]
    if not pairs:
        raise DataError("collate was given no rows")
    arguments: dict[str, torch.Tensor] = {}
    sides = [("student", ""), ("teacher", "teacher_")]
    if any(pair.against_prompt_ids for pair in pairs):
        sides.append(("against", "against_"))
    for side, prefix in sides:
        batch = token_batch(
            [(getattr(pair, f"{side}_prompt_ids"), pair.response_ids) for pair in pairs],
            packed=False,
            pad_id=0,
            device=torch.device("cpu"),
        )
        assert batch.attention_mask is not None
        arguments |= {
            f"{prefix}input_ids": batch.input_ids,
            f"{prefix}attention_mask": batch.attention_mask,
            f"{prefix}{'responses' if side == 'against' else 'labels'}": to_labels(batch),
        }
    return arguments


def _pair_of(row: Any, i: int) -> Pair:
    """Return the pair that a mapping describes; other columns of a dataset are left out."""
    if not isinstance(row, Mapping):
        raise DataError(f"row {i} of collate is a {type(row).__name__}, neither Pair nor mapping")
    names = ("student_prompt_ids", "teacher_prompt_ids", "response_ids")
    missing = [name for name in names if row.get(name) is None]
    if missing:
        present = ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"row {i} of collate has no {missing[0]}; it has {present}"
            " (Trainer drops columns that it does not know: set remove_unused_columns=False)"
        )
    # Datasets in torch's format give tensors.
    student, teacher, response = (torch.as_tensor(row[name]).tolist() for name in names)
    return Pair(
        student_prompt_ids=student,
        teacher_prompt_ids=teacher,
        response_ids=response,
        against_prompt_ids=list(row.get("against_prompt_ids") or ()),
    )


def _check_equal_responses(batch: TokenBatch, other: TokenBatch, labels: str) -> None:
    if not torch.equal(batch.targets, other.targets):
        raise DataError(
            f"labels hold {len(batch.targets)} response tokens and {labels} {len(other.targets)}, "
            "and they differ; both must be the same responses, row by row"
        )


def _check_apart(student: Any, teacher: Any, name: str) -> None:
    """Raise ModelError where freezing the teacher would freeze parameters of the student."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    # An adapter's parameters stand within the base that it was put around.
    if any(id(p) in trained for p in teacher.parameters()):
        raise ModelError(
            f"the {name} holds parameters of the student that are trained; pass "
            "copy.deepcopy(student), or for the base of the student's adapter no teacher"
        )


def _check_vocabulary(sizes: Sequence[int], vocab_size: int | None) -> None:
    """Raise ConfigError unless all heads, of so many rows, score the same tokens."""
    if vocab_size is None and len(set(sizes)) > 1:
        raise ConfigError(
            f"the heads of student, teacher and start have {', '.join(map(str, sizes))} rows; with "
            "one tokenizer the rest is padding: give its number of tokens, "
            "vocab_size=len(tokenizer)"
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(sizes):
        raise ConfigError(
            f"vocab_size must be between 1 and {min(sizes)}, the rows of the smallest head, got "
            f"{vocab_size}"
        )


def _cut(head: Head, rows: int) -> Head:
    """Return the first rows of a frozen head."""
    bias = None if head.bias is None else head.bias[:rows]
    return dataclasses.replace(head, weight=head.weight[:rows], bias=bias)


def _in_one_dtype(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
) -> tuple[torch.Tensor, Head, torch.Tensor, Head]:
    """Widen what is narrower than the rest, such as a bfloat16 teacher's head."""
    states = student_hidden, student_head, teacher_hidden, teacher_head
    # Under autocast the loss brings all to its dtype.
    if torch.is_autocast_enabled(student_hidden.device.type):
        return states
    dtype = student_hidden.dtype
    for tensor in (student_head.weight, teacher_hidden, teacher_head.weight):
        dtype = torch.promote_types(dtype, tensor.dtype)

    def widen(head: Head) -> Head:
        bias = None if head.bias is None else head.bias.to(dtype)
        return dataclasses.replace(head, weight=head.weight.to(dtype), bias=bias)

    return (
        student_hidden.to(dtype), widen(student_head), teacher_hidden.to(dtype), widen(teacher_head)
    )  # fmt: skip


@contextlib.contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """Let the model compute as a teacher within the block: adapter off, no dropout."""
    with evaluating(model), model.disable_adapter():
        yield


def _trained_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _keep_only_trained(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out of a checkpoint all that does not change: the teacher, a frozen base.

    A tied head is then stored once.
    """
    trained = {prefix + name for name in _trained_names(module)}
    for name in [n for n in state if n.startswith(prefix) and n not in trained]:
        del state[name]


def _expect_only_trained(module: nn.Module, incompatible: Any) -> None:
    """Report as missing, when a checkpoint is loaded, only names that a checkpoint holds."""
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name in _trained_names(module)]
