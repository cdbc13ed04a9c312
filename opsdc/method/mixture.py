r"""Teachers mixed in hidden space: a dial for how much is compressed, an anchor that holds.

With one head (W, b, scale) logits are affine in the hidden state. For contexts k with final hidden
states h_k and weights w_k, Σ w_k = 1, the geometric mixture p ∝ Π p_k^{w_k} therefore has the
logits of the one hidden state Σ w_k·h_k: exact, without another head GEMM. For the reverse KL::

    KL(q‖p) = Σ w_k·KL(q‖p_k) + log Z,    Z = Σ_v Π p_k(v)^{w_k}                               (1)

and Z does not depend on the student: to mix teachers *is* to weight their divergences, gradients
included, for negative weights too. With dial γ, weight δ of the other instruction and anchor α::

    h = (1 − α)·[h_plain + γ·(h_concise − h_plain) − δ·(h_against − h_plain)] + α·h_start      (2)

    concise   the teacher's weights, its prompt: compresses
    plain     the teacher's weights, the student's prompt: holds what the teacher did
    against   the teacher's weights, a prompt with another instruction, whose style is subtracted
    start     the weights before training, the student's prompt: holds accuracy and other skills

γ = 1 is the paper, below it is gentler, above it stronger, 0 holds. Each context costs one forward
of the teacher's body, and none where its weight is 0.

Where the start model's head (W₀, b₀) is not the teacher's, (2) has the logits of one *wide* head:
``[(1 − α)·h_dial, α·h_start] · [W, W₀]ᵀ + (1 − α)·b + α·b₀``. A soft-capped head is not affine, so
nothing is mixed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opsdc.errors import ModelError
from opsdc.models.head import Head

CONCISE, PLAIN, AGAINST, START = "concise", "plain", "against", "start"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """The weights by which a teacher is mixed from its contexts, as in equation (2)."""

    dial: float = 1.0
    """γ: weight of the concise context against the plain one."""
    anchor: float = 0.0
    """α in [0, 1): weight of the model before training."""
    against: float = 0.0
    """δ ≥ 0: how strongly the style of the other instruction is subtracted."""

    def weights(self, *, start_is_teacher: bool) -> dict[str, float]:
        """Return the weight of each context that has one; they sum to 1.

        start_is_teacher: The teacher still has the weights before training, so that one forward
            serves as plain and as start.
        """
        rest = 1.0 - self.anchor
        plain = rest * (1.0 - self.dial + self.against)
        weights = {
            CONCISE: rest * self.dial,
            PLAIN: plain + self.anchor * start_is_teacher,
            AGAINST: -rest * self.against,
            START: self.anchor * (not start_is_teacher),
        }
        return {name: weight for name, weight in weights.items() if weight != 0.0}


def blend(
    hidden: Mapping[str, torch.Tensor], weights: Mapping[str, float], *, wide: bool
) -> torch.Tensor:
    """Mix the hidden states [n, D] of the contexts by equation (2).

    One context of weight 1 comes back as it is, bit for bit; a mixture is summed in float32 (in
    float64 where the states are). `wide` gives [n, 2·D] for the head of `widened`: what the
    teacher's weights scored, beside what the start's did.
    """
    if not wide and list(weights.values()) == [1.0]:
        return hidden[next(iter(weights))]

    def total(names: list[str]) -> torch.Tensor:
        first = next(iter(hidden.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        mixed = torch.zeros_like(first, dtype=dtype)
        for name in names:
            mixed.add_(hidden[name], alpha=weights[name])
        return mixed

    if not wide:
        return total(list(weights))
    return torch.cat([total([n for n in weights if n != START]), total([START])], dim=1)


def widened(teacher: Head, start: Head, anchor: float) -> Head:
    """Concatenate two heads into the one that a wide `blend` enters, weight [V, 2·D].

    Raises ModelError where one scales its logits differently.
    """
    if teacher.logit_scale != start.logit_scale:
        raise ModelError(
            f"an anchor of {anchor:g}: teacher and start model scale their logits by "
            f"{teacher.logit_scale:g} and {start.logit_scale:g}, so that no one head gives their "
            "mixture; set it to 0"
        )
    bias = None
    if teacher.bias is not None or start.bias is not None:
        zero = torch.zeros_like(teacher.weight[:, 0])
        ours, theirs = (zero if h.bias is None else h.bias for h in (teacher, start))
        bias = ((1.0 - anchor) * ours + anchor * theirs).detach()
    return Head(
        weight=torch.cat([teacher.weight.detach(), start.weight.detach()], dim=1),
        bias=bias,
        logit_scale=teacher.logit_scale,
    )


def check_mixable(head: Head, setting: str) -> None:
    """Raise ModelError for a head under which no mixture is exact; `setting` names what asks."""
    if head.logit_softcap is not None:
        raise ModelError(
            f"{setting} mixes teachers in hidden space, which is exact for logits that are affine "
            f"in it; this model caps its logits softly (at {head.logit_softcap:g}): use a dial of "
            "1, no anchor, no target and no second instruction"
        )
