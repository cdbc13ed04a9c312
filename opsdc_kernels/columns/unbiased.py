r"""The reverse KL's gradient, right on average, from a few columns: some kept, some drawn.

Letters as in `reference`. The gradient −q·c of a chunk's tokens weights a column by the student's
probability, which is known; c = d − E_q[d] asks the teacher about every column. Here column v is in
the sample S with a probability π_v of its own, independently of the others (Poisson sampling), and
has the weight a_v = 1/π_v there. Sums over all columns become sums over S (Horvitz and Thompson
1952), E[Σ_S a·x] = Σ x; columns with π = 1 are always there.

The gradient holds a product of two such sums, as E_q[d] meets every column. What is drawn for v
must not enter the mean that v is measured from, or the product has a bias of second order. Let m₀
be the mean of d over the pilot, columns that are always there, so that m₀ does not depend on the
draw, and c̃ = d − m₀. Of E_q[c̃] = E_q[d] − m₀ column v knows its own part, and takes the rest from
the others::

    δ_v = q_v·c̃_v + Σ_{u≠v, u∈S} a_u·q_u·c̃_u = δ − (a_v − 1)·q_v·c̃_v,   δ = Σ_S a·q·c̃          (14)
    dz_v = −a_v·q_v·(c̃_v − δ_v),  v ∈ S,  else 0                                               (15)

Given v ∈ S the sum is over independent draws, so E[dz_v] = −q_v·(c̃_v − E_q[c̃]) = −q_v·c_v: (15)
is unbiased, and so are dH = dz·W and dW = dzᵀ·h, which are linear in it. A soft-cap's slope
multiplies dz and changes nothing.

Of first order in the draw, dH of a token is off by Σ_v (a_v − 1)·q_v·c_v·(W_v − E_q[W]), so that,
as draws are independent::

    E‖error of dH‖² ≈ Σ_v (1/π_v − 1)·(q_v·c_v)²·ρ²,   ρ² = mean ‖W_v − E_q[W]‖²               (16)

and from the sample itself by another weight 1/π_v; ρ² is that of some of the columns drawn, E_q[W]
that over the pilot. For dW the same holds with ‖h‖, and where tokens share a column their parts add
up: Σ_S (1 − π_v)·‖dW_v‖², plus the part of δ.

For a given number of columns (16) is least for π in proportion to √Σ_tokens (q·c·ρ)²; c is unknown,
and in proportion to the step between the states. So π_v = min(1, mass_v/τ), mass² = Σ (reach·q)²,
the reach of a token its |weight|·‖Δh‖, and the threshold τ the largest that (16) allows. c² is that
of the pilot's columns there, ρ² that of some rows. τ depends on nothing that was drawn.

The loss log E_q[e^c̃] − E_q[c̃] is a logarithm of a sum: its bias of second order, half the variance
of the sum, is estimated from the sample and taken off; what is left is of third order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels import maths, plan, products
from opsdc_kernels.chunked.run import Result, Tokens, other_logits_into
from opsdc_kernels.columns.chunks import DENSE_SHARE, Chunks, Following, count
from opsdc_kernels.columns.draw import Sample, probabilities
from opsdc_kernels.columns.picker import TINY, restricted
from opsdc_kernels.columns.sums import (
    LOWEST,
    SampleSums,
    StudentMasses,
    sample_sums_,
    student_masses,
)
from opsdc_kernels.problem import GradientsWanted, Problem, Stat
from opsdc_kernels.row_pass.transform import transform_

CPU_ROWS = 128
"""Rows of a chunk on a CPU: its products run at their full rate, and fewer tokens share more
columns."""
ALLOWANCE = 2.0
"""(16) with the pilot's c² foretells about this many times the squared error that comes out."""
ALLOWANCE_RANGE, ALLOWANCE_STEP = (0.1, 4.0), (0.25, 1.5)
"""How far it may move, in all and from one chunk to the next."""
SOME_ROWS = 64
"""Rows of a head, at most, that stand for all of some kind where their distances are wanted."""


