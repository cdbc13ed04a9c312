"""The vocabulary columns that a chunk of `columns.bounded` keeps: those above the largest cut whose
bound (`columns.bound`) is within the tolerance.

The cut is chosen by a sample of the chunk's tokens, then held against all of them. The size of the
exact gradient, which a relative tolerance is a share of, is estimated from the pilot: the columns
of the largest probabilities, which are kept in any case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels.chunked.run import Result, Tokens, other_logits_into, run_rows
from opsdc_kernels.columns.bound import CUTS, SLACK, Geometry, bounds, cuts_of, sums_at_cuts
from opsdc_kernels.columns.sums import StudentSums, dropped_sums, probabilities_, student_sums
from opsdc_kernels.plan import PILOT_PARTS
from opsdc_kernels.problem import GradientsWanted, Problem
from opsdc_kernels.products import select_columns
from opsdc_kernels.row_pass.choose import RowPass

SAMPLE_TOP = 8
"""The cut is chosen by so many tokens of the highest entropy, where errors are largest."""
SAMPLE_STEP = 16
"""Of the others, in the order of entropy, every 16th is in the sample."""
SAMPLE_LEAST = 8
"""Where that makes fewer than these, more of them are."""
HEADROOM = 0.8
"""Share of the tolerance that a choice may use up: the gradient's size is an estimate then."""
TINY = 1e-30
"""Probabilities below carry no digits of c."""


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The weight of a chunk's tokens [C], and the bounds of their differences."""

    row_C: Tensor
    """Token weights."""
    size_C: Tensor
    """The factor of an error in dH: |row weight · factor|."""
    reach_C: Tensor
    """The same in dW: times ‖h‖."""
    slopes: tuple[Tensor, Tensor]
    """The pair (η, ν) of (12)."""


class ErrorBudget(NamedTuple):
    """The errors that a chunk may make, 0-dim."""

    hidden: Tensor
    """Square of the error of dH."""
    weight: Tensor
    """Error of dW."""


class Cut(NamedTuple):
    """A chunk's columns in the order in which they would go."""

    cut_V: Tensor
    """The first cut that drops each column."""
    chosen: Tensor
    """The cut to take, 0-dim; −1 where none is allowed."""
    budget: ErrorBudget


@dataclass(frozen=True, slots=True)
class Dropped:
    """The columns that a chunk drops, and the errors that makes."""

    keeps_V: Tensor
    """False for the columns that are dropped."""
    hidden_C: Tensor
    """Bound of the error of each token in dH."""
    shift_C: Tensor
    """The error that δ of each token adds to a column of dW, per probability."""
    outer_V: Tensor
    """Bound of the error of the columns of dW that are dropped, else 0."""
    mass_C: Tensor
    """The student's probability of them all, of each token."""
    within: Tensor
    """True where the errors are allowed, 0-dim."""


