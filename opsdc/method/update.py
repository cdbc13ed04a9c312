"""One optimizer step from one set of rollouts: teacher pass, student pass, loss, step.

The teacher scores the whole step first, once per rollout and without gradient; what it leaves is
one hidden state per response token, reused by whichever student micro-batch needs it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from opsdc.config import LossConfig, OPSDCConfig
from opsdc.errors import OutOfMemoryError, TrainingError
from opsdc.method.batch import (
    Pair,
    TokenBatch,
    balanced,
    micro_batches,
    token_batch,
    token_weights,
)
from opsdc.method.loss import distillation_loss, select_tokens
from opsdc.method.selection import kept_count
from opsdc.method.teacher import Teacher
from opsdc.models.load import Head, hidden_states, read_head
from opsdc.ranks import shard as sharding
from opsdc.ranks.talk import ALONE, Ranks, is_out_of_memory
from opsdc_kernels import DivergenceStats

ADVICE = (
    "Lower train.max_tokens_per_micro_batch, rollout.batch_size or loss.workspace_bytes, set "
    "model.gradient_checkpointing true or distributed.strategy fsdp, or train an adapter "
    "(model.lora): `opsdc plan` says what fits"
)
"""for ranks that ran out of memory"""
_PER_TOKEN = ("divergence", "student_entropy", "teacher_entropy", "agreement")


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
    kept_tokens: dict[str, float]
    """with a `loss.token_share` below 1: share of the tokens that were trained on, and of the loss
    of all tokens that they hold; `divergence` and means are of all"""
    skipped_columns: dict[str, float]
    """with `loss.skip_tolerance`, of the loss and its gradients: share of columns kept, GEMM units,
    the largest bounds of the error and an estimate of the nats the loss lacks, per token"""
    seconds: dict[str, float]
    """by phase: teacher, student (forward and backward), optimizer"""
    layout: Layout
    """as given, or with the smaller forwards that fitted into memory"""


def teacher_hidden_states(
    model: Any,
    teacher: Teacher,
    pairs: Sequence[Pair],
    layout: Layout,
    *,
    ranks: Ranks = ALONE,
) -> dict[int, torch.Tensor]:
    """[n_i, D] per pair of this rank's: the teacher's hidden states at the response positions."""
    device = read_head(model).weight.device
    found: dict[int, torch.Tensor] = {}
    with teacher.weights(), torch.no_grad(), autocast(device, layout.dtype):
        for group in _groups(pairs, [p.teacher_length for p in pairs], layout, ranks):
            ranks.check_stop()
            chosen = [pairs[i] for i in group] or [_nothing(layout)]
            batch = token_batch(
                [(p.teacher_prompt_ids, p.response_ids) for p in chosen],
                packed=layout.packed,
                pad_id=layout.pad_id,
                device=device,
            )
            rows = sharding.within(model, hidden_states, model, batch)
            counts = [len(p.response_ids) for p in chosen]
            # A clone, so that one kept row does not keep the whole forward's rows alive.
            parts = [part.clone() for part in rows.split(counts)]
            found.update(zip(group, parts, strict=False))
    return found


def _groups(
    pairs: Sequence[Pair], lengths: Sequence[int], layout: Layout, ranks: Ranks
) -> list[list[int]]:
    """This rank's micro-batches of a step that every rank knows.

    Ranks run in lockstep, so all have as many as the busiest; those of no pair stand at the end.
    """
    shares = balanced([p.student_length + p.teacher_length for p in pairs], ranks.size)
    found = [
        [
            [share[j] for j in group]
            for group in micro_batches(
                [lengths[i] for i in share], max_tokens=layout.max_tokens, packed=layout.packed
            )
        ]
        for share in shares
    ]
    most = max(len(groups) for groups in found)
    mine = found[ranks.rank]
    return mine + [[] for _ in range(most - len(mine))]


def _nothing(layout: Layout) -> Pair:
    """A row for a rank that has none; its token has weight 0."""
    ids = [layout.pad_id]
    return Pair(student_prompt_ids=ids, teacher_prompt_ids=ids, response_ids=ids)


def update(
    model: Any,
    teacher: Teacher,
    pairs: Sequence[Pair],
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    config: OPSDCConfig,
    *,
    ranks: Ranks = ALONE,
    sampled_finite: bool = True,
    on_tokens: Callable[[int], None] = lambda n: None,
    exact_value: bool = False,
) -> UpdateResult:
    """Accumulate the gradient of the whole step and take one optimizer step, if it is finite.

    All ranks are given the same `pairs`, and each takes its share of them.

    `sampled_finite`: False makes the loss NaN, for responses that were sampled from NaN logits.
    A forward or backward that runs out of memory takes nothing with it: the whole step is done
    again in forwards of half the size. Raises TrainingError when they cannot be halved any more.
    Of several ranks each raises OutOfMemoryError instead, parameters and optimizer untouched.
    """
    scored = [p for p in pairs if p.response_ids]
    if not scored:
        return _nothing_to_learn(layout)
    while True:
        optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        try:
            kept = teacher_hidden_states(model, teacher, scored, layout, ranks=ranks)
            teacher_done = time.perf_counter()
            loss, whole_loss, stats = backward(
                model, teacher, scored, kept, layout, config,
                ranks=ranks, on_tokens=on_tokens, exact_value=exact_value,
            )  # fmt: skip
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if ranks.size > 1:
                _leave_together(error, model, ranks)
        # Not in the handler: the error's frames hold the tensors that did not fit.
        optimizer.zero_grad(set_to_none=True)
        kept = {}
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
        sharding.full(
            torch.nn.utils.clip_grad_norm_(
                [p for p in model.parameters() if p.requires_grad], config.optim.grad_clip
            )
        )
    )
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    skipped_columns = _skipped_columns(stats, ranks) if config.loss.skip_tolerance else {}
    kept_tokens = {}
    if config.loss.token_share < 1:
        counts = [len(p.response_ids) for p in scored]
        share = sum(kept_count(n, config.loss.token_share) for n in counts) / sum(counts)
        kept_tokens = {
            "kept_tokens_share": share,
            "kept_loss_share": loss / whole_loss if whole_loss else math.nan,
        }
        if skipped_columns:
            # Those of the kept tokens, and of the pass that chose them.
            skipped_columns["loss_gemm_units"] = 2 + share * skipped_columns["loss_gemm_units"]
    measured = ranks.concat(_columns(stats))
    means = measured.double().mean(0).tolist()
    return UpdateResult(
        loss=loss,
        grad_norm=grad_norm,
        skipped=skipped,
        divergence=measured[:, 0],
        student_entropy=means[1],
        teacher_entropy=means[2],
        agreement=means[3],
        kept_tokens=kept_tokens,
        skipped_columns=skipped_columns,
        seconds={
            "teacher": teacher_done - started,
            "student": student_done - teacher_done,
            "optimizer": time.perf_counter() - student_done,
        },
        layout=layout,
    )


def _leave_together(error: Exception, model: Any, ranks: Ranks) -> NoReturn:
    """Tell the others, who are on their way to the next micro-batch, and raise as they do.

    With fsdp and outside the loss they are not: they wait within a layer for what this rank cannot
    give any more, and no state can be gathered. The run then ends where its last checkpoint is.
    """
    if isinstance(error, OutOfMemoryError):
        raise error
    if sharding.is_sharded(model):
        raise TrainingError(
            f"{error}; with distributed.strategy fsdp nothing can be saved then, and the same "
            f"command goes on from the last checkpoint (train.save_every). {ADVICE}"
        ) from error
    ranks.check_stop(out_of_memory=True)
    raise AssertionError


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


def _losses(
    states: tuple[torch.Tensor, Head, torch.Tensor, Head],
    token_weight: torch.Tensor,
    lengths: Sequence[int],
    config: LossConfig,
    exact_value: bool,
) -> tuple[torch.Tensor, torch.Tensor, DivergenceStats]:
    """The loss to go back from, that of all tokens, and statistics of all."""
    if config.token_share == 1:
        loss, stats = distillation_loss(*states, token_weight, config, exact_value=exact_value)
        return loss, loss.detach(), stats
    kept_weight, every = select_tokens(*states, token_weight, lengths, config)
    loss, stats = distillation_loss(*states, kept_weight, config, exact_value=exact_value)
    per_token = {name: getattr(every, name) for name in _PER_TOKEN}
    return loss, (token_weight * every.divergence).sum(), replace(stats, **per_token)


def backward(
    model: Any,
    teacher: Teacher,
    pairs: Sequence[Pair],
    teacher_hidden: Mapping[int, torch.Tensor],
    layout: Layout,
    config: OPSDCConfig,
    *,
    ranks: Ranks = ALONE,
    on_tokens: Callable[[int], None] = lambda n: None,
    exact_value: bool = False,
) -> tuple[float, float, list[DivergenceStats]]:
    """Student forward, loss and backward, micro-batch by micro-batch; gradients accumulate.

    Returns the loss of the whole step in nats, what it would be of all tokens (the same unless
    `loss.token_share` leaves some out), and the statistics of each micro-batch of this rank's. The
    gradients are those of all ranks.
    """
    weights = token_weights([len(p.response_ids) for p in pairs], config.loss.normalization)
    student_head = read_head(model)
    device, dim = student_head.weight.device, student_head.weight.shape[1]
    teacher_head = teacher.head()
    shared = teacher_head.weight is student_head.weight
    sharded = sharding.is_sharded(model)
    if not shared:
        teacher_head = sharding.full_head(teacher_head, layout.dtype)

    def divergence(
        batch: TokenBatch, teacher_rows: torch.Tensor, token_weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, DivergenceStats] | None:
        # Here the head is whole, whichever way the model lies.
        student_rows, student_head = hidden_states(model, batch), read_head(model)
        states = (
            student_rows,
            student_head,
            teacher_rows.to(student_rows.dtype),
            student_head if shared else teacher_head,
        )
        try:
            return _losses(states, token_weight, batch.lengths, config.loss, exact_value)
        except (RuntimeError, MemoryError) as error:
            if sharded and is_out_of_memory(error):
                return None
            raise

    losses: list[torch.Tensor] = []
    whole_losses: list[torch.Tensor] = []
    stats: list[DivergenceStats] = []
    groups = _groups(pairs, [p.student_length for p in pairs], layout, ranks)
    for done, group in enumerate(groups, 1):
        ranks.check_stop()
        chosen = [pairs[i] for i in group] or [_nothing(layout)]
        batch = token_batch(
            [(p.student_prompt_ids, p.response_ids) for p in chosen],
            packed=layout.packed,
            pad_id=layout.pad_id,
            device=device,
        )
        token_weight = torch.tensor(
            [weights[i] for i in group for _ in pairs[i].response_ids] or [0.0], device=device
        )
        teacher_rows = [teacher_hidden[i] for i in group] or [torch.zeros(1, dim, device=device)]
        last = done == len(groups)
        sharding.reduce_next(model, last or config.distributed.reduce_every_micro_batch)
        with autocast(device, layout.dtype):
            forward = sharding.within(
                model, divergence, batch, torch.cat(teacher_rows), token_weight
            )
        if sharded:
            # In the backward the others would wait for a rank whose loss found no memory.
            ranks.check_stop(out_of_memory=forward is None)
        assert forward is not None
        loss, whole_loss, found = forward
        loss.backward()
        if group:
            losses.append(loss.detach())
            whole_losses.append(whole_loss)
            stats.append(found)
            on_tokens(sum(len(p.response_ids) for p in chosen))
    if ranks.size > 1:
        # One more chance to say that the last backward did not fit.
        ranks.check_stop()
    sharding.sum_gradients(model, ranks)

    def total(values: list[torch.Tensor]) -> float:
        return ranks.sum(float(torch.stack(values).sum()) if values else 0.0)

    return total(losses), total(whole_losses), stats


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Trained parameters are float32; a 16-bit forward casts them as it goes."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _skipped_columns(stats: Sequence[DivergenceStats], ranks: Ranks) -> dict[str, float]:
    """Means over the tokens and the largest bounds over the micro-batches of all ranks: the step's
    gradient is within them unless theirs cancel."""
    names = ("kept_share", "gemm_units", "hidden_gradient_bound", "weight_gradient_bound")
    rows = [
        [
            float(s.divergence.numel()),
            *(float(getattr(s, name)) for name in names),
            0.0 if s.divergence_error is None else float(s.divergence_error.sum()),
        ]
        for s in stats
    ]
    found = ranks.concat(torch.tensor(rows).reshape(-1, 2 + len(names))).double()
    tokens = found[:, 0]
    return {
        "kept_columns_share": float(tokens @ found[:, 1] / tokens.sum()),
        "loss_gemm_units": float(tokens @ found[:, 2] / tokens.sum()),
        "hidden_gradient_bound": float(found[:, 3].max()),
        "weight_gradient_bound": float(found[:, 4].max()),
        "kl_missing": float(found[:, 5].sum() / tokens.sum()),
    }


def _columns(stats: Sequence[DivergenceStats]) -> torch.Tensor:
    """[n, 4] float32: divergence, both entropies, agreement of every token."""
    if not stats:
        return torch.empty(0, 4)
    columns = [torch.cat([getattr(s, name) for s in stats]) for name in _PER_TOKEN]
    return torch.stack([column.float() for column in columns], dim=1)


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
        kept_tokens={},
        skipped_columns={},
        seconds={"teacher": 0.0, "student": 0.0, "optimizer": 0.0},
        layout=layout,
    )
