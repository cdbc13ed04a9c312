"""Weights and tensors on disk, whichever way the model lies on the ranks.

Every file holds whole tensors, so that any number of ranks can read what any other wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from opsdc.models import load as whole_model
from opsdc.models.adapters import unwrap
from opsdc.ranks.shard import full, is_sharded
from opsdc.ranks.talk import ALONE, Ranks


def save_weights(model: Any, folder: str | Path, ranks: Ranks = ALONE) -> None:
    """Write the folder of `opsdc.models.load.save_weights`, whichever way the model lies."""
    folder = Path(folder)

    def clear() -> None:
        # Files of another number of ranks would be read instead of, or beside, the new ones.
        for stale in folder.glob("*.safetensors*"):
            stale.unlink()

    ranks.on_first_rank(clear)
    if not is_sharded(model):
        ranks.on_first_rank(lambda: whole_model.save_weights(model, folder))
    elif hasattr(model, "peft_config"):
        state = {n: full(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
        ranks.on_first_rank(lambda: model.save_pretrained(str(folder), state_dict=state))
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

        ranks.on_first_rank(describe)


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

    ranks.on_each_rank(write)
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
