"""The measures of one update: what the record says of its loss and its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opsdc.config.settings import LossConfig
from opsdc.method.batch import Layout, Pair
from opsdc.method.selection import kept_count
from opsdc.ranks.talk import Ranks
from opsdc_kernels import DivergenceStats

PER_TOKEN = ("divergence", "student_entropy", "teacher_entropy", "agreement")
"""Statistics of single tokens, as `DivergenceStats` names them, that an update summarises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """Everything that one update measured."""

    loss: float = math.nan
    """The loss in nats per token, normalised as the config says."""
    grad_norm: float = math.nan
    """The norm of the gradient before clipping."""
    skipped: bool = True
    """True where loss or gradient was not finite, or no response had tokens: parameters and
    optimizer are untouched."""
    divergence: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """The divergence [n] float32 in nats of every response token of the step."""
    owner: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Whose token each of `divergence` is: the place [n] of its response among the step's responses
    that have tokens. A response's own tokens stand in their order."""
    student_entropy: float = math.nan
    """The student's entropy in nats, mean over tokens."""
    teacher_entropy: float = math.nan
    """The teacher's entropy in nats, mean over tokens."""
    agreement: float = math.nan
    """The share of tokens at which student and teacher have the same most likely token."""
    extra: dict[str, float] = field(default_factory=dict)
    """Measures of tokens and columns that were left out, see `of_left_out`. The divergence and the
    means above are of all tokens all the same."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase: teacher, student (forward and backward), optimizer."""
    is_empty: bool = False
    """True where no response of the step was to be learned from: nothing is wrong with it."""
    layout: Layout
    """The layout as given, or with the smaller forwards that fitted into memory."""

    @property
    def is_sick(self) -> bool:
        """Return True where loss or gradient was not finite though there was something to learn."""
        return self.skipped and not self.is_empty

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


def of_tokens(stats: Sequence[DivergenceStats], ranks: Ranks) -> dict[str, Any]:
    """Return the divergence [n] float32 of the tokens of all ranks, and the other means over them.

    `stats` holds the statistics of this rank's micro-batches, which may be none. The keys are the
    fields of `UpdateResult`.
    """
    table = torch.empty(0, len(PER_TOKEN))
    if stats:
        columns = [torch.cat([getattr(s, name) for s in stats]) for name in PER_TOKEN]
        table = torch.stack([column.float() for column in columns], dim=1)
    table = ranks.concat(table)
    means = dict(zip(PER_TOKEN, table.double().mean(0).tolist(), strict=True))
    return {**means, "divergence": table[:, 0]}


def of_left_out(
    loss: float,
    whole_loss: float,
    stats: Sequence[DivergenceStats],
    pairs: Sequence[Pair],
    config: LossConfig,
    ranks: Ranks,
    errors: Sequence[float] = (),
) -> dict[str, float]:
    """Measure what settings leave out of the loss; empty where they leave out nothing.

    With a `loss.token_share` below 1: the share of tokens trained on, and of the loss they hold.
    Where columns are left out: columns kept, GEMM units, bounds or estimates of the gradient's
    error, and the nats that the loss lacks or is uncertain by.

    Args:
        loss, whole_loss: Loss of the step's kept tokens and of all its tokens, in nats.
        stats: The statistics of this rank's micro-batches.
        pairs: All of the step.
        errors: Of each micro-batch the measured error of unbiased columns, 0 where none was.
    """
    measures = _of_columns(stats, config, errors, ranks) if config.leaves_columns_out else {}
    if config.token_share == 1:
        return measures
    counts = [len(p.response_ids) for p in pairs if p.response_ids]
    share = sum(kept_count(n, config.token_share) for n in counts) / sum(counts)
    if measures:
        # Two units of the pass that chose the tokens, and those of the kept tokens.
        measures["loss_gemm_units"] = 2 + share * measures["loss_gemm_units"]
    return {
        "kept_tokens_share": share,
        "kept_loss_share": loss / whole_loss if whole_loss else math.nan,
        **measures,
    }


def _of_columns(
    stats: Sequence[DivergenceStats], config: LossConfig, errors: Sequence[float], ranks: Ranks
) -> dict[str, float]:
    """Measure the columns left out: means over tokens, the largest errors over micro-batches.

    The error of the step's gradient is below these, unless the micro-batches' gradients cancel each
    other.
    """
    unbiased = config.columns == "unbiased"
    kind = "error" if unbiased else "bound"
    names = ("kept_share", "gemm_units", f"hidden_gradient_{kind}", f"weight_gradient_{kind}")
    # A row per micro-batch of any rank: its tokens, the four numbers above, its measured error, and
    # the nats that its loss lacks, or their squares where they are standard errors.
    rows = []
    for i, s in enumerate(stats):
        nats = torch.zeros(()) if s.divergence_error is None else s.divergence_error
        numbers = [0.0 if (x := getattr(s, name)) is None else float(x) for name in names]
        total = float(nats.square().sum() if unbiased else nats.sum())
        measured = errors[i] if errors else 0.0
        rows.append([float(s.divergence.numel()), *numbers, measured, total])
    table = ranks.concat(torch.tensor(rows).reshape(-1, 3 + len(names))).double()
    tokens = table[:, 0]
    measures = {
        "kept_columns_share": float(tokens @ table[:, 1] / tokens.sum()),
        "loss_gemm_units": float(tokens @ table[:, 2] / tokens.sum()),
        names[2]: float(table[:, 3].max()),
        names[3]: float(table[:, 4].max()),
    }
    if not unbiased:
        return {**measures, "kl_missing": float(table[:, 6].sum() / tokens.sum())}
    measures["kl_error"] = float(table[:, 6].sum().sqrt() / tokens.sum())
    if (true := float(table[:, 5].max())) > 0:
        measures["hidden_gradient_true_error"] = true
    return measures
