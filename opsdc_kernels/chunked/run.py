"""Token chunks with full vocabulary rows resident, and the gradient computed in the forward pass.

Per chunk of C tokens: the student's and the teacher's logits (2 GEMMs; one of twice the height
where the head is shared and rows lie one after the other), row passes that turn the student's
logits into their own gradient in place, then dH and dW from that tile (1 GEMM each). Nothing is
recomputed: 4 units of 2·N·V·D flop with a trainable head, 3 with a frozen one, 2 without gradients,
and 8 bytes of scratch per logit of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opsdc_kernels import gemm, plan
from opsdc_kernels.layout import empty_logits
from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass import eager as rows
from opsdc_kernels.row_pass.eager import Rows
from opsdc_kernels.tile import Tile, hidden_gradient, operand_scale, rounded_tile

if TYPE_CHECKING:
    from opsdc_kernels.vocab_parallel import Shard


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
    shard: Shard | None = None,
    onto: Result | None = None,
) -> Result:
    """One pass over the tokens `kept_K` (None: all), over the columns of `shard` (None: all).

    `row_weight_N` scales each token's gradient, not its value (None: 1). `tile_dtype` is the
    dtype of the gradient tile that enters the GEMMs; None: the operands' own. `onto`: what other
    tokens gave, to add to.
    """
    if shard is not None:
        problem = shard.localize(problem)
    student, size, dtype = problem.student_hidden, problem.vocab_size, problem.dtype
    weight = problem.student_weight.detach()[:size]
    n_tokens, dim = student.shape
    result = empty_result(problem, needs) if onto is None else onto
    kept = n_tokens if kept_K is None else kept_K.shape[0]
    if result.weight_gradient is not None and onto is None:
        result.weight_gradient[size if kept else 0 :].zero_()  # the first chunk writes the rest
    if kept == 0:
        return result
    operand = gemm.operand_dtype(weight, dtype)
    tile_dtype = tile_dtype or operand
    rounds = tile_dtype != dtype
    mean_row = gemm.mean_row(weight, dtype) if rounds and needs.hidden else None
    lift = lift_of(problem, needs, row_weight_N, kept_K, tile_dtype)
    if onto is not None and lift is not None and result.weight_gradient is not None:
        result.weight_gradient.mul_(lift)
    if shard is None:
        height = plan.chunk_rows(
            kept,
            size,
            (dim, problem.teacher_hidden.shape[1]),
            student.dtype,
            student.device,
            problem.workspace_bytes,
        )
    else:
        height = plan.equal_rows(kept, shard.chunk_rows)
    buffers = empty_logits(student, 2, height, size, dtype, in_torch=shard is not None)

    for start in range(0, kept, height):
        stop = min(start + height, kept)
        tokens = slice(start, stop) if kept_K is None else kept_K[start:stop]
        s_CV, other_CV = both_2CV = buffers[:, : stop - start]
        _logits_into(both_2CV, problem, weight, tokens, operand)
        scale_C1 = row_passes(problem, s_CV, other_CV, tokens, bool(needs), result, shard)
        if not needs or size == 0:
            continue
        if row_weight_N is not None:
            scale_C1 = scale_C1 * row_weight_N[tokens, None]
        if result.bias_gradient is not None:
            result.bias_gradient[:size].addmv_(s_CV.T, scale_C1.squeeze(1))
        if result.hidden_gradient is None and result.weight_gradient is None:
            continue
        out_VD = None if result.weight_gradient is None else result.weight_gradient[:size]
        gradient_CD = multiply_back(
            rounded_tile(s_CV, other_CV, tile_dtype),
            scale_C1,
            student[tokens],
            weight,
            mean_row=mean_row,
            hidden=result.hidden_gradient is not None,
            out_VD=out_VD,
            lift=lift,
            first=start == 0 and onto is None,
        )
        if gradient_CD is not None and result.hidden_gradient is not None:
            result.hidden_gradient[tokens] = gradient_CD
    if lift is not None and result.weight_gradient is not None:
        result.weight_gradient.div_(lift)
    if shard is not None and result.hidden_gradient is not None:
        shard.add_up_(result.hidden_gradient)
    return result


def empty_result(problem: Problem, needs: Needs) -> Result:
    """All zero but dW, which is not initialized."""
    student, dtype = problem.student_hidden, problem.dtype
    (n_tokens, dim), full_size = student.shape, problem.student_weight.shape[0]
    return Result(
        per_token=student.new_zeros(n_tokens, dtype=dtype),
        statistics=_empty_statistics(problem),
        hidden_gradient=student.new_zeros(n_tokens, dim, dtype=dtype) if needs.hidden else None,
        weight_gradient=student.new_empty(full_size, dim, dtype=dtype) if needs.weight else None,
        bias_gradient=student.new_zeros(full_size, dtype=dtype) if needs.bias else None,
    )


def lift_of(
    problem: Problem,
    needs: Needs,
    row_weight_N: Tensor | None,
    kept_K: Tensor | None,
    tile_dtype: torch.dtype,
) -> Tensor | None:
    """The factor that dW is accumulated with where its operands are fp16."""
    if tile_dtype != torch.float16 or not needs.weight:
        return None
    every = slice(None) if kept_K is None else kept_K
    weights = None if row_weight_N is None else row_weight_N[every]
    return operand_scale(problem.student_hidden[every], weights, problem.logit_factor)


def multiply_back(
    tile: Tile,
    scale_C1: Tensor,
    hidden_CD: Tensor,
    weight_VD: Tensor,
    *,
    mean_row: Tensor | None,
    hidden: bool,
    out_VD: Tensor | None,
    lift: Tensor | None,
    first: bool,
    columns: Tensor | None = None,
) -> Tensor | None:
    """dH [C, D] of a tile where `hidden` asks for it; dW is added to `out_VD`, `first`: written.
    `columns`: the tile's, of the weight."""
    if tile.row_scale is not None:
        scale_C1 = scale_C1 * tile.row_scale
    gradient_CD = None
    if hidden:
        gradient_CD = hidden_gradient(tile, weight_VD, mean_row, columns).mul_(scale_C1)
    if out_VD is not None:
        operand_CD = weight_operand(tile, scale_C1, hidden_CD, out_VD.dtype, lift)
        gemm.add_weight_gradient(out_VD, tile.values, operand_CD, first=first)
    return gradient_CD


