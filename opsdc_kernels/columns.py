"""`chunked` below its roofline: the reverse KL's gradient from the columns that matter.

The gradient −q·c weights every vocabulary column by the student's own probability. Per chunk of
tokens: the student's logits in full, the columns that any of them gives more than a cut, then the
teacher's logits and the gradient GEMMs on those columns alone, gathered. The largest cut is taken
whose bound (`column_bound`) is within the tolerance. Where few columns would go, the chunk takes
the way of `chunked`, with all of them.

Cost in head GEMMs: 1 + 3·(share of columns kept), with a frozen head 1 + 2·share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from opsdc_kernels import gemm, plan
from opsdc_kernels.chunked import (
    Needs,
    Result,
    empty_result,
    lift_of,
    multiply_back,
    other_logits_into,
    row_passes,
)
from opsdc_kernels.column_bound import CUTS, Bounds, Heads, bounds, bounds_of_gradient
from opsdc_kernels.problem import Problem
from opsdc_kernels.rows import capped
from opsdc_kernels.tile import rounded_tile

DENSE_SHARE = 0.4
"""From this share of columns on, gathering costs more than it saves."""
PILOT_PARTS = 64
"""V over the columns whose gradient tells the size of the whole one."""
LOOK_PARTS = 8
LOOK_SHARE = 0.35
LOOK_CUT = 1e-4
"""Every 8th token of the first chunk is looked at first: the call is dense if these alone give that
share of the columns more than the tolerance times this, about where cuts lie. One chunk that turns
out dense makes the rest of the call so: what was spent on it would be lost again."""
LOOK_ROWS = 64
"""Chunks of fewer rows are not looked at first."""
HEADROOM = 0.8
"""Share of the tolerance that a choice may use up: the gradient's size is an estimate then."""
LOWEST = -70.0
"""Logits that are below the largest by more count as this, a mass of 4e-31: products with denormal
ones take a CPU a hundred times as long."""
TINY = 1e-30
"""Probabilities below carry no digits of c."""
REST_COLUMNS = 1024
"""Kept columns, about, that the estimate of the divergence's error looks at."""
LARGEST_RATIO = 6.0
"""|c| of a dropped column that the estimate of the divergence's error reckons with."""


Tokens = slice | Tensor


