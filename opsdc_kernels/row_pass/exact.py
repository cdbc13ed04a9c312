"""Divergence, statistics and logit gradient of full rows in torch, exact in every case: any dtype
and device, infinite logits, teacher near or far. The gradients (8) to (10) of `reference`, written
out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels.maths import log_mean_exp, log_mixture, log_mixture_from, weighted_excess
from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass.result import exact_rows


def exact_rows_(
    s: Tensor, t: Tensor, d: Tensor, problem: Problem, gradient: bool, target_ids: Tensor | None
) -> Tensor:
    """`RowResult.values` of a block, few rows at a time; the gradient replaces s."""
    options, parts = problem.options, []
    height = exact_rows(len(s))
    for start in range(0, len(s), height):
        part = slice(start, start + height)
        statistics: tuple[Tensor, ...] = ()
        if options.return_stats:
            targets = None if target_ids is None else target_ids[part]
            statistics = statistics_of_logits(s[part], t[part], targets)
        dz, kind = s[part] if gradient else None, options.divergence
        value = divergence_and_gradient(s[part], t[part], d[part], kind, options.beta, dz)
        parts.append(torch.stack([value, *statistics]))
    return torch.cat(parts, 1)


def statistics_of_logits(
    s_BV: Tensor, t_BV: Tensor, target_ids_B: Tensor | None
) -> tuple[Tensor, ...]:
    """The rows of `Stat` after the divergence, each [B]."""
    logsumexps, entropies = [], []
    for logits in (s_BV, t_BV):
        logsumexps.append(torch.logsumexp(logits, 1))
        log_q = logits - logsumexps[-1][:, None]
        # Where q is 0, so is q·log q.
        terms = (log_q * log_q.exp()).masked_fill_(torch.isneginf(log_q), 0.0)
        entropies.append(-terms.sum(1))
    # The student's most likely token is (one of) the teacher's.
    at_peak = t_BV.gather(1, s_BV.argmax(1, keepdim=True)).squeeze(1)
    statistics = (*logsumexps, *entropies, (at_peak == t_BV.amax(1)).to(s_BV.dtype))
    if target_ids_B is None:
        return statistics
    logprobs = (
        logits.gather(1, target_ids_B[:, None]).squeeze(1) - lse
        for logits, lse in zip((s_BV, t_BV), logsumexps, strict=True)
    )
    return (*statistics, *logprobs)


class _Centred(NamedTuple):
    """All that the divergences need of a block; F are the columns where both logits are finite."""

    outside: Tensor
    """Shape [B, V]: not in F."""
    only_student: Tensor
    """Shape [B, V]: the teacher's logit alone is −inf."""
    only_teacher: Tensor
    log_q: Tensor
    """Shape [B, V]: the student's log-probabilities over F, −inf elsewhere."""
    q: Tensor
    c: Tensor
    """Shape [B, V]: t − s less its mean over F, 0 elsewhere."""
    kl: Tensor
    """Shape [B, 1]: log E_q[e^c] over F."""
    outside_p: Tensor
    """Shape [B, 1]: the teacher's mass outside of F."""


def divergence_and_gradient(
    s: Tensor, t: Tensor, d: Tensor, divergence: str, beta: float, dz: Tensor | None
) -> Tensor:
    """Value [B]; the gradient with respect to s goes to `dz` [B, V], which may be s itself."""
    block = _centred(s, t, d)
    if divergence == "reverse_kl":
        return _reverse_kl(block, dz)
    return _other_divergence(block, s, t, None if divergence == "forward_kl" else beta, dz)


def _centred(s: Tensor, t: Tensor, d: Tensor) -> _Centred:
    """Eqs. (2) and (3) over F."""
    no_student, no_teacher = torch.isneginf(s), torch.isneginf(t)
    outside = no_student | no_teacher
    only_student, only_teacher = no_teacher & ~no_student, no_student & ~no_teacher
    log_q = torch.log_softmax(s.masked_fill(outside, -math.inf), 1)
    q = log_q.exp()
    c = d.masked_fill(outside, 0.0)
    for _ in range(2):  # the second mean removes the rounding error of the first
        c = (c - (q * c).sum(1, keepdim=True)).masked_fill_(outside, 0.0)
    outside_p = torch.where(only_teacher, torch.softmax(t, 1), 0.0).sum(1, keepdim=True)
    kl = log_mean_exp(log_q, c, outside)
    return _Centred(outside, only_student, only_teacher, log_q, q, c, kl, outside_p)


def _reverse_kl(block: _Centred, dz: Tensor | None) -> Tensor:
    """L − log(1 − P_out), infinite where the student has mass that the teacher excludes; (8)."""
    value = (block.kl - torch.log1p(-block.outside_p)).squeeze(1)
    if dz is not None:
        torch.mul(block.q, block.c, out=dz).neg_()
    return value + _infinite(block.only_student)


def _other_divergence(
    block: _Centred, s: Tensor, t: Tensor, beta: float | None, dz: Tensor | None
) -> Tensor:
    """The divergences whose integrand is made of log(p/q): forward KL where `beta` is None, else
    the JSD."""
    only_student, outside_p = block.only_student, block.outside_p
    # Over all columns: q and Q_out; then log q, log p and r = log(p/q) on F (4).
    full_q = torch.softmax(s, 1)
    outside_q = torch.where(only_student, full_q, 0.0).sum(1, keepdim=True)
    log_share_p, log_share_q = torch.log1p(-outside_p), torch.log1p(-outside_q)
    log_q = block.log_q + log_share_q
    log_p = torch.log_softmax(t, 1).masked_fill_(block.outside, -math.inf)
    r = (block.c - block.kl + log_share_p - log_share_q).masked_fill_(block.outside, 0.0)

    if beta is None:
        value = weighted_excess(log_p, -r, log_q).sum(1) + outside_q.squeeze(1)  # (5)
        if dz is not None:
            near = -full_q * torch.expm1(r.clamp(max=1))  # (9); far apart by subtraction
            torch.where(r > 1, full_q - log_p.exp(), near, out=dz)
            torch.where(only_student, full_q, dz, out=dz)
        return value + _infinite(block.only_teacher)

    # (6) and (7), each outside of F a constant times its mass.
    a, b = log_mixture(r, beta), log_mixture(-r, 1 - beta)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    from_student = weighted_excess(log_q, a, log_m).sum(1, keepdim=True)
    from_teacher = weighted_excess(log_p, b, log_m).sum(1, keepdim=True)
    value = (1 - beta) * from_student + beta * from_teacher
    value = value - (1 - beta) * math.log1p(-beta) * outside_q
    value = (value - beta * math.log(beta) * outside_p).squeeze(1)
    if dz is not None:
        # (10), a from its value at the mean of r over F (11); without a teacher r is −∞.
        c = block.c.masked_fill(only_student, -math.inf)
        a = log_mixture_from(c, log_share_p - log_share_q - block.kl, beta)
        mean = (full_q * a).sum(1, keepdim=True) / full_q.sum(1, keepdim=True)
        torch.mul(full_q, a.sub_(mean), out=dz).mul_(beta - 1)
    return value


def _infinite(excluded_BV: Tensor) -> Tensor:
    """+∞ [B] for rows of which one distribution has mass where the other has none, else 0."""
    return torch.where(excluded_BV.any(1), math.inf, 0.0)
