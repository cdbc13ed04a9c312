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
    SLICES: int
    """Column slices in which a tile turns into statistics or gradients, to spare registers."""
    GROUP: int
    """Row blocks that share a weight tile in L2, see `logit_tiles.program_tile`."""
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

INTERPRETER = Config(16, 64, 32, 1, 2, 1, 1)
"""Small, so that small tests have several tiles."""

SEPARATE = {
    "sm_80": Config(128, 64, 64, 1, 16, 8, 3),
    "sm_90": Config(128, 64, 64, 1, 16, 8, 4),
    "sm_100": Config(128, 64, 64, 2, 16, 8, 3),
    "sm_120": Config(64, 128, 32, 1, 16, 8, 3),
    "gfx942": Config(64, 128, 32, 1, 16, 8, 2),
}
"""16-bit inputs, two heads."""

SHARED = SEPARATE | {
    "sm_100": Config(64, 64, 64, 1, 16, 8, 4),
    "sm_120": Config(128, 64, 32, 1, 16, 8, 3),
}
"""16-bit inputs, one head: the low part of the hidden difference is a third operand."""

WITH_EXTRAS = {
    "sm_80": Config(64, 64, 32, 1, 16, 8, 3),
    "sm_90": Config(64, 64, 64, 1, 16, 8, 4),
    "sm_100": Config(64, 64, 64, 1, 16, 8, 3),
    "sm_120": Config(64, 64, 32, 1, 16, 8, 3),
    "gfx942": Config(64, 128, 32, 1, 16, 8, 2),
}
"""16-bit inputs, with soft-cap, bias or targets: more numbers per logit or per row in registers."""

GRADIENT = SEPARATE | {
    "sm_90": Config(128, 128, 64, 1, 16, 8, 3),
    "sm_100": Config(128, 128, 64, 1, 16, 8, 3),
}
"""16-bit inputs, gradient of the KLs of two plain heads: only accumulators live long."""

WIDE_STATISTICS = {"sm_90": Config(128, 128, 64, 2, 16, 8, 3)}
"""16-bit inputs, statistics of two plain heads but for the forward KL's: 64 FLOP per byte from L2
instead of 43. Those of the forward KL, whose base is the teacher, spill in such tiles."""

SHARED_GRADIENT = SHARED | {
    "sm_90": Config(128, 128, 64, 2, 16, 8, 3),
    "sm_100": Config(128, 128, 64, 2, 16, 8, 3),
}
"""16-bit inputs, gradient of the KLs of one plain head: 96 FLOP per byte from L2."""

JSD_SLICES = 4
"""Three logarithms per logit, which the JSD takes, hold more registers than anything else."""

SINGLE = {target: Config(64, 32, 32, 1, 16, 8, 2) for target in TARGETS} | {
    "sm_80": Config(64, 32, 32, 1, 16, 4, 2)
}
"""fp32 inputs: exact fp32 products on the ordinary units (AMD: matrix units)."""


def target_of(device: torch.device) -> str:
    """The entry of `TARGETS` whose configurations run on this device."""
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    # Other 8.x parts have the small shared memory of 12.x and the same tensor instructions.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def config_for(
    kernel: str, target: str, dtype: str, *, shared: bool, extras: bool, by_teacher: bool = False
) -> Config:
    """The shipped configuration.

    `kernel`: statistics | jsd (its gradient too) | gradient (of the KLs); `dtype`: fp32 or a 16-bit
    one; `extras`: soft-cap, bias, targets, or a bias gradient; `by_teacher`: statistics of the
    forward KL.
    """
    if dtype == "fp32":
        return SINGLE[target]
    if extras or (kernel == "jsd" and target == "sm_80"):
        config = WITH_EXTRAS[target]
    elif shared:
        config = (SHARED_GRADIENT if kernel == "gradient" else SHARED)[target]
    elif kernel == "statistics" and not by_teacher:
        config = (SEPARATE | WIDE_STATISTICS)[target]
    else:
        config = (GRADIENT if kernel == "gradient" else SEPARATE)[target]
    return config._replace(SLICES=JSD_SLICES) if kernel == "jsd" else config
