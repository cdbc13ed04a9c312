"""How much scratch a call may take, how it is cut into chunks, and what it costs.

One unit of cost is one head GEMM, 2·N·V·D floating-point operations.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass

import torch

from opsdc_kernels import auto
from opsdc_kernels.memory import default_workspace_bytes
from opsdc_kernels.problem import GradientsWanted, Problem
from opsdc_kernels.products import GATHER_BLOCK_BYTES, UPCAST_BLOCK_BYTES
from opsdc_kernels.row_pass.choose import RowPass, choose
from opsdc_kernels.row_pass.result import block_rows, exact_rows
from opsdc_kernels.row_pass.threads import PANEL

CPU_COLUMN_CHUNK_ROWS = 256
"""The highest chunk where columns are left out: tokens of lower chunks share more of them."""
GPU_MINIMUM_CHUNK_ROWS = 512
"""Below this a GPU's GEMMs no longer run at their full rate."""
COLUMN_BLOCK_BYTES = 64 << 20
"""Logits that a GPU's passes over the student's take at once where columns are left out."""
COLUMN_BUFFERS = 4
"""Blocks that these passes, in torch, hold at once."""
COLUMN_VECTORS = 64
"""Numbers per vocabulary column that choosing columns takes, those of a thread each included."""
PILOT_PARTS = 128
"""The pilot is V over this columns: their gradient tells the size of the whole one."""
PILOT_BUFFERS = 6
"""Tiles of the pilot that are held at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Everything that the scratch of a chunk depends on beside its rows."""

    vocab_size: int
    dims: tuple[int, int]
    """Hidden sizes of student and teacher."""
    dtype: torch.dtype
    device: torch.device
    row_pass: RowPass

    @classmethod
    def of(cls, problem: Problem, row_pass: RowPass) -> Sizes:
        hidden, teacher = problem.student_hidden, problem.teacher_hidden
        return cls(
            vocab_size=problem.vocab_size,
            dims=(hidden.shape[-1], teacher.shape[-1]),
            dtype=hidden.dtype,
            device=hidden.device,
            row_pass=row_pass,
        )

    @property
    def wide(self) -> int:
        """Bytes of a logit."""
        return 8 if self.dtype == torch.float64 else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A call foretold. `as_dict` is ready for a log or a JSON record."""

    backend: str
    reason: str
    """The reason for this backend."""
    chunk_rows: int
    workspace_bytes: int
    """Scratch the chunks take; freed before the call returns."""
    gemm_units: float
    """Head GEMMs of forward and backward together; one is 2·N·V·D flop."""
    peak_bytes: int
    """Predicted peak beside inputs: scratch, kept gradients and returned gradients."""
    row_passes: str
    """The code that computes divergence and logit gradient of the rows."""
    milliseconds: float | None
    """Forecast of forward and backward on a GPU, see `opsdc_kernels.auto`; None where there is no
    forecast."""

    def as_dict(self) -> dict[str, str | float | None]:
        return asdict(self)

    def __str__(self) -> str:
        forecast = "" if self.milliseconds is None else f", forecast {self.milliseconds:.1f} ms"
        return (
            f"backend {self.backend} ({self.reason}), chunks of {self.chunk_rows} rows, "
            f"workspace {self.workspace_bytes / 2**20:.0f} MiB, {self.gemm_units:g} GEMM units, "
            f"peak {self.peak_bytes / 2**20:.0f} MiB, row passes {self.row_passes}{forecast}"
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
    extras: bool = False,
) -> Plan:
    """Predict what `linear_divergence` does for these sizes.

    Args:
        tokens: rows with weight above 0. (`auto` itself reckons with all rows, whose number is
            known without asking the device.)
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
        extras: soft-cap, bias or target ids are given, for which the fused backend has smaller
            tiles.

    Raises:
        ValueError: `workspace_bytes` holds not one row.
    """
    device = torch.device(device)
    row_pass = choose(device, dtype)
    sizes = Sizes(
        vocab_size=vocab_size,
        dims=(student_dim, teacher_dim or student_dim),
        dtype=dtype,
        device=device,
        row_pass=row_pass,
    )
    picked, reason, milliseconds = backend, "asked for", None
    if backend != "reference":
        call = _call(
            tokens, sizes, workspace_bytes, trainable=trainable_head, gradient=gradient,
            divergence=divergence, shared_head=shared_head, reduction=reduction, extras=extras,
            chunked_only=kept_share is not None,
        )  # fmt: skip
        picked, reason = auto.choose(call) if backend == "auto" else (backend, reason)
        milliseconds = auto.forecast(call, picked)
    gradients = 0
    if gradient:
        saved = tokens * student_dim + (vocab_size * student_dim if trainable_head else 0)
        # Kept in the statistics' dtype until backward, which rounds them to the input's.
        gradients = saved * (sizes.wide + (dtype.itemsize if dtype.itemsize < sizes.wide else 0))
    if picked == "reference":
        rows, scratch = tokens, 6 * sizes.wide * tokens * vocab_size
    elif picked == "fused":
        rows = fused_rows(tokens, sizes, workspace_bytes)
        scratch = gradient * rows * vocab_size * dtype.itemsize
    else:
        rows = chunk_rows(tokens, sizes, workspace_bytes)
        scratch = scratch_bytes(rows, sizes)
    recomputes = picked == "fused" or (reduction == "none" and trainable_head)
    units: float = 2 + gradient * (1 + trainable_head + 2 * recomputes)
    if kept_share is not None and gradient:
        units = 1 + kept_share * (2 + trainable_head)
        if picked == "chunked":
            rows = column_chunk_rows(tokens, sizes, workspace_bytes)
            scratch = column_scratch_bytes(rows, sizes)
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
        row_passes=row_pass.name if picked == "chunked" else picked,
        milliseconds=milliseconds,
    )


def backend_of(problem: Problem, *, chunked_only: bool) -> str:
    """The backend of `auto` for a call; `chunked_only` where no other computes it.

    Within `torch.compile`, where sizes may be symbols, it is `chunked`.
    """
    hidden = problem.student_hidden
    if hidden.device.type != "cuda" or torch.compiler.is_compiling():
        return "chunked"
    wanted, options = GradientsWanted(*problem.wanted), problem.options
    sides = problem.side(0), problem.side(1)
    extras = any(side.bias is not None or side.post is not None for side in sides)
    call = _call(
        hidden.shape[0], Sizes.of(problem, choose(hidden.device, hidden.dtype)),
        options.workspace_bytes, trainable=wanted.weight or wanted.bias, gradient=bool(wanted),
        divergence=options.divergence, shared_head=problem.shared_logits,
        reduction=options.reduction, extras=extras or problem.target_ids is not None,
        chunked_only=chunked_only,
    )  # fmt: skip
    return auto.choose(call)[0]


def _call(
    tokens: int,
    sizes: Sizes,
    workspace_bytes: int | None,
    *,
    trainable: bool,
    gradient: bool,
    divergence: str,
    shared_head: bool,
    reduction: str,
    extras: bool,
    chunked_only: bool,
) -> auto.Call:
    """What `auto` depends on."""
    rows, budget = 1, 0
    if sizes.device.type == "cuda":
        budget = workspace_bytes or default_workspace_bytes(sizes.device)
        fits = workspace_bytes is None or scratch_bytes(1, sizes) <= workspace_bytes
        rows = chunk_rows(tokens, sizes, workspace_bytes) if fits else 0
    return auto.Call(
        tokens=tokens,
        vocab_size=sizes.vocab_size,
        dims=sizes.dims,
        dtype=sizes.dtype,
        device=sizes.device,
        trainable=trainable and gradient,
        gradient=gradient,
        divergence=divergence,
        shared_head=shared_head,
        recomputes=reduction == "none" and trainable and gradient,
        extras=extras,
        rows=rows,
        workspace_bytes=budget,
        sharded=chunked_only,
    )


def chunk_rows(tokens: int, sizes: Sizes, workspace_bytes: int | None) -> int:
    """Rows per chunk, all chunks about equal, such that `scratch_bytes` fits the workspace.

    Raises:
        ValueError: the workspace that was asked for holds not one row.
    """
    budget = default_workspace_bytes(sizes.device) if workspace_bytes is None else workspace_bytes
    heights = range(1, max(tokens, 1) + 1)
    rows = bisect_right(heights, budget, key=lambda rows: scratch_bytes(rows, sizes))
    if workspace_bytes is None:
        rows = max(rows, GPU_MINIMUM_CHUNK_ROWS if sizes.device.type == "cuda" else 1)
    if rows < 1:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} is below the {scratch_bytes(1, sizes)} that one "
            f"row of {sizes.vocab_size} columns takes; give more, or None for the default"
        )
    return equal_rows(tokens, rows)


def fused_rows(tokens: int, sizes: Sizes, workspace_bytes: int | None) -> int:
    """Rows of the fused backend's gradient tile, the only scratch of its size, or one."""
    budget = default_workspace_bytes(sizes.device) if workspace_bytes is None else workspace_bytes
    return min(max(budget // (sizes.vocab_size * sizes.dtype.itemsize), 1), max(tokens, 1))


def column_chunk_rows(
    tokens: int, sizes: Sizes, workspace_bytes: int | None, most: int | None = None
) -> int:
    """Rows per chunk where columns are left out, `most` or fewer, such that `column_scratch_bytes`
    fits the workspace, or one."""
    budget = default_workspace_bytes(sizes.device) if workspace_bytes is None else workspace_bytes
    heights = range(1, max(tokens, 1) + 1)
    rows = bisect_right(heights, budget, key=lambda rows: column_scratch_bytes(rows, sizes))
    rows = max(rows, 1)
    if sizes.device.type == "cpu":
        rows = min(rows, most or CPU_COLUMN_CHUNK_ROWS)
    elif workspace_bytes is None:
        rows = max(rows, GPU_MINIMUM_CHUNK_ROWS)
    return equal_rows(tokens, rows)


def equal_rows(tokens: int, rows: int) -> int:
    """Rows per chunk of as many, about equal chunks as chunks of `rows` would be; full panels of
    the row passes in C, and of products, where these are not more rows."""
    chunks = max(-(-tokens // rows), 1)
    equal = max(-(-tokens // chunks), 1)
    return equal if chunks == 1 else min(-(-equal // PANEL) * PANEL, rows)


def column_block_rows(columns: int, device: torch.device) -> int:
    """Rows of the student's logits that a pass in torch takes at once where columns are left
    out."""
    if device.type == "cpu":
        return block_rows(columns, device)
    return max(COLUMN_BLOCK_BYTES // (4 * columns), 1)


def scratch_bytes(rows: int, sizes: Sizes) -> int:
    """Two logit buffers, copies of the chunk's hidden states, what the row pass holds and, for a
    16-bit head on a CPU, its upcast block."""
    columns, row_pass = sizes.vocab_size, sizes.row_pass
    height = min(block_rows(columns, sizes.device), rows)
    block = row_pass.buffers * height + row_pass.temporaries * min(exact_rows(height), height)
    upcast = 0
    if sizes.device.type == "cpu" and sizes.dtype.itemsize == 2:
        upcast = min(UPCAST_BLOCK_BYTES, 4 * columns * max(sizes.dims))
    per_row = 2 * sizes.wide * columns + 3 * sizes.wide * sum(sizes.dims)
    return rows * per_row + block * columns * sizes.wide + upcast


def column_scratch_bytes(rows: int, sizes: Sizes) -> int:
    """The same as `scratch_bytes` where columns are left out. The second logit buffer holds what is
    gathered of both logits; rows of the heads are gathered in blocks."""
    columns, wide, widest = sizes.vocab_size, sizes.wide, max(sizes.dims)
    most = UPCAST_BLOCK_BYTES if sizes.device.type == "cpu" else GATHER_BLOCK_BYTES
    gathered = 2 * min(most, wide * columns * widest)
    block = COLUMN_BUFFERS * min(column_block_rows(columns, sizes.device), rows) * columns * wide
    pilot = -(-columns // PILOT_PARTS) * (PILOT_BUFFERS * rows + 2 * widest) * wide
    vectors = COLUMN_VECTORS * columns * wide
    return scratch_bytes(rows, sizes) + gathered + block + pilot + vectors
