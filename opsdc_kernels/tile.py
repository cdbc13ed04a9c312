"""The gradient tile dZ as the gradient GEMMs take it: in 16 bits on tensor cores, and what that
rounding needs.

dZ is rounded before token weights, normalization and the upstream gradient enter: those are folded
into the fp32 result (dH) and into the hidden states (dW). Rows of fp16 tiles are scaled by powers
of two first, or small gradients would be lost: fp16 ends at 6e-8, and a row of KL 1e-10 lives
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsdc_kernels import gemm

FP16_OPERAND_LIMIT = 2.0**14


@dataclass(frozen=True, slots=True)
class Tile:
    """dZ of a chunk is `values` times `row_scale`."""

    values: Tensor
    """[C, V], fp32 or rounded."""
    row_scale: Tensor | None
    """[C, 1] powers of two, or None for 1."""
    residual: Tensor | None
    """[C, 1]: Σ_v of what rounding added to each row of `values`, or None where not rounded."""


def rounded_tile(dz_CV: Tensor, scratch_CV: Tensor, dtype: torch.dtype) -> Tile:
    """dZ in `dtype`, written over `scratch_CV`; consumes `dz_CV`. In dZ's own dtype: dZ itself."""
    if dtype == dz_CV.dtype:
        return Tile(dz_CV, None, None)
    scale = None
    if dtype == torch.float16:
        exponent = torch.frexp(dz_CV.abs().amax(1, keepdim=True)).exponent.clamp_(-126, 0)
        scale = torch.ldexp(torch.ones_like(dz_CV[:, :1]), exponent)
        dz_CV.div_(scale)
    rounded = scratch_CV.reshape(-1).view(dtype)[: dz_CV.numel()].view_as(dz_CV).copy_(dz_CV)
    return Tile(rounded, scale, dz_CV.neg_().add_(rounded).sum(1, keepdim=True))


def hidden_gradient(
    tile: Tile, weight_VD: Tensor, mean_row_D: Tensor | None, kept_K: Tensor | None = None
) -> Tensor:
    """`tile.values` · W [C, D], corrected for the tile's rounding; `kept_K`: of these rows of W.

    Rounding leaves Σ_v (round(dZ) − dZ) ≠ 0, which multiplies whatever all rows of W have in
    common; taking off that sum times the mean row of W removes the error. Sum and mean run over
    the same columns, so it holds under a soft-cap and on a shard of the vocabulary too, where Σ_v
    dZ itself is not 0.
    """
    dtype = tile.values.dtype if tile.residual is None else tile.residual.dtype
    out_CD = torch.empty(
        tile.values.shape[0], weight_VD.shape[1], dtype=dtype, device=weight_VD.device
    )
    gemm.hidden_gradient_into(out_CD, tile.values, weight_VD, kept_K)
    if tile.residual is not None:
        assert mean_row_D is not None
        out_CD.addmm_(tile.residual, mean_row_D[None, :], alpha=-1)
    return out_CD


def operand_scale(hidden_KD: Tensor, row_weight_K: Tensor | None, factor: float) -> Tensor:
    """A power of two (0-dim, on the device) that brings weighted hidden states just below
    `FP16_OPERAND_LIMIT`: the other factor of dW, whose smallest rows then stay normal in fp16."""
    largest = hidden_KD.abs().amax().float() * abs(factor)
    if row_weight_K is not None:
        largest = largest * row_weight_K.abs().amax()
    exponent = torch.frexp(FP16_OPERAND_LIMIT / largest).exponent - 1
    return torch.ldexp(torch.ones_like(largest), exponent.clamp_(-100, 100))
