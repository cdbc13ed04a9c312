"""`chunked` below its roofline: the reverse KL's gradient from the columns that matter.

The gradient −q·c weights every vocabulary column by the student's own probability. Per chunk of
tokens: the student's logits in full, the columns that any of them gives more than a cut, then the
teacher's logits and the gradient GEMMs on those columns alone, gathered. `column_choice` takes the
largest cut whose bound is within the tolerance. Where few columns would go, the chunk takes
the way of `chunked`, with all of them.

Cost in head GEMMs: 1 + 3·(share of columns kept), with a frozen head 1 + 2·share.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsdc_kernels import gemm, plan
from opsdc_kernels.chunked.run import (
    Needs,
    Result,
    empty_result,
    lift_of,
    multiply_back,
    other_logits_into,
    row_passes,
    run_chunks,
    weight_operand,
)
from opsdc_kernels.columns import sums as column_sums
from opsdc_kernels.columns.bound import SLACK, cuts_of, sums_at_cuts
from opsdc_kernels.columns.picker import TINY, Choice, Left, Tokens, gradient_rows, restricted
from opsdc_kernels.columns.sums import probabilities_
from opsdc_kernels.layout import empty_logits, select_columns, two_tiles
from opsdc_kernels.problem import Problem
from opsdc_kernels.tile import rounded_tile

DENSE_SHARE = 0.45
"""From this share of columns on, gathering costs more than it saves. At most ½: the second logit
buffer holds the columns of student and teacher."""
LOOK_ROWS = 16
"""Tokens, spread over a call, that are looked at first: a call whose every chunk would turn out
dense goes to `chunked` before anything is spent on it."""
LOOK_SHARE = 0.35
"""The share that a look gives is about three quarters of what is kept then."""
LOOK_LEAST = 16 * LOOK_ROWS
"""Tokens of calls that are looked at."""
ATTEMPTS = 6
"""Cuts that are tried where the sample misled: each costs little beside all columns."""
REST_COLUMNS = 256
"""Kept columns, about, that the estimate of the divergence's error looks at."""
LARGEST_RATIO = 6.0
"""|c| of a dropped column that the estimate of the divergence's error reckons with."""


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
    realised = run.over_chunks(ahead)
    if _holds(realised, tolerance):
        return run.result, realised
    return run.all_columns()


def _holds(realised: Realised, tolerance: float) -> bool:
    """Columns are chosen by estimates; what was realised is known. NaN is no bound either."""
    return bool((realised.hidden_bound <= tolerance) & (realised.weight_bound <= tolerance))


