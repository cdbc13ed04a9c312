r"""The row pass of a chunk whose columns are sharded over ranks.

Hidden states, token weights and targets are the same on all ranks; the columns of the logits are
not. A shard is one column of a small vocabulary of shards, and the chain rule of the divergence
puts them together. With S_g = log Σ_{v∈g} e^s, the shard's own distributions q_g and p_g, and
D_g = log Σ_{v∈g} e^t − S_g = E_{q_g}[d] + KL(q_g‖p_g)::

    π = softmax(S),  ρ = softmax(S + D),  q = π_g·q_g,  p = ρ_g·p_g on shard g
    KL(q‖p) = KL(π‖ρ) + Σ_g π_g·KL(q_g‖p_g)                                                   (1)
    KL(p‖q) = KL(ρ‖π) + Σ_g ρ_g·KL(p_g‖q_g)                                                   (2)
    H(q)    = H(π)    + Σ_g π_g·H(q_g)                                                        (3)

Every term is ≥ 0 and centred, so nothing is lost against the unsharded forms of `reference`; a
shard without columns has π_g = ρ_g = 0. The JSD's integrand needs log(p/q) first, and that needs
S and D of all shards: its sums take a second exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from opsdc_kernels import maths
from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass.exact import divergence_and_gradient
from opsdc_kernels.row_pass.result import RowResult, block_rows
from opsdc_kernels.row_pass.transform import transform_


class Summary(NamedTuple):
    """A shard's columns of each row, float64: [C] of one rank, [R, C] of all.

    "Inside" are the columns where both logits are finite, see `reference`.
    """

    inside: Tensor
    """S = log Σ e^s inside."""
    mean: Tensor
    """E_{q_g}[d] inside; 0 without columns, as the two divergences."""
    reverse: Tensor
    """KL(q_g‖p_g) inside."""
    forward: Tensor
    """KL(p_g‖q_g) inside, where that is the divergence asked for, else 0."""
    only_student: Tensor
    """log Σ e^s where the teacher's logit is −inf."""
    only_teacher: Tensor
    """log Σ e^t where the student's logit is −inf."""


class Merged(NamedTuple):
    """All columns of each row, float64 [C]."""

    inside: Tensor
    """log Σ e^s inside."""
    mean: Tensor
    """E_q[d] inside."""
    log_ratio: Tensor
    """log Σ e^t − log Σ e^s inside."""
    outside_q: Tensor
    """Mass of the student's distribution outside."""
    outside_p: Tensor
    log_share_q: Tensor
    """log(1 − outside_q)."""
    log_share_p: Tensor
    value: Tensor
    """The divergence; of the JSD the part outside."""


class RowScalars(NamedTuple):
    """Numbers that the gradient pass needs beside s and c, per row [B, 1], in the logits' dtype."""

    peak: Tensor
    """The shard's peak."""
    log_peak: Tensor
    """log q of a column at the peak, over all columns."""
    log_peak_inside: Tensor
    """The same over the columns inside."""
    to_mean: Tensor
    """E_q[d] − E_{q_g}[d]."""
    log_ratio: Tensor
    """r = log(p/q) is d − E_q[d] less this."""


