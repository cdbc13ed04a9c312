"""The frozen base of an adapter in 4 bits (QLoRA, arXiv 2305.14314): NF4, by bitsandbytes.

Every linear layer but the head is kept as 4-bit codes. Each 64 weights share a scale, which is kept
in 8 bits itself. Products are those of the weights dequantized to `model.dtype`. Embedding, norms
and head stay in that dtype, so the loss sees an exact head.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from opsdc.errors import ModelError

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight takes these bytes: its code and its shares of the 8-bit and the float32 scale."""


def loading_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings by which transformers loads such a base.

    Raises ModelError where bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError('model.quantize nf4 needs bitsandbytes: pip install "opsdc[qlora]"')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check(model: Any) -> None:
    """Raise ModelError unless the model's layers are in 4 bits and its head is not."""
    if not quantized(model):
        raise ModelError(
            "model.quantize nf4: the model that was given has no 4-bit weights; give its folder or "
            "name, or load it with transformers' quantization_config"
        )
    if not model.get_output_embeddings().weight.is_floating_point():
        raise ModelError(
            "model.quantize nf4: the head is quantized too, and the loss needs its weights; leave "
            "it out (llm_int8_skip_modules)"
        )


def compute_in_training_precision(model: Any) -> None:
    """Keep the layers from a shortcut on CPUs with AVX-512.

    A layer that takes it, when called without gradients as for sampling, repacks its weights for
    good. From then on it computes in bfloat16 and gives its input no gradient, without a warning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the 4-bit weights by name."""
    return {n: p for n, p in model.named_parameters() if hasattr(p, "quant_state")}


def elements(parameter: torch.Tensor) -> int:
    """Count the weights that a parameter stands for, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def dequantize(parameter: Any) -> torch.Tensor:
    """Return the float32 values that a 4-bit weight stands for, [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state).float()
