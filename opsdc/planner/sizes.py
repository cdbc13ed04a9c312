"""The sizes of a model, counted on the model itself, which is built without memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from opsdc.config.settings import ModelConfig, TeacherConfig
from opsdc.models.adapters import unwrap
from opsdc.models.head import read_head
from opsdc.models.quantize import elements
from opsdc.planner.activations import on_meta, read_architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Numbers of elements of a model and of its parts."""

    trained: int
    frozen: int
    in_4_bits: int
    """The frozen elements that are kept in 4 bits."""
    head: int
    """The head's elements, V·D."""
    vocab_size: int
    dim: int
    largest_layer: int
    """The elements of the largest decoder layer."""
    largest_matrix: int
    """The elements of the largest frozen matrix but the head."""
    trains_head: bool
    tied: bool
    """True where head and embedding are one parameter."""
    item: int
    """The bytes of an element that the forward computes with."""

    def widens(self, teacher: TeacherConfig) -> bool:
        """Return True where an anchor mixes two heads into a wide one, see `method.mixture`."""
        return bool(teacher.anchor) and teacher.mode != "frozen" and self.trains_head

    def teacher_dim(self, teacher: TeacherConfig, other: Sizes | None) -> int:
        """Return the width of the teacher's states; `other` is another model that teaches."""
        return other.dim if other is not None else self.dim * (1 + self.widens(teacher))


def sizes_of(model: Any, config: ModelConfig) -> Sizes:
    """Count the elements of a model, on any device, that is ready to be trained as `config` says.

    Raises ModelError for a head that the loss cannot describe.
    """
    base, head = unwrap(model), read_head(model).weight
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = set(base._no_split_modules or ())
    matrices = [
        elements(m.weight)
        for m in base.modules()
        if isinstance(m, torch.nn.Linear) and m.weight is not head and not m.weight.requires_grad
    ]
    return Sizes(
        trained=trained,
        frozen=sum(elements(p) for p in model.parameters()) - trained,
        in_4_bits=sum(matrices) if config.quantize else 0,
        head=head.numel(),
        vocab_size=head.shape[0],
        dim=head.shape[1],
        largest_layer=max(
            (
                sum(p.numel() for p in module.parameters())
                for module in base.modules()
                if type(module).__name__ in layers
            ),
            default=0,
        ),
        largest_matrix=max(matrices, default=0),
        trains_head=head.requires_grad,
        tied=head is base.get_input_embeddings().weight,
        item=getattr(torch, config.dtype).itemsize,
    )


@functools.cache
def planned_sizes(architecture: str, config: ModelConfig) -> Sizes:
    """Count the elements of an architecture, given as JSON, as `config` would train it."""
    return sizes_of(on_meta(read_architecture(architecture), config), config)
