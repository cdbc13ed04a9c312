"""One optimizer step from one set of rollouts: teacher pass, student pass, loss, step.

The teacher scores the whole step first, once per rollout and without gradient; what it leaves is
one hidden state per response token, reused by whichever student micro-batch needs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import get_scheduler

from opsdc.config.settings import LossConfig, OPSDCConfig
from opsdc.method.batch import Layout, Pair, StepPlan, plan_step
from opsdc.method.loss import distillation_loss, select_tokens
from opsdc.method.room import in_memory
from opsdc.method.selection import kept_count
from opsdc.method.teacher import Teacher
from opsdc.models.head import Head, TokenBatch, hidden_states, read_head
from opsdc.ranks import shard
from opsdc.ranks.talk import ALONE, Ranks, is_out_of_memory
from opsdc_kernels import DivergenceStats

_PER_TOKEN = ("divergence", "student_entropy", "teacher_entropy", "agreement")


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one update measured."""

    loss: float = math.nan
    """Nats per token, normalised as the config says."""
    grad_norm: float = math.nan
    """Before clipping."""
    skipped: bool = True
    """Loss or gradient was not finite, or there was nothing to learn from: parameters and optimizer
    are untouched."""
    divergence: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[n] nats, every response token of the step."""
    student_entropy: float = math.nan
    teacher_entropy: float = math.nan
    agreement: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)
    """With a `loss.token_share` below 1, the shares of tokens trained on and of the loss they hold;
    with a `loss.skip_tolerance`, columns kept, GEMM units, bounds of the error and the nats the
    loss lacks. Divergence and means are of all tokens all the same."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase: teacher, student (forward and backward), optimizer."""
    layout: Layout
    """As given, or with the smaller forwards that fitted into memory."""

    def measures(self) -> dict[str, float | None]:
        """Return what the record says of the update; JSON has no NaN, so null stands for it."""
        kl, at = self.divergence.double(), torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
        quantiles = torch.quantile(kl, at).tolist() if len(kl) else [math.nan] * 3
        values = {
            "loss_nats": self.loss,
            **dict(zip(("kl_p50", "kl_p90", "kl_p99"), quantiles, strict=True)),
            "student_entropy": self.student_entropy,
            "teacher_entropy": self.teacher_entropy,
            "agreement": self.agreement,
            **self.extra,
            "grad_norm": self.grad_norm,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


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
    on_tokens: Callable[[int], Any] = lambda n: None,
    exact_value: bool = False,
) -> UpdateResult:
    """Take one optimizer step on the responses of a step, unless its gradient is not finite.

    Args:
        pairs: of the whole step, the same on every rank; each takes its share of them.
        sampled_finite: False makes the loss NaN, for responses sampled from NaN logits.
        on_tokens: is told of the response tokens that each micro-batch is through with.
        exact_value: with a `loss.skip_tolerance`, loss and statistics from all columns.

    Raises:
        TrainingError: one sequence a forward runs out of memory.
        OutOfMemoryError: of several ranks one ran out of it; parameters and optimizer untouched.
    """
    seconds = dict.fromkeys(("teacher", "student", "optimizer"), 0.0)
    if not any(p.response_ids for p in pairs):
        return UpdateResult(seconds=seconds, layout=layout)

    def gradient(layout: Layout) -> tuple[float, float, list[DivergenceStats]]:
        began = time.perf_counter()
        plan = plan_step(
            pairs,
            layout,
            normalization=config.loss.normalization,
            rank=ranks.rank,
            ranks=ranks.size,
        )
        teacher_hidden = teacher_pass(model, teacher, plan, ranks=ranks)
        scored = time.perf_counter()
        passed = student_pass(
            model, teacher, plan, teacher_hidden, config,
            ranks=ranks, on_tokens=on_tokens, exact_value=exact_value,
        )  # fmt: skip
        seconds["teacher"], seconds["student"] = scored - began, time.perf_counter() - scored
        return passed

    (loss, whole_loss, stats), layout = in_memory(gradient, layout, pairs, model, ranks)
    if not sampled_finite:
        loss = math.nan
    began = time.perf_counter()
    grad_norm, skipped = step(model, optimizer, loss, config.optim.grad_clip)
    seconds["optimizer"] = time.perf_counter() - began
    columns = ranks.concat(_per_token(stats))
    means = columns.double().mean(0).tolist()
    return UpdateResult(
        loss=loss,
        grad_norm=grad_norm,
        skipped=skipped,
        divergence=columns[:, 0],
        student_entropy=means[1],
        teacher_entropy=means[2],
        agreement=means[3],
        extra=_extra(loss, whole_loss, stats, pairs, config.loss, ranks),
        seconds=seconds,
        layout=layout,
    )


def teacher_pass(
    model: Any, teacher: Teacher, plan: StepPlan, *, ranks: Ranks = ALONE
) -> dict[int, torch.Tensor]:
    """Score this rank's responses as the teacher: [n_i, D] hidden states of each pair, by index."""
    device = read_head(model).weight.device
    hidden: dict[int, torch.Tensor] = {}
    with teacher.weights(), torch.no_grad(), autocast(device, plan.layout.dtype):
        for group in plan.teacher_groups:
            ranks.check_stop()
            batch = plan.teacher_batch(group, device)
            rows = shard.as_forward(model, hidden_states, model, batch)
            # A clone, so that one kept row does not keep the whole forward's rows alive.
            parts = [part.clone() for part in rows.split(list(batch.lengths))]
            hidden.update(zip(group, parts, strict=False))
    return hidden


