"""How a model lies on several ranks: whole on each (ddp), or cut over them (fsdp, torch's FSDP2).

Both add the ranks' gradients once a step and never divide them: token weights are taken over the
whole step, so that the sum already is the gradient.

With ddp a rank's backward is its own, and `sum_gradients` adds afterwards. No wrapper and no hooks:
a step is many micro-batches, of which only the last could hide its communication.

With fsdp every decoder layer, and what is left around them, is gathered when it computes. The root
is gathered within `as_forward`, where its parameters are ordinary tensors and hidden states meet
the head. Sampling would gather all layers once a token, so it runs with everything `gathered`: one
copy of the model in `model.dtype` on each rank while it lasts.
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

# Gradients added in one collective.
_BUCKET_BYTES = 1 << 28
_AS_FORWARD = "opsdc_as_forward"


def shard_(model: Any, config: OPSDCConfig, ranks: Ranks) -> None:
    """Put the model on this rank's device, whole or this rank's part of it.

    Raises TrainingError where ranks were given different weights.
    """
    if ranks.size > 1:
        _check_equal(model, ranks)
    if ranks.size == 1 or config.distributed.strategy == "ddp":
        model.to(ranks.device)
        return
    base = unwrap(model)
    # The class below is FSDP's own, and this is what `save_pretrained` would write.
    base.config.architectures = [architecture(base)]
    dtype = getattr(torch, config.model.dtype)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.type, (ranks.size,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            # Token weights are among the inputs.
            cast_forward_inputs=False,
        ),
        # The root's too: a teacher that is swapped in must not meet gathered student weights.
        "reshard_after_forward": True,
    }
    layers = set(base._no_split_modules or ())
    for module in list(base.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(base, **options)
    for module in _parts(base):
        module.set_gradient_divide_factor(1.0)
        # gloo knows no other reduction; and there is nothing to scale.
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True, recurse=False)
    setattr(base, _AS_FORWARD, lambda function, *arguments: function(*arguments))
    register_fsdp_forward_method(base, _AS_FORWARD)
    # The first forward decides who is the root.
    as_forward(model, lambda: None)


def is_sharded(model: Any) -> bool:
    """Whether each rank holds only its part of the model."""
    return isinstance(unwrap(model), FSDPModule)


def as_forward(model: Any, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` as one forward of the model, backbone and head alike.

    Gradients flow through tensors of what it returns, directly or in a tuple.
    """
    if not is_sharded(model):
        return function(*arguments)
    base: Any = unwrap(model)
    return getattr(base, _AS_FORWARD)(function, *arguments)


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Within the block every rank has all weights and computes without the others; no gradients."""
    if not is_sharded(model):
        yield
        return
    base: Any = unwrap(model)
    base.set_reshard_after_forward(False)
    for module in _parts(base):
        module.unshard()
    try:
        yield
    finally:
        for module in _parts(base):
            module.reshard()
        base.set_reshard_after_forward(True)


def reduce_next(model: Any, last: bool) -> None:
    """Whether the next backward also adds the gradients of all ranks (fsdp)."""
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
    """A tensor that is cut over the ranks, whole on each of them; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_head(head: Head, dtype: torch.dtype) -> Head:
    """A head with whole tensors, of the dtype that the forward computes in where it was cut."""

    def gather(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return full(tensor.to(dtype)) if isinstance(tensor, DTensor) else tensor

    weight = gather(head.weight)
    assert weight is not None
    return dataclasses.replace(head, weight=weight, bias=gather(head.bias))


def _parts(base: Any) -> list[Any]:
    return [module for module in base.modules() if isinstance(module, FSDPModule)]


def _check_equal(model: Any, ranks: Ranks) -> None:
    digest = sum(float(p.detach().double().sum()) for p in model.parameters())
    found = ranks.gather(repr(digest))
    for rank, other in enumerate(found):
        if other != found[0]:
            raise TrainingError(
                f"rank {rank} was given other weights than rank 0 (sums {other} and {found[0]}); "
                "load the model from one folder, or seed its initialisation alike on all ranks"
            )
