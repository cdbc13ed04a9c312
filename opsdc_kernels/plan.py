"""How much scratch a call may take, how it is cut into chunks, and what it costs.

One unit of cost is one head GEMM, 2·N·V·D floating-point operations.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import asdict, dataclass

import torch

from opsdc_kernels.gemm import GATHER_BLOCK_BYTES, UPCAST_BLOCK_BYTES
from opsdc_kernels.row_pass.build import native
from opsdc_kernels.row_pass.threads import PANEL

CPU_WORKSPACE_CAP_BYTES = 192 << 20
"""More rows per chunk than this buys at real vocabularies make nothing faster on a CPU."""
CPU_COLUMN_CHUNK_ROWS = 256
"""At most, where columns are left out: tokens of lower chunks share more of them."""
GPU_MINIMUM_CHUNK_ROWS = 512
"""Below this a GPU's GEMMs no longer run at their full rate."""
CPU_BUFFERS = 6
"""Blocks that the row passes in torch (not those in C) write to: t − s and those of `rows_cpu`."""
COLUMN_BLOCK_BYTES = 64 << 20
"""What a GPU's passes over the student's logits take at once where columns are left out."""
COLUMN_BUFFERS = 4
"""Blocks that these passes, in torch, hold at once."""
COLUMN_VECTORS = 64
"""Numbers per vocabulary column that choosing columns takes, those of a thread each included."""
PILOT_PARTS = 128
"""V over the columns whose gradient tells the size of the whole one."""
PILOT_BUFFERS = 6
"""Tiles of these columns at once."""
EXACT_TEMPORARIES = 16
"""Results of the size of its rows that the exact row pass holds at once, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a call does, before it does it. `as_dict` is ready for a log or a JSON record."""

    backend: str
    reason: str
    """Why this backend."""
    chunk_rows: int
    workspace_bytes: int
    """Scratch the chunks take; freed before the call returns."""
    gemm_units: float
    """Head GEMMs of forward and backward together; one is 2·N·V·D flop."""
    peak_bytes: int
    """Predicted peak beside inputs: scratch, kept gradients and returned gradients."""
    row_passes: str
    """What computes divergence and logit gradient of the rows."""

    def as_dict(self) -> dict[str, str | float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"backend {self.backend} ({self.reason}), chunks of {self.chunk_rows} rows, "
            f"workspace {self.workspace_bytes / 2**20:.0f} MiB, {self.gemm_units:g} GEMM units, "
            f"peak {self.peak_bytes / 2**20:.0f} MiB, row passes {self.row_passes}"
        )


def estimate(
    *,
    tokens: int,
    vocab_size: int,
    student_dim: int,
    teacher_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trainable_head: bool = True,
    gradient: bool = True,
    divergence: str = "reverse_kl",
    shared_head: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    kept_share: float | None = None,
) -> Plan:
    """Predicts what `linear_divergence` does for these sizes.

    Args:
        tokens: rows with weight above 0.
        vocab_size: columns scored.
        student_dim, teacher_dim: hidden sizes; the teacher's defaults to the student's.
        dtype: of hidden states and weights.
        device: on which they lie.
        trainable_head: the weight asks for a gradient.
        gradient: False for a loss-only pass.
        divergence: a JSD costs the fused forward a second pass.
        shared_head: of 16 bits, costs the fused backend a GEMM more per pass, for the low half of
            the difference of hidden states.
        reduction, backend, workspace_bytes: as given to `linear_divergence`.
        kept_share: with a `skip_tolerance`, the share of columns that it keeps (`DivergenceStats`
            of an earlier call say; it depends on the data). None: none is left out.

    Raises:
        ValueError: `workspace_bytes` holds not one row.
    """
    device = torch.device(device)
    picked, reason = choose_backend(backend, device, gradient)
    dims = (student_dim, teacher_dim or student_dim)
    wide = 8 if dtype == torch.float64 else 4
    gradients = 0
    if gradient:
        saved = tokens * student_dim + (vocab_size * student_dim if trainable_head else 0)
        # Kept in the statistics' dtype until backward, which rounds them to the input's.
        gradients = saved * (wide + (dtype.itemsize if dtype.itemsize < wide else 0))
    if picked == "reference":
        rows, scratch = tokens, 6 * wide * tokens * vocab_size
    else:
        rows = chunk_rows(tokens, vocab_size, dims, dtype, device, workspace_bytes)
        scratch = scratch_bytes(rows, vocab_size, dims, dtype, device)
    recomputes = picked == "fused" or (reduction == "none" and trainable_head)
    units: float = 2 + gradient * (1 + trainable_head + 2 * recomputes)
    if kept_share is not None and gradient:
        units = 1 + kept_share * (2 + trainable_head)
        if picked == "chunked":
            rows = column_chunk_rows(tokens, vocab_size, dims, dtype, device, workspace_bytes)
            scratch = column_scratch_bytes(rows, vocab_size, dims, dtype, device)
    if picked == "fused":
        units += 2 * (divergence == "jsd")
        units += (1 + gradient) * (shared_head and dtype.itemsize == 2)
    return Plan(
        backend=picked,
        reason=reason,
        chunk_rows=rows,
        workspace_bytes=scratch,
        gemm_units=units,
        peak_bytes=scratch + gradients,
        row_passes=row_passes(picked, device, dtype),
    )


def choose_backend(backend: str, device: torch.device, gradient: bool) -> tuple[str, str]:
    """The backend that runs, and why."""
    if backend != "auto":
        return backend, "asked for"
    if device.type != "cuda":
        return "chunked", f"the fastest on {device.type}"
    return "chunked", "fewest GEMM units, and its scratch fits the workspace"


