r"""The mathematics, eager, in any dtype: the definition of correct. Materializes [N, V] logits.

Per token, with student logits s and distribution q = softmax(s), teacher logits t and p =
softmax(t)::

    z = softcap(scale · (h·Wᵀ + b)) / temperature,   softcap(x) = cap · tanh(x / cap)          (1)

    d = t − s,   c = d − E_q[d],   f(x) = e^x − 1 − x ≥ 0                                      (2)
    KL(q‖p) = log E_q[e^d] − E_q[d] = log1p(E_q[f(c)])                 =: L                    (3)
    r = log(p/q) = c − L                                                                       (4)
    KL(p‖q) = E_p[f(−r)]                                                                       (5)
    m̄ = (1−β)·q + β·p,   a = log(m̄/q) = log1p(β·(e^r − 1)),
                         b = log(m̄/p) = log1p((1−β)·(e^−r − 1))                             (6)
    JSD = (1−β)·KL(q‖m̄) + β·KL(p‖m̄) = (1−β)·E_q[f(a)] + β·E_p[f(b)]                          (7)

(3), (5) and (7) equal the textbook sums because E_q[c] = 0 and E_q[e^r] = E_p[e^−r] = E_q[e^a] =
E_p[e^b] = 1. Every term is ≥ 0: nothing cancels, no divergence can be negative, and each keeps full
relative accuracy however close teacher and student are. The textbook Σ q·(log q − log p) does not:
in float64 it is wrong below a KL of about 1e-10.

Gradients with respect to the student's logits (the row passes write them out, this file leaves them
to autograd, so that each checks the other)::

    reverse KL   −q·c                                                                          (8)
    forward KL   q − p = −q·(e^r − 1)                                                          (9)
    JSD          −(1−β)·q·(a − E_q[a])                                                        (10)
    a − a₀ = log1p(w·(e^(r−r₀) − 1)),   w = β·e^r₀ / ((1−β) + β·e^r₀)                          (11)

In (10) any constant may be taken off a. Where student and teacher are sure of different tokens, a
is log(1−β) in nearly all of the student's mass, and hides what a − E_q[a] is there. So the passes
measure a by (11) from its value a₀ at a typical log-ratio r₀: the mean one (r − r₀ = c), or that at
the student's peak. They take the mean of these very numbers.

The teacher is a constant, with a shared head too: W receives the gradient of s alone.

Infinite logits (a masked vocabulary). −inf on both sides: the column does not exist. On one side
only, with F the columns where both are finite, q_F and p_F the distributions renormalized over F,
Q_out the student's and P_out the teacher's mass outside F: (2) to (4) hold over F for q_F and
p_F, and log(p/q) = c − L + log(1 − P_out) − log(1 − Q_out) there.

* student −inf: reverse KL is L − log(1 − P_out), forward KL is +inf, the JSD gains −β·P_out·log β.
* teacher −inf: reverse KL is +inf, forward KL gains Q_out, the JSD gains −(1−β)·Q_out·log(1−β).
* gradients stay finite: (8) becomes −q_F·c on F and 0 elsewhere, (9) and (10) stay as they are,
  and nothing flows through an infinite student logit.

Sources: the reverse KL over the full vocabulary is the objective of on-policy distillation (Gu et
    al., MiniLLM, arXiv:2306.08543; Agarwal et al., GKD, arXiv:2306.13649, also for JSD(β)); (3) is
    the cumulant form of KL for exponential families, written with a positive integrand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opsdc_kernels.problem import Problem, named, reduce_tokens


def reference_divergence(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, all by autograd, and if asked for the tensors of `DivergenceStats`.

    The one backend that can be differentiated twice.
    """
    options, n_tokens = problem.options, problem.student_hidden.shape[0]
    kept = problem.kept_tokens()
    student_ND, teacher_NE = problem.student_hidden, problem.teacher_hidden
    if kept is not None:
        student_ND, teacher_NE = student_ND[kept], teacher_NE[kept]
    s_NV, t_NV, d_NV = logits_and_difference(problem, student_ND, teacher_NE)
    per_token = divergence_of_logits(s_NV, t_NV, d_NV, options.divergence, options.beta)

    def of_all(x_K: Tensor) -> Tensor:
        return x_K if kept is None else x_K.new_zeros(n_tokens).index_put((kept,), x_K)

    loss = reduce_tokens(of_all(per_token), problem.token_weight, options.reduction)
    if not options.return_stats:
        return loss, {}
    with torch.no_grad():
        targets = problem.target_ids
        if targets is not None and kept is not None:
            targets = targets[kept]
        statistics = statistics_of_logits(s_NV, t_NV, targets)
        return loss, named(torch.stack([of_all(x) for x in (per_token, *statistics)]))


