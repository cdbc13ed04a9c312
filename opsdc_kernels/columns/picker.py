"""Which vocabulary columns a chunk of `columns` keeps: those above the largest cut whose bound
(`column_bound`) is within the tolerance.

The cut is chosen by a sample of the chunk's tokens, then held against all of them. The size of the
exact gradient, which a relative tolerance is a share of, is estimated from the pilot: the columns
of the largest probabilities, which are kept in any case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from opsdc_kernels import gemm, plan
from opsdc_kernels.chunked.run import Needs, Result, other_logits_into, row_passes
from opsdc_kernels.columns import sums as column_sums
from opsdc_kernels.columns.bound import CUTS, SLACK, Heads, bounds, cuts_of, sums_at_cuts
from opsdc_kernels.columns.sums import probabilities_
from opsdc_kernels.layout import select_columns
from opsdc_kernels.problem import Problem

SAMPLE_TOP = 8
"""The cut is chosen by the tokens of the highest entropy, where errors are largest,"""
SAMPLE_STEP = 16
"""and by every 16th of the others in its order,"""
SAMPLE_LEAST = 8
"""or more often, so that they are so many."""
HEADROOM = 0.8
"""Share of the tolerance that a choice may use up: the gradient's size is an estimate then."""
TINY = 1e-30
"""Probabilities below carry no digits of c."""

Tokens = slice | Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """What the tokens of a chunk count [C], and what bounds their differences."""

    row_C: Tensor
    """Token weights."""
    size_C: Tensor
    """What an error counts in dH: |row weight · factor|."""
    reach_C: Tensor
    """The same in dW: times ‖h‖."""
    slopes: tuple[Tensor, Tensor]
    """(η, ν)"""


@dataclass(frozen=True, slots=True)
class Allowed:
    hidden: Tensor
    """Square of the error of dH."""
    weight: Tensor
    """Error of dW."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is left out of a chunk at a cut."""

    keeps_V: Tensor
    hidden_C: Tensor
    """Bound of the error of each token in dH."""
    shift_C: Tensor
    """What δ of each token adds to the error of a column of dW, per probability."""
    outer_V: Tensor
    """Bound of the error of the columns of dW that are left out, else 0."""
    mass_C: Tensor
    within: Tensor
    """Whether the errors are those that are allowed."""


