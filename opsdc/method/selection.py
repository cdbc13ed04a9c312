"""The choice of tokens to train on, where `loss.token_share` leaves some out.

All tokens are scored; the backward is for those that carry the signal: the largest divergence from
the teacher, or the student's largest entropy. Published evidence: in reinforcement learning, the
20 % of tokens with the highest entropy train as well as all (Wang et al., arXiv 2506.01939). In
distillation, the student's entropy is a good choice of positions (Tavor et al., arXiv 2602.01395).
On-policy, half of the tokens by entropy match all of them, but entropy alone misses confident
tokens of high divergence (Xu et al., arXiv 2604.14084); the divergence finds these.

Tokens are chosen within each response, not over the step. No response is ever cut in two, so the
choice does not depend on micro-batches, packing or ranks (but for rounding: two tokens whose values
differ by less may change places). It needs no second pass through the model and no message between
ranks. Under a sequence mean each response keeps its part in the loss, however easy it was.

Weights do not change: the loss is the sum over the kept tokens, normalized by all tokens. The
gradient is then the whole one without the parts of the dropped tokens, so learning rate, clipping
and the loss's limits keep their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def kept_count(length: int, share: float) -> int:
    """Return how many tokens of a response are kept: the nearest whole number, at least one."""
    return min(length, max(1, round(share * length)))


def kept_tokens(value: torch.Tensor, lengths: Sequence[int], share: float) -> torch.Tensor:
    """Mark the tokens of largest value in each response, [n] bool; of equal ones the first.

    Args:
        value: [n] float, one response after the other. NaN counts as largest: a value that is not
            finite must reach the loss, where it stops the step.
        lengths: Number of tokens of each response, Σ = n.
        share: Part of each response to keep, in (0, 1].
    """
    is_kept = torch.zeros_like(value, dtype=torch.bool)
    by_response = zip(value.split(list(lengths)), is_kept.split(list(lengths)), strict=True)
    for response_values, response_flags in by_response:
        order = response_values.argsort(descending=True, stable=True)
        # The flags are a view into `is_kept`.
        response_flags[order[: kept_count(len(order), share)]] = True
    return is_kept
