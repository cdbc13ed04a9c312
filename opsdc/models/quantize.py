"""The frozen base of an adapter in 4 bits (QLoRA, arXiv 2305.14314): NF4, by bitsandbytes.

Every linear layer but the head is kept as 4-bit codes with scales of 64 weights each, which are
themselves in 8 bits, and is multiplied as if it were dequantized to `model.dtype`. Embedding, norms
and head stay in that dtype: the loss's head is exact.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from opsdc.errors import ModelError

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""of one weight: its code, its share of an 8-bit scale, and of that one's float32 scale"""


def loading_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers loads such a base with; raises ModelError where it cannot."""
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

    Called without gradients, as for sampling, they would repack their weights for good, and from
    then on compute in bfloat16 and give their inputs no gradient, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized(model: Any) -> dict[str, torch.nn.Parameter]:
    """The 4-bit weights by name."""
    return {n: p for n, p in model.named_parameters() if hasattr(p, "quant_state")}


def elements(parameter: torch.Tensor) -> int:
    """Weights that a parameter stands for, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def dequantize(parameter: Any) -> torch.Tensor:
    """The float32 values that a 4-bit weight stands for."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state).float()
