"""Divergences between language models from hidden states and heads, without the logits."""

from opsdc_kernels.api import DivergenceStats, linear_divergence, linear_reverse_kl
from opsdc_kernels.module import LinearDivergence, LinearReverseKL

__all__ = [
    "DivergenceStats",
    "LinearDivergence",
    "LinearReverseKL",
    "linear_divergence",
    "linear_reverse_kl",
]
