"""Per-row divergence, statistics and logit gradient of a block of full vocabulary rows, in torch.

The equations are numbered in `reference`; here the gradients (8) to (10) are written out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels.problem import Problem
from opsdc_kernels.reference import (
    excess,
    log_mean_exp,
    log_mixture,
    statistics_of_logits,
    weighted_excess,
)
from opsdc_kernels.rows_cpu import reverse_kl_rows_


class Rows(NamedTuple):
    """What a block of rows gives; the gradient replaces the student's logits in their buffer."""

    divergence: Tensor
    """[B]"""
    factor: Tensor
    """[B]: the gradient with respect to hidden · weightᵀ is the buffer times this."""
    statistics: tuple[Tensor, ...] | None
    """[B] each, in the order of `DivergenceStats` after the divergence."""


def divergence_rows_(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    *,
    gradient: bool,
    target_ids_B: Tensor | None = None,
) -> Rows:
    """Consumes raw products: student_BV = h·Wᵀ and other_BV = the teacher's h·Wᵀ, or, where
    `problem.shared_logits`, (teacher hidden − student hidden)·Wᵀ. Both buffers are overwritten.
    """
    s, t, d, slope = _transform_(student_BV, other_BV, problem)
    statistics = None
    if problem.return_stats:
        t = s + d if t is None else t
        statistics = statistics_of_logits(s, t, target_ids_B)
    value = None
    sign = 1.0
    if problem.divergence == "reverse_kl" and s.device.type == "cpu":
        value = reverse_kl_rows_(s, d, gradient)
        sign = -1.0
    if value is None:
        sign = 1.0
        t = s + d if t is None else t
        dz = s if gradient else None
        value = _divergence_and_gradient(s, t, d, problem.divergence, problem.beta, dz)
    if gradient and slope is not None:
        s.mul_(slope)
    if gradient and s is not student_BV:
        student_BV.copy_(s)
    factor = torch.full_like(value, sign * problem.logit_factor)
    return Rows(value, factor, statistics)


def _transform_(
    x: Tensor, other: Tensor, problem: Problem
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(s, t, t − s, ds/dx up to scale/temperature) of eq. (1); t is None where s + d gives it."""
    size, temperature = problem.vocab_size, problem.temperature
    (scale, other_scale), (cap, other_cap) = problem.logit_scale, problem.logit_softcap

    def affine_(x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        if bias is not None:
            x.add_(bias[:size])
        return x if scale == 1.0 else x.mul_(scale)

    def capped(x: Tensor, cap: float | None) -> Tensor:
        x = x if cap is None else torch.tanh(x / cap).mul_(cap)
        return x if temperature == 1.0 else x.div_(temperature)

    affine_(x, problem.student_bias, scale)
    slope = None if cap is None else torch.cosh(x / cap).pow_(-2)
    s = capped(x, cap)
    if not problem.shared_logits:
        t = capped(affine_(other, problem.teacher_bias, other_scale), other_cap)
        return s, t, t - s, slope
    delta = affine_(other, None, scale)
    if cap is None:
        d = delta if temperature == 1.0 else delta.div_(temperature)
        return s, None, d, slope
    x_t = x + delta
    both = torch.tanh(x / cap) * torch.tanh(x_t / cap)
    d = torch.tanh(delta / cap).mul_(cap / temperature).mul_(1 - both)
    return s, capped(x_t, cap), d, slope


def _divergence_and_gradient(
    s: Tensor, t: Tensor, d: Tensor, divergence: str, beta: float, dz: Tensor | None
) -> Tensor:
    """Value [B]; the gradient with respect to s goes to `dz` [B, V], which may be s itself."""
    no_student, no_teacher = torch.isneginf(s), torch.isneginf(t)
    outside = no_student | no_teacher
    only_student, only_teacher = no_teacher & ~no_student, no_student & ~no_teacher
    log_q = torch.log_softmax(s.masked_fill(outside, -math.inf), 1)
    q = log_q.exp()
    c = d.masked_fill(outside, 0.0)
    for _ in range(2):  # the second mean removes the rounding error of the first
        c = (c - (q * c).sum(1, keepdim=True)).masked_fill_(outside, 0.0)
    inner = log_mean_exp(log_q, c, outside)
    outside_p = torch.where(only_teacher, torch.softmax(t, 1), 0.0).sum(1, keepdim=True)
    log_share_p = torch.log1p(-outside_p)
    infinite = torch.full((), math.inf, dtype=s.dtype, device=s.device)

    if divergence == "reverse_kl":
        value = (inner - log_share_p).squeeze(1) + torch.where(only_student.any(1), infinite, 0.0)
        if dz is not None:
            torch.mul(q, c, out=dz).neg_()
        return value

    full_q = torch.softmax(s, 1)
    outside_q = torch.where(only_student, full_q, 0.0).sum(1, keepdim=True)
    log_share_q = torch.log1p(-outside_q)
    log_q = log_q + log_share_q
    log_p = torch.log_softmax(t, 1).masked_fill_(outside, -math.inf)
    r = (c - inner + log_share_p - log_share_q).masked_fill_(outside, 0.0)
    if divergence == "forward_kl":
        value = weighted_excess(log_p, -r, log_q).sum(1) + outside_q.squeeze(1)
        value = value + torch.where(only_teacher.any(1), infinite, 0.0)
        if dz is not None:
            near = -full_q * torch.expm1(r.clamp(max=1))
            torch.where(r > 1, full_q - log_p.exp(), near, out=dz)
            torch.where(only_student, full_q, dz, out=dz)
        return value

    a, b = log_mixture(r, beta), log_mixture(-r, 1 - beta)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    from_student = weighted_excess(log_q, a, log_m).sum(1, keepdim=True)
    from_teacher = weighted_excess(log_p, b, log_m).sum(1, keepdim=True)
    value = (1 - beta) * from_student + beta * from_teacher
    value = value - (1 - beta) * math.log1p(-beta) * outside_q
    value = (value - beta * math.log(beta) * outside_p).squeeze(1)
    if dz is None:
        return value
    a = torch.where(only_student, math.log1p(-beta), a)
    centre = from_student + torch.where(only_student, full_q * excess(a), 0.0).sum(1, keepdim=True)
    # −E_q[a] = E_q[f(a)] + β·P_out: the mixture has β·P_out of its mass where the student has none.
    torch.mul(full_q, a.add_(centre + beta * outside_p), out=dz).mul_(beta - 1)
    return value