def row_passes(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """What the rows of a chunk go through, and why."""
    if backend != "chunked":
        return backend
    if device.type == "cuda":
        return "torch (float64)" if dtype == torch.float64 else "triton"
    return "torch (float64)" if dtype == torch.float64 else native().description


def compiled_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they go through C."""
    return device.type == "cpu" and dtype != torch.float64 and native().dll is not None


def default_workspace_bytes(device: torch.device) -> int:
    """1/64 of the device's *total* memory, so that a run repeats whatever else is running."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 64
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total // 64, CPU_WORKSPACE_CAP_BYTES)


def chunk_rows(
    tokens: int,
    vocab_size: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    workspace_bytes: int | None,
    *,
    in_torch: bool = False,
) -> int:
    """Rows per chunk, all chunks about equal, such that `scratch_bytes` fits the workspace."""
    asked = workspace_bytes
    budget = default_workspace_bytes(device) if asked is None else asked
    heights = range(1, max(tokens, 1) + 1)

    def scratch(rows: int) -> int:
        return scratch_bytes(rows, vocab_size, dims, dtype, device, in_torch=in_torch)

    rows = bisect_right(heights, budget, key=scratch)
    if asked is None:
        rows = max(rows, GPU_MINIMUM_CHUNK_ROWS if device.type == "cuda" else 1)
    if rows < 1:
        raise ValueError(
            f"workspace_bytes={asked} is below the {scratch(1)} that one row of {vocab_size} "
            "columns takes; give more, or None for the default"
        )
    return equal_rows(tokens, rows)


def column_chunk_rows(
    tokens: int,
    vocab_size: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    workspace_bytes: int | None,
) -> int:
    """Rows per chunk where columns are left out, such that `column_scratch_bytes` fits the
    workspace, or one."""
    budget = default_workspace_bytes(device) if workspace_bytes is None else workspace_bytes

    def scratch(rows: int) -> int:
        return column_scratch_bytes(rows, vocab_size, dims, dtype, device)

    rows = max(bisect_right(range(1, max(tokens, 1) + 1), budget, key=scratch), 1)
    if device.type == "cpu":
        rows = min(rows, CPU_COLUMN_CHUNK_ROWS)
    elif workspace_bytes is None:
        rows = max(rows, GPU_MINIMUM_CHUNK_ROWS)
    return equal_rows(tokens, rows)


def equal_rows(tokens: int, rows: int) -> int:
    """Rows per chunk of as many, about equal chunks as chunks of `rows` would be; full panels of
    the row passes in C, and of products, where these are not more rows."""
    chunks = max(-(-tokens // rows), 1)
    equal = max(-(-tokens // chunks), 1)
    return equal if chunks == 1 else min(-(-equal // PANEL) * PANEL, rows)


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows per element-wise pass in torch: few enough that the block stays in a CPU's cache."""
    block_bytes = (1536 << 10) if device.type == "cpu" else (8 << 20)
    return max(block_bytes // (4 * vocab_size), 1)


def column_block_rows(vocab_size: int, device: torch.device) -> int:
    """The same where columns are left out."""
    if device.type == "cpu":
        return block_rows(vocab_size, device)
    return max(COLUMN_BLOCK_BYTES // (4 * vocab_size), 1)


def exact_rows(block_height: int) -> int:
    """Rows of a block that the exact row pass takes at once: it allocates where others reuse."""
    return max(block_height // 8, 1)


def scratch_bytes(
    rows: int,
    vocab_size: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_torch: bool = False,
) -> int:
    """Two logit buffers, copies of the chunk's hidden states, the blocks of the row passes in torch
    (in Triton they have none, in C those of rows in doubt) and, for a 16-bit head on a CPU, its
    upcast block. `in_torch`: the row passes are in torch wherever they run."""
    wide = 8 if dtype == torch.float64 else 4
    block = 0
    if device.type != "cuda" or wide == 8:
        height = min(block_rows(vocab_size, device), rows)
        in_c = compiled_rows(device, dtype) and not in_torch
        buffers = 0 if in_c else CPU_BUFFERS * height
        height = buffers + EXACT_TEMPORARIES * min(exact_rows(height), height)
        block = height * vocab_size * wide
    upcast = 0
    if device.type == "cpu" and dtype.itemsize == 2:
        upcast = min(UPCAST_BLOCK_BYTES, 4 * vocab_size * max(dims))
    per_row = 2 * wide * vocab_size + 3 * wide * sum(dims)
    return rows * per_row + block + upcast


def column_scratch_bytes(
    rows: int,
    vocab_size: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """As `scratch_bytes` where columns are left out. The second logit buffer holds what is gathered
    of the logits, of student and teacher; rows of the heads are gathered in blocks."""
    wide = 8 if dtype == torch.float64 else 4
    most = UPCAST_BLOCK_BYTES if device.type == "cpu" else GATHER_BLOCK_BYTES
    gathered = 2 * min(most, wide * vocab_size * max(dims))
    block = COLUMN_BUFFERS * min(column_block_rows(vocab_size, device), rows) * vocab_size * wide
    pilot = -(-vocab_size // PILOT_PARTS) * (PILOT_BUFFERS * rows + 2 * max(dims)) * wide
    vectors = COLUMN_VECTORS * vocab_size * wide
    chunks = scratch_bytes(rows, vocab_size, dims, dtype, device)
    return chunks + gathered + block + pilot + vectors
