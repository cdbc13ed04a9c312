"""Divergence and logit gradient of full vocabulary rows, exact in every case: any dtype and device,
infinite logits, teacher near or far. The gradients (8) to (10) of `reference`, written out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opsdc_kernels.reference import excess, log_mean_exp, log_mixture, weighted_excess


def divergence_and_gradient(
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
