"""Inputs of the benchmarks: realistic rows at any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsdc_kernels.testing import Case, make_case

DRAWN_ROWS = 32
"""Rows drawn to entropy and KL; further ones stand out by other tokens and are about as peaked."""


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
    drawn_on: torch.device | str = "cpu",
) -> Case:
    """Student and teacher with a head each; entropy and KL in nats per token. Drawn on a CPU the
    inputs are the same for every device; a large head is drawn on a GPU in a fraction of the time.
    """
    drawn = make_case(
        tokens=min(DRAWN_ROWS, shape.tokens),
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        entropy=entropy,
        kl=kl,
        shared_head=False,
        device=drawn_on,
    ).to(dtype)
    assert drawn.teacher_weight is not None
    hidden = _more_rows(drawn.student_hidden, drawn.student_weight, shape.tokens)
    weights = drawn.student_weight.to(device), drawn.teacher_weight.to(device)
    return Case(hidden.to(device), weights[0], hidden.to(device, copy=True), weights[1])


def _more_rows(drawn: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """`make_case`'s recipe without its search for a scale: each takes that of a drawn row. Rows
    that repeat would share their likely tokens, a gift to whoever leaves unlikely columns out."""
    device = weight.device
    generator = torch.Generator(device).manual_seed(0)
    size, dim = weight.shape
    count = tokens - len(drawn)
    favourites = torch.randint(size, (count, 3), generator=generator, device=device)
    shares = torch.tensor([1.0, 0.8, 0.6], device=device)
    more = (weight[favourites].float() * shares[:, None]).sum(1)
    more += 0.5 * torch.randn(count, dim, generator=generator, device=device) / dim**0.5
    norms = drawn.float().norm(dim=1)[torch.arange(count, device=device) % len(drawn)]
    more *= (norms / more.norm(dim=1))[:, None]
    return torch.cat([drawn, more.to(drawn.dtype)])