def sharded_rows_(
    s_CV: Tensor,
    other_CV: Tensor,
    problem: Problem,
    *,
    gather: Callable[[Tensor], Tensor],
    gradient: bool,
    target_ids_B: Tensor | None = None,
) -> RowResult:
    """The row pass of a whole chunk and this rank's columns; `problem` is the localized one.

    `gather`: a tensor of all ranks [R, …] from this one's.
    """
    height, dtype, options = s_CV.shape[0], s_CV.dtype, problem.options
    jsd, beta, count = options.divergence == "jsd", options.beta, len(Summary._fields)
    step = block_rows(max(s_CV.shape[1], 1), s_CV.device)
    blocks = [slice(start, min(start + step, height)) for start in range(0, height, step)]

    # 1. This shard's columns of each row, summed up; c = d − E_{q_g}[d] stays in `other_CV`.
    sums, peaks = [], []
    for block in blocks:
        targets = None if target_ids_B is None else target_ids_B[block]
        sums_B, peak_B = _summarize_(s_CV[block], other_CV[block], problem, targets)
        sums.append(sums_B)
        peaks.append(peak_B)
    ours = torch.cat(sums, 1)

    # 2. Exchanged, and the same divergence and statistics put together on every rank.
    gathered = gather(ours).unbind(1)
    parts = Summary(*gathered[:count])
    merged = _merge(parts, problem)
    value = merged.value
    statistics = _merge_statistics(parts, gathered[count:]) if options.return_stats else ()

    # 3. The JSD's integrand needs both normalizers of all shards: its sums are exchanged now.
    scalars = _row_scalars(merged, parts, Summary(*ours[:count]), torch.cat(peaks), dtype)
    blockwise = [
        (s_CV[block], other_CV[block], RowScalars(*(x[block] for x in scalars))) for block in blocks
    ]
    centre_C1 = None
    if jsd:
        jsd_sums = torch.cat([_jsd_sums_(*x, problem) for x in blockwise], 1)
        from_student, from_teacher, centre = gather(jsd_sums).sum(0)
        value = value + (1 - beta) * from_student + beta * from_teacher
        centre_C1 = centre.to(dtype)[:, None]

    # 4. The gradient of this shard's logits, from c (KLs) or a (JSD) and the scalars of its rows.
    if gradient:
        for block, x in zip(blocks, blockwise, strict=True):
            _gradient_(*x, problem, None if centre_C1 is None else centre_C1[block])
    values = torch.stack([x.to(dtype) for x in (value, *statistics)])
    return RowResult(values, torch.full_like(values[0], problem.logit_factor))


