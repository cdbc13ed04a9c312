"""Weights and tensors on disk, for a model that is whole or cut over the ranks.

Every file holds whole tensors, so any number of ranks can read what any other number wrote.
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
from opsdc.ranks.shard import full, is_sharded, local
from opsdc.ranks.talk import ALONE, Ranks


def save_weights(model: Any, folder: str | Path, ranks: Ranks = ALONE) -> None:
    """Write the folder of `opsdc.models.load.save_weights`, also for a model cut over the ranks."""
    folder = Path(folder)

    def clear() -> None:
        # Files from another number of ranks would be read beside the new ones or in their place.
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

        def write_index() -> None:
            base.config.save_pretrained(folder)
            if base.generation_config is not None:
                base.generation_config.save_pretrained(folder)
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

        ranks.on_first_rank(write_index)


def save_tensors(
    tensors: dict[str, torch.Tensor], folder: Path, stem: str, ranks: Ranks
) -> dict[str, str]:
    """Write whole tensors, shared out over one file per rank: `stem-00001-of-00002.safetensors`.

    Returns the file's name of every tensor. All ranks must call it.
    """
    # Each tensor goes to the rank with the fewest elements so far, the largest tensor first. It is
    # whole on all ranks for a moment, and kept by the one that writes it.
    elements = [0] * ranks.size
    files: dict[str, str] = {}
    to_write: dict[str, torch.Tensor] = {}
    for name in sorted(tensors, key=lambda n: (-tensors[n].numel(), n)):
        owner = min(range(ranks.size), key=lambda rank: (elements[rank], rank))
        elements[owner] += tensors[name].numel()
        files[name] = f"{stem}-{owner + 1:05d}-of-{ranks.size:05d}.safetensors"
        tensor = full(tensors[name].detach())
        if owner == ranks.rank:
            to_write[name] = tensor.cpu().contiguous()

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if to_write:
            file = f"{stem}-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors"
            # transformers refuses files that do not name their framework.
            save_file(to_write, folder / file, metadata={"format": "pt"})

    ranks.on_each_rank(write)
    return files


@torch.no_grad()
def load_weights(model: Any, folder: str | Path) -> None:
    """Read a folder of `save_weights` into the model, on each rank only the rows that it holds.

    Raises KeyError for a tensor that is not there, ValueError for one of another shape.
    """
    if not is_sharded(model):
        whole_model.load_weights(model, folder)
        return
    stored = Tensors(Path(folder).glob("*.safetensors"))
    if hasattr(model, "peft_config"):
        import peft

        for name, tensor in peft.get_peft_model_state_dict(model).items():
            local(tensor).copy_(stored.like(name, tensor))
        return
    base = unwrap(model)
    names: dict[torch.Tensor, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for tensor, tied in names.items():
        name = next((n for n in tied if n in stored), tied[0])
        local(tensor).copy_(stored.like(name, tensor))


class Tensors:
    """The tensors of safetensors files by name, read when they are asked for.

    Raises FileNotFoundError where there are no files.
    """

    def __init__(self, files: Iterator[Path] | list[Path]) -> None:
        self._where: dict[str, Any] = {}
        paths = sorted(files)
        if not paths:
            raise FileNotFoundError("a file of tensors is missing")
        for path in paths:
            opened = safe_open(path, framework="pt")
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the stored tensor, or those of its rows that `tensor` holds on this rank.

        Raises KeyError for a name that is not there, ValueError for another shape.
        """
        stored = self._where[name].get_slice(name)
        if list(stored.get_shape()) != list(tensor.shape):
            raise ValueError(
                f"{name} has shape {stored.get_shape()} there, {list(tensor.shape)} here"
            )
        if not isinstance(tensor, DTensor):
            return self._where[name].get_tensor(name)
        # FSDP cuts rows as torch.chunk does, so the last ranks may have fewer or none.
        mesh = tensor.device_mesh
        start = min(-(-tensor.shape[0] // mesh.size()) * mesh.get_local_rank(), tensor.shape[0])
        return stored[start : start + len(tensor.to_local())]


def like_parameter(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is cut over the ranks as `parameter` is, from this rank's rows."""
    if not isinstance(parameter, DTensor):
        return local.to(parameter.device)
    return DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
