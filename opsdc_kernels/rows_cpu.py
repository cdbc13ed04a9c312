"""The reverse-KL row pass for a block that stays in a CPU's cache: few passes, each in place.

Numbers in brackets are the equations of `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdc_kernels.reference import excess, log_mean_exp

ROUNDING = 2.0**-23
VALUE_TOLERANCE = 5e-6


def reverse_kl_rows_(s_BV: Tensor, d_BV: Tensor, gradient: bool) -> Tensor | None:
    """KL(q‖p) [B] from s and d = t − s, both consumed; with `gradient`, q·c replaces s.

    None, with both untouched, if a logit is infinite or NaN.
    """
    q = torch.softmax(s_BV, 1)
    mean = torch.linalg.vecdot(q, d_BV)
    if not torch.isfinite(mean).all():
        return None
    c = d_BV.sub_(mean[:, None])
    terms = torch.expm1(c).sub_(c)
    value = torch.linalg.vecdot(q, terms).log1p_()
    # Each term carries a rounding error of ROUNDING·c; where that, summed in quadrature over q,
    # shows in the value, or where e^c overflows, take the exact and slower forms.
    far = ~(value <= 1)
    if far.any():
        value[far] = _log_mean_exp(s_BV[far], c[far])
    # q·(c − E_q[c]) in one pass; the mean is 0 but for rounding.
    weighted = s_BV if gradient else terms
    torch.ops.aten._softmax_backward_data(c, q, 1, c.dtype, grad_input=weighted)
    noise = torch.linalg.vector_norm(weighted, dim=1).mul_(ROUNDING)
    near = ~(noise <= VALUE_TOLERANCE * value)
    if near.any():
        value[near] = torch.linalg.vecdot(q[near], excess(c[near])).log1p_()
    return value


def _log_mean_exp(s: Tensor, c: Tensor) -> Tensor:
    outside = torch.zeros_like(c, dtype=torch.bool)
    return log_mean_exp(torch.log_softmax(s, 1), c, outside).squeeze(1)
