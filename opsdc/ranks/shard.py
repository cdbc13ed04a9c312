"""How a model lies on several ranks: whole on each (ddp), or cut over them (fsdp, torch's FSDP2).

Both add the ranks' gradients once a step and never divide them: token weights are taken over the
whole step, so that the sum already is the gradient.

With ddp a rank's backward is its own, and `sum_gradients` adds afterwards. No wrapper and no hooks:
a step is many micro-batches, of which only the last could hide its communication.

With fsdp every decoder layer, and what is left around them, is gathered when it computes. The root
is gathered within `within`, where its parameters are ordinary tensors and hidden states meet the
head. Sampling would gather all layers once a token, so it runs with everything gathered (`whole`):
one copy of the model in `model.dtype` on each rank while it lasts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from opsdc.config import OPSDCConfig
from opsdc.errors import TrainingError
from opsdc.models import load as whole_model
from opsdc.models.load import Head, architecture, unwrap
from opsdc.ranks.talk import ALONE, Ranks

T = TypeVar("T")

# Gradients added in one collective.
_BUCKET_BYTES = 1 << 28
_WITHIN = "opsdc_within"


def place(model: Any, config: OPSDCConfig, ranks: Ranks) -> None:
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
    setattr(base, _WITHIN, lambda function, *arguments: function(*arguments))
    register_fsdp_forward_method(base, _WITHIN)
    # The first forward decides who is the root.
    within(model, lambda: None)


def is_sharded(model: Any) -> bool:
    """Whether each rank holds only its part of the model."""
    return isinstance(unwrap(model), FSDPModule)


def within(model: Any, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` as one forward of the model, backbone and head alike.

    Gradients flow through tensors of what it returns, directly or in a tuple.
    """
    if not is_sharded(model):
        return function(*arguments)
    base: Any = unwrap(model)
    return getattr(base, _WITHIN)(function, *arguments)


@contextlib.contextmanager
def whole(model: Any) -> Iterator[None]:
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


def save_weights(model: Any, folder: str | Path, ranks: Ranks = ALONE) -> None:
    """Write the folder of `opsdc.models.load.save_weights`, whichever way the model lies."""
    folder = Path(folder)

    def clear() -> None:
        # Files of another number of ranks would be read instead of, or beside, the new ones.
        for stale in folder.glob("*.safetensors*"):
            stale.unlink()

    ranks.alone(clear)
    if not is_sharded(model):
        ranks.alone(lambda: whole_model.save_weights(model, folder))
    elif hasattr(model, "peft_config"):
        state = {n: full(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
        ranks.alone(lambda: model.save_pretrained(str(folder), state_dict=state))
    else:
        base = unwrap(model)
        tensors: dict[str, torch.Tensor] = dict(base.named_parameters())
        stored = base.state_dict().keys()
        tensors |= {n: b for n, b in base.named_buffers() if n in stored}
        files = save_tensors(tensors, folder, "model", ranks)

        def describe() -> None:
            base.config.save_pretrained(folder)
            if base.generation_config is not None:
                base.generation_config.save_pretrained(folder)
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

        ranks.alone(describe)


def save_tensors(
    tensors: dict[str, torch.Tensor], folder: Path, stem: str, ranks: Ranks
) -> dict[str, str]:
    """Write `stem-00001-of-00002.safetensors`, one file a rank, whole tensors in each.

    Whole, so that any number of ranks can read them. Gives the file of every tensor.
    """
    load = [0] * ranks.size
    files: dict[str, str] = {}
    mine: dict[str, torch.Tensor] = {}
    for name in sorted(tensors, key=lambda n: (-tensors[n].numel(), n)):
        owner = min(range(ranks.size), key=lambda rank: (load[rank], rank))
        load[owner] += tensors[name].numel()
        files[name] = f"{stem}-{owner + 1:05d}-of-{ranks.size:05d}.safetensors"
        found = full(tensors[name].detach())
        if owner == ranks.rank:
            mine[name] = found.cpu().contiguous()

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if mine:
            file = f"{stem}-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors"
            # transformers refuses files that do not say whose tensors they are.
            save_file(mine, folder / file, metadata={"format": "pt"})

    ranks.each(write)
    return files


@torch.no_grad()
def load_weights(model: Any, folder: str | Path) -> None:
    """Read a folder of `save_weights`, whichever way the model lies: each rank its own rows.

    Raises KeyError for a tensor that is not there, ValueError for one of another shape.
    """
    if not is_sharded(model):
        whole_model.load_weights(model, folder)
        return
    stored = Tensors(Path(folder).glob("*.safetensors"))
    if hasattr(model, "peft_config"):
        import peft

        for name, tensor in peft.get_peft_model_state_dict(model).items():
            _local(tensor).copy_(stored.like(name, tensor))
        return
    base = unwrap(model)
    names: dict[torch.Tensor, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for own, tied in names.items():
        name = next((n for n in tied if n in stored), tied[0])
        _local(own).copy_(stored.like(name, own))


class Tensors:
    """The tensors of safetensors files, by name; only what is asked for is read."""

    def __init__(self, files: Iterator[Path] | list[Path]) -> None:
        self._where: dict[str, Any] = {}
        found = sorted(files)
        if not found:
            raise FileNotFoundError("a file of tensors is missing")
        for file in found:
            opened = safe_open(file, framework="pt")
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The stored tensor, or of it the rows that `tensor` holds on this rank."""
        stored = self._where[name].get_slice(name)
        if list(stored.get_shape()) != list(tensor.shape):
            raise ValueError(
                f"{name} has shape {stored.get_shape()} there, {list(tensor.shape)} here"
            )
        if not isinstance(tensor, DTensor):
            return self._where[name].get_tensor(name)
        # FSDP cuts rows as torch.chunk does: the last ranks may have fewer, or none.
        mesh = tensor.device_mesh
        start = min(-(-tensor.shape[0] // mesh.size()) * mesh.get_local_rank(), tensor.shape[0])
        return stored[start : start + len(tensor.to_local())]


def like_parameter(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that lies on the ranks as `parameter` does, from this rank's rows of it."""
    if not isinstance(parameter, DTensor):
        return local.to(parameter.device)
    return DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
