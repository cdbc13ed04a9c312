"""Powers of two that keep 16-bit numbers in range and cost no accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdc_kernels.problem import Options

GRADIENT_LIMIT_LOG2 = 14
"""Gradients are scaled to at most 2 to this before they are rounded; fp16 ends near 2 to the 16."""


def gradient_scale(value_N: Tensor, kl_N: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """Power of two per row that brings the logit gradient below 2**GRADIENT_LIMIT_LOG2, [N].

    The forward KL's gradient is at most min(1, sqrt(KL / 2)) (Pinsker). The others' is q c with
    E_q[c] = 0, log E_q[exp(c)] = K, K the KL from q to p or to the mixture. With psi(x) = expm1(x)
    - x, E_q[psi(c)] = expm1(K); psi(c) is at least 0.36 c^2 above -1 and 0.36 |c| below, so |q c|
    is at most 1.67 sqrt(expm1(K)) + 2.78 expm1(K); and by Jensen's inequality at most K + 1/e.
    """
    if dtype == torch.float32:
        return torch.ones_like(value_N)
    if options.divergence == "forward_kl":
        bound = (value_N / 2).sqrt().clamp(max=1)
    else:
        K = kl_N if options.divergence == "reverse_kl" else value_N / (1 - options.beta)
        excess = torch.expm1(K.clamp(max=20))
        bound = torch.minimum(1.67 * excess.sqrt() + 2.78 * excess, K + 0.37)
    exponent = GRADIENT_LIMIT_LOG2 - torch.frexp(bound.nan_to_num(1.0)).exponent
    return power_of_two(exponent.clamp(max=100))


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent, exactly, in fp32, within its normal range."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
