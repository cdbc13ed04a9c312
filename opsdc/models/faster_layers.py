"""Faster decoder layers: Liger's kernels in them, or torch's compiler over each.

Both only compute the same in another order: they change no parameter and no name of one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from opsdc.errors import ModelError


def use_liger(model: Any) -> None:
    """Give the model Liger's norms, rotary positions and MLPs; raises ModelError where it cannot.

    Liger does so for the rotary positions of every model of this architecture in the process.
    """
    if not torch.cuda.is_available():
        raise ModelError(
            "model.liger true: Liger's kernels are Triton's and need a GPU, which this machine has "
            "not; set it to false, or use model.compile"
        )
    patch(model)


def patch(model: Any) -> None:
    """`use_liger` on any device, "meta" included, where a forward would fail."""
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
    # Not its cross-entropy: the head and the loss are ours.
    losses = {"cross_entropy", "fused_linear_cross_entropy"}
    apply(model=model, **dict.fromkeys(losses & set(inspect.signature(apply).parameters), False))


def compile_layers(model: Any) -> None:
    """Compile each decoder layer at its first forward; raises ModelError where none is known.

    Lengths differ from forward to forward, so that a compilation is for any of them.
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
