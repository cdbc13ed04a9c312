"""The output head as the loss describes it, and the hidden states that enter it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opsdc.errors import ModelError
from opsdc.models.adapters import unwrap

# Config attributes by which known architectures scale their logits, and the exponent to apply.
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}


# Largest difference between our head and the model's own logits, relative to the largest logit.
_HEAD_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """logits = softcap(logit_scale · (h·Wᵀ + b)), softcap(x) = cap·tanh(x / cap)."""

    weight: torch.Tensor
    """[V, D]"""
    bias: torch.Tensor | None = None
    """[V]"""
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, D] → [n, V], materialised: for checks and single positions, not for training."""
        z = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        z = z * self.logit_scale
        cap = self.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)


def read_head(model: Any) -> Head:
    """The output head as the loss describes it; raises ModelError for one it cannot."""
    base = unwrap(model)
    layer = base.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"the head of {type(base).__name__} is {type(layer).__name__}, not a linear layer: "
            "its logits cannot be computed from hidden states and one weight matrix"
        )
    text = base.config.get_text_config()
    scale = 1.0
    for name, exponent in _SCALES.items():
        value = getattr(text, name, None)
        if value is not None:
            scale *= float(value) ** exponent
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        logit_scale=scale,
        logit_softcap=getattr(text, "final_logit_softcapping", None),
    )


@torch.no_grad()
def check_head(model: Any) -> float:
    """Compare the described head with the model's own logits on a few tokens.

    Returns the largest difference relative to the largest logit. Raises ModelError when it is more
    than rounding: the model then does something between hidden states and logits that is not in
    its description, and training on the description would be silently wrong.
    """
    base = unwrap(model)
    head = read_head(model)
    device = head.weight.device
    ids = torch.arange(7, device=device)[None] % head.weight.shape[0]
    was_training = base.training
    base.eval()
    own = base(input_ids=ids, use_cache=False).logits[0].float()
    hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    base.train(was_training)
    ours = head.logits(hidden).float()
    difference = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-30))
    if own.shape != ours.shape or not difference <= _HEAD_TOLERANCE[head.weight.dtype]:
        raise ModelError(
            f"the logits of {type(base).__name__} are not softcap(scale·(h·Wᵀ + b)): relative "
            f"difference {difference:.1e} on a probe. The head has a feature that the fused loss "
            "does not describe, so this model cannot be trained exactly"
        )
    return difference


def hidden_states(model: Any, batch: TokenBatch) -> torch.Tensor:
    """[n, D]: the head's input at the scored positions, prompt positions left out."""
    output = unwrap(model).get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        # Packed rows are told apart only without a cache.
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)[batch.scored]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Input of one forward through the backbone."""

    input_ids: torch.Tensor
    """[rows, T] int64"""
    attention_mask: torch.Tensor | None
    """[rows, T], or None when packed: a mask would switch transformers' isolation off"""
    position_ids: torch.Tensor
    """[rows, T] int64, restarting at 0 with every sequence"""
    scored: torch.Tensor
    """[n] indices into rows·T of the positions whose hidden state predicts a response token"""
    lengths: Sequence[int]
    """response tokens of each sequence, Σ = n"""

    @property
    def targets(self) -> torch.Tensor:
        """[n] the response tokens that the scored positions predict."""
        return self.input_ids.flatten()[self.scored + 1]