def weight_operand(
    tile: Tile, scale_C1: Tensor, hidden_CD: Tensor, dtype: torch.dtype, lift: Tensor | None
) -> Tensor:
    """What the tile's values are multiplied with for dW: hidden states with all that scales."""
    factor = scale_C1 if lift is None else scale_C1 * lift
    return hidden_CD.to(dtype).mul(factor).to(tile.values.dtype)


def _logits_into(
    out_2CV: Tensor,
    problem: Problem,
    weight: Tensor,
    tokens: slice | Tensor,
    operand: torch.dtype,
) -> None:
    """The student's raw logits, and the teacher's or the difference's."""
    student_CD = problem.student_hidden.detach()[tokens].to(operand)
    if problem.shared_logits and out_2CV.is_contiguous():
        both_CD = torch.cat([student_CD, _other_operand(problem, tokens, operand)])
        gemm.logits_into(out_2CV.flatten(0, 1), both_CD, weight)
        return
    gemm.logits_into(out_2CV[0], student_CD, weight)
    other_logits_into(out_2CV[1], problem, weight, tokens, operand)


def _other_operand(problem: Problem, tokens: slice | Tensor, operand: torch.dtype) -> Tensor:
    """The teacher's hidden states, or the difference of both where one head gives both logits."""
    teacher = problem.teacher_hidden[tokens]
    if problem.shared_logits:
        # The difference is taken in fp32. A 16-bit operand (GPU) rounds it once; neighbouring
        # 16-bit hidden states mostly have exact differences.
        student = problem.student_hidden.detach()[tokens]
        teacher = teacher.to(problem.dtype) - student.to(problem.dtype)
    return teacher.to(operand)


def other_logits_into(
    out_CV: Tensor,
    problem: Problem,
    weight: Tensor,
    tokens: slice | Tensor,
    operand: torch.dtype,
    columns: Tensor | None = None,
) -> None:
    """The teacher's raw logits, or the difference's where one head gives both; `columns`: those
    alone."""
    if problem.teacher_weight is not None:
        weight = problem.teacher_weight[: problem.vocab_size]
    gemm.logits_into(out_CV, _other_operand(problem, tokens, operand), weight, columns)


def row_passes(
    problem: Problem,
    s_CV: Tensor,
    other_CV: Tensor,
    tokens: slice | Tensor,
    gradient: bool,
    result: Result,
    shard: Shard | None,
) -> Tensor:
    """Fills in the values of these tokens; leaves dZ in s_CV, up to the factor returned [C, 1]."""
    targets = None if problem.target_ids is None else problem.target_ids[tokens]
    if shard is not None:
        from opsdc_kernels.vocab_parallel import sharded_rows_

        value, statistics, factor = sharded_rows_(
            s_CV, other_CV, problem, shard, gradient=gradient, target_ids_C=targets
        )
        result.per_token[tokens] = value
        for statistic, found in zip(result.statistics, statistics, strict=True):
            statistic[tokens] = found
        return torch.full_like(value, factor)[:, None]
    row_function, step = _row_function(s_CV)
    blocks: list[Rows] = []
    for start in range(0, s_CV.shape[0], step):
        block = slice(start, start + step)
        blocks.append(
            row_function(
                s_CV[block],
                other_CV[block],
                problem,
                gradient=gradient,
                target_ids_B=None if targets is None else targets[block],
            )
        )
    result.per_token[tokens] = torch.cat([found.divergence for found in blocks])
    for i, statistic in enumerate(result.statistics if problem.return_stats else ()):
        statistic[tokens] = torch.cat([found.statistics[i] for found in blocks if found.statistics])
    return torch.cat([found.factor for found in blocks])[:, None]


def _row_function(s_CV: Tensor) -> tuple[Callable[..., Rows], int]:
    """The row pass for this device and dtype, and the rows it takes at once."""
    if s_CV.is_cuda and s_CV.dtype == torch.float32 and find_spec("triton"):
        from opsdc_kernels.row_pass.kernels import divergence_rows_ as in_triton

        return in_triton, s_CV.shape[0]
    if plan.compiled_rows(s_CV.device, s_CV.dtype):
        from opsdc_kernels.row_pass.compiled import divergence_rows_ as in_c

        return in_c, s_CV.shape[0]
    step = plan.block_rows(s_CV.shape[1], s_CV.device)
    buffers = s_CV.new_empty(plan.CPU_BUFFERS, min(step, s_CV.shape[0]), s_CV.shape[1])
    return partial(rows.divergence_rows_, buffers=buffers), step


def _empty_statistics(problem: Problem) -> tuple[Tensor, ...]:
    count = 0 if not problem.return_stats else 5 if problem.target_ids is None else 7
    n_tokens = problem.student_hidden.shape[0]
    zeros = problem.student_hidden.new_zeros(count, n_tokens, dtype=problem.dtype)
    return tuple(zeros)
