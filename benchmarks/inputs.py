"""Inputs of the benchmarks: realistic rows at any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opsdc_kernels.testing import Case, make_case

DISTINCT_ROWS = 32
"""Rows drawn to entropy and KL; larger cases repeat them, which changes no time and no memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of one call."""

    tokens: int
    dim: int
    vocab_size: int

    def __str__(self) -> str:
        return f"N {self.tokens}, D {self.dim}, V {self.vocab_size}"

    @property
    def unit_flop(self) -> int:
        """One head GEMM."""
        return 2 * self.tokens * self.dim * self.vocab_size


def inputs(
    shape: Shape,
    *,
    entropy: float = 0.5,
    kl: float = 1e-2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """Student and teacher with a head each; entropy and KL in nats per token."""
    drawn = make_case(
        tokens=min(DISTINCT_ROWS, shape.tokens),
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        entropy=entropy,
        kl=kl,
        shared_head=False,
    ).to(dtype)
    rows = torch.arange(shape.tokens) % DISTINCT_ROWS
    assert drawn.teacher_weight is not None
    return Case(
        drawn.student_hidden[rows].to(device),
        drawn.student_weight.to(device),
        drawn.teacher_hidden[rows].to(device),
        drawn.teacher_weight.to(device),
    )
