"""Elementary functions to fp32 accuracy where the textbook form cancels.

`tl.fma` is explicit because contraction is off, see `configs.ENABLE_FP_FUSION`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def psi(x):
    """expm1(x) - x without cancellation near 0."""
    series = tl.fma(x, 1.0 / 3628800, 1.0 / 362880)
    series = tl.fma(x, series, 1.0 / 40320)
    series = tl.fma(x, series, 1.0 / 5040)
    series = tl.fma(x, series, 1.0 / 720)
    series = tl.fma(x, series, 1.0 / 120)
    series = tl.fma(x, series, 1.0 / 24)
    series = tl.fma(x, series, 1.0 / 6)
    series = tl.fma(x, series, 0.5)
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1 - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + psi(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """By the atanh series near 0, where log(1 + x) has lost the digits of x."""
    s = x / (2 + x)
    y = s * s
    series = tl.fma(y, 1.0 / 13, 1.0 / 11)
    series = tl.fma(y, series, 1.0 / 9)
    series = tl.fma(y, series, 1.0 / 7)
    series = tl.fma(y, series, 1.0 / 5)
    series = tl.fma(y, series, 1.0 / 3)
    return tl.where(tl.abs(x) < 0.4, 2 * tl.fma(s * y, series, s), tl.log(1 + x))


@triton.jit
def tanh(x):
    e = expm1(-2 * tl.abs(x))
    t = -e / (2 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def log_mixture_from(x, r0, beta):
    """log(m / q) less its value where log(p / q) is r0, for any x = log(p / q) - r0. It is
    log(1 + w expm1(x)), w the share of beta p in m there."""
    log_odds = r0 + tl.log(beta / (1 - beta))
    w = 1 / (1 + tl.exp(-log_odds))
    y = x + tl.minimum(log_odds, 0.0) - log1p(tl.exp(-tl.abs(log_odds)))
    near = w * expm1(tl.minimum(x, 20.0))
    return tl.where(x < 20, 0.0, tl.maximum(y, 0.0)) + log1p(
        tl.where(x < 20, near, tl.exp(-tl.abs(y)))
    )


@triton.jit
def log_ratios_to_mixture(r, beta):
    """(log(m / q), log(m / p)) for r = log(p / q) and m = (1 - beta) q + beta p, at any r."""
    near = log1p(tl.where(r > 0, 1 - beta, beta) * expm1(-tl.abs(r)))
    return tl.maximum(r, 0.0) + near, tl.maximum(-r, 0.0) + near
