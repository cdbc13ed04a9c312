"""The divergence from hidden states: the one place where the trainer calls the kernels' loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

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
    seed: int = 0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, DivergenceStats]:
    """Compute Σ_t w_t · D(student_t, teacher_t) over the full vocabulary, at temperature 1.

    Args:
        student_hidden: [n, D], with gradient.
        student_head: The model's head as it is now.
        teacher_hidden: [n, D], without gradient, of the student's dtype.
        teacher_head: The teacher's head; the same tensors where the head is not trained.
        token_weight: [n] float32 as of `StepPlan.token_weights`, or None with reduction "none".
        config: Divergence, backend, scratch budget and columns. Where columns are left out the
            loss is a lower bound or an estimate unless `exact_value`; with reduction "none" none
            is.
        reduction: "sum" in training; "none" returns one value per token.
        target_ids: [n] int64, adds the sampled tokens' log-probabilities to the statistics.
        exact_value: Take loss and statistics from all columns.
        seed: Of the draw of unbiased columns.
        vocab_size: Take only the first so many rows of both heads; the rest is padding.

    Returns:
        The loss in nats, a scalar or [n], and statistics per token without gradient.
    """
    left_out = config.leaves_columns_out and reduction != "none"
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
        columns=config.columns if left_out else None,
        skip_tolerance=config.skip_tolerance if left_out else None,
        seed=seed,
        exact_value=exact_value and left_out,
        vocab_size=vocab_size,
    )


def draw_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Return the seed of one draw of unbiased columns: no two calls of a run draw alike."""
    text = f"{seed} {step} {rank} {micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def drawn_error(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    token_weight: torch.Tensor,
    config: LossConfig,
    *,
    seed: int,
    vocab_size: int | None = None,
) -> float:
    """Measure the relative error of dH that leaving columns out makes here, against all columns.

    Costs a loss with a frozen head, twice. The arguments are those of `distillation_loss`.
    """
    rows = student_hidden.detach().requires_grad_()
    frozen = replace(student_head, weight=student_head.weight.detach())
    exact = replace(config, columns="exact", skip_tolerance=None)
    gradients = []
    for each in (config, exact):
        with torch.enable_grad():
            loss, _ = distillation_loss(
                rows, frozen, teacher_hidden, teacher_head, token_weight, each, seed=seed,
                vocab_size=vocab_size,
            )  # fmt: skip
            gradients.append(torch.autograd.grad(loss, rows)[0].float())
    size = gradients[1].norm()
    return float((gradients[0] - gradients[1]).norm() / size) if size else 0.0


@torch.no_grad()
def select_tokens(
    student_hidden: torch.Tensor,
    student_head: Head,
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    token_weight: torch.Tensor,
    lengths: Sequence[int],
    config: LossConfig,
    *,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, DivergenceStats]:
    """Zero the weights of the tokens that `config.token_share` leaves out.

    Costs two head GEMMs. `lengths` holds the number of response tokens of each sequence, Σ = n;
    the other arguments are those of `distillation_loss`.

    Returns:
        The weights [n], and the statistics of all tokens.
    """
    _, stats = distillation_loss(
        student_hidden, student_head, teacher_hidden, teacher_head, None, config,
        reduction="none", vocab_size=vocab_size,
    )  # fmt: skip
    by_entropy = config.token_criterion == "entropy"
    value = stats.student_entropy if by_entropy else stats.divergence
    return token_weight * kept_tokens(value, lengths, config.token_share), stats
