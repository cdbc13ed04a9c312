"""Which tokens of a response are trained on, where `loss.token_share` leaves some out.

Forward for all, backward for the tokens that carry the signal: the largest divergence from the
teacher, or the student's largest entropy. Published evidence: of reinforcement learning, the 20 %
of tokens of highest entropy train as well as all (Wang et al., arXiv 2506.01939); of distillation,
the student's entropy is a good choice of positions (Tavor et al., arXiv 2602.01395), and on-policy,
by the authors of OPSDC, half of the tokens by entropy match all of them while entropy alone misses
confident tokens of high divergence (Xu et al., arXiv 2604.14084), which the divergence finds.

Chosen per response, not over the step. No response is ever cut in two, so the choice is the same
whatever the micro-batches, packing and ranks (to rounding: two tokens whose values differ by less
may change places), and needs neither a second pass through the model nor a word between ranks. And
under a sequence mean every response keeps its part in the loss, however easy it was.

Weights do not change: the loss is the part of the whole one that the kept tokens hold, normalized
by all tokens. The gradient is then the whole one less what the others would add, and learning rate,
clipping and the loss's limits mean what they mean without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def kept_count(length: int, share: float) -> int:
    """Tokens kept of a response: the nearest whole number, and at least one of any."""
    return min(length, max(1, round(share * length)))


def kept_tokens(value: torch.Tensor, lengths: Sequence[int], share: float) -> torch.Tensor:
    """[n] bool: in each response those tokens whose value is largest; of equal ones the first.

    Args:
        value: [n], responses one after the other. NaN counts as largest: what is not finite must
            reach the loss, where it stops the step.
        lengths: tokens of each response, Σ = n.
        share: to keep of each, in (0, 1].
    """
    kept = torch.zeros_like(value, dtype=torch.bool)
    for own, flags in zip(value.split(list(lengths)), kept.split(list(lengths)), strict=True):
        order = own.argsort(descending=True, stable=True)
        flags[order[: kept_count(len(own), share)]] = True
    return kept
