"""The placement of a model on ranks: whole on each (ddp), or cut over them (fsdp, torch's FSDP2).

Both add the ranks' gradients once a step and never divide them, because token weights are taken
over the whole step, so that the sum already is the gradient.

With ddp each rank runs its backward by itself, and `sum_gradients` adds afterwards. There are no
wrapper and no hooks, because a step is many micro-batches, of which only the last could hide its
communication.

With fsdp every decoder layer, and the root around them, is gathered when it computes. The root is
gathered within `as_forward`, where its parameters are ordinary tensors and hidden states meet the
head. Sampling would gather all layers for every token, so it runs with everything `gathered`: each
rank then holds one copy of the model in `model.dtype`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import TrainingError
from opsdc.models.adapters import architecture, unwrap
from opsdc.models.head import Head
from opsdc.ranks.talk import Ranks

T = TypeVar("T")

_BUCKET_BYTES = 1 << 28
"""Gradients of about this size are added in one collective."""

_AS_FORWARD = "opsdc_as_forward"
"""FSDP knows the method that `as_forward` calls by this name."""


def shard_(model: Any, config: OPSDCConfig, ranks: Ranks, other: Any = None) -> None:
    """Put the model on this rank's device, the whole of it or this rank's part.

    `other` is a model that teaches it, if any. Raises TrainingError where ranks were given
    different weights of either.
    """
    if ranks.size > 1:
        for given in (m for m in (model, other) if m is not None):
            _check_equal(given, ranks)
    if ranks.size == 1 or config.distributed.strategy == "ddp":
        model.to(ranks.device)
        return
    base = unwrap(model)
    # FSDP changes the model's class, and `save_pretrained` would write the name of that.
    base.config.architectures = [architecture(base)]
    dtype = getattr(torch, config.model.dtype)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.type, (ranks.size,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            # Token weights are among the inputs and stay float32.
            cast_forward_inputs=False,
        ),
        # For the root too, so that a teacher swapped in never meets gathered student weights.
        "reshard_after_forward": True,
    }
    layers = set(base._no_split_modules or ())
    for module in list(base.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(base, **options)
    for module in _fsdp_modules(base):
        module.set_gradient_divide_factor(1.0)
        # gloo has no other reduction, and there is nothing to scale.
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True, recurse=False)
    setattr(base, _AS_FORWARD, lambda function, *arguments: function(*arguments))
    register_fsdp_forward_method(base, _AS_FORWARD)
    # FSDP takes the module of the first forward for the root.
    as_forward(model, lambda: None)


def is_sharded(model: Any) -> bool:
    """Return True where each rank holds only its part of the model."""
    return isinstance(unwrap(model), FSDPModule)


def as_forward(model: Any, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function(*arguments)` as one forward of the model, which may use backbone and head.

    Gradients flow through the tensors that it returns, directly or in a tuple.
    """
    if not is_sharded(model):
        return function(*arguments)
    base: Any = unwrap(model)
    return getattr(base, _AS_FORWARD)(function, *arguments)


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Give every rank all weights within the block, to compute without the others or gradients."""
    if not is_sharded(model):
        yield
        return
    base: Any = unwrap(model)
    base.set_reshard_after_forward(False)
    for module in _fsdp_modules(base):
        module.unshard()
    try:
        yield
    finally:
        for module in _fsdp_modules(base):
            module.reshard()
        base.set_reshard_after_forward(True)


def reduce_next(model: Any, last: bool) -> None:
    """Let the next backward add the gradients of all ranks too, or not yet (fsdp)."""
    base: Any = unwrap(model)
    if is_sharded(model):
        base.set_requires_gradient_sync(last)


@torch.no_grad()
def sum_gradients(model: Any, ranks: Ranks) -> None:
    """Add the gradients of all ranks, after the step's last backward (ddp)."""
    if ranks.size == 1 or is_sharded(model):
        return
    bucket: list[torch.Tensor] = []

    def flush() -> None:
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        bucket.clear()

    room = _BUCKET_BYTES
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        size = parameter.grad.numel() * parameter.grad.element_size()
        if bucket and size > room:
            flush()
            room = _BUCKET_BYTES
        bucket.append(parameter.grad)
        room -= size
    flush()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole on every rank; where it is cut, all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_head(head: Head, dtype: torch.dtype) -> Head:
    """Return a head with whole tensors, which get the forward's dtype where they were cut."""

    def gather(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return full(tensor.to(dtype)) if isinstance(tensor, DTensor) else tensor

    weight = gather(head.weight)
    assert weight is not None
    return dataclasses.replace(head, weight=weight, bias=gather(head.bias))


def _fsdp_modules(base: Any) -> list[Any]:
    return [module for module in base.modules() if isinstance(module, FSDPModule)]


def _check_equal(model: Any, ranks: Ranks) -> None:
    """Raise TrainingError where the sums of all weights differ between ranks."""
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    totals = ranks.gather(repr(total))
    for rank, total_there in enumerate(totals):
        if total_there != totals[0]:
            raise TrainingError(
                f"rank {rank} was given other weights of {architecture(model)} than rank 0 (sums "
                f"{total_there} and {totals[0]}); load the model from one folder, or seed its "
                "initialisation alike on all ranks"
            )
