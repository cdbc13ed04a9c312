"""The proof that a checkpoint holds all that is trained, before there is anything to lose."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from opsdc.errors import ModelError
from opsdc.ranks.files import load_weights, save_weights
from opsdc.ranks.shard import local
from opsdc.ranks.talk import Ranks

_MOST_BYTES = 8 << 30
"""Of larger trained parameters the proof would take minutes."""


@torch.no_grad()
def check_saving(model: Any, output_dir: str | Path, ranks: Ranks) -> None:
    """Save the model's weights as a checkpoint does, load them again, and compare.

    Nothing is left on disk, and the parameters are as they were. Raises ModelError for a trained
    parameter that does not come back.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if sum(p.numel() * p.element_size() for p in trained.values()) > _MOST_BYTES:
        return
    # The copies take the place of gradients, which do not exist yet.
    copies = {name: p.detach().clone() for name, p in trained.items()}
    folder = Path(output_dir).absolute()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    place = Path(ranks.on_first_rank(lambda: tempfile.mkdtemp(prefix=".opsdc-", dir=parent)))
    fault = ""
    try:
        save_weights(model, place, ranks)
        for p in trained.values():
            p.zero_()
        ranks.on_each_rank(lambda: load_weights(model, place))
        lost = [
            name
            for name, p in trained.items()
            if not torch.allclose(local(p), local(copies[name]), rtol=0, atol=0, equal_nan=True)
        ]
        if lost:
            fault = f"{len(lost)} trained parameters do not come back, {lost[0]} for one"
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        fault = f"they cannot be read again: {error}"
    finally:
        for name, p in trained.items():
            p.copy_(copies[name])
        if ranks.first:
            shutil.rmtree(place, ignore_errors=True)
    if ranks.any(bool(fault)):
        raise ModelError(
            f"checkpoints of this model would lose weights: {fault or 'on another rank'}. A PEFT "
            "adapter must be the only one and be called 'default', with nothing trained beside it; "
            "another model must be what its class builds from its config"
        )
