"""`chunked` below its roofline: the reverse KL's gradient from the columns that matter.

The gradient −q·c weights every vocabulary column by the student's own probability. Per chunk of
tokens: the student's logits in full, the columns that any of them gives more than a cut, then the
teacher's logits and the gradient GEMMs on those columns alone, gathered. `columns.picker` takes the
largest cut whose bound is within the tolerance. Where few columns would go, the chunk takes
the way of `chunked`, with all of them.

Cost in head GEMMs: 1 + 3·(share of columns kept), with a frozen head 1 + 2·share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels import plan, products
from opsdc_kernels.chunked.run import Result, Tokens
from opsdc_kernels.columns.bound import SLACK, cuts_of, sums_at_cuts
from opsdc_kernels.columns.chunks import DENSE_SHARE, Chunks, Following, count
from opsdc_kernels.columns.picker import TINY, ColumnPicker, Dropped, restricted
from opsdc_kernels.columns.sums import StudentSums, probabilities_
from opsdc_kernels.problem import GradientsWanted, Problem, Stat

LOOK_ROWS = 16
"""Tokens, spread over a call, that are looked at first: a call whose every chunk would turn out
dense goes to `chunked` before anything is spent on it."""
LOOK_SHARE = 0.35
"""The share that a look gives is about three quarters of what is kept then."""
LOOK_LEAST = 16 * LOOK_ROWS
"""Calls of so many tokens are looked at."""
ATTEMPTS = 6
"""Cuts that are tried where the sample misled: each costs little beside all columns."""
REST_COLUMNS = 256
"""Kept columns, about, that the estimate of the divergence's error looks at."""
LARGEST_RATIO = 6.0
"""|c| of a dropped column that the estimate of the divergence's error reckons with."""


class Realised(NamedTuple):
    """The outcome of leaving columns out: the fields of `DivergenceStats` that speak of it."""

    gradient_error_bound: Tensor
    """Bound of ‖error‖ / ‖exact‖ of each token's row of dH [N]."""
    divergence_error: Tensor
    """Estimate of the nats that each token's divergence is too small by [N]."""
    hidden_gradient_bound: Tensor
    """Bound of ‖error of dH‖ / ‖exact dH‖; 0-dim, as the following."""
    weight_gradient_bound: Tensor
    """The same of dW, together with db."""
    kept_share: Tensor
    """Columns kept, mean over the tokens."""
    gemm_units: Tensor
    """Head GEMMs of this pass."""

    @classmethod
    def exact(cls, result: Result, gemm_units: float) -> Realised:
        """The outcome of a pass that has all columns."""
        nothing_N, one = torch.zeros_like(result.per_token), result.values.new_ones(())
        return cls(
            nothing_N, nothing_N.clone(), 0 * one, 0 * one, one, torch.full_like(one, gemm_units)
        )

    def holds(self, tolerance: float) -> bool:
        """Columns are chosen by estimates; what was realised is known. NaN is no bound either."""
        hidden, weight = self.hidden_gradient_bound, self.weight_gradient_bound
        return bool((hidden <= tolerance) & (weight <= tolerance))


def run_bounded(
    problem: Problem,
    wanted: GradientsWanted,
    row_weight_N: Tensor | None,
    kept_K: Tensor | None,
    *,
    ahead: bool | None = None,
) -> tuple[Result, Realised]:
    """One pass over the tokens `kept_K` (None: all); the first four as of `chunked.run_chunks`,
    `ahead` as of `Chunks.run`."""
    assert problem.options.skip_tolerance is not None
    run = _Bounded(Chunks(problem, wanted, row_weight_N, kept_K))
    if not run.looks_dense():
        chunk = run.exact_chunk if problem.options.exact_value else run.chunk
        result = run.chunks.run(chunk, ahead)
        realised = run.realised(result)
        if realised.holds(problem.options.skip_tolerance):
            return result, realised
    result = run.chunks.all_columns()
    return result, Realised.exact(result, run.chunks.units / max(run.chunks.count, 1))