class Choice:
    """What choosing for the chunks of one pass shares."""

    def __init__(
        self,
        problem: Problem,
        needs: Needs,
        row_weight_N: Tensor | None,
        *,
        tolerance: float,
        chunks: int,
        exact_value: bool,
    ) -> None:
        self.problem, self.needs, self.row_weight_N = problem, needs, row_weight_N
        self.tolerance, self.chunks = HEADROOM * tolerance, chunks
        self.exact_value = exact_value
        self.weight = problem.student_weight.detach()[: problem.vocab_size]
        self.unused = self.weight.new_zeros((), dtype=problem.dtype)
        """Of the tolerance, by the chunks so far: what Σ‖error of dH‖² may still be more."""

    @cached_property
    def heads(self) -> Heads:
        return Heads.of(self.problem)

    @cached_property
    def square_V(self) -> Tensor:
        return self.heads.radius_V.square()

    def weights(self, tokens: Tokens) -> Weights:
        problem, needs = self.problem, self.needs
        hidden_CD = problem.student_hidden.detach()[tokens].to(problem.dtype)
        row_C = torch.ones_like(hidden_CD[:, 0])
        if self.row_weight_N is not None:
            row_C = row_C * self.row_weight_N[tokens]
        size_C = row_C.abs()
        if not self.exact_value:
            size_C = size_C * abs(problem.logit_factor)
        square = hidden_CD.square().sum(1) * needs.weight + needs.bias
        return Weights(row_C, size_C, size_C * square.sqrt(), self.heads.slopes(problem, tokens))

    def student(self, x_CV: Tensor, weights: Weights) -> column_sums.Student:
        eta, nu = weights.slopes
        reach = weights.reach_C
        return column_sums.student(self.problem, x_CV, self.square_V, reach * eta, reach * nu)

    def cut(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        weights: Weights,
        student: column_sums.Student,
    ) -> tuple[Tensor, Tensor, Allowed]:
        """The first cut that drops each column [V], the cut to take, and the errors allowed."""
        peak_V = student.peak_V
        pilot = peak_V.topk(-(-len(peak_V) // plan.PILOT_PARTS)).indices
        part = replace(restricted(self.problem, pilot), return_stats=False, target_ids=None)
        dz_CK = select_columns(x_CV, pilot)
        # The pilot's rows are renormalized over its columns.
        mass_C1 = probabilities_(part, dz_CK.clone(), student.lse_C).sum(1, keepdim=True)
        nothing_N = student.lse_C.new_zeros(len(self.problem.student_hidden))
        scratch = Result(nothing_N, (), None, None, None)
        scale_C1 = gradient_rows(
            self.problem, part, dz_CK, torch.empty_like(dz_CK), tokens, pilot, scratch
        )
        allowed = self.allowed(tokens, dz_CK.mul_(scale_C1 * mass_C1), weights, pilot)

        targets = self.problem.target_ids
        forced = pilot if targets is None else torch.cat([pilot, targets[tokens]])
        cut_V = cuts_of(peak_V, forced)
        order = student.entropy_C.argsort()
        rest, top = order[:-SAMPLE_TOP], order[-SAMPLE_TOP:]
        step = max(min(SAMPLE_STEP, len(rest) // SAMPLE_LEAST), 1)
        some = torch.cat([rest[step // 2 :: step], top])
        times_R = torch.ones_like(student.entropy_C[some])  # tokens that each stands for
        times_R[: -len(top)] = len(rest) / max(len(some) - len(top), 1)
        q_RV = probabilities_(self.problem, x_CV.index_select(0, some), student.lse_C[some])
        eta, nu = weights.slopes
        found = bounds(
            *sums_at_cuts(q_RV, cut_V, self.square_V), student.spread_C[some], (eta[some], nu[some])
        )
        reach_R = weights.reach_C[some] * times_R
        around = reach_R @ (eta[some] * student.spread_C[some].sqrt() + nu[some])
        # δ reaches the columns as the rest does, but for its size: an estimate.
        shift_J = reach_R @ found.shift / around.clamp(min=TINY)
        cut = self.largest_cut(
            cut_V,
            times_R @ (found.hidden * weights.size_C[some, None]).square(),
            self.heads.radius_V * student.slope_V + student.rest_V,
            shift_J * torch.linalg.vector_norm(student.rest_V),
            allowed,
        )
        return cut_V, cut, allowed

    def allowed(self, tokens: Tokens, pilot_CK: Tensor, weights: Weights, pilot: Tensor) -> Allowed:
        """From the gradients of the pilot's columns, pilot_CK those of their logits."""
        needs, dtype = self.needs, self.problem.dtype
        pilot_CK = pilot_CK * weights.row_C[:, None]
        infinite = pilot_CK.new_full((), torch.inf)
        hidden = weight = infinite
        if needs.hidden:
            gradient = pilot_CK @ self.weight.index_select(0, pilot).to(dtype)
            hidden = (self.tolerance * torch.linalg.vector_norm(gradient)).square()
        if needs.weight or needs.bias:
            gradient = pilot_CK.sum(0)
            if needs.weight:
                hidden_CD = self.problem.student_hidden.detach()[tokens].to(dtype)
                gradient = pilot_CK.T @ hidden_CD
            # Errors of chunks may add up where their gradients do not.
            share = self.tolerance / self.chunks**0.5
            weight = share * torch.linalg.vector_norm(gradient)
        return Allowed(hidden + self.unused, weight)

    def largest_cut(
        self, cut_V: Tensor, square_J: Tensor, outer_V: Tensor, shift_J: Tensor, allowed: Allowed
    ) -> Tensor:
        """The largest whose errors are allowed, 0-dim; −1 where none is."""
        squares = outer_V.new_zeros(CUTS + 1).index_add_(0, cut_V, outer_V.square())
        error_J = squares[:CUTS].cumsum(0).sqrt() + shift_J
        within = (square_J <= allowed.hidden) & (error_J <= allowed.weight)
        return within.int().cumprod(0).sum() - 1

    def left(
        self,
        x_CV: Tensor,
        keeps_V: Tensor,
        weights: Weights,
        student: column_sums.Student,
        allowed: Allowed,
    ) -> Left:
        sums = column_sums.dropped(self.problem, x_CV, student.lse_C, keeps_V, self.square_V)
        found = bounds(*sums, student.spread_C, weights.slopes)
        hidden_C, shift_C = found.hidden * weights.size_C, found.shift * weights.reach_C
        eta, nu = weights.slopes
        around_C = weights.reach_C * (eta * student.spread_C.sqrt() + nu)
        # On columns that are left out δ is a small part of the rest, at most this.
        most = torch.where(shift_C > 0, shift_C / around_C, 0).amax()
        outer_V = self.heads.radius_V * student.slope_V + (1 + most) * student.rest_V
        outer_V = torch.where(keeps_V, 0, outer_V * SLACK)
        shift = shift_C.sum() / around_C.sum().clamp(min=TINY)
        error = torch.linalg.vector_norm(outer_V)
        error = error + shift * torch.linalg.vector_norm(student.rest_V)
        within = (hidden_C.square().sum() <= allowed.hidden) & (error <= allowed.weight)
        return Left(keeps_V, hidden_C, shift_C, outer_V, sums[0], within)

    def used(self, gradient_norm: Tensor, error_norm: Tensor) -> None:
        """What a chunk's dH and its error turned out to be."""
        self.unused += (self.tolerance * gradient_norm).square() - error_norm.square()


def restricted(problem: Problem, columns: Tensor) -> Problem:
    """The problem of these columns alone; its heads are still whole."""
    own, bias, targets = problem.student_bias, problem.teacher_bias, problem.target_ids
    return replace(
        problem,
        student_bias=None if own is None else own.detach().index_select(0, columns),
        teacher_bias=None if bias is None else bias.index_select(0, columns),
        target_ids=None if targets is None else torch.searchsorted(columns, targets),
        vocab_size=len(columns),
    )


def gradient_rows(
    problem: Problem,
    part: Problem,
    x_CK: Tensor,
    other_CK: Tensor,
    tokens: Tokens,
    columns: Tensor,
    result: Result,
) -> Tensor:
    """dZ of the columns of `part` replaces the student's raw products, up to a factor [C, 1] that
    is returned; values and statistics are those of these columns."""
    weight = problem.student_weight.detach()[: problem.vocab_size]
    operand = gemm.operand_dtype(weight, problem.dtype)
    other_logits_into(other_CK, problem, weight, tokens, operand, columns)
    return row_passes(part, x_CK, other_CK, tokens, True, result, None)