def student_pass(
    model: Any,
    teacher: Teacher,
    plan: StepPlan,
    teacher_hidden: Mapping[int, torch.Tensor],
    config: OPSDCConfig,
    *,
    ranks: Ranks = ALONE,
    on_tokens: Callable[[int], Any] = lambda n: None,
    exact_value: bool = False,
) -> tuple[float, float, list[DivergenceStats]]:
    """Accumulate the gradient of the step: student forward, loss and backward, group by group.

    Returns the loss of the whole step in nats, what it would be of all tokens (the same unless
    `loss.token_share` leaves some out), and the statistics of each micro-batch of this rank's. The
    gradients are those of all ranks.
    """
    student_head = read_head(model)
    device, dim = student_head.weight.device, student_head.weight.shape[1]
    teacher_head = teacher.head()
    shared = teacher_head.weight is student_head.weight
    sharded = shard.is_sharded(model)
    if not shared:
        teacher_head = shard.full_head(teacher_head, plan.layout.dtype)

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
    for done, group in enumerate(plan.student_groups, 1):
        ranks.check_stop()
        batch = plan.student_batch(group, device)
        token_weight = plan.token_weights(group, device)
        teacher_rows = [teacher_hidden[i] for i in group] or [torch.zeros(1, dim, device=device)]
        last = done == len(plan.student_groups)
        shard.reduce_next(model, last or config.distributed.reduce_every_micro_batch)
        with autocast(device, plan.layout.dtype):
            forward = shard.as_forward(
                model, divergence, batch, torch.cat(teacher_rows), token_weight
            )
        if sharded:
            # In the backward the others would wait for a rank whose loss found no memory.
            ranks.check_stop(out_of_memory=forward is None)
        assert forward is not None
        loss, whole_loss, statistics = forward
        loss.backward()
        if group:
            losses.append(loss.detach())
            whole_losses.append(whole_loss)
            stats.append(statistics)
            on_tokens(sum(batch.lengths))
    if ranks.size > 1:
        # One more chance to say that the last backward did not fit.
        ranks.check_stop()
    shard.sum_gradients(model, ranks)

    def total(values: list[torch.Tensor]) -> float:
        return ranks.sum(float(torch.stack(values).sum()) if values else 0.0)

    return total(losses), total(whole_losses), stats


def step(
    model: Any, optimizer: torch.optim.Optimizer, loss: float, grad_clip: float
) -> tuple[float, bool]:
    """Clip the accumulated gradient and apply it, unless it or the loss is not finite.

    Returns the norm before clipping, and whether the step was skipped.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = float(shard.full(torch.nn.utils.clip_grad_norm_(trained, grad_clip)))
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, skipped


def make_optimizer(
    model: Any, config: OPSDCConfig
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """AdamW over what is trained, and the learning rate of each step, counted from 1.

    The rate is a pure function of the step, so that there is no scheduler to save.
    """
    settings = config.optim
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
    )
    name = settings.schedule
    scheduler = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=config.train.steps,
    )
    factor = scheduler.lr_lambdas[0]
    return optimizer, lambda step: settings.lr * factor(step - 1)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute the forward in `dtype`: trained parameters are float32 and are cast as it goes."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


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
    kept_weight, of_all = select_tokens(*states, token_weight, lengths, config)
    loss, stats = distillation_loss(*states, kept_weight, config, exact_value=exact_value)
    per_token = {name: getattr(of_all, name) for name in _PER_TOKEN}
    return loss, (token_weight * of_all.divergence).sum(), replace(stats, **per_token)


def _per_token(stats: Sequence[DivergenceStats]) -> torch.Tensor:
    """[n, 4] float32: divergence, both entropies, agreement of every token of this rank's."""
    if not stats:
        return torch.empty(0, 4)
    columns = [torch.cat([getattr(s, name) for s in stats]) for name in _PER_TOKEN]
    return torch.stack([column.float() for column in columns], dim=1)


def _extra(
    loss: float,
    whole_loss: float,
    stats: Sequence[DivergenceStats],
    pairs: Sequence[Pair],
    config: LossConfig,
    ranks: Ranks,
) -> dict[str, float]:
    """Measures of settings that leave tokens or columns out; empty where none does."""
    extra = _skipped_columns(stats, ranks) if config.skip_tolerance else {}
    if config.token_share == 1:
        return extra
    counts = [len(p.response_ids) for p in pairs if p.response_ids]
    share = sum(kept_count(n, config.token_share) for n in counts) / sum(counts)
    if extra:
        # Those of the kept tokens, and of the pass that chose them.
        extra["loss_gemm_units"] = 2 + share * extra["loss_gemm_units"]
    kept = {
        "kept_tokens_share": share,
        "kept_loss_share": loss / whole_loss if whole_loss else math.nan,
    }
    return kept | extra


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
    table = ranks.concat(torch.tensor(rows).reshape(-1, 2 + len(names))).double()
    tokens = table[:, 0]
    return {
        "kept_columns_share": float(tokens @ table[:, 1] / tokens.sum()),
        "loss_gemm_units": float(tokens @ table[:, 2] / tokens.sum()),
        "hidden_gradient_bound": float(table[:, 3].max()),
        "weight_gradient_bound": float(table[:, 4].max()),
        "kl_missing": float(table[:, 5].sum() / tokens.sum()),
    }