def _summarize_(
    student_BV: Tensor, other_BV: Tensor, problem: Problem, target_ids_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(`Summary` and what the statistics need, a row each, and the peaks [B]).

    Leaves in `other_BV` c = d − E_{q_g}[d], −inf where only the student's logit is finite, and in
    `student_BV` what `_student_logits` takes.
    """
    s, t, d, _ = transform_(student_BV, other_BV, problem, None)
    t = s + d if t is None else t
    # q_g over the columns inside, from the shard's own peak.
    no_student, no_teacher = torch.isneginf(s), torch.isneginf(t)
    outside = no_student | no_teacher
    inside = s.masked_fill(outside, -math.inf)
    peak = _peak(inside)
    absent = torch.isneginf(peak)
    peak = peak.masked_fill(absent, 0.0)
    below = inside - peak[:, None]
    total = below.exp().sum(1).masked_fill(absent, 1.0)
    log_q = below.sub_(total.log()[:, None])
    q = log_q.exp()
    # c, and by it the two divergences of q_g and p_g.
    c, mean = d.masked_fill(outside, 0.0), torch.zeros_like(peak, dtype=torch.float64)
    for _ in range(2):  # the second mean removes the rounding error of the first
        rest = (q * c).sum(1)
        mean += rest
        c = (c - rest[:, None]).masked_fill_(outside, 0.0)
    log_ratio = maths.log_mean_exp(log_q, c, outside)
    forward = torch.zeros_like(peak)
    if problem.options.divergence == "forward_kl":
        r = (c - log_ratio).masked_fill_(outside, 0.0)
        forward = maths.weighted_excess(log_q + r, -r, log_q).sum(1)
    # The columns on one side only count in the masses.
    summary = Summary(
        inside=(peak.double() + total.double().log()).masked_fill(absent, -math.inf),
        mean=mean,
        reverse=log_ratio.squeeze(1).double(),
        forward=forward.double(),
        only_student=torch.logsumexp(s.masked_fill(~no_teacher, -math.inf), 1).double(),
        only_teacher=torch.logsumexp(t.masked_fill(~no_student, -math.inf), 1).double(),
    )
    statistics = _statistics(s, t, target_ids_B) if problem.options.return_stats else []
    other_BV.copy_(c.masked_fill_(no_teacher, -math.inf))
    return torch.stack((*summary, *statistics)), peak


def _peak(logits_BV: Tensor) -> Tensor:
    """The largest logits; −inf without columns."""
    if logits_BV.shape[1] == 0:
        return logits_BV.new_full(logits_BV.shape[:1], -math.inf)
    return logits_BV.amax(1)


def _statistics(s: Tensor, t: Tensor, target_ids_B: Tensor | None) -> list[Tensor]:
    """The shard's entropies, peaks, the teacher's logit at the student's peak, targets' logits;
    −inf for what lies in other shards."""
    nowhere = s.new_full(s.shape[:1], -math.inf)
    at_peak = nowhere
    if s.shape[1]:
        at_peak = t.gather(1, s.argmax(1, keepdim=True)).squeeze(1)
    statistics = [_entropy(s), _entropy(t), _peak(s), at_peak, _peak(t)]
    if target_ids_B is not None:
        here = (target_ids_B >= 0) & (target_ids_B < s.shape[1])
        at = target_ids_B.clamp(0, max(s.shape[1] - 1, 0))[:, None]
        for logits in (s, t):
            taken = logits.gather(1, at).squeeze(1) if s.shape[1] else nowhere
            statistics.append(torch.where(here, taken, nowhere))
    return [x.double() for x in statistics]


def _entropy(logits_BV: Tensor) -> Tensor:
    """log Σ e^x − E[x], x from the peak: two terms ≥ 0. 0 without columns."""
    peak = _peak(logits_BV)
    absent = torch.isneginf(peak)
    below = logits_BV - peak.masked_fill(absent, 0.0)[:, None]
    weight = below.exp()
    total = weight.sum(1).masked_fill_(absent, 1.0)
    return total.log() - (weight * below.masked_fill_(torch.isneginf(below), 0.0)).sum(1) / total


def _merge(parts: Summary, problem: Problem) -> Merged:
    """Equations (1) and (2), and the masses outside."""
    S = parts.inside.T
    D = (parts.mean + parts.reverse).T
    log_p = S + D
    reverse = divergence_and_gradient(S, log_p, D, "reverse_kl", 0.5, None)
    pi, rho = torch.softmax(S, 1), torch.softmax(log_p, 1)
    inside = torch.logsumexp(S, 1)
    log_ratio = (pi * D).sum(1) + reverse
    only_student = torch.logsumexp(parts.only_student, 0) - inside
    only_teacher = torch.logsumexp(parts.only_teacher, 0) - (inside + log_ratio)
    log_share_q, log_share_p = (logsigmoid(-x) for x in (only_student, only_teacher))
    outside_q, outside_p = torch.sigmoid(only_student), torch.sigmoid(only_teacher)
    if problem.options.divergence == "reverse_kl":
        value = reverse + (pi * parts.reverse.T).sum(1) - log_share_p
        value = value.masked_fill(outside_q > 0, math.inf)
    elif problem.options.divergence == "forward_kl":
        value = divergence_and_gradient(S, log_p, D, "forward_kl", 0.5, None)
        value = value + (rho * parts.forward.T).sum(1) - log_share_q
        value = value.masked_fill(outside_p > 0, math.inf)
    else:
        beta = problem.options.beta
        value = -(1 - beta) * math.log1p(-beta) * outside_q - beta * math.log(beta) * outside_p
    mean = (pi * parts.mean.T).sum(1)
    return Merged(inside, mean, log_ratio, outside_q, outside_p, log_share_q, log_share_p, value)


def _merge_statistics(parts: Summary, extra: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Equation (3); the rows of `Stat` after the divergence."""
    entropy_s, entropy_t, peak_s, t_at_peak, peak_t, *targets = extra
    log_s = torch.logaddexp(parts.inside, parts.only_student)
    log_t = torch.logaddexp(parts.inside + parts.mean + parts.reverse, parts.only_teacher)
    lse_s, lse_t = torch.logsumexp(log_s, 0), torch.logsumexp(log_t, 0)

    def entropy(logits: Tensor, within: Tensor) -> Tensor:
        pi = torch.softmax(logits, 0)
        between = torch.where(pi > 0, pi * torch.log_softmax(logits, 0), 0.0)
        return (pi * within - between).sum(0)

    # The first of equal peaks: as in a row that is not cut.
    at_peak = t_at_peak.gather(0, peak_s.argmax(0, keepdim=True)).squeeze(0)
    agreement = (at_peak == peak_t.amax(0)).double()
    entropies = entropy(log_s, entropy_s), entropy(log_t, entropy_t)
    logprobs = (x.amax(0) - lse for x, lse in zip(targets, (lse_s, lse_t), strict=False))
    return (lse_s, lse_t, *entropies, agreement, *logprobs)


def _row_scalars(
    merged: Merged, parts: Summary, ours: Summary, peak: Tensor, dtype: torch.dtype
) -> RowScalars:
    """Differences of float64 numbers, rounded once."""
    log_peak_inside = peak.double() - merged.inside
    shares = merged.log_share_q - merged.log_share_p
    # By the differences: where our shard has all but nothing of the mass, they are all of it.
    to_mean = (torch.softmax(parts.inside, 0) * (parts.mean - ours.mean)).sum(0)
    columns = (
        peak,
        log_peak_inside + merged.log_share_q,
        log_peak_inside,
        to_mean,
        merged.log_ratio - merged.mean + shares,
    )
    return RowScalars(*(x.to(dtype)[:, None] for x in columns))


def _student_logits(x_BV: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(s, ds/dx up to scale/temperature) again, from what `transform_` left."""
    side = problem.side(0)
    if side.cap is None:
        return x_BV, None
    return maths.capped(x_BV, side.cap, side.temperature), maths.slope_of(x_BV, side.cap)


def _jsd_sums_(student_BV: Tensor, c_BV: Tensor, row: RowScalars, problem: Problem) -> Tensor:
    """Σ q·f(a) and Σ p·f(b) over the columns inside, Σ q·a over all, float64 [3, B]; a, in the last
    measured from the mean of r (11), replaces `c_BV`."""
    beta = problem.options.beta
    s, _ = _student_logits(student_BV, problem)
    no_student, no_teacher = torch.isneginf(s), torch.isneginf(c_BV)
    outside = no_student | no_teacher
    log_full_q = s - row.peak + row.log_peak
    log_q = log_full_q.masked_fill(outside, -math.inf)
    c_BV.sub_(row.to_mean)
    r = (c_BV - row.log_ratio).masked_fill_(outside, 0.0)
    log_p = log_q + r
    a, b = maths.log_mixture(r, beta), maths.log_mixture(-r, 1 - beta)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    from_student = maths.weighted_excess(log_q, a, log_m).sum(1)
    from_teacher = maths.weighted_excess(log_p, b, log_m).sum(1)
    c_BV.copy_(maths.log_mixture_from(c_BV, -row.log_ratio, beta))
    centre = (log_full_q.exp_() * c_BV).sum(1)
    return torch.stack((from_student, from_teacher, centre)).double()


def _gradient_(
    student_BV: Tensor, c_BV: Tensor, row: RowScalars, problem: Problem, centre_B1: Tensor | None
) -> None:
    """Equations (8) to (10) of `reference`; dZ goes to `student_BV`. For the JSD `c_BV` is a."""
    s, slope = _student_logits(student_BV, problem)
    log_q = s - row.peak
    if centre_B1 is not None:
        q = log_q.add_(row.log_peak).exp_()
        dz = q.mul_(c_BV.sub_(centre_B1)).mul_(problem.options.beta - 1)
    else:
        no_teacher = torch.isneginf(c_BV)
        outside = no_teacher | torch.isneginf(s)
        if problem.options.divergence == "reverse_kl":
            c = c_BV.sub_(row.to_mean).masked_fill_(outside, 0.0)
            q = log_q.add_(row.log_peak_inside).masked_fill_(outside, -math.inf).exp_()
            dz = q.mul_(c).neg_()
        else:
            log_q = log_q.add_(row.log_peak)
            q = log_q.exp()
            r = c_BV.sub_(row.to_mean).sub_(row.log_ratio)
            far = q - torch.exp(log_q + r)  # where e^r alone could overflow
            dz = torch.where(r > 1, far, -q * torch.expm1(r.clamp(max=1.0)))
    if slope is not None:
        dz.mul_(slope)
    student_BV.copy_(dz)