class Estimated(NamedTuple):
    """What leaving columns to chance did: the fields of `DivergenceStats` that speak of it."""

    gradient_error: Tensor
    """Standard error of each token's row of dH, over the row's norm [N]."""
    divergence_error: Tensor
    """Standard error of each token's divergence in nats [N]."""
    hidden_gradient_error: Tensor
    """Standard error of dH over its norm; 0-dim, as the following."""
    weight_gradient_error: Tensor
    """The same of dW, together with db."""
    kept_share: Tensor
    """Columns kept or drawn, mean over the tokens."""
    gemm_units: Tensor
    """Head GEMMs of this pass."""


def run_unbiased(
    problem: Problem,
    wanted: GradientsWanted,
    row_weight_N: Tensor | None,
    kept_K: Tensor | None,
    *,
    ahead: bool | None = None,
) -> tuple[Result, Estimated]:
    """One pass over the tokens `kept_K` (None: all); the first four as of `chunked.run_chunks`,
    `ahead` as of `Chunks.run`."""
    chunks = Chunks(problem, wanted, row_weight_N, kept_K, CPU_ROWS)
    run = _Unbiased(chunks)
    if run.one_sided:  # what only one of the two can say is no matter of a draw
        return (result := chunks.all_columns()), run.estimated(result)
    chunk = run.exact_chunk if problem.options.exact_value else run.chunk
    return (result := chunks.run(chunk, ahead)), run.estimated(result)


