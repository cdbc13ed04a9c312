"""The formulas that several passes share, with the letters and equations of `reference`.

They are written a second time on purpose: `reference` judges the passes, so nothing that it judges
may come from it. No gradient flows here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

SERIES_BELOW = 0.3
"""Below this |x| the difference expm1(x) − x has lost too many digits."""
SERIES_TERMS = 13


def excess(x: Tensor) -> Tensor:
    """f(x) = e^x − 1 − x (2) to full relative accuracy."""
    series = torch.ones_like(x)
    for k in range(SERIES_TERMS, 2, -1):
        series.mul_(x).div_(k).add_(1)
    series.div_(2)
    return torch.where(x.abs() < SERIES_BELOW, x * x * series, torch.expm1(x) - x)


def weighted_excess(log_w: Tensor, x: Tensor, log_wx: Tensor) -> Tensor:
    """w·f(x); `log_wx`, the logarithm of w·e^x, serves where e^x alone could overflow."""
    w = log_w.exp()
    return torch.where(x > 1, log_wx.exp() - w * (1 + x), w * excess(x))


def log_mean_exp(log_q: Tensor, c: Tensor, outside: Tensor) -> Tensor:
    """L = log E_q[e^c] (3) for centred c, [N, 1]: by its excess where small, else by logsumexp."""
    tilted = torch.logsumexp((log_q + c).masked_fill_(outside, -math.inf), 1, keepdim=True)
    # log_q is normalized but for the rounding of a long sum, which logsumexp does not share.
    far = tilted - torch.logsumexp(log_q, 1, keepdim=True)
    near = weighted_excess(log_q, c, log_q + c).sum(1, keepdim=True).log1p_()
    return torch.where(far > 1, far, near)


def log_mixture(r: Tensor, beta: float) -> Tensor:
    """a = log((1−β) + β·e^r) (6)."""
    far = torch.logaddexp(torch.full_like(r, math.log1p(-beta)), r + math.log(beta))
    return torch.where(r > 1, far, torch.expm1(r).mul_(beta).log1p_())


def log_mixture_from(x: Tensor, r0: Tensor, beta: float) -> Tensor:
    """The same less its value at the log-ratio `r0` [N, 1], at x = r − r0 (11)."""
    log_odds = r0 + (math.log(beta) - math.log1p(-beta))
    log_w = logsigmoid(log_odds)
    near = torch.expm1(x.clamp(max=1)).mul_(log_w.exp()).log1p_()
    return torch.where(x > 1, torch.logaddexp(logsigmoid(-log_odds), log_w + x), near)


def capped(x: Tensor, cap: float | None, temperature: float) -> Tensor:
    """Soft-cap and temperature of (1); in place where there is no cap."""
    x = x if cap is None else torch.tanh(x / cap).mul_(cap)
    return x if temperature == 1.0 else x.div_(temperature)


def slope_of(x: Tensor, cap: float) -> Tensor:
    """The derivative of the soft-cap."""
    return torch.cosh(x / cap).pow_(-2)