class _Bounded:
    """The choice of columns, chunk by chunk, and the bounds of the errors so far."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks, self.problem = chunks, chunks.problem
        self.picker = ColumnPicker(
            self.problem, chunks.wanted, chunks.row_pass, chunks.row_weight_N, chunks.chunk_count
        )
        new = self.problem.student_weight.new_zeros(0, dtype=self.problem.dtype)
        self.token_error_N = new.new_zeros(len(self.problem.student_hidden))
        self.divergence_error_N = torch.zeros_like(self.token_error_N)
        self.weight_error_V = new.new_zeros(chunks.size)
        self.choosing_units = 1 + (1 + chunks.backward_units) / plan.PILOT_PARTS

    def looks_dense(self) -> bool:
        """True where so many columns would be kept, going by some tokens of all chunks."""
        chunks = self.chunks
        if chunks.count < LOOK_LEAST or chunks.height < 2:  # no two halves of some tokens
            return False
        # The tokens: spread over the call, in two halves that are spread alike.
        rows = min(LOOK_ROWS, chunks.height)
        places = torch.arange(rows, device=chunks.touched_V.device) * (chunks.count // rows)
        places = torch.cat([places[::2], places[1::2]])
        tokens = places if chunks.kept_K is None else chunks.kept_K[places]
        # What they would keep if they were a chunk.
        (x_CV,) = chunks.empty_logits(1, rows)
        chunks.student_logits(tokens, x_CV)
        weights = self.picker.weights(tokens)
        student = self.picker.student(x_CV, weights)
        cut_V, chosen, _ = self.picker.cut(tokens, x_CV, weights, student)
        smallest = torch.where(cut_V > chosen, 0, student.peak_V).amax()
        # What as many tokens as a chunk has would keep: by the columns that both halves have.
        halves = slice(0, -(-rows // 2)), slice(-(-rows // 2), rows)
        q_CV = probabilities_(self.problem, x_CV, student.lse_C)
        first, second = (q_CV[half].amax(0) > smallest for half in halves)
        both, once = (first & second).sum(), (first ^ second).sum()
        share = _more(once, both, 2 * chunks.height / rows) / chunks.size
        chunks.units += rows * self.choosing_units
        return bool(share > LOOK_SHARE)

    def chunk(self, tokens: Tokens, x_CV: Tensor, spare_CV: Tensor, following: Following) -> None:
        """The student's logits in `x_CV`; the columns that matter from there on."""
        weights = self.picker.weights(tokens)
        student = self.picker.student(x_CV, weights)
        cut_V, chosen, budget = self.picker.cut(tokens, x_CV, weights, student)
        self.chunks.units += count(tokens) * self.choosing_units
        for _ in range(ATTEMPTS):
            dropped = self.picker.dropped(x_CV, cut_V > chosen, weights, student, budget)
            if following is not None:
                self.chunks.student_logits(*following)
                following = None
            if dropped.within:
                break
            chosen = chosen - 1
        columns = dropped.keeps_V.nonzero().squeeze(1)
        self.chunks.dense = not dropped.within or len(columns) > DENSE_SHARE * self.chunks.size
        if self.chunks.dense:
            scale_C1 = self.chunks.all_rows(tokens, x_CV, spare_CV)
            self._multiply_back(tokens, x_CV, spare_CV, scale_C1, None)
        else:
            self._sparse(tokens, x_CV, spare_CV, dropped, columns, student)

    def _sparse(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        spare_CV: Tensor,
        dropped: Dropped,
        columns: Tensor,
        student: StudentSums,
    ) -> None:
        """A chunk of these columns: the teacher's logits, dZ, values and gradients."""
        result = self.chunks.result
        part, values = restricted(self.problem, columns), result.values
        # The kept columns of the student's products; q over all columns, for the bound of dW.
        dz_CK, other_CK = products.two_tiles(spare_CV, len(columns))
        products.select_columns(x_CV, columns, dz_CK)
        q_CK = probabilities_(part, other_CK.copy_(dz_CK), student.lse_C)
        self.token_error_N[tokens] = dropped.hidden_C
        self.weight_error_V += dropped.outer_V
        self.weight_error_V.index_add_(0, columns, q_CK.T @ dropped.shift_C)
        step = len(columns) // REST_COLUMNS + 1
        some_CK = q_CK[:, ::step].clone()

        # dZ and values of the distributions over the kept columns.
        scale_C1 = self.picker.gradient_rows(part, dz_CK, other_CK, tokens, columns, result)
        self.chunks.units += count(tokens) * len(columns) / self.chunks.size

        # From there to all columns: KL(q‖p) is at least (1 − Q)·KL of the kept ones, and the
        # student's own statistics are known.
        largest = torch.where(dropped.keeps_V, 0.0, student.peak_V).amax()
        factor_C1, mass_C = scale_C1 / self.problem.logit_factor, dropped.mass_C
        self.divergence_error_N[tokens] = _rest(
            some_CK, dz_CK[:, ::step], factor_C1, mass_C, largest
        )
        values[Stat.DIVERGENCE, tokens] = (1 - mass_C) * values[Stat.DIVERGENCE, tokens]
        if self.problem.options.return_stats:
            if self.problem.target_ids is not None:
                off = values[Stat.STUDENT_LOGSUMEXP, tokens] - student.lse_C
                values[Stat.STUDENT_LOGPROB, tokens] += off
            values[Stat.STUDENT_LOGSUMEXP, tokens] = student.lse_C
            values[Stat.STUDENT_ENTROPY, tokens] = student.entropy_C
        self._multiply_back(tokens, dz_CK, other_CK, scale_C1 * (1 - mass_C)[:, None], columns)

    def exact_chunk(
        self, tokens: Tokens, x_CV: Tensor, spare_CV: Tensor, following: Following
    ) -> None:
        """All columns up to dZ, the columns that matter in the gradient GEMMs. dZ is known, so
        ‖Σ_D dZ·W_v‖ ≤ Σ_D |dZ|·‖W_v‖, and nothing shifts."""
        scale_C1 = self.chunks.all_rows(tokens, x_CV, spare_CV)
        weights = self.picker.weights(tokens)
        # Columns go in the order of their largest |dZ|; the pilot of the largest stays.
        size_CV = torch.mul(x_CV, scale_C1, out=spare_CV).abs_()
        peak_V = size_CV.amax(0)
        pilot = self.picker.pilot(peak_V)
        cut_V = cuts_of(peak_V, pilot)
        # The errors at every cut J, and the largest cut that the pilot's gradient allows.
        weight = self.problem.student_weight.detach()[: self.chunks.size]
        norm_V = torch.linalg.vector_norm(weight, dim=1, dtype=self.problem.dtype)
        hidden_CJ = sums_at_cuts(size_CV, cut_V, norm_V)[1] * SLACK * weights.size_C[:, None]
        outer_V = weights.reach_C @ size_CV
        pilot_CK = products.select_columns(x_CV, pilot).mul_(scale_C1)
        budget = self.picker.budget(tokens, pilot_CK, weights, pilot)
        none_J = torch.zeros_like(hidden_CJ[0])
        square_J = hidden_CJ.square().sum(0)
        cut = self.picker.largest_cut(cut_V, square_J, outer_V, none_J, budget)
        keeps_V = cut_V > cut
        if following is not None:
            self.chunks.student_logits(*following)
        columns = keeps_V.nonzero().squeeze(1)
        self.chunks.units += count(tokens) * (1 + self.chunks.backward_units / plan.PILOT_PARTS)
        # The gradient GEMMs, with all columns where few would go.
        self.chunks.dense = len(columns) > DENSE_SHARE * self.chunks.size
        if self.chunks.dense:
            self._multiply_back(tokens, x_CV, spare_CV, scale_C1, None)
            return
        self.token_error_N[tokens] = hidden_CJ.gather(1, cut.expand(len(x_CV), 1)).squeeze(1)
        self.weight_error_V += torch.where(keeps_V, 0.0, outer_V)
        dz_CK, scratch_CK = products.two_tiles(spare_CV, len(columns))
        products.select_columns(x_CV, columns, dz_CK)
        self._multiply_back(tokens, dz_CK, scratch_CK, scale_C1, columns)

    def _multiply_back(
        self,
        tokens: Tokens,
        dz_CK: Tensor,
        scratch_CK: Tensor,
        scale_C1: Tensor,
        columns: Tensor | None,
    ) -> None:
        """Add the gradients of a tile; `columns` None: of all."""
        self.chunks.multiply_back(tokens, dz_CK, scratch_CK, scale_C1, columns)
        if self.chunks.result.hidden_gradient is not None:
            gradient_CD = self.chunks.result.hidden_gradient[tokens]
            self.picker.used(gradient_CD.norm(), self.token_error_N[tokens].norm())

    def realised(self, result: Result) -> Realised:
        chunks, error_N, tokens = self.chunks, self.token_error_N, max(self.chunks.count, 1)
        size_N = torch.zeros_like(error_N)
        if result.hidden_gradient is not None:
            size_N = torch.linalg.vector_norm(result.hidden_gradient, dim=1)
        size = chunks.weight_gradient_norm()
        return Realised(
            gradient_error_bound=_relative(error_N, size_N),
            divergence_error=self.divergence_error_N,
            hidden_gradient_bound=_relative(error_N.norm(), size_N.norm()),
            weight_gradient_bound=_relative(self.weight_error_V.norm(), size),
            kept_share=torch.full_like(size, chunks.kept_columns / tokens),
            gemm_units=torch.full_like(size, chunks.units / tokens),
        )


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """error / ‖exact‖ from the size of what was computed, which is within `error` of ‖exact‖."""
    bound = torch.where(size > error, error / (size - error), torch.inf)
    return torch.where(error == 0, 0.0, bound)