class _Unbiased:
    """The draw, chunk by chunk, and the squares of the errors so far."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks, self.problem = chunks, chunks.problem
        problem = self.problem
        assert problem.options.skip_tolerance is not None
        self.target = problem.options.skip_tolerance
        self.was_dense = False
        self.place = 0
        """Tokens that were drawn for."""
        self.weight = problem.student_weight.detach()[: problem.vocab_size]
        self.some_RD = self.weight[:: max(len(self.weight) // SOME_ROWS, 1)].to(problem.dtype)
        """Rows that stand for all of the head."""
        self.drift = self._drift()
        """The difference of the heads in units of their rows' distances, 0-dim, or None for heads
        of other sizes."""
        new = self.some_RD.new_zeros(len(problem.student_hidden))
        self.square_error_N, self.divergence_error_N = new, new.clone()
        self.allowance = torch.full_like(new[:0].sum(), ALLOWANCE)
        """The squared error that the next chunk aims at, in units of the one wanted."""
        self.weight_square_error = new.new_zeros(())
        self.dead_V, self.one_sided = _dead_columns(problem)

    def _drift(self) -> Tensor | None:
        some, teacher = self.some_RD, self.problem.teacher_weight
        if teacher is None:
            return some.new_zeros(())
        if teacher.shape[1] != some.shape[1]:
            return None
        other = teacher[: self.problem.vocab_size : max(len(self.weight) // SOME_ROWS, 1)]
        square = (other.to(some) - some).square().sum(1).mean()
        return (square / _square_distances(some, some.mean(0)).clamp(min=TINY)).sqrt()

    # Weights, masses and probabilities.

    def weights(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """|Weight| and reach of some tokens, each [C]."""
        problem = self.problem
        student = problem.student_hidden.detach()[tokens].to(problem.dtype)
        teacher = problem.teacher_hidden[tokens].to(problem.dtype)
        row_C = torch.ones_like(student[:, 0])
        if self.chunks.row_weight_N is not None:
            row_C = row_C * self.chunks.row_weight_N[tokens].abs()
        factors = [side.scale / side.temperature for side in (problem.side(0), problem.side(1))]
        if self.drift is None:
            return row_C, row_C * torch.hypot(
                *(factor * _norms(x) for factor, x in zip(factors, (student, teacher), strict=True))
            )
        reach_C = _norms(teacher.mul(factors[1]).sub_(student, alpha=factors[0]))
        if problem.teacher_weight is not None:
            reach_C = reach_C + factors[1] * _norms(teacher) * self.drift
        return row_C, row_C * reach_C

    def draw(self, mass_V: Tensor, most: Tensor, pilot: Tensor, tokens: Tokens) -> Sample:
        """A sample whose Σ (1/π − 1)·mass² is about `most`."""
        targets = self.problem.target_ids
        always = pilot if targets is None else torch.cat([pilot, targets[tokens]])
        probability_V = probabilities(mass_V, most).index_fill_(0, always, 1.0)
        if self.dead_V is not None:
            probability_V.masked_fill_(self.dead_V, 0.0)
        sample = Sample.drawn(probability_V, self.problem.options.seed, self.place)
        self.place += count(tokens)
        return sample

    def pilot(self, mass_V: Tensor) -> Tensor:
        """The columns of the largest masses."""
        return mass_V.topk(-(-len(mass_V) // plan.PILOT_PARTS)).indices

    def allowed(self, dz_CP: Tensor, rows_PD: Tensor, row_C: Tensor, square: Tensor) -> Tensor:
        """The largest Σ (1/π − 1)·mass² (16), where that makes a squared error of dH `square`
        times as large; by the gradient of the pilot's columns, nearly that of all."""
        size = torch.linalg.vector_norm((dz_CP * row_C[:, None]) @ rows_PD)
        return self.allowance * (self.target * size).square() / square.clamp(min=TINY)

    # The chunks.

    def chunk(self, tokens: Tokens, x_CV: Tensor, spare_CV: Tensor, following: Following) -> None:
        """The student's logits in `x_CV`; a sample of the columns from there on."""
        row_C, reach_C = self.weights(tokens)
        student = student_masses(self.problem, x_CV, reach_C)
        if self.dead_V is not None:
            student.mass_V.masked_fill_(self.dead_V, 0.0)
        # The pilot: m₀, how large c is, and how large the gradient.
        pilot = self.pilot(student.mass_V)
        x_CP = products.select_columns(x_CV, pilot)
        other_CP = torch.empty_like(x_CP)
        other_logits_into(other_CP, self.problem, tokens, pilot)
        s, _, d, slope = transform_(x_CP, other_CP, restricted(self.problem, pilot), None)
        if self.dead_V is not None:
            d = d.masked_fill(self.dead_V[pilot], 0.0)
        q = s.sub_(student.lse_C[:, None]).clamp_(min=LOWEST).exp_()
        mass_C = q.sum(1)
        base_C = torch.linalg.vecdot(q, d) / mass_C
        c = d.sub_(base_C[:, None])
        rows_PD = self.weight.index_select(0, pilot).to(q.dtype)
        mean_CD = (q @ rows_PD).div_(mass_C[:, None])  # E_q[W], nearly
        around_C = _square_distances(self.some_RD, mean_CD)
        square = (c.square().mean(1) * around_C) @ row_C.square()
        square = square / reach_C.square().sum().clamp(min=TINY)
        dz_CP = q.mul_(c) if slope is None else q.mul_(c).mul_(slope)
        most = self.allowed(dz_CP, rows_PD, row_C, square)
        # The sample.
        sample = self.draw(student.mass_V, most, pilot, tokens)
        self._spend(tokens, following, student_only=True)
        if self._is_dense(sample):
            scale_C1 = self.chunks.all_rows(tokens, x_CV, spare_CV)
            self.chunks.multiply_back(tokens, x_CV, spare_CV, scale_C1, None)
            return
        dz_CK, other_CK = products.two_tiles(spare_CV, len(sample.columns))
        products.select_columns(x_CV, sample.columns, dz_CK)
        other_logits_into(other_CK, self.problem, tokens, sample.columns)
        self.chunks.units += count(tokens) * len(sample.columns) / self.chunks.size
        part = restricted(self.problem, sample.columns)
        factors_2K = torch.stack([sample.weight_K, sample.doubt_K])
        targets = self.problem.target_ids
        if targets is not None:
            targets = torch.searchsorted(sample.columns, targets[tokens])
        sums = sample_sums_(part, dz_CK, other_CK, factors_2K, student.lse_C, base_C, targets)
        values, error_C = _values(self.problem, student, sums, base_C)
        self.chunks.result.values[:, tokens] = values
        self.divergence_error_N[tokens] = error_C
        # The errors (16), and the products.
        factor_C = row_C * self.problem.logit_factor
        square_C = sums.error_square * factor_C.square()
        self.square_error_N[tokens] = square_C * self._around(sample, mean_CD)
        if self.chunks.wanted.weight:
            hidden_CD = self.problem.student_hidden.detach()[tokens].to(square_C.dtype)
            square_C = square_C * sums.concentration
            self.weight_square_error += square_C @ hidden_CD.square().sum(1)
        scale_C1 = torch.full_like(row_C, self.problem.logit_factor)[:, None]
        self._multiply_back(tokens, dz_CK, other_CK, scale_C1, sample)

    def exact_chunk(
        self, tokens: Tokens, x_CV: Tensor, spare_CV: Tensor, following: Following
    ) -> None:
        """All columns up to dZ; a sample of them in the gradient GEMMs, where nothing is a product
        of two sums."""
        row_C, _ = self.weights(tokens)
        scale_C1 = self.chunks.all_rows(tokens, x_CV, spare_CV)
        size_CV = torch.mul(x_CV, scale_C1 * row_C[:, None], out=spare_CV)
        mass_V = torch.linalg.vector_norm(size_CV, dim=0)
        pilot = self.pilot(mass_V)
        dz_CP = products.select_columns(x_CV, pilot).mul_(scale_C1)
        rows_PD = self.weight.index_select(0, pilot).to(dz_CP.dtype)
        centre_D = self.some_RD.mean(0)
        most = self.allowed(dz_CP, rows_PD, row_C, _square_distances(self.some_RD, centre_D))
        sample = self.draw(mass_V, most, pilot, tokens)
        self._spend(tokens, following, student_only=False)
        if self._is_dense(sample):
            self.chunks.multiply_back(tokens, x_CV, spare_CV, scale_C1, None)
            return
        dz_CK, scratch_CK = products.two_tiles(spare_CV, len(sample.columns))
        products.select_columns(x_CV, sample.columns, dz_CK)
        square_C = (dz_CK * scale_C1).square() @ sample.doubt_K
        self.square_error_N[tokens] = square_C * row_C.square() * self._around(sample, centre_D)
        dz_CK.mul_(sample.weight_K)
        # Σ dZ is known: what the sample has of it too much multiplies what all rows have in common.
        excess_C1 = scale_C1 * (dz_CK.sum(1) - x_CV.sum(1))[:, None]
        self._multiply_back(tokens, dz_CK, scratch_CK, scale_C1, sample)
        if self.chunks.result.hidden_gradient is not None:
            if self.chunks.row_weight_N is not None:
                excess_C1 = excess_C1 * self.chunks.row_weight_N[tokens, None]
            self.chunks.result.hidden_gradient[tokens] -= excess_C1 * centre_D

    def _spend(self, tokens: Tokens, following: Following, *, student_only: bool) -> None:
        pilot_units = student_only + self.chunks.backward_units
        self.chunks.units += count(tokens) * (1 + pilot_units / plan.PILOT_PARTS)
        if following is not None:
            self.chunks.student_logits(*following)

    def _is_dense(self, sample: Sample) -> bool:
        """True where this chunk takes all columns; after two such chunks the rest does, unasked."""
        dense = len(sample.columns) > DENSE_SHARE * self.chunks.size
        self.chunks.dense, self.was_dense = dense and self.was_dense, dense
        return dense

    def _around(self, sample: Sample, mean: Tensor) -> Tensor:
        """Mean ‖W_v − mean‖² of the columns that were drawn, of each mean [..., D]."""
        drawn = sample.columns[sample.probability_K < 1]
        drawn = drawn[:: max(len(drawn) // SOME_ROWS, 1)]
        if not len(drawn):
            return mean.new_zeros(mean.shape[:-1])
        return _square_distances(self.weight.index_select(0, drawn).to(mean.dtype), mean)

    def _multiply_back(
        self, tokens: Tokens, dz_CK: Tensor, scratch_CK: Tensor, scale_C1: Tensor, sample: Sample
    ) -> None:
        square_K = self.chunks.multiply_back(tokens, dz_CK, scratch_CK, scale_C1, sample.columns)
        if square_K is not None:
            self.weight_square_error += square_K @ (1 - sample.probability_K)
        # What this chunk's error came out as corrects the aim of the following ones: they draw for
        # themselves, so given this one's draw they are as unbiased as before.
        if self.chunks.result.hidden_gradient is not None:
            size = self.chunks.result.hidden_gradient[tokens].norm()
            square = self.square_error_N[tokens].sum() / (self.target * size).square()
            step = square.clamp(min=TINY).reciprocal().clamp(*ALLOWANCE_STEP)
            self.allowance = (self.allowance * step).clamp(*ALLOWANCE_RANGE)

    def estimated(self, result: Result) -> Estimated:
        chunks, tokens = self.chunks, max(self.chunks.count, 1)
        size_N = torch.zeros_like(self.square_error_N)
        if result.hidden_gradient is not None:
            size_N = torch.linalg.vector_norm(result.hidden_gradient, dim=1)
        error_N = self.square_error_N.sqrt()
        weight = size_N.new_zeros(())
        if self.problem.options.return_stats:
            weight = chunks.weight_gradient_norm()
        return Estimated(
            gradient_error=error_N / size_N.clamp(min=TINY),
            divergence_error=self.divergence_error_N,
            hidden_gradient_error=error_N.norm() / size_N.norm().clamp(min=TINY),
            weight_gradient_error=self.weight_square_error.sqrt() / weight.clamp(min=TINY),
            kept_share=torch.full_like(weight, chunks.kept_columns / tokens),
            gemm_units=torch.full_like(weight, chunks.units / tokens),
        )


def _norms(x_CD: Tensor) -> Tensor:
    """The norm of each row."""
    return torch.linalg.vecdot(x_CD, x_CD).sqrt()


def _square_distances(rows_RD: Tensor, mean: Tensor) -> Tensor:
    """Mean ‖row − mean‖² over the rows, of each mean [..., D]."""
    centre_D = rows_RD.mean(0)
    return (rows_RD - centre_D).square().sum(1).mean() + (mean - centre_D).square().sum(-1)


def _values(
    problem: Problem, student: StudentMasses, sums: SampleSums, base_C: Tensor
) -> tuple[Tensor, Tensor]:
    """The first rows of `Stat` [stats, C], and the standard error of the divergence [C]."""
    # E_q[e^c̃] − 1, by the sum whose mean is known, Σ q = 1; and the loss with it.
    beyond_C = (sums.shift + sums.excess).clamp(min=-0.99)
    inner_C, size_C = torch.log1p(beyond_C), 1 + beyond_C
    bias_C = sums.more_square / size_C.square() / 2
    divergence_C = sums.excess - maths.excess(inner_C) + bias_C
    square_C = 2 * bias_C - 2 * sums.more_times_c / size_C + sums.c_square
    error_C = square_C.clamp(min=0).sqrt()
    if not problem.options.return_stats:
        return divergence_C[None], error_C
    values = {
        Stat.DIVERGENCE: divergence_C,
        Stat.STUDENT_LOGSUMEXP: student.lse_C,
        Stat.TEACHER_LOGSUMEXP: student.lse_C + base_C + inner_C,
        Stat.STUDENT_ENTROPY: student.entropy_C,
        Stat.TEACHER_ENTROPY: inner_C - sums.log_mass / sums.mass,
        Stat.AGREEMENT: sums.agreement,
        Stat.STUDENT_LOGPROB: sums.target_q,
        Stat.TEACHER_LOGPROB: sums.target_p - inner_C,
    }
    return torch.stack([values[stat] for stat in Stat])[: problem.stat_count], error_C


def _dead_columns(problem: Problem) -> tuple[Tensor | None, bool]:
    """The columns that biases of −inf take from both [V], or None; and whether one is taken from
    only one of them."""
    student, teacher = (
        None if side.bias is None else torch.isneginf(side.bias)
        for side in (problem.side(0), problem.side(1))
    )
    if problem.shared_logits:
        teacher = student
    found = [x for x in (student, teacher) if x is not None and bool(x.any())]
    if not found:
        return None, False
    if student is None or teacher is None:
        return None, True
    return student & teacher, bool((student ^ teacher).any())
