"""One optimizer step from one set of rollouts: teacher pass, student pass, loss, step.

The teacher scores the whole step first, once per rollout and without gradient. It leaves one hidden
state per response token, which the student's micro-batches then use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import get_scheduler

from opsdc.config.settings import LossConfig, OPSDCConfig
from opsdc.method.batch import Layout, Pair, StepPlan, plan_step
from opsdc.method.loss import distillation_loss, draw_seed, drawn_error, select_tokens
from opsdc.method.measures import PER_TOKEN, UpdateResult, of_left_out, of_tokens
from opsdc.method.mixture import START, blend, widened
from opsdc.method.out_of_memory import fit_into_memory
from opsdc.method.teacher import Teacher
from opsdc.models.head import Head, TokenBatch, evaluating, hidden_states, read_head
from opsdc.ranks import shard
from opsdc.ranks.talk import ALONE, Ranks, is_out_of_memory
from opsdc_kernels import DivergenceStats


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
    number: int = 0,
) -> UpdateResult:
    """Take one optimizer step on the responses of a step, unless its gradient is not finite.

    Args:
        pairs: All of the step, the same on every rank; each rank takes its share of them.
        layout: Packing, token budget and dtype of the forwards.
        sampled_finite: False makes the loss NaN, for responses sampled from NaN logits.
        on_tokens: Called after each micro-batch with the number of its response tokens.
        exact_value: Where columns are left out of the loss, take it and statistics from all.
        number: The step's: the draw of unbiased columns follows from it.

    Raises:
        TrainingError: One sequence alone does not fit into memory.
        OutOfMemoryError: One of several ranks ran out of memory; no parameter has changed.
    """
    seconds = dict.fromkeys(("teacher", "student", "optimizer"), 0.0)
    if not any(p.response_ids for p in pairs):
        return UpdateResult(seconds=seconds, layout=layout, is_empty=not pairs)

    def accumulate(layout: Layout) -> tuple[Any, ...]:
        began = time.perf_counter()
        normalization = config.loss.normalization
        plan = plan_step(
            pairs, layout, normalization=normalization, contexts=teacher.contexts,
            rank=ranks.rank, ranks=ranks.size,
        )  # fmt: skip
        teacher_hidden = teacher_pass(model, teacher, plan, ranks=ranks)
        scored = time.perf_counter()
        losses_and_stats = student_pass(
            model, teacher, plan, teacher_hidden, config,
            ranks=ranks, on_tokens=on_tokens, exact_value=exact_value, number=number,
        )  # fmt: skip
        seconds["teacher"], seconds["student"] = scored - began, time.perf_counter() - scored
        return *losses_and_stats, plan.owners()

    done, layout = fit_into_memory(accumulate, layout, pairs, model, ranks)
    loss, whole_loss, stats, errors, owner = done
    if not sampled_finite:
        loss = math.nan
    began = time.perf_counter()
    grad_norm, skipped = step(model, optimizer, loss, config.optim.grad_clip)
    seconds["optimizer"] = time.perf_counter() - began
    return UpdateResult(
        loss=loss,
        grad_norm=grad_norm,
        skipped=skipped,
        **of_tokens(stats, ranks),
        owner=ranks.concat(owner),
        extra=of_left_out(loss, whole_loss, stats, pairs, config.loss, ranks, errors),
        seconds=seconds,
        layout=layout,
    )


def teacher_pass(
    model: Any, teacher: Teacher, plan: StepPlan, *, ranks: Ranks = ALONE
) -> dict[int, torch.Tensor]:
    """Score this rank's responses as the teacher: hidden states of each pair, by index.

    They are [n_i, D], mixed from the contexts that the plan names; [n_i, 2·D] for a wide head.
    """
    device, module = read_head(model).weight.device, teacher.module
    hidden: dict[int, dict[str, torch.Tensor]] = {}
    for context, groups in plan.teacher_groups.items():
        weights = teacher.start_weights() if context == START else teacher.weights()
        with weights, evaluating(module), torch.no_grad(), autocast(device, plan.layout.dtype):
            for group in groups:
                ranks.check_stop()
                batch = teacher.known(plan.teacher_batch(context, group, device))
                rows = shard.as_forward(module, hidden_states, module, batch)
                # A clone, so that one pair's rows do not keep the whole forward's alive.
                for i, part in zip(group, rows.split(list(batch.lengths)), strict=False):
                    hidden.setdefault(i, {})[context] = part.clone()
    return {i: blend(h, plan.mixes[i], wide=teacher.is_wide) for i, h in hidden.items()}


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
    number: int = 0,
) -> tuple[float, float, list[DivergenceStats], list[float]]:
    """Accumulate the gradient of the step: student forward, loss and backward, group by group.

    Returns the loss of the whole step in nats, the loss over all its tokens (the same unless
    `loss.token_share` leaves some out), and of each of this rank's micro-batches the statistics and
    the measured error of unbiased columns (with an exact value, else 0).
    The gradients are the sums over all ranks. Arguments and errors are those of `update`;
    `teacher_hidden` is what `teacher_pass` returned.
    """
    head = read_head(model)
    device = head.weight.device
    their_head = teacher_head(teacher, head, plan.layout.dtype)
    dim = (their_head or head).weight.shape[1]
    sharded = shard.is_sharded(model)
    losses: list[torch.Tensor] = []
    whole_losses: list[torch.Tensor] = []
    stats: list[DivergenceStats] = []
    errors: list[float] = []
    for done, group in enumerate(plan.student_groups, 1):
        ranks.check_stop()

        # The group's tokens, their weights and the teacher's hidden states, [n, ...] each.
        batch = plan.student_batch(group, device)
        token_weight = plan.token_weights(group, device)
        teacher_rows = [teacher_hidden[i] for i in group] or [torch.zeros(1, dim, device=device)]

        # Backbone, head and loss in one forward.
        last = done == len(plan.student_groups)
        shard.reduce_next(model, last or config.distributed.reduce_every_micro_batch)
        with autocast(device, plan.layout.dtype):
            forward = shard.as_forward(
                model, _student_losses, model, their_head, batch, torch.cat(teacher_rows),
                token_weight, config.loss, exact_value,
                draw_seed(config.seed, number, ranks.rank, done), teacher.vocab_size,
            )  # fmt: skip
        if sharded:
            # In the backward the others would wait for a rank whose loss found no memory.
            ranks.check_stop(out_of_memory=forward is None)
        assert forward is not None
        loss, whole_loss, statistics, error = forward

        loss.backward()
        # A dummy row of an empty group has weight 0, and no place in the statistics.
        if group:
            losses.append(loss.detach())
            whole_losses.append(whole_loss)
            stats.append(statistics)
            errors.append(error)
            on_tokens(sum(batch.lengths))
    if ranks.size > 1:
        # The last chance to say that the last backward did not fit.
        ranks.check_stop()
    shard.sum_gradients(model, ranks)
    return _total(losses, ranks), _total(whole_losses, ranks), stats, errors


def step(
    model: Any, optimizer: torch.optim.Optimizer, loss: float, grad_clip: float
) -> tuple[float, bool]:
    """Clip the accumulated gradient and apply it, unless it or the loss is not finite.

    Returns the norm before clipping, and True where the step was skipped.
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
    """Build AdamW over the trained parameters, and the learning rate of each step, from step 1.

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


def teacher_head(teacher: Teacher, student_head: Head, dtype: torch.dtype) -> Head | None:
    """Return the teacher's head, whole on every rank; None where it is the student's own.

    A wide teacher's is twice as wide, for the states of `mixture.blend`.
    """
    head = teacher.head()
    if teacher.is_wide:
        start = shard.full_head(teacher.start_head(), dtype)
        return widened(shard.full_head(head, dtype), start, teacher.anchor)
    return None if head.weight is student_head.weight else shard.full_head(head, dtype)


def _student_losses(
    model: Any,
    teacher_head: Head | None,
    batch: TokenBatch,
    teacher_rows: torch.Tensor,
    token_weight: torch.Tensor,
    config: LossConfig,
    exact_value: bool,
    seed: int,
    vocab_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, DivergenceStats, float] | None:
    """Run the student on one micro-batch and compute its losses, within `shard.as_forward`.

    Returns the loss to differentiate, the loss over all tokens, statistics of all tokens, and the
    relative error of dH where an exact value asks for it, else 0; None where a sharded model's
    loss found no memory, which all ranks must learn before the backward.
    """
    # Within the forward the student's head is whole, however the model lies over the ranks.
    student_rows, student_head = hidden_states(model, batch), read_head(model)
    states = (
        student_rows,
        student_head,
        teacher_rows.to(student_rows.dtype),
        student_head if teacher_head is None else teacher_head,
    )
    try:
        kept_weight, all_stats = token_weight, None
        if config.token_share < 1:
            kept_weight, all_stats = select_tokens(
                *states, token_weight, batch.lengths, config, vocab_size=vocab_size
            )
        loss, stats = distillation_loss(
            *states, kept_weight, config, exact_value=exact_value, seed=seed, vocab_size=vocab_size
        )
        error = 0.0
        if exact_value and config.columns == "unbiased":
            error = drawn_error(*states, kept_weight, config, seed=seed, vocab_size=vocab_size)
        if all_stats is None:
            return loss, loss.detach(), stats, error
        # That loss dropped the rows of the other tokens: the selection has their statistics.
        per_token = {name: getattr(all_stats, name) for name in PER_TOKEN}
        return loss, (token_weight * all_stats.divergence).sum(), replace(stats, **per_token), error
    except (RuntimeError, MemoryError) as error:
        if shard.is_sharded(model) and is_out_of_memory(error):
            return None
        raise


def _total(losses: Sequence[torch.Tensor], ranks: Ranks) -> float:
    """Add up the losses of the micro-batches of all ranks."""
    return ranks.sum(float(torch.stack(list(losses)).sum()) if losses else 0.0)
