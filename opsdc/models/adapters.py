"""Adapters of PEFT around a model: attach one, and see the model inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from opsdc.config.settings import LoRAConfig
from opsdc.errors import ModelError


def with_adapter(model: PreTrainedModel, lora: LoRAConfig) -> Any:
    """Wrap a model in a new LoRA adapter; only the adapter's parameters are trained.

    Raises ModelError where peft is missing, the model has an adapter already, or the new one would
    sit on the head.
    """
    if hasattr(model, "peft_config"):
        raise ModelError(
            "model.lora would put an adapter on a model that has one already; leave it unset to "
            "train that one"
        )
    try:
        import peft
    except ImportError as error:
        raise ModelError('model.lora needs peft: pip install "opsdc[lora]"') from error
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    modules = lora.target_modules
    try:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                target_modules=modules if isinstance(modules, str) else list(modules),
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules {modules!r}: {error}") from error
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ModelError(
            f"model.lora.target_modules {lora.target_modules!r} puts an adapter on the head "
            f"'{head}', whose product the fused loss does not see; name other modules or use "
            "'all-linear'"
        )
    return adapted


def unwrap(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_adapter(model: Any) -> None:
    """Raise ModelError for an adapter of PEFT that loss, teacher or checkpoint would not see."""
    adapters = getattr(model, "peft_config", None)
    if adapters is None:
        return
    if not hasattr(model, "get_base_model"):
        raise ModelError(
            f"{type(model).__name__} carries an adapter without PEFT's wrapper, which sampling, "
            "checkpoints and the teacher need; give the result of peft.get_peft_model"
        )
    for name, config in adapters.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            raise ModelError(
                f"the adapter '{name}' ({kind}) puts virtual tokens before the backbone, which the "
                "loss does not see; use LoRA, or another adapter of the model's layers"
            )


@contextlib.contextmanager
def perturbed(model: Any) -> Iterator[None]:
    """Move an adapter's trained parameters at random within the block, nothing without one.

    Many adapters do nothing until they are trained; what they change shows only then.
    """
    adapter = hasattr(model, "peft_config")
    trained = [p.data for p in model.parameters() if p.requires_grad and adapter]
    before = [p.clone() for p in trained]
    # The same numbers on every rank.
    noise = torch.Generator().manual_seed(0)
    try:
        for p in trained:
            step = 0.05 * torch.randn(p.shape, generator=noise)
            p.add_(step.to(p.device, p.dtype))
        yield
    finally:
        for p, start in zip(trained, before, strict=True):
            p.copy_(start)


def architecture(model: Any) -> str:
    """Return the name of the model's transformers class, without the prefix that FSDP gives it."""
    return type(unwrap(model)).__name__.removeprefix("FSDP")