class ColumnPicker:
    """Picks the columns of the chunks of one pass."""

    def __init__(
        self,
        problem: Problem,
        wanted: GradientsWanted,
        row_pass: RowPass,
        row_weight_N: Tensor | None,
        chunks: int,
    ) -> None:
        assert problem.options.skip_tolerance is not None
        self.problem, self.wanted, self.row_pass = problem, wanted, row_pass
        self.row_weight_N, self.chunks = row_weight_N, chunks
        self.tolerance = HEADROOM * problem.options.skip_tolerance
        self.weight = problem.student_weight.detach()[: problem.vocab_size]
        self.unused = self.weight.new_zeros((), dtype=problem.dtype)
        """The tolerance that the chunks so far left: Σ‖error of dH‖² may be so much more."""

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.of(self.problem)

    @cached_property
    def square_V(self) -> Tensor:
        return self.geometry.radius_V.square()

    def weights(self, tokens: Tokens) -> TokenWeights:
        """The weights of some tokens."""
        problem, wanted = self.problem, self.wanted
        hidden_CD = problem.student_hidden.detach()[tokens].to(problem.dtype)
        row_C = torch.ones_like(hidden_CD[:, 0])
        if self.row_weight_N is not None:
            row_C = row_C * self.row_weight_N[tokens]
        size_C = row_C.abs()
        if not problem.options.exact_value:
            size_C = size_C * abs(problem.logit_factor)
        square = hidden_CD.square().sum(1) * wanted.weight + wanted.bias
        slopes = self.geometry.slopes(problem, tokens)
        return TokenWeights(row_C, size_C, size_C * square.sqrt(), slopes)

    def student(self, x_CV: Tensor, weights: TokenWeights) -> StudentSums:
        """Sums of the student's probabilities, from its raw products."""
        eta, nu = weights.slopes
        reach = weights.reach_C
        return student_sums(self.problem, x_CV, self.square_V, reach * eta, reach * nu)

    def cut(self, tokens: Tokens, x_CV: Tensor, weights: TokenWeights, student: StudentSums) -> Cut:
        """The largest cut that a sample of the tokens allows."""
        # The pilot: its gradient tells how large an error may be.
        pilot = self.pilot(student.peak_V)
        pilot_CK = self._pilot_gradient(tokens, x_CV, student, pilot)
        budget = self.budget(tokens, pilot_CK, weights, pilot)

        # The cuts. What must be there, the pilot and the targets, no cut drops.
        targets = self.problem.target_ids
        forced = pilot if targets is None else torch.cat([pilot, targets[tokens]])
        cut_V = cuts_of(student.peak_V, forced)

        # Some tokens [R], each of which stands for `times_R` of the chunk.
        order = student.entropy_C.argsort()
        rest, top = order[:-SAMPLE_TOP], order[-SAMPLE_TOP:]
        step = max(min(SAMPLE_STEP, len(rest) // SAMPLE_LEAST), 1)
        some = torch.cat([rest[step // 2 :: step], top])
        times_R = torch.ones_like(student.entropy_C[some])
        times_R[: -len(top)] = len(rest) / max(len(some) - len(top), 1)

        # Their errors at every cut J: of dH by (13), of dW as far as δ reaches kept columns. There
        # it reaches as the rest does, but for its size: an estimate.
        q_RV = probabilities_(self.problem, x_CV.index_select(0, some), student.lse_C[some])
        spread_R, (eta_R, nu_R) = student.spread_C[some], (x[some] for x in weights.slopes)
        sums = sums_at_cuts(q_RV, cut_V, self.square_V)
        error_RJ = bounds(*sums, spread_R, (eta_R, nu_R))
        reach_R = weights.reach_C[some] * times_R
        around = reach_R @ (eta_R * spread_R.sqrt() + nu_R)
        shift_J = reach_R @ error_RJ.shift / around.clamp(min=TINY)
        chosen = self.largest_cut(
            cut_V,
            times_R @ (error_RJ.hidden * weights.size_C[some, None]).square(),
            self.geometry.radius_V * student.slope_V + student.rest_V,
            shift_J * torch.linalg.vector_norm(student.rest_V),
            budget,
        )
        return Cut(cut_V, chosen, budget)

    def pilot(self, peak_V: Tensor) -> Tensor:
        """The columns of the largest peaks."""
        return peak_V.topk(-(-len(peak_V) // PILOT_PARTS)).indices

    def _pilot_gradient(
        self, tokens: Tokens, x_CV: Tensor, student: StudentSums, pilot: Tensor
    ) -> Tensor:
        """dZ of the pilot's columns [C, pilot], of all columns' distribution but for its mean."""
        options = replace(self.problem.options, return_stats=False)
        part = restricted(replace(self.problem, options=options, target_ids=None), pilot)
        dz_CK = select_columns(x_CV, pilot)
        # The pilot's rows are renormalized over its columns.
        mass_C1 = probabilities_(part, dz_CK.clone(), student.lse_C).sum(1, keepdim=True)
        scratch = Result(dz_CK.new_zeros(1, len(self.problem.student_hidden)), None, None, None)
        other_CK = torch.empty_like(dz_CK)
        scale_C1 = self.gradient_rows(part, dz_CK, other_CK, tokens, pilot, scratch)
        return dz_CK.mul_(scale_C1 * mass_C1)

    def gradient_rows(
        self,
        part: Problem,
        x_CK: Tensor,
        other_CK: Tensor,
        tokens: Tokens,
        columns: Tensor,
        result: Result,
    ) -> Tensor:
        """dZ of the columns of `part` replaces the student's raw products, up to a factor [C, 1]
        that is returned; values and statistics are those of these columns."""
        other_logits_into(other_CK, self.problem, tokens, columns)
        return run_rows(self.row_pass, x_CK, other_CK, part, tokens, True, result)

    def budget(
        self, tokens: Tokens, pilot_CK: Tensor, weights: TokenWeights, pilot: Tensor
    ) -> ErrorBudget:
        """The errors that the tolerance allows, from the logit gradients of the pilot's columns."""
        wanted, dtype = self.wanted, self.problem.dtype
        pilot_CK = pilot_CK * weights.row_C[:, None]
        infinite = pilot_CK.new_full((), torch.inf)
        hidden = weight = infinite
        if wanted.hidden:
            gradient = pilot_CK @ self.weight.index_select(0, pilot).to(dtype)
            hidden = (self.tolerance * torch.linalg.vector_norm(gradient)).square()
        if wanted.weight or wanted.bias:
            gradient = pilot_CK.sum(0)
            if wanted.weight:
                hidden_CD = self.problem.student_hidden.detach()[tokens].to(dtype)
                gradient = pilot_CK.T @ hidden_CD
            # Errors of chunks may add up where their gradients do not.
            share = self.tolerance / self.chunks**0.5
            weight = share * torch.linalg.vector_norm(gradient)
        return ErrorBudget(hidden + self.unused, weight)

    def largest_cut(
        self, cut_V: Tensor, square_J: Tensor, outer_V: Tensor, shift_J: Tensor, budget: ErrorBudget
    ) -> Tensor:
        """The largest whose errors are allowed, 0-dim; −1 where none is."""
        squares = outer_V.new_zeros(CUTS + 1).index_add_(0, cut_V, outer_V.square())
        error_J = squares[:CUTS].cumsum(0).sqrt() + shift_J
        within = (square_J <= budget.hidden) & (error_J <= budget.weight)
        return within.int().cumprod(0).sum() - 1

    def dropped(
        self,
        x_CV: Tensor,
        keeps_V: Tensor,
        weights: TokenWeights,
        student: StudentSums,
        budget: ErrorBudget,
    ) -> Dropped:
        """The errors of all tokens of a chunk that keeps these columns."""
        sums = dropped_sums(self.problem, x_CV, student.lse_C, keeps_V, self.square_V)
        error = bounds(*sums, student.spread_C, weights.slopes)
        hidden_C, shift_C = error.hidden * weights.size_C, error.shift * weights.reach_C
        eta, nu = weights.slopes
        around_C = weights.reach_C * (eta * student.spread_C.sqrt() + nu)
        # On columns that are dropped δ is a small part of the rest, at most this.
        most = torch.where(shift_C > 0, shift_C / around_C, 0).amax()
        outer_V = self.geometry.radius_V * student.slope_V + (1 + most) * student.rest_V
        outer_V = torch.where(keeps_V, 0, outer_V * SLACK)
        # On columns that are kept it is all of the error.
        shift = shift_C.sum() / around_C.sum().clamp(min=TINY)
        weight = torch.linalg.vector_norm(outer_V)
        weight = weight + shift * torch.linalg.vector_norm(student.rest_V)
        within = (hidden_C.square().sum() <= budget.hidden) & (weight <= budget.weight)
        return Dropped(keeps_V, hidden_C, shift_C, outer_V, sums[0], within)

    def used(self, gradient_norm: Tensor, error_norm: Tensor) -> None:
        """Take note of what a chunk's dH and its error turned out to be."""
        self.unused += (self.tolerance * gradient_norm).square() - error_norm.square()


def restricted(problem: Problem, columns: Tensor) -> Problem:
    """The problem of these columns alone; its heads are still whole."""
    student, teacher, targets = problem.student_bias, problem.teacher_bias, problem.target_ids
    return replace(
        problem,
        student_bias=None if student is None else student.detach().index_select(0, columns),
        teacher_bias=None if teacher is None else teacher.index_select(0, columns),
        target_ids=None if targets is None else torch.searchsorted(columns, targets),
        options=replace(problem.options, vocab_size=len(columns)),
    )
