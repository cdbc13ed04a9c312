"""The output head as the loss describes it, and the hidden states that enter it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from opsdc.errors import ModelError
from opsdc.models.adapters import architecture, perturbed, unwrap

_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
"""Architectures scale their logits by these attributes of their config, to these powers."""

_HEAD_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
"""A described head and the model itself may differ by this share of the largest logit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """An output head: logits = softcap(logit_scale · (h·Wᵀ + b)).

    softcap(x) = cap·tanh(x / cap), or x without a cap.
    """

    weight: torch.Tensor
    """The output matrix, [V, D]."""
    bias: torch.Tensor | None = None
    """One number for each token, [V]."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, V] of hidden states [n, D], for checks and single positions.

        Training never holds them in memory: its loss works on hidden states.
        """
        z = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        z = z * self.logit_scale
        cap = self.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)


def read_head(model: Any) -> Head:
    """Describe a model's output head as the loss takes it.

    Raises ModelError where the head is no linear layer.
    """
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


def backbone(model: Any) -> Any:
    """Return the module whose last hidden state enters the head; raise ModelError without one."""
    module = unwrap(model).get_decoder()
    # Some architectures answer with themselves: then it is the model within, which has no head.
    while module.get_output_embeddings() is not None:
        inside = [m for m in module.children() if isinstance(m, PreTrainedModel)]
        if len(inside) != 1:
            raise ModelError(
                f"{type(module).__name__} does not say which of its modules is the backbone under "
                "the head; use an architecture whose get_decoder() does"
            )
        module = inside[0]
    return module


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Let the model compute without dropout within the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def check_head(model: Any) -> float:
    """Compare the described head with the model's own logits on a few tokens.

    An adapter is moved away from its start for it, at which it may do nothing, and its wrapper's
    logits count.

    Returns the largest difference relative to the largest logit. Raises ModelError when it is more
    than rounding: the model then does something between hidden states and logits that is not in
    its description, and training on the description would be silently wrong.
    """
    name, head = architecture(model), read_head(model)
    ids = torch.arange(7, device=head.weight.device)[None] % head.weight.shape[0]
    with evaluating(model), perturbed(model):
        try:
            model_logits = model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
            raise ModelError(
                f"{name}, whose parameters are {', '.join(sorted(dtypes))}, cannot compute the "
                f"logits of a few tokens: {error}. Give all of its parts one dtype, or use another "
                "causal language model"
            ) from error
    logits = head.logits(hidden).float()
    largest = model_logits.abs().max().clamp_min(1e-30)
    if model_logits.shape != logits.shape:
        raise ModelError(
            f"{name} gives logits of shape {list(model_logits.shape)} where its backbone and head "
            f"give {list(logits.shape)}: something acts outside of them, which the loss does not "
            "see; use LoRA for an adapter"
        )
    difference = float((model_logits - logits).abs().max() / largest)
    if not difference <= _HEAD_TOLERANCE[head.weight.dtype]:
        raise ModelError(
            f"the logits of {name} are not softcap(scale·(h·Wᵀ + b)): relative "
            f"difference {difference:.1e} on a probe. The head has a feature that the fused loss "
            "does not describe, so this model cannot be trained exactly"
        )
    return difference


def hidden_states(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Run the backbone and return the head's input at the scored positions, [n, D]."""
    output = backbone(model)(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        # Without a cache only, transformers tells the sequences of a packed row apart.
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)[batch.scored]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """The input of one forward through the backbone."""

    input_ids: torch.Tensor
    """Token ids, [rows, T] int64."""
    attention_mask: torch.Tensor | None
    """1 at tokens and 0 at padding, [rows, T] int64; None for packed rows, whose sequences
    transformers keeps apart only without a mask."""
    position_ids: torch.Tensor
    """Positions that restart at 0 with every sequence, [rows, T] int64."""
    scored: torch.Tensor
    """The indices into rows·T of positions whose hidden state predicts a response token,
    [n] int64."""
    lengths: Sequence[int]
    """The number of response tokens of each sequence; their sum is n."""

    @property
    def targets(self) -> torch.Tensor:
        """The response tokens that the scored positions predict, [n] int64."""
        return self.input_ids.flatten()[self.scored + 1]
