"""The row pass in torch for a block that stays in a CPU's cache: few passes over it, most of them
in place. Without it a call without a C compiler takes 2 to 5 times as long.

Every logit must be finite; a block with infinite ones goes to `exact`, and so do single rows
for which the shorter formulas here would lose accuracy. Numbers in brackets are the equations of
`reference`. One heavy function (expm1) for the reverse KL, two for the forward KL, three for JSD.
Block-sized results go to buffers allocated once: fresh pages cost more than the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels.maths import log_mean_exp
from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass.exact import divergence_and_gradient
from opsdc_kernels.row_pass.result import RowResult, exact_rows

SERIES_RANGE = 0.3
"""|x| below which e^x − 1 − x is summed as a series, if expm1(x) − x would be too coarse."""
NOISE_LIMIT = 40.0
"""Rounding noise allowed in a value, in units of the dtype's eps: 5e-6 in fp32."""
NEVER_COARSE = 4 / NOISE_LIMIT**2
"""‖q·c‖² ≤ E_q[c²] ≤ 2.7·KL over the columns where |c| < 1; above this KL no noise gets there."""
SYMMETRIC_LIMIT = 30.0
"""KL(q‖p) + KL(p‖q) above which e^r may overflow and differences of KLs lose digits."""


class Block(NamedTuple):
    """All that the divergences need of a block."""

    q: Tensor
    """Shape [B, V]."""
    c: Tensor
    """Shape [B, V], in the buffer of d."""
    weighted: Tensor
    """q·c [B, V] where it was asked for, else free."""
    x: Tensor
    """Shape [B, V], free, as y and z."""
    y: Tensor
    z: Tensor
    total: Tensor
    """Σ q [B]: softmax sums long rows with an error of 1e-6."""
    mean: Tensor
    """E_q[d] [B]."""
    kl: Tensor
    """KL(q‖p) [B]."""
    coarse: Tensor
    """Shape [B]: expm1(c) − c is too coarse for this row's value."""


def fast_rows_(
    s_BV: Tensor,
    d_BV: Tensor,
    problem: Problem,
    *,
    gradient: bool,
    target_ids_B: Tensor | None,
    free: list[Tensor],
) -> RowResult | None:
    """Turn s and d = t − s into values, and s into the gradient; None, with both untouched, if a
    logit is infinite or NaN.

    The result's factor is sign and β over Σ q, which torch's softmax misses 1 by (4e-5 at V
    151,936). `free`: five buffers [B, V] to write to.
    """
    kind, beta = problem.options.divergence, problem.options.beta
    statistics, reverse = problem.options.return_stats, kind == "reverse_kl"
    q, weighted, *free = free
    in_place = reverse and gradient and not statistics  # else s is still needed
    weighted = s_BV if in_place else weighted
    block = _centred(s_BV, d_BV, q, weighted, free, needs_weighted=reverse and gradient)
    if block is None:
        return None
    # Statistics first: what follows overwrites c and the free buffers.
    others = _statistics(s_BV, block, target_ids_B) if statistics else ()
    if reverse:
        value, dz, factor = block.kl, block.weighted, -1 / block.total
    else:
        if kind == "forward_kl":
            value, dz, doubtful, factor = (*_forward_kl(block), -1 / block.total)
        else:
            value, dz, doubtful, factor = (*_jsd(block, beta), (beta - 1) / block.total)
        for rows in few_at_once(doubtful):
            s, c = s_BV[rows], block.c[rows]
            # A shift of all logits of a row changes nothing, so c may stand for d, and s + c for t.
            value[rows] = divergence_and_gradient(s, s + c, c, kind, beta, s)
            dz[rows] = s.div_(factor[rows, None])
    if gradient and not in_place:
        s_BV.copy_(dz)
    return RowResult(torch.stack([value, *others]), factor)


def _centred(
    s: Tensor, d: Tensor, q: Tensor, weighted: Tensor, free: list[Tensor], *, needs_weighted: bool
) -> Block | None:
    """Eqs. (2) and (3): c replaces d."""
    x, y, z = free
    # q, the mean of d, and KL(q‖p) from the excess of c = d less its mean.
    torch.softmax(s, 1, out=q)
    total = q.sum(1)
    mean = _dot(q, d, x).div_(total)
    if not torch.isfinite(mean).all():
        return None
    c = d.sub_(mean[:, None])
    terms = torch.expm1(c, out=x).sub_(c)
    kl = _dot(q, terms, x).div_(total).log1p_()
    far = ~(kl <= 1)  # NaN too: where e^c overflows and q underflows, however small the KL
    for rows in few_at_once(far):
        kl[rows] = _log_mean_exp(s[rows], q[rows], c[rows])
    # Rows whose value is so small that expm1(c) − c is too coarse get it from a series.
    coarse = (kl < NEVER_COARSE) & ~far
    if needs_weighted or coarse.any():
        # q·(c − E_q[c]) in one pass; that mean is 0 but for rounding.
        torch.ops.aten._softmax_backward_data(c, q, 1, c.dtype, grad_input=weighted)
    if coarse.any():
        # Each term of the value carries a rounding error of eps·c: in quadrature over q, eps·‖q·c‖.
        coarse &= torch.linalg.vector_norm(weighted, dim=1) > NOISE_LIMIT * kl
        for rows in few_at_once(coarse):
            kl[rows] = _mean_excess(q[rows], c[rows], None).log1p_()
    return Block(q, c, weighted, x, y, z, total, mean, kl, coarse)