def _more(once: Tensor, both: Tensor, times: float) -> Tensor:
    """Different columns in `times` samples of tokens, of which two have these in one and in both:
    the extrapolation of Chao's estimate of the number of species."""
    unseen = once.square() / (4 * both.clamp(min=1))
    rate = once / (2 * unseen + once).clamp(min=TINY)
    return once + both + unseen * (1 - (1 - rate) ** (times - 2))


def _rest(
    q_CK: Tensor, dz_CK: Tensor, factor_C1: Tensor, dropped_C: Tensor, largest: Tensor
) -> Tensor:
    """An estimate of what the dropped columns would add to the divergence [C]: their mass times the
    mean of f(c) over those kept columns that weigh as little. (KL(q‖p) is (1 − Q)·KL of the kept
    columns, renormalized, plus terms ≥ 0.)"""
    small = (q_CK <= largest) & (q_CK > TINY)
    weight = torch.where(small, q_CK, 0.0)
    c = torch.where(small, dz_CK * factor_C1 / q_CK, 0.0)
    c = c.mul_((dropped_C - 1)[:, None]).clamp_(-LARGEST_RATIO, LARGEST_RATIO)
    terms = torch.expm1(c).sub_(c).clamp_(min=0)
    total = weight.sum(1).clamp(min=TINY)
    return dropped_C * torch.linalg.vecdot(weight, terms) / total