def logits_and_difference(
    problem: Problem, student_ND: Tensor, teacher_NE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (s, t, t − s), each [N, K] in the statistics' dtype, transformed by eq. (1)."""
    options, dtype, size = problem.options, problem.dtype, problem.vocab_size
    temperature = options.temperature

    def uncapped(hidden: Tensor, weight: Tensor, bias: Tensor | None, side: int) -> Tensor:
        x = hidden.to(dtype) @ weight[:size].to(dtype).T
        return (x if bias is None else x + bias[:size].to(dtype)) * options.logit_scale[side]

    def logits(x: Tensor, side: int) -> Tensor:
        cap = options.logit_softcap[side]
        return (x if cap is None else cap * torch.tanh(x / cap)) / temperature

    weight = problem.student_weight
    x_s = uncapped(student_ND, weight, problem.student_bias, 0)
    s = logits(x_s, 0)
    with torch.no_grad():
        if problem.shared_logits:
            # Forward AD knows no `no_grad`: tangents end where gradients do.
            student_ND, weight, x_s = student_ND.detach(), weight.detach(), x_s.detach()
            delta = uncapped(teacher_NE.to(dtype) - student_ND.to(dtype), weight, None, 0)
            x_t = x_s + delta
            t = logits(x_t, 0)
            d = delta / temperature
            if (cap := options.logit_softcap[0]) is not None:
                # tanh(A) − tanh(B) = tanh(A − B)·(1 − tanh(A)·tanh(B)): no cancellation.
                both = torch.tanh(x_s / cap) * torch.tanh(x_t / cap)
                d = cap / temperature * torch.tanh(delta / cap) * (1 - both)
        else:
            other_weight = weight if problem.teacher_weight is None else problem.teacher_weight
            t = logits(uncapped(teacher_NE, other_weight.detach(), problem.side(1).bias, 1), 1)
            d = t - s.detach()
    # The value of d is exact; its derivative is that of −s.
    return s, t, d - (s - s.detach())


def divergence_of_logits(
    s_NV: Tensor, t_NV: Tensor, d_NV: Tensor, divergence: str, beta: float
) -> Tensor:
    """Per-token divergence [N] by eqs. (2) to (7), differentiable in s."""
    no_student, no_teacher = torch.isneginf(s_NV), torch.isneginf(t_NV)
    outside = no_student | no_teacher
    only_student, only_teacher = no_teacher & ~no_student, no_student & ~no_teacher
    log_q = torch.log_softmax(s_NV.masked_fill(outside, -math.inf), dim=1)
    log_q = log_q.masked_fill(outside, -math.inf)
    q = log_q.exp()
    d = d_NV.masked_fill(outside, 0.0)
    mean = (q * d).sum(1, keepdim=True)
    c = (d - mean).masked_fill(outside, 0.0)
    c = (c - (q * c).sum(1, keepdim=True)).masked_fill(outside, 0.0)
    inner = log_mean_exp(log_q, c, outside)
    mass_t = torch.log_softmax(t_NV, dim=1).exp()
    outside_p = torch.where(only_teacher, mass_t, 0.0).sum(1, keepdim=True)
    log_share_p = torch.log1p(-outside_p)
    infinite = torch.full((), math.inf, dtype=s_NV.dtype, device=s_NV.device)
    if divergence == "reverse_kl":
        value = (inner - log_share_p).squeeze(1)
        return value + torch.where(only_student.any(1), infinite, 0.0)
    outside_q = torch.where(only_student, torch.log_softmax(s_NV, dim=1).exp(), 0.0)
    outside_q = outside_q.sum(1, keepdim=True)
    log_q = log_q + torch.log1p(-outside_q)
    r = (c - inner + log_share_p - torch.log1p(-outside_q)).masked_fill(outside, 0.0)
    log_p = torch.log_softmax(t_NV, 1).masked_fill(outside, -math.inf)
    if divergence == "forward_kl":
        value = weighted_excess(log_p, -r, log_q).sum(1) + outside_q.squeeze(1)
        # P_out·(−log q) is infinite, but what it adds to the gradient is not: P_out·q.
        normalizer = torch.logsumexp(s_NV, 1)
        value = value + outside_p.squeeze(1) * (normalizer - normalizer.detach())
        return value + torch.where(only_teacher.any(1), infinite, 0.0)
    a, b = log_mixture(r, beta), log_mixture(-r, 1 - beta)
    log_m = torch.logaddexp(
        log_q.masked_fill(outside, 0.0) + math.log1p(-beta),
        log_p.masked_fill(outside, 0.0) + math.log(beta),
    )
    inside = (1 - beta) * weighted_excess(log_q, a, log_m)
    inside = (inside + beta * weighted_excess(log_p, b, log_m)).sum(1)
    inside = inside - (1 - beta) * math.log1p(-beta) * outside_q.squeeze(1)
    return inside - beta * math.log(beta) * outside_p.squeeze(1)


def log_mean_exp(log_q: Tensor, c: Tensor, outside: Tensor) -> Tensor:
    """L = log E_q[e^c] for centred c, [N, 1]: eq. (3) where small, logsumexp where above 1."""
    tilted = (log_q + c).masked_fill(outside, -math.inf)
    # log_q is normalized but for the rounding of a long sum, which logsumexp does not share.
    normalizer = torch.logsumexp(log_q, 1, keepdim=True)
    by_logsumexp = torch.logsumexp(tilted, 1, keepdim=True) - normalizer
    large = by_logsumexp > 1
    c = torch.where(large, 0.0, c)
    terms = weighted_excess(log_q, c, log_q + c)
    return torch.where(large, by_logsumexp, torch.log1p(terms.sum(1, keepdim=True)))


def weighted_excess(log_w: Tensor, x: Tensor, log_wx: Tensor) -> Tensor:
    """w·f(x), f(x) = e^x − 1 − x; `log_wx`, the logarithm of w·e^x, serves where e^x overflows."""
    w = log_w.exp()
    above = x > 1
    direct = torch.where(above, log_wx, 0.0).exp() - w * (1 + torch.where(above, x, 0.0))
    return torch.where(above, direct, w * excess(torch.where(above, 0.0, x)))


def excess(x: Tensor) -> Tensor:
    """f(x) = e^x − 1 − x to full relative accuracy, by its series where |x| < 0.3."""
    near = x.abs() < 0.3
    y = torch.where(near, x, 0.0)
    series = torch.ones_like(y)
    for k in range(13, 2, -1):
        series = 1 + y * series / k
    series = series / 2
    return torch.where(near, y * y * series, torch.expm1(torch.where(near, 0.0, x)) - x)


def log_mixture(r: Tensor, beta: float) -> Tensor:
    """a = log((1−β) + β·e^r), eq. (6)."""
    above = r > 1
    near = torch.log1p(beta * torch.expm1(torch.where(above, 0.0, r)))
    far = torch.where(above, r, 0.0) + math.log(beta)
    far = torch.logaddexp(torch.full_like(far, math.log1p(-beta)), far)
    return torch.where(above, far, near)


def statistics_of_logits(
    s_NV: Tensor, t_NV: Tensor, target_ids_N: Tensor | None
) -> tuple[Tensor, ...]:
    """Log-normalizers, entropies, agreement and, with targets, log-probabilities, each [N]."""
    lse_s, lse_t = torch.logsumexp(s_NV, 1), torch.logsumexp(t_NV, 1)

    def entropy(logits: Tensor, lse: Tensor) -> Tensor:
        log_q = logits - lse[:, None]
        return -torch.where(torch.isneginf(log_q), 0.0, log_q * log_q.exp()).sum(1)

    # The student's most likely token is (one of) the teacher's.
    at_peak = t_NV.gather(1, s_NV.argmax(1, keepdim=True)) == t_NV.amax(1, keepdim=True)
    agreement = at_peak.to(s_NV.dtype).squeeze(1)
    statistics = (lse_s, lse_t, entropy(s_NV, lse_s), entropy(t_NV, lse_t), agreement)
    if target_ids_N is None:
        return statistics
    at = target_ids_N[:, None]
    return (
        *statistics,
        s_NV.gather(1, at).squeeze(1) - lse_s,
        t_NV.gather(1, at).squeeze(1) - lse_t,
    )
