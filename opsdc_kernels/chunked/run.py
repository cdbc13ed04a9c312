"""Token chunks with full vocabulary rows resident, and the gradient computed in the forward pass.

Per chunk of C tokens: the student's and the teacher's logits (2 GEMMs; one of twice the height
where the head is shared and rows lie one after the other), a row pass that turns the student's
logits into their own gradient in place, then dH and dW from that tile (1 GEMM each). Nothing is
recomputed: 4 units of 2·N·V·D flop with a trainable head, 3 with a frozen one, 2 without gradients,
and 8 bytes of scratch per logit of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opsdc_kernels import plan, products
from opsdc_kernels.problem import GradientsWanted, Problem, Stat
from opsdc_kernels.row_pass.choose import RowPass, choose
from opsdc_kernels.vocab_parallel import Shard

Tokens = slice | Tensor


@dataclass(slots=True)
class Result:
    """Values per token, zero where they are dropped, and gradients of Σ row_weight·divergence; all
    in the statistics' dtype."""

    values: Tensor
    """Shape [`Problem.stat_count`, N]: the first rows of `Stat`."""
    hidden_gradient: Tensor | None
    """Shape [N, D]."""
    weight_gradient: Tensor | None
    """Shape [V, D]."""
    bias_gradient: Tensor | None
    """Shape [V]."""

    @classmethod
    def empty(cls, problem: Problem, wanted: GradientsWanted) -> Result:
        """All zero but dW, which is not initialized."""
        new = problem.student_hidden.new_zeros(0, dtype=problem.dtype)
        (tokens, dim), size = problem.student_hidden.shape, problem.student_weight.shape[0]
        return cls(
            values=new.new_zeros(problem.stat_count, tokens),
            hidden_gradient=new.new_zeros(tokens, dim) if wanted.hidden else None,
            weight_gradient=new.new_empty(size, dim) if wanted.weight else None,
            bias_gradient=new.new_zeros(size) if wanted.bias else None,
        )

    @property
    def per_token(self) -> Tensor:
        """The divergence [N]."""
        return self.values[Stat.DIVERGENCE]


def run_chunks(
    problem: Problem,
    wanted: GradientsWanted,
    row_weight_N: Tensor | None,
    kept_K: Tensor | None,
    *,
    tile_dtype: torch.dtype | None = None,
    shard: Shard | None = None,
    onto: Result | None = None,
) -> Result:
    """One pass over the tokens `kept_K` (None: all), over the columns of `shard` (None: all).

    `row_weight_N` scales each token's gradient, not its value (None: 1). `tile_dtype` is the
    dtype of the gradient tile that enters the GEMMs; None: the operands' own. `onto`: what other
    tokens gave, to add to.
    """
    row_pass = choose(problem.student_hidden.device, problem.dtype)
    if shard is not None:
        problem, row_pass = shard.localize(problem), shard.row_pass
    size, count = problem.vocab_size, token_count(problem, kept_K)
    result = Result.empty(problem, wanted) if onto is None else onto
    if result.weight_gradient is not None and onto is None:
        result.weight_gradient[size if count else 0 :].zero_()  # the first chunk writes the rest
    if count == 0:
        return result
    gradients = Gradients(problem, wanted, result, row_weight_N, kept_K, tile_dtype)
    if onto is not None:
        gradients.lift_()
    if shard is None:
        height = plan.chunk_rows(
            count, plan.Sizes.of(problem, row_pass), problem.options.workspace_bytes
        )
    else:
        height = plan.equal_rows(count, shard.chunk_rows)
    buffers = products.empty_logits(
        problem.student_hidden, 2, height, size, problem.dtype, row_pass.layout
    )
    for start in range(0, count, height):
        tokens = chunk_of(kept_K, start, min(start + height, count))
        s_CV, other_CV = both_2CV = buffers[:, : min(height, count - start)]
        both_logits_into(both_2CV, problem, tokens)
        scale_C1 = run_rows(row_pass, s_CV, other_CV, problem, tokens, bool(wanted), result)
        if wanted and size:
            first = start == 0 and onto is None
            gradients.add(tokens, s_CV, other_CV, scale_C1, first=first)
    gradients.undo_lift_()
    if shard is not None and result.hidden_gradient is not None:
        shard.add_up_(result.hidden_gradient)
    return result


def token_count(problem: Problem, kept_K: Tensor | None) -> int:
    """The number of tokens kept."""
    return len(problem.student_hidden if kept_K is None else kept_K)


def chunk_of(kept_K: Tensor | None, start: int, stop: int) -> Tokens:
    """The tokens from `start` to `stop` of those kept."""
    return slice(start, stop) if kept_K is None else kept_K[start:stop]


def run_rows(
    row_pass: RowPass,
    s_CV: Tensor,
    other_CV: Tensor,
    problem: Problem,
    tokens: Tokens,
    gradient: bool,
    result: Result,
) -> Tensor:
    """Fill in the values of these tokens; leave dZ in `s_CV`, up to the factor returned [C, 1]."""
    targets = None if problem.target_ids is None else problem.target_ids[tokens]
    rows = row_pass.over(s_CV, other_CV, problem, gradient=gradient, target_ids_C=targets)
    result.values[:, tokens] = rows.values
    return rows.factor[:, None]


def both_logits_into(out_2CV: Tensor, problem: Problem, tokens: Tokens) -> None:
    """The student's raw products, and the teacher's or the difference's."""
    if problem.shared_logits and out_2CV.is_contiguous():
        operands = _student_operand(problem, tokens), _other_operand(problem, tokens)
        products.logits_into(out_2CV.flatten(0, 1), torch.cat(operands), _scored_weight(problem))
        return
    student_logits_into(out_2CV[0], problem, tokens)
    other_logits_into(out_2CV[1], problem, tokens)