@dataclass(frozen=True, slots=True)
class Realised:
    """What leaving columns out did."""

    token_bound: Tensor
    """[N]: ‖error‖ / ‖exact‖ of each token's row of dH is at most this."""
    divergence_error: Tensor
    """[N]: nats that the divergence is too small by, an estimate."""
    hidden_bound: Tensor
    """‖error of dH‖ / ‖exact dH‖ is at most this; 0-dim, as the following."""
    weight_bound: Tensor
    """The same of dW, together with db."""
    kept_share: Tensor
    """Columns kept, mean over the tokens."""
    gemm_units: Tensor
    """Head GEMMs of this pass."""

    @property
    def scalars(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden_bound, self.weight_bound, self.kept_share, self.gemm_units


def exact(result: Result) -> Realised:
    """Of a pass without gradients, which has all columns."""
    rows = torch.zeros_like(result.per_token)
    zero = rows.new_zeros(())
    return Realised(rows, rows, zero, zero, zero + 1, zero + 2)


@dataclass(frozen=True, slots=True)
class _Choice:
    """The bounds of a chunk and the cut that was taken."""

    bounds: Bounds
    cut: Tensor
    """0-dim; −1 where no cut is within the tolerance."""
    peak_V: Tensor
    """Largest probability (or |dZ|) of each column."""
    outer_V: Tensor
    """Σ ‖h‖·|dZ| of a column that is dropped, but for δ, [V]."""
    size_C: Tensor
    """What a token's error counts in dH: |row weight · factor|."""
    reach_C: Tensor
    """The same in dW: times ‖h‖."""

    @property
    def keeps_V(self) -> Tensor:
        return self.bounds.cut_V > self.cut

    def at_cut(self, each_CJ: Tensor) -> Tensor:
        return each_CJ.gather(1, self.cut.clamp(min=0).expand(len(each_CJ), 1)).squeeze(1)


def run_columns(
    problem: Problem,
    needs: Needs,
    row_weight_N: Tensor | None,
    kept_K: Tensor | None,
    *,
    tolerance: float,
    exact_value: bool,
    ahead: bool | None = None,
) -> tuple[Result, Realised]:
    """One pass over the tokens `kept_K` (None: all); the first four as of `chunked.run_chunks`.

    `exact_value`: the divergence and all statistics from all columns, for one GEMM more. `ahead`:
    the student's logits of the next chunk are on their way before the host waits for this one's
    columns (None: on a GPU); takes a third buffer.
    """
    if ahead is None:
        ahead = problem.student_hidden.is_cuda
    run = _Pass(problem, needs, row_weight_N, kept_K, tolerance, exact_value)
    return run.result, run.over_chunks(kept_K, ahead)


class _Pass:
    """What the chunks of a pass share and add to."""

    def __init__(
        self,
        problem: Problem,
        needs: Needs,
        row_weight_N: Tensor | None,
        kept_K: Tensor | None,
        tolerance: float,
        exact_value: bool,
    ) -> None:
        self.problem, self.needs, self.row_weight_N = problem, needs, row_weight_N
        self.tolerance, self.exact_value = HEADROOM * tolerance, exact_value
        self.weight = problem.student_weight.detach()[: problem.vocab_size]
        self.operand = gemm.operand_dtype(self.weight, problem.dtype)
        self.lift = lift_of(problem, needs, row_weight_N, kept_K, self.operand)
        self.result = empty_result(problem, needs)
        self.token_error_N = torch.zeros_like(self.result.per_token)
        self.divergence_error_N = torch.zeros_like(self.result.per_token)
        self.weight_error_V = self.token_error_N.new_zeros(len(self.weight))
        self.unused = self.token_error_N.new_zeros(())
        """Of the tolerance, by the chunks so far: what Σ‖error of dH‖² may still be more."""
        self.backward_units = needs.hidden + needs.weight
        self.kept_columns = self.units = 0.0  # summed over the tokens
        self.chunks, self.weight_written = 1, False
        self.looks, self.dense = True, False
        """Whether the next chunk is looked at first, and whether it and all others are dense."""

    @cached_property
    def heads(self) -> Heads:
        return Heads.of(self.problem)

    def over_chunks(self, kept_K: Tensor | None, ahead: bool) -> Realised:
        problem, size = self.problem, self.problem.vocab_size
        kept = len(problem.student_hidden) if kept_K is None else len(kept_K)
        dims = (problem.student_hidden.shape[1], problem.teacher_hidden.shape[1])
        dtype, device = problem.student_hidden.dtype, problem.student_hidden.device
        height = plan.column_chunk_rows(kept, size, dims, dtype, device, problem.workspace_bytes)
        starts = range(0, kept, height)
        chunks = [slice(i, min(i + height, kept)) if kept_K is None else kept_K[i : i + height]
                  for i in starts]  # fmt: skip
        if self.result.weight_gradient is not None:
            self.result.weight_gradient[size if kept else 0 :].zero_()
        self.chunks = len(chunks)
        buffers = self.token_error_N.new_empty(2 + ahead, min(height, kept), size)
        spare, *logits = buffers
        for i, tokens in enumerate(chunks):
            here, there = (logits[j % len(logits)] for j in (i, i + 1))
            if i == 0 or not ahead:
                self._student_logits(tokens, here)
            following = (chunks[i + 1], there) if ahead and i + 1 < len(chunks) else None
            rows = _count(tokens)
            chunk = self._exact_chunk if self.exact_value else self._chunk
            chunk(tokens, here[:rows], spare[:rows], following)
        if self.lift is not None and self.result.weight_gradient is not None:
            self.result.weight_gradient.div_(self.lift)
        return self._realised(max(kept, 1))

    def _student_logits(self, tokens: Tokens, out_CV: Tensor) -> None:
        hidden = self.problem.student_hidden.detach()[tokens]
        gemm.logits_into(out_CV[: len(hidden)], hidden.to(self.operand), self.weight)

    def _chunk(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        spare_CV: Tensor,
        following: tuple[Tokens, Tensor] | None,
    ) -> None:
        if self.looks and len(x_CV) >= LOOK_ROWS:
            x_CV8 = x_CV[::LOOK_PARTS]
            *_, peak_V = _probabilities(self.problem, x_CV8, spare_CV[: len(x_CV8)])
            share = (peak_V > LOOK_CUT * self.tolerance).sum() / len(peak_V)
            self.dense = bool(share > LOOK_SHARE)
        self.looks = False
        columns = None
        if not self.dense:
            choice, student = self._choose(tokens, x_CV, spare_CV)
            self.units += _count(tokens) / PILOT_PARTS * (1 + self.backward_units)
            keeps = choice.keeps_V
            if following is not None:
                self._student_logits(*following)
                following = None
            columns = keeps.nonzero().squeeze(1)
            self.dense = len(columns) > DENSE_SHARE * len(keeps)
        if self.dense or columns is None:
            self._dense(tokens, x_CV, spare_CV)
        else:
            self._sparse(tokens, x_CV, spare_CV, choice, columns, student)
        if following is not None:
            self._student_logits(*following)

    def _choose(
        self, tokens: Tokens, x_CV: Tensor, q_CV: Tensor
    ) -> tuple[_Choice, tuple[Tensor, Tensor]]:
        """The cut to take, and the student's log-normalizer and entropy [C]; q goes to `q_CV`."""
        problem = self.problem
        lse_C, entropy_C, peak_V = _probabilities(problem, x_CV, q_CV)
        pilot = peak_V.topk(-(-len(peak_V) // PILOT_PARTS)).indices
        found = bounds(
            q_CV, peak_V, self._forced(pilot, tokens), self.heads,
            self.heads.slopes(problem, tokens),
        )  # fmt: skip
        part = replace(self._restricted(pilot), return_stats=False, target_ids=None)
        dz_CK = x_CV.index_select(1, pilot)
        scale_C1 = self._gradient_rows(part, dz_CK, tokens)
        # The pilot's rows are renormalized over its columns.
        mass_C1 = q_CV.index_select(1, pilot).sum(1, keepdim=True)
        pilot_CK = dz_CK.mul_(scale_C1 * mass_C1)
        choice = self._cut(tokens, q_CV, peak_V, found, pilot_CK, part.student_weight)
        return choice, (lse_C, entropy_C)

    def _forced(self, pilot: Tensor, tokens: Tokens) -> Tensor:
        """Columns that are kept at any cut."""
        targets = self.problem.target_ids
        return pilot if targets is None else torch.cat([pilot, targets[tokens]])

    def _cut(
        self,
        tokens: Tokens,
        mass_CV: Tensor,
        peak_V: Tensor,
        found: Bounds,
        pilot_CK: Tensor,
        weight_KD: Tensor,
    ) -> _Choice:
        """The largest cut whose bounds are within the tolerance of the gradients of the pilot."""
        problem, needs = self.problem, self.needs
        weight_C = torch.ones_like(found.hidden_CJ[:, 0])
        if self.row_weight_N is not None:
            weight_C = weight_C * self.row_weight_N[tokens]
        size_C = weight_C.abs()
        if not self.exact_value:
            size_C = size_C * abs(problem.logit_factor)
        hidden_CD = problem.student_hidden.detach()[tokens].to(problem.dtype)
        square = hidden_CD.square().sum(1) * needs.weight + needs.bias
        reach_C = size_C * square.sqrt()
        radius = self.heads.radius_V
        slope_V, rest_V = (found.outer_C2.T * reach_C).contiguous() @ mass_CV
        outer_V = radius * slope_V + rest_V

        pilot_CK = pilot_CK * weight_C[:, None]
        within = torch.ones(CUTS, dtype=torch.bool, device=size_C.device)
        if needs.hidden:
            error_J = torch.linalg.vector_norm(found.hidden_CJ * size_C[:, None], dim=0)
            gradient = pilot_CK @ weight_KD.to(pilot_CK.dtype)
            allowed = (self.tolerance * torch.linalg.vector_norm(gradient)).square()
            within &= error_J.square() <= allowed + self.unused
        if needs.weight or needs.bias:
            squares = outer_V.new_zeros(CUTS + 1).index_add_(0, found.cut_V, outer_V.square())
            error_J = squares[:CUTS].cumsum(0).sqrt()
            # δ reaches the columns as the rest does, but for its size: an estimate.
            shift_J = reach_C @ found.shift_CJ / (reach_C @ found.outer_C2[:, 1]).clamp(min=TINY)
            error_J = error_J + shift_J * torch.linalg.vector_norm(rest_V)
            gradient = pilot_CK.T @ hidden_CD if needs.weight else pilot_CK.sum(0)
            # Errors of chunks may add up where their gradients do not.
            share = self.tolerance / self.chunks**0.5
            within &= error_J <= share * torch.linalg.vector_norm(gradient)
        cut = within.int().cumprod(0).sum() - 1
        return _Choice(found, cut, peak_V, outer_V, size_C, reach_C)

    def _restricted(self, columns: Tensor) -> Problem:
        """The problem of these columns alone."""
        problem = self.problem
        weight, bias = problem.teacher_weight, problem.teacher_bias
        own, targets = problem.student_bias, problem.target_ids
        return replace(
            problem,
            student_weight=self.weight.index_select(0, columns),
            teacher_weight=None if weight is None else weight.index_select(0, columns),
            student_bias=None if own is None else own.detach().index_select(0, columns),
            teacher_bias=None if bias is None else bias.index_select(0, columns),
            target_ids=None if targets is None else torch.searchsorted(columns, targets),
            vocab_size=len(columns),
        )

    def _gradient_rows(self, part: Problem, x_CK: Tensor, tokens: Tokens) -> Tensor:
        """dZ of the columns of `part` replaces the student's raw products, up to a factor [C, 1]
        that is returned; values and statistics are those of these columns."""
        other_CK = torch.empty_like(x_CK)
        other_logits_into(other_CK, part, part.student_weight, tokens, self.operand)
        return row_passes(part, x_CK, other_CK, tokens, True, self.result, None)

    def _dense(self, tokens: Tokens, x_CV: Tensor, spare_CV: Tensor) -> None:
        other_logits_into(spare_CV, self.problem, self.weight, tokens, self.operand)
        scale_C1 = row_passes(self.problem, x_CV, spare_CV, tokens, True, self.result, None)
        self.units += _count(tokens)
        self._multiply_back(tokens, x_CV, spare_CV, scale_C1, self.weight, None)

    def _sparse(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        q_CV: Tensor,
        choice: _Choice,
        columns: Tensor,
        student: tuple[Tensor, Tensor],
    ) -> None:
        part, result = self._restricted(columns), self.result
        dz_CK = x_CV.index_select(1, columns)
        scale_C1 = self._gradient_rows(part, dz_CK, tokens)
        self.units += _count(tokens) * len(columns) / len(self.weight)
        dropped_C = choice.at_cut(choice.bounds.dropped_CJ)
        largest = torch.where(choice.keeps_V, 0.0, choice.peak_V).amax()
        some = slice(None, None, len(columns) // REST_COLUMNS + 1)
        rest_C = _rest(
            q_CV.index_select(1, columns[some]), dz_CK[:, some],
            scale_C1 / self.problem.logit_factor, dropped_C, largest,
        )  # fmt: skip
        result.per_token[tokens] = (1 - dropped_C) * result.per_token[tokens]
        self.divergence_error_N[tokens] = rest_C
        if result.statistics:
            lse_C, entropy_C = student
            if len(result.statistics) > 5:
                result.statistics[5][tokens] += result.statistics[0][tokens] - lse_C
            result.statistics[0][tokens] = lse_C
            result.statistics[2][tokens] = entropy_C
        self._add_errors(tokens, q_CV, choice)
        scale_C1 = scale_C1 * (1 - dropped_C)[:, None]
        self._multiply_back(tokens, dz_CK, None, scale_C1, part.student_weight, columns)

    def _exact_chunk(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        spare_CV: Tensor,
        following: tuple[Tokens, Tensor] | None,
    ) -> None:
        """All columns up to dZ, the columns that matter in the gradient GEMMs."""
        other_logits_into(spare_CV, self.problem, self.weight, tokens, self.operand)
        scale_C1 = row_passes(self.problem, x_CV, spare_CV, tokens, True, self.result, None)
        size_CV = torch.mul(x_CV, scale_C1, out=spare_CV).abs_()
        peak_V = size_CV.amax(0)
        pilot = peak_V.topk(-(-len(peak_V) // PILOT_PARTS)).indices
        norm_V = torch.linalg.vector_norm(self.weight, dim=1, dtype=self.problem.dtype)
        found = bounds_of_gradient(size_CV, peak_V, pilot, norm_V)
        pilot_CK = x_CV.index_select(1, pilot).mul_(scale_C1)
        choice = self._cut(
            tokens, size_CV, peak_V, found, pilot_CK, self.weight.index_select(0, pilot)
        )
        keeps = choice.keeps_V
        if following is not None:
            self._student_logits(*following)
        columns = keeps.nonzero().squeeze(1)
        self.units += _count(tokens) * (1 + self.backward_units / PILOT_PARTS)
        if len(columns) > DENSE_SHARE * len(keeps):
            self._multiply_back(tokens, x_CV, spare_CV, scale_C1, self.weight, None)
            return
        self._add_errors(tokens, size_CV, choice)
        dz_CK = x_CV.index_select(1, columns)
        weight_KD = self.weight.index_select(0, columns)
        self._multiply_back(tokens, dz_CK, None, scale_C1, weight_KD, columns)

    def _add_errors(self, tokens: Tokens, mass_CV: Tensor, choice: _Choice) -> None:
        self.token_error_N[tokens] = choice.at_cut(choice.bounds.hidden_CJ) * choice.size_C
        shift_C = choice.at_cut(choice.bounds.shift_CJ) * choice.reach_C
        self.weight_error_V += mass_CV.T @ shift_C
        self.weight_error_V += torch.where(choice.keeps_V, 0.0, choice.outer_V)

    def _multiply_back(
        self,
        tokens: Tokens,
        dz_CK: Tensor,
        scratch_CK: Tensor | None,
        scale_C1: Tensor,
        weight_KD: Tensor,
        columns: Tensor | None,
    ) -> None:
        """Adds the gradients of a tile; `columns` None: of all."""
        result, size = self.result, self.problem.vocab_size
        share = 1.0 if columns is None else len(columns) / size
        self.kept_columns += _count(tokens) * share
        self.units += _count(tokens) * (1 + self.backward_units * share)
        if self.row_weight_N is not None:
            scale_C1 = scale_C1 * self.row_weight_N[tokens, None]
        if result.bias_gradient is not None:
            found = dz_CK.T @ scale_C1.squeeze(1)
            if columns is None:
                result.bias_gradient[:size] += found
            else:
                result.bias_gradient.index_add_(0, columns, found)
        if not (self.needs.hidden or self.needs.weight):
            return
        out_KD = None
        if result.weight_gradient is not None:
            all_VD = result.weight_gradient[:size]
            out_KD = all_VD if columns is None else all_VD.new_empty(weight_KD.shape)
            if columns is not None and not self.weight_written:
                all_VD.zero_()
        rounds = self.operand != self.problem.dtype
        if scratch_CK is None:
            scratch_CK = torch.empty_like(dz_CK) if rounds else dz_CK
        gradient_CD = multiply_back(
            rounded_tile(dz_CK, scratch_CK, self.operand),
            scale_C1,
            self.problem.student_hidden.detach()[tokens],
            weight_KD,
            mean_row=weight_KD.mean(0, dtype=self.problem.dtype) if rounds else None,
            hidden=result.hidden_gradient is not None,
            out_VD=out_KD,
            lift=self.lift,
            first=columns is not None or not self.weight_written,
        )
        self.weight_written = True
        if gradient_CD is not None and result.hidden_gradient is not None:
            result.hidden_gradient[tokens] = gradient_CD
            size, error = gradient_CD.norm(), self.token_error_N[tokens].norm()
            self.unused += (self.tolerance * size).square() - error.square()
        if columns is not None and result.weight_gradient is not None:
            assert out_KD is not None
            result.weight_gradient.index_add_(0, columns, out_KD)

    def _realised(self, tokens: int) -> Realised:
        result, error_N = self.result, self.token_error_N
        size_N = torch.zeros_like(error_N)
        if result.hidden_gradient is not None:
            size_N = torch.linalg.vector_norm(result.hidden_gradient, dim=1)
        parts = [x for x in (result.weight_gradient, result.bias_gradient) if x is not None]
        norms = [torch.linalg.vector_norm(x) for x in parts]
        size = torch.stack(norms).norm() if norms else error_N.new_zeros(())
        return Realised(
            token_bound=_relative(error_N, size_N),
            divergence_error=self.divergence_error_N,
            hidden_bound=_relative(error_N.norm(), size_N.norm()),
            weight_bound=_relative(self.weight_error_V.norm(), size),
            kept_share=torch.full_like(size, self.kept_columns / tokens),
            gemm_units=torch.full_like(size, self.units / tokens),
        )


def _count(tokens: Tokens) -> int:
    return tokens.stop - tokens.start if isinstance(tokens, slice) else len(tokens)


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """error / ‖exact‖ from the size of what was computed, which is within `error` of ‖exact‖."""
    found = torch.where(size > error, error / (size - error), torch.inf)
    return torch.where(error == 0, 0.0, found)


def _probabilities(problem: Problem, x_CV: Tensor, q_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-normalizer and entropy [C] and each column's largest q [V]; q replaces `q_CV`."""
    bias, (scale, _), (cap, _) = problem.student_bias, problem.logit_scale, problem.logit_softcap
    size = problem.vocab_size
    step = plan.block_rows(size, x_CV.device) if x_CV.device.type == "cpu" else len(x_CV)
    buffer = torch.empty_like(x_CV[:step])
    peak_V = x_CV.new_zeros(size)
    normalizers, entropies = [], []
    for start in range(0, len(x_CV), step):
        x, q = x_CV[start : start + step], q_CV[start : start + step]
        z, free = x, buffer[: len(x)]
        if bias is not None:
            z = torch.add(z, bias.detach()[:size], out=free)
        if scale != 1.0:
            z = torch.mul(z, scale, out=free)
        if cap is not None or problem.temperature != 1.0:
            z = capped(free.copy_(z) if z is x else z, cap, problem.temperature)
        top = z.amax(1, keepdim=True)
        z = torch.sub(z, top, out=free).clamp_(min=LOWEST)
        total = torch.exp(z, out=q).sum(1, keepdim=True)
        normalizers.append((top + total.log()).squeeze(1))
        if problem.return_stats:
            mean = torch.linalg.vecdot(q, z)
            entropies.append(total.log().squeeze(1) - mean / total.squeeze(1))
        torch.maximum(peak_V, q.div_(total).amax(0), out=peak_V)
    lse_C = torch.cat(normalizers)
    return lse_C, torch.cat(entropies) if entropies else lse_C, peak_V


def _rest(
    q_CK: Tensor, dz_CK: Tensor, factor_C1: Tensor, dropped_C: Tensor, largest: Tensor
) -> Tensor:
    """What the dropped columns would add to the divergence [C], an estimate: their mass times the
    mean of f(c) over those kept columns that weigh as little. (KL(q‖p) is (1 − Q)·KL of the kept
    columns, renormalized, plus terms ≥ 0.)"""
    small = (q_CK <= largest) & (q_CK > TINY)
    weight = torch.where(small, q_CK, 0.0)
    c = torch.where(small, dz_CK * factor_C1 / q_CK, 0.0)
    c = c.mul_((dropped_C - 1)[:, None]).clamp_(-LARGEST_RATIO, LARGEST_RATIO)
    terms = torch.expm1(c).sub_(c).clamp_(min=0)
    total = weight.sum(1).clamp(min=TINY)
    return dropped_C * torch.linalg.vecdot(weight, terms) / total
