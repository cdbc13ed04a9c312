"""Token chunks with full vocabulary rows resident, and the gradient computed in the forward pass.

Per chunk of C tokens: the student's and the teacher's logits (2 GEMMs; one of twice the height
where the head is shared), row passes that turn the student's logits into their own gradient in
place, then dH and dW from that tile (1 GEMM each). Nothing is recomputed: 4 units of 2·N·V·D flop
with a trainable head, 3 with a frozen one, 2 without gradients, and 8 bytes of scratch per logit
of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsdc_kernels import gemm, plan
from opsdc_kernels.problem import Problem
from opsdc_kernels.rows import Rows, divergence_rows_


@dataclass(frozen=True, slots=True)
class Needs:
    """The gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(slots=True)
class Result:
    """Per-token values, zero at dropped rows, and gradients of Σ row_weight·divergence."""

    per_token: Tensor
    """[N]"""
    statistics: tuple[Tensor, ...]
    """[N] each; empty unless asked for."""
    hidden_gradient: Tensor | None
    """[N, D] in the statistics' dtype."""
    weight_gradient: Tensor | None
    """[V, D] in the statistics' dtype."""
    bias_gradient: Tensor | None
    """[V] in the statistics' dtype."""


def run_chunks(
    problem: Problem,
    needs: Needs,
    row_weight_N: Tensor | None,
    kept_K: Tensor | None,
    tile_dtype: torch.dtype | None = None,
) -> Result:
    """One pass over the tokens `kept_K` (None: all).

    `row_weight_N` scales each token's gradient, not its value (None: 1). `tile_dtype` is the
    dtype of the gradient tile that enters the GEMMs; None: the operands' own.
    """
    student, size, dtype = problem.student_hidden, problem.vocab_size, problem.dtype
    weight = problem.student_weight.detach()[:size]
    n_tokens, dim = student.shape
    full_size = problem.student_weight.shape[0]
    result = Result(
        per_token=student.new_zeros(n_tokens, dtype=dtype),
        statistics=_empty_statistics(problem),
        hidden_gradient=student.new_zeros(n_tokens, dim, dtype=dtype) if needs.hidden else None,
        weight_gradient=student.new_zeros(full_size, dim, dtype=dtype) if needs.weight else None,
        bias_gradient=student.new_zeros(full_size, dtype=dtype) if needs.bias else None,
    )
    kept = n_tokens if kept_K is None else kept_K.shape[0]
    if kept == 0:
        return result
    operand = gemm.operand_dtype(weight, dtype)
    tile_dtype = tile_dtype or operand
    mean_row = weight.mean(0, dtype=dtype) if tile_dtype != dtype and needs.hidden else None
    dims = (dim, problem.teacher_hidden.shape[1])
    height = plan.chunk_rows(
        kept, size, dims, student.dtype, student.device, problem.workspace_bytes
    )
    buffer = student.new_empty(2 * height, size, dtype=dtype)

    for start in range(0, kept, height):
        stop = min(start + height, kept)
        tokens = slice(start, stop) if kept_K is None else kept_K[start:stop]
        s_CV, other_CV = buffer[: stop - start], buffer[stop - start : 2 * (stop - start)]
        _logits_into(buffer[: 2 * (stop - start)], problem, weight, tokens, operand)
        factor_C = _row_passes(problem, s_CV, other_CV, tokens, bool(needs), result)
        if not needs:
            continue
        scale_C1 = factor_C[:, None]
        if row_weight_N is not None:
            scale_C1 = scale_C1 * row_weight_N[tokens, None]
        if result.bias_gradient is not None:
            result.bias_gradient[:size].addmv_(s_CV.T, scale_C1.squeeze(1))
        hidden_CD = student[tokens].to(dtype) * scale_C1 if needs.weight else None
        tile_CV, residual_C1 = _rounded(s_CV, other_CV, tile_dtype)
        if result.hidden_gradient is not None:
            gradient = hidden_gradient(tile_CV, residual_C1, weight, mean_row, dtype)
            result.hidden_gradient[tokens] = gradient.mul_(scale_C1)
        if result.weight_gradient is not None:
            assert hidden_CD is not None
            gemm.add_weight_gradient(
                result.weight_gradient[:size], tile_CV, hidden_CD.to(tile_dtype)
            )
    return result