def student_logits_into(out_CV: Tensor, problem: Problem, tokens: Tokens) -> None:
    """The student's raw products."""
    products.logits_into(out_CV, _student_operand(problem, tokens), _scored_weight(problem))


def other_logits_into(
    out_CV: Tensor, problem: Problem, tokens: Tokens, columns: Tensor | None = None
) -> None:
    """The teacher's raw products, or the difference's where one head gives both; `columns`: those
    alone."""
    weight = problem.teacher_weight
    weight = _scored_weight(problem) if weight is None else weight[: problem.vocab_size]
    products.logits_into(out_CV, _other_operand(problem, tokens), weight, columns)


def _scored_weight(problem: Problem) -> Tensor:
    return problem.student_weight.detach()[: problem.vocab_size]


def _student_operand(problem: Problem, tokens: Tokens) -> Tensor:
    dtype = products.operand_dtype(problem.student_weight, problem.dtype)
    return problem.student_hidden.detach()[tokens].to(dtype)


def _other_operand(problem: Problem, tokens: Tokens) -> Tensor:
    """The teacher's hidden states, or the difference of both where one head gives both logits."""
    teacher = problem.teacher_hidden[tokens]
    if problem.shared_logits:
        # The difference is taken in fp32. A 16-bit operand (GPU) rounds it once; neighbouring
        # 16-bit hidden states mostly have exact differences.
        student = problem.student_hidden.detach()[tokens]
        teacher = teacher.to(problem.dtype) - student.to(problem.dtype)
    return teacher.to(products.operand_dtype(problem.student_weight, problem.dtype))


class Gradients:
    """The gradient products of a call's chunks, and what they share."""

    def __init__(
        self,
        problem: Problem,
        wanted: GradientsWanted,
        result: Result,
        row_weight_N: Tensor | None,
        kept_K: Tensor | None,
        tile_dtype: torch.dtype | None = None,
    ) -> None:
        self.problem, self.wanted, self.result = problem, wanted, result
        self.row_weight_N = row_weight_N
        self.weight = _scored_weight(problem)
        self.tile_dtype = tile_dtype or products.operand_dtype(self.weight, problem.dtype)
        self.corrects = wanted.hidden and self.tile_dtype != problem.dtype
        self.lift: Tensor | None = None
        """The factor that dW is accumulated with where its operands are fp16."""
        if self.tile_dtype == torch.float16 and wanted.weight:
            tokens = slice(None) if kept_K is None else kept_K
            weights = None if row_weight_N is None else row_weight_N[tokens]
            self.lift = products.operand_scale(
                problem.student_hidden[tokens], weights, problem.logit_factor
            )

    def lift_(self) -> None:
        """Scale what other tokens have added to dW as `add` will scale what it adds."""
        if self.lift is not None and self.result.weight_gradient is not None:
            self.result.weight_gradient.mul_(self.lift)

    def undo_lift_(self) -> None:
        """Take back the factor of dW."""
        if self.lift is not None and self.result.weight_gradient is not None:
            self.result.weight_gradient.div_(self.lift)

    @cached_property
    def _mean_row(self) -> Tensor:
        """The mean row of the whole head."""
        return products.mean_row(self.weight, self.problem.dtype)

    def add(
        self,
        tokens: Tokens,
        dz_CK: Tensor,
        scratch_CK: Tensor,
        scale_C1: Tensor,
        *,
        first: bool,
        columns: Tensor | None = None,
        add_rows: products.AddRows = products.add_rows_,
    ) -> Tensor | None:
        """Add what the logit gradients `scale_C1`·`dz_CK` of some tokens give; both tiles are
        overwritten. `first`: dW is not initialized. `columns`: those of the tile, None for all; a
        bias gradient is of all. Returns ‖row‖² of what those rows of dW were given [K], if any."""
        result, size = self.result, len(self.weight)
        if self.row_weight_N is not None:
            scale_C1 = scale_C1 * self.row_weight_N[tokens, None]
        if self.wanted.bias and result.bias_gradient is not None:
            result.bias_gradient[:size].addmv_(dz_CK.T, scale_C1.squeeze(1))
        if result.hidden_gradient is None and result.weight_gradient is None:
            return None
        # dH: the tile as it is, scaled afterwards, in fp32.
        tile = products.rounded_tile(dz_CK, scratch_CK, self.tile_dtype)
        if tile.row_scale is not None:
            scale_C1 = scale_C1 * tile.row_scale
        if result.hidden_gradient is not None:
            mean_row = None
            if self.corrects and columns is None:
                mean_row = self._mean_row
            elif self.corrects:
                mean_row = products.mean_row(self.weight, self.problem.dtype, columns)
            gradient_CD = products.hidden_gradient(tile, self.weight, mean_row, columns)
            result.hidden_gradient[tokens] = gradient_CD.mul_(scale_C1)
        # dW: everything that scales goes into the hidden states.
        if result.weight_gradient is not None:
            out_VD = result.weight_gradient[:size]
            factor_C1 = scale_C1 if self.lift is None else scale_C1 * self.lift
            hidden_CD = self.problem.student_hidden.detach()[tokens].to(out_VD.dtype)
            operand_CD = hidden_CD.mul(factor_C1).to(tile.values.dtype)
            if columns is None:
                products.add_weight_gradient(out_VD, tile.values, operand_CD, first=first)
            else:
                square_K = products.scatter_weight_gradient(
                    out_VD, tile.values, operand_CD, columns, add_rows
                )
                return square_K if self.lift is None else square_K / self.lift**2
        return None