class _Pass:
    """What the chunks of a pass share and add to."""

    result: Result

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
        self.kept_K, self.exact_value = kept_K, exact_value
        self.count = len(problem.student_hidden) if kept_K is None else len(kept_K)
        self.weight = problem.student_weight.detach()[: problem.vocab_size]
        self.operand = gemm.operand_dtype(self.weight, problem.dtype)
        self.lift = lift_of(problem, needs, row_weight_N, kept_K, self.operand)
        self.token_error_N = self.weight.new_zeros(len(problem.student_hidden), dtype=problem.dtype)
        self.divergence_error_N = torch.zeros_like(self.token_error_N)
        self.weight_error_V = self.token_error_N.new_zeros(len(self.weight))
        self.backward_units = needs.hidden + needs.weight
        self.choosing_units = 1 + (1 + self.backward_units) / plan.PILOT_PARTS
        self.kept_columns = self.units = 0.0  # summed over the tokens; units per token
        self.weight_written = self.dense = False
        self.touched_V = torch.zeros_like(self.weight_error_V, dtype=torch.bool)
        """Rows of dW that may not be 0."""
        dims = (problem.student_hidden.shape[1], problem.teacher_hidden.shape[1])
        self.height = plan.column_chunk_rows(
            self.count, problem.vocab_size, dims, problem.student_hidden.dtype,
            problem.student_hidden.device, problem.workspace_bytes,
        )  # fmt: skip
        self.choice = Choice(
            problem, needs, row_weight_N, tolerance=tolerance,
            chunks=-(-self.count // self.height), exact_value=exact_value,
        )  # fmt: skip

    def over_chunks(self, ahead: bool) -> Realised:
        problem, size = self.problem, self.problem.vocab_size
        if self.count >= LOOK_LEAST and self._looks_dense():
            return self.all_columns()[1]
        self.result = empty_result(problem, replace(self.needs, weight=False))
        if self.needs.weight:
            self.result.weight_gradient = untouched_zeros(problem.student_weight, problem.dtype)
        starts = range(0, self.count, self.height)
        chunks = [self._tokens(i, i + self.height) for i in starts]
        height = min(self.height, self.count)
        spare, *logits = empty_logits(self.weight, 2 + ahead, height, size, problem.dtype)
        for i, tokens in enumerate(chunks):
            if self.dense:  # once dense, always: what a choice costs would be lost again
                self._all_of_the_rest(starts[i])
                break
            here, there = (logits[j % len(logits)] for j in (i, i + 1))
            if i == 0 or not ahead:
                self._student_logits(tokens, here)
            following = (chunks[i + 1], there) if ahead and i + 1 < len(chunks) else None
            rows = _count(tokens)
            chunk = self._exact_chunk if self.exact_value else self._chunk
            chunk(tokens, here[:rows], spare[:rows], following)
        else:
            self._undo_lift()
        return self._realised()

    def all_columns(self) -> tuple[Result, Realised]:
        """Of a pass that leaves out none."""
        self.result = run_chunks(self.problem, self.needs, self.row_weight_N, self.kept_K)
        units = 2 + self.backward_units + self.units / max(self.count, 1)
        realised = exact(self.result)
        return self.result, replace(
            realised, gemm_units=torch.full_like(realised.gemm_units, units)
        )

    def _all_of_the_rest(self, start: int) -> None:
        self._undo_lift()
        rest = self._tokens(start, self.count)
        if isinstance(rest, slice):
            rest = torch.arange(start, self.count, device=self.weight.device)
        run_chunks(self.problem, self.needs, self.row_weight_N, rest, onto=self.result)
        self.touched_V.fill_(True)
        self.units += len(rest) * (2 + self.backward_units)
        self.kept_columns += len(rest)

    def _undo_lift(self) -> None:
        if self.lift is not None and self.result.weight_gradient is not None:
            self.result.weight_gradient.div_(self.lift)

    def _tokens(self, start: int, stop: int) -> Tokens:
        stop = min(stop, self.count)
        return slice(start, stop) if self.kept_K is None else self.kept_K[start:stop]

    def _student_logits(self, tokens: Tokens, out_CV: Tensor) -> None:
        hidden = self.problem.student_hidden.detach()[tokens]
        gemm.logits_into(out_CV[: len(hidden)], hidden.to(self.operand), self.weight)

    def _looks_dense(self) -> bool:
        """Whether so many columns would be kept, going by some tokens of all chunks."""
        rows = min(LOOK_ROWS, self.height)
        each = torch.arange(rows, device=self.weight.device) * (self.count // rows)
        each = torch.cat([each[::2], each[1::2]])  # two halves, spread alike
        tokens = each if self.kept_K is None else self.kept_K[each]
        size, dtype = self.problem.vocab_size, self.problem.dtype
        (x_CV,) = empty_logits(self.weight, 1, rows, size, dtype)
        self._student_logits(tokens, x_CV)
        weights = self.choice.weights(tokens)
        student = self.choice.student(x_CV, weights)
        cut_V, cut, _ = self.choice.cut(tokens, x_CV, weights, student)
        keeps_V = cut_V > cut
        smallest = torch.where(keeps_V, 0, student.peak_V).amax()
        halves = slice(0, -(-rows // 2)), slice(-(-rows // 2), rows)
        q_CV = probabilities_(self.problem, x_CV, student.lse_C)
        first, second = (q_CV[half].amax(0) > smallest for half in halves)
        both, once = (first & second).sum(), (first ^ second).sum()
        share = _more(once, both, 2 * self.height / rows) / len(keeps_V)
        self.units += rows * self.choosing_units
        return bool(share > LOOK_SHARE)

    def _chunk(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        spare_CV: Tensor,
        following: tuple[Tokens, Tensor] | None,
    ) -> None:
        weights = self.choice.weights(tokens)
        student = self.choice.student(x_CV, weights)
        cut_V, cut, allowed = self.choice.cut(tokens, x_CV, weights, student)
        self.units += _count(tokens) * self.choosing_units
        for _ in range(ATTEMPTS):
            left = self.choice.left(x_CV, cut_V > cut, weights, student, allowed)
            if following is not None:
                self._student_logits(*following)
                following = None
            if left.within:
                break
            cut = cut - 1
        columns = left.keeps_V.nonzero().squeeze(1)
        self.dense = not left.within or len(columns) > DENSE_SHARE * len(left.keeps_V)
        if self.dense:
            self._dense(tokens, x_CV, spare_CV)
        else:
            self._sparse(tokens, x_CV, spare_CV, left, columns, student)

    def _dense(self, tokens: Tokens, x_CV: Tensor, spare_CV: Tensor) -> None:
        other_logits_into(spare_CV, self.problem, self.weight, tokens, self.operand)
        scale_C1 = row_passes(self.problem, x_CV, spare_CV, tokens, True, self.result, None)
        self.units += _count(tokens)
        self._multiply_back(tokens, x_CV, spare_CV, scale_C1, None)

    def _sparse(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        spare_CV: Tensor,
        left: Left,
        columns: Tensor,
        student: column_sums.Student,
    ) -> None:
        part, result = restricted(self.problem, columns), self.result
        dz_CK, other_CK = two_tiles(spare_CV, len(columns))
        select_columns(x_CV, columns, dz_CK)
        q_CK = probabilities_(part, other_CK.copy_(dz_CK), student.lse_C)
        self.token_error_N[tokens] = left.hidden_C
        self.weight_error_V += left.outer_V
        self.weight_error_V.index_add_(0, columns, q_CK.T @ left.shift_C)
        step = len(columns) // REST_COLUMNS + 1
        some_CK = q_CK[:, ::step].clone()
        scale_C1 = gradient_rows(self.problem, part, dz_CK, other_CK, tokens, columns, result)
        self.units += _count(tokens) * len(columns) / len(self.weight)
        largest = torch.where(left.keeps_V, 0.0, student.peak_V).amax()
        self.divergence_error_N[tokens] = _rest(
            some_CK, dz_CK[:, ::step], scale_C1 / self.problem.logit_factor, left.mass_C, largest
        )
        result.per_token[tokens] = (1 - left.mass_C) * result.per_token[tokens]
        if result.statistics:
            if len(result.statistics) > 5:
                result.statistics[5][tokens] += result.statistics[0][tokens] - student.lse_C
            result.statistics[0][tokens] = student.lse_C
            result.statistics[2][tokens] = student.entropy_C
        self._multiply_back(tokens, dz_CK, other_CK, scale_C1 * (1 - left.mass_C)[:, None], columns)

    def _exact_chunk(
        self,
        tokens: Tokens,
        x_CV: Tensor,
        spare_CV: Tensor,
        following: tuple[Tokens, Tensor] | None,
    ) -> None:
        """All columns up to dZ, the columns that matter in the gradient GEMMs. dZ is known, so
        ‖Σ_D dZ·W_v‖ ≤ Σ_D |dZ|·‖W_v‖, and nothing shifts."""
        other_logits_into(spare_CV, self.problem, self.weight, tokens, self.operand)
        scale_C1 = row_passes(self.problem, x_CV, spare_CV, tokens, True, self.result, None)
        weights = self.choice.weights(tokens)
        size_CV = torch.mul(x_CV, scale_C1, out=spare_CV).abs_()
        peak_V = size_CV.amax(0)
        pilot = peak_V.topk(-(-len(peak_V) // plan.PILOT_PARTS)).indices
        norm_V = torch.linalg.vector_norm(self.weight, dim=1, dtype=self.problem.dtype)
        cut_V = cuts_of(peak_V, pilot)
        hidden_CJ = sums_at_cuts(size_CV, cut_V, norm_V)[1] * SLACK * weights.size_C[:, None]
        outer_V = weights.reach_C @ size_CV
        pilot_CK = select_columns(x_CV, pilot).mul_(scale_C1)
        allowed = self.choice.allowed(tokens, pilot_CK, weights, pilot)
        none_J = torch.zeros_like(hidden_CJ[0])
        cut = self.choice.largest_cut(cut_V, hidden_CJ.square().sum(0), outer_V, none_J, allowed)
        keeps_V = cut_V > cut
        if following is not None:
            self._student_logits(*following)
        columns = keeps_V.nonzero().squeeze(1)
        self.units += _count(tokens) * (2 + self.backward_units / plan.PILOT_PARTS)
        self.dense = len(columns) > DENSE_SHARE * len(keeps_V)
        if self.dense:
            self._multiply_back(tokens, x_CV, spare_CV, scale_C1, None)
            return
        self.token_error_N[tokens] = hidden_CJ.gather(1, cut.expand(len(x_CV), 1)).squeeze(1)
        self.weight_error_V += torch.where(keeps_V, 0.0, outer_V)
        dz_CK, scratch_CK = two_tiles(spare_CV, len(columns))
        select_columns(x_CV, columns, dz_CK)
        self._multiply_back(tokens, dz_CK, scratch_CK, scale_C1, columns)

    def _multiply_back(
        self,
        tokens: Tokens,
        dz_CK: Tensor,
        scratch_CK: Tensor,
        scale_C1: Tensor,
        columns: Tensor | None,
    ) -> None:
        """Adds the gradients of a tile; `columns` None: of all."""
        result, size = self.result, self.problem.vocab_size
        share = 1.0 if columns is None else len(columns) / size
        self.kept_columns += _count(tokens) * share
        self.units += _count(tokens) * self.backward_units * share
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
        rounds = self.operand != self.problem.dtype
        tile = rounded_tile(dz_CK, scratch_CK, self.operand)
        hidden_CD = self.problem.student_hidden.detach()[tokens]
        all_VD = None if result.weight_gradient is None else result.weight_gradient[:size]
        gradient_CD = multiply_back(
            tile,
            scale_C1,
            hidden_CD,
            self.weight,
            mean_row=gemm.mean_row(self.weight, self.problem.dtype, columns) if rounds else None,
            hidden=result.hidden_gradient is not None,
            out_VD=all_VD if columns is None else None,
            lift=self.lift,
            first=not self.weight_written,
            columns=columns,
        )
        if columns is not None and all_VD is not None:
            if tile.row_scale is not None:
                scale_C1 = scale_C1 * tile.row_scale
            operand_CD = weight_operand(tile, scale_C1, hidden_CD, all_VD.dtype, self.lift)
            gemm.scatter_weight_gradient(all_VD, tile.values, operand_CD, columns)
        self.weight_written = True
        self.touched_V[slice(None) if columns is None else columns] = True
        if gradient_CD is not None and result.hidden_gradient is not None:
            result.hidden_gradient[tokens] = gradient_CD
            self.choice.used(gradient_CD.norm(), self.token_error_N[tokens].norm())

    def _realised(self) -> Realised:
        result, error_N, tokens = self.result, self.token_error_N, max(self.count, 1)
        size_N = torch.zeros_like(error_N)
        if result.hidden_gradient is not None:
            size_N = torch.linalg.vector_norm(result.hidden_gradient, dim=1)
        norms = [] if result.bias_gradient is None else [result.bias_gradient.norm()]
        if result.weight_gradient is not None and self.kept_columns < self.count:
            touched = self.touched_V.nonzero().squeeze(1)
            blocks = gemm.row_blocks(result.weight_gradient, error_N.dtype, touched)
            norms += [block.norm() for _, block in blocks]
        size = torch.stack(norms).norm() if norms else error_N.new_zeros(())
        return Realised(
            token_bound=_relative(error_N, size_N),
            divergence_error=self.divergence_error_N,
            hidden_bound=_relative(error_N.norm(), size_N.norm()),
            weight_bound=_relative(self.weight_error_V.norm(), size),
            kept_share=torch.full_like(size, self.kept_columns / tokens),
            gemm_units=torch.full_like(size, self.units / tokens),
        )


def untouched_zeros(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the weight's shape. A CPU's come as the system's pages of zeros, which take neither time
    nor memory before they are written to: most of dW never is."""
    if weight_VD.device.type != "cpu" or not weight_VD.numel():
        return torch.zeros_like(weight_VD, dtype=dtype, memory_format=torch.contiguous_format)
    pages = mmap.mmap(-1, weight_VD.numel() * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(weight_VD.shape)


def _count(tokens: Tokens) -> int:
    return tokens.stop - tokens.start if isinstance(tokens, slice) else len(tokens)


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """error / ‖exact‖ from the size of what was computed, which is within `error` of ‖exact‖."""
    found = torch.where(size > error, error / (size - error), torch.inf)
    return torch.where(error == 0, 0.0, found)


def _more(once: Tensor, both: Tensor, times: float) -> Tensor:
    """Different columns in `times` samples of tokens, of which two have these in one and in both:
    the extrapolation of Chao's estimate of the number of species."""
    unseen = once.square() / (4 * both.clamp(min=1))
    rate = once / (2 * unseen + once).clamp(min=TINY)
    return once + both + unseen * (1 - (1 - rate) ** (times - 2))


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
