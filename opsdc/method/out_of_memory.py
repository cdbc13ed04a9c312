"""Remedies for a step that finds no memory: smaller forwards, or an end for all ranks together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch

from opsdc.errors import OutOfMemoryError, TrainingError
from opsdc.method.batch import Layout, Pair, micro_batches
from opsdc.ranks import shard
from opsdc.ranks.talk import Ranks, is_out_of_memory

T = TypeVar("T")

ADVICE = (
    "Lower train.max_tokens_per_micro_batch, rollout.batch_size or loss.workspace_bytes, set "
    "model.gradient_checkpointing true or distributed.strategy fsdp, or train an adapter "
    "(model.lora): `opsdc plan` says what fits"
)
"""Settings to change after ranks ran out of memory, as a sentence for the error."""


def fit_into_memory(
    work: Callable[[Layout], T], layout: Layout, pairs: Sequence[Pair], model: Any, ranks: Ranks
) -> tuple[T, Layout]:
    """Run `work(layout)`, which accumulates gradients, with forwards small enough for the memory.

    A try that finds no memory leaves no trace: its gradients are dropped, and the whole step is
    done again with forwards of half the size.

    Returns:
        The result of `work`, and the layout that fitted.

    Raises:
        TrainingError: One sequence alone does not fit; or, under fsdp, a rank found no memory.
        OutOfMemoryError: One of several ranks found no memory; all of them raise this.
    """
    while True:
        _drop_gradients(model)
        try:
            return work(layout), layout
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if ranks.size > 1:
                _leave_together(error, model, ranks)
        # Outside the handler: the error's frames hold the tensors that did not fit.
        _drop_gradients(model)
        layout = _halved(layout, [p for p in pairs if p.response_ids])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(
            f"out of memory: the step again, at most {layout.max_tokens} tokens a forward",
            file=sys.stderr,
            flush=True,
        )


def _drop_gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _leave_together(error: Exception, model: Any, ranks: Ranks) -> NoReturn:
    """Tell the other ranks, which are on their way to the next micro-batch, and raise as they do.

    Under fsdp, outside the loss, they are not on their way: they wait within a layer for a part
    that this rank cannot send any more, and no state can be gathered. The run then ends, and goes
    on from its last checkpoint.
    """
    if isinstance(error, OutOfMemoryError):
        raise error
    if shard.is_sharded(model):
        raise TrainingError(
            f"{error}; with distributed.strategy fsdp nothing can be saved then, and the same "
            f"command goes on from the last checkpoint (train.save_every). {ADVICE}"
        ) from error
    ranks.check_stop(out_of_memory=True)
    raise AssertionError("check_stop raises on all ranks")


def _halved(layout: Layout, pairs: Sequence[Pair]) -> Layout:
    """Return the layout with half the tokens of the step's largest forward of several sequences.

    Half of the old budget might change nothing, where no forward came near it. Raises
    TrainingError where all forwards hold one sequence.
    """
    largest = 0
    for lengths in ([p.teacher_length for p in pairs], [p.student_length for p in pairs]):
        for group in micro_batches(lengths, max_tokens=layout.max_tokens, packed=layout.packed):
            if len(group) > 1:
                # Longest first: a padded group is as wide as its first sequence.
                widths = [lengths[i] if layout.packed else lengths[group[0]] for i in group]
                largest = max(largest, sum(widths))
    if not largest:
        longest = max(max(p.teacher_length, p.student_length) for p in pairs)
        raise TrainingError(
            f"out of memory with one sequence of {longest} tokens a forward; nothing of the step "
            "was applied. Set model.gradient_checkpointing true, lower rollout.max_new_tokens or "
            "loss.workspace_bytes, or train an adapter (model.lora)"
        )
    return replace(layout, max_tokens=largest // 2)
