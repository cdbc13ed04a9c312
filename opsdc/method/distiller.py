"""Student, teacher and loss as one module: for transformers' Trainer, or any other loop.

Backbone and loss run inside one forward, so that a wrapper around it (DDP, FSDP, autocast) sees
both. The logits of neither model exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from opsdc.config.settings import LossConfig
from opsdc.errors import ConfigError, DataError, ModelError
from opsdc.method.batch import Pair, from_labels, to_labels, token_batch
from opsdc.method.loss import distillation_loss, select_tokens
from opsdc.models.head import Head, TokenBatch, check_head, hidden_states, read_head


class Distiller(nn.Module):
    """The divergence of a student from its teacher, per response token, in `forward`.

    Args:
        student: A causal language model of transformers, or a PEFT model around one.
        teacher: Another one with the same vocabulary; it is frozen. None stands for the student
            with its adapter switched off.
        loss: Divergence, backend and scratch budget. The mean is over tokens, since their number
            is all that `Trainer` says of the whole step.

    Raises:
        ModelError: A head computes something the loss does not describe, or there is no teacher.
        ConfigError: The normalization is not "token".
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
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        # Trainer and its loggers read the model's properties here.
        self.config = student.config
        self._loss = loss
        for model in (student, teacher):
            if model is not None:
                check_head(model)
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
    ) -> dict[str, torch.Tensor]:
        """Return {"loss": Σ divergence / num_items_in_batch}, in nats per response token.

        Args:
            input_ids, attention_mask, labels: [rows, T] int64; a label is the token itself within
                the response and −100 elsewhere.
            teacher_input_ids, teacher_attention_mask, teacher_labels: [rows, T'], the same
                responses behind the teacher's prompts.
            num_items_in_batch: Number of response tokens of the whole optimizer step, over all its
                micro-batches and processes. None counts those of this call.

        Raises:
            DataError: The responses of the two sides differ.
        """
        batch = from_labels(input_ids, attention_mask, labels)
        teacher_batch = from_labels(teacher_input_ids, teacher_attention_mask, teacher_labels)
        if not torch.equal(batch.targets, teacher_batch.targets):
            raise DataError(
                f"labels hold {len(batch.targets)} response tokens and teacher_labels "
                f"{len(teacher_batch.targets)}, and they differ; both must be the same responses, "
                "row by row"
            )
        teacher_hidden, teacher_head = self._score_as_teacher(teacher_batch)
        student_hidden = hidden_states(self.student, batch)
        count = len(batch.targets) if num_items_in_batch is None else num_items_in_batch
        weight = torch.ones(len(batch.targets), device=student_hidden.device) / count
        states = (
            student_hidden,
            read_head(self.student),
            teacher_hidden.to(student_hidden.dtype),
            teacher_head,
        )
        if self._loss.token_share < 1:
            weight, _ = select_tokens(*states, weight, batch.lengths, self._loss)
        loss, _ = distillation_loss(*states, weight, self._loss)
        return {"loss": loss}

    @torch.no_grad()
    def _score_as_teacher(self, batch: TokenBatch) -> tuple[torch.Tensor, Head]:
        if self.teacher is not None:
            return hidden_states(self.teacher, batch), read_head(self.teacher)
        with _adapter_off(self.student):
            return hidden_states(self.student, batch), read_head(self.student)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Switch checkpointing on in the student, as Trainer asks; the teacher has no graph."""
        self.student.gradient_checkpointing_enable(**settings)

    def train(self, mode: bool = True) -> Distiller:
        """Set the student's mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def collate(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """Lay out the arguments of `Distiller.forward`, [rows, T] int64 each and padded on the right.

    Serves Trainer as `data_collator`.
    """
    arguments: dict[str, torch.Tensor] = {}
    for side, prefix in (("student", ""), ("teacher", "teacher_")):
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
            f"{prefix}labels": to_labels(batch),
        }
    return arguments


@contextlib.contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """Let the model compute as a teacher within the block: adapter off, no dropout."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)


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
