"""One validated call, as every backend receives it.

Letters, fixed here for the whole package: ``q`` is the student's distribution and ``s`` its logits,
``p`` the teacher's and ``t`` its logits. ``N`` tokens, ``V`` vocabulary, ``D`` student and ``E``
teacher hidden size, ``K`` kept tokens (weight above 0), ``C`` rows of a chunk, ``B`` rows of a
block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Validated tensors and options; (student, teacher) pairs are resolved, tokens flattened."""

    student_hidden: Tensor
    """[N, D]; gradient."""
    student_weight: Tensor
    """[V, D]; gradient unless frozen."""
    teacher_hidden: Tensor
    """[N, E]; no gradient."""
    teacher_weight: Tensor | None
    """[V', E], or None where the student's head is the teacher's too."""
    student_bias: Tensor | None
    """[V]; gradient if it asks for one."""
    teacher_bias: Tensor | None
    """[V'], or None where it is the student's or absent, see `shared_logits`."""
    token_weight: Tensor | None
    """[N], fp32 or float64, >= 0."""
    target_ids: Tensor | None
    """[N] int64."""
    divergence: str
    beta: float
    temperature: float
    logit_scale: tuple[float, float]
    logit_softcap: tuple[float | None, float | None]
    own_teacher_bias: bool
    """A shared head whose teacher has a bias of its own (possibly none) is not one function."""
    vocab_size: int
    """Columns scored: the first `vocab_size` rows of both weights. With a `process_group` those of
    all shards together, and 0 for all of them."""
    reduction: str
    return_stats: bool
    workspace_bytes: int | None
    process_group: str | None = None
    """Name of the group over whose ranks the vocabulary is sharded."""
    skip_tolerance: float | None = None
    """Accepted relative error of the gradients, or None for all columns."""
    exact_value: bool = False
    """With a `skip_tolerance`: divergence and statistics from all columns all the same."""

    @property
    def shared_logits(self) -> bool:
        """Both models map hidden states to logits by one function.

        Then t − s comes from a GEMM of the difference of hidden states, and its rounding error
        shrinks with the difference instead of with the logits.
        """
        return (
            self.teacher_weight is None
            and not self.own_teacher_bias
            and self.logit_scale[0] == self.logit_scale[1]
            and self.logit_softcap[0] == self.logit_softcap[1]
        )

    @property
    def logit_factor(self) -> float:
        """dz/dx of eq. (1) in `reference` but for the soft-cap, x = h·Wᵀ + b of the student."""
        return self.logit_scale[0] / self.temperature

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, statistics and loss: fp32, or float64 for float64 inputs."""
        return statistics_dtype(self.student_hidden.dtype)

    def kept_rows(self) -> Tensor | None:
        """Indices [K] of the tokens with weight, or None for all. With weights this synchronizes
        with the device, once; the checks of values stay there.

        Raises:
            ValueError: a weight is negative or not finite, or a kept target is outside the scored
                vocabulary. (On a GPU: a device-side assertion.)
        """
        kept = None
        if self.token_weight is not None:
            weight = self.token_weight
            _check_values(
                ((weight >= 0) & (weight < torch.inf)).all(),
                "token_weight must be finite and >= 0; mask tokens with 0",
            )
            kept = torch.nonzero(weight).squeeze(1)
        if self.target_ids is not None:
            ids = self.target_ids if kept is None else self.target_ids[kept]
            _check_values(
                ((ids >= 0) & (ids < self.vocab_size)).all(),
                f"target_ids must lie in [0, {self.vocab_size}) for every token with weight; give "
                "tokens to ignore the token_weight 0",
            )
        return kept


def _check_values(condition: Tensor, message: str) -> None:
    if condition.device.type == "cpu":
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce_tokens(per_token_N: Tensor, token_weight_N: Tensor | None, reduction: str) -> Tensor:
    """Σ w·d / Σ w for ``mean``, Σ w·d for ``sum``, d itself for ``none``; 0 for an empty sum."""
    if reduction == "none":
        return per_token_N
    if token_weight_N is None:
        total = per_token_N.sum()
        return total / max(per_token_N.shape[0], 1) if reduction == "mean" else total
    total = (per_token_N * token_weight_N).sum()
    return total * mean_factor(token_weight_N) if reduction == "mean" else total


def mean_factor(token_weight_N: Tensor) -> Tensor:
    """1 / Σ w as a 0-dim tensor on the device, 0 where Σ w = 0."""
    total = token_weight_N.sum()
    return torch.where(total > 0, total.reciprocal(), torch.zeros_like(total))
