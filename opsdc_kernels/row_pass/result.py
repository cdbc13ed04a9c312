"""The result of every row pass, and the rows that those in torch take at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BUFFERS = 6
"""Blocks that the row pass in torch writes to beside the logits: t − s and those of `fast`."""
EXACT_TEMPORARIES = 16
"""Results of the size of its rows that `exact` holds at once, at most."""
CPU_BLOCK_BYTES = 1536 << 10
"""A block that stays in a CPU's cache."""
GPU_BLOCK_BYTES = 8 << 20


class RowResult(NamedTuple):
    """The result of some rows; the gradient replaces the student's products in their buffer."""

    values: Tensor
    """Shape [`Problem.stat_count`, B]: the first rows of `Stat`."""
    factor: Tensor
    """Shape [B]: the gradient with respect to hidden · weightᵀ is the buffer times this."""


def block_rows(columns: int, device: torch.device) -> int:
    """Rows per element-wise pass in torch."""
    block_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    return max(block_bytes // (4 * columns), 1)


def exact_rows(block_height: int) -> int:
    """Rows of a block that `exact` takes at once: it allocates where `fast` reuses buffers."""
    return max(block_height // 8, 1)
