"""The reverse-KL row pass for a block that stays in a CPU's cache: few passes, each in place.

Numbers in brackets are the equations of `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdc_kernels.reference import excess

ROUNDING = 2.0**-23
VALUE_TOLERANCE = 5e-6


def reverse_kl_rows_(s_BV: Tensor, d_BV: Tensor, gradient: bool) -> Tensor | None:
    """KL(q‖p) [B] from s and d = t − s, both consumed; with `gradient`, q·c replaces s.

    None, with both untouched, if a logit is infinite or NaN.
    """
    q = torch.softmax(s_BV, 1)
    # softmax sums long rows with an error of 1e-6, which a mean that is large would spread to c.
    total = q.sum(1)
    mean = torch.linalg.vecdot(q, d_BV).div_(total)
    if not torch.isfinite(mean).all():
        return None
    c = d_BV.sub_(mean[:, None])
    terms = torch.expm1(c).sub_(c)
    value = torch.linalg.vecdot(q, terms).div_(total).log1p_()
    far = ~(value <= 1)
    if far.any():
        value[far] = _log_mean_exp(s_BV[far], q[far], c[far])
    weighted = s_BV if gradient else terms
    # q·(c − E_q[c]) in one pass; the mean is 0 but for rounding.
    torch.ops.aten._softmax_backward_data(c, q, 1, c.dtype, grad_input=weighted)
    # Each term of the value carries a rounding error of ROUNDING·c; where that, summed in
    # quadrature over q, shows in the value, the slower series replaces it.
    noise = torch.linalg.vector_norm(weighted, dim=1).mul_(ROUNDING)
    near = ~(noise <= VALUE_TOLERANCE * value)
    if near.any():
        value[near] = torch.linalg.vecdot(q[near], excess(c[near])).log1p_()
    return value


def _log_mean_exp(s: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """log E_q[e^c] where e^c may overflow, or where a rest of E_q[c] would show."""
    c = c - (torch.linalg.vecdot(q, c) / q.sum(1))[:, None]
    return torch.logsumexp(s + c, 1) - torch.logsumexp(s, 1)
