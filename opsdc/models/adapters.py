"""Adapters of PEFT around a model: attach one, and see the model inside."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from opsdc.config.settings import LoRAConfig
from opsdc.errors import ModelError


def with_adapter(model: PreTrainedModel, lora: LoRAConfig) -> Any:
    """Wrap a model in a new LoRA adapter; only the adapter's parameters are trained.

    Raises ModelError where peft is missing or the adapter would sit on the head.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError('model.lora needs peft: pip install "opsdc[lora]"') from error
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    modules = lora.target_modules
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            target_modules=modules if isinstance(modules, str) else list(modules),
            task_type="CAUSAL_LM",
        ),
    )
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


def architecture(model: Any) -> str:
    """Return the name of the model's transformers class, without the prefix that FSDP gives it."""
    return type(unwrap(model)).__name__.removeprefix("FSDP")
