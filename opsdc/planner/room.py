"""Room on this machine for a run that is about to start: on its disk and in its memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import CheckpointError
from opsdc.method.teacher import Teacher
from opsdc.models.head import read_head
from opsdc.planner.plan import loss_plan
from opsdc.planner.sizes import sizes_of
from opsdc.ranks import shard
from opsdc.ranks.talk import ALONE, Ranks
from opsdc.record import checkpoint


def check_disk(model: Any, teacher: Teacher, config: OPSDCConfig) -> str:
    """Compare free disk space with the checkpoints that are kept and the one being written.

    Returns a line for the log. Raises CheckpointError where there is less: the run would fail hours
    later.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in saved)
    moments = 2 * sum(p.numel() * p.element_size() for p in trained)
    size = weights * (2 if teacher.is_copy else 1) + moments
    saves = -(-config.train.steps // config.train.save_every) if config.train.save_every else 1
    folder = Path(config.output_dir) / "checkpoints"
    wanted = min(config.train.keep + 1, saves)
    needed = size * max(wanted - len(checkpoint.listing(folder)), 1)
    # The folder itself is made with the first checkpoint.
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    line = (
        f"disk: {needed / 2**30:.2f} GiB for checkpoints of {size / 2**30:.2f} GiB, "
        f"{free / 2**30:.2f} GiB free in {parent}"
    )
    if needed > free:
        raise CheckpointError(
            f"{line}: too little; free some, lower train.keep, or name another output_dir"
        )
    return line


def check_memory(model: Any, config: OPSDCConfig, ranks: Ranks = ALONE, other: Any = None) -> str:
    """Compare free memory with gradients, moments and the loss; activations are not counted.

    `other` is another model that teaches, which is in memory already.

    Returns a line for the log, which only warns where there is less: activations depend on
    attention and checkpointing, and free memory on other programs.
    """
    device, sizes = read_head(model).weight.device, sizes_of(model, config.model)
    # A forward holds at most so many response tokens.
    tokens = config.train.max_tokens_per_micro_batch
    its_sizes = None if other is None else sizes_of(other, config.model)
    teacher_dim = sizes.teacher_dim(config.teacher, its_sizes)
    plan = loss_plan(sizes, config, tokens, device, config.loss.workspace_bytes, teacher_dim)
    # Gradients and two moments in float32.
    held = 12 * sizes.trained // (ranks.size if shard.is_sharded(model) else 1)
    needed = held + plan.peak_bytes
    free = _free_bytes(device)
    line = (
        f"memory: {needed / 2**30:.2f} GiB for gradients, moments and the loss beside activations, "
        + ("free unknown" if free is None else f"{free / 2**30:.2f} GiB free")
    )
    if free is not None and needed > free:
        return (
            f"warning: {line}; lower train.max_tokens_per_micro_batch or loss.workspace_bytes, or "
            "train an adapter (model.lora)"
        )
    return line


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU or of this machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable")), None)