def hidden_gradient(
    tile_CV: Tensor,
    residual_C1: Tensor | None,
    weight_VD: Tensor,
    mean_row_D: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dH [C, D] of a gradient tile, corrected for the tile's rounding.

    Rounding leaves Σ_v (round(dZ) − dZ) ≠ 0, which multiplies whatever all rows of W have in
    common; removing that sum times the mean row of W removes the error. The sum and the mean run
    over the same columns, so it holds under a soft-cap and on a shard of the vocabulary too,
    where Σ_v dZ itself is not 0.
    """
    out_CD = tile_CV.new_empty(tile_CV.shape[0], weight_VD.shape[1], dtype=dtype)
    gemm.hidden_gradient_into(out_CD, tile_CV, weight_VD)
    if residual_C1 is not None:
        assert mean_row_D is not None
        out_CD.addmm_(residual_C1, mean_row_D[None, :], alpha=-1)
    return out_CD


def _rounded(
    dz_CV: Tensor, scratch_CV: Tensor, tile_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The tile as the GEMMs take it, and Σ_v (round(dZ) − dZ) [C, 1] where it was rounded."""
    if tile_dtype == dz_CV.dtype:
        return dz_CV, None
    flat = scratch_CV.view(-1).view(tile_dtype)[: dz_CV.numel()]
    tile = flat.view_as(dz_CV).copy_(dz_CV)
    return tile, dz_CV.neg_().add_(tile).sum(1, keepdim=True)


def _logits_into(
    out_2CV: Tensor,
    problem: Problem,
    weight: Tensor,
    tokens: slice | Tensor,
    operand: torch.dtype,
) -> None:
    """Rows [:C] get the student's raw logits, rows [C:] the teacher's or the difference's."""
    student = problem.student_hidden.detach()[tokens]
    teacher = problem.teacher_hidden[tokens]
    if problem.shared_logits:
        # The difference is taken in fp32. A 16-bit operand (GPU) rounds it once; neighbouring
        # 16-bit hidden states mostly have exact differences.
        delta = teacher.to(problem.dtype) - student.to(problem.dtype)
        both = torch.cat([student.to(operand), delta.to(operand)])
        gemm.logits_into(out_2CV, both, weight)
        return
    height = student.shape[0]
    gemm.logits_into(out_2CV[:height], student.to(operand), weight)
    if problem.teacher_weight is not None:
        weight = problem.teacher_weight[: problem.vocab_size]
    gemm.logits_into(out_2CV[height:], teacher.to(operand), weight)


def _row_passes(
    problem: Problem,
    s_CV: Tensor,
    other_CV: Tensor,
    tokens: slice | Tensor,
    gradient: bool,
    result: Result,
) -> Tensor:
    """Fills in the values of these tokens; leaves dZ, up to the factor [C], in s_CV."""
    step = plan.block_rows(s_CV.shape[1], s_CV.device)
    targets = None if problem.target_ids is None else problem.target_ids[tokens]
    blocks: list[Rows] = []
    for start in range(0, s_CV.shape[0], step):
        block = slice(start, start + step)
        blocks.append(
            divergence_rows_(
                s_CV[block],
                other_CV[block],
                problem,
                gradient=gradient,
                target_ids_B=None if targets is None else targets[block],
            )
        )
    result.per_token[tokens] = torch.cat([rows.divergence for rows in blocks])
    for i, statistic in enumerate(result.statistics):
        statistic[tokens] = torch.cat([rows.statistics[i] for rows in blocks if rows.statistics])
    return torch.cat([rows.factor for rows in blocks])


def _empty_statistics(problem: Problem) -> tuple[Tensor, ...]:
    count = 0 if not problem.return_stats else 5 if problem.target_ids is None else 7
    n_tokens = problem.student_hidden.shape[0]
    zeros = problem.student_hidden.new_zeros(count, n_tokens, dtype=problem.dtype)
    return tuple(zeros)
