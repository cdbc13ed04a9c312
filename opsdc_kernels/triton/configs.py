"""Tile sizes per architecture, chosen by what `python -m opsdc_kernels.audit` shows.

No configuration spills a register and all fit the target's shared memory. There is no autotuning:
the same machine computes the same bits. Plain pointer loads with software pipelining are used on
every target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """One launch configuration of a kernel with a head GEMM inside."""

    BM: int
    """Rows of a tile."""
    BN: int
    """Vocabulary columns of a tile."""
    BK: int
    """Hidden units per step."""
    GROUP: int
    """Row blocks that share a weight tile in L2, see `tiles.program_tile`."""
    num_warps: int
    num_stages: int


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

SHARED_MEMORY_LIMIT = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
"""Bytes per block, from the vendors' programming guides."""

INTERPRETER = Config(16, 32, 32, 2, 1, 1)

# Contraction of a multiply and an add would turn t - s into fma(h, pre, -s): not 0 where teacher
# and student are equal.
ENABLE_FP_FUSION = False

HALF = {
    "sm_80": Config(64, 128, 64, 16, 8, 3),
    "sm_90": Config(128, 128, 64, 16, 8, 3),
    "sm_100": Config(128, 128, 64, 16, 8, 3),
    "sm_120": Config(64, 128, 32, 16, 8, 3),
    "gfx942": Config(64, 128, 32, 16, 8, 2),
}
"""16-bit inputs, tensor cores."""

SINGLE = {
    "sm_80": Config(64, 64, 32, 16, 8, 2),
    "sm_90": Config(64, 64, 32, 16, 8, 2),
    "sm_100": Config(64, 64, 32, 16, 8, 2),
    "sm_120": Config(64, 64, 32, 16, 8, 2),
    "gfx942": Config(64, 64, 32, 16, 8, 2),
}
"""fp32 inputs, exact fp32 products."""


def target_of(device: torch.device) -> str:
    """The entry of `TARGETS` whose configurations run on this device."""
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    # Other 8.x parts have the small shared memory of 12.x and the same tensor instructions.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def config_for(target: str, dtype: torch.dtype) -> Config:
    return (SINGLE if dtype == torch.float32 else HALF)[target]
