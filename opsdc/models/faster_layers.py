"""Faster decoder layers, by Liger's kernels or by torch's compiler.

Both compute the same in another order; parameters and their names stay.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from opsdc.errors import ModelError


def use_liger(model: Any) -> None:
    """Give the model Liger's norms, rotary positions and MLPs.

    Liger replaces the rotary positions of every model of this architecture in the process. Raises
    ModelError without a GPU, without liger-kernel, or for an architecture that it does not know.
    """
    if not torch.cuda.is_available():
        raise ModelError(
            "model.liger true: Liger's kernels are Triton's and need a GPU, which this machine has "
            "not; set it to false, or use model.compile"
        )
    patch(model)


def patch(model: Any) -> None:
    """Do the work of `use_liger` on any device, such as "meta", where a forward would fail."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ModelError(
            'model.liger true needs liger-kernel: pip install "opsdc[liger]"'
        ) from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(
            f"model.liger true: liger-kernel has nothing for model type '{kind}'; set it to false, "
            "or use model.compile"
        )
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    # Liger's cross-entropies stay off, because head and loss are not the model's here.
    losses = {"cross_entropy", "fused_linear_cross_entropy"}
    apply(model=model, **dict.fromkeys(losses & set(inspect.signature(apply).parameters), False))


def compile_layers(model: Any) -> None:
    """Compile each decoder layer at its first forward, for any length of its input.

    Raises ModelError for a model that does not name its layers' class.
    """
    names = set(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise ModelError(
            f"model.compile true: {type(model).__name__} does not say which modules are its "
            "layers; set it to false"
        )
    for layer in layers:
        layer.compile(dynamic=True)
