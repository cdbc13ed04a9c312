"""The door through which every model comes in, whoever brings it: trainer, `Distiller` or plan."""

from __future__ import annotations

from typing import Any

import torch

from opsdc.errors import ModelError
from opsdc.models.adapters import architecture, check_adapter, unwrap
from opsdc.models.head import backbone, evaluating, read_head

_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""LoRA initialised by one of these takes its start out of the base's weights."""


def admit(model: Any, *, trained: bool = True) -> None:
    """Refuse a model that cannot be used here; keep its trained parameters in float32.

    Looks at the model without running it, also on "meta"; `check_head` then runs it. `trained` is
    False for a model that only teaches. Raises ModelError.
    """
    name = architecture(model)
    if unwrap(model).config.is_encoder_decoder:
        raise ModelError(
            f"{name} has an encoder, and prompts and responses are one sequence here; give a model "
            "of AutoModelForCausalLM"
        )
    check_adapter(model)
    read_head(model)
    backbone(model)
    if not trained:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError(
            f"{name} has no parameter that requires a gradient: nothing would be trained. For a "
            "saved adapter, PeftModel.from_pretrained takes is_trainable=True"
        )
    for p in parameters:
        # Below float32 most updates of a usual learning rate round to nothing.
        if p.itemsize < 4:
            p.data = p.data.float()


def check_adapter_off(model: Any) -> None:
    """Raise ModelError unless the model with its adapter off is the base, however long it trains.

    That is so where no trained parameter reaches the logits then, as their gradient tells.
    """
    for name, config in model.peft_config.items():
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if start.startswith(_MOVES_THE_BASE):
            raise ModelError(
                f"the adapter '{name}' has init_lora_weights '{start}', which moves the base's "
                "weights: with the adapter off the model is not the one before it; pass that one "
                "as the teacher"
            )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = read_head(model)
    ids = torch.arange(7, device=head.weight.device)[None] % head.weight.shape[0]
    with evaluating(model), model.disable_adapter(), torch.enable_grad():
        for p in trained.values():
            p.requires_grad_(True)
        logits = head.logits(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
        gradients: Any = [None] * len(trained)
        if logits.requires_grad:
            total = logits.float().sum()
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    # PEFT sets it anew as it switches the adapter on, and may leave out the biases.
    for p in trained.values():
        p.requires_grad_(True)
    survivors = [name for name, g in zip(trained, gradients, strict=True) if g is not None]
    if survivors:
        raise ModelError(
            f"{len(survivors)} trained parameters, {survivors[0]} for one, still count with the "
            "adapter off: a teacher made of the student would drift with them. Freeze them, or "
            "pass a teacher, copy.deepcopy(student) for one that stays as the student is now"
        )
