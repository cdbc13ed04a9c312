"""One optimizer step from one set of rollouts: teacher pass, student pass, loss, step.

The teacher scores the whole step first, once per rollout and without gradient; what it leaves is
one hidden state per response token, reused by whichever student micro-batch needs it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opsdc import stop
from opsdc.batch import Pair, micro_batches, token_batch, token_weights
from opsdc.config import OPSDCConfig
from opsdc.errors import TrainingError
from opsdc.loss import distillation_loss
from opsdc.model import hidden_states, read_head
from opsdc.teacher import Teacher
from opsdc_kernels import DivergenceStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How sequences become forwards; changes speed and memory, never the result."""

    packed: bool
    max_tokens: int
    pad_id: int
    dtype: torch.dtype
    """what the forward computes in; below float32 it runs under autocast"""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one update measured."""

    loss: float
    """nats per token, normalised as the config says"""
    grad_norm: float
    """before clipping"""
    skipped: bool
    """loss or gradient was not finite: parameters and optimizer are untouched"""
    divergence: torch.Tensor
    """[n] nats, every response token of the step"""
    student_entropy: float
    teacher_entropy: float
    agreement: float
    seconds: dict[str, float]
    """by phase: teacher, student (forward and backward), optimizer"""
    layout: Layout
    """as given, or with the smaller forwards that fitted into memory"""


def teacher_hidden_states(
    model: Any, teacher: Teacher, pairs: Sequence[Pair], layout: Layout
) -> list[torch.Tensor]:
    """[n_i, D] per pair: the teacher's hidden states at the response positions, no gradient."""
    device = read_head(model).weight.device
    groups = micro_batches(
        [p.teacher_length for p in pairs], max_tokens=layout.max_tokens, packed=layout.packed
    )
    found: dict[int, torch.Tensor] = {}
    with teacher.weights(), torch.no_grad(), autocast(device, layout.dtype):
        for group in groups:
            stop.check()
            batch = token_batch(
                [(pairs[i].teacher_prompt_ids, pairs[i].response_ids) for i in group],
                packed=layout.packed,
                pad_id=layout.pad_id,
                device=device,
            )
            rows = hidden_states(model, batch)
            counts = [len(pairs[i].response_ids) for i in group]
            # A clone, so that one kept row does not keep the whole forward's rows alive.
            found.update(zip(group, (part.clone() for part in rows.split(counts)), strict=True))
    return [found[i] for i in range(len(pairs))]


def update(
    model: Any,
    teacher: Teacher,
    pairs: Sequence[Pair],
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    config: OPSDCConfig,
    *,
    sampled_finite: bool = True,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> UpdateResult:
    """Accumulate the gradient of the whole step and take one optimizer step, if it is finite.

    `sampled_finite`: False makes the loss NaN, for responses that were sampled from NaN logits.
    A forward or backward that runs out of memory takes nothing with it: the whole step is done
    again in forwards of half the size. Raises TrainingError when they cannot be halved any more.
    """
    scored = [p for p in pairs if p.response_ids]
    if not scored:
        return _nothing_to_learn(layout)
    while True:
        optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        try:
            kept = teacher_hidden_states(model, teacher, scored, layout)
            teacher_done = time.perf_counter()
            loss, stats = backward(
                model, teacher, scored, kept, layout, config, on_tokens=on_tokens
            )
            break
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        # Not in the handler: the error's frames hold the tensors that did not fit.
        optimizer.zero_grad(set_to_none=True)
        kept = []
        layout = _halved(layout, scored)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(
            f"out of memory: the step again, at most {layout.max_tokens} tokens a forward",
            file=sys.stderr,
            flush=True,
        )
    if not sampled_finite:
        loss = math.nan
    student_done = time.perf_counter()
    grad_norm = float(
        torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], config.optim.grad_clip
        )
    )
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return UpdateResult(
        loss=loss,
        grad_norm=grad_norm,
        skipped=skipped,
        divergence=torch.cat([s.divergence for s in stats]).float().cpu(),
        student_entropy=_mean([s.student_entropy for s in stats]),
        teacher_entropy=_mean([s.teacher_entropy for s in stats]),
        agreement=_mean([s.agreement for s in stats]),
        seconds={
            "teacher": teacher_done - started,
            "student": student_done - teacher_done,
            "optimizer": time.perf_counter() - student_done,
        },
        layout=layout,
    )


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error)
    )


def _halved(layout: Layout, pairs: Sequence[Pair]) -> Layout:
    """Half of the tokens in the step's largest forward that is of more than one sequence."""
    largest = 0
    for lengths in ([p.teacher_length for p in pairs], [p.student_length for p in pairs]):
        for group in micro_batches(lengths, max_tokens=layout.max_tokens, packed=layout.packed):
            if len(group) > 1:
                width = [lengths[i] if layout.packed else lengths[group[0]] for i in group]
                largest = max(largest, sum(width))
    if not largest:
        longest = max(max(p.teacher_length, p.student_length) for p in pairs)
        raise TrainingError(
            f"out of memory with one sequence of {longest} tokens a forward; nothing of the step "
            "was applied. Set model.gradient_checkpointing true, lower rollout.max_new_tokens or "
            "loss.workspace_bytes, or train an adapter (model.lora)"
        )
    return replace(layout, max_tokens=largest // 2)


def backward(
    model: Any,
    teacher: Teacher,
    pairs: Sequence[Pair],
    teacher_hidden: Sequence[torch.Tensor],
    layout: Layout,
    config: OPSDCConfig,
    *,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> tuple[float, list[DivergenceStats]]:
    """Student forward, loss and backward, micro-batch by micro-batch; gradients accumulate.

    Returns the loss of the whole step in nats and the statistics of each micro-batch.
    """
    weights = token_weights([len(p.response_ids) for p in pairs], config.loss.normalization)
    device = read_head(model).weight.device
    teacher_head = teacher.head()
    losses: list[torch.Tensor] = []
    stats: list[DivergenceStats] = []
    for group in micro_batches(
        [p.student_length for p in pairs], max_tokens=layout.max_tokens, packed=layout.packed
    ):
        stop.check()
        batch = token_batch(
            [(pairs[i].student_prompt_ids, pairs[i].response_ids) for i in group],
            packed=layout.packed,
            pad_id=layout.pad_id,
            device=device,
        )
        token_weight = torch.tensor(
            [weights[i] for i in group for _ in pairs[i].response_ids], device=device
        )
        with autocast(device, layout.dtype):
            student_hidden = hidden_states(model, batch)
            loss, found = distillation_loss(
                student_hidden,
                read_head(model),
                torch.cat([teacher_hidden[i] for i in group]).to(student_hidden.dtype),
                teacher_head,
                token_weight,
                config.loss,
            )
        loss.backward()
        losses.append(loss.detach())
        stats.append(found)
        on_tokens(sum(len(pairs[i].response_ids) for i in group))
    return float(torch.stack(losses).sum()), stats


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Trained parameters are float32; a 16-bit forward casts them as it goes."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _mean(parts: Sequence[torch.Tensor]) -> float:
    return float(torch.cat(list(parts)).double().mean())


def _nothing_to_learn(layout: Layout) -> UpdateResult:
    nan = math.nan
    return UpdateResult(
        loss=nan,
        grad_norm=nan,
        skipped=True,
        divergence=torch.empty(0),
        student_entropy=nan,
        teacher_entropy=nan,
        agreement=nan,
        seconds={"teacher": 0.0, "student": 0.0, "optimizer": 0.0},
        layout=layout,
    )