def few_at_once(chosen_B: Tensor) -> tuple[Tensor, ...]:
    """Indices of the chosen rows in parts so small that passes which allocate take little."""
    rows = chosen_B.nonzero().squeeze(1)
    return rows.split(exact_rows(len(chosen_B))) if len(rows) else ()


def _dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Σ_v a·b [B]; overwrites `out` [B, V]."""
    return torch.mul(a, b, out=out).sum(1)


def _log_mean_exp(s: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """log E_q[e^c] where e^c may overflow, or where a rest of E_q[c] would show."""
    c = c - (torch.linalg.vecdot(q, c) / q.sum(1))[:, None]
    none = torch.zeros_like(c, dtype=torch.bool)
    return log_mean_exp(torch.log_softmax(s, 1), c, none).squeeze(1)


def _mean_excess(q: Tensor, x: Tensor, expm1_x: Tensor | None) -> Tensor:
    """E_q[f(x)], f(x) = e^x − 1 − x by its series near 0."""
    near = x.clamp(-SERIES_RANGE, SERIES_RANGE)
    order = 14 if x.dtype == torch.float64 else 8
    series = torch.full_like(near, 1 / order)
    for k in range(order - 1, 2, -1):
        series.mul_(near).add_(1).div_(k)
    series.mul_(near).add_(1).mul_(near).mul_(near).div_(2)
    direct = (torch.expm1(x) if expm1_x is None else expm1_x) - x
    return torch.linalg.vecdot(q, torch.where(near == x, series, direct)) / q.sum(1)


def _forward_kl(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """(value, p − q, rows in doubt) by KL(p‖q) = Σ (p − q)·r − KL(q‖p), eqs. (4) and (9)."""
    difference, symmetric = _symmetric(block)
    value = symmetric - block.kl
    return value, difference, ~((value >= symmetric / 16) & (symmetric < SYMMETRIC_LIMIT))


def _symmetric(block: Block) -> tuple[Tensor, Tensor]:
    """p − q = q·(e^r − 1) [B, V], in the buffer of q·c, and KL(q‖p) + KL(p‖q) = Σ (p − q)·r [B].

    c becomes r; e^r − 1 stays in `block.x`.
    """
    r = block.c.sub_(block.kl[:, None])
    torch.expm1(r, out=block.x)
    difference = torch.mul(block.q, block.x, out=block.weighted)
    return difference, _dot(difference, r, block.y).div_(block.total)


def _jsd(block: Block, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(value, q·(a − E_q[a]), rows in doubt), eqs. (6) and (10), by
    JSD = β·KL(p‖q) − KL(m̄‖q), KL(m̄‖q) = Σ (m̄ − q)·a − KL(q‖m̄), (m̄ − q) = β·(p − q)."""
    difference, symmetric = _symmetric(block)
    # a = log(m̄/q) from y = β·(e^r − 1), and both KLs of the mixture.
    y = block.x.mul_(beta)
    a = torch.log1p(y, out=block.y)
    from_mixture = _dot(difference, a, block.z).mul_(beta).div_(block.total)
    to_mixture = _dot(block.q, torch.sub(y, a, out=block.z), block.z).div_(block.total)
    for rows in few_at_once(block.coarse):
        to_mixture[rows] = _mean_excess(block.q[rows], a[rows], y[rows])
    value = beta * (symmetric - block.kl) - (from_mixture - to_mixture)
    size = _dot(block.q, a, block.z).abs_()
    dz = torch.ops.aten._softmax_backward_data(a, block.q, 1, a.dtype, grad_input=block.z)
    # a − E_q[a] carries a rounding error of eps·|E_q[a]|, much where a hardly differs from it.
    settled = size > NOISE_LIMIT * torch.linalg.vector_norm(dz, dim=1)
    doubtful = ~((value >= symmetric * beta / 64) & (symmetric < SYMMETRIC_LIMIT)) | settled
    return value, dz, doubtful


def _statistics(s: Tensor, block: Block, target_ids: Tensor | None) -> tuple[Tensor, ...]:
    """The same as `exact.statistics_of_logits`, from what is there already."""
    t = torch.add(s, block.c, out=block.y)  # up to the shift `mean`
    peak_s, at = s.max(1, keepdim=True)
    peak_t = t.amax(1, keepdim=True)
    agreement = (t.gather(1, at) == peak_t).to(s.dtype).squeeze(1)
    # With z measured from its peak, entropy = log Σ e^z − E[z] is a sum of two terms ≥ 0.
    below_s = torch.sub(s, peak_s, out=block.x)
    excess_s = -(block.q.gather(1, at).squeeze(1) / block.total).log_()
    entropy_s = excess_s - _dot(block.q, below_s, block.x).div_(block.total)
    below_t = torch.sub(t, peak_t, out=block.x)
    p = torch.softmax(below_t, 1, out=block.z)
    total_t = p.sum(1)
    excess_t = -(p.amax(1) / total_t).log_()
    entropy_t = excess_t - _dot(p, below_t, block.x).div_(total_t)
    lse_s = peak_s.squeeze(1) + excess_s
    lse_t = lse_s + block.kl  # of the shifted t
    statistics = (lse_s, lse_t + block.mean, entropy_s, entropy_t, agreement)
    if target_ids is None:
        return statistics
    target = target_ids[:, None]
    return (
        *statistics,
        s.gather(1, target).squeeze(1) - lse_s,
        t.gather(1, target).squeeze(1) - lse_t,
    )
