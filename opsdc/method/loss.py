"""From hidden states to the divergence: the one place where the trainer calls `opsdc_kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opsdc.config.settings import LossConfig
from opsdc.method.selection import kept_tokens
from opsdc.models.head import Head
from opsdc_kernels import DivergenceStats, linear_divergence


def distillation_loss(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    token_weight: torch.Tensor | None,
    config: LossConfig,
    *,
    reduction: str = "sum",
    target_ids: torch.Tensor | None = None,
    exact_value: bool = False,
) -> tuple[torch.Tensor, DivergenceStats]:
    """Σ_t w_t · D(student_t, teacher_t) over the full vocabulary, at temperature 1.

    Args:
        student_hidden: [n, D], with gradient.
        student_head: the model's head as it is now.
        teacher_hidden: [n, D], no gradient.
        teacher_head: the teacher's; the same tensors where the head is not trained.
        token_weight: [n] from `batch.token_weights`, or None with reduction "none".
        config: divergence, backend, scratch budget and tolerance. With a `skip_tolerance` the loss
            is a lower bound unless `exact_value`; reduction "none" ignores it.
        reduction: "sum" in training; "none" gives [n].
        exact_value: loss and statistics from all columns.
        target_ids: [n], adds the sampled tokens' log-probabilities to the statistics.

    Returns: the loss in nats, and per-token statistics without gradient.
    """
    tolerance = config.skip_tolerance if reduction != "none" else None
    return linear_divergence(
        student_hidden,
        student_head.weight,
        teacher_hidden,
        teacher_head.weight,
        divergence=config.divergence,
        beta=config.beta,
        token_weight=token_weight,
        reduction=reduction,
        student_bias=student_head.bias,
        teacher_bias=teacher_head.bias,
        logit_scale=(student_head.logit_scale, teacher_head.logit_scale),
        logit_softcap=(student_head.logit_softcap, teacher_head.logit_softcap),
        target_ids=target_ids,
        return_stats=True,
        backend=config.backend,
        workspace_bytes=config.workspace_bytes,
        skip_tolerance=tolerance,
        exact_value=exact_value and tolerance is not None,
    )


@torch.no_grad()
def select_tokens(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    token_weight: torch.Tensor,
    lengths: Sequence[int],
    config: LossConfig,
) -> tuple[torch.Tensor, DivergenceStats]:
    """The weights that `config.token_share` leaves, [n] with 0 at the others; statistics of all.

    Costs two head GEMMs. `lengths`: response tokens of each sequence, Σ = n; the rest as in
    `distillation_loss`.
    """
    _, every = distillation_loss(
        student_hidden, student_head, teacher_hidden, teacher_head, None, config, reduction="none"
    )
    by_entropy = config.token_criterion == "entropy"
    value = every.student_entropy if by_entropy else every.divergence
    return token_weight * kept_tokens(value, lengths, config.token_share), every
